"""What people read: passages, tables, reports. Colours and links on terminals alone."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mrl_rag import HeadCard, Hit, Report, Stage, TwoStageIndex
    from mrl_rag.doctor import Finding
    from mrl_rag.evaluation import Evaluation
    from mrl_rag.files import FilesReport
    from mrl_rag.index import IndexInfo, Tuning
    from mrl_rag.models import ModelSpec

# Ids and files that are printed per kind of finding, before the rest is only counted.
_MAX_LISTED = 5
_WIDEST = 100
_INDENT = "   "
_CUT = " ... "
_PASSAGE_LINES = 4
# Columns for "trouble" and a space.
_KIND = 8
# Of two words one of which begins the other: least length of the shorter, and most letters that the longer has more.
_MIN_STEM, _MAX_ENDING = 3, 4
# Control characters, those that turn the reading direction, and halves of characters.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PROSE = (".md", ".markdown", ".rst", ".txt")
# A line break that only kept the line short: after a long line, and before one that begins no list, table or heading.
_WRAPPED_PROSE = re.compile(r"(?<=[^\n]{60})(?<!  )\n {0,3}(?![-+#|>]|\* |\d+[.)] )(?=\S)")
# Words of questions that say nothing about the answer.
_COMMON = frozenset(
    """
    a an and are as at be by can do does for from have how i if in is it me my not of on or that the there this to was
    we what when where which who why will with you your
    """.split()  # noqa: SIM905
)


def _console() -> Console:
    # Made anew, since standard output may be another one by now. No emoji or markup: these are users' texts.
    plain = bool(os.environ.get("NO_COLOR"))  # rich would still write bold text and links
    # The terminal wraps lines, so that pipes get whole ones.
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True, color_system=None if plain else "auto")


def print_hits(question: str, hits: Sequence[Hit], explain: bool) -> None:
    """Print the passages that were found."""
    console = _console()
    if not hits:
        console.print("nothing was found")
    for rank, hit in enumerate(hits, 1):
        head = Text(f"{rank}. ", style="bold").append(f"{hit.score:.2f}  ", style="cyan").append(_place(hit))
        headings = one_line(hit.metadata.get("headings") or "")
        if headings:
            apart = "  " if head.cell_len + cell_len(headings) + 2 <= console.width else f"\n{_INDENT}"
            head.append(f"{apart}{headings}", style="dim")
        console.print(head)
        for line in _passage(hit, question, min(console.width, _WIDEST) - len(_INDENT)):
            console.print(Text(_INDENT).append_text(line))
        for stage in hit.stages if explain else ():
            console.print(Text(f"{_INDENT}{_stage(stage)}", style="dim"))
        if rank < len(hits):
            console.print()


def _place(hit: Hit) -> Text:
    """Return where a passage is: "docs/search.md:12", with a link to the file on terminals."""
    path = hit.metadata.get("path")
    if not isinstance(path, str):
        return Text(one_line(hit.id), style="bold")
    page, line = hit.metadata.get("page"), hit.metadata.get("line")
    place = one_line(_shown(path)) + (f":{line}" if line else f", page {page}" if page else "")
    return Text(place, style=Style(bold=True, link=Path(path).as_uri() if Path(path).is_absolute() else None))


def _shown(path: str) -> str:
    try:
        here = Path.cwd()
    except OSError:  # the current folder was removed
        return path
    return os.path.relpath(path, here) if Path(path).is_relative_to(here) else path


def _passage(hit: Hit, question: str, width: int) -> list[Text]:
    """Return a few lines of a passage: those with most of the question's words, which are lit up."""
    text = Text(_readable(hit).expandtabs(4).strip("\n"), end="")
    words = {word for word in re.findall(r"\w+", question.casefold()) if word not in _COMMON and len(word) > 1}
    for found in re.finditer(r"\w+", text.plain):
        if any(_alike(word, found[0].casefold()) for word in words):
            text.stylize("bold yellow", found.start(), found.end())
    # Not `textwrap`: it takes Chinese letters, which are two columns wide, for one.
    width -= len(_CUT.strip()) + 1
    lines = [line for line in text.wrap(Console(width=width), width) if line.plain.strip()]
    for line in lines:
        line.rstrip()
    last = max(0, len(lines) - _PASSAGE_LINES)
    lit = [_lit_words(lines[row : row + _PASSAGE_LINES]) for row in range(last + 1)]
    best = [row for row, count in enumerate(lit) if count == max(lit)]
    # In the middle of the best, so that lines around the words are seen; without any, the passage's beginning.
    start = best[len(best) // 2] if max(lit) else 0
    shown = lines[start : start + _PASSAGE_LINES]
    if start:
        shown[0] = Text(_CUT.lstrip()).append_text(shown[0])
    if start < last:
        shown[-1].append(_CUT.rstrip())
    return shown


def _readable(hit: Hit) -> str:
    """Return a passage whose prose is as wide as the terminal, without characters that would change the terminal."""
    text = _CONTROLS.sub("\ufffd", (hit.document or "").replace("\r\n", "\n"))
    prose = Path(str(hit.metadata.get("path", ""))).suffix.lower() in _PROSE and "```" not in text
    return _WRAPPED_PROSE.sub(" ", text) if prose else text


def _alike(one: str, other: str) -> bool:
    """Say whether words are the same, or one has a short ending more: "run" and "runs", "index" and "indexing"."""
    shorter, longer = sorted((one, other), key=len)
    return one == other or (
        len(shorter) >= _MIN_STEM and len(longer) - len(shorter) <= _MAX_ENDING and longer.startswith(shorter)
    )


def _lit_words(lines: Sequence[Text]) -> int:
    """Return how many different words are lit up."""
    return len({line.plain[span.start : span.end].casefold() for line in lines for span in line.spans})


def _stage(stage: Stage) -> str:
    score = "" if stage.score is None else f", score {stage.score:.4f}"
    rounds = "" if stage.rounds == 1 else f" in round {stage.rounds}"
    return (
        f"{stage.dim} dimensions: rank {stage.rank} of {stage.candidates}{rounds}{score}, {stage.milliseconds:.2f} ms"
    )


def print_files(report: FilesReport) -> None:
    """Print what was done with files."""
    console = _console()
    console.print(
        f"{report.files:,} files, {report.unchanged:,} of them unchanged: {report.chunks:,} passages, "
        f"{report.encoded:,} encoded, {report.removed:,} removed"
    )
    if report.ignored:
        kinds = Counter(Path(problem.path).suffix.lower() or Path(problem.path).name for problem in report.ignored)
        listed = ", ".join(f"{count} {one_line(kind)}" for kind, count in kinds.most_common(_MAX_LISTED))
        console.print(f"left out, being no documents: {listed}")
    if report.unreadable:
        console.print(f"{len(report.unreadable):,} could not be read:", style="bold red")
        for problem in report.unreadable:
            console.print(f"  {one_line(problem.path)}: {problem.reason}")


def print_info(indexes: Sequence[IndexInfo]) -> None:
    """Print what indexes are, and what they take."""
    console = _console()
    for number, index in enumerate(indexes):
        if number:
            console.print()
        console.print(Text(index.name, style="bold"))
        recall = "not measured" if index.recall is None else f"{index.recall:.1%} of the true top 10"
        facts = {
            "records": f"{index.records:,}",
            "model": _model(index),
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
                console.print(f"  {name:<17} {value}")


def _model(index: IndexInfo | TwoStageIndex) -> str:
    return f"{index.model} (fingerprint {index.fingerprint})" if index.model else "not known"


def _bytes(count: int | None, note: str | None = None) -> str:
    return "" if count is None else size(count) + (f" ({note})" if note else "")


def size(count: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def print_models(rows: Sequence[ModelSpec], places: Mapping[str, Path | None]) -> None:
    """Print the table of models, which fits 80 columns."""
    cells = [("name", "dimensions", "language", "licence", "here")]
    for row in rows:
        dims = ", ".join(map(str, row.dims))
        cells.append((row.name, dims, row.languages, row.licence, "yes" if places[row.name] else "no"))
    console = _console()
    _print_columns(console, cells)
    console.print("\nThose that aren't here would be downloaded from the hub at their first use.")


def _print_columns(console: Console, cells: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, the first one as the heads of the columns."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for number, line in enumerate(cells):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        console.print(Text(text, style="bold" if number == 0 else ""))


def print_evaluation(evaluation: Evaluation) -> None:
    """Print what each way to search costs and finds, and the questions that lost most."""
    console = _console()
    ways = [evaluation.reference, *evaluation.results]
    first, *others = ways[0].scores
    rate = "" if math.isnan(evaluation.encode_rate) else f", {evaluation.encode_rate:,.1f} passages encoded per second"
    console.print(
        f"{one_line(evaluation.name)}: {evaluation.records:,} records, {len(evaluation.questions):,} questions, model "
        f"{one_line(evaluation.model)}{rate}\nlabels: {evaluation.labels}"
    )
    cells = [["search", "dims", "vectors", "bytes", first, *others[1:], "ms"]]
    for way in ways:
        cells.append(
            [
                way.method if way.shortlist_size is None else f"{way.method}, {way.shortlist_size}",
                str(way.dim),
                way.precision,
                str(way.bytes_per_record),
                str(way.scores[first]),
                *(f"{way.scores[name].mean:.3f}" for name in others[1:]),
                f"{way.milliseconds:.2f}",
            ]
        )
    _print_columns(console, cells)
    for lost in evaluation.lost[:_MAX_LISTED]:
        question = Text(one_line(lost.question), end="")
        question.truncate(_WIDEST - len("lost 0.000 to 0.000: "), overflow="ellipsis")
        console.print(f"lost {lost.before:.3f} to {lost.after:.3f}: {question.plain}")


def print_tuning(index: TwoStageIndex, tuning: Tuning) -> None:
    """Print the searches that were tried, and the one that was chosen."""
    console = _console()
    if not tuning.candidates:
        console.print(f"{index.name}: {len(index)} records are too few to measure; a search ranks them all")
        return
    console.print(f"{index.name}: recall of the exact top 10, over {tuning.held_out} {tuning.asked} held out")
    cells = [["dims", "shortlist", "recall", "ms (estimated)"]]
    for candidate in tuning.candidates:
        dims = " > ".join(map(str, candidate.plan.dims))
        chosen = " <- cheapest" if candidate is tuning.chosen else ""
        cells.append(
            [dims, str(candidate.plan.sizes[0]), str(candidate.recall), f"{candidate.milliseconds:.2f}{chosen}"]
        )
    _print_columns(console, cells)
    if tuning.chosen is None:
        console.print(f"none reaches {tuning.target_recall:.1%} on the questions that choose; nothing was changed")
    elif tuning.measured is not None:
        console.print(f"applied; the index's own searches find {tuning.measured}")
    elif not tuning.reached:
        console.print(f"on the questions held out it stays below {tuning.target_recall:.1%}")


def print_head(card: HeadCard, file: Path) -> None:
    """Print what a head was fitted on, and what it gains."""
    console = _console()
    console.print(f"{card.fitted_on:,} {card.kind} of {card.model or 'a model not known'}, {card.held_out:,} held out")
    console.print(f"{card.measure}:", style="bold")
    for dim in card.dims:
        console.print(f"  {dim:>5}  {card.before[dim]:.3f} -> {card.after[dim]:.3f}")
    console.print(f"written to {file}")


def print_findings(findings: Sequence[Finding]) -> None:
    """Print what the doctor found."""
    console = _console()
    styles = {"ok": "green", "note": "yellow", "trouble": "bold red"}
    for finding in findings:
        text = Text(f"{finding.subject}: ", style="bold").append(one_line(finding.text), style="not bold")
        _print_indented(console, Text(finding.kind, style=styles[finding.kind]), text)
        if finding.advice:
            _print_indented(console, Text(), Text(one_line(finding.advice)))


def _print_indented(console: Console, start: Text, text: Text) -> None:
    """Print a word, and a text that a terminal wraps beside it."""
    start.pad_right(_KIND - start.cell_len)
    if not console.is_terminal:
        console.print(start + text)
        return
    grid = Table.grid()
    grid.add_column(width=_KIND)
    grid.add_column(overflow="fold")
    grid.add_row(start, text)
    console.print(grid, soft_wrap=False)


def print_health(index: TwoStageIndex, report: Report, folder: Path) -> None:
    """Print what `verify` or `repair` found."""
    console = _console()
    dims = f"{index.shortlist_dim} of {index.full_dim} dimensions, rotation {index.rotation}"
    console.print(f"{index.name}: model {_model(index)}, {dims}")
    console.print(
        f"{report.records} records: {'nothing is wrong' if report.ok else 'something is wrong'}",
        style="" if report.ok else "bold red",
    )
    for kind, ids in asdict(report).items():
        if isinstance(ids, list) and ids:
            more = f" and {len(ids) - _MAX_LISTED} more" if len(ids) > _MAX_LISTED else ""
            of = f" of {report.tried} tried" if kind == "unreachable" else ""
            listed = ", ".join(map(one_line, ids[:_MAX_LISTED]))
            console.print(f"{kind}: {len(ids)}{of} ({listed}{more})")
    if report.chroma_damaged:
        console.print(f"Chroma's own file is damaged ({report.chroma_damaged}): restore the folder from a backup")
    elif report.to_encode:
        console.print(f"{report.to_encode} without a sound full vector: run `mrl-rag repair --encode --db {folder}`")
    elif not report.ok:
        console.print(f"run `mrl-rag repair --db {folder}`")


def one_line(text: str) -> str:
    """Return a text without line breaks and other characters that would change the terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))
