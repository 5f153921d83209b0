"""The mistakes that users of other stores report, and what this one does instead."""

import copy
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import chromadb
import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaVectorStore
from pydantic import Field

from mrl_rag import TwoStageIndex
from mrl_rag.errors import (
    DimensionMismatch,
    IndexClosed,
    IndexMismatch,
    InvalidDimension,
    InvalidIds,
    InvalidInput,
    InvalidTexts,
)
from mrl_rag.testing import DeterministicEncoder

TEXTS = ["a cat sleeps", "a dog barks", "the sea is calm", "rain falls on the sea"]


class Embedder(DeterministicFakeEmbedding):
    """Another vendor's, which counts the texts of each call."""

    calls: list[int] = Field(default_factory=list)

    def embed_documents(self, texts):
        self.calls.append(len(texts))
        return super().embed_documents(texts)


@pytest.fixture
def store(words):
    metadatas = [{"page": i, "source": "a.pdf" if i < 2 else "b.pdf"} for i in range(4)]
    return MatryoshkaVectorStore.from_texts(TEXTS, words, metadatas, ids=list("abcd"))


def ids(documents):
    return [document.id for document in documents]


@pytest.mark.parametrize("place", [{}, {"client_settings": chromadb.Settings(anonymized_telemetry=False)}])
def test_a_store_stays_where_it_was_opened(words, tmp_path, monkeypatch, place):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with MatryoshkaVectorStore(words, persist_directory="db", **place) as store:
        monkeypatch.chdir(tmp_path / "other")
        store.add_texts(TEXTS)
        assert len(store.similarity_search("a cat sleeps", k=2)) == 2
    assert not (tmp_path / "other" / "db").exists()
    with pytest.raises(IndexClosed):
        store.add_texts(TEXTS)
    with MatryoshkaVectorStore(words, persist_directory=str(tmp_path / "db")) as store:
        assert len(store.index) == len(TEXTS)


def test_k_larger_than_the_collection(store):
    assert len(store.similarity_search("the sea", k=1000)) == 4
    assert len(store.max_marginal_relevance_search("the sea", k=1000, fetch_k=2000)) == 4
    assert len(store.similarity_search("the sea", k=1000, filter={"source": "a.pdf"})) == 2


def test_of_equal_ids_in_one_call_the_last_is_stored(words):
    for size in (None, 1, 2):
        store = MatryoshkaVectorStore(words)
        added = store.add_texts(
            ["old", "other", "new"], [{"v": 1}, None, {"v": 2}], ids=["x", "y", "x"], batch_size=size
        )
        assert added == ["x", "y", "x"]
        assert [(d.page_content, d.metadata) for d in store.get_by_ids(["x", "y"])] == [
            ("new", {"v": 2}),
            ("other", {}),
        ]


def test_a_replaced_record_keeps_nothing_of_the_old_one(store):
    store.add_texts(["a horse"], [{"new": True}], ids=["a"])
    assert store.get_by_ids(["a"]) == [Document(id="a", page_content="a horse", metadata={"new": True})]


def test_none_in_metadata_is_left_out_and_lists_are_kept(words):
    store = MatryoshkaVectorStore(words)
    store.add_texts(["t"], [{"author": None, "tags": ["x", "y"], "pages": [1, 2], "year": 2020}], ids=["a"])
    assert store.get_by_ids(["a"])[0].metadata == {"tags": ["x", "y"], "pages": [1, 2], "year": 2020}
    assert ids(store.similarity_search("t", filter={"tags": {"$contains": "y"}})) == ["a"]
    assert store.similarity_search("t", filter={"tags": {"$contains": "z"}}) == []


@pytest.mark.parametrize("value", [{"deep": 1}, [], [1, "a"], object(), ("a",)])
def test_metadata_that_would_be_lost_is_refused_and_nothing_stored(words, value):
    store = MatryoshkaVectorStore(words)
    with pytest.raises(InvalidInput, match="metadatas"):
        store.add_texts(["a", "b"], [{"fine": 1}, {"key": value}])
    assert len(store.index) == 0


