"""Choice of the cheapest settings with which searches reach the target recall.

The queries are records of the index itself, left out of the rotation's fit. First, exact scans choose the shortlist
dimension, before anything is written to Chroma: no search finds what an exact scan at that dimension loses. Then real
searches choose the shortlist size and the share of the inverted lists that are scanned.
"""

from __future__ import annotations

import logging
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mrl_rag.index.config import IndexConfig
from mrl_rag.index.plan import LATE, MAX_ROUNDS, first_size
from mrl_rag.index.search import Searcher
from mrl_rag.index.storage import Stores
from mrl_rag.rotation import SAMPLE, explained_energy, fit
from mrl_rag.truncation import Float32Array, unit_rows

_LOG = logging.getLogger("mrl_rag")

Rows = npt.NDArray[np.intp]
Ranks = npt.NDArray[np.int64]
ReadRows = Callable[[Rows], Float32Array]

# Recall is measured on the true top 10.
MEASURED_K = 10
# Cosines that differ by less are equal: full vectors may be rounded to float16.
_TIE = 1e-4
# Number of records that are used as queries, and their largest share of all records.
_MAX_QUESTIONS, _MAX_QUESTIONS_SHARE = 500, 0.1
# With fewer records nothing is measured.
MIN_MEASURED = int(MEASURED_K / _MAX_QUESTIONS_SHARE)
# Dimensions to choose from are multiples of this.
_DIM_STEP = 32
# An exact scan must exceed the target recall by so much: a search also loses records in lists that it doesn't scan, and
# the measurement has an error.
RECALL_MARGIN = 0.004
# Milliseconds per dimension of stage one, more of them with more records to scan, and per candidate that is read and
# ranked; measured at 100,000 and 1,000,000 records (`benchmarks/README.md`).
_MS_PER_DIM, _MS_PER_DIM_AND_RECORD, _MS_PER_CANDIDATE = 0.001, 1e-8, 0.0045
# Vectors per read.
READ_BATCH = 20_000
# New vectors have drifted if the shortlist keeps less than this share of the squared length that it kept of the vectors
# the rotation was fitted on. At most so many of the new ones are looked at.
_MIN_KEPT_ENERGY, _MAX_DRIFT_SAMPLE = 0.9, 2000
# Shortlist sizes and shares of the inverted lists to choose from, cheapest first.
SHORTLIST_SIZES = (20, 30, 50, 100)
_SHARES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1.0)


@dataclass(frozen=True)
class Questions:
    """Records that are used as queries.

    Attributes:
        rows: int [q], their row numbers among all records; -1 for queries that are no records.
        vectors: float32 unit rows [q, full_dim].
        nearest: int [q, 10], row numbers of the nearest other records, in any order.
        least: float32 [q], lowest cosine with one of these.
    """

    rows: Rows
    vectors: Float32Array
    nearest: Rows
    least: Float32Array


@dataclass(frozen=True)
class Fit:
    """A rotation and a dimension for the shortlist.

    Attributes:
        rotation: float32 [full_dim, full_dim].
        shortlist_dim: number of rotated coordinates that the shortlist keeps.
        explained_energy: share of the vectors' squared length in these coordinates, 0 to 1.
        questions: queries for measuring the recall; None if there are too few records.
    """

    rotation: Float32Array
    shortlist_dim: int
    explained_energy: float
    questions: Questions | None

    def applied_to(self, config: IndexConfig) -> IndexConfig:
        """Return the settings with this dimension, a new name for the rotation, and no measurements."""
        return replace(
            config,
            rotation=uuid.uuid4().hex,
            shortlist_dim=self.shortlist_dim,
            explained_energy=self.explained_energy,
            shortlist_size=0,
            lists_share=0.0,
            recall=0.0,
            measured_records=0,
        )


