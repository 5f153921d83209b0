"""A Matryoshka text encoder and a two-stage retriever over Chroma."""

from mrl_rag.truncation import truncate

__version__ = "0.1.0"

__all__ = ["truncate"]
