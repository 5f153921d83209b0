"""The collection of a two-stage index, used through Chroma itself."""

import subprocess
import sys

import chromadb
import numpy as np
import pytest
from chroma_mrl import MatryoshkaEmbeddingFunction

import mrl_rag.index.embedding_function
from mrl_rag import TwoStageIndex, TwoStageRetriever
from mrl_rag.errors import IndexMismatch, InvalidIds, InvalidInput

TEXTS = ["numpy.pad adds zeros around an array", "a thread pool runs functions", "json reads and writes text"]
# Enough random texts to fit a rotation on.
OTHERS = [f"{a} {b} {c}" for a in ("red", "old", "tall") for b in ("cat", "house", "tree") for c in ("eats", "falls")]


@pytest.fixture
def fitted(tmp_path, minilm):
    """The folder of an index whose shortlist keeps 16 rotated coordinates of 384."""
    with TwoStageRetriever(minilm, TwoStageIndex(tmp_path, shortlist_dim=16)) as retriever:
        retriever.index_texts([*TEXTS, *OTHERS], ids=[str(row) for row in range(len(TEXTS) + len(OTHERS))])
        retriever.index.reindex(rotation="fit")
        retriever.index.close()
    return tmp_path


@pytest.fixture
def collection(fitted):
    return chromadb.PersistentClient(fitted).get_collection("docs")


@pytest.mark.usefixtures("default_dtype")
def test_chroma_embeds_texts_as_a_fitted_index_does(fitted, collection, minilm, cosine_distance):
    found = collection.query(query_texts=["how do I run something in the background?", "parse json"], n_results=1)
    assert found["ids"] == [["1"], ["2"]]
    collection.update(ids=["0"], documents=TEXTS[:1])
    with TwoStageIndex(fitted) as index:
        stored = collection.get(ids=["0"], include=["embeddings"])["embeddings"]
        expected = index._session.opened.stores.project(minilm.encode_documents(TEXTS[:1]))
    assert cosine_distance(stored, expected).max() < 1e-3


def test_an_embedding_function_that_does_not_rotate_is_refused_by_chroma(fitted):
    with pytest.raises(ValueError, match=r"mrl-rag vs persisted: mrl_rag.index.embedding_function"):
        chromadb.PersistentClient(fitted).get_collection("docs", embedding_function=MatryoshkaEmbeddingFunction(dim=16))


def test_a_process_without_this_package_is_refused_and_told_what_to_import(fitted):
    code = (
        f"import chromadb; chromadb.PersistentClient({str(fitted)!r}).get_collection('docs').query(query_texts=['a'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Embedding function mrl_rag.index.embedding_function not found" in ended.stderr


@pytest.mark.usefixtures("default_dtype")
def test_where_the_model_or_the_archive_is_not_there_chroma_is_refused(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(40, 384))
    ids = [str(row) for row in range(40)]
    for name, settings, said in (
        ("unknown", {}, "doesn't know its model"),
        ("elsewhere", {"model": "no-such-model", "fingerprint": "ab"}, "can't be made from its name"),
        ("changed", {"model": "minilm", "fingerprint": "ab"}, "with fingerprint ab; made from its name it has"),
    ):
        with TwoStageIndex(tmp_path, name, shortlist_dim=16, **settings) as index:
            index.upsert(ids, vectors)
            with pytest.raises(IndexMismatch, match=said):
                index.client.get_collection(name).query(query_texts=["a"])


@pytest.mark.usefixtures("default_dtype")
def test_after_a_folder_was_moved_a_rebuild_tells_chroma_where_it_is(fitted, tmp_path):
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    fitted.rename(moved)
    with TwoStageIndex(moved) as index:
        with pytest.raises(IndexMismatch, match="If the folder was moved"):
            index.client.get_collection("docs").query(query_texts=["threads"])
        index.reindex()
        assert index.client.get_collection("docs").query(query_texts=["threads"], n_results=1)["ids"] == [["1"]]


def test_chroma_cannot_embed_for_an_index_with_a_rotation_on_a_server(chroma_server, minilm):
    client = chromadb.HttpClient(port=chroma_server)
    name = f"docs-{np.random.default_rng().integers(2**60)}"
    retriever = TwoStageRetriever(minilm, TwoStageIndex(collection=name, client=client, shortlist_dim=16))
    retriever.index_texts([*TEXTS, *OTHERS])
    retriever.index.reindex(rotation="fit")
    with pytest.raises(InvalidInput, match="keeps the rotation on a server"):
        client.get_collection(name).query(query_texts=["a"])


@pytest.mark.usefixtures("default_dtype")
def test_a_collection_that_was_taken_over_and_one_whose_model_came_later_are_embedded_for_too(tmp_path, minilm):
    with TwoStageIndex(tmp_path) as index:
        index.collection(create=True)
        index.upsert(["1"], minilm.encode_documents(TEXTS[1:2]), TEXTS[1:2])
        TwoStageRetriever(minilm, index).index_texts(TEXTS[::2])
        assert index.client.get_collection("docs").query(query_texts=["threads"], n_results=1)["ids"] == [["1"]]


def test_a_users_own_embedding_function_stays_with_the_collection(tmp_path):
    with TwoStageIndex(tmp_path) as index:
        index.client.create_collection("docs")
        index.upsert(["a"], np.ones((1, 384)))
        assert index.collection().configuration_json["embedding_function"]["name"] == "default"


def test_the_module_to_import_is_the_name_chroma_stores():
    stored = mrl_rag.index.embedding_function.TwoStageEmbeddingFunction.name()
    assert stored == mrl_rag.index.embedding_function.__name__


def test_a_vector_is_reused_only_for_the_text_it_is_of(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(3, 16))
    with TwoStageIndex(tmp_path) as index:
        index.upsert(["a", "b", "c"], vectors, ["one", "two", "three"])
        plain = chromadb.PersistentClient(tmp_path).get_collection("docs", embedding_function=None)
        plain.update(ids=["b"], documents=["changed"], embeddings=np.ones((1, index.shortlist_dim)))
        found = index.vectors_of(["a", "b", "c", "d"], ["one", "changed", "other", "four"])
        assert list(found) == ["a"]
        np.testing.assert_array_equal(found["a"], index.get(["a"])[0].vector)
        with pytest.raises(InvalidIds, match="2 ids and 1 documents"):
            index.vectors_of(["a", "b"], ["one"])
