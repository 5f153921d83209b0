"""Node postprocessors: `MatryoshkaReranker` orders retrieved nodes, `TokenBudget` keeps those that fit a context."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.settings import Settings

from mrl_rag import ContextFit, fit_to_context, rank
from mrl_rag.errors import InvalidInput

_LOG = logging.getLogger("llama_index_mrl")
_DISPATCHER = get_dispatcher(__name__)


class MatryoshkaReranker(BaseNodePostprocessor):
    """Orders the nodes of any retriever by their cosine with the question, at full dimension.

        reranker = MatryoshkaReranker(embed_model=MatryoshkaEmbedding(), top_n=5)
        index.as_query_engine(llm=llm, similarity_top_k=50, node_postprocessors=[reranker])

    The nodes' texts are embedded on each call, with the metadata that their `get_content(MetadataMode.EMBED)` includes.
    """

    embed_model: SerializeAsAny[BaseEmbedding] = Field(
        default_factory=lambda: Settings.embed_model, description="Any embedding model of LlamaIndex."
    )
    top_n: int | None = Field(default=None, gt=0, description="How many nodes to keep; None for all.")

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex stores for this class."""
        return "MatryoshkaReranker"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = self._start(nodes, query_bundle)
        if not nodes:
            return []
        asked = query.embedding
        if asked is None:
            asked = self.embed_model.get_agg_embedding_from_queries(query.embedding_strs)
        return self._end(nodes, asked, self.embed_model.get_text_embedding_batch(_texts(nodes, MetadataMode.EMBED)))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = self._start(nodes, query_bundle)
        if not nodes:
            return []
        asked = query.embedding
        if asked is None:
            asked = await self.embed_model.aget_agg_embedding_from_queries(query.embedding_strs)
        texts = _texts(nodes, MetadataMode.EMBED)
        return self._end(nodes, asked, await self.embed_model.aget_text_embedding_batch(texts))

    def _start(self, nodes: list[NodeWithScore], query: QueryBundle | None) -> QueryBundle:
        if query is None:
            raise InvalidInput("there is no question to rank by; pass query_bundle= or query_str=.")
        top_n = len(nodes) if self.top_n is None else self.top_n
        _DISPATCHER.event(
            ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=self.embed_model.model_name)
        )
        return query

    def _end(
        self, nodes: list[NodeWithScore], query: Sequence[float], vectors: list[list[float]]
    ) -> list[NodeWithScore]:
        ranked = [NodeWithScore(node=nodes[row].node, score=score) for row, score in rank(query, vectors, self.top_n)]
        _DISPATCHER.event(ReRankEndEvent(nodes=ranked))
        return ranked


class TokenBudget(BaseNodePostprocessor):
    """Keeps the best nodes that fit a language model's context, counted in tokens.

        budget = TokenBudget(max_tokens=8000, reserve=1000)
        engine = index.as_query_engine(llm=llm, similarity_top_k=50, node_postprocessors=[budget])
        budget.fit(nodes).left_out                            # positions of the nodes that don't fit

    Nodes are taken in their order, each with the metadata that the language model sees. A node that doesn't fit is left
    out, and shorter ones after it may still fit; the first node is always kept. The logger "llama_index_mrl" reports
    how many were left out. Works offline.

    Raises:
        InvalidInput: on use, if `reserve` leaves no room or tiktoken has no such encoding.
        MissingExtra: on use, if tiktoken is not installed.
    """

    max_tokens: int = Field(description="Size of the model's context.")
    reserve: int = Field(default=0, description="Tokens to keep free for instructions, question and answer.")
    encoding: str | Callable[[str], int] = Field(
        default="o200k_base", description="tiktoken's name of an encoding or model, or a function that counts tokens."
    )

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex stores for this class."""
        return "TokenBudget"

    def fit(self, nodes: Sequence[NodeWithScore]) -> ContextFit:
        """Return the positions of the nodes that fit and of the others, and how many tokens are used."""
        return fit_to_context(_texts(nodes, MetadataMode.LLM), self.max_tokens, self.reserve, self.encoding)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        fit = self.fit(nodes)
        if fit.left_out:
            _LOG.info("%d of %d nodes fit; left out: %s", len(fit.kept), len(nodes), fit.left_out)
        return [nodes[position] for position in fit.kept]


def _texts(nodes: Sequence[NodeWithScore], mode: MetadataMode) -> list[str]:
    return [node.node.get_content(metadata_mode=mode) for node in nodes]