def fit_shortlist(read: ReadRows, count: int, shortlist_dim: int, dim_fixed: bool, target_recall: float) -> Fit:
    """Fit a rotation, and choose the shortlist dimension.

    Args:
        read: returns vectors, float32 [n, full_dim], by ascending row numbers, 0 to count - 1.
        count: number of vectors.
        shortlist_dim: the dimension to use if it is fixed, or if there are too few vectors to choose one.
        dim_fixed: whether the dimension is fixed.
        target_recall: share of the true top 10 that a search should find, 0 to 1.
    """
    questions = choose_questions(read, count) if count >= MIN_MEASURED else None
    order = np.random.default_rng(0).permutation(count)
    rest = order if questions is None else order[len(questions.rows) :]
    sample = read(np.sort(rest[:SAMPLE]))
    rotation = fit(sample)
    if questions is not None and not dim_fixed:
        ranks = ranks_at(read, count, rotation, questions, dims_to_try(len(rotation)))
        shortlist_dim = _cheapest_dim(ranks, target_recall, count)
    return Fit(rotation, shortlist_dim, explained_energy(sample, rotation, shortlist_dim), questions)


def choose_questions(read: ReadRows, count: int) -> Questions:
    """Choose records to use as queries, and find their nearest records by an exact scan."""
    chosen = np.random.default_rng(0).permutation(count)[: min(_MAX_QUESTIONS, int(count * _MAX_QUESTIONS_SHARE))]
    rows = np.sort(chosen)
    return find_nearest(unit_rows(read(rows)), read, count, rows)


def find_nearest(vectors: Float32Array, read: ReadRows, count: int, rows: Rows | None = None) -> Questions:
    """Find the nearest records of queries by an exact scan.

    Args:
        vectors: the queries, float32 unit rows [q, full_dim].
        read: returns float32 [n, full_dim] by ascending row numbers.
        count: number of records.
        rows: int [q], those of the queries, which aren't their own neighbours; None if the queries are no records.
    """
    rows = np.full(len(vectors), -1, dtype=np.intp) if rows is None else rows
    best = np.empty((len(rows), 0), dtype=np.intp)
    scores = np.empty((len(rows), 0), dtype=np.float32)
    for start in range(0, count, READ_BATCH):
        batch = np.arange(start, min(start + READ_BATCH, count))
        found = vectors @ unit_rows(read(batch)).T
        found[batch == rows[:, None]] = -np.inf  # itself
        scores, best = np.hstack([scores, found]), np.hstack([best, np.broadcast_to(batch, found.shape)])
        kept = np.argpartition(scores, -MEASURED_K, axis=1)[:, -MEASURED_K:]
        scores, best = np.take_along_axis(scores, kept, 1), np.take_along_axis(best, kept, 1)
    return Questions(rows, vectors, best, scores.min(axis=1))


def measure(
    searcher: Searcher, questions: Questions, ids: Sequence[str], size: int = 0, share: float = 0.0
) -> tuple[float, float]:
    """Measure the recall and time of searches, with all queries in one batch: on a server that is a few requests.

    Args:
        searcher: of the index.
        questions: records that are used as queries.
        ids: of the records, by the row numbers in `questions`.
        size: shortlist size of the first round; 0 for the index's own.
        share: share of the inverted lists to scan in the first round, 0 to 1; 0 for the index's own.

    Returns:
        Share of the true top 10 that was found, 0 to 1, and the seconds per query.
    """
    start = time.perf_counter()
    answers = searcher.nearest(questions.vectors, MEASURED_K + 1, size, share)
    seconds = (time.perf_counter() - start) / len(answers)
    shares = []
    for row, nearest, least, found in zip(*(questions.rows, questions.nearest, questions.least, answers), strict=True):
        true = {ids[other] for other in nearest}
        others = [(id_, score) for id_, score in found if id_ != ids[row]][:MEASURED_K]
        # Of equal records, such as copies of one text, any will do.
        shares.append(sum(id_ in true or score >= least - _TIE for id_, score in others) / len(nearest))
    return float(np.mean(shares)), seconds


