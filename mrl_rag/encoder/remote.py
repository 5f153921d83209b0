"""What encoders that ask a server share: batches under its limits, several at once, nothing fetched twice."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mrl_rag.arguments import check_integer
from mrl_rag.encoder.base import Advance, Encoder, PickledByArguments, ignore_progress
from mrl_rag.encoder.connection import REFUSED, Connection, Reply
from mrl_rag.errors import EncoderClosed, InvalidInput, RemoteEncoderError
from mrl_rag.lifetime import renew_after_fork
from mrl_rag.tasks import TASKS, Task, check_task, with_prompt
from mrl_rag.truncation import Float32Array, truncate

# A request's bound where tokens can't be counted: some 25,000 tokens of English, 100,000 of the densest script.
MAX_CHARACTERS = 100_000
# The rows of a batch, by its place and whether to give up.
Send: TypeAlias = Callable[[slice, threading.Event], Float32Array]


class Requests(NamedTuple):
    """Texts as a server gets them.

    Attributes:
        inputs: n strings, none of them empty.
        batches: which inputs go together, in order.
        overruns: by how many tokens each text that was cut ran over.
    """

    inputs: list[str]
    batches: list[slice]
    overruns: list[int]


class RemoteEncoder(PickledByArguments, Encoder):
    """A text encoder whose network runs on a server: `OpenAIEncoder` and `NomicEncoder` are two.

    A class below says how texts become requests (`_prepare`) and what one request asks (`_ask`).

    Any number of threads may call one encoder; together they have no more than `concurrency` requests under way.
    A pickled encoder carries its settings, never the key: it reads that from the environment again.

    Args:
        model: the model's name, as the server knows it.
        connection: the way to the server.
        server: host, port and path of a server where they say which model answers; None for the model's own service.
        full_dim: length of the vectors; None to learn it from the server.
        dims: dimensions the model was trained for; empty if that is not known.
        max_length: longest input in tokens; None if the server alone knows.
        prompts: task -> what is put before a text.
        send_dimensions: have the server cut the vectors.
        concurrency: requests under way at a time.

    Raises:
        InvalidInput: an argument breaks its rule.
    """

    max_length: int | None = None

    def __init__(
        self,
        *,
        model: str,
        connection: Connection,
        server: str | None,
        full_dim: int | None,
        dims: tuple[int, ...],
        max_length: int | None,
        prompts: Mapping[Task, str] | None,
        send_dimensions: bool,
        concurrency: int,
    ) -> None:
        self.model = model
        self.max_length = max_length
        self.prompts = _check_prompts(prompts)
        self._connection = connection
        self._server = server
        self._full_dim = full_dim if full_dim is None else check_integer("full_dim", full_dim, 1)
        self._dims = dims
        self._send_dimensions = send_dimensions
        self._fetcher = Fetcher(check_integer("concurrency", concurrency, 1))
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start with no requests under way, and a connection of this process's own."""
        self._fetcher.renew()
        self._connection.renew()

    @property
    def full_dim(self) -> int:
        """Length of the full vector. Where it isn't known, the first read encodes one short text to learn it."""
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

        The server counts by its host, port and path, and only if it isn't the model's own service. The key doesn't
        count.
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
            f"{task} {asked}",
            stop,
            advance,
        )
        return truncate(rows if asked is not None else self._finish(rows), dim)

    def close(self) -> None:
        """Wait for requests under way, then close the connections; the encoder can't encode after this."""
        self._fetcher.close()
        self._connection.close()

    @abstractmethod
    def _prepare(self, texts: list[str], task: Task) -> Requests:
        """Turn texts with their prompts into what is sent."""

    @abstractmethod
    def _ask(
        self, inputs: list[str], task: Task, dim: int | None, stop: threading.Event
    ) -> tuple[Reply, list[Any] | None]:
        """Return the server's answer for one batch, and the vectors in it, in order; None where it holds none.

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
        """Return the vectors of a batch, float32 [n, dim]; `first` is the number of its first text in the call."""
        reply, vectors = self._ask(inputs, task, dim, stop)
        if vectors is not None:
            return self._read_rows(vectors, inputs, first, dim)
        if reply.status in REFUSED and len(inputs) > 1:
            # Servers don't say which text they refuse, and fewer together may pass.
            half = len(inputs) // 2
            before = self._send(inputs[:half], first, task, dim, stop)
            return np.concatenate([before, self._send(inputs[half:], first + half, task, dim, stop)])
        raise self._connection.failure(reply, _name(first, inputs[0]))

    def _finish(self, rows: Float32Array) -> Float32Array:
        """Do to full vectors what comes before the cut."""
        return rows

    def _read_rows(self, vectors: list[Any], inputs: list[str], first: int, dim: int | None) -> Float32Array:
        """Return the vectors of an answer as float32 [n, dim], or say what is wrong with them."""
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
    """Sends batches, several at a time, and keeps what came back when one of them fails.

        fetcher = Fetcher(concurrency=4)
        rows = fetcher.fetch(requests, 768, send, "document", stop)  # float32 [n, 768]

    One batch is sent in the caller's own thread, more of them in threads that end with the call.

    Args:
        concurrency: requests under way at a time, all threads' calls counted together.
    """

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._kept: dict[bytes, Float32Array] = {}
        self._closed = False
        self.renew()

    def renew(self) -> None:
        """Forget the calls of a parent process, which a child that was forked can't wait for."""
        self._slots = threading.Semaphore(self._concurrency)
        self._calls: set[threading.Event] = set()

    def fetch(
        self, requests: Requests, width: int, send: Send, label: str, stop: threading.Event, advance: Advance
    ) -> Float32Array:
        """Send every batch and put the answers in order.

        Args:
            requests: the inputs and how they are batched.
            width: length of the vectors.
            send: returns float32 [n, width] for a batch; several threads call it.
            label: what, beside the inputs, changes the answer.
            stop: set by the caller to give up, and by this call when it ends; `send` is to heed it.
            advance: called with the number of texts done.

        Returns:
            float32 array of shape [n, width], one row per input.

        Raises:
            EncoderClosed: `close` was called.
            Exception: whatever `send` raised first. Requests under way are waited for, and what arrived is kept
                for the next call, until one succeeds or another fails.
        """
        self.check_open()
        rows = np.empty((len(requests.inputs), width), dtype=np.float32)
        kept, fetched = self._kept, dict[bytes, Float32Array]()
        waiting: deque[tuple[bytes, slice]] = deque()
        for place in requests.batches:
            key = _key(label, requests.inputs[place])
            if key in kept:
                rows[place] = kept[key]
                fetched[key] = rows[place]
            else:
                waiting.append((key, place))
        call = _Call(self._slots, stop, send, rows, waiting, fetched)
        self._calls.add(stop)
        try:
            advance(sum(len(part) for part in fetched.values()))
            call.run(self._concurrency, advance)
        except BaseException as error:
            self._kept = fetched
            if isinstance(error, Exception):
                self.check_open()  # after `close`, whatever else went wrong
            raise
        finally:
            self._calls.discard(stop)
        self._kept = {}
        return rows

    def check_open(self) -> None:
        """Raise `EncoderClosed` after `close`."""
        if self._closed:
            raise EncoderClosed("this encoder was closed; make a new one.")

    def close(self) -> None:
        """Wait for what is under way; calls that have more to ask for fail with `EncoderClosed`."""
        if self._closed:
            return
        self._closed = True
        for stop in tuple(self._calls):
            stop.set()
        for _ in range(self._concurrency):
            self._slots.acquire()
        self._slots.release(self._concurrency)
        self._kept = {}


