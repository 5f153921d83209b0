"""The figures, one axes each: for notebooks as they are, and for the page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mrl_rag import rotation
from mrl_rag.errors import InvalidInput, InvalidVectors
from mrl_rag.evaluation import Evaluation, Result
from mrl_rag.extras import require
from mrl_rag.report.findings import Cost, cost_of, frontier, main_measure
from mrl_rag.report.groups import MISSING, OTHER, group, shorten
from mrl_rag.report.palette import INK, LINE, MUTED, SERIES, Colour
from mrl_rag.report.records import sample
from mrl_rag.truncation import Float32Array, normalize

if TYPE_CHECKING:
    from mrl_rag.index import Record

# A map of fewer shows nothing.
MIN_POINTS = 3
_MARKERS = "os^Dv"
_COSTS: dict[Cost, str] = {"bytes": "bytes per record", "milliseconds": "milliseconds per query"}
_TICKS = FuncFormatter(lambda value, _: f"{value:,g}")


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot, which would show it twice."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=144)
        return file.getvalue()


def pareto(evaluation: Evaluation, cost: Cost = "bytes", measure: str | None = None) -> Figure:
    """Draw quality against cost, with a line through the results that nothing as cheap beats.

        pareto(evaluation)
        pareto(evaluation, "milliseconds", "recall@10")

    Args:
        evaluation: what was measured.
        cost: "bytes" per record, or "milliseconds" per query.
        measure: a key of `Result.scores`; None for the first.

    Returns:
        A matplotlib figure. The best results have their dimension beside them, with the precision unless it is
        float32, and their 95% interval.

    Raises:
        InvalidInput: the evaluation has no such measure, or the cost isn't one of the two.
    """
    if cost not in _COSTS:
        raise InvalidInput(f"cost is {cost!r}; it must be 'bytes' or 'milliseconds'. Pass one of them.")
    measure = main_measure(evaluation, measure)
    figure, axes = _new(_COSTS[cost], measure)
    results = [r for r in _all(evaluation) if measure in r.scores and cost_of(r, cost) > 0]
    handles: list[Line2D] = []
    for method, (colour, marker) in _styles(evaluation).items():
        points = [(cost_of(r, cost), r.scores[measure].mean) for r in results if r.method == method]
        handles.append(Line2D([], [], color=colour.light, marker=marker, linestyle="", label=method))
        axes.plot(*_columns(points), marker, color=colour.light, markersize=4, alpha=0.8, label=method)
    best = frontier(results, cost, measure)
    line = [(cost_of(r, cost), r.scores[measure].mean) for r in best]
    axes.plot(*_columns(line), color=MUTED.light, linewidth=1, zorder=1, gid="frontier")
    for result in best:
        score = result.scores[measure]
        axes.plot([cost_of(result, cost)] * 2, [score.low, score.high], color=LINE.light, linewidth=2, zorder=1)
    handles.append(_reference_line(axes, evaluation, measure))
    _cost_axis(axes, [cost_of(r, cost) for r in results])
    _label(axes, best, line)
    _legend(figure, handles)
    return figure


def curve(evaluation: Evaluation, measure: str | None = None) -> Figure:
    """Draw quality over dimensions, each way to search with the band of its 95% interval.

    Of each way the most precise results are drawn, of several shortlist sizes the smallest and the largest, and of
    several results that are alike in that the best.

    Args:
        evaluation: what was measured.
        measure: a key of `Result.scores`; None for the first.

    Raises:
        InvalidInput: the evaluation has no such measure.
    """
    measure = main_measure(evaluation, measure)
    figure, axes = _new("numbers searched first", measure)
    styles = _styles(evaluation)
    handles: list[Line2D] = []
    for method, size, results in _lines(evaluation, measure):
        colour, marker = styles[method]
        first = not handles or handles[-1].get_color() != colour.light
        scores = [r.scores[measure] for r in results]
        dims = [r.dim for r in results]
        (line,) = axes.plot(
            dims,
            [score.mean for score in scores],
            color=colour.light,
            marker=marker,
            markersize=4,
            linestyle="-" if first else "--",
            markerfacecolor=colour.light if first else "none",
            label=method if size is None else f"{method}, {size:,} candidates",
        )
        low, high = [score.low for score in scores], [score.high for score in scores]
        axes.fill_between(dims, low, high, color=colour.light, alpha=0.12, linewidth=0)
        handles.append(line)
    handles.append(_reference_line(axes, evaluation, measure))
    axes.set_xscale("log", base=2)
    dims = sorted({r.dim for r in _all(evaluation)})
    axes.set_xticks(dims[:: math.ceil(len(dims) / 8)], minor=False)
    axes.xaxis.set_major_formatter(_TICKS)
    axes.xaxis.set_minor_locator(NullLocator())
    _legend(figure, handles)
    return figure


def classifier_curve(points: Sequence[tuple[float, float, float]]) -> Figure:
    """Draw a classifier's accuracy over the numbers it reads per text.

    Args:
        points: (expected dimension, accuracy, threshold) each, as `AdaptiveClassifier.curve` returns.

    Raises:
        InvalidInput: there is none.
    """
    if not points:
        raise InvalidInput("points is empty; pass what AdaptiveClassifier.curve returned.")
    figure, axes = _new("numbers read per text, on average", "accuracy")
    ordered = sorted(points)
    axes.plot([p[0] for p in ordered], [p[1] for p in ordered], "o-", color=SERIES[0].light, markersize=4)
    _cost_axis(axes, [p[0] for p in ordered])
    return figure


def collection_map(records: Sequence[Record], color_by: str | None = None, seed: int = 0) -> Figure:
    """Draw a map on which records with similar vectors are neighbours, by t-SNE; far distances mean little.

        collection_map(index_records(index), "author")

    Args:
        records: with vectors; of more than 2,000 a sample is drawn, see `sample`.
        color_by: metadata key that colours the points; see `group`. None for one colour.
        seed: of the sample and the map. The same library versions on the same machine give the same map.

    Raises:
        InvalidInput: fewer than 3 records have vectors.
        MissingExtra: scikit-learn is not installed.
    """
    shown = sample(records, seed=seed)
    figure, axes = _new("t-SNE, first axis", "t-SNE, second axis", height=3.8)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    _scatter(figure, axes, _neighbours(unit_vectors(shown), seed), shown, color_by)
    return figure


def first_two_numbers(
    records: Sequence[Record], rotated: bool = False, color_by: str | None = None, seed: int = 0
) -> Figure:
    """Draw the first two numbers of each vector.

    Args:
        records: with vectors; of more than 2,000 a sample is drawn, see `sample`.
        rotated: draw them after the rotation that an index fits; it is fitted on these records.
        color_by: metadata key that colours the points; see `group`. None for one colour.
        seed: of the sample.

    Raises:
        InvalidInput: fewer than 3 records have vectors.
    """
    shown = sample(records, seed=seed)
    rows = unit_vectors(shown)
    if rotated:
        rows = rows @ rotation.fit(rows)
    figure, axes = _new("first number", "second number", height=3.8)
    _scatter(figure, axes, np.stack([rows.T[0], rows.T[1]], axis=1), shown, color_by)
    return figure


def unit_vectors(records: Sequence[Record]) -> Float32Array:
    """Return the vectors of records, as unit rows.

    Raises:
        InvalidInput: fewer than 3 records have vectors.
        InvalidVectors: the vectors have one number, or different lengths.
    """
    there = [record.vector for record in records if record.vector is not None]
    if len(there) < MIN_POINTS:
        raise InvalidInput(
            f"{len(there)} records have vectors; a picture of records needs {MIN_POINTS}. Pass more, read with vectors."
        )
    rows = normalize(there)
    if rows.shape[1] < 2:
        raise InvalidVectors(f"vectors have {rows.shape[1]} number; a picture needs 2. Pass longer ones.")
    return rows


def _neighbours(rows: Float32Array, seed: int) -> Float32Array:
    manifold, threads = (require(module, extra="report") for module in ("sklearn.manifold", "threadpoolctl"))
    # PCA has no coordinates for records that are all alike.
    start = "pca" if np.ptp(rows, axis=0).max() > 1e-6 else "random"
    tsne = manifold.TSNE(init=start, perplexity=min(30, (len(rows) - 1) / 3), max_iter=500, random_state=seed)
    # Where other work takes the cores, its threads wait for each other: two took 5 times as long as one.
    with threads.threadpool_limits(1):
        places: Float32Array = tsne.fit_transform(rows)
    return places


def _scatter(figure: Figure, axes: Axes, places: Float32Array, records: Sequence[Record], color_by: str | None) -> None:
    labels, shown = group(records, color_by)
    series = iter(SERIES)
    colours = {label: (MUTED if label in (OTHER, MISSING) else next(series)).light for label in shown}
    axes.scatter(
        places.T[0],
        places.T[1],
        c=[colours.get(label, SERIES[0].light) for label in labels],
        s=6,
        linewidths=0,
        alpha=0.75,
        # Cut to the frame, each point would be in a group of its own in the SVG.
        clip_on=False,
        gid="records",
    )
    _legend(figure, [Line2D([], [], color=c, marker="o", linestyle="", label=label) for label, c in colours.items()])


def _new(xlabel: str, ylabel: str, height: float = 3) -> tuple[Figure, Axes]:
    # As wide as a phone: text keeps its size there.
    figure = NotebookFigure(figsize=(4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, color=INK.light, fontsize=10)
    axes.set_ylabel(shorten(ylabel), color=INK.light, fontsize=10, parse_math=False)
    axes.tick_params(which="both", color=LINE.light, labelcolor=MUTED.light, labelsize=9)
    axes.spines[:].set_color(LINE.light)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LINE.light, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _all(evaluation: Evaluation) -> list[Result]:
    return [evaluation.reference, *evaluation.results]


def _styles(evaluation: Evaluation) -> dict[str, tuple[Colour, str]]:
    """Return colour and marker of each method, the same in every figure."""
    methods = dict.fromkeys(result.method for result in _all(evaluation))
    return {m: (SERIES[i % len(SERIES)], _MARKERS[i % len(_MARKERS)]) for i, m in enumerate(methods)}


def _lines(evaluation: Evaluation, measure: str) -> list[tuple[str, int | None, list[Result]]]:
    """Return method, shortlist size and results by dimension of each line of the curve."""
    bits = {"float32": 32, "float16": 16, "int8": 8}
    known = [r for r in _all(evaluation) if measure in r.scores]
    lines = []
    for method in _styles(evaluation):
        results = [r for r in known if r.method == method]
        finest = max((bits.get(r.precision, 0) for r in results), default=0)
        results = [r for r in results if bits.get(r.precision, 0) == finest]
        sizes = sorted({r.shortlist_size or 0 for r in results})
        for size in dict.fromkeys([*sizes[:1], *sizes[-1:]]):
            of_size = [r for r in results if (r.shortlist_size or 0) == size]
            best = {r.dim: r for r in sorted(of_size, key=lambda r: r.scores[measure].mean)}
            lines.append((method, size or None, [best[dim] for dim in sorted(best)]))
    return lines


def _reference_line(axes: Axes, evaluation: Evaluation, measure: str) -> Line2D:
    whole = evaluation.reference.scores[measure].mean
    label = f"exact, all {evaluation.full_dim:,} numbers"
    return axes.axhline(whole, color=INK.light, linewidth=1, linestyle=":", zorder=1, label=label, gid="reference")


def _cost_axis(axes: Axes, costs: Sequence[float]) -> None:
    # Room for the labels of the first points.
    axes.margins(x=0.2)
    if costs and max(costs) >= 4 * min(costs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(costs) < 50 * min(costs) else (1, 3)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(_TICKS)


def _label(axes: Axes, results: Sequence[Result], places: Sequence[tuple[float, float]]) -> None:
    """Write dimensions at the upper left of points, which is empty beside a frontier; none over another."""
    taken: list[tuple[float, float]] = []
    # From the best on, whose labels matter most.
    for result, place in reversed(list(zip(results, places, strict=True))):
        x, y = axes.transData.transform(place) * 72 / axes.figure.dpi
        text = f"{result.dim}" if result.precision == "float32" else shorten(f"{result.dim} {result.precision}")
        if all(abs(x - x2) > 6 * len(text) or abs(y - y2) > 10 for x2, y2 in taken):
            taken.append((x, y))
            offset, colour = (-3, 3), MUTED.light
            axes.annotate(
                text, place, offset, textcoords="offset points", ha="right", fontsize=8, color=colour, parse_math=False
            )


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    if not handles:
        return
    names = [shorten(str(handle.get_label()), 40) for handle in handles]
    # Set afterwards: matplotlib leaves out labels that begin with "_", and reads mathematics between dollar signs.
    legend = figure.legend(
        handles,
        ["."] * len(names),
        loc="outside lower left",
        ncols=2 if max(map(len, names)) < 22 else 1,
        frameon=False,
        fontsize=9,
        labelcolor=INK.light,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
