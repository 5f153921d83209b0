"""Inverted lists (IVF): vectors are grouped by nearest centroid, and a search scans the lists nearest to its query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mrl_rag.lifetime import usable_cores
from mrl_rag.quantization import Codes, inner_products, pack, unit_codes
from mrl_rag.truncation import unit_rows

Rows = npt.NDArray[np.intp]
Item = TypeVar("Item")
Result = TypeVar("Result")

# With fewer records a scan of all of them is as fast.
MIN_LISTED = 20_000
# With shorter lists a search scans fewer records at the same recall, but k-means takes longer; `benchmarks/README.md`
# has the figures.
_RECORDS_PER_LIST, _MAX_LISTS = 32, 16_384
# k-means is fitted on so many records per list.
_SAMPLE_PER_LIST, _ITERATIONS = 20, 5
# Vectors that are compared with all centroids at a time: 64 x 16,384 results are 4 MB.
_BATCH = 64
# Vectors are preselected by so many of their numbers, if these hold this share of the squared length, as they do after
# a rotation, and if there are so many vectors or more. At least one in so many is kept (`benchmarks/README.md`).
_LEADING, _MIN_LEADING_SHARE = 96, 0.7
_MIN_PRESELECTED, _KEPT = 8192, 32
# Lists that are preselected per list that is scanned.
_LISTS_KEPT = 4
# Bytes of vectors per product with one query, so that they stay in the processor's cache.
_BLOCK_BYTES = 800_000


@dataclass(frozen=True, eq=False)
class InvertedLists:
    """The inverted lists of vectors that are sorted by list.

    Attributes:
        centroids: int8 [m, d], as `unit_codes` returns them.
        starts: int64 [m + 1]; list i has the rows starts[i] to starts[i + 1] - 1.
        fitted_on: number of vectors when the centroids were fitted.
    """

    centroids: Codes
    starts: npt.NDArray[np.int64]
    fitted_on: int

    @property
    def size(self) -> int:
        """The number of vectors in all lists."""
        return int(self.starts[-1])

    def near(self, query: Codes, share: float) -> Rows:
        """Return the rows in the lists nearest to a query, int [n] in ascending order.

        Args:
            query: in eight bits per number, int8 [d].
            share: share of the lists to scan (nprobe / m), 0 to 1; at least one is scanned.
        """
        count = min(max(round(share * len(self.centroids)), 1), len(self.centroids))
        near = preselect(self._leading, np.arange(len(self.centroids)), query, _LISTS_KEPT * count)
        chosen = np.sort(near[best(product(self.centroids, near, query), count)])
        starts = self.starts[chosen]
        lengths = self.starts[chosen + 1] - starts
        ends = np.cumsum(lengths)
        rows: Rows = np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
        return rows

    @cached_property
    def _leading(self) -> Codes | None:
        return leading(self.centroids)

    def list_of(self, rows: Rows) -> Rows:
        """Return the list of each row, int [n]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def extended(self, lists: Rows, codes: Codes) -> tuple[Rows, InvertedLists]:
        """Add vectors to the lists; the centroids stay the same.

        Args:
            lists: list of each of the n old vectors, int [n].
            codes: the new vectors in eight bits per number, int8 [m, d].

        Returns:
            The n + m rows sorted by list, int [n + m], and the lists.
        """
        rows, starts = _sorted_by_list(np.append(lists, _nearest(codes, self.centroids)), len(self.centroids))
        return rows, replace(self, starts=starts)


