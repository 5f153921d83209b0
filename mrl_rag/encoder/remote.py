"""What encoders that ask a server share: requests within its limits, several at a time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mrl_rag.arguments import check_integer
from mrl_rag.encoder.base import Advance, Encoder, PickledByArguments, ignore_progress
from mrl_rag.encoder.connection import REFUSED, Connection, Reply, server_of
from mrl_rag.errors import EncoderClosed, InvalidInput, RemoteEncoderError
from mrl_rag.lifetime import renew_after_fork
from mrl_rag.tasks import TASKS, Task, merge_prompts, with_prompt
from mrl_rag.truncation import Float32Array, truncate

# Most characters per request where tokens can't be counted: 25,000 tokens of English, 100,000 of the densest script.
MAX_CHARACTERS = 100_000
# Returns the vectors of a batch, given its place and an event that says to give up.
Send: TypeAlias = Callable[[slice, threading.Event], Float32Array]


class Requests(NamedTuple):
    """Texts as a server gets them.

    Attributes:
        inputs: n strings, none of them empty.
        batches: which inputs go together, in order.
        overruns: for each text that was truncated, how many tokens were left out.
    """

    inputs: list[str]
    batches: list[slice]
    overruns: list[int]


class RemoteEncoder(PickledByArguments, Encoder):
    """Base of the encoders whose network runs on a server: `OpenAIEncoder` and `NomicEncoder`.

    A subclass turns texts into requests (`_prepare`) and sends one (`_ask`). Nothing is kept after a failure: wrap the
    encoder in a `CachedEncoder` to fetch only what is missing when a call is made again.

    Args:
        model: the model's name, as the server knows it.
        base_url: the server's address.
        home: the address of the model's own service; another server is part of the fingerprint.
        key: the API key; None for a server that needs none.
        variable: the environment variable of the key.
        extra: the extra of this distribution that brings httpx.
        dims: dimensions the model was trained for, widest first; empty if not known.
        settings: the other arguments, as for `OpenAIEncoder`: full_dim, send_dimensions, max_length (None if only the
            server knows), prompts, concurrency, max_retries, timeout; and headers.
    """

    max_length: int | None = None

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        home: str,
        key: str | None,
        variable: str,
        extra: str,
        dims: tuple[int, ...],
        **settings: Any,
    ) -> None:
        full_dim, self._send_dimensions = settings["full_dim"], settings["send_dimensions"]
        if self._send_dimensions and len(dims) == 1:
            raise InvalidInput(
                f"send_dimensions is on, and {model!r} has one dimension; the server would refuse. "
                "Leave it off: the vectors are then truncated here."
            )
        self.model = model
        self.max_length = settings["max_length"]
        self.prompts = merge_prompts(dict.fromkeys(TASKS, ""), settings["prompts"])
        self._dims = dims
        self._full_dim = check_integer("full_dim", full_dim, 1) if full_dim is not None else next(iter(dims), None)
        self._server = None if server_of(base_url) == server_of(home) else server_of(base_url)
        self._connection = Connection(
            base_url,
            key,
            variable,
            extra=extra,
            headers=settings.get("headers"),
            timeout=settings["timeout"],
            max_retries=check_integer("max_retries", settings["max_retries"], 0),
        )
        self._fetcher = Fetcher(check_integer("concurrency", settings["concurrency"], 1))
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, full_dim={self._full_dim}, server={self._connection.host!r})"

    def after_fork(self) -> None:
        """Forget the parent's requests, and open a new connection."""
        self._fetcher.reset()
        self._connection.reset()

    @property
    def full_dim(self) -> int:
        """Length of the full vector. Where it isn't known, the first read asks the server to encode one short text."""
        if self._full_dim is None:
            self._learn_full_dim(threading.Event())
        assert self._full_dim is not None
        return self._full_dim

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions the model was trained for, widest first; only the full one if no others are known."""
        return self._dims or (self.full_dim,)

    @property
    def fingerprint(self) -> str:
        """A short hash of all that is known to change a vector: model, server, prompts, dimension, longest input.

        A server other than the model's own service is part of it by host, port and path; the key is not.
        """
        facts = {
            "model": self.model,
            "server": self._server,
            "prompts": self.prompts,
            "full_dim": self.full_dim,
            "max_length": self.max_length,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    async def aencode(self, texts: Sequence[str], task: Task = "document", dim: int | None = None) -> Float32Array:
        """Encode texts without blocking the event loop; as `encode`. Cancelled, it sends no further request."""
        stop = threading.Event()

        def encode() -> Float32Array:
            if self._full_dim is None:
                self._learn_full_dim(stop)
            checked, known, length = self._check(texts, task, dim)
            return self._fetch(checked, known, length, ignore_progress, stop)

        try:
            return await asyncio.to_thread(encode)
        finally:
            stop.set()

    def _encode(self, texts: list[str], task: Task, dim: int, advance: Advance) -> Float32Array:
        return self._fetch(texts, task, dim, advance, threading.Event())

    def _check_open(self) -> None:
        self._fetcher.check_open()

    def _fetch(self, texts: list[str], task: Task, dim: int, advance: Advance, stop: threading.Event) -> Float32Array:
        asked = dim if self._send_dimensions and dim != self.full_dim else None
        requests = self._prepare([with_prompt(text, self.prompts[task]) for text in texts], task)
        if requests.overruns:
            warnings.warn(
                f"{len(requests.overruns)} of {len(texts)} texts were longer than max_length={self.max_length} tokens "
                f"and were cut, the longest by {max(requests.overruns)} tokens. Split them, or raise max_length.",
                stacklevel=5,
            )
        rows = self._fetcher.fetch(
            requests,
            self.full_dim if asked is None else asked,
            lambda place, stop: self._send(requests.inputs[place], place.start, task, asked, stop),
            stop,
            advance,
        )
        return truncate(rows if asked is not None else self._finish(rows), dim)

    def close(self) -> None:
        """Wait for requests under way, then close the connections; it can't encode after this."""
        self._fetcher.close()
        self._connection.close()

    @abstractmethod
    def _prepare(self, texts: list[str], task: Task) -> Requests:
        """Turn texts with their prompts into what is sent."""

    @abstractmethod
    def _ask(
        self, inputs: list[str], task: Task, dim: int | None, stop: threading.Event
    ) -> tuple[Reply, list[Any] | None]:
        """Return the server's answer for one batch and the vectors in it, in order; None where it has none.

        Args:
            inputs: the batch.
            task: what the texts are for.
            dim: length of the vectors; None for all the server has.
            stop: once it is set, nothing more is sent.
        """

    def _learn_full_dim(self, stop: threading.Event) -> None:
        self._fetcher.check_open()
        reply, vectors = self._ask(["a"], "document", None, stop)
        if vectors is None:
            raise self._connection.failure(reply, "")
        self._full_dim = self._read_rows(vectors, ["a"], 0, None).shape[1]

    def _send(self, inputs: list[str], first: int, task: Task, dim: int | None, stop: threading.Event) -> Float32Array:
        """Return the vectors of a batch, float32 [n, dim]; `first` is the position of its first text in the call."""
        reply, vectors = self._ask(inputs, task, dim, stop)
        if vectors is not None:
            return self._read_rows(vectors, inputs, first, dim)
        if reply.status in REFUSED and len(inputs) > 1:
            # Servers don't say which text they refuse, and fewer in one request may pass.
            half = len(inputs) // 2
            before = self._send(inputs[:half], first, task, dim, stop)
            return np.concatenate([before, self._send(inputs[half:], first + half, task, dim, stop)])
        raise self._connection.failure(reply, _name(first, inputs[0]))

    def _finish(self, rows: Float32Array) -> Float32Array:
        """Return full vectors after what the model does before truncation: nothing, unless overridden."""
        return rows

    def _read_rows(self, vectors: list[Any], inputs: list[str], first: int, dim: int | None) -> Float32Array:
        """Return the vectors of an answer as float32 [n, dim], or raise `RemoteEncoderError`."""
        expected = self._full_dim if dim is None else dim
        host = self._connection.host
        try:
            rows = np.array(vectors, dtype=np.float32)
        except (TypeError, ValueError):
            rows = np.empty(0, dtype=np.float32)
        if rows.ndim != 2 or len(rows) != len(inputs) or not rows.size:
            found = f"{len(vectors)} vectors, or some of unequal length,"
            raise RemoteEncoderError(
                f"{host} gave {found} for {len(inputs)} texts; one of equal length for each is needed. "
                f"Check that {self.model!r} is an embedding model there."
            )
        if expected is not None and rows.shape[1] != expected:
            remedy = "Leave send_dimensions off." if dim is not None else "Pass that as full_dim, or check the model."
            raise RemoteEncoderError(
                f"{host} gave vectors of {rows.shape[1]} numbers for {self.model!r}; {expected} were expected. {remedy}"
            )
        for wrong, bad, remedy in (
            ("with NaN or infinity", ~np.isfinite(rows).all(axis=1), "Run the model at a higher precision"),
            ("of nothing but zeros", ~rows.any(axis=1), "Look for its cause in the server's log"),
        ):
            if bad.any():
                position = int(bad.argmax())
                raise RemoteEncoderError(
                    f"{host} gave a vector {wrong} for {_name(first + position, inputs[position])}, by {self.model!r}: "
                    f"no text can be found by it. {remedy}, or leave the text out."
                )
        return rows


