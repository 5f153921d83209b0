"""Small calls that arrive together share a forward pass."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from mrl_rag.encoder.batching import Row, token_batches
from mrl_rag.lifetime import NATIVE_CODE
from mrl_rag.truncation import Float32Array

Forward = Callable[[list[Row]], Float32Array]

# Seconds after which a caller whose rows another has taken looks whether they came back undone.
_PATIENCE = 1.0


class _Request(NamedTuple):
    rows: Sequence[Row]
    answer: Future[Float32Array]


class CallMerger:
    """Lets one caller a device run the network, on behalf of all who wait.

    Whoever gets a turn takes the calls that wait, in their order, a token budget at a time, until his own is answered.
    A caller who finds nobody else goes ahead at once, in his own thread: nothing waits for company.

    Args:
        forward: rows -> float32 [n, d]; called by `turns` threads at a time.
        token_budget: most tokens a batch.
        padded: whether padding counts.
        turns: how many may run at a time.
    """

    def __init__(self, forward: Forward, token_budget: int, *, padded: bool = True, turns: int = 1) -> None:
        self._forward = forward
        self.token_budget = token_budget
        self._padded = padded
        self._turns = turns
        self.renew()

    def renew(self) -> None:
        """Forget the callers of a parent process, who aren't there in a child that was forked."""
        self._turn = threading.Semaphore(self._turns)
        self._waiting: deque[_Request] = deque()
        self._mutex = threading.Lock()

    def batches(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Yield positions into `rows`, each exactly once, in batches that fit the token budget."""
        return token_batches([len(row.ids) for row in rows], self.token_budget, padded=self._padded)

    def submit(self, rows: Sequence[Row]) -> Future[Float32Array]:
        """Queue rows; `serve` must be called, by any thread, after that.

        Args:
            rows: n token rows, at least one.

        Returns:
            A future of float32 [n, d].
        """
        request = _Request(rows, Future())
        # From here on it can't be cancelled: a coroutine that gives up must not trip whoever answers it.
        request.answer.set_running_or_notify_cancel()
        with self._mutex:
            self._waiting.append(request)
        return request.answer

    def serve(self, answer: Future[Float32Array]) -> None:
        """Wait for a turn, and answer who waits until `answer` is done or in another's hands."""
        with self._turn:
            while not answer.done():
                taken = self._take()
                if not taken:
                    return
                try:
                    # To the end of this: torch still owns the arrays that the network returned.
                    with NATIVE_CODE:
                        self._answer(taken)
                finally:
                    # After an interruption the others' calls are still to be done; the next in turn does them.
                    left = [r for r in taken if not r.answer.done() and r.answer is not answer]
                    with self._mutex:
                        self._waiting.extendleft(reversed(left))

    def run(self, rows: Sequence[Row]) -> Float32Array:
        """Return the vectors of rows, float32 [n, d], in their order."""
        answer = self.submit(rows)
        while True:
            self.serve(answer)
            try:
                return answer.result(_PATIENCE)
            except TimeoutError:
                if answer.done():
                    raise

    def _take(self) -> list[_Request]:
        taken: list[_Request] = []
        tokens = 0
        with self._mutex:
            while self._waiting:
                tokens += sum(len(row.ids) for row in self._waiting[0].rows)
                if taken and tokens > self.token_budget:
                    break
                taken.append(self._waiting.popleft())
        return taken

    def _answer(self, requests: list[_Request]) -> None:
        rows = [row for request in requests for row in request.rows]
        try:
            batches = [(batch, self._forward([rows[i] for i in batch])) for batch in self.batches(rows)]
        except Exception as error:
            if len(requests) == 1:
                requests[0].answer.set_exception(error)
                return
            # One caller's trouble is not the others'.
            for request in requests:
                self._answer([request])
            return
        vectors = np.empty((len(rows), batches[0][1].shape[1]), dtype=np.float32)
        for batch, found in batches:
            vectors[batch] = found
        end = 0
        for request in requests:
            start, end = end, end + len(request.rows)
            request.answer.set_result(vectors[start:end])
