"""Texts to vectors: loading, batching, pooling."""
