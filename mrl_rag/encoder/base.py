"""`Encoder`: what every encoder is, and the class to subclass for one of your own."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Self, TypeAlias

import numpy as np

from mrl_rag.arguments import check_integer
from mrl_rag.errors import HeadMismatch, InvalidVectors
from mrl_rag.heads import MatryoshkaHead
from mrl_rag.progress import progress_bar
from mrl_rag.tasks import Task, check_task, check_texts
from mrl_rag.truncation import Float32Array, check_dim

# Texts per chunk: enough to batch them by length, and a bound on the memory they take.
CHUNK_SIZE = 4096

# Called with the number of texts that are done.
Advance: TypeAlias = Callable[[float], object]


class Encoder(ABC):
    """Turns texts into unit vectors of any length up to `full_dim`.

    For an encoder of your own, say what it is and return its vectors; this class checks the arguments:

        class MyEncoder(Encoder):
            full_dim = 768
            dims = (768, 256)
            max_length = 512
            fingerprint = "my-model-1"                 # another one whenever the vectors change

            def _encode(self, texts, task, dim, advance):
                return truncate(my_model(texts), dim)  # float32 [n, dim], unit rows

        with MyEncoder() as encoder:                   # closed at the end of the block
            encoder.encode_documents(["a text"])       # float32 [1, 768]
    """

    @property
    @abstractmethod
    def full_dim(self) -> int:
        """Length of the model's whole vector."""

    @property
    @abstractmethod
    def dims(self) -> tuple[int, ...]:
        """Dimensions the model was trained for, widest first; only the full one if no others are known."""

    @property
    @abstractmethod
    def max_length(self) -> int | None:
        """Longest input in tokens; None if that is not known."""

    # What full vectors have been through; `fit_head` fits no second one.
    _head: MatryoshkaHead | None = None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash of all that changes a full vector. An index refuses vectors of another fingerprint."""

    @property
    def dim(self) -> int:
        """Length of the vectors where a call names none; the full dimension, unless the encoder was made otherwise."""
        return self.full_dim

    @abstractmethod
    def _encode(self, texts: list[str], task: Task, dim: int, advance: Advance) -> Float32Array:
        """Return the vectors of texts; the arguments are checked already.

        Args:
            texts: at least one string.
            task: "query", "document", "classification" or "clustering".
            dim: 1 <= dim <= full_dim.
            advance: to be called with the number of texts done since the last call, for the progress bar; or never.

        Returns:
            float32 [n, dim], unit rows: `mrl_rag.truncate(vectors, dim)` makes them of full vectors.
        """

    def close(self) -> None:  # noqa: B027
        """Free what the encoder holds; it can't encode after this. Does nothing unless overridden."""

    def encode(
        self, texts: Sequence[str], task: Task = "document", dim: int | None = None, progress: bool = False
    ) -> Float32Array:
        """Encode texts, in the order given.

        Args:
            texts: n strings; an empty list gives an empty array.
            task: "query", "document", "classification" or "clustering": picks the prompt.
            dim: 1 <= dim <= full_dim; None for the encoder's own `dim`.
            progress: show a bar when standard error is a terminal.

        Returns:
            float32 array of shape [n, dim] whose rows are unit vectors.

        Raises:
            InvalidTexts: `texts` is a bare string, or one of them is not a string.
            InvalidDimension: `dim` is not an integer in range.
            InvalidInput: there is no such task.
            EncoderClosed: `close` was called.
        """
        texts, task, dim = self._check(texts, task, dim)
        with progress_bar(len(texts), "encode", "text", progress) as advance:
            return self._vectors(texts, task, dim, advance)

    async def aencode(self, texts: Sequence[str], task: Task = "document", dim: int | None = None) -> Float32Array:
        """Encode texts without blocking the event loop; as `encode`."""
        return await asyncio.to_thread(self.encode, texts, task, dim)

    def encode_iter(
        self, texts: Iterable[str], task: Task = "document", dim: int | None = None, *, chunk_size: int = CHUNK_SIZE
    ) -> Iterator[tuple[list[str], Float32Array]]:
        """Encode a stream of any length in constant memory.

            for texts, vectors in encoder.encode_iter(lines_of(file), dim=256):
                write(texts, vectors)                      # float32 [len(texts), 256]

        Args:
            texts: any iterable of strings. It is read in the caller's thread, at most two chunks ahead.
            task: as for `encode`.
            dim: as for `encode`.
            chunk_size: texts per chunk, at least 1.

        Returns:
            An iterator over (texts, vectors): `chunk_size` texts in the order given, fewer at the end, and float32
            [len(texts), dim], unit rows. What `encode` raises for a text is raised by the step of the iterator that
            yields the text's chunk, or by the step before it.

        Raises:
            InvalidInput: `texts` can't be iterated over or is a bare string, or `chunk_size` is not a positive integer.
        """
        chunks = chunks_of(texts, chunk_size)
        _, task, dim = self._check([], task, dim)
        return self._encode_chunks(chunks, task, dim)

    def count_tokens(self, texts: Sequence[str], task: Task = "document") -> list[int] | None:
        """Return how many tokens the model reads of each text, its prompt and special tokens counted, nothing cut.

        A text with at most `max_length` of them is encoded as a whole.

        Args:
            texts: n strings.
            task: picks the prompt.

        Returns:
            n numbers; None from an encoder that can't count, as this one, unless it overrides `count_tokens`.

        Raises:
            InvalidTexts: `texts` is a bare string, or one of them is not a string.
        """
        return None

    def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> Float32Array:
        """Encode questions, each with the query prompt; see `encode`."""
        return self.encode(texts, "query", dim)

    def encode_documents(self, texts: Sequence[str], dim: int | None = None) -> Float32Array:
        """Encode passages, each with the document prompt; see `encode`."""
        return self.encode(texts, "document", dim)

    def encode_query(self, texts: str | Sequence[str], dim: int | None = None) -> Float32Array:
        """Encode one question or several, as sentence-transformers' method of that name.

        Returns:
            float32 [dim] for a string, [n, dim] for a list of n.
        """
        return self.encode([texts], "query", dim)[0] if isinstance(texts, str) else self.encode(texts, "query", dim)

    def encode_document(self, texts: str | Sequence[str], dim: int | None = None) -> Float32Array:
        """Encode one passage or several, as sentence-transformers' method of that name.

        Returns:
            float32 [dim] for a string, [n, dim] for a list of n.
        """
        return self.encode([texts], "document", dim)[0] if isinstance(texts, str) else self.encode(texts, dim=dim)

    def fit_head(
        self,
        questions: Sequence[str],
        passages: Sequence[str],
        *,
        seed: int = 0,
        data: str = "",
        progress: bool = False,
    ) -> MatryoshkaHead:
        """Encode questions and the passages that answer them, and fit a head; see `MatryoshkaHead.fit`.

        Args:
            questions: n strings, n >= 100. One may occur several times, with other passages.
            passages: n strings; passage i answers question i.
            seed: as there.
            data: what the texts are, in words, for the head's card.
            progress: show bars when standard error is a terminal.

        Raises:
            HeadMismatch: this encoder has a head already.
            InvalidTexts: as `encode` does.
            InvalidVectors: there are too few, or not as many of one as of the other.
        """
        model = str(getattr(self, "model", ""))
        if self._head is not None:
            raise HeadMismatch(f"this encoder of {model!r} has a head already; fit one with an encoder without.")
        return MatryoshkaHead.fit(
            self._encode_each_once(questions, "query", progress),
            self._encode_each_once(passages, "document", progress),
            seed=seed,
            data=data,
            model=model,
            fingerprint=self.fingerprint,
            progress=progress,
        )

    def _encode_each_once(self, texts: Sequence[str], task: Task, progress: bool) -> Float32Array:
        row_of = {text: row for row, text in enumerate(dict.fromkeys(check_texts(texts)))}
        return self.encode(list(row_of), task, self.full_dim, progress)[[row_of[text] for text in texts]]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(full_dim={self.full_dim})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check(self, texts: Iterable[str], task: Task, dim: int | None) -> tuple[list[str], Task, int]:
        """Return the arguments of a call, checked, with `dim` filled in."""
        task, checked = check_task(task), check_texts(texts)
        self._check_open()
        return checked, task, self.dim if dim is None else check_dim(dim, self.full_dim)

    def _check_open(self) -> None:  # noqa: B027
        """Raise `EncoderClosed` where the encoder can't encode any more."""

    def _vectors(self, texts: list[str], task: Task, dim: int, advance: Advance) -> Float32Array:
        if not texts:
            return np.empty((0, dim), dtype=np.float32)
        vectors = self._encode(texts, task, dim, advance)
        if vectors.shape != (len(texts), dim):
            raise InvalidVectors(
                f"{type(self).__name__}._encode returned an array of shape {vectors.shape} for {len(texts)} texts and "
                f"dim={dim}; end it with `return mrl_rag.truncate(vectors, dim)`."
            )
        return vectors

    def _encode_chunks(
        self, chunks: Iterator[list[str]], task: Task, dim: int
    ) -> Iterator[tuple[list[str], Float32Array]]:
        return ((chunk, self._vectors(chunk, task, dim, ignore_progress)) for chunk in chunks)


class PickledByArguments:
    """Makes an object's pickle carry the arguments it was made with, and makes it anew from them.

    `api_key` is left out, so that no key is written into a file.
    """

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments."""
        made = super().__new__(cls)
        kwargs.pop("api_key", None)
        made._arguments = args, kwargs
        return made

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        args, kwargs = self._arguments
        return partial(type(self), **kwargs), args


def ignore_progress(done: float) -> None:
    """Show no progress."""


def chunks_of(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Return an iterator over lists of `size` texts, the last one shorter; arguments and errors as `encode_iter`."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        check_texts(texts)
    return _chunks(iter(texts), check_integer("chunk_size", size, 1))


def _chunks(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    first = 0
    while chunk := check_texts(islice(texts, size), first):
        yield chunk
        first += len(chunk)
