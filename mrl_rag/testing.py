"""An encoder for tests: no weights, no download, the same vectors on every machine."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import numpy as np

from mrl_rag.encoder.base import Advance, Encoder
from mrl_rag.tasks import Task
from mrl_rag.truncation import Float32Array, check_dim, truncate

# Weight of the parts for the text as a whole and the task, which tell apart texts with the same words.
_OWN_WEIGHT = np.float32(0.1)


class DeterministicEncoder(Encoder):
    """Gives texts that share words similar vectors, most of it in the first numbers, as a Matryoshka model does.

        embeddings = MatryoshkaEmbeddings(encoder=DeterministicEncoder())     # LangChain
        embed_model = MatryoshkaEmbedding(encoder=DeterministicEncoder())     # LlamaIndex

    A text's vector is the sum of one random vector per word, seeded by the word, whose numbers shrink as
    1 / sqrt(1 + i). Its query and document vectors differ a little, as those of a model with prompts. Synonyms are
    unrelated.

    Args:
        full_dim: length of the vectors.

    Attributes:
        full_dim: length of the whole vector.
        dims: full_dim, and its half and quarter.
        max_length: longest input in words; a longer text is not cut.
    """

    # Set by `__init__`.
    full_dim = 0
    dims: tuple[int, ...] = ()
    max_length = 2**31

    def __init__(self, full_dim: int = 384) -> None:
        self.full_dim = check_dim(full_dim, 65536)
        self.dims = tuple(dict.fromkeys(max(full_dim // part, 1) for part in (1, 2, 4)))

    def __repr__(self) -> str:
        return f"DeterministicEncoder({self.full_dim})"

    @property
    def fingerprint(self) -> str:
        """A short text that changes with `full_dim`."""
        return f"deterministic-{self.full_dim}"

    def _encode(self, texts: list[str], task: Task, dim: int, advance: Advance) -> Float32Array:
        return truncate(np.stack([self._vector(text, task) for text in texts]), dim)

    def _vector(self, text: str, task: Task) -> Float32Array:
        words = re.findall(r"\w+", text.lower())
        vector = _OWN_WEIGHT * (_noise(f"text {text}", self.full_dim) + _noise(f"task {task}", self.full_dim))
        for word in words:
            vector += _noise(f"word {word}", self.full_dim) / np.float32(len(words) ** 0.5)
        return vector


@lru_cache(maxsize=10_000)
def _noise(name: str, full_dim: int) -> Float32Array:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal(full_dim, dtype=np.float32)
    vector: Float32Array = drawn * np.arange(1, full_dim + 1, dtype=np.float32) ** np.float32(-0.5)
    return vector
