"""`TwoStageRetriever`: a two-stage search as LangChain's `BaseRetriever`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from pydantic import ConfigDict

from langchain_mrl.vectorstores import MatryoshkaVectorStore
from mrl_rag import Hit, Plan
from mrl_rag.arguments import check_names
from mrl_rag.errors import InvalidInput, InvalidPlan

_OVERRIDES = ("k", "plan", "filter", "where_document", "score_threshold", "add_scores")

# Question -> hits, where `batch` has found them already.
Answers = Mapping[str, list[Hit]]


class TwoStageRetriever(BaseRetriever):
    """The nearest documents of a store, with the plan of the search as a field.

        retriever = TwoStageRetriever(vectorstore=store, k=10)
        retriever = TwoStageRetriever(vectorstore=store, plan=Plan(dims=(96, 384), sizes=(200,)))
        retriever.invoke("a question", k=3, filter={"page": 1})     # for this call only
        retriever.invoke("a question", filter=None)                 # without the retriever's own filter
        retriever.batch(["a question", "another"])                  # embedded and searched together

    Every field but `vectorstore` may be given to `invoke`, `batch` and their async forms as well. `batch` embeds its
    questions in one call and searches once; callbacks still see one run per question.

    Raises:
        InvalidInput: there is no such field, or `vectorstore` is something else.
        InvalidPlan: `plan` is not a `Plan`.
    """

    vectorstore: MatryoshkaVectorStore
    """Where to search."""
    k: int = 4
    """How many documents at most; 4 as in LangChain's `similarity_search`."""
    plan: Plan | None = None
    """Dimensions and shortlist sizes; None for the index's default."""
    filter: dict[str, Any] | None = None
    """Condition on metadata, as for `MatryoshkaVectorStore`."""
    where_document: dict[str, Any] | None = None
    """Condition on the text, in Chroma's language."""
    score_threshold: float | None = None
    """Leave out documents with a lower cosine; None for all."""
    add_scores: bool = False
    """Add to each document's metadata "relevance_score", its cosine, and "stage_ranks", its rank at each stage."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    # Not a validator: pydantic would wrap these errors in one of its own.
    def __init__(self, **fields: Any) -> None:
        check_names(fields, type(self).model_fields, "TwoStageRetriever")
        if not isinstance(store := fields.get("vectorstore"), MatryoshkaVectorStore):
            raise InvalidInput(f"vectorstore is {store!r}; it must be a MatryoshkaVectorStore.")
        if not isinstance(plan := fields.get("plan"), Plan | None):
            raise InvalidPlan(f"plan is {plan!r}; it must be a Plan, as in plan=Plan(dims=(96, 384), sizes=(200,)).")
        super().__init__(**fields)

    def batch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Find documents for many questions, which are embedded and searched together.

        Args:
            inputs: n questions.
            config: one for all, or one per question.
            return_exceptions: put a question's error in its place instead of raising it.
            **kwargs: fields to override.

        Returns:
            n lists of documents, best first.
        """
        # LangChain's own `batch` encodes one question at a time, which takes two to four times the processor time.
        # If it fails, each question is searched by itself below, and only the bad ones have an error.
        answers: Answers = {}
        with suppress(Exception):
            if inputs:
                hits = self.vectorstore.search_hits(inputs, **self._settings(kwargs))
                answers = dict(zip(inputs, hits, strict=True))
        more = kwargs | {"answers": answers}
        return super().batch(inputs, config, return_exceptions=return_exceptions, **more)

    async def abatch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Find documents for many questions without blocking the event loop; see `batch`."""
        answers: Answers = {}
        with suppress(Exception):
            if inputs:
                hits = await self.vectorstore.asearch_hits(inputs, **self._settings(kwargs))
                answers = dict(zip(inputs, hits, strict=True))
        more = kwargs | {"answers": answers}
        return await super().abatch(inputs, config, return_exceptions=return_exceptions, **more)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        answers: Answers | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        settings = self._settings(kwargs)
        hits = answers[query] if answers else self.vectorstore.search_hits([query], **settings)[0]
        return _documents(hits, settings)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        answers: Answers | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        settings = self._settings(kwargs)
        hits = answers[query] if answers else (await self.vectorstore.asearch_hits([query], **settings))[0]
        return _documents(hits, settings)

    def _settings(self, overrides: dict[str, Any]) -> dict[str, Any]:
        check_names(overrides, _OVERRIDES, "TwoStageRetriever.invoke")
        settings = {name: overrides.get(name, getattr(self, name)) for name in _OVERRIDES}
        return settings | {"explain": settings.pop("add_scores")}


def _documents(hits: list[Hit], settings: Mapping[str, Any]) -> list[Document]:
    found = []
    for hit in hits:
        scores = {"relevance_score": hit.score, "stage_ranks": [stage.rank for stage in hit.stages]}
        metadata = hit.metadata | (scores if settings["explain"] else {})
        found.append(Document(id=hit.id, page_content=hit.document or "", metadata=metadata))
    return found
