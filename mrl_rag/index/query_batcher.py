"""Batching of searches that several threads make at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from mrl_rag.truncation import Float32Array

RequestT = TypeVar("RequestT")
Answer = TypeVar("Answer")


@dataclass(eq=False)
class _Search(Generic[RequestT, Answer]):
    queries: Float32Array
    request: RequestT
    answers: list[Answer] | None = None


class QueryBatcher(Generic[RequestT, Answer]):
    """Answers one search at a time, and those that have queued up meanwhile as one batch.

    A search in memory makes a hundred short calls to NumPy and LMDB. Threads that search in parallel would spend most
    of their time passing the interpreter lock around, and a batch takes less time per query.
    """

    def __init__(self) -> None:
        self._answering = threading.Lock()
        self._mutex = threading.Lock()
        self._waiting: list[_Search[RequestT, Answer]] = []

    def search(
        self, queries: Float32Array, request: RequestT, answer: Callable[[Float32Array, RequestT], list[Answer]]
    ) -> list[Answer]:
        """Return `answer(queries, request)`, computed in a batch with other searches if possible.

        Args:
            queries: float32 [n, d].
            request: the search's other arguments; only searches with equal requests share a batch.
            answer: returns one answer per query, for queries, float32 [n, d], and a request. It is called by one thread
                at a time; its errors are raised here.
        """
        mine = _Search[RequestT, Answer](queries, request)
        with self._mutex:
            self._waiting.append(mine)
        with self._answering:
            if mine.answers is None:
                self._answer_batch(mine, answer)
            if mine.answers is None:
                # Search alone, also if the batch failed: its error may be due to another search.
                mine.answers = answer(queries, request)
        return mine.answers

    def _answer_batch(
        self, mine: _Search[RequestT, Answer], answer: Callable[[Float32Array, RequestT], list[Answer]]
    ) -> None:
        with self._mutex:
            others = [one for one in self._waiting if one is not mine and one.request == mine.request]
            # A search that isn't answered below, after an error or an interruption, is answered by its own thread.
            self._waiting = [one for one in self._waiting if one is not mine and one not in others]
        if not others:
            return
        batch = [mine, *others]
        try:
            answers = answer(np.concatenate([one.queries for one in batch]), mine.request)
        except Exception:
            return
        end = 0
        for one in batch:
            start, end = end, end + len(one.queries)
            one.answers = answers[start:end]
