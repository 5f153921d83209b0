"""Chroma Cloud takes 300 records per request. Here a real server, with a client that refuses more, stands in for it."""

import chromadb
import numpy as np
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.index import shortlist


class Strict:
    """A client's connection to the server, with the limits of Chroma Cloud."""

    def __init__(self, server):
        self._server = server

    def __getattr__(self, name):
        method = getattr(self._server, name)
        if name not in ("_get", "_query", "_upsert", "_delete", "list_collections"):
            return method

        def checked(*arguments, **settings):
            for key in ("ids", "limit", "n_results", "offset"):
                value = settings.get(key)
                size = len(value) if isinstance(value, list) else 0 if key == "offset" else value
                assert size is None or size <= 300, f"{name}({key}) is {size}"
            if name == "_get" and settings.get("ids") is None:
                assert settings.get("limit") is not None, "a limit is due"
            return method(*arguments, **settings)

        return checked


@pytest.fixture
def cloud(chroma_server, monkeypatch):
    monkeypatch.setattr(shortlist, "_CLOUD_HOST", "localhost")
    client = chromadb.HttpClient(port=chroma_server)
    client._server = Strict(client._server)
    return client


def test_an_index_keeps_within_the_quota(cloud):
    vectors = np.random.default_rng(0).normal(size=(800, 32)).astype(np.float32)
    ids = [f"id-{row:04}" for row in range(800)]
    name = f"docs-{np.random.default_rng().integers(2**60)}"
    index = TwoStageIndex(client=cloud, collection=name, shortlist_dim=8, rotation="none")
    index.upsert(ids, vectors, [f"text {row}" for row in range(800)], [{"half": row % 2} for row in range(800)])
    assert len(index) == 800
    assert index.search(vectors[7:8], k=100)[0][0].id == "id-0007"
    assert len(index.search(vectors[:1], k=5, where={"half": 0})[0]) == 5
    assert [record.id for record in index.get(where={"half": 1}, limit=400)] == ids[1:800:2]
    index.upsert(ids[:400], vectors[400:800])
    assert index.changed(ids, [None] * 400 + [f"text {row}" for row in range(400, 800)]) == list(range(400, 800))
    assert index.verify().ok
    index.reindex(shortlist_dim=16, rotation="fit")
    index.delete(where={"half": 0})
    assert index.repair().ok
    assert len(index) == 600
    copy = TwoStageIndex.from_chroma(plain(cloud, vectors), client=cloud, shortlist_dim=8)
    assert len(copy) == 700


def plain(client, vectors):
    collection = client.create_collection(f"plain-{np.random.default_rng().integers(2**60)}", embedding_function=None)
    for start in range(0, 700, 300):
        rows = range(start, min(start + 300, 700))
        collection.upsert(ids=[str(row) for row in rows], embeddings=vectors[rows.start : rows.stop])
    return collection
