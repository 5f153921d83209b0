"""mrl-rag under plain Chroma: an `EmbeddingFunction`."""

from chroma_mrl.embedding_functions import MatryoshkaEmbeddingFunction

__all__ = ["MatryoshkaEmbeddingFunction"]
