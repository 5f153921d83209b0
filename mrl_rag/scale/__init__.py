"""Encoding a corpus on many machines (extra `ray`), and loading it into an index anywhere."""

from mrl_rag.scale.encoding import Encoded, encode_dataset
from mrl_rag.scale.loading import load

__all__ = ["Encoded", "encode_dataset", "load"]
