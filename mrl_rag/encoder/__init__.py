"""Texts to vectors: loading, batching, pooling; remote encoders; a cache."""

from mrl_rag.encoder.base import Encoder
from mrl_rag.encoder.cache import CachedEncoder
from mrl_rag.encoder.encoder import MatryoshkaEncoder
from mrl_rag.encoder.loading import find_on_disk
from mrl_rag.encoder.nomic import NomicEncoder
from mrl_rag.encoder.openai import OpenAIEncoder

__all__ = ["CachedEncoder", "Encoder", "MatryoshkaEncoder", "NomicEncoder", "OpenAIEncoder", "find_on_disk"]
