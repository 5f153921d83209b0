"""Choose the cheapest dimension and shortlist with which searches find nearly all of the true nearest records.

The questions are records of the index itself that the rotation isn't fitted on. The dimension is chosen by exact scans,
before anything is written to Chroma: what an exact scan at a dimension loses, no search can find. Then Chroma is
filled, and what searches really find says how many candidates and inverted lists they begin with.
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
from mrl_rag.index.rotation import SAMPLE, explained_energy, fit
from mrl_rag.index.search import Searcher
from mrl_rag.index.storage import Stores
from mrl_rag.truncation import Float32Array, unit_rows

_LOG = logging.getLogger("mrl_rag")

Rows = npt.NDArray[np.intp]
Ranks = npt.NDArray[np.int64]
ReadRows = Callable[[Rows], Float32Array]

# Of the top K that a full scan finds.
_K = 10
# Records that are asked as questions, and the largest share of all that they may be.
_HELD_OUT, _LARGEST_SHARE = 500, 0.1
# With fewer records none are asked.
MIN_MEASURED = int(_K / _LARGEST_SHARE)
# Dimensions that are considered: multiples of it.
_STEP = 32
# By how much an exact scan at the dimension must exceed the target: what the lists that aren't searched lose, and what
# the questions may hide.
_MARGIN = 0.004
# Milliseconds of a search, measured at 100,000 records (`benchmarks/README.md`): per dimension, and to read and rank a
# candidate.
_MS_PER_DIM, _MS_PER_CANDIDATE = 0.001, 0.0045
# Vectors read at a time.
_BLOCK = 20_000
# New vectors differ from those that the rotation was fitted on where the shortlist keeps less than this share of what
# it kept of those. So many of the new ones are looked at.
_DRIFT, _DRIFT_ROWS = 0.9, 2000
# Shortlist sizes that are tried, and shares of the inverted lists.
_SIZES = (20, 30, 50, 100)
_SHARES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1.0)


@dataclass(frozen=True)
class Questions:
    """Records asked as questions.

    Attributes:
        rows: int [q], which records they are.
        vectors: float32 unit rows [q, full_dim].
        nearest: int [q, K], the records nearest to each apart from itself.
    """

    rows: Rows
    vectors: Float32Array
    nearest: Rows


@dataclass(frozen=True)
class Fit:
    """A rotation and a dimension for the shortlist.

    Attributes:
        rotation: float32 [full_dim, full_dim].
        shortlist_dim: how many of the rotated coordinates the shortlist keeps.
        explained_energy: share of the vectors' squared length in these, 0 to 1.
        questions: what the dimension was chosen with; None where there were too few records.
    """

    rotation: Float32Array
    shortlist_dim: int
    explained_energy: float
    questions: Questions | None

    def applied_to(self, config: IndexConfig) -> IndexConfig:
        """Return the configuration with this dimension and a new name for the rotation; nothing is measured of it."""
        return replace(
            config,
            rotation=uuid.uuid4().hex,
            shortlist_dim=self.shortlist_dim,
            explained_energy=self.explained_energy,
            shortlist_size=0,
            recall=0.0,
        )


def fit_shortlist(read: ReadRows, count: int, shortlist_dim: int, dim_fixed: bool, target_recall: float) -> Fit:
    """Fit a rotation, and choose the dimension.

    Args:
        read: returns vectors, float32 [n, full_dim], by their numbers from 0 to count - 1, ascending.
        count: how many vectors there are.
        shortlist_dim: the dimension where it is fixed, or too few vectors are there to choose one.
        dim_fixed: whether it is fixed.
        target_recall: share of the true top 10 that a search should find.
    """
    questions = ask_own_records(read, count) if count >= MIN_MEASURED else None
    order = np.random.default_rng(0).permutation(count)
    rest = order if questions is None else order[len(questions.rows) :]
    sample = read(np.sort(rest[:SAMPLE]))
    rotation = fit(sample)
    if questions is not None and not dim_fixed:
        ranks = _ranks(read, count, rotation, questions, _dims_to_try(len(rotation)))
        shortlist_dim = _cheapest_dim(ranks, target_recall)
    return Fit(rotation, shortlist_dim, explained_energy(sample, rotation, shortlist_dim), questions)


def ask_own_records(read: ReadRows, count: int) -> Questions:
    """Choose records to ask as questions, and find the records nearest to them by a full scan."""
    chosen = np.random.default_rng(0).permutation(count)[: min(_HELD_OUT, int(count * _LARGEST_SHARE))]
    rows = np.sort(chosen)
    vectors = unit_rows(read(rows))
    best = np.empty((len(rows), 0), dtype=np.intp)
    scores = np.empty((len(rows), 0), dtype=np.float32)
    for start in range(0, count, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, count))
        found = vectors @ unit_rows(read(block)).T
        found[block == rows[:, None]] = -np.inf  # itself
        scores, best = np.hstack([scores, found]), np.hstack([best, np.broadcast_to(block, found.shape)])
        kept = np.argpartition(scores, -_K, axis=1)[:, -_K:]
        scores, best = np.take_along_axis(scores, kept, 1), np.take_along_axis(best, kept, 1)
    return Questions(rows, vectors, best)


def measure(
    searcher: Searcher, questions: Questions, ids: Sequence[str], size: int = 0, share: float = 0.0
) -> tuple[float, float]:
    """Ask the questions one by one.

    Args:
        searcher: what is asked.
        questions: records asked as questions.
        ids: of the records that the questions number.
        size: candidates that stage one is asked for at first; 0 for what was chosen for the index.
        share: of the inverted lists that are searched at first; 0 for what was chosen for the index.

    Returns:
        The share of the true nearest records that were found, 0 to 1, and the median seconds per question.
    """
    shares, seconds = [], []
    for row, vector, nearest in zip(questions.rows, questions.vectors, questions.nearest, strict=True):
        start = time.perf_counter()
        (found,) = searcher.nearest(vector[None], _K + 1, size, share)
        seconds.append(time.perf_counter() - start)
        others = [id_ for id_ in found if id_ != ids[row]][:_K]
        shares.append(len({ids[other] for other in nearest}.intersection(others)) / len(nearest))
    return float(np.mean(shares)), float(np.median(seconds))


def own_questions(stores: Stores) -> tuple[Questions, list[str]]:
    """Return records of an index to ask as questions, and the ids of the records that these number."""
    ids = [id_ for page in stores.archive.ids() for id_ in page]
    return ask_own_records(lambda rows: stores.archive.read([ids[row] for row in rows])[1], len(ids)), ids


def calibrate(searcher: Searcher, questions: Questions, ids: Sequence[str]) -> None:
    """Choose how many candidates and lists a search begins with, by what searches find, and remember it.

    Args:
        searcher: of the index.
        questions: records asked as questions.
        ids: of the records that the questions number.
    """
    shortlist, config = searcher.stores.shortlist, searcher.stores.config
    share = 1.0
    if searcher.in_memory:
        enough = (s for s in _SHARES if measure(searcher, questions, ids, _SIZES[-1], s)[0] >= config.target_recall)
        # Twice as many lists as records need: questions are less like any record.
        share = min(2 * next(enough, 1.0), 1.0)
    for size in _SIZES:
        recall, seconds = measure(searcher, questions, ids, size, share)
        if recall >= config.target_recall:
            break
    shortlist.remember(
        replace(config, shortlist_size=size, lists_share=share, recall=recall, measured_records=len(ids))
    )
    _LOG.info(
        "index %r is searched at %d of %d dimensions, with %d candidates and %.0f%% of its lists: %.1f%% of the true "
        "top 10 of %d of its records, %.2f ms per query",
        *(shortlist.name, config.shortlist_dim, config.full_dim, size, 100 * share),
        *(100 * recall, len(questions.rows), 1e3 * seconds),
    )


def measure_again(searcher: Searcher) -> None:
    """Measure the recall of an index that has grown, and warn where it is below the target."""
    shortlist, config = searcher.stores.shortlist, searcher.stores.config
    questions, ids = own_questions(searcher.stores)
    recall, _ = measure(searcher, questions, ids)
    shortlist.remember(replace(config, recall=recall, measured_records=len(ids)))
    if recall < config.target_recall:
        warnings.warn(
            f"index {shortlist.name!r} has grown to {len(ids)} records, and its searches find {recall:.1%} of the "
            f'true top 10, not {config.target_recall:.1%}. Call reindex(rotation="fit") to have another dimension '
            "chosen, at a quiet time.",
            stacklevel=4,
        )


def warn_of_drift(stores: Stores, rows: Float32Array) -> bool:
    """Warn where the shortlist keeps less of new vectors, float32 [n, full_dim], than of those it was fitted on."""
    config = stores.config
    assert stores.rotation is not None
    energy = explained_energy(rows[:: max(len(rows) // _DRIFT_ROWS, 1)], stores.rotation, config.shortlist_dim)
    drifted = energy < _DRIFT * config.explained_energy
    if drifted:
        warnings.warn(
            f"the shortlist of index {stores.shortlist.name!r} kept {config.explained_energy:.0%} of the vectors it "
            f"was fitted on and keeps {energy:.0%} of these {len(rows)}: they differ. "
            'Call reindex(rotation="fit") when they are all in.',
            stacklevel=4,
        )
    return drifted


def _cheapest_dim(ranks: Mapping[int, Ranks], target_recall: float) -> int:
    """Return the cheapest dimension at which an exact scan's shortlist holds enough of the true neighbours.

    Args:
        ranks: dimension -> int [q, K], how many records an exact scan puts before each true neighbour.
        target_recall: share of the true neighbours that is to be found.
    """
    costs: dict[int, float] = {}
    for dim, rank in ranks.items():
        for size in _SIZES:
            recall, candidates = _shortlist_recall(rank, size)
            if recall >= min(target_recall + _MARGIN, 1.0):
                cost = dim * _MS_PER_DIM + candidates * _MS_PER_CANDIDATE
                costs[dim] = min(costs.get(dim, cost), cost)
    return min(costs, key=lambda dim: costs[dim]) if costs else max(ranks)


def _dims_to_try(full_dim: int) -> list[int]:
    """Return multiples of 32 up to half of the full dimension, each at most a quarter above the one before."""
    dims: list[int] = []
    for dim in range(_STEP, max(full_dim // 2, min(full_dim, 4 * _STEP)) + 1, _STEP):
        if not dims or dim - dims[-1] >= dims[-1] // 4:
            dims.append(dim)
    return dims or [full_dim]


def _ranks(
    read: ReadRows, count: int, rotation: Float32Array, questions: Questions, dims: Sequence[int]
) -> dict[int, Ranks]:
    """Return how many records an exact scan at each dimension puts before each true neighbour: int [q, K]."""
    axes = np.ascontiguousarray(rotation[:, : dims[-1]])
    asked = questions.vectors @ axes
    true = (_read_any(read, questions.nearest.ravel()) @ axes).reshape(*questions.nearest.shape, -1)
    thresholds = []
    for dim in dims:
        dots = np.einsum("qd,qkd->qk", asked[:, :dim], true[..., :dim])
        thresholds.append(np.sort(dots / np.maximum(np.linalg.norm(true[..., :dim], axis=-1), 1e-30), axis=1))
    ranks = np.zeros((len(dims), *questions.nearest.shape), dtype=np.int64)
    for start in range(0, count, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, count))
        turned = read(block) @ axes
        itself = block == questions.rows[:, None]
        scores = np.zeros((len(asked), len(block)), dtype=np.float32)
        squares = np.zeros(len(block), dtype=np.float32)
        for place, (dim, before) in enumerate(zip(dims, (0, *dims), strict=False)):
            part = turned[:, before:dim]
            scores += asked[:, before:dim] @ part.T
            squares += np.einsum("nd,nd->n", part, part)
            cosine = scores / np.sqrt(np.maximum(squares, 1e-30))
            cosine[itself] = -np.inf
            for query, (row, least) in enumerate(zip(cosine, thresholds[place], strict=True)):
                # A neighbour must not be put behind itself by the last digit.
                above = np.searchsorted(least, row[row > least[0] + 1e-6] - 1e-6)
                ranks[place, query] += np.bincount(above, minlength=_K + 1)[::-1].cumsum()[::-1][1:]
    return dict(zip(dims, ranks, strict=True))


def _read_any(read: ReadRows, rows: Rows) -> Float32Array:
    """Read vectors in any order, some of them more than once."""
    ascending, places = np.unique(rows, return_inverse=True)
    return unit_rows(read(ascending))[places]


def _shortlist_recall(ranks: Ranks, chosen: int) -> tuple[float, float]:
    """Let a shortlist grow as a search's does.

    Args:
        ranks: int [q, K], how many records are before each true neighbour.
        chosen: its size at first.

    Returns:
        The share of true neighbours in it, and the mean number of candidates in all rounds together.
    """
    size = np.full((len(ranks), 1), first_size(chosen, _K))
    for _ in range(MAX_ROUNDS - 1):
        late = ((ranks < size) & (ranks >= LATE * size)).any(axis=1, keepdims=True)
        size = np.where(late, 2 * size, size)
    return float((ranks < size).mean()), float(size.mean())
