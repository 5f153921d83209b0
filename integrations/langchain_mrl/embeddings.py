"""`MatryoshkaEmbeddings`: an encoder as LangChain's `Embeddings`."""

from __future__ import annotations

from typing import Any, Literal, Self

from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from mrl_rag import Encoder, MatryoshkaEncoder, Task
from mrl_rag.binding import model_of
from mrl_rag.errors import InvalidInput

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


class MatryoshkaEmbeddings(BaseModel, Embeddings):
    """A Matryoshka encoder for anything in LangChain that takes embeddings.

        embeddings = MatryoshkaEmbeddings()                      # the default model, full dimension
        embeddings = MatryoshkaEmbeddings(dim=128)               # the first 128 numbers, at unit length
        embeddings = MatryoshkaEmbeddings(encoder=my_encoder)    # any `mrl_rag.Encoder`
        embeddings.embed_query("a question")                     # encoded with the model's query prompt

    With `CacheBackedEmbeddings`, give queries a cache of their own. With `query_embedding_cache=True` a question and a
    passage with the same words would share one entry, but a model with prompts gives them different vectors:

        CacheBackedEmbeddings.from_bytes_store(
            embeddings,
            LocalFileStore("./cache/documents"),
            namespace=embeddings.namespace,
            query_embedding_cache=LocalFileStore("./cache/queries"),
        )

    `encoder=mrl_rag.CachedEncoder(...)` keeps both in one file, as separate entries.

    Raises:
        UnknownModel: no such model.
        InvalidDimension: `dim` is not an integer in range.
        InvalidInput: `encoder` is not an `Encoder`, or is given together with settings for making one.
    """

    model: str = "minilm"
    """Short name, local folder or hub id of the model."""
    dim: int | None = None
    """Length of the vectors, 1 <= dim <= the model's full dimension; None for the full one."""
    device: str | list[str] | None = None
    """A torch device, or a list of them for one process per device; None for a GPU where there is one."""
    dtype: str | None = None
    """"float32", "bfloat16" or "float16"; None for bfloat16 where the hardware is fast at it, and float32 elsewhere."""
    max_length: int | None = None
    """Longest input in tokens; None for the model's own."""
    prompts: dict[Task, str] | None = None
    """Prompts by task ("query", "document"), used instead of the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    local_files_only: bool | None = None
    """Never ask the hub; None to follow HF_HUB_OFFLINE."""
    task: Task | None = None
    """One task for documents and queries, such as "clustering"; None for "document" and "query"."""
    long_inputs: Literal["truncate", "average", "error"] = "truncate"
    """What to do with texts longer than `max_length`; see `MatryoshkaEncoder`."""
    backend: Literal["torch", "openvino"] | None = None
    """What runs the network for single short texts; None for "torch"."""
    pickled_weights: bool = False
    """Load `pytorch_model.bin` where a model has no `model.safetensors`."""
    keep_alive: float | None = None
    """Seconds without a call after which the model is unloaded until the next one; None to keep it loaded."""
    show_progress: bool = False
    """Show a bar while documents are embedded, when standard error is a terminal."""
    encoder: Any = Field(default=None, exclude=True, repr=False)
    """Any `mrl_rag.Encoder`, used instead of one made from the fields above."""

    _made_encoder: bool = PrivateAttr(default=False)

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    # Not a validator: pydantic would wrap these errors in one of its own.
    def __init__(self, **fields: Any) -> None:
        if not isinstance(encoder := fields.get("encoder"), Encoder | None):
            raise InvalidInput(f"encoder is {encoder!r}; it must be an mrl_rag.Encoder, such as MatryoshkaEncoder().")
        super().__init__(**fields)
        self._made_encoder = self.encoder is None
        if self.encoder is None:
            settings = {name: getattr(self, name) for name in _ENCODER_SETTINGS}
            self.encoder = MatryoshkaEncoder(self.model, **settings)
        elif given := sorted({"model", *_ENCODER_SETTINGS} & set(fields)):
            raise InvalidInput(f"encoder is given, and so is {', '.join(given)}: set that where the encoder is made.")
        else:
            self.model = model_of(self.encoder)
        if self.dim is not None:
            self.encoder.encode([], dim=self.dim)

    def close(self) -> None:
        """Free what the encoder holds, unless that was passed in; texts can't be embedded after this."""
        if self._made_encoder:
            self.encoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        task = f", task={self.task!r}" if self.task else ""
        return f"MatryoshkaEmbeddings({self.encoder!r}, dim={self.dim}{task})"

    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint, with `task` added where it is set: equal only where full vectors are equal."""
        return f"{self.encoder.fingerprint}-{self.task}" if self.task else str(self.encoder.fingerprint)

    @property
    def length(self) -> int:
        """Length of the vectors: `dim`, or the encoder's own."""
        return self.dim or int(self.encoder.dim)

    @property
    def namespace(self) -> str:
        """Key prefix for a cache of these vectors, different for each model, prompt, task and dimension."""
        return f"{self.fingerprint}-{self.length}-"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed passages, each with the model's document prompt."""
        vectors = self.encoder.encode(texts, task=self.task or "document", dim=self.dim, progress=self.show_progress)
        return vectors.tolist()  # type: ignore[no-any-return]

    def embed_query(self, text: str) -> list[float]:
        """Embed a question, with the model's query prompt."""
        return self.embed_queries([text])[0]

    def embed_queries(self, texts: list[str]) -> list[list[float]]:
        """Embed questions together, each with the model's query prompt."""
        return self.encoder.encode(texts, task=self.task or "query", dim=self.dim).tolist()  # type: ignore[no-any-return]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed passages without blocking the event loop."""
        return (await self.encoder.aencode(texts, task=self.task or "document", dim=self.dim)).tolist()  # type: ignore[no-any-return]

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a question; questions awaited at the same time share a forward pass."""
        return (await self.aembed_queries([text]))[0]

    async def aembed_queries(self, texts: list[str]) -> list[list[float]]:
        """Embed questions together without blocking the event loop."""
        return (await self.encoder.aencode(texts, task=self.task or "query", dim=self.dim)).tolist()  # type: ignore[no-any-return]


def fingerprint(embeddings: Embeddings | None) -> str | None:
    """Return the fingerprint of embeddings of this package; None for others."""
    found = getattr(innermost(embeddings), "fingerprint", None)
    return found if isinstance(found, str) else None


def model_name(embeddings: Embeddings | None) -> str | None:
    """Return the name of the model behind any embeddings, in the field where their class has it; None without one."""
    found = (getattr(innermost(embeddings), field, None) for field in ("model", "model_name", "model_id"))
    return next((name for name in found if isinstance(name, str) and name), None)


def innermost(embeddings: Embeddings | None) -> Embeddings | None:
    """Return what a `CacheBackedEmbeddings` asks for the vectors that it doesn't have; others as they are."""
    while (inner := getattr(embeddings, "underlying_embeddings", None)) is not None:
        embeddings = inner
    return embeddings
