"""What embeds texts where the collection of an index is used through Chroma itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from mrl_rag.errors import IndexMismatch, InvalidInput, MrlRagError
from mrl_rag.index.archive import LmdbArchive
from mrl_rag.index.config import IndexConfig
from mrl_rag.tasks import Task
from mrl_rag.truncation import Float32Array, truncate, unit_rows

if TYPE_CHECKING:
    from mrl_rag import MatryoshkaEncoder

# Settings of the index that Chroma stores with the function.
_STORED = ("full_dim", "shortlist_dim", "fingerprint", "archive", "rotation", "precision", "model")


@register_embedding_function
class TwoStageEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embeds texts as the index does: encoded by its model, then cut to what stage one searches.

    An index stores this with its collection. Chroma makes it again in a process that has imported this module:

        import mrl_rag.index.embedding_function
        collection = chromadb.PersistentClient("./db").get_collection("docs")
        collection.query(query_texts=["a question"])         # stage one alone: nothing is reranked
        collection.add(ids=["a"], documents=["a text"])      # `repair(encode=...)` gives it its full vector

    Args:
        config: what the index remembers.
        folder: the one that the archive is in; "" where that is a server.
    """

    def __init__(self, config: IndexConfig, folder: str = "") -> None:
        self._config = config
        self._folder = folder

    def __call__(self, input: Documents) -> Embeddings:
        """Embed passages: float32 [shortlist_dim] each.

        Raises:
            IndexMismatch: the model is not known, or can't be made here as it was when it filled the index; or the
                folder was moved.
            InvalidInput: the vectors are rotated, and the rotation is on a server.
        """
        return self._embed(input, "document")

    def embed_query(self, input: Documents) -> Embeddings:
        """Embed questions: float32 [shortlist_dim] each; errors as for passages."""
        return self._embed(input, "query")

    @staticmethod
    def name() -> str:
        """Return the name Chroma stores for this class: the module to import, as Chroma's error then says."""
        return "mrl_rag.index.embedding_function"

    def default_space(self) -> Space:
        """Return the metric that fits: cosine."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """Return what Chroma stores to make this again."""
        return {"folder": self._folder} | {key: getattr(self._config, key) for key in _STORED}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> TwoStageEmbeddingFunction:
        """Make this again from what `get_config` returned."""
        return TwoStageEmbeddingFunction(IndexConfig(**{key: config[key] for key in _STORED}), config["folder"])

    def _embed(self, texts: Documents, task: Task) -> Embeddings:
        config = self._config
        if not config.model:
            raise IndexMismatch(
                "texts can't be embedded for this collection: its two-stage index doesn't know its model. Search and "
                "write through TwoStageRetriever(encoder, ...), or pass embeddings."
            )
        project = self._projection()
        encoder = _encoder(config.model, config.fingerprint)
        return [np.array(row) for row in project(encoder.encode(texts, task, config.full_dim))]

    def _projection(self) -> Callable[[Float32Array], Float32Array]:
        config = self._config
        if not config.fitted:
            return lambda vectors: truncate(vectors, config.shortlist_dim)
        if not self._folder or config.precision == "float32":
            raise InvalidInput(
                "texts can't be embedded for this collection by Chroma alone: its two-stage index has rotated the "
                "vectors, and keeps the rotation on a server. Search through TwoStageIndex or TwoStageRetriever."
            )
        path = Path(self._folder) / f"archive-{config.archive}.lmdb"
        if not path.is_file():
            raise IndexMismatch(
                f"texts can't be embedded for this collection: its rotation is in {path}, which isn't there. If the "
                "folder was moved, TwoStageIndex(folder).reindex() stores where it is now."
            )
        archive = LmdbArchive(path, config.full_dim, config.precision, create=False)
        try:
            axes = archive.load_axes(config.rotation, config.shortlist_dim)
        finally:
            archive.close()
        return lambda vectors: unit_rows(vectors @ axes)


@lru_cache(maxsize=1)
def _encoder(model: str, fingerprint: str) -> MatryoshkaEncoder:
    # Chroma makes a new embedding function per call, so the model is kept here. It is imported by the package's front
    # door, as index/ knows no encoder.
    from mrl_rag import MatryoshkaEncoder

    try:
        encoder = MatryoshkaEncoder(model)
    except MrlRagError as error:
        raise IndexMismatch(
            f"the model {model!r}, which filled this collection, can't be made from its name: {error} Search and write "
            "through TwoStageRetriever(encoder, ...)."
        ) from error
    if encoder.fingerprint != fingerprint:
        raise IndexMismatch(
            f"this collection was filled by {model!r} with fingerprint {fingerprint}; made from its name it has "
            f"{encoder.fingerprint}: other files, prompts or maximum length. Search and write through "
            "TwoStageRetriever(encoder, ...)."
        )
    return encoder
