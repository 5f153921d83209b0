"""The stages after Chroma's: candidates in, ranking out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mrl_rag.errors import InvalidVectors
from mrl_rag.index.plan import Plan, check_k
from mrl_rag.truncation import Float32Array, normalize, truncate


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage of a search thought of a hit.

    Attributes:
        dim: how many numbers it looked at.
        rank: 1 for its best candidate.
        score: cosine at `dim`; None for Chroma's stage, which is asked for ids alone.
        milliseconds: that the stage took, for all queries that went through it together.
    """

    dim: int
    rank: int
    score: float | None
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Ranked:
    """One candidate that came through.

    Attributes:
        id: of the record.
        score: cosine at full dimension.
        stages: what each stage thought of it, Chroma's left out.
    """

    id: str
    score: float
    stages: tuple[Stage, ...]


def rank(query: npt.ArrayLike, vectors: npt.ArrayLike, k: int | None = None) -> list[tuple[int, float]]:
    """Order vectors by their cosine with a query: stage two alone, for candidates found elsewhere.

    Args:
        query: float array [d].
        vectors: float array [n, d].
        k: how many to return; None for all.

    Returns:
        (row, cosine) pairs, best first; equal cosines in the order of their rows.

    Raises:
        InvalidVectors: not numbers of these shapes, or NaN or infinity.
        InvalidPlan: k < 1.
    """
    rows, asked = normalize(vectors), normalize(np.asarray(query, dtype=np.float32)[None])
    if len(rows) and rows.shape[1] != asked.shape[1]:
        raise InvalidVectors(
            f"vectors have {rows.shape[1]} numbers and the query {asked.shape[1]}; they must be equal."
        )
    scores = np.einsum("nd,d->n", rows, asked[0]) if len(rows) else np.zeros(0, dtype=np.float32)
    best = np.argsort(-scores, kind="stable")[: None if k is None else check_k(k)]
    return [(int(row), float(scores[row])) for row in best]


def diverse(scores: npt.NDArray[np.float64], vectors: Float32Array, k: int, lambda_mult: float) -> list[int]:
    """Choose rows that are near a query and unlike each other, by maximal marginal relevance.

    Args:
        scores: float64 [n], cosines with the query.
        vectors: float32 [n, d], unit rows.
        k: how many to choose at most.
        lambda_mult: 0 to 1; 1 for the nearest only, 0 for the most different.

    Returns:
        Rows in the order in which they were chosen: each has the highest lambda_mult * score - (1 - lambda_mult) *
        (highest cosine with a row chosen before), and is the first of those that have it.
    """
    likest = np.full(len(scores), -np.inf)
    chosen: list[int] = []
    for _ in range(min(k, len(scores))):
        value = lambda_mult * scores - (1 - lambda_mult) * np.where(np.isinf(likest), 0.0, likest)
        value[chosen] = -np.inf
        chosen.append(int(np.argmax(value)))
        likest = np.maximum(likest, vectors @ vectors[chosen[-1]])
    return chosen


def rerank(
    queries: Float32Array,
    candidates: Sequence[Sequence[int]],
    vectors: Float32Array,
    ids: Sequence[str],
    plan: Plan,
    k: int,
    rotation: Float32Array | None,
) -> list[list[Ranked]]:
    """Take each query's candidates through the stages after Chroma's.

    Args:
        queries: float32 [q, full_dim], unit rows.
        candidates: rows of `vectors` a query.
        vectors: float32 [n, full_dim].
        ids: the n ids, which order equal scores.
        plan: dimensions and sizes; its first stage is Chroma's.
        k: how many to return a query.
        rotation: float32 [full_dim, full_dim], applied before a cut; None for none.

    Returns:
        q lists, best first.
    """
    rows = [list(found) for found in candidates]
    stages: list[dict[int, tuple[Stage, ...]]] = [dict.fromkeys(found, ()) for found in rows]
    for dim, size in zip(plan.dims[1:], (*plan.sizes[1:], k), strict=True):
        start = time.perf_counter()
        if dim == vectors.shape[1]:
            # A rotation would change nothing but the last digit.
            asked, known = queries, vectors
            lengths = np.sqrt(np.einsum("nd,nd->n", known, known))
            scale = 1 / np.where(lengths > 0, lengths, 1)
        else:
            turned = (queries, vectors) if rotation is None else (queries @ rotation, vectors @ rotation)
            asked, known = (truncate(matrix, dim) for matrix in turned)
            scale = np.ones(len(known), dtype=np.float32)
        everything = list(range(len(known)))
        scored: list[list[tuple[float, str, int]]] = []
        for query, found in zip(asked, rows, strict=True):
            # einsum sums each row alone. A product of matrices would give a row another last digit in other company,
            # and equal vectors would not tie.
            chosen = (known, scale) if found == everything else (known[found], scale[found])
            scores = np.einsum("nd,d->n", chosen[0], query) * chosen[1]
            scored.append(_best(scores, found, ids, size))
        spent = (time.perf_counter() - start) * 1e3
        rows = [[row for _, _, row in best] for best in scored]
        stages = [
            {row: (*before[row], Stage(dim, rank, -score, spent)) for rank, (score, _, row) in enumerate(best, start=1)}
            for best, before in zip(scored, stages, strict=True)
        ]
    return [
        [Ranked(ids[row], trail[row][-1].score or 0.0, trail[row]) for row in found]
        for found, trail in zip(rows, stages, strict=True)
    ]


def _best(scores: Float32Array, rows: Sequence[int], ids: Sequence[str], size: int) -> list[tuple[float, str, int]]:
    """Return (-score, id, row) of the `size` best, best first."""
    # All that score as the last of them do, and fewer than all there are: most of the time would go into sorting.
    least = np.partition(scores, -size)[-size] if size < len(scores) else -np.inf
    near = np.flatnonzero(scores >= least).tolist()
    return sorted((-float(scores[place]), ids[rows[place]], rows[place]) for place in near)[:size]
