"""Inverted lists (IVF): vectors are grouped by nearest centroid, and a search scans the lists nearest to its query."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mrl_rag.quantization import Codes, quantize, score_codes
from mrl_rag.truncation import Float32Array, unit_rows

Rows = npt.NDArray[np.intp]

# With fewer records a scan of all of them is as fast.
MIN_LISTED = 20_000
# With shorter lists a search scans fewer records at the same recall, but k-means takes longer; `benchmarks/README.md`
# has the figures.
_RECORDS_PER_LIST, _MAX_LISTS = 32, 8192
# k-means is fitted on so many records per list.
_SAMPLE_PER_LIST, _ITERATIONS = 20, 5
# Vectors per matrix product with the centroids.
_BATCH = 1024


@dataclass(frozen=True, eq=False)
class InvertedLists:
    """The inverted lists of vectors that are sorted by list.

    Attributes:
        codes: of the centroids, int8 [m, d].
        scales: of the centroids, float32 [m].
        starts: int64 [m + 1]; list i has the rows starts[i] to starts[i + 1] - 1.
        fitted_on: number of vectors when the centroids were fitted.
    """

    codes: Codes
    scales: Float32Array
    starts: npt.NDArray[np.int64]
    fitted_on: int

    @property
    def size(self) -> int:
        """The number of vectors in all lists."""
        return int(self.starts[-1])

    def near(self, codes: Codes, share: float) -> list[tuple[Rows, Rows]]:
        """Return the lists nearest to each query, int [m] in ascending order, and their rows, int [n].

        Args:
            codes: the queries in eight bits per number, int8 [q, d].
            share: share of the lists to scan (nprobe / m), 0 to 1; at least one is scanned.
        """
        count = min(max(round(share * len(self.codes)), 1), len(self.codes))
        scores = score_codes(codes, self.codes, self.scales)
        chosen = np.sort(np.argpartition(scores, -count, axis=1)[:, -count:], axis=1)
        starts = self.starts[chosen]
        lengths = self.starts[chosen + 1] - starts
        ends = np.cumsum(lengths, axis=1)
        shifts = starts - ends + lengths
        return [
            (lists, np.arange(total) + np.repeat(shift, length))
            for lists, total, shift, length in zip(chosen, ends[:, -1].tolist(), shifts, lengths, strict=True)
        ]

    def slices(self, lists: Rows) -> list[slice]:
        """Return the rows of each of some lists as a slice."""
        return list(map(slice, self.starts[lists].tolist(), self.starts[lists + 1].tolist()))

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
        centroids = self.codes * self.scales[:, None]
        new = _nearest_centroids(codes, centroids, np.arange(len(codes))) if len(codes) else lists[:0]
        rows, starts = _sorted_by_list(np.append(lists, new), len(self.codes))
        return rows, replace(self, starts=starts)


def group(codes: Codes, scales: Float32Array) -> tuple[Rows, InvertedLists]:
    """Group vectors by spherical k-means (Lloyd's algorithm). The result is deterministic.

    Args:
        codes: the vectors in eight bits per number, int8 [n, d], n > 0.
        scales: float32 [n].

    Returns:
        The rows sorted by list, int [n], and the lists.
    """
    count = min(max(len(codes) // _RECORDS_PER_LIST, 1), _MAX_LISTS)
    order = np.random.default_rng(0).permutation(len(codes))[: count * _SAMPLE_PER_LIST]
    sample = np.sort(order)
    centroids = _unit(codes, scales, order[:count])
    for _ in range(_ITERATIONS):
        by_list, starts = _sorted_by_list(_nearest_centroids(codes, centroids, sample), len(centroids))
        # Drops lists that became empty.
        nonempty = starts[:-1][np.diff(starts) > 0]
        centroids = unit_rows(np.add.reduceat(_unit(codes, scales, sample[by_list]), nonempty, axis=0))
    rows, starts = _sorted_by_list(_nearest_centroids(codes, centroids, np.arange(len(codes))), len(centroids))
    return rows, InvertedLists(*quantize(centroids), starts, len(codes))


def _sorted_by_list(lists: Rows, count: int) -> tuple[Rows, npt.NDArray[np.int64]]:
    """Return rows sorted by list, and the start of each of `count` lists among them, int64 [count + 1]."""
    rows = np.argsort(lists, kind="stable")
    return rows, np.searchsorted(lists[rows], np.arange(count + 1)).astype(np.int64)


def _unit(codes: Codes, scales: Float32Array, rows: Rows) -> Float32Array:
    return codes[rows] * scales[rows, None]


def _nearest_centroids(codes: Codes, centroids: Float32Array, rows: Rows) -> Rows:
    """Return the nearest of the centroids, float32 [m, d], for each of `rows`: int [len(rows)]."""
    columns = np.ascontiguousarray(centroids.T)
    parts = np.split(rows, range(_BATCH, len(rows), _BATCH))
    return np.concatenate([(codes[part] @ columns).argmax(axis=1) for part in parts]).astype(np.intp)
