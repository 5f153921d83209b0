"""The `mrl-rag` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mrl_rag import MrlRagError, Report, TwoStageIndex, __version__
from mrl_rag.errors import InvalidInput

# Ids of one kind that a report names before it only counts them.
_NAMED = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what stands after the command's name; None for those of the process.

    Returns:
        The exit status: 0 when nothing is left to do, 1 when something is, 2 when the command can't be carried out.
    """
    asked = _parser().parse_args(arguments)
    try:
        if not Path(asked.db).is_dir():
            raise InvalidInput(f"{asked.db} is not a folder; pass the one that the index is in.")
        index = TwoStageIndex(asked.db, asked.collection)
        if index.full_dim is None:
            raise InvalidInput(f"{asked.db} has no collection {asked.collection!r}; name another by --collection.")
        if asked.command == "reindex":
            index.reindex(asked.shortlist_dim, asked.rotation, progress=True)
        report = index.repair() if asked.command == "repair" else index.verify()
        index.close()
    except MrlRagError as error:
        sys.stderr.write(f"mrl-rag: {error}\n")
        return 2
    sys.stdout.write("\n".join(_lines(report)) + "\n")
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mrl-rag", description="Look after a two-stage index in a folder.")
    parser.add_argument("--version", action="version", version=f"mrl-rag {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    reindex = commands.add_parser("reindex", help="fill Chroma anew from the archive, encoding nothing")
    for command in (
        commands.add_parser("verify", help="compare Chroma and the archive, and try the search"),
        commands.add_parser("repair", help="mend what verify finds, losing nothing that was acknowledged"),
        reindex,
    ):
        command.add_argument("db", metavar="DB", help="the folder the index is in")
        command.add_argument("--collection", default="docs", help="its collection (default: docs)")
    reindex.add_argument("--shortlist-dim", type=int, help="numbers that Chroma searches (default: as now)")
    reindex.add_argument("--rotation", choices=["fit", "none"], help="fit a rotation or drop it (default: as now)")
    return parser


def _lines(report: Report) -> list[str]:
    lines = [f"{report.records} records: {'nothing is wrong' if report.ok else 'something is wrong'}"]
    for kind, ids in asdict(report).items():
        if isinstance(ids, list) and ids:
            more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
            of = f" of {report.tried} tried" if kind == "unreachable" else ""
            lines.append(f"{kind}: {len(ids)}{of} ({', '.join(ids[:_NAMED])}{more})")
    if report.chroma_damaged:
        lines.append(f"Chroma's own file is damaged ({report.chroma_damaged}): bring the folder back from a backup")
    if report.search_broken:
        lines.append("the search is broken: run `mrl-rag repair`")
    return lines


if __name__ == "__main__":
    sys.exit(main())
