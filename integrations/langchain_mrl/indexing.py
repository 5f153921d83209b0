"""`MatryoshkaDocumentIndex`: a store as LangChain's `DocumentIndex`, which its indexing API also writes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.indexing import DeleteResponse, DocumentIndex, UpsertResponse

from langchain_mrl.retrievers import TwoStageRetriever
from mrl_rag.errors import InvalidIds


class MatryoshkaDocumentIndex(TwoStageRetriever, DocumentIndex):
    """A retriever that documents can be written to. LangChain calls this interface subject to change.

    documents = MatryoshkaDocumentIndex(vectorstore=store, k=10)
    index(loader, record_manager, documents, cleanup="full", key_encoder="sha256")
    documents.invoke("a question")
    """

    def upsert(self, items: Sequence[Document], /, **kwargs: Any) -> UpsertResponse:
        """Store documents; one whose id is there already is replaced whole.

        Args:
            items: documents; one without an id gets a new one.
            **kwargs: `batch_size` and `progress`, as for `MatryoshkaVectorStore.add_documents`.
        """
        return UpsertResponse(succeeded=self.vectorstore.add_documents(items, **kwargs), failed=[])

    async def aupsert(self, items: Sequence[Document], /, **kwargs: Any) -> UpsertResponse:
        """Store documents without blocking the event loop; see `upsert`."""
        return UpsertResponse(succeeded=await self.vectorstore.aadd_documents(items, **kwargs), failed=[])

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> DeleteResponse:
        """Remove documents; unknown ids are passed over.

        Args:
            ids: of the documents.
            **kwargs: not used; the base class asks for it.

        Raises:
            InvalidIds: there are no ids. `vectorstore.delete()` removes everything.
        """
        if ids is None:
            raise InvalidIds("ids is None; say which documents go, or call vectorstore.delete() for all.")
        gone = [document.id for document in self.vectorstore.get_by_ids(ids) if document.id]
        self.vectorstore.delete(gone)
        return DeleteResponse(succeeded=gone, num_deleted=len(gone), failed=[], num_failed=0)

    def get(self, ids: Sequence[str], /, **kwargs: Any) -> list[Document]:
        """Return documents in the order asked, unknown ids left out."""
        return self.vectorstore.get_by_ids(ids)