def own_questions(stores: Stores) -> tuple[Questions, list[str]]:
    """Return records of an index to use as queries, and the ids of all records by row number."""
    ids = [id_ for page in stores.archive.ids() for id_ in page]
    return choose_questions(lambda rows: stores.archive.read([ids[row] for row in rows])[1], len(ids)), ids


def calibrate(searcher: Searcher, questions: Questions, ids: Sequence[str]) -> None:
    """Choose the shortlist size and the share of the inverted lists by measured recall, and store them.

    Args:
        searcher: of the index.
        questions: records that are used as queries.
        ids: of the records, by the row numbers in `questions`.
    """
    shortlist, config = searcher.stores.shortlist, searcher.stores.config
    share = 1.0
    if searcher.has_lists:
        enough = (
            s for s in _SHARES if measure(searcher, questions, ids, SHORTLIST_SIZES[-1], s)[0] >= config.target_recall
        )
        # Twice as many lists as these queries need: users' queries are less similar to the records.
        share = min(2 * next(enough, 1.0), 1.0)
    for size in SHORTLIST_SIZES:
        recall, seconds = measure(searcher, questions, ids, size, share)
        if recall >= config.target_recall:
            break
    shortlist.remember(
        replace(config, shortlist_size=size, lists_share=share, recall=recall, measured_records=len(ids))
    )
    _LOG.info(
        "index %r is searched at %d of %d dimensions, with %d candidates and %.0f%% of its lists: %.1f%% of the true "
        "top 10 of %d of its records, %.2f ms per query of a batch",
        *(shortlist.name, config.shortlist_dim, config.full_dim, size, 100 * share),
        *(100 * recall, len(questions.rows), 1e3 * seconds),
    )


def measure_again(searcher: Searcher) -> None:
    """Measure the recall of an index that has grown, and warn if it is below the target."""
    shortlist, config = searcher.stores.shortlist, searcher.stores.config
    questions, ids = own_questions(searcher.stores)
    recall, _ = measure(searcher, questions, ids)
    shortlist.remember(replace(config, recall=recall, measured_records=len(ids)))
    if recall < config.target_recall:
        warnings.warn(
            f"index {shortlist.name!r} has grown to {len(ids)} records, and its searches find {recall:.1%} of the "
            f'true top 10, less than the target of {config.target_recall:.1%}. Call reindex(rotation="fit") at a quiet '
            "time: it chooses another dimension.",
            stacklevel=4,
        )


