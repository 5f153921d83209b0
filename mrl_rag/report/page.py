"""The report: one HTML file that needs no other and no network."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from mrl_rag import __version__
from mrl_rag.errors import InvalidInput
from mrl_rag.evaluation import Evaluation
from mrl_rag.report.figures import (
    MIN_POINTS,
    classifier_curve,
    collection_map,
    curve,
    first_two_numbers,
    pareto,
)
from mrl_rag.report.findings import details, frontier, main_measure, summary
from mrl_rag.report.groups import shorten, telling_key
from mrl_rag.report.palette import COLOURS
from mrl_rag.report.records import sample
from mrl_rag.report.svg import LegendEntry, to_svg

if TYPE_CHECKING:
    from mrl_rag.index import Record

# Control characters and halves of characters, which HTML doesn't have.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_TIP_CELLS = 120


class Picture(NamedTuple):
    """A figure on the page."""

    svg: Markup
    legend: list[LegendEntry]
    caption: str


def write_report(
    file: str | os.PathLike[str],
    evaluation: Evaluation,
    records: Sequence[Record] = (),
    color_by: str | None = None,
    classifier: Sequence[tuple[float, float, float]] = (),
    command: str | None = None,
) -> None:
    """Write a report as one HTML file, which shows an evaluation and the collection it was made on.

        write_report("report.html", evaluate_index(index), index_records(index), color_by="author")

    Texts of records and questions are in the file; at most 2,000 records, of each its first 120 letters.

    Args:
        file: to write, or to replace.
        evaluation: what was measured.
        records: of the collection, with vectors; a sample of 2,000 is drawn, see `sample`. Without any, the report
            has no map.
        color_by: metadata key that colours the map; None for the one of texts with few values, if there is one.
        classifier: what `AdaptiveClassifier.curve` returned, to be shown as well.
        command: that made the report, to be shown in it.

    Raises:
        InvalidInput: the file can't be written, or no record has the metadata key.
        MissingExtra: scikit-learn is not installed, and there are records.
    """
    page = render(evaluation, records, color_by, classifier, command)
    try:
        Path(file).write_text(page, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{file} can't be written: {error}. Name another file.") from error


def render(
    evaluation: Evaluation,
    records: Sequence[Record] = (),
    color_by: str | None = None,
    classifier: Sequence[tuple[float, float, float]] = (),
    command: str | None = None,
) -> str:
    """Return the HTML that `write_report` writes."""
    measure = main_measure(evaluation)
    shown = sample(records)
    _check_same_length(evaluation, shown)
    pictures = _pictures_of_results(evaluation, measure, classifier)
    if len(shown) >= MIN_POINTS:
        pictures |= _pictures_of_records(shown, color_by)
    templates = _templates()
    style, script = (_source(templates, name) for name in ("page.css", "map.js"))
    everything = [evaluation.reference, *evaluation.results]
    page = templates.get_template("page.html").render(
        evaluation=evaluation,
        summary=summary(evaluation, measure),
        measure=measure,
        measures=list(evaluation.reference.scores),
        results=sorted(everything, key=lambda r: (r.bytes_per_record, r.method, r.dim)),
        best=frontier(everything, "bytes", measure),
        pictures=pictures,
        no_map=f"{len(shown)} records with vectors were given; a map needs {MIN_POINTS}.",
        making=_making(evaluation, len(shown), command),
        colours=COLOURS,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return _FORBIDDEN.sub("\ufffd", page)


def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("mrl_rag.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    templates.filters |= {"shorten": shorten, "details": details}
    return templates


def _source(templates: Environment, name: str) -> Markup:
    assert templates.loader is not None
    return Markup(templates.loader.get_source(templates, name)[0])


def _pictures_of_results(
    evaluation: Evaluation, measure: str, classifier: Sequence[tuple[float, float, float]]
) -> dict[str, Picture]:
    below = f"{len(evaluation.results) + 1} searches. The table below has the numbers."
    pictures = {
        "bytes": _picture(
            "bytes",
            pareto(evaluation),
            f"{measure} against bytes per record of {below}",
            "Bytes of what is searched first; two stages count the full vectors as well.",
        ),
        "milliseconds": _picture(
            "milliseconds",
            pareto(evaluation, "milliseconds"),
            f"{measure} against milliseconds per query of {below}",
            "Milliseconds on the machine of the evaluation.",
        ),
        "curve": _picture(
            "curve",
            curve(evaluation),
            f"{measure} over the numbers per vector that are searched first, of {below}",
            "Bands are 95% intervals over questions.",
        ),
    }
    if classifier:
        (least, worse, _), *_, (most, better, _) = sorted(classifier) * 2
        pictures["classifier"] = _picture(
            "classifier",
            classifier_curve(classifier),
            f"Accuracy of the adaptive classifier: {worse:.3f} at {least:,.0f} numbers, {better:.3f} at {most:,.0f}.",
            "The adaptive classifier reads more numbers only where it isn't sure.",
        )
    return pictures


def _check_same_length(evaluation: Evaluation, records: Sequence[Record]) -> None:
    lengths = {len(record.vector) for record in records if record.vector is not None}
    if lengths - {evaluation.full_dim}:
        raise InvalidInput(
            f"the evaluation is of vectors of {evaluation.full_dim:,} numbers, and the records have "
            f"{', '.join(map(str, sorted(lengths)))}. Pass the records that were evaluated."
        )


def _pictures_of_records(records: Sequence[Record], color_by: str | None) -> dict[str, Picture]:
    if color_by is not None and not any(color_by in record.metadata for record in records):
        there = ", ".join(sorted({key for record in records for key in record.metadata})[:20])
        raise InvalidInput(f"no record has the metadata key {color_by!r}. There are: {there or 'none'}.")
    key = color_by or telling_key(records)
    coloured = f" Colour: {shorten(key)}." if key else ""
    first, rotated = (first_two_numbers(records, turned, key) for turned in (False, True))
    of = f"The first two numbers of {len(records):,} vectors"
    return {
        "map": _picture(
            "map",
            collection_map(records, key),
            f"Map of {len(records):,} records; records with similar vectors are neighbours.{coloured}",
            f"{len(records):,} records; neighbours have similar vectors, and far distances mean little (t-SNE)."
            f"{coloured} Choose a point to read it.",
            [shorten(f"{record.id}: {record.document or ''}", _TIP_CELLS) for record in records],
        ),
        "first": _picture(
            "first", first, f"{of}, as the model made them.{coloured}", f"As the model made them: {_energy(first)}."
        ),
        "rotated": _picture(
            "rotated",
            rotated,
            f"{of}, after the fitted rotation.{coloured}",
            f"After the rotation that an index fits on its own vectors: {_energy(rotated)}.",
        ),
    }


def _energy(figure: Figure) -> str:
    """Say what share of the squared length of unit vectors the two numbers hold that are drawn."""
    squares = np.square(figure.axes[0].collections[0].get_offsets())
    return f"{squares.sum(axis=1).mean():.1%} of the vectors' squared length"


def _picture(name: str, figure: Figure, alt: str, caption: str, tips: Sequence[str] = ()) -> Picture:
    return Picture(*to_svg(figure, name, alt, tips), caption)


def _making(evaluation: Evaluation, shown: int, command: str | None) -> list[tuple[str, str]]:
    rate = evaluation.encode_rate
    rows = [
        ("model", f"{evaluation.model}, {evaluation.full_dim:,} numbers per vector"),
        ("records", f"{evaluation.records:,} searched, {shown:,} drawn"),
        ("questions", f"{len(evaluation.questions):,}"),
        ("right answers", evaluation.labels),
        ("reference", "exact search of all numbers in float32"),
        ("intervals", "95%, by bootstrap over the questions"),
        ("encoding", "nothing was encoded" if math.isnan(rate) else f"{rate:,.0f} passages per second"),
        ("made by", f"mrl-rag {__version__}"),
    ]
    return rows if command is None else [*rows, ("command", command)]
