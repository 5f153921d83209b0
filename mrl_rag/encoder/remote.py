"""What encoders that ask a server share: batches under its limits, several at once, nothing fetched twice."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from mrl_rag.encoder.base import Encoder
from mrl_rag.errors import EncoderClosed, InvalidInput, RemoteEncoderError
from mrl_rag.tasks import TASKS, Task, check_task, check_texts, with_prompt
from mrl_rag.truncation import Float32Array, check_dim, truncate

# A request's bound where tokens can't be counted: some 25,000 tokens of English, 100,000 of the densest script.
MAX_CHARACTERS = 100_000
# How much of a server's own words an error repeats.
_QUOTED = 500


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


class RemoteEncoder(Encoder):
    """A text encoder whose network runs on a server: `OpenAIEncoder` and `NomicEncoder` are two.

    A class below says how texts become requests (`_prepare`) and how one request is sent (`_send`).

    Any number of threads may call one encoder; together they have no more than `concurrency` requests under way.
    A pickled encoder carries its settings, never the key: it reads that from the environment again.

    Args:
        settings: what the subclass was made with, the key left out: what pickling carries.
        model: the model's name, as the server knows it.
        host: the server's name, for errors.
        fingerprint_host: the same where it says which model answers; None for the model's own service.
        full_dim: length of the vectors; None to learn it from the server.
        dims: dimensions the model was trained for; empty if that is not known.
        max_length: longest input in tokens; None if the server alone knows.
        prompts: task -> what is put before a text.
        send_dimensions: have the server cut the vectors.
        concurrency: requests under way at a time.

    Raises:
        InvalidInput: an argument breaks its rule.
    """

    def __init__(
        self,
        *,
        settings: dict[str, Any],
        model: str,
        host: str,
        fingerprint_host: str | None,
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
        self._settings = settings
        self._host = host
        self._fingerprint_host = fingerprint_host
        self._full_dim = full_dim if full_dim is None else check_whole("full_dim", full_dim, 1)
        self._dims = dims
        self._send_dimensions = send_dimensions
        self._fetcher = Fetcher(check_whole("concurrency", concurrency, 1))

    def __getstate__(self) -> dict[str, Any]:
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__init__(**settings)  # type: ignore[misc]

    @property
    def full_dim(self) -> int:
        """Length of the full vector. Where it isn't known, the first read encodes one short text to learn it."""
        if self._full_dim is None:
            self._fetcher.check_open()
            self._full_dim = int(self._send(["a"], "document", None).shape[1])
        return self._full_dim

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions the model was trained for, widest first; only the full one if no others are known."""
        return self._dims or (self.full_dim,)

    @property
    def fingerprint(self) -> str:
        """A short hash of all that is known to change a vector: model, server, prompts, dimension, longest input.

        The server counts by its host name, and only if it isn't the model's own service. The key doesn't count.
        """
        facts = {
            "model": self.model,
            "host": self._fingerprint_host,
            "prompts": self.prompts,
            "full_dim": self.full_dim,
            "max_length": self.max_length,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def encode(
        self, texts: Sequence[str], task: Task = "document", dim: int | None = None, progress: bool = False
    ) -> Float32Array:
        """Encode texts, in the order given.

        After a failure, the answers that did arrive are kept until a call succeeds: the same call made again asks
        only for what is missing.

        Args:
            texts: n strings; an empty list gives an empty array and asks for nothing. Servers refuse the empty
                string, so a single space is sent for it.
            task: "query", "document", "classification" or "clustering": picks the prompt.
            dim: 1 <= dim <= full_dim; None for the full dimension.
            progress: show a bar when standard error is a terminal.

        Returns:
            float32 array of shape [n, dim] whose rows are unit vectors.

        Raises:
            InvalidTexts: `texts` is a bare string, or one of them is not a string.
            InvalidDimension: `dim` is not an integer in range.
            InvalidInput: there is no such task.
            RemoteEncoderError: the server refused, kept failing, or gave an answer that isn't one.
            EncoderClosed: `close` was called.

        Warns:
            UserWarning: texts longer than `max_length` were cut; says how many and by how much. Only where tokens
                can be counted before they are sent.
        """
        prompt = self.prompts[check_task(task)]
        texts = check_texts(texts)
        self._fetcher.check_open()
        dim = self.full_dim if dim is None else check_dim(dim, self.full_dim)
        asked = dim if self._send_dimensions and dim != self.full_dim else None
        requests = self._prepare([with_prompt(text, prompt) for text in texts], task)
        if requests.overruns:
            warnings.warn(
                f"{len(requests.overruns)} of {len(texts)} texts were longer than max_length={self.max_length} tokens "
                f"and were cut, the longest by {max(requests.overruns)} tokens. Split them, or raise max_length.",
                stacklevel=2,
            )
        rows = self._fetcher.fetch(
            requests,
            self.full_dim if asked is None else asked,
            lambda batch: self._send(batch, task, asked),
            f"{task} {asked}",
            progress,
        )
        return truncate(rows if asked is not None else self._finish(rows), dim)

    def close(self) -> None:
        """Wait for requests under way, then close the connections; the encoder can't encode after this."""
        self._fetcher.close()
        self._disconnect()

    @abstractmethod
    def _prepare(self, texts: list[str], task: Task) -> Requests:
        """Turn texts with their prompts into what is sent."""

    @abstractmethod
    def _send(self, inputs: list[str], task: Task, dim: int | None) -> Float32Array:
        """Return the server's vectors, float32 [n, dim], for one batch; `dim` is None for all it has.

        Raises:
            RemoteEncoderError: no good answer came, after all retries.
        """

    @abstractmethod
    def _disconnect(self) -> None:
        """Close the connections."""

    def _finish(self, rows: Float32Array) -> Float32Array:
        """Do to full vectors what comes before the cut."""
        return rows

    def _read_rows(self, vectors: Sequence[Any], inputs: list[str], dim: int | None) -> Float32Array:
        """Return the vectors of an answer as float32 [n, dim], or say what is wrong with them."""
        expected = self._full_dim if dim is None else dim
        try:
            rows = np.array(vectors, dtype=np.float32)
        except (TypeError, ValueError):
            rows = np.empty(0, dtype=np.float32)
        if rows.ndim != 2 or len(rows) != len(inputs) or not rows.size:
            found = f"{len(vectors)} vectors, or some of unequal length,"
            raise RemoteEncoderError(
                f"{self._host} gave {found} for {len(inputs)} texts; one of equal length for each is needed. "
                f"Check that {self.model!r} is an embedding model there."
            )
        if expected is not None and rows.shape[1] != expected:
            remedy = "Leave send_dimensions off." if dim is not None else "Pass that as full_dim, or check the model."
            raise RemoteEncoderError(
                f"{self._host} gave vectors of {rows.shape[1]} numbers for {self.model!r}; {expected} were expected. "
                f"{remedy}"
            )
        if not np.isfinite(rows).all():
            raise RemoteEncoderError(
                f"{self._host} gave a vector with NaN or infinity for {self.model!r}; finite numbers are needed. "
                "Find the text by halves, or run the model at a higher precision."
            )
        return rows


