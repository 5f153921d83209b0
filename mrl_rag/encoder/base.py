"""What every encoder of this package is: `Encoder`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Self

from mrl_rag.arguments import check_integer
from mrl_rag.tasks import Task, check_texts
from mrl_rag.truncation import Float32Array

# Texts taken together: enough to batch them by length, and a bound on the memory they take.
BLOCK = 4096


class Encoder(ABC):
    """Texts to vectors that can be cut; a class below says how.

    with MatryoshkaEncoder() as encoder:               # closed at the end of the block
        encoder.encode_documents(["a text"])
    """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash of all that changes a vector."""

    @abstractmethod
    def encode(
        self, texts: Sequence[str], task: Task = "document", dim: int | None = None, progress: bool = False
    ) -> Float32Array:
        """Encode texts, in the order given.

        Args:
            texts: n strings.
            task: "query", "document", "classification" or "clustering".
            dim: 1 <= dim <= full_dim; None for the full dimension.
            progress: show a bar when standard error is a terminal.

        Returns:
            float32 array of shape [n, dim] whose rows are unit vectors.
        """

    def encode_iter(
        self, texts: Iterable[str], task: Task = "document", dim: int | None = None, *, block: int = BLOCK
    ) -> Iterator[tuple[list[str], Float32Array]]:
        """Encode a stream of any length in constant memory.

            for texts, vectors in encoder.encode_iter(lines_of(file), dim=256):
                write(texts, vectors)                      # float32 [len(texts), 256]

        Args:
            texts: any iterable of strings. It is read in the caller's thread, two blocks ahead at most.
            task: "query", "document", "classification" or "clustering".
            dim: 1 <= dim <= full_dim; None for the full dimension.
            block: texts an array, at least 1.

        Returns:
            An iterator over (texts, vectors): `block` texts in the order given, at the end fewer, and float32
            [len(texts), dim], unit rows. What `encode` raises for a text is raised by a step of the iterator, that of
            the text's block or the one before it.

        Raises:
            InvalidInput: `texts` can't be iterated over or is a bare string, or `block` is not a positive integer.
        """
        return ((part, self.encode(part, task, dim)) for part in blocks_of(texts, block))

    async def aencode(self, texts: Sequence[str], task: Task = "document", dim: int | None = None) -> Float32Array:
        """Encode texts without blocking the event loop; as `encode`."""
        import asyncio

        return await asyncio.to_thread(self.encode, texts, task, dim)

    def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> Float32Array:
        """Encode questions, each with the query prompt; see `encode`."""
        return self.encode(texts, "query", dim)

    def encode_documents(self, texts: Sequence[str], dim: int | None = None) -> Float32Array:
        """Encode passages, each with the document prompt; see `encode`."""
        return self.encode(texts, "document", dim)

    @abstractmethod
    def close(self) -> None:
        """Let go of what it holds; it can't encode after this."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def blocks_of(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Return an iterator over lists of `size` texts, the last one shorter; arguments and errors as `encode_iter`."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        check_texts(texts)
    return _blocks(iter(texts), check_integer("block", size, 1))


def _blocks(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    first = 0
    while block := check_texts(islice(texts, size), first):
        yield block
        first += len(block)