def test_generators_are_read_once(words):
    store = MatryoshkaVectorStore(words)
    names = store.add_texts((t for t in TEXTS), ({"page": i} for i in range(4)), ids=(c for c in "abcd"), batch_size=3)
    assert names == list("abcd")
    assert store.get_by_ids(["d"])[0].metadata == {"page": 3}
    assert len(store.add_documents(Document(page_content=text) for text in TEXTS)) == 4
    assert len(MatryoshkaVectorStore.from_documents((Document(page_content=t) for t in TEXTS), words).index) == 4


async def test_generators_are_read_once_by_coroutines(words):
    store = MatryoshkaVectorStore(words)
    assert await store.aadd_texts((t for t in TEXTS), ids=(c for c in "abcd"), batch_size=3) == list("abcd")
    assert len(await store.aadd_documents(Document(page_content=text) for text in TEXTS)) == 4
    made = await MatryoshkaVectorStore.afrom_documents((Document(page_content=t) for t in TEXTS), words)
    assert len(made.index) == 4
    texts = await MatryoshkaVectorStore.afrom_texts(TEXTS, words, ids=list("abcd"))
    assert ids(await texts.aget_by_ids(["b", "nobody", "a"])) == ["b", "a"]


def test_an_interruption_loses_the_batch_in_flight_alone(words):
    def read():
        yield from ["one", "two", "three", "four"]
        raise KeyboardInterrupt

    embeddings = Embedder(size=8)
    store = MatryoshkaVectorStore(embeddings)
    with pytest.raises(KeyboardInterrupt):
        store.add_texts(read(), batch_size=3)
    assert embeddings.calls == [3]
    assert sorted(store.get()["documents"]) == ["one", "three", "two"]


def test_a_bar_moves_where_there_is_a_terminal(words, monkeypatch, capsys):
    store = MatryoshkaVectorStore(words)
    store.add_texts(TEXTS, show_progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    store.add_texts(TEXTS)
    assert capsys.readouterr().err == ""
    store.add_texts(TEXTS, batch_size=1, show_progress=True)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (InvalidTexts, {"texts": "a bare string"}),
        (InvalidTexts, {"texts": ["a"], "ids": "a"}),
        (InvalidIds, {"texts": ["a", "b"], "ids": ["x"]}),
        (InvalidIds, {"texts": ["a"], "metadatas": [{}, {}]}),
        (InvalidIds, {"texts": ["a"], "ids": [7]}),
        (InvalidInput, {"texts": ["a"], "batch_size": 0}),
        (ValueError, {"texts": (t for t in "ab"), "ids": ["x"]}),
        (TypeError, {"texts": ["a"], "metadata": [{}]}),
    ],
)
def test_what_does_not_pair_up_is_refused(words, error, call):
    store = MatryoshkaVectorStore(words)
    with pytest.raises(error):
        store.add_texts(**call)
    assert len(store.index) == 0


def test_a_misspelt_argument_of_a_search_is_refused(store):
    for search in (store.similarity_search, store.max_marginal_relevance_search, store.similarity_search_with_score):
        with pytest.raises(TypeError, match="filters"):
            search("a cat", filters={"page": 1})
    with pytest.raises(TypeError, match="fetch_k"):
        store.as_retriever(search_kwargs={"fetch_k": 3}).invoke("a cat")


def test_numbers_may_be_numpys(store):
    best = store.similarity_search_with_score("a cat sleeps", k=np.int64(1))[0][1]
    for threshold, found in ((np.float32(best - 0.1), 1), (np.float64(best + 0.1), 0), (np.int64(1), 0)):
        assert len(store.similarity_search("a cat sleeps", k=1, score_threshold=threshold)) == found
    assert len(store.max_marginal_relevance_search("a cat", k=2, lambda_mult=np.float32(0.5))) == 2


