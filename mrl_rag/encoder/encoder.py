"""Texts in, vectors out: `MatryoshkaEncoder`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from mrl_rag.arguments import is_integer
from mrl_rag.encoder.base import CHUNK_SIZE, Advance, Encoder, PickledByArguments, ignore_progress
from mrl_rag.encoder.batching import Row
from mrl_rag.encoder.loading import (
    Recipe,
    check_weights,
    config_sha256,
    file_sha256,
    find_model,
    load_config,
    load_tokenizer,
    read_recipe,
)
from mrl_rag.encoder.merging import CallMerger
from mrl_rag.encoder.tokenizing import PythonTokenizer, prepare
from mrl_rag.errors import (
    EncoderClosed,
    InvalidDimension,
    InvalidInput,
    InvalidTexts,
    InvalidVectors,
)
from mrl_rag.lifetime import NATIVE_CODE, leave_to_parent, renew_after_fork
from mrl_rag.models import ModelSpec, find_row
from mrl_rag.tasks import Task, check_task, with_prompt
from mrl_rag.truncation import Float32Array, as_rows, check_dim, layer_norm, normalize, truncate

if TYPE_CHECKING:
    import torch

    from mrl_rag.encoder.network import Network
    from mrl_rag.encoder.workers import Workers

# Tokens a forward pass, padding counted. On a CPU a batch past the caches gains nothing.
_TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)
# Texts that `aencode` tokenizes on the event loop: short work. More go to a thread.
_INLINE = 16

Device: TypeAlias = "str | torch.device"
Backend: TypeAlias = Literal["torch", "openvino"]
LongInputs: TypeAlias = Literal["truncate", "average", "error"]


class Cut(NamedTuple):
    """What a call cut off.

    Attributes:
        texts: how many texts were longer than `max_length`.
        tokens: by how many tokens the longest ran over.
    """

    texts: int
    tokens: int


class MatryoshkaEncoder(PickledByArguments, Encoder):
    """A text encoder whose vectors can be cut to any length.

        encoder = MatryoshkaEncoder()                          # the default model, offline once installed
        encoder = MatryoshkaEncoder("./my-model")              # a folder in the sentence-transformers layout
        encoder = MatryoshkaEncoder("org/name", device="cuda") # a hub id, on a GPU
        encoder.encode_documents(["a text"])                   # float32 [1, full_dim], unit rows
        encoder.encode_queries(["a question"], dim=64)         # float32 [1, 64], unit rows

    Any number of threads and coroutines may call one encoder. Forward passes run one at a time, and calls that wait
    for the same turn share one. A pickled encoder carries its settings, not its weights, and loads the model again.
    In a process that is forked it goes on with one thread of torch's; one on a GPU or several devices refuses.

    Args:
        model: a short name of `mrl_rag.models`, a local folder, or a hub id; a folder goes before a hub id.
        device: a torch device; None takes a GPU when there is one. Of several, `["cuda:0", "cuda:1"]`, each gets a
            process of its own with its own copy of the weights, and batches go to whichever is free. A script that
            does this starts its work under `if __name__ == "__main__":`, as with any process it spawns.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype; None takes bfloat16 where the
            hardware runs it fast (a GPU that supports it, a CPU with AMX or AVX512-BF16), else float32.
        max_length: longest input in tokens, special tokens counted; None for the model's own.
        prompts: task -> prompt, over the model's own. Of the prompts in its files "query" and "document" are used, as
            by sentence-transformers' `encode_query` and `encode_document`, and "classification" and "clustering".
        head: a learned linear map, float array [full_dim, full_dim], applied before the cut as
            `vector @ head`.
        revision: branch, tag or commit on the hub.
        trust_remote_code: let the model's folder run code of its own.
        local_files_only: never ask the hub; None for what the environment says (`HF_HUB_OFFLINE`).
        long_inputs: what becomes of a text longer than `max_length`: "truncate" cuts it, with a warning;
            "average" splits it evenly, each piece with the prompt, and averages the pieces' unit vectors weighted by
            their tokens (the recipe of OpenAI's cookbook, "Embedding texts that are longer than the model's maximum
            context length"); "error" refuses it.
        backend: what encodes a short text that comes alone, as a question does: "torch", the default, or on a CPU
            "openvino" (extra `openvino`), which takes a second or two more to load and answers sooner. Many texts go
            through torch either way. Not every architecture can be converted.
        pickled_weights: fetch and load `pytorch_model.bin` where a model has no `model.safetensors`, by `torch.load`
            with `weights_only=True`, which runs no code of the file's.
        dim: length of the vectors where a call names none, 1 <= dim <= full_dim; None for the full dimension. It
            changes no full vector and so not the fingerprint. Indexes hold full vectors: the retrievers and stores of
            this package ask for `full_dim` by name, whatever is set here, and the index cuts for itself.
        truncate_dim: another name for `dim`, as in sentence-transformers.

    Attributes:
        full_dim: length of the whole vector; of a model whose files have a `truncate_dim`, that.
        dim: length of the vectors where a call names none.
        dims: dimensions the model was trained for, widest first.
        max_length: longest input in tokens, special tokens counted.
        prompts: task -> what is put before a text.
        device: the torch device it is on, the first of several.
        dtype: the torch dtype of the network.

    Raises:
        UnknownModel: no such row or folder, and the hub doesn't give it.
        ModelFilesError: the model's files are missing or damaged, or need a step this encoder lacks.
        InvalidInput: another argument breaks its rule.

    Warns:
        UserWarning: the authors compare vectors in a way that ranks otherwise than cosine; or they give a prompt for
            passages under a name that isn't looked up.
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
        head: npt.ArrayLike | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool | None = None,
        long_inputs: LongInputs = "truncate",
        backend: Backend | None = None,
        pickled_weights: bool = False,
        dim: int | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        from mrl_rag.encoder.network import Network
        from mrl_rag.encoder.workers import Workers

        self._pickled_weights, self._trust_remote_code = pickled_weights, trust_remote_code
        self.long_inputs = _check_long_inputs(long_inputs)
        self.model = str(model)
        # A path is a path, even one that is called like a row of the table.
        spec = find_row(model) if isinstance(model, str) else None
        self._folder = find_model(
            self.model,
            spec,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
            pickled_weights=pickled_weights,
        )
        self._recipe = read_recipe(self._folder, spec)
        check_weights(self._folder, self._recipe, pickled_weights=pickled_weights)
        self.prompts = _merge_prompts(self._recipe.prompts, prompts)
        _warn_of_differences(self.model, self._recipe, self.prompts, prompts or {})
        devices = _as_devices(device)
        self.device = devices[0]
        backend = _check_backend(backend, devices)
        _check_present(devices)
        self.dtype = _as_dtype(dtype) if dtype is not None else _pick_dtype(self.device)
        config = load_config(self._folder, self._recipe, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(self._folder, self._recipe, trust_remote_code=trust_remote_code)
        # The Rust tokenizer is configured once, here: changing its truncation a call is what makes
        # tokenizers unsafe to share between threads.
        self._tokenizer: Any = prepare(tokenizer, lower_case=self._recipe.lower_case)
        if self.long_inputs == "average":
            self.token_offsets("")
        self._specials: int = self._tokenizer.num_special_tokens_to_add(False)
        # A token that pads may stand in a text as well.
        samples = self._tokenizer.encode_batch(["a text", f"another one,{tokenizer.pad_token or ''} and longer"])
        # Types stand in a tokenizer's template, so these show whether any is ever other than 0.
        self._typed = "token_type_ids" in tokenizer.model_input_names and any(any(part.type_ids) for part in samples)
        self._tokenizer_files = {*_TOKENIZER_FILES, *tokenizer.vocab_files_names.values()}
        arguments: dict[str, Any] = {
            "folder": self._folder,
            "recipe": self._recipe,
            "dtype": self.dtype,
            "trust_remote_code": trust_remote_code,
            "pad_id": tokenizer.pad_token_id or 0,
            "sample": [self._row(encoding) for encoding in samples],
            "backend": backend,
        }
        network = Network(device=self.device, **arguments) if len(devices) == 1 else Workers(devices, arguments)
        self._network: Network | Workers | None = network
        self._width = network.full_dim
        self.full_dim = min(self._width, self._recipe.truncate_dim or self._width)
        self.dims = spec.dims if spec else (self.full_dim,)
        self._layer_norm = spec is not None and spec.layer_norm
        self._turns = len(devices)
        try:
            self._head = _check_head(head, self._width)
            self._dim = _pick_dim(dim, truncate_dim, self.full_dim)
            self.max_length = _pick_max_length(max_length, self._recipe, spec, tokenizer, config, network.positions)
        except InvalidInput:
            if len(devices) > 1:
                cast("Workers", network).close()
            raise
        self._tokenizer.enable_truncation(max_length=self.max_length, direction=tokenizer.truncation_side)
        self._skips = {task: self._prompt_length(task, tokenizer.all_special_ids) for task in self.prompts}
        budget = _TOKEN_BUDGET.get(self.device.type, _TOKEN_BUDGET["cpu"])
        self._merger = CallMerger(self._forward, budget, padded=not network.packs, turns=self._turns)
        self._owner = self._make_owner()
        self._last = threading.local()
        self._refusal = "this encoder was closed; make a new MatryoshkaEncoder."
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start with no callers; on anything but one CPU, refuse to encode from here on."""
        self._merger.renew()
        self._owner = self._make_owner()
        if self._turns > 1 or self.device.type != "cpu":
            leave_to_parent(self._network)
            self._network = None
            held = "its workers" if self._turns > 1 else f"a network on {self.device}"
            self._refusal = (
                f"this encoder was made before the process was forked, and {held} can't be used on both sides of that. "
                "Make it after the fork, or start the process by multiprocessing's 'spawn'."
            )

    def _make_owner(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._turns, thread_name_prefix="mrl_rag-encoder")

    @property
    def dim(self) -> int:
        """Length of the vectors where a call names none: the `dim` it was made with, else the full dimension."""
        return self._dim

    def _encode(self, texts: list[str], task: Task, dim: int, advance: Advance) -> Float32Array:
        found = np.empty((len(texts), dim), dtype=np.float32)
        cut: list[int] = []
        windows = (texts[start : start + CHUNK_SIZE] for start in range(0, len(texts), CHUNK_SIZE))
        for start, (window, vectors) in zip(count(0, CHUNK_SIZE), self._windows(windows, task, cut, advance)):
            found[start : start + len(window)] = truncate(vectors, dim)
        self._report(cut, len(texts))
        return found

    def _encode_chunks(
        self, chunks: Iterator[list[str]], task: Task, dim: int
    ) -> Iterator[tuple[list[str], Float32Array]]:
        """As `Encoder`'s; a chunk is tokenized while the one before it is encoded."""
        cut: list[int] = []
        total = 0
        for window, vectors in self._windows(chunks, task, cut):
            total += len(window)
            yield window, truncate(vectors, dim)
        self._report(cut, total)

    async def aencode(self, texts: Sequence[str], task: Task = "document", dim: int | None = None) -> Float32Array:
        """Encode texts without blocking the event loop; as `encode`.

        Small calls that are awaited at the same time share a forward pass, without a thread each.
        """
        texts, task, dim = self._check(texts, task, dim)
        if len(texts) > _INLINE:
            return await asyncio.to_thread(self._encode, texts, task, dim, ignore_progress)
        rows, owners, cut = self._tokenize(texts, task, 0)
        vectors = np.empty((0, self._width), dtype=np.float32)
        if rows:
            answer = self._merger.submit(rows)
            serving = asyncio.get_running_loop().run_in_executor(self._owner, self._merger.serve, answer)
            vectors = await asyncio.wrap_future(answer)
            await serving
        self._report(cut, len(texts))
        return truncate(self._finish(vectors, rows, owners, len(texts)), dim)

    @property
    def last_cut(self) -> Cut:
        """How many texts the calling thread's latest call cut, and how far the longest ran over."""
        cut: Cut = getattr(self._last, "cut", Cut(0, 0))
        return cut

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        """Return where each token of `text` starts and ends, for splitting long texts.

        Args:
            text: any string; it is not cut.

        Returns:
            One (start, end) pair of character positions a token, special tokens left out.

        Raises:
            InvalidInput: the tokenizer is one in Python, which doesn't know.
        """
        if isinstance(self._tokenizer, PythonTokenizer):
            raise InvalidInput(
                f"the tokenizer of {self.model} doesn't say where in a text its tokens stand. Split texts by their "
                'characters, and leave out long_inputs="average".'
            )
        with NATIVE_CODE:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [pair for part in (encoding, *encoding.overflowing) for pair in part.offsets]

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of all that changes a vector: weights, tokenizer, recipe, prompts, head, the model's code.

        The first read hashes the weights, about a second a gigabyte.
        """
        network = self._folder / self._recipe.network
        folders = [network, *(self._folder / step.path for step in self._recipe.steps if step.path)]
        pickled = self._pickled_weights
        files = [
            *(file for folder in folders for file in folder.glob("*.safetensors")),
            *(file for folder in folders for file in folder.glob("pytorch_model*.bin") if pickled),
            *(network / name for name in self._tokenizer_files),
            *(network.glob("*.py") if self._trust_remote_code else ()),
        ]
        recipe = asdict(self._recipe)
        # What is in force stands below, or changes nothing.
        for key in ("prompts", "passage_prompt", "max_length", "similarity"):
            del recipe[key]
        facts: dict[str, Any] = {
            "files": {file.relative_to(self._folder).as_posix(): file_sha256(file) for file in files if file.is_file()},
            "config": config_sha256(network),
            "recipe": recipe,
            "layer_norm": self._layer_norm,
            "prompts": self.prompts,
            "max_length": self.max_length,
            "long_inputs": self.long_inputs == "average",
            "head": None if self._head is None else hashlib.sha256(self._head.tobytes()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def close(self) -> None:
        """Free the network's memory, end the processes of several devices; the encoder can't encode after this."""
        import torch

        network, self._network = self._network, None
        self._owner.shutdown(wait=False)
        if self._turns > 1 and network is not None:
            cast("Workers", network).close()
        del network
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_open(self) -> None:
        if self._network is None:
            raise EncoderClosed(self._refusal)

    def _windows(
        self,
        windows: Iterator[list[str]],
        task: Task,
        cut: list[int],
        advance: Advance = ignore_progress,
    ) -> Iterator[tuple[list[str], Float32Array]]:
        """Yield windows with their full vectors, and add to `cut`; the next window is tokenized meanwhile."""
        first = 0
        window = next(windows, None)
        tokenized = self._tokenize(window or [], task, first)
        ahead: ThreadPoolExecutor | None = None
        try:
            while window:
                first += len(window)
                following = next(windows, None)
                if following:
                    ahead = ahead or ThreadPoolExecutor(1, thread_name_prefix="mrl_rag-tokenizer")
                    upcoming = ahead.submit(self._tokenize, following, task, first)
                rows, owners, over = tokenized
                cut += over
                yield window, self._finish(self._run(rows, len(window), advance), rows, owners, len(window))
                window = following
                if following:
                    tokenized = upcoming.result()
        finally:
            if ahead:
                ahead.shutdown(cancel_futures=True)

    def _run(self, rows: list[Row], texts: int, advance: Advance) -> Float32Array:
        # A turn a batch, not one for all: a question needn't wait until a corpus is done.
        batches = list(self._merger.batches(rows))
        vectors = np.empty((len(rows), self._width), dtype=np.float32)

        def run(batch: list[int]) -> None:
            vectors[batch] = self._merger.run([rows[i] for i in batch])

        with ThreadPoolExecutor(self._turns) if min(self._turns, len(batches)) > 1 else nullcontext() as lanes:
            for batch, _ in zip(batches, (lanes.map if lanes else map)(run, batches), strict=True):
                advance(len(batch) * texts / len(rows))
        return vectors

    def _tokenize(self, texts: list[str], task: Task, first: int) -> tuple[list[Row], list[int], list[int]]:
        """Return rows, the position of each row's text, and each cut text's overrun in tokens.

        `first` is the position of `texts[0]` in the caller's list, for a message.
        """
        prompt = self.prompts[task]
        rows: list[Row] = []
        owners: list[int] = []
        cut: list[int] = []
        with NATIVE_CODE:
            whole = self._tokenizer.encode_batch([with_prompt(text, prompt) for text in texts])
        for position, encoding in enumerate(whole):
            encodings = [encoding]
            if encoding.overflowing:
                over = sum(len(part.ids) - self._specials for part in encoding.overflowing)
                if self.long_inputs == "error":
                    raise InvalidTexts(
                        f"texts[{first + position}] is {over} tokens longer than max_length={self.max_length}; "
                        'split it, or make the encoder with long_inputs="truncate" or "average".'
                    )
                if self.long_inputs == "average":
                    encodings = self._split(texts[position], prompt)
                else:
                    cut.append(over)
            found = [self._row(part, self._skips[task]) for part in encodings if part.ids]
            rows += found
            owners += [position] * len(found)
        return rows, owners, cut

    def _row(self, encoding: Any, skip: int = 0) -> Row:
        # As arrays, which the forward pass joins at once: here a GPU doesn't wait for it.
        ids = np.array(encoding.ids, dtype=np.int32)
        types = np.array(encoding.type_ids, dtype=np.int32) if self._typed else None
        return Row(ids, min(skip, len(ids)), types)

    def _prompt_length(self, task: Task, special_ids: list[int]) -> int:
        """Return how many of a row's first tokens are the prompt's and left out of pooling, as the reference counts."""
        if self._recipe.include_prompt or not self.prompts[task]:
            return 0
        ids = self._tokenizer.encode(self.prompts[task]).ids
        return len(ids) - any(last in special_ids for last in ids[-1:])

    def _split(self, text: str, prompt: str) -> list[Any]:
        """Return the encodings of even pieces of a text, each with the prompt and none cut."""
        if text.startswith(prompt):
            text = text[len(prompt) :]
        offsets = self.token_offsets(text)
        room = self.max_length - self._specials - len(self.token_offsets(prompt))
        if room < 1:
            raise InvalidInput(
                f"the prompt {prompt[:40]!r} fills max_length={self.max_length}; nothing of a text fits beside it. "
                "Raise max_length, or shorten the prompt."
            )
        count = -(-len(offsets) // room)
        while True:
            ends = [offsets[len(offsets) * piece // count - 1][1] for piece in range(1, count)] + [len(text)]
            starts = [0, *ends[:-1]]
            pieces = [prompt + text[start:end] for start, end in zip(starts, ends, strict=True)]
            with NATIVE_CODE:
                encodings = self._tokenizer.encode_batch(pieces)
            # A piece can come to more tokens alone than it had in the text.
            if not any(encoding.overflowing for encoding in encodings):
                return list(encodings)
            count += 1

    def _report(self, cut: list[int], texts: int) -> None:
        self._last.cut = Cut(len(cut), max(cut, default=0))
        if cut:
            warnings.warn(
                f"{len(cut)} of {texts} texts were longer than max_length={self.max_length} tokens "
                f"and were cut, the longest by {max(cut)} tokens. Split them, raise max_length, or make the "
                'encoder with long_inputs="average".',
                stacklevel=4,
            )

    def _forward(self, rows: Sequence[Row]) -> Float32Array:
        network = self._network
        if network is None:
            raise EncoderClosed("this encoder was closed while it was encoding; make a new one.")
        return network.run(rows)

    def _finish(self, pooled: Float32Array, rows: list[Row], owners: list[int], texts: int) -> Float32Array:
        """Return full vectors, float32 [texts, n]: what comes between the model's own modules and the cut.

        A text that has no tokens gets zeros.
        """
        if self._layer_norm:
            pooled = layer_norm(pooled)
        if self._head is not None:
            pooled = pooled @ self._head
        if owners == list(range(texts)):
            return pooled
        if self.long_inputs == "average":
            weights = np.array([len(row.ids) - row.skip for row in rows], dtype=np.float32)
            pooled = normalize(pooled) * weights[:, None]
        sums = np.zeros((texts, self._width), dtype=np.float32)
        np.add.at(sums, owners, pooled)
        return sums


def _merge_prompts(own: Mapping[Task, str], override: Mapping[Task, str] | None) -> dict[Task, str]:
    merged = dict(own)
    for task, prompt in (override or {}).items():
        if not isinstance(prompt, str):
            raise InvalidInput(f"prompts[{task!r}] is {prompt!r}; a prompt is a string, '' for none.")
        merged[check_task(task)] = prompt
    return merged


def _as_devices(asked: Device | Sequence[Device] | None) -> list[torch.device]:
    import torch

    if asked is None:
        if torch.cuda.is_available():
            return [torch.device("cuda")]
        return [torch.device("mps" if torch.backends.mps.is_available() else "cpu")]
    names = list(asked) if isinstance(asked, list | tuple) else [cast("Device", asked)]
    if not names:
        raise InvalidInput("device is an empty list; name a device, or pass None to have one chosen.")
    return [_as_device(name) for name in names]


def _as_device(asked: Device) -> torch.device:
    import torch

    try:
        return torch.device(asked)
    except (RuntimeError, TypeError) as error:
        raise InvalidInput(f"device is {asked!r}, which torch doesn't know: pass 'cpu', 'cuda' or 'cuda:1'.") from error


def _check_present(devices: list[torch.device]) -> None:
    import torch

    # Counting them takes no memory on any, as trying one would.
    there = torch.cuda.device_count()
    for device in devices:
        if device.type == "cuda" and (device.index or 0) >= there:
            raise InvalidInput(
                f"device is {str(device)!r}, and torch {torch.__version__} finds {there} GPUs here. Pass device='cpu' "
                "or one that is there, or install a build of torch for it."
            )


def _pick_dtype(device: torch.device) -> torch.dtype:
    import torch

    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Without these instructions bfloat16 is emulated, and slower than float32.
        has = torch.cpu.get_capabilities()
        fast = bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def _check_backend(asked: object, devices: list[torch.device]) -> Backend:
    if asked not in (None, *get_args(Backend)):
        raise InvalidInput(f"backend is {asked!r}; it must be 'torch', 'openvino', or None for 'torch'.")
    if asked == "openvino" and any(device.type != "cpu" for device in devices):
        raise InvalidInput(
            f"backend='openvino' runs on a CPU, and device is {', '.join(map(str, devices))}. Pass device='cpu', or "
            "leave backend out."
        )
    return "openvino" if asked == "openvino" else "torch"


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, value in known.items():
        if dtype in (name, value):
            return value
    raise InvalidInput(f"dtype is {dtype!r}; it must be one of {', '.join(map(repr, known))}, or None.")


def _pick_max_length(
    asked: int | None, recipe: Recipe, spec: ModelSpec | None, tokenizer: Any, config: Any, positions: int
) -> int:
    # As SentenceTransformer.max_seq_length: its own file, else the lesser of tokenizer and network. XLNet says -1.
    counted = getattr(config, "max_position_embeddings", -1)
    limit = int(min(tokenizer.model_max_length, counted if counted > 0 else 2**31))
    if asked is None:
        return min(recipe.max_length or (spec.max_length if spec else limit), positions)
    # Rotary scaling takes some networks past the positions that their config counts, but nothing past a table's end.
    limit = min(max(limit, recipe.max_length or 0, spec.max_length if spec else 0), positions)
    if not is_integer(asked, 3, limit):
        raise InvalidInput(
            f"max_length is {asked!r}; it must be an integer from 3 to {limit}, the longest input this network takes."
        )
    return asked


def _warn_of_differences(model: str, recipe: Recipe, prompts: Mapping[Task, str], asked: Mapping[Task, str]) -> None:
    """Say what the authors meant and isn't done."""
    if recipe.similarity != "cosine":
        warnings.warn(
            f"the authors of {model} compare its vectors by {recipe.similarity!r}. Here they are scaled to length 1 "
            "and compared by cosine, which can rank otherwise: measure it, or use a model made for cosine.",
            stacklevel=3,
        )
    if recipe.passage_prompt and not prompts["document"] and "document" not in asked:
        prompt = {"document": recipe.passage_prompt}
        warnings.warn(
            f"{model} has a prompt for passages and none named 'document', so documents get none, as in "
            f"sentence-transformers' encode_document. Pass prompts={prompt!r}, or prompts={{'document': ''}}.",
            stacklevel=3,
        )


def _check_long_inputs(asked: object) -> LongInputs:
    for known in get_args(LongInputs):
        if asked == known:
            return cast(LongInputs, known)
    raise InvalidInput(f"long_inputs is {asked!r}; it must be one of {', '.join(map(repr, get_args(LongInputs)))}.")


def _pick_dim(dim: int | None, truncate_dim: int | None, full_dim: int) -> int:
    if None not in (dim, truncate_dim) and dim != truncate_dim:
        raise InvalidDimension(f"dim is {dim!r} and truncate_dim {truncate_dim!r}; they are one setting. Pass one.")
    asked = truncate_dim if dim is None else dim
    return full_dim if asked is None else check_dim(asked, full_dim)


def _check_head(head: npt.ArrayLike | None, full_dim: int) -> Float32Array | None:
    if head is None:
        return None
    matrix = as_rows(head, "head")
    if matrix.shape != (full_dim, full_dim):
        raise InvalidVectors(f"head has shape {matrix.shape}; this model needs ({full_dim}, {full_dim}).")
    return matrix
