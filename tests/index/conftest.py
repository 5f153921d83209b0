import chromadb
import numpy as np
import pytest

from mrl_rag import TwoStageIndex


@pytest.fixture(params=["folder", "client_in_memory", "server"])
def open_index(request, tmp_path):
    """Open the same index repeatedly, in a folder, on a client in memory, or on a server."""
    name = f"docs-{np.random.default_rng().integers(2**60)}"
    if request.param == "folder":
        place = {"path": tmp_path / "db"}
    elif request.param == "client_in_memory":
        place = {"client": chromadb.EphemeralClient()}
    else:
        place = {"client": chromadb.HttpClient(port=request.getfixturevalue("chroma_server"))}
    return lambda **settings: TwoStageIndex(collection=name, **place, **settings)


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)


@pytest.fixture
def filled(open_index, vectors):
    index = open_index(full_dim=32, shortlist_dim=8)
    index.upsert(
        [f"id-{i}" for i in range(300)],
        vectors,
        documents=[f"text {i}" for i in range(300)],
        metadatas=[{"page": i, "even": i % 2 == 0} for i in range(300)],
    )
    return index
