"""`MatryoshkaReranker` and `TokenBudget`: what comes between any retriever of LlamaIndex and its language model."""

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
    """Stage two alone: nodes of any retriever, ordered by their cosine with the question at full dimension.

        reranker = MatryoshkaReranker(embed_model=MatryoshkaEmbedding(), top_n=5)
        index.as_query_engine(llm=llm, similarity_top_k=50, node_postprocessors=[reranker])

    The nodes' texts are embedded on each call, with the metadata that the model is to see.
    """

    embed_model: SerializeAsAny[BaseEmbedding] = Field(
        default_factory=lambda: Settings.embed_model, description="What embeds; any of LlamaIndex's."
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
            raise InvalidInput("there is no question to rank by; pass query_bundle or query_str.")
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
    """The best nodes that fit a language model's context, counted in its tokens.

        budget = TokenBudget(max_tokens=8000, reserve=1000)
        engine = index.as_query_engine(llm=llm, similarity_top_k=50, node_postprocessors=[budget])
        budget.pack(nodes).left_out                           # positions of the nodes that don't fit

    Nodes are taken in their order, each with the metadata that the language model sees; one that doesn't fit is passed
    over, but for the first, and the log "llama_index_mrl" says how many were left out. Works offline.

    Raises:
        InvalidInput: the numbers leave no room, or tiktoken knows no such encoding; on use.
        MissingExtra: tiktoken is not installed; on use.
    """

    max_tokens: int = Field(description="What the model takes in all.")
    reserve: int = Field(default=0, description="Tokens of it kept free for instructions, question and answer.")
    encoding: str | Callable[[str], int] = Field(
        default="o200k_base", description="tiktoken's name of an encoding or model, or a function that counts tokens."
    )

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex stores for this class."""
        return "TokenBudget"

    def pack(self, nodes: Sequence[NodeWithScore]) -> ContextFit:
        """Say which nodes fit, by position, which don't, and how many tokens those that do take."""
        return fit_to_context(_texts(nodes, MetadataMode.LLM), self.max_tokens, self.reserve, self.encoding)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        packed = self.pack(nodes)
        if packed.left_out:
            _LOG.info("%d of %d nodes fit; left out: %s", len(packed.kept), len(nodes), packed.left_out)
        return [nodes[position] for position in packed.kept]


def _texts(nodes: Sequence[NodeWithScore], mode: MetadataMode) -> list[str]:
    return [node.node.get_content(metadata_mode=mode) for node in nodes]
