"""Ways to search: vectors cut or mapped, in fewer bytes, in one stage or several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from mrl_rag.quantization import inner_products, pack, quantize, row_bytes, score_bits, sign_bits
from mrl_rag.truncation import Float32Array, truncate

Precision: TypeAlias = Literal["float32", "float16", "int8", "binary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Rows: TypeAlias = npt.NDArray[np.intp]

# Questions that are scored together: with 1,000,000 vectors the scores take 256 MB.
_BLOCK = 64


def bytes_per_vector(dim: int, precision: Precision) -> int:
    """Return the bytes that a vector of `dim` numbers takes."""
    if precision == "binary":
        return -(-dim // 8)
    return 4 * dim if precision == "float32" else row_bytes(precision, dim)


@dataclass(frozen=True)
class Way:
    """A search by exact scans: all vectors in the first stage, then fewer and fewer candidates.

    Attributes:
        method: as in `Result`.
        dims: dimension of each stage, ascending.
        sizes: candidates that each stage but the last passes on.
        precision: of the first stage's vectors; later stages score float32.
        map: float32 [full_dim, full_dim], applied to queries and vectors before they are cut; None for none. Later
            stages at the full dimension leave it out, so a `map` that isn't a rotation is for the first stages only.
    """

    method: str
    dims: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    precision: Precision = "float32"
    map: Float32Array | None = None


class ScanningSearcher:
    """Searches vectors in one way.

    Args:
        way: how.
        vectors: float32 unit rows [n, full_dim].
    """

    def __init__(self, way: Way, vectors: Float32Array) -> None:
        self._way, self._vectors = way, vectors
        first = self._cut(vectors, way.dims[0])
        self._codes: npt.NDArray[np.generic] = first
        if way.precision == "int8":
            self._codes, self._scales = quantize(first)
        elif way.precision == "binary":
            self._codes = sign_bits(first)
        elif way.precision == "float16":
            self._codes = first.astype(np.float16)

    def search(self, queries: Float32Array, k: int, left_out: Rows | None = None) -> Rows:
        """Return the rows found per query, best first; equal scores in the order of their rows.

        Args:
            queries: float32 unit rows [q, full_dim].
            k: rows per query at most.
            left_out: int [q], a row per query that is not searched: the record that the query was made of.

        Returns:
            int [q, min(k, rows that are searched)].
        """
        found = [
            self._search(queries[start : start + _BLOCK], k, None if left_out is None else left_out[start:][:_BLOCK])
            for start in range(0, len(queries), _BLOCK)
        ]
        return np.concatenate(found) if found else np.zeros((0, k), dtype=np.intp)

    def _search(self, queries: Float32Array, k: int, left_out: Rows | None) -> Rows:
        dims, sizes = self._way.dims, (*self._way.sizes, k)
        scores = self._first_scores(self._cut(queries, dims[0]))
        if left_out is not None:
            scores[np.arange(len(queries)), left_out] = -np.inf
        searched = len(self._vectors) - (left_out is not None)
        rows = _best(scores, min(sizes[0], searched))
        for dim, size in zip(dims[1:], sizes[1:], strict=True):
            rows.sort(axis=1)
            candidates, asked = self._vectors[rows], queries
            if dim < self._vectors.shape[1]:
                candidates = self._cut(candidates.reshape(-1, self._vectors.shape[1]), dim).reshape(*rows.shape, dim)
                asked = self._cut(queries, dim)
            reranked = np.einsum("qd,qnd->qn", asked, candidates)
            rows = np.take_along_axis(rows, _best(reranked, min(size, rows.shape[1])), axis=1)
        return rows

    def _cut(self, vectors: Float32Array, dim: int) -> Float32Array:
        return truncate(vectors if self._way.map is None else vectors @ self._way.map, dim)

    def _first_scores(self, queries: Float32Array) -> Float32Array:
        precision, codes = self._way.precision, self._codes
        if precision == "int8":
            return inner_products(codes.view(np.int8), pack(quantize(queries)[0])).T * self._scales
        if precision == "binary":
            return np.stack([score_bits(query, codes.view(np.uint8)) for query in queries])
        if precision == "float16":
            import numkong

            halves = queries.astype(np.float16)
            return np.array(numkong.dots_packed(codes, numkong.dots_pack(halves)), dtype=np.float32).T
        scores: Float32Array = queries @ codes.view(np.float32).T
        return scores


def _best(scores: Float32Array, k: int) -> Rows:
    """Return the places of the k highest scores per row, highest first; equal ones in the order of their places."""
    count = scores.shape[1]
    places = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1) if k < count else None
    if places is None:
        return np.argsort(-scores, axis=1, kind="stable")
    kept = np.take_along_axis(scores, places, axis=1)
    return np.take_along_axis(places, np.argsort(-kept, axis=1, kind="stable"), axis=1)