def test_order_of_mmr_is_the_order_of_choice(words):
    texts = ["red cat", "red cat cat", "blue cat", "green sea", "red"]
    store = MatryoshkaVectorStore.from_texts(texts, words, ids=list("abcde"))
    query, vectors = words.embed_query("red cat"), words.embed_documents(texts)
    nearest = ids(store.similarity_search("red cat", k=4))
    for lambda_mult in (0, 0.3, 1):
        expected = maximal_marginal_relevance(np.array(query), vectors, lambda_mult, 4)
        found = ids(store.max_marginal_relevance_search("red cat", k=4, fetch_k=5, lambda_mult=lambda_mult))
        assert found == ["abcde"[row] for row in expected]
        assert (found == nearest) == (lambda_mult == 1)


async def test_async_search_is_the_same_search(store):
    assert await store.asimilarity_search("the sea", k=2) == store.similarity_search("the sea", k=2)
    assert await store.asimilarity_search_with_score("sea", k=2) == store.similarity_search_with_score("sea", k=2)
    assert await store.amax_marginal_relevance_search("sea", k=2) == store.max_marginal_relevance_search("sea", k=2)
    vector = store.embeddings.embed_query("sea")
    assert await store.asimilarity_search_by_vector(vector, k=1) == store.similarity_search_by_vector(vector, k=1)
    assert await store.amax_marginal_relevance_search_by_vector(vector, k=1) == store.similarity_search("sea", k=1)
    relevant = await store.asimilarity_search_with_relevance_scores("the sea is calm", k=4, score_threshold=0.8)
    assert ids(document for document, _ in relevant) == ["c"]
    assert await store.adelete(["a"])
    for search_type in ("similarity", "mmr"):
        assert len(await store.asearch("sea", search_type)) == 3


async def test_async_search_awaits_the_embeddings_natively():
    class Native(DeterministicFakeEmbedding):
        def embed_query(self, text):
            raise AssertionError("called in a thread")

        async def aembed_query(self, text):
            return DeterministicFakeEmbedding.embed_query(self, text)

    store = MatryoshkaVectorStore.from_texts(TEXTS, Native(size=8))
    assert len(await store.asimilarity_search("x", k=2)) == 2
    assert len(await store.amax_marginal_relevance_search("x", k=2)) == 2
    assert len(await store.asimilarity_search_with_relevance_scores("x", k=2)) == 2


def test_scores_are_python_floats_and_relevance_is_the_cosine_without_its_negative_half(store):
    scored = store.similarity_search_with_score("the sea is calm", k=4)
    relevant = store.similarity_search_with_relevance_scores("the sea is calm", k=4)
    assert {type(score) for _, score in scored + relevant} == {float}
    assert [score for _, score in relevant] == [max(score, 0) for _, score in scored]
    vector = store.embeddings.embed_query("the sea is calm")
    assert store.similarity_search_by_vector_with_relevance_scores(vector, k=4) == relevant
    assert ids(store.similarity_search("the sea is calm", k=4, score_threshold=0.8)) == ["c"]
    retriever = store.as_retriever(
        search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.8, "k": 4}
    )
    assert ids(retriever.invoke("the sea is calm")) == ["c"]


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ({"page": 1}, "b"),
        ({"page": {"$gte": 1, "$lt": 3}}, "bc"),
        ({"source": "b.pdf", "page": {"$ne": 2}}, "d"),
        ({"$or": [{"page": 0}, {"source": "b.pdf", "page": 3}]}, "ad"),
        ({"source": "b.pdf", "$or": [{"page": 0}, {"page": 3}]}, "d"),
        ({"$and": [{"source": "a.pdf"}]}, "a b"),
        ({"$and": [{"$or": [{"page": 0}, {"page": 2}]}, {"page": {"$in": [2, 3]}}]}, "c"),
        ({"page": {"$nin": [0, 1]}}, "cd"),
        ({}, "abcd"),
    ],
    ids=str,
)
def test_filters_at_any_depth(store, condition, found):
    wanted = set(found.replace(" ", ""))
    assert set(ids(store.similarity_search("sea", k=4, filter=condition))) == wanted
    assert set(ids(store.max_marginal_relevance_search("sea", k=4, filter=condition))) == wanted
    assert set(store.get(where=condition)["ids"]) == wanted
    retriever = store.as_retriever(search_kwargs={"k": 4})
    assert set(ids(retriever.invoke("sea", filter=condition))) == wanted


