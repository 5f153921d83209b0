"""What happens to documents after they are found, as LangChain's `BaseDocumentCompressor`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import run_in_executor
from pydantic import ConfigDict

from mrl_rag import ContextFit, fit_to_context, rank

_LOG = logging.getLogger("langchain_mrl")


class MatryoshkaReranker(BaseDocumentCompressor):
    """Orders the documents of any retriever by their cosine with the question: stage two alone.

    reranker = MatryoshkaReranker(embeddings=MatryoshkaEmbeddings(), top_n=5)
    reranker.compress_documents(documents, "a question")
    ContextualCompressionRetriever(base_compressor=reranker, base_retriever=bm25)
    """

    embeddings: Embeddings
    """Any LangChain embeddings; each call embeds the documents it is given."""
    top_n: int | None = None
    """How many documents to keep; None for all."""
    add_scores: bool = False
    """Return copies with the cosine in their metadata, as "relevance_score"."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents, best first; equal ones in the order given.

        Args:
            documents: of any retriever.
            query: the question.
            callbacks: not used; the base class asks for it.

        Raises:
            InvalidPlan: `top_n` is less than 1.
        """
        if not documents:
            return []
        vectors = self.embeddings.embed_documents([document.page_content for document in documents])
        return self._best(documents, self.embeddings.embed_query(query), vectors)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents without blocking the event loop; see `compress_documents`."""
        if not documents:
            return []
        asked, vectors = await asyncio.gather(
            self.embeddings.aembed_query(query),
            self.embeddings.aembed_documents([document.page_content for document in documents]),
        )
        return self._best(documents, asked, vectors)

    def _best(
        self, documents: Sequence[Document], query: Sequence[float], vectors: Sequence[Sequence[float]]
    ) -> list[Document]:
        best = rank(query, vectors, self.top_n)
        if not self.add_scores:
            return [documents[row] for row, _ in best]
        return [
            documents[row].model_copy(update={"metadata": {**documents[row].metadata, "relevance_score": score}})
            for row, score in best
        ]


class TokenBudget(BaseDocumentCompressor):
    """Keeps the best documents that fit a language model's context, counted in its tokens.

        budget = TokenBudget(max_tokens=8000, reserve=1500)
        ContextualCompressionRetriever(base_compressor=budget, base_retriever=retriever)
        budget.compress_documents(documents, "a question")
        budget.pack(documents).left_out        # positions of those that did not fit

    Documents come in the order of their rank. One that doesn't fit is left out and the next ones are still tried; the
    first is kept, however long. What is left out is logged by "langchain_mrl". The documents are not changed.

    Raises:
        InvalidInput: the numbers leave no room, or tiktoken knows no such encoding.
        MissingExtra: tiktoken is not installed.
    """

    max_tokens: int
    """What the model takes in all."""
    reserve: int = 0
    """Tokens of it kept free for the instructions, the question and the answer."""
    encoding: str | Callable[[str], int] = "o200k_base"
    """Of tiktoken, by its own name or a model's; or a function that counts the tokens of a string."""
    separator: str = "\n\n"
    """What will stand between two documents."""

    model_config = ConfigDict(extra="forbid")

    # Not a validator: pydantic would hide the errors of this package in one of its own.
    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.pack([])

    def pack(self, documents: Sequence[Document]) -> ContextFit:
        """Say which documents fit, which don't, and how many tokens they take."""
        texts = [document.page_content for document in documents]
        return fit_to_context(texts, self.max_tokens, self.reserve, self.encoding, self.separator)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the documents that fit, in the order given.

        Args:
            documents: best first.
            query: not used; count it into `reserve`.
            callbacks: not used; the base class asks for it.
        """
        packed = self.pack(documents)
        if packed.left_out:
            _LOG.info(
                "%d of %d documents left out: %d tokens of %d are taken",
                len(packed.left_out),
                len(documents),
                packed.tokens,
                self.max_tokens - self.reserve,
            )
        return [documents[row] for row in packed.kept]

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the documents that fit without blocking the event loop; see `compress_documents`."""
        return await run_in_executor(None, self.compress_documents, documents, query)