class Fetcher:
    """Sends batches, several at a time.

        fetcher = Fetcher(concurrency=4)
        vectors = fetcher.fetch(requests, 768, send, stop, advance)  # float32 [n, 768]

    A single batch is sent in the caller's thread, several in threads that end with the call.

    Args:
        concurrency: requests under way at a time, counted over the calls of all threads.
    """

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Forget all calls: in a forked child, those of the parent's threads, which don't exist here."""
        self._slots = threading.Semaphore(self._concurrency)
        self._calls: set[threading.Event] = set()

    def fetch(
        self, requests: Requests, width: int, send: Send, stop: threading.Event, advance: Advance
    ) -> Float32Array:
        """Send every batch and put the answers in order.

        Args:
            requests: the inputs and how they are batched.
            width: length of the vectors.
            send: returns float32 [n, width] for a batch; several threads call it.
            stop: set by the caller to give up, and by this call when it fails; `send` must end soon after.
            advance: called with the number of texts done.

        Returns:
            float32 array of shape [n, width], one row per input.

        Raises:
            EncoderClosed: `close` was called.
            Exception: what `send` raised first, after all requests under way have ended.
        """
        self.check_open()
        rows = np.empty((len(requests.inputs), width), dtype=np.float32)
        self._calls.add(stop)
        try:
            _Call(self._slots, stop, send, rows, deque(requests.batches)).run(self._concurrency, advance)
        except Exception:
            self.check_open()  # after `close`, that is the reason, whatever else went wrong
            raise
        finally:
            self._calls.discard(stop)
        return rows

    def check_open(self) -> None:
        """Raise `EncoderClosed` after `close`."""
        if self._closed:
            raise EncoderClosed("this encoder was closed; make a new one.")

    def close(self) -> None:
        """Wait for requests under way; calls that have more to send fail with `EncoderClosed`."""
        if self._closed:
            return
        self._closed = True
        for stop in tuple(self._calls):
            stop.set()
        for _ in range(self._concurrency):
            self._slots.acquire()
        self._slots.release(self._concurrency)


class _Call(NamedTuple):
    """What the threads of one `Fetcher.fetch` share."""

    slots: threading.Semaphore
    stop: threading.Event
    send: Send
    rows: Float32Array
    waiting: deque[slice]

    def run(self, concurrency: int, advance: Advance) -> None:
        count = len(self.waiting)
        done: SimpleQueue[int | BaseException] = SimpleQueue()
        # Not an executor: when the interpreter ends, it would wait for threads whose server hangs.
        threads = [
            threading.Thread(target=self._work, args=(done,), name="mrl_rag-request", daemon=True)
            for _ in range(min(count, concurrency) if count > 1 else 0)
        ]
        try:
            for thread in threads:
                thread.start()
            if not threads:
                self._work(done)
            for _ in range(count):
                found = done.get()
                if isinstance(found, BaseException):
                    raise found
                advance(found)
        except BaseException as error:
            self.stop.set()
            # No request outlives the call; only Ctrl-C doesn't wait for them.
            if isinstance(error, Exception):
                for thread in threads:
                    thread.join()
            raise

    def _work(self, done: SimpleQueue[int | BaseException]) -> None:
        while True:
            try:
                place = self.waiting.popleft()
            except IndexError:
                return
            try:
                with self.slots:
                    # Written to `rows` here: answers that wait in a queue would be held twice.
                    self.rows[place] = self.send(place, self.stop)
            except BaseException as error:
                done.put(error)
                return
            done.put(place.stop - place.start)


def request_batches(costs: Sequence[int], max_inputs: int, max_cost: int) -> Iterator[slice]:
    """Split inputs into batches, in order, each as large as the limits allow.

    Args:
        costs: the cost of each of n inputs.
        max_inputs: most inputs per batch.
        max_cost: highest cost of a batch; an input that costs more is a batch of its own.

    Yields:
        Slices that together cover 0 to n.
    """
    start = total = 0
    for position, cost in enumerate(costs):
        if position > start and (position - start == max_inputs or total + cost > max_cost):
            yield slice(start, position)
            start, total = position, 0
        total += cost
    if start < len(costs):
        yield slice(start, len(costs))


def _name(position: int, text: str) -> str:
    return f"texts[{position}] ({text[:40]!r}{'...' if len(text) > 40 else ''}, {len(text)} characters)"