def warn_of_drift(stores: Stores, rows: Float32Array) -> bool:
    """Warn if the shortlist keeps less of new vectors, float32 [n, full_dim], than of those it was fitted on."""
    config = stores.config
    assert stores.rotation is not None
    energy = explained_energy(rows[:: max(len(rows) // _MAX_DRIFT_SAMPLE, 1)], stores.rotation, config.shortlist_dim)
    drifted = energy < _MIN_KEPT_ENERGY * config.explained_energy
    if drifted:
        warnings.warn(
            f"the rotation of index {stores.shortlist.name!r} was fitted on vectors of which the shortlist keeps "
            f"{config.explained_energy:.0%}; of these {len(rows)} new vectors it keeps {energy:.0%}, so searches "
            'may miss some. Call reindex(rotation="fit") when all records are stored.',
            stacklevel=4,
        )
    return drifted


def expected_milliseconds(dim: int, candidates: float, records: int) -> float:
    """Return about how long a query takes, by the number of candidates that are read and ranked."""
    return dim * (_MS_PER_DIM + records * _MS_PER_DIM_AND_RECORD) + candidates * _MS_PER_CANDIDATE


def _cheapest_dim(ranks: Mapping[int, Ranks], target_recall: float, records: int) -> int:
    """Return the cheapest dimension at which a shortlist by exact scan reaches the target recall.

    Args:
        ranks: per dimension, int [q, 10], ranks of the true neighbours from `ranks_at`.
        target_recall: share of the true neighbours to find, 0 to 1.
        records: number of records.
    """
    costs: dict[int, float] = {}
    for dim, rank in ranks.items():
        for size in SHORTLIST_SIZES:
            recall, candidates = _shortlist_recall(rank, size)
            if recall >= min(target_recall + RECALL_MARGIN, 1.0):
                cost = expected_milliseconds(dim, candidates, records)
                costs[dim] = min(costs.get(dim, cost), cost)
    return min(costs, key=lambda dim: costs[dim]) if costs else max(ranks)


def dims_to_try(full_dim: int) -> list[int]:
    """Return multiples of 32 up to about half of the full dimension, in steps of at least a quarter."""
    dims: list[int] = []
    for dim in range(_DIM_STEP, max(full_dim // 2, min(full_dim, 4 * _DIM_STEP)) + 1, _DIM_STEP):
        if not dims or dim - dims[-1] >= dims[-1] // 4:
            dims.append(dim)
    return dims or [full_dim]


def ranks_at(
    read: ReadRows, count: int, rotation: Float32Array, questions: Questions, dims: Sequence[int]
) -> dict[int, Ranks]:
    """Return the ranks of the true neighbours in an exact scan at each dimension, 0 for the first: int [q, 10]."""
    axes = np.ascontiguousarray(rotation[:, : dims[-1]])
    queries = questions.vectors @ axes
    true = (_read_any(read, questions.nearest.ravel()) @ axes).reshape(*questions.nearest.shape, -1)
    thresholds = []
    for dim in dims:
        dots = np.einsum("qd,qkd->qk", queries[:, :dim], true[..., :dim])
        thresholds.append(np.sort(dots / np.maximum(np.linalg.norm(true[..., :dim], axis=-1), 1e-30), axis=1))
    ranks = np.zeros((len(dims), *questions.nearest.shape), dtype=np.int64)
    for start in range(0, count, READ_BATCH):
        batch = np.arange(start, min(start + READ_BATCH, count))
        rotated = read(batch) @ axes
        itself = batch == questions.rows[:, None]
        scores = np.zeros((len(queries), len(batch)), dtype=np.float32)
        squares = np.zeros(len(batch), dtype=np.float32)
        for place, (dim, before) in enumerate(zip(dims, (0, *dims), strict=False)):
            part = rotated[:, before:dim]
            scores += queries[:, before:dim] @ part.T
            squares += np.einsum("nd,nd->n", part, part)
            cosine = scores / np.sqrt(np.maximum(squares, 1e-30))
            cosine[itself] = -np.inf
            for query, (row, least) in enumerate(zip(cosine, thresholds[place], strict=True)):
                # The margin keeps rounding errors from counting a neighbour as nearer than itself.
                above = np.searchsorted(least, row[row > least[0] + 1e-6] - 1e-6)
                ranks[place, query] += np.bincount(above, minlength=MEASURED_K + 1)[::-1].cumsum()[::-1][1:]
    return dict(zip(dims, ranks, strict=True))


def _read_any(read: ReadRows, rows: Rows) -> Float32Array:
    """Return unit vectors by row numbers in any order, also repeated ones: float32 [n, full_dim]."""
    ascending, places = np.unique(rows, return_inverse=True)
    return unit_rows(read(ascending))[places]


def _shortlist_recall(ranks: Ranks, chosen: int) -> tuple[float, float]:
    """Simulate how a search enlarges its shortlist.

    Args:
        ranks: int [q, 10], ranks of the true neighbours.
        chosen: shortlist size of the first round.

    Returns:
        Share of the true neighbours in the shortlist, and its mean size in the end.
    """
    size = np.full((len(ranks), 1), first_size(chosen, MEASURED_K))
    for _ in range(MAX_ROUNDS - 1):
        late = ((ranks < size) & (ranks >= LATE * size)).any(axis=1, keepdims=True)
        size = np.where(late, 2 * size, size)
    return float((ranks < size).mean()), float(size.mean())
