"""Measures of a search: exact scan, recall, nDCG and time; test collections in the BEIR layout."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mrl_rag.errors import InvalidInput, InvalidVectors
from mrl_rag.extras import require
from mrl_rag.index.plan import check_k
from mrl_rag.truncation import normalize

Query = TypeVar("Query")
Answer = TypeVar("Answer")
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Dataset:
    """A retrieval test collection.

    Attributes:
        corpus: document id -> text, title first.
        queries: query id -> text.
        qrels: query id -> document id -> relevance, 0 for none.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: Path | str) -> Dataset:
    """Read a test collection in the BEIR layout.

    Args:
        folder: holds `corpus.jsonl`, `queries.jsonl`, and `qrels.tsv` or `qrels/test.tsv`.

    Returns:
        The collection; queries without judgments are left out.

    Raises:
        InvalidInput: a file is missing, or one of its lines is not in the layout.
    """
    folder = Path(folder)
    judged = next((f for f in (folder / "qrels.tsv", folder / "qrels" / "test.tsv") if f.is_file()), None)
    if judged is None:
        raise InvalidInput(f"{folder} has no qrels.tsv and no qrels/test.tsv; pass a folder in the BEIR layout.")
    qrels: dict[str, dict[str, int]] = {}
    for query_id, document_id, score in _lines(judged, _judgment, skip=1):
        qrels.setdefault(query_id, {})[document_id] = score
    corpus = dict(_lines(folder / "corpus.jsonl", _document))
    queries = dict(_lines(folder / "queries.jsonl", _document))
    return Dataset(corpus, {id_: text for id_, text in queries.items() if id_ in qrels}, qrels)


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
        MissingExtra: pytrec_eval is not installed.
        InvalidPlan: k < 1.
    """
    measure = f"ndcg_cut_{check_k(k)}"
    evaluator = require("pytrec_eval", extra="evaluation").RelevanceEvaluator(
        {query: dict(judged) for query, judged in qrels.items()}, {f"ndcg_cut.{k}"}
    )
    scores = evaluator.evaluate({query: dict(scored) for query, scored in run.items()})
    return statistics.fmean(scores.get(query, {}).get(measure, 0.0) for query in qrels)


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


def _judgment(line: str) -> tuple[str, str, int]:
    query_id, document_id, score = line.split("\t")
    return query_id, document_id, int(score)


def _document(line: str) -> tuple[str, str]:
    entry = json.loads(line)
    return str(entry["_id"]), f"{entry.get('title') or ''} {entry['text']}".strip()


def _lines(file: Path, parse: Callable[[str], Parsed], skip: int = 0) -> list[Parsed]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidInput(f"{file} can't be read: {error}. Pass a folder in the BEIR layout.") from error
    parsed = []
    for number, line in enumerate(lines[skip:], start=skip + 1):
        if line.strip():
            try:
                parsed.append(parse(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInput(f"{file}, line {number}, is not in the BEIR layout: {line[:80]!r}") from error
    return parsed
