"""`MatryoshkaEmbeddingFunction`: an encoder as Chroma's `EmbeddingFunction`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import numpy as np
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from mrl_rag import Encoder, MatryoshkaEncoder, Task
from mrl_rag.errors import IndexMismatch, InvalidInput

_MODEL = "minilm"
_SETTINGS = ("model", "dim", "max_length", "prompts", "revision")


@register_embedding_function
class MatryoshkaEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embeds documents and queries, each with the model's prompt, for a plain Chroma collection.

        from chroma_mrl import MatryoshkaEmbeddingFunction
        collection = client.create_collection("docs", embedding_function=MatryoshkaEmbeddingFunction(dim=128))
        collection.add(ids=["a"], documents=["a text"])
        collection.query(query_texts=["a question"])

    Chroma stores the arguments with the collection, and makes the function again from them when the collection is
    opened in a process that has imported this module. The model is loaded on first use.

    Args:
        model: short name, local folder or hub id, as for `MatryoshkaEncoder`. None is what Chroma stores for `encoder`.
        dim: length of the vectors, 1 <= dim <= the model's full dimension; None for the full one.
        device: a torch device; None for a GPU where there is one. Not stored.
        max_length: longest input in tokens; None for the model's own.
        prompts: prompts by task, used instead of the model's own.
        revision: branch, tag or commit on the hub.
        encoder: any `mrl_rag.Encoder`, used instead of one made from the arguments above. Chroma can't store it: pass
            it again when the collection is opened.

    Raises:
        InvalidInput: `encoder` is not an `Encoder`, or is given together with settings for making one.
    """

    def __init__(
        self,
        model: str | None = _MODEL,
        dim: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        prompts: Mapping[Task, str] | None = None,
        revision: str | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        if not isinstance(encoder, Encoder | None):
            raise InvalidInput(f"encoder is {encoder!r}; it must be an mrl_rag.Encoder, such as MatryoshkaEncoder().")
        making = {"device": device, "max_length": max_length, "prompts": prompts, "revision": revision}
        given = [name for name, value in making.items() if value is not None]
        if encoder is not None and (given or model != _MODEL):
            raise InvalidInput(f"encoder is given, and so is {given or 'model'}: set that where the encoder is made.")
        self._settings = {
            "model": model,
            "dim": dim,
            "max_length": max_length,
            "prompts": None if prompts is None else dict(prompts),
            "revision": revision,
        }
        self._device = device
        self._given = encoder
        self._expected = ""

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder that does the work.

        Raises:
            IndexMismatch: the model's files have changed since the collection was filled.
            InvalidInput: the collection was made with `encoder=`, which has to be passed again.
        """
        if self._given is not None:
            return self._given
        if self._settings["model"] is None:
            raise InvalidInput(
                "the collection was made with an encoder object, which Chroma can't make again; open it with "
                "embedding_function=MatryoshkaEmbeddingFunction(encoder=...)."
            )
        settings: dict[str, Any] = {key: self._settings[key] for key in _SETTINGS if key != "dim"}
        encoder = MatryoshkaEncoder(device=self._device, **settings)
        if self._expected and encoder.fingerprint != self._expected:
            raise IndexMismatch(
                f"the collection was filled by {self._settings['model']!r} with fingerprint {self._expected}; that "
                f"model now has {encoder.fingerprint}. Bring its files back, or fill a new collection."
            )
        return encoder

    def __repr__(self) -> str:
        return f"MatryoshkaEmbeddingFunction({self._given or self._settings['model']!r}, dim={self._settings['dim']})"

    def close(self) -> None:
        """Free what the encoder holds, unless that was passed in; texts can't be embedded after this."""
        if self._given is None and "encoder" in vars(self):
            self.encoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, input: Documents) -> Embeddings:
        """Embed passages, each with the model's document prompt: float32 [dim] each."""
        return self._encode(input, "document")

    def embed_query(self, input: Documents) -> Embeddings:
        """Embed questions, each with the model's query prompt: float32 [dim] each."""
        return self._encode(input, "query")

    @staticmethod
    def name() -> str:
        """Return the name Chroma stores for this class."""
        return "mrl-rag"

    def default_space(self) -> Space:
        """Return "cosine", the metric for these vectors."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """Return what Chroma stores with the collection."""
        made_again = {} if self._given is None else {"model": None}
        return {**self._settings, **made_again, "fingerprint": self._expected or self.encoder.fingerprint}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> MatryoshkaEmbeddingFunction:
        """Make the function again from what Chroma has stored.

        Raises:
            InvalidInput: `config` is not what `get_config` returns.
        """
        MatryoshkaEmbeddingFunction.validate_config(config)
        built = MatryoshkaEmbeddingFunction(**{key: config[key] for key in _SETTINGS})
        built._expected = config["fingerprint"]
        return built

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Accept what `get_config` returns.

        Raises:
            InvalidInput: a key is missing or unknown.
        """
        given, known = set(config), {*_SETTINGS, "fingerprint"}
        if given != known:
            raise InvalidInput(
                f"the configuration lacks {sorted(known - given)} and has {sorted(given - known)}, which this "
                "embedding function doesn't know; pass what get_config() returns."
            )

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Refuse to change what the stored vectors depend on.

        Raises:
            InvalidInput: the model or the dimension differs.
        """
        for key in ("fingerprint", "dim"):
            if old_config.get(key) != new_config.get(key):
                raise InvalidInput(
                    f"{key} can't change from {old_config.get(key)!r} to {new_config.get(key)!r}: the stored vectors "
                    "would no longer match. Fill a new collection."
                )

    def _encode(self, texts: Documents, task: Task) -> Embeddings:
        dim = self._settings["dim"]
        return [np.array(row) for row in self.encoder.encode(texts, task, dim)]  # type: ignore[arg-type]
