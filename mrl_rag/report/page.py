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
from mrl_rag.index import rotation
from mrl_rag.report.figures import (
    MIN_POINTS,
    classifier_curve,
    collection_map,
    curve,
    first_two_numbers,
    pareto,
    sample,
    unit_vectors,
)
from mrl_rag.report.findings import describe, frontier, main_measure, summary
from mrl_rag.report.groups import shorten, telling_key
from mrl_rag.report.palette import COLOURS
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

        write_report("report.html", evaluation, index.get(), color_by="author")

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
    figures = _figures(evaluation, measure, classifier)
    drawable = len(shown) >= MIN_POINTS
    if drawable:
        figures |= _pictures_of(shown, color_by)
    templates = Environment(
        loader=PackageLoader("mrl_rag.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style, script = (_source(templates, name) for name in ("page.css", "map.js"))
    everything = [evaluation.reference, *evaluation.results]
    page = templates.get_template("page.html").render(
        evaluation=evaluation,
        summary=summary(evaluation, measure),
        measure=measure,
        measures=list(evaluation.reference.scores),
        results=sorted(everything, key=lambda r: (r.bytes_per_record, r.method, r.dim)),
        best=frontier(everything, "bytes", measure),
        figures=figures,
        energy=_energy(shown) if drawable else "",
        no_map=f"{len(shown)} records with vectors were given; a map needs {MIN_POINTS}.",
        making=_making(evaluation, len(shown), command),
        colours=COLOURS,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return _FORBIDDEN.sub("\ufffd", page)


def _source(templates: Environment, name: str) -> Markup:
    assert templates.loader is not None
    return Markup(templates.loader.get_source(templates, name)[0])


def _figures(
    evaluation: Evaluation, measure: str, classifier: Sequence[tuple[float, float, float]]
) -> dict[str, Picture | None]:
    best = describe(frontier([evaluation.reference, *evaluation.results], "bytes", measure)[-1])
    of = f"of {len(evaluation.results) + 1} searches"
    return {
        "bytes": _picture(
            "bytes",
            pareto(evaluation),
            f"{measure} against bytes per record {of}. The best: {best}.",
            "Bytes of what is searched first; two stages count the full vectors as well.",
        ),
        "milliseconds": _picture(
            "milliseconds",
            pareto(evaluation, "milliseconds"),
            f"{measure} against milliseconds per query {of}. The table below has the numbers.",
            "Milliseconds on the machine of the evaluation.",
        ),
        "curve": _picture(
            "curve",
            curve(evaluation),
            f"{measure} over the numbers per vector that are searched first. The table below has the numbers.",
            "Bands are 95% intervals over questions.",
        ),
        "classifier": _picture(
            "classifier",
            classifier_curve(classifier),
            f"Accuracy of the adaptive classifier, from {min(classifier)[1]:.3f} at {min(classifier)[0]:,.0f} numbers "
            f"to {max(classifier)[1]:.3f} at {max(classifier)[0]:,.0f}.",
            "An adaptive classifier reads more numbers only where it isn't sure.",
        )
        if classifier
        else None,
    }


def _pictures_of(records: Sequence[Record], color_by: str | None) -> dict[str, Picture | None]:
    if color_by is not None and not any(color_by in record.metadata for record in records):
        there = ", ".join(sorted({key for record in records for key in record.metadata})[:20])
        raise InvalidInput(f"no record has the metadata key {color_by!r}. There are: {there or 'none'}.")
    key = color_by or telling_key(records)
    coloured = f" Colour: {shorten(key)}." if key else ""
    tips = [shorten(f"{record.id}: {record.document or ''}", _TIP_CELLS) for record in records]
    return {
        "map": _picture(
            "map",
            collection_map(records, key),
            f"Map of {len(records):,} records; records with similar vectors are neighbours.{coloured}",
            f"{len(records):,} records; neighbours have similar vectors, and far distances mean little (t-SNE)."
            f"{coloured} Choose a point to read it.",
            tips,
        ),
        "first": _picture(
            "first",
            first_two_numbers(records, color_by=key),
            f"The first two numbers of {len(records):,} vectors, as the model made them.{coloured}",
            f"As the model made them.{coloured}",
        ),
        "rotated": _picture(
            "rotated",
            first_two_numbers(records, rotated=True, color_by=key),
            f"The first two numbers of {len(records):,} vectors after the fitted rotation.{coloured}",
            "After the rotation that an index fits on its own vectors; it changes no cosine.",
        ),
    }


def _picture(name: str, figure: Figure, alt: str, caption: str, tips: Sequence[str] = ()) -> Picture:
    return Picture(*to_svg(figure, name, alt, tips), caption)


def _energy(records: Sequence[Record]) -> str:
    """Say what share of the vectors' squared length two numbers hold."""
    rows = unit_vectors(records)
    identity = np.eye(rows.shape[1], dtype=np.float32)
    plain, rotated = (rotation.explained_energy(rows, map_, 2) for map_ in (identity, rotation.fit(rows)))
    return (
        f"Here the first two hold {plain:.1%} of the vectors' squared length, and {rotated:.1%} after the fitted "
        f"rotation; two of {rows.shape[1]:,} equal ones would hold {2 / rows.shape[1]:.1%}."
    )


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
