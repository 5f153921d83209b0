"""LangChain's indexing API, with each of its record managers and cleanup modes, sync and async."""

import pytest
from langchain_classic.indexes import SQLRecordManager
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_mrl import MatryoshkaVectorStore


def document(text, source):
    return Document(page_content=text, metadata={"source": source})


A1, A2, B1, C1 = document("a one", "a"), document("a two", "a"), document("b one", "b"), document("c one", "c")
CHANGED = document("a one, changed", "a")


@pytest.fixture(params=["memory", "sql"])
def records(request, tmp_path):
    if request.param == "memory":
        manager = InMemoryRecordManager("test")
        manager.create_schema()
        yield manager
    else:
        manager = SQLRecordManager("test", db_url=f"sqlite:///{tmp_path / 'records.sqlite3'}")
        manager.create_schema()
        yield manager
        manager.engine.dispose()


@pytest.fixture
def store(words):
    return MatryoshkaVectorStore(words)


def run(documents, records, store, cleanup, **settings):
    done = index(documents, records, store, cleanup=cleanup, source_id_key="source", key_encoder="sha256", **settings)
    return done["num_added"], done["num_updated"], done["num_skipped"], done["num_deleted"]


def texts(store):
    return sorted(store.get()["documents"])


# What is left of a first run of A1, A2 and B1 after a second run of CHANGED, A2 and C1.
AFTER = {
    None: ((2, 0, 1, 0), ["a one", "a one, changed", "a two", "b one", "c one"]),
    "incremental": ((2, 0, 1, 1), ["a one, changed", "a two", "b one", "c one"]),
    "scoped_full": ((2, 0, 1, 1), ["a one, changed", "a two", "b one", "c one"]),
    "full": ((2, 0, 1, 2), ["a one, changed", "a two", "c one"]),
}


@pytest.mark.parametrize("cleanup", AFTER)
def test_each_cleanup_mode(records, store, cleanup):
    assert run([A1, A2, B1], records, store, cleanup) == (3, 0, 0, 0)
    assert run([A1, A2, B1], records, store, cleanup) == (0, 0, 3, 0)
    counts, left = AFTER[cleanup]
    assert run([CHANGED, A2, C1], records, store, cleanup) == counts
    assert texts(store) == left
    found = store.similarity_search("a one, changed", k=1)[0]
    assert (found.page_content, found.metadata) == ("a one, changed", {"source": "a"})


@pytest.mark.parametrize("cleanup", AFTER)
async def test_each_cleanup_mode_async(store, cleanup):
    records = InMemoryRecordManager("test")

    async def arun(documents):
        done = await aindex(
            documents, records, store, cleanup=cleanup, source_id_key="source", key_encoder="sha256", batch_size=2
        )
        return done["num_added"], done["num_updated"], done["num_skipped"], done["num_deleted"]

    assert await arun([A1, A2, B1]) == (3, 0, 0, 0)
    assert await arun([A1, A2, B1]) == (0, 0, 3, 0)
    counts, left = AFTER[cleanup]
    assert await arun([CHANGED, A2, C1]) == counts
    assert texts(store) == left


def test_a_full_cleanup_of_nothing_empties_the_store(records, store):
    run([A1, B1], records, store, "full")
    assert run([], records, store, "full") == (0, 0, 0, 2)
    assert texts(store) == []


def test_forcing_an_update_replaces_in_place(records, store):
    run([A1, A2], records, store, "incremental")
    assert run([A1, A2], records, store, "incremental", force_update=True) == (0, 2, 0, 0)
    assert texts(store) == ["a one", "a two"]


def test_loaders_generators_and_doubles(records, store):
    class Loader(BaseLoader):
        def lazy_load(self):
            yield from (A1, A1, A2, B1, A1)

    assert run(Loader(), records, store, None, batch_size=2) == (3, 0, 2, 0)
    assert run((d for d in [A1, C1]), records, store, None) == (1, 0, 1, 0)
    assert texts(store) == ["a one", "a two", "b one", "c one"]
