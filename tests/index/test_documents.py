"""Documents read from Chroma's file are those that Chroma itself returns, or Chroma is asked."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import chromadb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl_rag import TwoStageIndex
from mrl_rag.index import documents
from mrl_rag.index.documents import DocumentReader, migrations_digest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = [TEXT, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans()]
LISTS = [st.lists(scalar, min_size=1, max_size=3) for scalar in SCALARS]
KEYS = TEXT.filter(lambda key: key and not key.startswith(("chroma:", "#", "$")) and "\0" not in key)
METADATA = st.one_of(st.none(), st.dictionaries(KEYS, st.one_of(*SCALARS, *LISTS), max_size=4))
RECORDS = st.dictionaries(
    TEXT.filter(lambda id_: id_ and "\0" not in id_), st.tuples(st.one_of(st.none(), TEXT), METADATA), max_size=5
)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chroma")
    collection = chromadb.PersistentClient(folder).create_collection("docs", embedding_function=None)
    return folder, collection


def as_chroma_returns(collection, ids):
    answer = collection.get(ids=list(ids), include=["documents", "metadatas"])
    pairs = zip(answer["documents"], answer["metadatas"], strict=True)
    return {
        id_: (document, dict(metadata or {})) for id_, (document, metadata) in zip(answer["ids"], pairs, strict=True)
    }


def typed(records):
    """Add the type to each value: 1, 1.0 and True are equal."""
    return {
        id_: (document, {key: (repr(value), type(value)) for key, value in metadata.items()})
        for id_, (document, metadata) in records.items()
    }


@settings(max_examples=60, deadline=None)
@given(records=RECORDS)
def test_every_value_is_the_one_that_chroma_returns(collection, records):
    folder, chroma = collection
    if not records:
        return
    try:
        chroma.upsert(
            ids=list(records),
            embeddings=np.ones((len(records), 2)),
            documents=[document for document, _ in records.values()],
            metadatas=[metadata or None for _, metadata in records.values()],
        )
    except ValueError:
        return  # Chroma doesn't take it
    expected = as_chroma_returns(chroma, records)
    found = DocumentReader(folder, str(chroma.id)).read(list(records))
    assert found is not None
    assert typed(found) == typed(expected)
    chroma.delete(ids=list(records))
    chroma.count()


def test_chroma_is_asked_while_it_has_unapplied_writes(collection):
    folder, chroma = collection
    reader = DocumentReader(folder, str(chroma.id))
    for text in ("old", "new"):
        chroma.upsert(ids=["a"], embeddings=[[1, 2]], documents=[text])
        chroma.count()
        assert reader.read(["a"]) == {"a": (text, {})}
    assert reader.read(["a", "nobody"]) is None
    assert reader.read(["nobody"]) is None
    with sqlite3.connect(folder / "chroma.sqlite3") as connection:
        connection.execute("UPDATE max_seq_id SET seq_id = seq_id - 1")
    connection.close()
    assert reader.read(["a"]) is None


def test_the_migrations_of_the_installed_chroma_are_known(collection):
    folder, _ = collection
    with sqlite3.connect(f"file:{folder}/chroma.sqlite3?mode=ro", uri=True) as connection:
        assert migrations_digest(connection) in documents.KNOWN_MIGRATIONS


def test_with_an_unknown_chroma_the_answers_are_the_same(tmp_path, monkeypatch, vectors):
    index = TwoStageIndex(tmp_path)
    index.upsert(["a", "b"], vectors[:2], ["text a", None], [{"page": 1}, None])
    known = index.search(vectors[:1])
    assert index._session.opened.stores.reader.read(["a", "b"]) is not None
    monkeypatch.setattr(documents, "KNOWN_MIGRATIONS", frozenset())
    monkeypatch.setattr(documents._ChromaFile, "_opened", {})
    index.close()
    again = TwoStageIndex(tmp_path)
    assert again.search(vectors[:1]) == known
    assert again._session.opened.stores.reader.read(["a", "b"]) is None


def test_a_reader_beside_a_writer_gets_whole_records(tmp_path, vectors):
    index = TwoStageIndex(tmp_path)
    index.upsert(["a", "b"], vectors[:2], ["0", "0"], [{"n": 0}, {"n": 0}])

    def write():
        for number in range(1, 40):
            index.upsert(["a", "b"], vectors[:2], [str(number)] * 2, [{"n": number}] * 2)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not writing.done():
            for hit in index.search(vectors[:1])[0]:
                assert hit.document == str(hit.metadata["n"])
        writing.result()
    assert [hit.document for hit in index.search(vectors[:1])[0]] == ["39", "39"]
