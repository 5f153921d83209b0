"""Searches of several threads at once share one batch."""

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
    """Answers the searches that wait at the same time as one batch.

    A search in memory is a hundred short calls of NumPy and LMDB. Threads that make them side by side spend more time
    handing each other the interpreter's lock than searching; a batch also costs less per query.

    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._mutex = threading.Lock()
        self._waiting: list[_Search[RequestT, Answer]] = []

    def search(
        self, queries: Float32Array, request: RequestT, answer: Callable[[Float32Array, RequestT], list[Answer]]
    ) -> list[Answer]:
        """Return the answers to queries; raise what `answer` raises for them.

        Args:
            queries: float32 [n, d].
            request: what is asked of each; only searches with equal requests share a batch.
            answer: queries, float32 [n, d], and a request -> n answers. Called by one thread at a time.
        """
        mine = _Search[RequestT, Answer](queries, request)
        with self._mutex:
            self._waiting.append(mine)
        with self._turn:
            if mine.answers is None:
                self._answer_all_like(mine, answer)
            if mine.answers is None:
                # An error that may be another search's.
                mine.answers = answer(queries, request)
        return mine.answers

    def _answer_all_like(
        self, mine: _Search[RequestT, Answer], answer: Callable[[Float32Array, RequestT], list[Answer]]
    ) -> None:
        with self._mutex:
            taken = [one for one in self._waiting if one is not mine and one.request == mine.request]
            # Whoever isn't answered below, after an error or an interruption, answers itself in its turn.
            self._waiting = [one for one in self._waiting if one is not mine and one not in taken]
        if not taken:
            return
        together = [mine, *taken]
        try:
            answers = answer(np.concatenate([one.queries for one in together]), mine.request)
        except Exception:
            return
        end = 0
        for one in together:
            start, end = end, end + len(one.queries)
            one.answers = answers[start:end]
