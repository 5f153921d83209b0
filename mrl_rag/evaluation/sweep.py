"""The sweep: every way to search one collection, scored and timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, get_args

import numpy as np

from mrl_rag.arguments import check_integer
from mrl_rag.errors import InvalidInput, InvalidVectors
from mrl_rag.evaluation.measures import judge, timed
from mrl_rag.evaluation.results import Evaluation, LostQuestion, Result
from mrl_rag.evaluation.ways import PRECISIONS, Precision, Rows, ScanningSearcher, Way, bytes_per_vector
from mrl_rag.heads import MatryoshkaHead
from mrl_rag.heads.head import AnyHead
from mrl_rag.index.plan import check_k
from mrl_rag.intervals import estimate
from mrl_rag.rotation import SAMPLE, fit
from mrl_rag.truncation import Float32Array, check_dim

# Of an archive's float16; scores of full vectors that differ by less are equal.
_TIE = 1e-4
# Questions that are timed, each by itself.
_TIMED = 50
_MAX_LOST = 10
_SHOWN_LETTERS = 300
# Shares of the full dimension that are tried where the model names no dimensions of its own.
_SHARES = (2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 12)


class SweepSettings(TypedDict, total=False):
    """Arguments of `sweep` that other functions pass on to it."""

    sizes: Sequence[int]
    precisions: Sequence[Precision]
    head: AnyHead | None


# Takes float32 unit rows [q, full_dim] and returns rows per query, int [q, k], best first.
Search = Callable[[Float32Array], Rows]


@dataclass(frozen=True)
class EncodedDataset:
    """Passages and questions with their full vectors.

    Attributes:
        name: of the collection.
        model: that made the vectors.
        labels: how truth was made, as in `Evaluation`.
        ids: of the passages.
        documents: their texts; "" for one without.
        vectors: float32 unit rows [n, full_dim].
        questions: their texts.
        queries: float32 unit rows [q, full_dim].
        relevant: per question, passage id -> relevance; None where the exact top k at full dimension is the truth.
        left_out: int [q], row of the passage that each question was made of and that is not searched for it; None for
            none.
        encode_rate: passages per second; NaN if nothing was encoded.
    """

    name: str
    model: str
    labels: str
    ids: Sequence[str]
    documents: Sequence[str]
    vectors: Float32Array
    questions: Sequence[str]
    queries: Float32Array
    relevant: Sequence[dict[str, int]] | None
    left_out: Rows | None = None
    encode_rate: float = math.nan

    @property
    def full_dim(self) -> int:
        """Length of the vectors."""
        return int(self.vectors.shape[1])

    def fit_projection(self) -> Float32Array:
        """Return an index's projection of the passages, without those that are questions: [full_dim, full_dim]."""
        order = np.random.default_rng(0).permutation(len(self.vectors))
        used = order if self.left_out is None else order[~np.isin(order, self.left_out)]
        return fit(self.vectors[np.sort(used[:SAMPLE])])


