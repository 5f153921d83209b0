"""mrl-rag under LangChain: `Embeddings`, `VectorStore`, retrievers and document compressors."""

from mrl_rag.extras import require

require("langchain_core", extra="langchain")

from langchain_mrl.compressors import MatryoshkaReranker, TokenBudget  # noqa: E402
from langchain_mrl.embeddings import MatryoshkaEmbeddings  # noqa: E402
from langchain_mrl.query_constructors import MatryoshkaTranslator  # noqa: E402
from langchain_mrl.retrievers import TwoStageRetriever  # noqa: E402
from langchain_mrl.vectorstores import MatryoshkaVectorStore  # noqa: E402

__all__ = [
    "MatryoshkaEmbeddings",
    "MatryoshkaReranker",
    "MatryoshkaTranslator",
    "MatryoshkaVectorStore",
    "TokenBudget",
    "TwoStageRetriever",
]
