"""What every encoder of this package is: `Encoder`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from mrl_rag.tasks import Task
from mrl_rag.truncation import Float32Array


class Encoder(ABC):
    """Texts to vectors that can be cut; a class below says how."""

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
