"""Heads: learned linear maps after a model, which put what matters most into the first numbers of its vectors."""

from mrl_rag.heads.head import HeadCard, MatryoshkaHead

__all__ = ["HeadCard", "MatryoshkaHead"]