@pytest.mark.parametrize("condition", [{"page": None}, {"page": {"$near": 1}}, ["page"], lambda d: True, {"a": []}])
def test_a_filter_that_means_nothing_is_refused(store, condition):
    with pytest.raises(InvalidInput):
        store.similarity_search("sea", filter=condition)


@pytest.mark.parametrize(
    "condition",
    [{"page": float("nan")}, {"page": 2**70}, {"$schema": 1}, {"source": {"$in": ["\ud800"]}}, {"page": {"$gt": True}}],
)
async def test_a_filter_that_chromas_core_refuses_is_refused_by_name(store, condition):
    name = next(iter(condition)).replace("$", r"\$")
    for search in (store.similarity_search, store.max_marginal_relevance_search, store.similarity_search_with_score):
        with pytest.raises(InvalidInput, match=f"'{name}'"):
            search("sea", filter=condition)
    for call in (lambda: store.get(where=condition), lambda: store.delete(filter=condition)):
        with pytest.raises(InvalidInput, match=f"'{name}'"):
            call()
    with pytest.raises(InvalidInput, match=f"'{name}'"):
        await store.asimilarity_search("sea", filter=condition)


def test_a_list_in_a_filter_may_be_long(store):
    pages = {"page": {"$in": list(range(2, 40_000))}}
    assert set(ids(store.similarity_search("sea", filter=pages))) == {"c", "d"}
    assert set(ids(store.similarity_search("sea", filter=pages | {"source": "b.pdf", "page": {"$ne": 3}}))) == {"c"}
    store.delete(filter=pages)
    assert store.get()["ids"] == ["a", "b"]


BAD_RECORDS = [
    ({"texts": "\ud800"}, r"texts\[700\].*surrogates"),
    ({"texts": None}, r"texts\[700\] is None"),
    ({"metadatas": {"$schema": 1}}, r"metadatas\[700\].*\$schema"),
    ({"metadatas": {"page": float("nan")}}, r"metadatas\[700\]"),
    ({"ids": "\ud800"}, r"ids\[700\].*surrogates"),
    ({"ids": 700}, r"ids\[700\] is 700"),
]


@pytest.mark.parametrize(("bad", "words"), BAD_RECORDS)
@pytest.mark.parametrize("size", [None, 100])
async def test_a_bad_record_is_named_by_its_place_in_the_whole_before_it_is_embedded(bad, words, size):
    embedder = Embedder(size=8)
    store = MatryoshkaVectorStore(embedder)
    given = {"texts": ["ok"] * 701, "metadatas": [{"page": 1}] * 701, "ids": ["first"] * 2 + list(map(str, range(699)))}
    for name, value in bad.items():
        given[name][700] = value
    for add in (store.add_texts, store.aadd_texts):
        with pytest.raises(InvalidInput, match=words):
            added = add(iter(given["texts"]), given["metadatas"], ids=given["ids"], batch_size=size)
            await added
        assert sum(embedder.calls) == (511 if size is None else 699)
        embedder.calls.clear()