class Fetcher:
    """Sends batches, several at a time, and keeps what came back when one of them fails.

        fetcher = Fetcher(concurrency=4)
        rows = fetcher.fetch(requests, 768, send, "document")  # float32 [n, 768]

    Args:
        concurrency: requests under way at a time, all threads' calls counted together.
    """

    def __init__(self, concurrency: int) -> None:
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="encode")
        self._kept: dict[bytes, Float32Array] = {}
        self._closed = False

    def fetch(
        self,
        requests: Requests,
        width: int,
        send: Callable[[list[str]], Float32Array],
        label: str,
        progress: bool = False,
    ) -> Float32Array:
        """Send every batch and put the answers in order.

        Args:
            requests: the inputs and how they are batched.
            width: length of the vectors.
            send: returns float32 [n, width] for n inputs; runs in a thread of the pool.
            label: what, beside the inputs, changes the answer.
            progress: show a bar when standard error is a terminal.

        Returns:
            float32 array of shape [n, width], a row an input.

        Raises:
            EncoderClosed: `close` was called.
            Exception: whatever `send` raised first. Requests under way are waited for, and what arrived is kept
                for the next call, until one succeeds or another fails.
        """
        from tqdm import tqdm

        self.check_open()
        inputs = requests.inputs
        rows = np.empty((len(inputs), width), dtype=np.float32)
        kept = self._kept
        fetched: dict[bytes, Float32Array] = {}
        waiting: dict[Future[None], tuple[bytes, slice]] = {}

        # Straight into `rows`: an answer that stays in its future is memory held twice.
        def work(place: slice) -> None:
            self.check_open()
            rows[place] = send(inputs[place])

        with tqdm(total=len(inputs), desc="encode", unit="text", disable=None if progress else True) as bar:
            try:
                for place in requests.batches:
                    key = _key(label, inputs[place])
                    if key in kept:
                        rows[place] = kept[key]
                        fetched[key] = rows[place]
                        bar.update(place.stop - place.start)
                    else:
                        waiting[self._pool.submit(work, place)] = (key, place)
                for future in as_completed(waiting):
                    future.result()
                    bar.update(waiting[future][1].stop - waiting[future][1].start)
            except BaseException as error:
                for future in waiting:
                    future.cancel()
                # What is under way is paid for; only an interruption by hand doesn't wait for it.
                if isinstance(error, Exception):
                    wait(waiting)
                arrived = (future for future in waiting if _succeeded(future))
                self._kept = fetched | {waiting[future][0]: rows[waiting[future][1]] for future in arrived}
                if isinstance(error, RuntimeError):
                    self.check_open()  # the pool's own words for it are others
                raise
        self._kept = {}
        return rows

    def check_open(self) -> None:
        """Raise `EncoderClosed` after `close`."""
        if self._closed:
            raise EncoderClosed("this encoder was closed; make a new one.")

    def close(self) -> None:
        """Wait for what is under way; calls that have more to ask for fail with `EncoderClosed`."""
        self._closed = True
        # Not cancel_futures: whoever waits for a future cancelled so is never told (CPython 3.11).
        self._pool.shutdown(wait=True)
        self._kept = {}


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


