"""mrl-rag under LlamaIndex: `BaseEmbedding`, a vector store, a retriever and two node postprocessors."""

from mrl_rag.extras import require

require("llama_index.core", extra="llama-index")

from llama_index_mrl.embeddings import MatryoshkaEmbedding  # noqa: E402
from llama_index_mrl.postprocessors import MatryoshkaReranker, TokenBudget  # noqa: E402
from llama_index_mrl.retrievers import TwoStageRetriever  # noqa: E402
from llama_index_mrl.vector_stores import MatryoshkaVectorStore  # noqa: E402

__all__ = ["MatryoshkaEmbedding", "MatryoshkaReranker", "MatryoshkaVectorStore", "TokenBudget", "TwoStageRetriever"]