def test_an_id_given_twice_is_one_document(store):
    twice = ["a", "b", "a"]
    assert ids(store.get_by_ids(twice)) == store.get(twice)["ids"] == ["a", "b"]
    changes = [Document("one", metadata={"x": 1}), Document("other"), Document("two", metadata={"y": 2})]
    store.update_documents(twice, changes)
    stored = store.get(["a", "b"])
    assert stored["documents"] == ["two", "other"]
    assert stored["metadatas"][0] == {"page": 0, "source": "a.pdf", "x": 1, "y": 2}
    store.delete(twice)
    assert store.get()["ids"] == ["c", "d"]
    with pytest.raises(InvalidIds, match="3 ids and 2 documents"):
        store.update_documents(["c", "c", "d"], changes[:2])


@pytest.mark.parametrize("wrong", [{"include": ["distances"]}, {"include": "documents"}, {"limit": -1}, {"offset": -1}])
def test_asking_for_what_get_does_not_have_is_refused(store, wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        store.get(**wrong)


def test_a_name_chroma_does_not_take_is_refused_at_once(words):
    with pytest.raises(InvalidInput, match="collection is 'a b'"):
        MatryoshkaVectorStore(words, "a b")


def test_deleting_then_querying(store):
    assert store.delete("a") is True
    assert store.delete(["b", "nobody"]) is True
    assert set(ids(store.similarity_search("a cat", k=4))) == {"c", "d"}
    store.delete(where={"page": 2})
    assert ids(store.similarity_search("a cat", k=4)) == ["d"]
    store.delete(["d"], filter={"page": 2})
    assert ids(store.get_by_ids(["d"])) == ["d"]
    store.delete([])
    assert len(store.index) == 1
    store.reset_collection()
    assert store.similarity_search("a cat", k=4) == []
    store.add_texts(["a cat"], ids=["a"])
    assert ids(store.similarity_search("a cat", k=4)) == ["a"]


def test_no_condition_an_empty_or_a_misspelt_one_deletes_nothing(store):
    for nothing in ({}, {"filter": {}}, {"where": {}}, {"where_document": {}}, {"ids": None}):
        with pytest.raises(InvalidIds, match="reset_collection"):
            store.delete(**nothing)
    with pytest.raises(InvalidInput, match="mean the same"):
        store.delete(filter={"page": 1}, where={"page": 2})
    with pytest.raises(TypeError):
        store.delete(wher={"page": 1})
    assert len(store.index) == 4


def test_what_a_caller_changes_does_not_reach_the_store(store):
    documents = [Document(id="e", page_content="new", metadata={"page": 5})]
    store.add_documents(documents)
    documents[0].metadata["page"] = 6
    store.similarity_search("new", k=1)[0].metadata["page"] = 7
    assert store.similarity_search("new", k=1)[0].metadata == {"page": 5}


def test_two_dimensions_of_one_model_side_by_side(tmp_path):
    encoder = DeterministicEncoder(64)
    folder = str(tmp_path)
    whole = MatryoshkaVectorStore.from_texts(TEXTS, MatryoshkaEmbeddings(encoder=encoder), persist_directory=folder)
    cut = MatryoshkaVectorStore.from_texts(
        TEXTS, MatryoshkaEmbeddings(encoder=encoder, dim=16), collection_name="cut", persist_directory=folder
    )
    assert (whole.index.full_dim, cut.index.full_dim) == (64, 16)
    assert [s.similarity_search("a dog", k=1)[0].page_content for s in (whole, cut)] == ["a dog barks"] * 2
    with pytest.raises(DimensionMismatch):
        MatryoshkaVectorStore(
            MatryoshkaEmbeddings(encoder=encoder, dim=16), collection_name="langchain", persist_directory=folder
        )


@pytest.mark.usefixtures("default_dtype")
def test_another_model_or_task_of_the_same_length_is_refused(make_tiny_bert, tmp_path):
    first, second = (str(make_tiny_bert(seed=seed)) for seed in (1, 2))
    MatryoshkaVectorStore.from_texts(
        ["a"], MatryoshkaEmbeddings(model=first, device="cpu"), persist_directory=str(tmp_path)
    )
    for other in ({"model": second}, {"model": first, "task": "clustering"}):
        with pytest.raises(IndexMismatch):
            MatryoshkaVectorStore(MatryoshkaEmbeddings(device="cpu", **other), persist_directory=str(tmp_path))


def test_32_threads_add_and_search(words):
    store = MatryoshkaVectorStore.from_texts(["nothing"], words)

    def work(number):
        store.add_texts([f"text {number}"], ids=[str(number)])
        return store.similarity_search(f"text {number}", k=1)[0].id

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(work, range(64))) == [str(number) for number in range(64)]