def group(codes: Codes) -> tuple[Rows, InvertedLists]:
    """Group vectors by spherical k-means (Lloyd's algorithm). The result is deterministic.

    Args:
        codes: the vectors, int8 [n, d], n > 0, as `unit_codes` returns them.

    Returns:
        The rows sorted by list, int [n], and the lists.
    """
    count = min(max(len(codes) // _RECORDS_PER_LIST, 1), _MAX_LISTS)
    order = np.random.default_rng(0).permutation(len(codes))[: count * _SAMPLE_PER_LIST]
    sample, centroids = codes[np.sort(order)], codes[order[:count]]
    for _ in range(_ITERATIONS):
        rows, starts = _sorted_by_list(_nearest(sample, centroids), len(centroids))
        # Drops lists that became empty.
        nonempty = starts[:-1][np.diff(starts) > 0]
        centroids = unit_codes(unit_rows(np.add.reduceat(sample[rows], nonempty, axis=0, dtype=np.float32)))
    rows, starts = _sorted_by_list(_nearest(codes, centroids), len(centroids))
    return rows, InvertedLists(centroids, starts, len(codes))


def leading(codes: Codes) -> Codes | None:
    """Return the first numbers of vectors, int8 [n, d], for `preselect`; None where that doesn't pay."""
    if len(codes) < _MIN_PRESELECTED or codes.shape[1] < 2 * _LEADING:
        return None
    squares = np.square(codes[:: len(codes) // _MIN_PRESELECTED], dtype=np.float32)
    enough = squares[:, :_LEADING].sum() >= _MIN_LEADING_SHARE * squares.sum()
    return np.ascontiguousarray(codes[:, :_LEADING]) if enough else None


def preselect(first: Codes | None, rows: Rows, query: Codes, kept: int) -> Rows:
    """Return those of n rows that are nearest to a query by their first numbers alone, in order; all if they are few.

    Args:
        first: what `leading` returned.
        rows: int [n], ascending.
        query: in eight bits per number, int8 [d].
        kept: rows to return, at least.
    """
    kept = max(kept, len(rows) // _KEPT)
    if first is None or len(rows) < max(_MIN_PRESELECTED, 4 * kept):
        return rows
    return rows[np.sort(best(product(first, rows, query[: first.shape[1]]), kept))]


def product(codes: Codes, rows: Rows, query: Codes) -> npt.NDArray[np.int32]:
    """Return the inner products of some vectors with a query.

    Args:
        codes: all vectors, int8 [n, d].
        rows: int [m], ascending, each once.
        query: int8 [d].

    Returns:
        int32 [m].
    """
    packed = pack(np.ascontiguousarray(query[None]))
    if len(rows) == len(codes):
        return inner_products(codes, packed)[:, 0]
    # In blocks, so that what is taken is still in the processor's cache when it is multiplied: half the time.
    parts = blocks(len(rows), _BLOCK_BYTES // codes.shape[1])
    scores = [inner_products(codes.take(rows[part], axis=0), packed)[:, 0] for part in parts]
    return np.concatenate(scores) if scores else np.empty(0, dtype=np.int32)


def best(scores: npt.NDArray[np.int32], count: int) -> Rows:
    """Return the places of the highest scores, in any order: int [min(count, len(scores))]."""
    return np.argpartition(scores, -count)[-count:] if count < len(scores) else np.arange(len(scores))


def blocks(count: int, size: int) -> list[slice]:
    """Return slices of `count` rows, at most `size` each."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def on_all_cores(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return `function(item)` of each item, in order."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(function, items))


def _sorted_by_list(lists: Rows, count: int) -> tuple[Rows, npt.NDArray[np.int64]]:
    """Return rows sorted by list, and the start of each of `count` lists among them, int64 [count + 1]."""
    rows = np.argsort(lists, kind="stable")
    return rows, np.searchsorted(lists[rows], np.arange(count + 1)).astype(np.int64)


def _nearest(codes: Codes, centroids: Codes) -> Rows:
    """Return the nearest of the centroids, int8 [m, d], for each vector, int8 [n, d]: int [n]."""
    packed = pack(centroids)
    every = blocks(len(codes), _BATCH)
    parts = on_all_cores(lambda part: inner_products(codes[part], packed).argmax(axis=1), every)
    return np.concatenate([np.empty(0, dtype=np.intp), *parts])
