"""Measures of a search: exact scan, recall, nDCG and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mrl_rag.errors import InvalidVectors
from mrl_rag.extras import require
from mrl_rag.index.plan import check_k
from mrl_rag.truncation import normalize

Query = TypeVar("Query")
Answer = TypeVar("Answer")


def exact_scan(vectors: npt.ArrayLike, queries: npt.ArrayLike, k: int) -> npt.NDArray[np.intp]:
    """Return the nearest vectors per query, by the cosine with every one.

    Args:
        vectors: float array [n, d].
        queries: float array [q, d].
        k: how many to return.

    Returns:
        int array [q, min(k, n)] of row numbers, highest cosine first; equal cosines in the order of their rows.

    Raises:
        InvalidVectors: not two-dimensional, NaN or infinity, or of different lengths.
        InvalidPlan: k < 1.
    """
    rows, asked = normalize(vectors), normalize(queries)
    k = check_k(k)
    if rows.shape[1] != asked.shape[1]:
        raise InvalidVectors(f"vectors have {rows.shape[1]} numbers and queries {asked.shape[1]}; they must be equal.")
    return np.argsort(-(asked @ rows.T), axis=1, kind="stable")[:, :k]


def recall_at_k(found: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> float:
    """Return the share of the expected ids that were found, 0 to 1, averaged over queries.

    Args:
        found: ids per query.
        expected: ids per query, as by an exact scan; a query without any counts as 1.
    """
    shares = [len(set(f) & set(e)) / len(set(e)) if e else 1.0 for f, e in zip(found, expected, strict=True)]
    return statistics.fmean(shares) if shares else 1.0


def ndcg(run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]], k: int = 10) -> float:
    """Return nDCG@k as trec_eval computes it, averaged over the judged queries.

    Args:
        run: query id -> document id -> score.
        qrels: query id -> document id -> relevance. A judged query missing from `run` counts as 0.
        k: how many of the best documents are looked at.

    Raises:
        MissingExtra: ir-measures is not installed.
        InvalidPlan: k < 1.
    """
    return statistics.fmean(judge(run, qrels, k)[f"nDCG@{check_k(k)}"])


def judge(
    run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]], k: int = 10
) -> dict[str, list[float]]:
    """Return nDCG@k, MRR@k and recall@k per judged query, by ir-measures over trec_eval.

    Args:
        run: query id -> document id -> score.
        qrels: query id -> document id -> relevance; above 0 is relevant. A judged query missing from `run` counts as 0.
        k: how many of the best documents are looked at.

    Returns:
        "nDCG@k", "MRR@k" and "recall@k" -> a value per query, in the order of `qrels`.

    Raises:
        MissingExtra: ir-measures is not installed.
        InvalidPlan: k < 1.
    """
    library = require("ir_measures", extra="evaluation")
    k = check_k(k)
    names = {library.nDCG @ k: f"nDCG@{k}", library.RR @ k: f"MRR@{k}", library.R @ k: f"recall@{k}"}
    values: dict[str, dict[str, float]] = {name: {} for name in names.values()}
    # Copied, since pytrec_eval takes nothing but dicts.
    judged = {query: dict(documents) for query, documents in qrels.items()}
    for found in library.iter_calc(list(names), judged, {query: dict(scored) for query, scored in run.items()}):
        values[names[found.measure]][found.query_id] = found.value
    return {name: [by_query.get(query, 0.0) for query in qrels] for name, by_query in values.items()}


def timed(search: Callable[[Query], Answer], queries: Sequence[Query], rounds: int = 3) -> tuple[list[Answer], float]:
    """Search for each query by itself, several times, and take the time.

    Args:
        search: takes one query.
        queries: n queries.
        rounds: how often each is searched for.

    Returns:
        The n answers of the last round, and the median seconds per query.
    """
    seconds: list[float] = []
    for _ in range(rounds):
        answers: list[Answer] = []
        for query in queries:
            start = time.perf_counter()
            answers.append(search(query))
            seconds.append(time.perf_counter() - start)
    return answers, statistics.median(seconds)