def test_a_copy_is_the_same_store(store):
    for copied in (copy.copy(store), copy.deepcopy(store), copy.deepcopy(store.as_retriever()).vectorstore):
        copied.add_texts(["again"], ids=["z"])
        assert ids(store.get_by_ids(["z"])) == ["z"]
        store.delete("z")


def test_a_pickled_store_opens_its_folder_again(words, tmp_path):
    store = MatryoshkaVectorStore.from_texts(TEXTS, words, persist_directory=str(tmp_path), shortlist_dim=8)
    again = pickle.loads(pickle.dumps(store.as_retriever(search_kwargs={"k": 1})))
    assert again.invoke("a dog barks")[0].page_content == "a dog barks"
    with pytest.raises(InvalidInput, match="persist_directory"):
        pickle.dumps(MatryoshkaVectorStore(words))


def test_no_network_is_needed(words, tmp_path, no_network):
    store = MatryoshkaVectorStore.from_texts(TEXTS, words, persist_directory=str(tmp_path))
    assert store.similarity_search("a dog", k=1)[0].page_content == "a dog barks"


def test_many_questions_in_one_search(store):
    hits = store.search_hits(["a cat", "the sea"], k=2, explain=True)
    assert [[hit.id for hit in found] for found in hits] == [
        ids(store.similarity_search(q, k=2)) for q in ("a cat", "the sea")
    ]
    assert [stage.rank for stage in hits[0][0].stages][-1] == 1
    fake = MatryoshkaVectorStore.from_texts(TEXTS, DeterministicFakeEmbedding(size=8))
    assert [found[0].document for found in fake.search_hits(TEXTS, k=1)] == TEXTS


@pytest.mark.parametrize("place", ["memory", "folder", "server"])
def test_a_dropped_collection_can_be_filled_anew(words, place, tmp_path, server):
    where = {
        "memory": {},
        "folder": {"persist_directory": str(tmp_path)},
        "server": {"client": server, "collection_name": "dropped"},
    }[place]
    before = {collection.name for collection in server.list_collections()}
    store = MatryoshkaVectorStore.from_texts(TEXTS, words, **where)
    store.delete_collection()
    assert store.similarity_search("a cat") == []
    if place == "folder":
        assert not list(tmp_path.glob("archive-*"))
    assert {collection.name for collection in server.list_collections()} == before
    store.reset_collection()
    store.add_texts(["a cat"], ids=["a"])
    assert ids(store.similarity_search("a cat")) == ["a"]
    assert store.index.verify().ok
    store.close()


def test_a_store_without_embeddings_is_searched_by_vector(store):
    bare = MatryoshkaVectorStore(index=store.index)
    vector = store.embeddings.embed_query("a cat")
    assert bare.similarity_search_by_vector(vector, k=1)[0].id == "a"
    with pytest.raises(InvalidInput, match="no embeddings"):
        bare.similarity_search("a cat")


