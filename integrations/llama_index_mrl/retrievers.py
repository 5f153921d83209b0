"""`TwoStageRetriever`: a two-stage search as LlamaIndex's `BaseRetriever`."""

from __future__ import annotations

from inspect import signature
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.constants import DEFAULT_SIMILARITY_TOP_K
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.settings import Settings
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryResult

from llama_index_mrl.embeddings import fingerprint_of, name_of
from llama_index_mrl.vector_stores import MatryoshkaVectorStore
from mrl_rag import Plan
from mrl_rag.arguments import check_names
from mrl_rag.binding import bind_model
from mrl_rag.errors import InvalidInput, InvalidPlan


class TwoStageRetriever(BaseRetriever):
    """The nearest nodes of a store, with the plan of the search as an argument.

        retriever = TwoStageRetriever(vector_store=store, embed_model=embed_model, similarity_top_k=10)
        retriever.retrieve("a question")
        RetrieverQueryEngine.from_args(retriever, llm=llm)

    Args:
        vector_store: where to search.
        embed_model: what embeds the question; None for `Settings.embed_model`.
        similarity_top_k: how many nodes at most; LlamaIndex's default, 2.
        plan: dimensions and shortlist sizes; None for the index's default.
        filters: conditions on metadata.
        **kwargs: `BaseRetriever`'s own.

    Raises:
        InvalidInput: `vector_store` or `embed_model` is something else, or there is no such argument.
        InvalidPlan: `plan` is not a `Plan`.
        IndexMismatch: another model than `embed_model` filled the store.
    """

    def __init__(
        self,
        vector_store: MatryoshkaVectorStore,
        embed_model: BaseEmbedding | None = None,
        similarity_top_k: int = DEFAULT_SIMILARITY_TOP_K,
        plan: Plan | None = None,
        filters: MetadataFilters | None = None,
        **kwargs: Any,
    ) -> None:
        check_names(
            kwargs, signature(TwoStageRetriever).parameters | signature(BaseRetriever).parameters, "TwoStageRetriever"
        )
        if not isinstance(vector_store, MatryoshkaVectorStore):
            raise InvalidInput(f"vector_store is {vector_store!r}; it must be a MatryoshkaVectorStore.")
        if not isinstance(embed_model, BaseEmbedding | None):
            raise InvalidInput(f"embed_model is {embed_model!r}; it must be a BaseEmbedding of LlamaIndex.")
        if not isinstance(plan, Plan | None):
            raise InvalidPlan(f"plan is {plan!r}; it must be a Plan, as in plan=Plan(dims=(96, 384), sizes=(200,)).")
        embed_model = embed_model or Settings.embed_model
        name = vector_store.model_name or name_of(embed_model)
        bind_model(vector_store.index, name, fingerprint_of(embed_model), "model_name")
        self._vector_store = vector_store
        self._embed_model = embed_model
        self._similarity_top_k = similarity_top_k
        self._plan = plan
        self._filters = filters
        super().__init__(**kwargs)

    def __repr__(self) -> str:
        return (
            f"TwoStageRetriever({self._vector_store!r}, similarity_top_k={self._similarity_top_k}, plan={self._plan})"
        )

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = query_bundle.embedding
        if vector is None:
            vector = self._embed_model.get_agg_embedding_from_queries(query_bundle.embedding_strs)
        return _scored(self._vector_store.query(self._query(vector), plan=self._plan))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = query_bundle.embedding
        if vector is None:
            vector = await self._embed_model.aget_agg_embedding_from_queries(query_bundle.embedding_strs)
        return _scored(await self._vector_store.aquery(self._query(vector), plan=self._plan))

    def _query(self, vector: list[float]) -> VectorStoreQuery:
        return VectorStoreQuery(query_embedding=vector, similarity_top_k=self._similarity_top_k, filters=self._filters)


def _scored(result: VectorStoreQueryResult) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=node, score=score)
        for node, score in zip(result.nodes or [], result.similarities or [], strict=True)
    ]
