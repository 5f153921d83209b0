"""LangChain adapters of mrl-rag."""
