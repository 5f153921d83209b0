"""langchain-chroma: the chromadb collection of its store, which it has no public name for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_core.vectorstores import VectorStore

from mrl_rag.errors import InvalidInput

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

TESTED = ">=1.0,<2"


def collection_of(existing: VectorStore | Collection) -> Collection:
    """Return the collection of a `langchain_chroma.Chroma`; a chromadb collection as it is.

    Raises:
        InvalidInput: it is neither, or this version keeps its collection elsewhere.
    """
    if not isinstance(existing, VectorStore):
        return existing
    collection: Collection | None = getattr(existing, "_collection", None)
    if collection is None:
        raise InvalidInput(
            f"the Chroma collection of {type(existing).__name__} isn't known; pass the collection itself, from "
            "chromadb's client.get_collection(name)."
        )
    return collection
