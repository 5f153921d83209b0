"""Inverted lists: vectors near each other stand together, so that a search looks at the lists near its query alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mrl_rag.quantization import Codes, quantize, score_codes
from mrl_rag.truncation import Float32Array, unit_rows

Rows = npt.NDArray[np.intp]

# Fewer records than this are scanned as quickly as lists of them.
MIN_LISTED = 20_000
# Records per list, and lists at most. With shorter lists fewer records are looked at for the same recall, and grouping
# takes longer; `benchmarks/README.md` has the figures.
_PER_LIST, _MOST_LISTS = 32, 8192
# Of k-means: records per list that the centroids are fitted on, and rounds.
_SAMPLE_PER_LIST, _ROUNDS = 20, 5
# Vectors compared with all centroids at a time.
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class InvertedLists:
    """Where the vectors of each list are, among vectors in the order of their lists.

    Attributes:
        codes: of the centroids, int8 [m, d].
        scales: of the centroids, float32 [m].
        starts: int64 [m + 1]; list i has the rows from starts[i] up to, and without, starts[i + 1].
        fitted_on: how many vectors there were when the centroids were fitted.
    """

    codes: Codes
    scales: Float32Array
    starts: npt.NDArray[np.int64]
    fitted_on: int

    @property
    def size(self) -> int:
        """How many vectors all lists hold."""
        return int(self.starts[-1])

    def near(self, codes: Codes, share: float) -> list[Rows]:
        """Return the rows of the lists nearest to each query, int [n] per query.

        Args:
            codes: the queries in eight bits, int8 [q, d].
            share: of all lists, how many to take, 0 to 1; at least one.
        """
        count = min(max(round(share * len(self.codes)), 1), len(self.codes))
        scores = score_codes(codes, self.codes, self.scales)
        chosen = np.sort(np.argpartition(scores, -count, axis=1)[:, -count:], axis=1)
        starts = self.starts[chosen]
        lengths = self.starts[chosen + 1] - starts
        ends = np.cumsum(lengths, axis=1)
        shifts = starts - ends + lengths
        return [
            np.arange(total) + np.repeat(shift, length)
            for total, shift, length in zip(ends[:, -1].tolist(), shifts, lengths, strict=True)
        ]

    def list_of(self, rows: Rows) -> Rows:
        """Return the list that each of some rows stands in, int [n]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def extended(self, lists: Rows, codes: Codes) -> tuple[Rows, InvertedLists]:
        """Put more vectors into the lists; the centroids stay.

        Args:
            lists: which list each of the first n vectors stands in, int [n].
            codes: the other vectors in eight bits per number, int8 [m, d].

        Returns:
            The n + m rows in the order of their lists, int [n + m], and the lists.
        """
        centroids = self.codes * self.scales[:, None]
        new = _nearest_centroids(codes, centroids, np.arange(len(codes))) if len(codes) else lists[:0]
        rows, starts = _in_order(np.append(lists, new), len(self.codes))
        return rows, replace(self, starts=starts)


def group(codes: Codes, scales: Float32Array) -> tuple[Rows, InvertedLists]:
    """Group vectors by k-means on the sphere (Lloyd's algorithm), the same way every time.

    Args:
        codes: the vectors in eight bits per number, int8 [n, d], n > 0.
        scales: float32 [n].

    Returns:
        The rows in the order of their lists, int [n], and the lists.
    """
    count = min(max(len(codes) // _PER_LIST, 1), _MOST_LISTS)
    order = np.random.default_rng(0).permutation(len(codes))[: count * _SAMPLE_PER_LIST]
    sample = np.sort(order)
    centroids = _unit(codes, scales, order[:count])
    for _ in range(_ROUNDS):
        by_list, starts = _in_order(_nearest_centroids(codes, centroids, sample), len(centroids))
        # Without those that are nearest to none.
        first = starts[:-1][np.diff(starts) > 0]
        centroids = unit_rows(np.add.reduceat(_unit(codes, scales, sample[by_list]), first, axis=0))
    rows, starts = _in_order(_nearest_centroids(codes, centroids, np.arange(len(codes))), len(centroids))
    return rows, InvertedLists(*quantize(centroids), starts, len(codes))


def _in_order(lists: Rows, count: int) -> tuple[Rows, npt.NDArray[np.int64]]:
    """Return rows in the order of their lists, and where each of `count` lists begins among them."""
    rows = np.argsort(lists, kind="stable")
    return rows, np.searchsorted(lists[rows], np.arange(count + 1)).astype(np.int64)


def _unit(codes: Codes, scales: Float32Array, rows: Rows) -> Float32Array:
    return codes[rows] * scales[rows, None]


def _nearest_centroids(codes: Codes, centroids: Float32Array, rows: Rows) -> Rows:
    """Return which centroid, float32 [m, d], is nearest to each of some rows: int [len(rows)]."""
    turned = np.ascontiguousarray(centroids.T)
    parts = np.split(rows, range(_BLOCK, len(rows), _BLOCK))
    return np.concatenate([(codes[part] @ turned).argmax(axis=1) for part in parts]).astype(np.intp)