class _Call(NamedTuple):
    """What the threads of one `Fetcher.fetch` share."""

    slots: threading.Semaphore
    stop: threading.Event
    send: Send
    rows: Float32Array
    waiting: deque[tuple[bytes, slice]]
    fetched: dict[bytes, Float32Array]

    def run(self, concurrency: int, advance: Callable[[float], object]) -> None:
        count = len(self.waiting)
        done: SimpleQueue[int | BaseException] = SimpleQueue()
        # Not a pool, whose threads the interpreter waits for when it ends, a hung server or not.
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
            # What is under way is paid for; only an interruption by hand doesn't wait for it.
            if isinstance(error, Exception):
                for thread in threads:
                    thread.join()
            raise

    def _work(self, done: SimpleQueue[int | BaseException]) -> None:
        while True:
            try:
                key, place = self.waiting.popleft()
            except IndexError:
                return
            try:
                with self.slots:
                    # Straight into `rows`: an answer that waits in a queue is memory held twice.
                    self.rows[place] = self.send(place, self.stop)
            except BaseException as error:
                done.put(error)
                return
            self.fetched[key] = self.rows[place]
            done.put(place.stop - place.start)


def request_batches(costs: Sequence[int], max_inputs: int, max_cost: int) -> Iterator[slice]:
    """Split inputs into batches, in order, each as large as its limits let it be.

    Args:
        costs: n costs, of one input each.
        max_inputs: inputs in a batch, at most.
        max_cost: summed cost of a batch, at most; an input that costs more goes alone.

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


def _check_prompts(prompts: Mapping[Task, str] | None) -> dict[Task, str]:
    checked: dict[Task, str] = dict.fromkeys(TASKS, "")
    for task, prompt in (prompts or {}).items():
        if not isinstance(prompt, str):
            raise InvalidInput(f"prompts[{task!r}] is {prompt!r}; a prompt is a string, '' for none.")
        checked[check_task(task)] = prompt
    return checked


def _name(position: int, text: str) -> str:
    return f"texts[{position}] ({text[:40]!r}{'...' if len(text) > 40 else ''}, {len(text)} characters)"


def _key(label: str, inputs: list[str]) -> bytes:
    return hashlib.blake2b(json.dumps([label, inputs]).encode(), digest_size=16).digest()