@pytest.mark.parametrize(
    "arguments",
    [
        {"embedding": "my_collection", "collection_name": "another"},
        {"embedding": 7},
        {"collection_name": 7},
        {"create_collection_if_not_exists": False},
        {"embedding_function": DeterministicFakeEmbedding(size=8)},
        {"persist_directory": "db", "host": "localhost"},
        {"client": chromadb.EphemeralClient(), "host": "localhost"},
        {"chroma_cloud_api_key": "key"},
        {"collection_metadata": {"hnsw:space": "l2"}},
        {"collection_configuration": {"hnsw": {"space": "ip"}}},
        {"collection_metadata": {"owner": "me"}},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_arguments_that_cannot_be_kept_are_refused(arguments):
    with pytest.raises(InvalidInput):
        MatryoshkaVectorStore(**({"embedding": DeterministicFakeEmbedding(size=8)} | arguments))
    with pytest.raises(InvalidDimension):
        MatryoshkaVectorStore(shortlist_dim=0)


def test_chromas_own_ways_to_say_where_it_is(words, tmp_path, chroma_server):
    settings = chromadb.Settings(anonymized_telemetry=False)
    for where in (
        {"host": "127.0.0.1", "port": chroma_server, "client_settings": settings, "collection_name": "where"},
        {"persist_directory": str(tmp_path / "a"), "client_settings": settings},
        {"client_settings": chromadb.Settings(is_persistent=True, persist_directory=str(tmp_path / "b"))},
        {"client": chromadb.PersistentClient(tmp_path / "c")},
    ):
        cosine = {"collection_metadata": {"hnsw:space": "cosine"}}
        store = MatryoshkaVectorStore.from_texts(TEXTS, words, ids=list("abcd"), **where, **cosine)
        again = MatryoshkaVectorStore(words, **where)
        assert ids(again.similarity_search("a dog", k=1)) == ["b"]
        if "host" not in where:  # Chroma's close leaves a server's connections open, and Python warns of each
            store.close()
            again.close()
    assert settings == chromadb.Settings(anonymized_telemetry=False)  # chromadb would write into it


def test_metadata_of_a_document_can_be_stored_as_json(store):
    store.add_texts(["t"], [{"authors": json.dumps({"first": "A"})}], ids=["e"])
    assert json.loads(store.get_by_ids(["e"])[0].metadata["authors"]) == {"first": "A"}


def test_full_vectors_come_back(store):
    (document, vector), *_ = store.similarity_search_with_vectors("a cat sleeps", k=2)
    expected = store.embeddings.embed_documents([document.page_content])[0]
    np.testing.assert_allclose(vector, expected, atol=1e-3)
    np.testing.assert_allclose(store.get("a", include=["embeddings"])["embeddings"][0], vector)


def test_an_index_that_exists_is_used_as_it_is(words):
    index = TwoStageIndex(full_dim=64, shortlist_dim=8)
    MatryoshkaVectorStore(words, index=index).add_texts(["a"], ids=["a"])
    assert len(index) == 1


@pytest.mark.parametrize("place", ["memory", "folder", "server"])
def test_metadata_comes_back_in_the_order_in_which_it_was_added(words, place, tmp_path, server):
    arguments = {"memory": {}, "folder": {"persist_directory": str(tmp_path)}, "server": {"client": server}}[place]
    keys = {"a": ["z", "source", "page", "a", "m"], "b": ["title", "source", "a", "x"], "c": ["row", "file"]}
    documents = [
        Document(id=id_, page_content=id_, metadata={key: f"{key} of {id_}" for key in order})
        for id_, order in keys.items()
    ]
    store = MatryoshkaVectorStore.from_documents(documents, words, collection_name=f"order-{place}", **arguments)
    for _ in range(3):
        for read in (
            store.similarity_search("a", k=3),
            store.max_marginal_relevance_search("a", k=3),
            store.get_by_ids(list(keys)),
            store.as_retriever().invoke("a"),
            [Document(id=id_, page_content=id_, metadata=store.get(id_)["metadatas"][0]) for id_ in keys],
        ):
            assert {document.id: list(document.metadata) for document in read} == keys
    store.update_document("b", Document(page_content="b", metadata={"new": 1, "a": 2}))
    assert list(store.get_by_ids(["b"])[0].metadata) == [*keys["b"], "new"]
