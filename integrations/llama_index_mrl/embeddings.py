"""`MatryoshkaEmbedding`: an encoder as LlamaIndex's `BaseEmbedding`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from pydantic import computed_field

from mrl_rag import Encoder, MatryoshkaEncoder, Task
from mrl_rag.arguments import check_names
from mrl_rag.binding import model_of
from mrl_rag.errors import IndexMismatch, InvalidInput

# Fields that make an encoder, as `MatryoshkaEncoder` calls them.
_ENCODER_SETTINGS = (
    "device",
    "dtype",
    "max_length",
    "prompts",
    "revision",
    "trust_remote_code",
    "local_files_only",
    "long_inputs",
    "backend",
    "pickled_weights",
    "keep_alive",
)


class MatryoshkaEmbedding(BaseEmbedding):
    """A Matryoshka encoder for anything in LlamaIndex that takes an embedding model.

        embed_model = MatryoshkaEmbedding()                      # the default model, full dimension
        embed_model = MatryoshkaEmbedding("nomic-v1.5", dim=128) # the first 128 numbers, at unit length
        embed_model = MatryoshkaEmbedding(encoder=my_encoder)    # any `mrl_rag.Encoder`
        Settings.embed_model = embed_model

    Its fields, the encoder's `fingerprint` among them, differ wherever vectors do, so that an `IngestionPipeline` never
    takes one model's cached vectors for another's. `copy.deepcopy` shares the encoder. A pickled model loads its
    weights again.

    Args:
        model_name: short name, local folder or hub id of the model; None for "minilm".
        encoder: any `mrl_rag.Encoder`, used instead of one made from the fields. The fields then describe it.
        fingerprint: required fingerprint of the encoder, as written by `to_dict`; None for any.
        **fields: the fields below, and `BaseEmbedding`'s own.

    Raises:
        UnknownModel: no such model.
        InvalidDimension: `dim` is not an integer in range.
        InvalidInput: there is no such field; `encoder` is not an `Encoder`, or is given together with settings for
            making one; or `embeddings_cache` is given. LlamaIndex looks vectors up there by text only, and would return
            a query's vector for a document. `encoder=CachedEncoder(encoder, "vectors.sqlite3")` keeps them apart.
        IndexMismatch: the encoder has another fingerprint.
    """

    model_name: str = Field(default="minilm", description="Short name, local folder or hub id of the model.")
    embed_batch_size: int = Field(default=512, gt=0, le=2048, description="Texts per call of the encoder.")
    dim: int | None = Field(default=None, description="Length of the vectors; None for the full dimension.")
    device: str | list[str] | None = Field(
        default=None, description="A torch device, or a list of them for one process per device; None to choose."
    )
    dtype: str | None = Field(default=None, description="float32, bfloat16 or float16; None for the fast one.")
    max_length: int | None = Field(default=None, description="Longest input in tokens; None for the model's own.")
    prompts: dict[Task, str] | None = Field(default=None, description="Prompts by task, instead of the model's own.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
    local_files_only: bool | None = Field(default=None, description="Never ask the hub.")
    task: Task | None = Field(default=None, description="One task for texts and queries.")
    long_inputs: Literal["truncate", "average", "error"] = Field(
        default="truncate", description="What to do with texts longer than max_length."
    )
    backend: Literal["torch", "openvino"] | None = Field(
        default=None, description="What runs the network for single short texts."
    )
    pickled_weights: bool = Field(default=False, description="Load pickled weights where there are no safetensors.")
    keep_alive: float | None = Field(
        default=None, description="Seconds without a call after which the model is unloaded until the next one."
    )

    _encoder: Encoder = PrivateAttr()
    _made_encoder: bool = PrivateAttr()
    # One lock per event loop: asyncio's locks can't be used in two.
    _locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = PrivateAttr(default_factory=WeakKeyDictionary)

    def __init__(
        self,
        model_name: str | None = None,
        *,
        encoder: Encoder | None = None,
        fingerprint: str | None = None,
        **fields: Any,
    ) -> None:
        if model_name is not None:
            fields["model_name"] = model_name
        check_names(fields, type(self).model_fields, "MatryoshkaEmbedding")
        if not isinstance(name := fields.get("model_name", ""), str):
            raise InvalidInput(f"model_name is {name!r}; it must be a string. An encoder is passed as encoder=.")
        if fields.get("embeddings_cache") is not None:
            raise InvalidInput(
                "embeddings_cache is given; LlamaIndex looks vectors up there by text only, and would return a query's "
                "vector for a document. Pass encoder=CachedEncoder(encoder, 'vectors.sqlite3') instead."
            )
        if not isinstance(encoder, Encoder | None):
            raise InvalidInput(f"encoder is {encoder!r}; it must be an mrl_rag.Encoder, such as MatryoshkaEncoder().")
        if encoder is not None:
            given = sorted({"model_name", *_ENCODER_SETTINGS} & set(fields))
            # With a fingerprint these are fields that `to_dict` wrote; it tells whether the encoder is the same.
            if given and fingerprint is None:
                raise InvalidInput(
                    f"encoder is given, and so is {', '.join(given)}: set that where the encoder is made."
                )
            fields |= _described(encoder)
        super().__init__(**fields)
        self._made_encoder = encoder is None
        self._encoder = encoder or MatryoshkaEncoder(
            self.model_name, **{name: getattr(self, name) for name in _ENCODER_SETTINGS}
        )
        if self.dim is not None:
            self._encoder.encode([], dim=self.dim)
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise IndexMismatch(
                f"these settings are of an encoder with fingerprint {fingerprint}; {self.model_name!r} has "
                f"{self.fingerprint}. Pass the encoder they were written for: from_dict(settings, encoder=encoder)."
            )

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex stores for this class."""
        return "MatryoshkaEmbedding"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint: equal only where full vectors are equal, apart from `task` and `dtype`."""
        return self._encoder.fingerprint

    @property
    def length(self) -> int:
        """Length of the vectors: `dim`, or the encoder's own."""
        return self.dim or self._encoder.dim

    @property
    def encoder(self) -> Encoder:
        """The encoder that does the work."""
        return self._encoder

    def close(self) -> None:
        """Free what the encoder holds, unless that was passed in; texts can't be embedded after this."""
        if self._made_encoder:
            self._encoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        task = f", task={self.task!r}" if self.task else ""
        return f"MatryoshkaEmbedding({self._encoder!r}, dim={self.dim}{task})"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> MatryoshkaEmbedding:
        """Copy the fields and share the encoder."""
        shared = {id(held): held for held in (self._encoder, self._locks)}
        return super().__deepcopy__((memo or {}) | shared)

    def __reduce__(self) -> tuple[Callable[..., MatryoshkaEmbedding], tuple[Any, ...]]:
        """Pickle the fields and the encoder, which pickles its settings without its weights."""
        fields = {name: getattr(self, name) for name, field in type(self).model_fields.items() if not field.exclude}
        return _restored, (type(self), self._encoder, fields)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._encoder.encode([query], self.task or "query", self.dim)[0].tolist()  # type: ignore[no-any-return]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._encoder.encode(texts, self.task or "document", self.dim).tolist()  # type: ignore[no-any-return]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await self._encoder.aencode([query], self.task or "query", self.dim))[0].tolist()  # type: ignore[no-any-return]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._encoder.aencode([text], self.task or "document", self.dim))[0].tolist()  # type: ignore[no-any-return]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        # LlamaIndex starts all batches at once; running more than one would only take threads and memory.
        async with self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            return (await self._encoder.aencode(texts, self.task or "document", self.dim)).tolist()  # type: ignore[no-any-return]


def _described(encoder: Encoder) -> dict[str, Any]:
    """Return the fields that describe an encoder, and that make a `MatryoshkaEncoder` again."""
    if not isinstance(encoder, MatryoshkaEncoder):
        return {"model_name": model_of(encoder)}
    return {
        "model_name": encoder.model,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "max_length": encoder.max_length,
        "prompts": dict(encoder.prompts),
        "long_inputs": encoder.long_inputs,
    }


def _restored(cls: type[MatryoshkaEmbedding], encoder: Encoder, fields: dict[str, Any]) -> MatryoshkaEmbedding:
    return cls(encoder=encoder).model_copy(update=fields)


def fingerprint_of(embed_model: BaseEmbedding) -> str | None:
    """Return the fingerprint of a `MatryoshkaEmbedding`, its task included; None of others."""
    if not isinstance(embed_model, MatryoshkaEmbedding):
        return None
    return f"{embed_model.fingerprint}-{embed_model.task}" if embed_model.task else embed_model.fingerprint


def name_of(embed_model: BaseEmbedding) -> str | None:
    """Return the name of an embedding's model; None where it has LlamaIndex's default, "unknown"."""
    return None if embed_model.model_name == "unknown" else embed_model.model_name
