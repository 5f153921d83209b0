"""`DynamicBatcher`: small calls that wait at the same time share a forward pass."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from mrl_rag.encoder.batching import TokenSequence, token_batches
from mrl_rag.lifetime import NATIVE_CODE
from mrl_rag.truncation import Float32Array

Forward = Callable[[list[TokenSequence]], Float32Array]

# A request that another thread took comes back to the queue if that thread is interrupted: look for it this often.
_RECHECK_INTERVAL_S = 1.0


class _Request(NamedTuple):
    sequences: Sequence[TokenSequence]
    answer: Future[Float32Array]


class DynamicBatcher:
    """Joins the requests of concurrent callers into batches.

    At most `max_concurrency` callers run the network at a time. Each takes waiting requests in their order, up to the
    token budget, runs them together with its own, and goes on until its own is answered. A caller that finds no one
    else runs at once, in its own thread: nothing waits for a batch to fill.

    Args:
        forward: n sequences -> float32 [n, d]; called by up to `max_concurrency` threads at a time.
        token_budget: most tokens per batch.
        padded: whether padding counts.
        max_concurrency: how many forward passes may run at a time.
    """

    def __init__(self, forward: Forward, token_budget: int, *, padded: bool = True, max_concurrency: int = 1) -> None:
        self._forward = forward
        self.set_budget(token_budget, padded=padded)
        self._max_concurrency = max_concurrency
        self.reset()

    def reset(self) -> None:
        """Forget all requests: in a forked child, those of the parent's threads, which don't exist here."""
        self._slots = threading.Semaphore(self._max_concurrency)
        self._waiting: deque[_Request] = deque()
        self._mutex = threading.Lock()

    def set_budget(self, token_budget: int, *, padded: bool) -> None:
        """Change the most tokens per batch, and whether padding counts, for the batches from here on."""
        self.token_budget = token_budget
        self._padded = padded

    def batches(self, sequences: Sequence[TokenSequence]) -> Iterator[list[int]]:
        """Yield positions into `sequences`, each exactly once, in batches that fit the token budget."""
        return token_batches([len(sequence.ids) for sequence in sequences], self.token_budget, padded=self._padded)

    def submit(self, sequences: Sequence[TokenSequence]) -> Future[Float32Array]:
        """Queue a request; any thread must call `serve` after that.

        Args:
            sequences: n token sequences, at least one.

        Returns:
            A future of float32 [n, d].
        """
        request = _Request(sequences, Future())
        # From here on it can't be cancelled: setting the result of a cancelled future would raise in the thread that
        # answers.
        request.answer.set_running_or_notify_cancel()
        with self._mutex:
            self._waiting.append(request)
        return request.answer

    def serve(self, answer: Future[Float32Array]) -> None:
        """Wait for a slot, then answer waiting requests until `answer` is done or another thread has taken it."""
        with self._slots:
            while not answer.done():
                taken = self._take()
                if not taken:
                    return
                try:
                    # To the end of this: torch still owns the arrays that the network returned.
                    with NATIVE_CODE:
                        self._answer(taken)
                finally:
                    # After an interruption (Ctrl-C), the other callers' requests are put back for the next thread.
                    left = [r for r in taken if not r.answer.done() and r.answer is not answer]
                    with self._mutex:
                        self._waiting.extendleft(reversed(left))

    def run(self, sequences: Sequence[TokenSequence]) -> Float32Array:
        """Return the vectors of sequences, float32 [n, d], in their order."""
        answer = self.submit(sequences)
        while True:
            self.serve(answer)
            try:
                return answer.result(_RECHECK_INTERVAL_S)
            except TimeoutError:
                if answer.done():
                    raise

    def _take(self) -> list[_Request]:
        taken: list[_Request] = []
        tokens = 0
        with self._mutex:
            while self._waiting:
                tokens += sum(len(sequence.ids) for sequence in self._waiting[0].sequences)
                if taken and tokens > self.token_budget:
                    break
                taken.append(self._waiting.popleft())
        return taken

    def _answer(self, requests: list[_Request]) -> None:
        sequences = [sequence for request in requests for sequence in request.sequences]
        try:
            batches = [(batch, self._forward([sequences[i] for i in batch])) for batch in self.batches(sequences)]
        except Exception as error:
            if len(requests) == 1:
                requests[0].answer.set_exception(error)
                return
            # Retry separately, so that one bad request can't fail the others.
            for request in requests:
                self._answer([request])
            return
        vectors = np.empty((len(sequences), batches[0][1].shape[1]), dtype=np.float32)
        for batch, found in batches:
            vectors[batch] = found
        end = 0
        for request in requests:
            start, end = end, end + len(request.sequences)
            request.answer.set_result(vectors[start:end])
