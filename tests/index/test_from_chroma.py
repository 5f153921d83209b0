"""A Chroma collection of full vectors is copied into a two-stage index without encoding."""

import chromadb
import numpy as np
import pytest

from mrl_rag import TwoStageIndex, truncate
from mrl_rag.errors import IndexMismatch, InvalidInput


@pytest.fixture(params=["memory", "folder", "server"])
def client(request, tmp_path, keep_highest_row):
    if request.param == "folder":
        yield chromadb.PersistentClient(tmp_path / "chroma")
        return
    in_memory = request.param == "memory"
    client = (
        chromadb.EphemeralClient() if in_memory else chromadb.HttpClient(port=request.getfixturevalue("chroma_server"))
    )
    before = {collection.name for collection in client.list_collections()}
    yield client
    # The more collections a client has, the longer each write takes.
    added = {collection.name for collection in client.list_collections()} - before
    keep_highest_row(client)
    for name in added:
        client.delete_collection(name)


@pytest.fixture
def single(client, vectors):
    name = f"single-{np.random.default_rng().integers(2**60)}"
    collection = client.create_collection(name, configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)
    collection.upsert(
        ids=[f"id-{i}" for i in range(120)],
        embeddings=vectors[:120] * 3,
        documents=[f"text {i}" if i else None for i in range(120)],
        metadatas=[{"page": i} if i else None for i in range(120)],
    )
    return collection


def check(index, vectors):
    assert len(index) == 120
    assert index.verify().ok
    first, second = index.get(["id-0", "id-1"])
    assert (first.document, first.metadata, second.document, second.metadata) == (None, {}, "text 1", {"page": 1})
    np.testing.assert_allclose(second.vector, truncate(vectors[1:2], 32)[0], atol=1e-3)
    assert index.search(vectors[5:6], k=1)[0][0].id == "id-5"


def test_a_copy_into_another_folder(single, vectors, tmp_path):
    check(TwoStageIndex.from_chroma(single, tmp_path / "db", shortlist_dim=8), vectors)
    check(TwoStageIndex(tmp_path / "db", collection=single.name), vectors)
    assert single.count() == 120


def test_a_copy_on_the_same_client(single, client, vectors):
    check(TwoStageIndex.from_chroma(single, client=client, shortlist_dim=8), vectors)
    check(TwoStageIndex(client=client, collection=f"{single.name}-two-stage"), vectors)
    assert single.count() == 120


def test_a_copy_into_the_folder_of_the_collection(single, vectors, tmp_path):
    client = chromadb.PersistentClient(tmp_path / "chroma")
    mine = client.get_or_create_collection("mine", embedding_function=None)
    mine.upsert(
        **{
            k: v
            for k, v in single.get(include=["embeddings", "documents", "metadatas"]).items()
            if k in ("ids", "embeddings", "documents", "metadatas")
        }
    )
    again = f"{tmp_path}/../{tmp_path.name}/chroma"
    check(TwoStageIndex.from_chroma(mine, again), vectors)
    check(TwoStageIndex(tmp_path / "chroma", "mine-two-stage"), vectors)
    check(TwoStageIndex.from_chroma(mine, again, in_place=True), vectors)
    check(TwoStageIndex(tmp_path / "chroma", "mine"), vectors)


@pytest.mark.parametrize("given", [True, False])
def test_a_copy_in_place_keeps_the_old_collection_under_another_name(single, client, vectors, given):
    name = single.name
    check(TwoStageIndex.from_chroma(single, **({"client": client} if given else {}), in_place=True), vectors)
    check(TwoStageIndex(client=client, collection=name), vectors)
    assert client.get_collection(f"{name}-single-stage").count() == 120


def test_an_interrupted_copy_is_continued(single, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr("mrl_rag.index.shortlist._PAGE", 40)
    upsert, copied = TwoStageIndex.upsert, []

    def stop(self, ids, *rest):
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(ids)
        upsert(self, ids, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(TwoStageIndex, "upsert", stop)
        with pytest.raises(KeyboardInterrupt):
            TwoStageIndex.from_chroma(single, tmp_path / "db")
    index = TwoStageIndex(tmp_path / "db", collection=single.name)
    assert len(index) == 80
    index.close()
    check(TwoStageIndex.from_chroma(single, tmp_path / "db"), vectors)


def test_contradictory_arguments_are_refused(single, client, vectors, tmp_path):
    for arguments in ({"path": tmp_path / "other"}, {"client": client, "name": "other"}, {"name": "other"}):
        with pytest.raises(InvalidInput, match="in_place"):
            TwoStageIndex.from_chroma(single, **arguments, in_place=True)
    index = TwoStageIndex.from_chroma(single, client=client)
    with pytest.raises(IndexMismatch, match="two-stage index"):
        TwoStageIndex.from_chroma(client.get_collection(f"{single.name}-two-stage"))
    assert len(index) == 120
