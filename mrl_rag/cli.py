"""The `mrl-rag` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mrl_rag import MrlRagError, Report, TwoStageIndex, TwoStageRetriever, __version__
from mrl_rag.errors import InvalidInput

# Ids that are printed per kind of finding, before the rest is only counted.
_MAX_IDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those after the command's name; None for those of the process.

    Returns:
        The exit status: 0 when nothing is left to do, 1 when something is, 2 when the command can't be carried out.
    """
    asked = _parser().parse_args(arguments)
    try:
        with TwoStageIndex(asked.db, _collection(asked.db, asked.collection)) as index:
            if asked.command == "reindex":
                index.reindex(asked.shortlist_dim, asked.rotation, progress=True)
            report = _repair(index, asked.encode) if asked.command == "repair" else index.verify()
            lines = [_header(index), *_lines(report, asked.db)]
    except MrlRagError as error:
        sys.stderr.write(f"mrl-rag: {error}\n")
        return 2
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mrl-rag", description="Look after a two-stage index in a folder.")
    parser.add_argument("--version", action="version", version=f"mrl-rag {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    reindex = commands.add_parser("reindex", help="rebuild the Chroma collection from the archive, encoding nothing")
    repair = commands.add_parser("repair", help="mend what verify finds, losing nothing that was acknowledged")
    verify = commands.add_parser("verify", help="compare Chroma and the archive, and try the search")
    for command in (verify, repair, reindex):
        command.add_argument("db", metavar="DB", help="the folder the index is in")
        command.add_argument("--collection", help="its collection (default: the only one in the folder)")
    repair.add_argument(
        "--encode", action="store_true", help="encode records without a sound full vector again, by the index's model"
    )
    reindex.add_argument("--shortlist-dim", type=int, help="dimension that is searched first (default: as now)")
    reindex.add_argument("--rotation", choices=["fit", "none"], help="fit a rotation or drop it (default: as now)")
    return parser


def _collection(folder: str, wanted: str | None) -> str:
    if not Path(folder).is_dir():
        raise InvalidInput(f"{folder} is not a folder; pass the one that the index is in.")
    there = TwoStageIndex.names(folder)
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted not in there:
        asked = "several indexes" if wanted is None and there else f"no index {wanted or ''}".rstrip()
        listed = f" Name one of these by --collection: {', '.join(there)}." if there else ""
        raise InvalidInput(f"{folder} has {asked}.{listed}")
    return wanted


def _header(index: TwoStageIndex) -> str:
    model = f"model {index.model} (fingerprint {index.fingerprint})" if index.model else "model not known"
    return f"{index.name}: {model}, {index.shortlist_dim} of {index.full_dim} dimensions, rotation {index.rotation}"


def _repair(index: TwoStageIndex, encode: bool) -> Report:
    if not encode:
        return index.repair()
    with TwoStageRetriever(None, index) as retriever:
        return retriever.repair()


def _lines(report: Report, folder: str) -> list[str]:
    lines = [f"{report.records} records: {'nothing is wrong' if report.ok else 'something is wrong'}"]
    for kind, ids in asdict(report).items():
        if isinstance(ids, list) and ids:
            more = f" and {len(ids) - _MAX_IDS} more" if len(ids) > _MAX_IDS else ""
            of = f" of {report.tried} tried" if kind == "unreachable" else ""
            lines.append(f"{kind}: {len(ids)}{of} ({', '.join(ids[:_MAX_IDS])}{more})")
    if report.chroma_damaged:
        lines.append(f"Chroma's own file is damaged ({report.chroma_damaged}): restore the folder from a backup")
    elif report.to_encode:
        lines.append(f"{report.to_encode} without a sound full vector: run `mrl-rag repair --encode {folder}`")
    elif not report.ok:
        lines.append(f"run `mrl-rag repair {folder}`")
    return lines


if __name__ == "__main__":
    sys.exit(main())
