"""`MatryoshkaEncoder`: texts to vectors, on this machine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from mrl_rag.encoder.base import CHUNK_SIZE, Advance, Encoder, PickledByArguments, ignore_progress
from mrl_rag.encoder.batching import TokenSequence
from mrl_rag.encoder.dynamic_batching import DynamicBatcher
from mrl_rag.encoder.loading import Stamp, find_model
from mrl_rag.encoder.settings import (
    Backend,
    Device,
    as_devices,
    as_dtype,
    check_backend,
    check_head,
    check_keep_alive,
    check_long_inputs,
    check_present,
    pick_dim,
    pick_dtype,
    pick_max_length,
    warn_of_differences,
)
from mrl_rag.encoder.suitability import dim_warning, language_warning
from mrl_rag.encoder.tokenizing import LongInputs, Tokenized, Tokenizer
from mrl_rag.encoder.unloading import UnloadableNetwork
from mrl_rag.errors import EncoderClosed, InvalidInput
from mrl_rag.heads import MatryoshkaHead
from mrl_rag.heads.head import AnyHead
from mrl_rag.lifetime import leave_to_parent, renew_after_fork
from mrl_rag.tasks import Task, check_task, check_texts, merge_prompts
from mrl_rag.truncation import Float32Array, layer_norm, normalize, truncate

if TYPE_CHECKING:
    import torch

    from mrl_rag.encoder.network import Network
    from mrl_rag.encoder.workers import Workers

# Tokens per forward pass, padding counted. On a CPU, a batch that outgrows the caches is no faster.
_TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}
# `aencode` tokenizes up to this many texts on the event loop, which takes less time than handing them to a thread.
_MAX_INLINE_TEXTS = 16


class Truncation(NamedTuple):
    """How much of its texts a call truncated.

    Attributes:
        texts: how many texts were longer than `max_length`.
        tokens: how many tokens the longest of them lost; an estimate if it has more than 100 characters per token of
            `max_length`.
    """

    texts: int
    tokens: int


class MatryoshkaEncoder(PickledByArguments, Encoder):
    """A text encoder on this machine, whose vectors can be cut to any length.

        encoder = MatryoshkaEncoder()                          # the default model, offline once installed
        encoder = MatryoshkaEncoder("./my-model")              # a folder in the sentence-transformers layout
        encoder = MatryoshkaEncoder("org/name", device="cuda") # a hub id, on a GPU
        encoder.encode_documents(["a text"])                   # float32 [1, full_dim], unit rows
        encoder.encode_queries(["a question"], dim=64)         # float32 [1, 64], unit rows

    Any number of threads and coroutines may call one encoder. Forward passes run one at a time, and calls that wait
    at the same time share one. A pickled encoder carries its arguments, not its weights, and loads the model again.
    In a forked process it goes on with one torch thread; one on a GPU or on several devices raises `EncoderClosed`.

    Args:
        model: a short name (docs/models.md), a local folder, or a hub id; a folder is preferred to a hub id.
        device: a torch device; None takes a GPU when there is one. Of several, `["cuda:0", "cuda:1"]`, each gets a
            process with its own copy of the weights, and batches go to whichever is free. A script that does this
            must start its work under `if __name__ == "__main__":`, as with any spawned process.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype; None takes bfloat16 where the
            hardware runs it fast (a GPU that supports it, a CPU with AMX or AVX512-BF16), else float32.
        max_length: longest input in tokens, special tokens counted; None for the model's own. Of a text that is to be
            truncated, the first 100 characters per token are read, however long it is.
        prompts: task -> prompt; overrides the model's own, which are the prompts "query", "document",
            "classification" and "clustering" in its files.
        head: a learned linear map, applied to the full vector of a text before it is cut, as `vector @ head`: a
            `MatryoshkaHead`, the file of one, or a float array [full_dim, full_dim].
        revision: branch, tag or commit on the hub.
        trust_remote_code: let the model's folder run code of its own.
        local_files_only: never ask the hub; None for what the environment says (`HF_HUB_OFFLINE`).
        long_inputs: what is done with a text longer than `max_length`: "truncate" it, with a warning; "average" the
            unit vectors of pieces of about equal length, each with the prompt, weighted by their tokens (OpenAI's
            cookbook, "Embedding texts that are longer than the model's maximum context length"); or raise an "error".
        backend: what encodes a short text alone, such as a question: "torch", the default, or on a CPU "openvino"
            (extra `openvino`), which loads a second or two longer and answers faster. Many texts go through torch
            either way. Not every architecture can be converted.
        pickled_weights: fetch and load `pytorch_model.bin` where a model has no `model.safetensors`, by `torch.load`
            with `weights_only=True`, which runs no code from the file.
        dim: length of the vectors where a call names none, 1 <= dim <= full_dim; None for the full dimension. It
            is not part of the fingerprint, as it changes no full vector. An index needs full vectors: fill one with
            `encode_documents(texts, dim=encoder.full_dim)`, as `TwoStageRetriever` does; it shortens them itself.
        truncate_dim: another name for `dim`, as in sentence-transformers.
        keep_alive: seconds without a call after which the model is unloaded from the device, to make room for others;
            the next call loads it again, from the same files. None keeps it loaded. Nothing else changes: the vectors
            are the same bit for bit.

    Attributes:
        full_dim: length of the whole vector; the `truncate_dim` in the model's files, where they have one.
        dim: length of the vectors where a call names none.
        dims: dimensions the model was trained for, widest first.
        max_length: longest input in tokens, special tokens counted.
        prompts: task -> text put before the input.
        device: the torch device it is on, the first of several.
        dtype: the torch dtype of the network.

    Raises:
        UnknownModel: no such short name or folder, and the hub doesn't have it; or its files are not on this machine.
        ModelFilesError: the files of the model or of the head are missing or damaged, or need something this encoder
            lacks.
        HeadMismatch: the head was fitted on vectors of another model, or of this one with other prompts or another
            maximum length.
        InvalidInput: another argument is out of range or not one of those named above.
        EncoderOutOfMemory: while encoding, where one text alone does not fit the device's memory.
        EncoderClosed: while encoding, after `close`, after a device's process died, or in a fork (see above).

    Warns:
        UserWarning: once, where the authors compare vectors in a way that ranks differently from cosine, or give a
            prompt for passages under another name than "document"; where vectors are cut to a dimension below those
            that the model was trained for; where an English model is given text in another script (French, say, can't
            be told from English). And for every call that truncates texts: how many, and by how much.
    """

    # Set by `__init__`.
    full_dim = 0
    dims: tuple[int, ...] = ()
    max_length = 0

    def __init__(
        self,
        model: str | Path = "minilm",
        *,
        device: Device | Sequence[Device] | None = None,
        dtype: str | torch.dtype | None = None,
        max_length: int | None = None,
        prompts: Mapping[Task, str] | None = None,
        head: AnyHead | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool | None = None,
        long_inputs: LongInputs = "truncate",
        backend: Backend | None = None,
        pickled_weights: bool = False,
        dim: int | None = None,
        truncate_dim: int | None = None,
        keep_alive: float | None = None,
    ) -> None:
        keep_alive = check_keep_alive(keep_alive)
        devices = as_devices(device)
        backend = check_backend(backend, devices)
        check_present(devices)
        head = None if head is None else MatryoshkaHead.of(head)
        self.model = str(model)
        self.device = devices[0]
        self.long_inputs = check_long_inputs(long_inputs)
        self._max_concurrency = len(devices)
        self._files = find_model(
            model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
            pickled_weights=pickled_weights,
        )
        self._backend = backend
        self._picks_dtype = dtype is None
        self.dtype = as_dtype(dtype) if dtype is not None else pick_dtype(self.device)
        recipe, spec = self._files.recipe, self._files.spec
        self.prompts = merge_prompts(recipe.prompts, prompts)
        warn_of_differences(self.model, self._files, self.prompts, prompts)
        tokenizer = self._files.load_tokenizer()
        self._tokenizer = Tokenizer(self.model, tokenizer, recipe, self.prompts, self.long_inputs)
        self._stamp = self._files.stamp()
        self._vocab_files = list(tokenizer.vocab_files_names.values())
        self._held = UnloadableNetwork(self._loader(devices, self.dtype), keep_alive)
        self._width = self._held.full_dim
        self.full_dim = min(self._width, recipe.truncate_dim or self._width)
        self.dims = spec.dims if spec else (self.full_dim,)
        try:
            self._head = check_head(head, self.full_dim)
            self._dim = pick_dim(dim, truncate_dim, self.full_dim)
            self.max_length = pick_max_length(max_length, self._files, tokenizer, self._held.positions)
            if head is not None and head.card is not None and head.card.fingerprint:
                head.check_encoder(self.model, self._headless_fingerprint)
        except InvalidInput:
            self._held.close()
            raise
        self._tokenizer.truncate_at(self.max_length)
        self._batcher = DynamicBatcher(
            self._held.run,
            _token_budget(self.device),
            padded=not self._held.packs,
            max_concurrency=self._max_concurrency,
        )
        self._threads = self._make_threads()
        self._last = threading.local()
        # Warnings that were not given yet. With a head, the dimensions of the table say nothing.
        self._unwarned = {"language", "dim"} if head is None else {"language"}
        self._closed = False
        self._refusal = "this encoder was closed; make a new MatryoshkaEncoder."
        renew_after_fork(self)

    def __repr__(self) -> str:
        dim = f", dim={self.dim}" if self.dim != self.full_dim else ""
        device = f"{self._max_concurrency} devices" if self._max_concurrency > 1 else str(self.device)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"MatryoshkaEncoder({self.model!r}, full_dim={self.full_dim}{dim}, device={device!r}, dtype={dtype!r})"

    def after_fork(self) -> None:
        """Forget the parent's callers; on anything but one CPU, refuse to encode from here on."""
        self._batcher.reset()
        self._threads = self._make_threads()
        if self._max_concurrency == 1 and self.device.type == "cpu":
            self._held.after_fork()
        else:
            leave_to_parent(self._held)
            self._closed = True
            held = "its workers" if self._max_concurrency > 1 else f"a network on {self.device}"
            self._refusal = (
                f"this encoder was made before the process was forked, and {held} can't be used on both sides of that. "
                "Make it after the fork, or start the process by multiprocessing's 'spawn'."
            )

    def _loader(self, devices: list[torch.device], dtype: torch.dtype) -> Callable[[], Network | Workers]:
        """Return a function that opens the network, without a reference to this encoder."""
        settings: dict[str, Any] = {
            "files": replace(self._files, spec=None),  # the row can't be pickled
            "dtype": dtype,
            "pad_id": self._tokenizer.pad_id,
            "sample": self._tokenizer.sample,
            "backend": self._backend,
        }
        return partial(_open_network, devices, settings, self._stamp)

    def _make_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._max_concurrency, thread_name_prefix="mrl_rag-encoder")

    @property
    def _network(self) -> Network | Workers | None:
        return self._held.network

    @property
    def loaded(self) -> bool:
        """Whether the model is on its device. With `keep_alive`, it isn't after that time without a call."""
        return self._network is not None

    def to(self, device: Device) -> Self:
        """Load the model on another device, and unload it from this one, as `torch.nn.Module.to`.

            encoder.to("cpu")    # makes room on the GPU
            encoder.to("cuda")

        Calls that are running end on the old device; threads may go on calling. Vectors differ by rounding. A dtype
        that was chosen for the old device is chosen anew.

        Args:
            device: a torch device.

        Returns:
            The encoder itself.

        Raises:
            InvalidInput: torch doesn't know or find the device, `backend` doesn't run there, or this encoder is on
                several devices.
            EncoderClosed: `close` was called.
            ModelFilesError: the model's files are gone, or were changed since the encoder was made.
        """
        self._check_open()
        if self._max_concurrency > 1:
            raise InvalidInput(
                f"this encoder is on {self._max_concurrency} devices, with a process for each, and can't be moved. "
                f"Close it, and make a new one with device={str(device)!r}."
            )
        devices = as_devices(device)[:1]
        check_backend(self._backend, devices)
        check_present(devices)
        if devices[0] != self.device:
            dtype = pick_dtype(devices[0]) if self._picks_dtype else self.dtype
            self._held.replace(self._loader(devices, dtype))
            self._batcher.set_budget(_token_budget(devices[0]), padded=not self._held.packs)
            self.device, self.dtype = devices[0], dtype
            args, settings = self._arguments
            self._arguments = args, {**settings, "device": devices[0]}
        return self

    @property
    def dim(self) -> int:
        """Length of the vectors where a call names none: the `dim` it was made with, else the full dimension."""
        return self._dim

    @property
    def last_truncation(self) -> Truncation:
        """How many texts the calling thread's latest call truncated, and how many tokens the longest lost."""
        found: Truncation = getattr(self._last, "truncation", Truncation(0, 0))
        return found

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        """Return where each token of `text` starts and ends, for splitting long texts.

        Args:
            text: any string; it is not truncated.

        Returns:
            One (start, end) pair of character positions per token, special tokens left out.

        Raises:
            InvalidInput: the tokenizer is one in Python, which doesn't know.
        """
        return self._tokenizer.offsets(text)

    def count_tokens(self, texts: Sequence[str], task: Task = "document") -> list[int]:
        """Return how many tokens each text has, as in `Encoder.count_tokens`."""
        return self._tokenizer.count(check_texts(texts), check_task(task))

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of all that changes a vector: weights, tokenizer, recipe, prompts, head, the model's code.

        The first read hashes the weights, which takes about a second per gigabyte.
        """
        found = self._headless_fingerprint
        return found if self._head is None else self._head.fingerprint_with(found)

    @cached_property
    def _headless_fingerprint(self) -> str:
        recipe = asdict(self._files.recipe)
        # Their effective values are hashed below, or they change nothing.
        for key in ("prompts", "passage_prompt", "max_length", "similarity"):
            del recipe[key]
        facts: dict[str, Any] = {
            **self._files.hashes(self._vocab_files),
            "recipe": recipe,
            "layer_norm": self._layer_norm,
            "prompts": self.prompts,
            "max_length": self.max_length,
            "long_inputs": self.long_inputs == "average",
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    async def aencode(self, texts: Sequence[str], task: Task = "document", dim: int | None = None) -> Float32Array:
        """Encode texts without blocking the event loop; as `encode`.

        Small calls that are awaited at the same time share a forward pass, without a thread each.
        """
        texts, task, dim = self._check(texts, task, dim)
        if len(texts) > _MAX_INLINE_TEXTS:
            return await asyncio.to_thread(self._encode, texts, task, dim, ignore_progress)
        tokenized = self._tokenizer.tokenize(texts, task)
        vectors = np.empty((0, self._width), dtype=np.float32)
        if tokenized.sequences:
            answer = self._batcher.submit(tokenized.sequences)
            serving = asyncio.get_running_loop().run_in_executor(self._threads, self._batcher.serve, answer)
            vectors = await asyncio.wrap_future(answer)
            await serving
        self._report(tokenized.overruns, len(texts))
        return truncate(self._finish(vectors, tokenized, len(texts)), dim)

    def close(self) -> None:
        """Free the network's memory, end the processes of several devices; the encoder can't encode after this."""
        if not self._closed:
            self._closed = True
            self._threads.shutdown(wait=False)
            self._held.close()

    @property
    def _layer_norm(self) -> bool:
        return self._files.spec is not None and self._files.spec.layer_norm

    def _check_open(self) -> None:
        if self._closed:
            raise EncoderClosed(self._refusal)

    def _check(self, texts: Iterable[str], task: Task, dim: int | None) -> tuple[list[str], Task, int]:
        checked, task, dim = super()._check(texts, task, dim)
        self._warn_once(checked, dim)
        return checked, task, dim

    def _warn_once(self, texts: Sequence[str], dim: int) -> None:
        """Warn once of a dimension, and once of a script, that the model wasn't trained for."""
        spec = self._files.spec
        if not self._unwarned or spec is None:
            return
        found = {"dim": "dim" in self._unwarned and dim_warning(spec, dim)}
        found["language"] = "language" in self._unwarned and language_warning(spec, texts)
        for kind, message in found.items():
            if message:
                self._unwarned.discard(kind)
                warnings.warn(message, stacklevel=4)

    def _encode(self, texts: list[str], task: Task, dim: int, advance: Advance) -> Float32Array:
        found = np.empty((len(texts), dim), dtype=np.float32)
        overruns: list[int] = []
        chunks = (texts[start : start + CHUNK_SIZE] for start in range(0, len(texts), CHUNK_SIZE))
        for start, (chunk, vectors) in zip(count(0, CHUNK_SIZE), self._full_vectors(chunks, task, overruns, advance)):
            found[start : start + len(chunk)] = truncate(vectors, dim)
        self._report(overruns, len(texts))
        return found

    def _encode_chunks(
        self, chunks: Iterator[list[str]], task: Task, dim: int
    ) -> Iterator[tuple[list[str], Float32Array]]:
        overruns: list[int] = []
        total = 0
        for chunk, vectors in self._full_vectors(chunks, task, overruns):
            self._warn_once(chunk, dim)
            total += len(chunk)
            yield chunk, truncate(vectors, dim)
        self._report(overruns, total)

    def _full_vectors(
        self, chunks: Iterator[list[str]], task: Task, overruns: list[int], advance: Advance = ignore_progress
    ) -> Iterator[tuple[list[str], Float32Array]]:
        """Yield chunks with their full vectors, and add to `overruns`; the next chunk is tokenized meanwhile."""
        first = 0
        chunk = next(chunks, None)
        tokenized = self._tokenizer.tokenize(chunk or [], task)
        thread: ThreadPoolExecutor | None = None
        try:
            while chunk:
                first += len(chunk)
                following = next(chunks, None)
                if following:
                    thread = thread or ThreadPoolExecutor(1, thread_name_prefix="mrl_rag-tokenizer")
                    upcoming = thread.submit(self._tokenizer.tokenize, following, task, first)
                overruns += tokenized.overruns
                pooled = self._run(tokenized.sequences, len(chunk), advance)
                yield chunk, self._finish(pooled, tokenized, len(chunk))
                chunk = following
                if following:
                    tokenized = upcoming.result()
        finally:
            if thread:
                thread.shutdown(cancel_futures=True)

    def _run(self, sequences: list[TokenSequence], texts: int, advance: Advance) -> Float32Array:
        # Batch by batch, so that a question of another thread needn't wait until a corpus is done.
        batches = list(self._batcher.batches(sequences))
        vectors = np.empty((len(sequences), self._width), dtype=np.float32)

        def run(batch: list[int]) -> None:
            vectors[batch] = self._batcher.run([sequences[i] for i in batch])

        concurrency = min(self._max_concurrency, len(batches))
        with ThreadPoolExecutor(concurrency) if concurrency > 1 else nullcontext() as threads:
            for batch, _ in zip(batches, (threads.map if threads else map)(run, batches), strict=True):
                advance(len(batch) * texts / len(sequences))
        return vectors

    def _report(self, overruns: list[int], texts: int) -> None:
        self._last.truncation = Truncation(len(overruns), max(overruns, default=0))
        if overruns:
            warnings.warn(
                f"{len(overruns)} of {texts} texts were longer than max_length={self.max_length} tokens "
                f"and were cut, the longest by {max(overruns)} tokens. Split them, raise max_length, or make the "
                'encoder with long_inputs="average".',
                stacklevel=5,
            )

    def _finish(self, pooled: Float32Array, tokenized: Tokenized, texts: int) -> Float32Array:
        """Return full vectors, float32 [texts, n], of pooled ones: layer norm, the average of pieces, and the head.

        A text that has no tokens gets zeros.
        """
        if self._layer_norm:
            pooled = layer_norm(pooled)
        if tokenized.text_index != list(range(texts)):
            pooled = self._averaged(pooled, tokenized, texts)
        # The head last: so it makes of an archive's vectors what it makes of the texts.
        return pooled if self._head is None else truncate(pooled, self.full_dim) @ self._head.matrix

    def _averaged(self, pooled: Float32Array, tokenized: Tokenized, texts: int) -> Float32Array:
        if self.long_inputs == "average":
            weights = [len(sequence.ids) - sequence.prompt_length for sequence in tokenized.sequences]
            pooled = normalize(pooled) * np.array(weights, dtype=np.float32)[:, None]
        sums = np.zeros((texts, self._width), dtype=np.float32)
        np.add.at(sums, tokenized.text_index, pooled)
        return sums


def _token_budget(device: torch.device) -> int:
    return _TOKEN_BUDGET.get(device.type, _TOKEN_BUDGET["cpu"])


def _open_network(devices: list[torch.device], settings: dict[str, Any], stamp: Stamp) -> Network | Workers:
    """Load the network, unless its files are others than when `stamp` was made."""
    from mrl_rag.encoder.network import Network
    from mrl_rag.encoder.workers import Workers

    settings["files"].check_stamp(stamp)
    return Network(device=devices[0], **settings) if len(devices) == 1 else Workers(devices, settings)
