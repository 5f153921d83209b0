"""LlamaIndex adapters of mrl-rag."""