def read_key(api_key: str | None, variable: str) -> str | None:
    """Return the key given, else the one in the environment, else None.

    Raises:
        InvalidInput: it can't be sent in a header. The message doesn't show it.
    """
    key = api_key or os.environ.get(variable) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidInput(
            f"the API key holds a space, a line break or a sign outside ASCII; a header can't carry that. "
            f"Pass api_key or set {variable} without it."
        )
    return key


def host_of(base_url: str) -> str:
    """Return the host of a server's address.

    Raises:
        InvalidInput: it is no http address.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput(
            f"base_url is {base_url!r}; it must be an address such as 'http://localhost:8000/v1'. Write it in full."
        )
    return parts.hostname


def check_whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return `value` when it is an integer in range.

    Raises:
        InvalidInput: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise InvalidInput(f"{name} is {value!r}; it must be an integer {limits}. Pass one, or leave it out.")
    return value


def failure(host: str, status: int | None, said: str, key: str | None, variable: str) -> RemoteEncoderError:
    """Make the error for a request that failed for good.

    Args:
        host: the server.
        status: its HTTP status; None when no answer came.
        said: the body of its answer, or what went wrong on the way.
        key: the API key, which is struck out wherever the server repeats it.
        variable: the environment variable the key is read from.
    """
    said = _message_in(said)
    if key:
        said = said.replace(key, "[key]")
    happened = f"{host} didn't answer" if status is None else f"{host} answered {status}"
    return RemoteEncoderError(f"{happened}: {said[:_QUOTED].rstrip('. ')}. {_remedy(status, variable)}")


def _remedy(status: int | None, variable: str) -> str:
    if status is None:
        return "Check base_url and the network, then call again: what was fetched is kept."
    if status in (401, 403):
        return f"A key that may use this model is needed: pass api_key or set {variable}."
    if status == 404:
        return "A model and an address the server knows are needed: check model and base_url."
    if status == 429:
        return "Wait, lower concurrency or raise the quota, then call again: what was fetched is kept."
    if status >= 500 or status in (408, 409):
        return "Call again later: what was fetched is kept."
    return "The server takes no such request: check model, dimensions and the texts' length."


def _message_in(body: str) -> str:
    """Find the words in an error's body: `error.message`, `error`, `message` or `detail`, else all of it."""
    try:
        found = json.loads(body)
    except ValueError:
        return body
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)


def _check_prompts(prompts: Mapping[Task, str] | None) -> dict[Task, str]:
    checked: dict[Task, str] = dict.fromkeys(TASKS, "")
    for task, prompt in (prompts or {}).items():
        if not isinstance(prompt, str):
            raise InvalidInput(f"prompts[{task!r}] is {prompt!r}; a prompt is a string, '' for none.")
        checked[check_task(task)] = prompt
    return checked


def _key(label: str, inputs: list[str]) -> bytes:
    return hashlib.blake2b(json.dumps([label, inputs]).encode(), digest_size=16).digest()


def _succeeded(future: Future[None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
