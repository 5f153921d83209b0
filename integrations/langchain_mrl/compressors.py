"""Document compressors: `MatryoshkaReranker` orders documents, `TokenBudget` keeps those that fit a context."""

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
    """Orders the documents of any retriever by their cosine with the question, at full dimension.

    reranker = MatryoshkaReranker(embeddings=MatryoshkaEmbeddings(), top_n=5)
    reranker.compress_documents(documents, "a question")
    ContextualCompressionRetriever(base_compressor=reranker, base_retriever=bm25)
    """

    embeddings: Embeddings
    """Any LangChain embeddings; they embed the documents on each call."""
    top_n: int | None = None
    """How many documents to keep; None for all."""
    add_scores: bool = False
    """Return copies whose metadata has the cosine as "relevance_score"."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents, best first; those with equal cosines in the order given.

        Args:
            documents: n documents, in any order.
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
    """Keeps the best documents that fit a language model's context, counted in tokens.

        budget = TokenBudget(max_tokens=8000, reserve=1500)
        ContextualCompressionRetriever(base_compressor=budget, base_retriever=retriever)
        budget.compress_documents(documents, "a question")
        budget.fit(documents).left_out         # positions of those that don't fit

    Documents are taken in their order, best first. A document that doesn't fit is left out, and shorter ones after it
    may still fit; the first document is always kept. The logger "langchain_mrl" reports how many were left out.

    Raises:
        InvalidInput: `reserve` leaves no room, or tiktoken has no such encoding.
        MissingExtra: tiktoken is not installed.
    """

    max_tokens: int
    """Size of the model's context."""
    reserve: int = 0
    """Tokens to keep free for the instructions, the question and the answer."""
    encoding: str | Callable[[str], int] = "o200k_base"
    """tiktoken's name of an encoding or a model, or a function that returns the number of tokens of a string."""
    separator: str = "\n\n"
    """The text that will be put between two documents."""

    model_config = ConfigDict(extra="forbid")

    # Not a validator: pydantic would wrap these errors in one of its own.
    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.fit([])

    def fit(self, documents: Sequence[Document]) -> ContextFit:
        """Return the positions of the documents that fit and of the others, and how many tokens are used."""
        texts = [document.page_content for document in documents]
        return fit_to_context(texts, self.max_tokens, self.reserve, self.encoding, self.separator)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the documents that fit, in the order given.

        Args:
            documents: best first.
            query: not used; `reserve` has to have room for it.
            callbacks: not used; the base class asks for it.
        """
        fit = self.fit(documents)
        if fit.left_out:
            _LOG.info(
                "%d of %d documents left out: %d tokens of %d are taken",
                len(fit.left_out),
                len(documents),
                fit.tokens,
                self.max_tokens - self.reserve,
            )
        return [documents[row] for row in fit.kept]

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the documents that fit without blocking the event loop; see `compress_documents`."""
        return await run_in_executor(None, self.compress_documents, documents, query)