def default_dims(full_dim: int, trained: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the dimensions to try, descending: those that a model was trained for, or two thirds to a twelfth."""
    known = sorted({dim for dim in trained if dim < full_dim}, reverse=True)
    shares = {max(8 * round(full_dim * share / 8), 1) for share in _SHARES}
    return tuple(known or sorted((dim for dim in shares if dim < full_dim), reverse=True))


def sweep(
    data: EncodedDataset,
    dims: Sequence[int] | None = None,
    sizes: Sequence[int] = (50,),
    precisions: Sequence[Precision] = ("float32", "int8", "binary"),
    head: AnyHead | None = None,
    k: int = 10,
    own: Sequence[tuple[Result, Search]] = (),
) -> Evaluation:
    """Search in every way, and measure each.

    One stage: a plain cut, the projection that an index fits on its vectors, and the head, at each dimension and
    precision; full dimension at each precision. Two stages: int8 codes at each dimension of the projection, and each
    shortlist size reranked at full dimension, as an index does it.

    Args:
        data: what is searched for what.
        dims: dimensions to try; None for `default_dims`.
        sizes: shortlist sizes to try.
        precisions: of one stage, out of "float32", "float16", "int8" and "binary".
        head: a `MatryoshkaHead`, the file of one, or a float array [full_dim, full_dim]; None for none.
        k: hits per question.
        own: searches of an index, to be measured in addition, as results without their measurements.

    Returns:
        The evaluation. Its times are of exact scans by NumPy and SimSIMD in memory, one question at a time.

    Raises:
        InvalidDimension: a dimension is not an integer from 1 to full_dim.
        InvalidInput: there is nothing to search or to ask, or an argument is out of range.
        InvalidVectors: the head has another shape.
        MissingExtra: there are judgments, and ir-measures is not installed.
    """
    if len(data.vectors) - (data.left_out is not None) < 1 or not len(data.queries):
        raise InvalidInput(
            f"{data.name} has {len(data.vectors)} passages and {len(data.queries)} questions; evaluating needs both."
        )
    full, k = data.full_dim, check_k(k)
    tried = [check_dim(dim, full) for dim in (default_dims(full) if dims is None else dims)]
    for size in sizes:
        check_integer("a shortlist size", size, k)
    if unknown := [name for name in precisions if name not in get_args(Precision)]:
        raise InvalidInput(f"precision {unknown[0]!r} is none of {', '.join(PRECISIONS)}.")
    judged = _Judge(data, k)
    reference, _ = judged.try_way(Way("plain cut", (full,)))
    found = [judged.try_way(way) for way in _ways(data, tried, sizes, precisions, _checked_head(head, full))]
    found += [judged.try_index(result, search) for result, search in own]
    return Evaluation(
        name=data.name,
        model=data.model,
        records=len(data.vectors),
        questions=list(data.questions),
        labels=data.labels,
        full_dim=full,
        reference=reference,
        results=[result for result, _ in found],
        encode_rate=data.encode_rate,
        lost=judged.lost(reference, found),
    )


def measure_ways(data: EncodedDataset, ways: Sequence[Way], k: int = 10) -> list[Result]:
    """Return the result of each way to search, as `sweep` measures it; for ways of one's own, such as a funnel."""
    judged = _Judge(data, check_k(k))
    return [judged.try_way(way)[0] for way in ways]


def _checked_head(head: AnyHead | None, full: int) -> Float32Array | None:
    if head is None:
        return None
    matrix = MatryoshkaHead.of(head).matrix
    if len(matrix) != full:
        raise InvalidVectors(f"head has shape {matrix.shape}; these vectors need one of shape {(full, full)}.")
    return matrix


def _ways(
    data: EncodedDataset,
    dims: Sequence[int],
    sizes: Sequence[int],
    precisions: Sequence[Precision],
    head: Float32Array | None,
) -> list[Way]:
    full, projection = data.full_dim, data.fit_projection()
    below = [dim for dim in dims if dim < full]
    ways = [Way("plain cut", (full,), precision=precision) for precision in precisions if precision != "float32"]
    for precision in precisions:
        ways += [Way("plain cut", (dim,), (), precision) for dim in below]
        ways += [Way("fitted projection", (dim,), (), precision, projection) for dim in below]
        if head is not None:
            ways += [Way("head", (dim,), (), precision, head) for dim in (full, *below)]
    ways += [Way("two stages", (dim, full), (size,), "int8", projection) for dim in below for size in sizes]
    return ways


class _Judge:
    """Scores and times ways to search one collection."""

    def __init__(self, data: EncodedDataset, k: int) -> None:
        self._data, self._k = data, k
        self._measure = f"recall@{k}" if data.relevant is None else f"nDCG@{k}"
        exact = ScanningSearcher(Way("", (data.full_dim,)), data.vectors)
        self._true = exact.search(data.queries, k, data.left_out)
        self._least = self._cosines(self._true).min(axis=1)

    def try_way(self, way: Way) -> tuple[Result, Rows]:
        """Return a way with its measurements, and the rows it finds."""
        full, dim, two = self._data.full_dim, way.dims[0], len(way.dims) > 1
        kept = bytes_per_vector(dim, way.precision) + (bytes_per_vector(full, "float16") if two else 0)
        empty = Result(way.method, dim, way.sizes[0] if two else None, way.precision, kept, math.nan, {}, {})
        searcher = ScanningSearcher(way, self._data.vectors)
        found = searcher.search(self._data.queries, self._k, self._data.left_out)
        return self._measured(empty, found, lambda query: searcher.search(query, self._k)), found

    def try_index(self, result: Result, search: Search) -> tuple[Result, Rows]:
        """Return the result of an index's own search with its measurements, and the rows it finds."""
        found = search(self._data.queries)
        if self._data.left_out is not None:
            # An index searches all records. One more than k was asked for: the question's own, or the last.
            kept = [
                [row for row in rows if row != own][: self._k]
                for rows, own in zip(found.tolist(), self._data.left_out.tolist(), strict=True)
            ]
            found = np.array(kept, dtype=np.intp)
        return self._measured(result, found, search), found

    def _measured(self, result: Result, found: Rows, search: Search) -> Result:
        _, seconds = timed(search, [query[None] for query in self._data.queries[:_TIMED]], rounds=1)
        values = self._scores(found)
        scores = {name: estimate(by_question) for name, by_question in values.items()}
        return replace(result, milliseconds=1e3 * seconds, scores=scores, per_question=values)

    def _scores(self, found: Rows) -> dict[str, list[float]]:
        data = self._data
        if data.relevant is None:
            # Of equal passages, such as copies of one text, any will do.
            right = self._cosines(found) >= self._least[:, None] - _TIE
            return {self._measure: (right.sum(axis=1) / self._true.shape[1]).tolist()}
        ranks = {str(q): {data.ids[row]: -float(r) for r, row in enumerate(rows)} for q, rows in enumerate(found)}
        return judge(ranks, {str(q): dict(judged) for q, judged in enumerate(data.relevant)}, self._k)

    def _cosines(self, rows: Rows) -> Float32Array:
        cosines: Float32Array = np.stack(
            [self._data.vectors[one] @ query for one, query in zip(rows, self._data.queries, strict=True)]
        )
        return cosines

    def lost(self, reference: Result, found: Sequence[tuple[Result, Rows]]) -> list[LostQuestion]:
        """Return the questions that lost most by the cheapest result at a quarter of the full dimension or less."""
        cheap = [(result, rows) for result, rows in found if result.dim <= self._data.full_dim / 4]
        if not cheap:
            return []
        chosen, rows = min(cheap, key=lambda one: (one[0].bytes_per_record, -one[0].scores[self._measure].mean))
        before, after = (np.array(result.per_question[self._measure]) for result in (reference, chosen))
        order = np.argsort(after - before, kind="stable")[:_MAX_LOST]
        return [
            LostQuestion(
                self._data.questions[q], float(before[q]), float(after[q]), self._gone(q, self._true[q], rows[q])
            )
            for q in order.tolist()
            if after[q] < before[q]
        ]

    def _gone(self, question: int, before: Rows, after: Rows) -> list[tuple[str, str]]:
        data = self._data
        gone = [row for row in before.tolist() if row not in set(after.tolist())]
        if data.relevant is not None:
            gone = [row for row in gone if data.relevant[question].get(data.ids[row], 0) > 0]
        return [(data.ids[row], data.documents[row][:_SHOWN_LETTERS]) for row in gone]
