"""`TwoStageRetriever`: a two-stage search as LangChain's `BaseRetriever`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForRetrieverRun,
    CallbackManager,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, LangSmithRetrieverParams
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict

from langchain_mrl.vectorstores import MatryoshkaVectorStore
from mrl_rag import Hit, Plan
from mrl_rag.arguments import check_names
from mrl_rag.errors import InvalidInput, InvalidPlan

_OVERRIDES = {"k", "plan", "filter", "where_document", "score_threshold", "add_scores"}


class TwoStageRetriever(BaseRetriever):
    """The nearest documents of a store, with the plan of the search as a field.

        retriever = TwoStageRetriever(vectorstore=store, k=10)
        retriever = TwoStageRetriever(vectorstore=store, plan=Plan(dims=(96, 384), sizes=(200,)))
        retriever.invoke("a question", k=3, filter={"page": 1})     # for this call only
        retriever.invoke("a question", filter=None)                 # without the retriever's own filter
        retriever.batch(["a question", "another"])                  # embedded and searched together

    Every field but `vectorstore` may be given to `invoke`, `batch` and their async forms as well. `batch` embeds all
    its questions in one call and searches once; callbacks see a run a question, as always. Where one question fails
    with `return_exceptions=True`, each is searched alone.
    """

    vectorstore: MatryoshkaVectorStore
    """Where to search."""
    k: int = 4
    """How many documents at most; 4 as in LangChain's `similarity_search`."""
    plan: Plan | None = None
    """Dimensions and shortlist sizes; None for the index's default."""
    filter: dict[str, Any] | None = None
    """Condition on metadata, a plain dict or Chroma's operators."""
    where_document: dict[str, Any] | None = None
    """Condition on the text, Chroma's operators."""
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
        """Find documents for many questions, embedded and searched together.

        Args:
            inputs: n questions.
            config: one for all, or one a question.
            return_exceptions: put a question's error in its place instead of raising it.
            **kwargs: fields to override.

        Returns:
            n lists of documents, best first.
        """
        configs = get_config_list(config, len(inputs))
        runs = [
            CallbackManager.configure(**self._tracing(each, kwargs)).on_retriever_start(
                None, query, name=each.get("run_name") or self.get_name(), run_id=each.get("run_id")
            )
            for query, each in zip(inputs, configs, strict=True)
        ]
        outcomes: list[list[Document] | Exception]
        try:
            outcomes = [*self._find(inputs, kwargs)] if inputs else []
        except Exception as error:
            outcomes = [self._find_one(query, kwargs) if return_exceptions else error for query in inputs]
        for run, outcome in zip(runs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                run.on_retriever_error(outcome)
            else:
                run.on_retriever_end(outcome)
        return _answers(outcomes, return_exceptions)

    async def abatch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Find documents for many questions without blocking the event loop; see `batch`."""
        configs = get_config_list(config, len(inputs))
        runs = await asyncio.gather(
            *(
                AsyncCallbackManager.configure(**self._tracing(each, kwargs)).on_retriever_start(
                    None, query, name=each.get("run_name") or self.get_name(), run_id=each.get("run_id")
                )
                for query, each in zip(inputs, configs, strict=True)
            )
        )
        outcomes: list[list[Document] | Exception]
        try:
            outcomes = [*await self._afind(inputs, kwargs)] if inputs else []
        except Exception as error:
            outcomes = [await self._afind_one(query, kwargs) if return_exceptions else error for query in inputs]
        await asyncio.gather(
            *(
                run.on_retriever_error(outcome) if isinstance(outcome, Exception) else run.on_retriever_end(outcome)
                for run, outcome in zip(runs, outcomes, strict=True)
            )
        )
        return _answers(outcomes, return_exceptions)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return self._find([query], kwargs)[0]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return (await self._afind([query], kwargs))[0]

    def _get_ls_params(self, **kwargs: Any) -> LangSmithRetrieverParams:
        params = super()._get_ls_params(**kwargs)
        params["ls_vector_store_provider"] = type(self.vectorstore).__name__
        embeddings = self.vectorstore.embeddings
        if embeddings is not None:
            params["ls_embedding_provider"] = type(embeddings).__name__
            params["ls_embedding_model"] = getattr(embeddings, "model", None) or getattr(embeddings, "model_name", None)
        return params

    def _tracing(self, config: RunnableConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
        # As BaseRetriever.invoke does.
        return {
            "inheritable_callbacks": config.get("callbacks"),
            "inheritable_tags": config.get("tags"),
            "local_tags": self.tags,
            "inheritable_metadata": {**(config.get("metadata") or {}), **self._get_ls_params(**kwargs)},
            "local_metadata": self.metadata,
        }

    def _settings(self, overrides: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        check_names(overrides, _OVERRIDES, "TwoStageRetriever.invoke")
        settings = {name: overrides.get(name, getattr(self, name)) for name in _OVERRIDES}
        add_scores = settings.pop("add_scores")
        return add_scores, settings | {"explain": add_scores}

    def _find(self, queries: Sequence[str], overrides: dict[str, Any]) -> list[list[Document]]:
        add_scores, settings = self._settings(overrides)
        return [_documents(hits, add_scores) for hits in self.vectorstore.search_hits(queries, **settings)]

    async def _afind(self, queries: Sequence[str], overrides: dict[str, Any]) -> list[list[Document]]:
        add_scores, settings = self._settings(overrides)
        return [_documents(hits, add_scores) for hits in await self.vectorstore.asearch_hits(queries, **settings)]

    def _find_one(self, query: str, overrides: dict[str, Any]) -> list[Document] | Exception:
        try:
            return self._find([query], overrides)[0]
        except Exception as error:
            return error

    async def _afind_one(self, query: str, overrides: dict[str, Any]) -> list[Document] | Exception:
        try:
            return (await self._afind([query], overrides))[0]
        except Exception as error:
            return error


def _documents(hits: list[Hit], add_scores: bool) -> list[Document]:
    return [
        Document(
            id=hit.id,
            page_content=hit.document or "",
            metadata=hit.metadata
            | ({"relevance_score": hit.score, "stage_ranks": [s.rank for s in hit.stages]} if add_scores else {}),
        )
        for hit in hits
    ]


def _answers(outcomes: list[list[Document] | Exception], return_exceptions: bool) -> list[list[Document]]:
    failed = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
    if failed is not None and not return_exceptions:
        raise failed
    return outcomes  # type: ignore[return-value]
