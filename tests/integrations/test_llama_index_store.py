"""`MatryoshkaVectorStore`: what goes in comes out, wherever it is, and nothing is ignored."""

import asyncio
import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import chromadb
import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import Document, ImageNode, IndexNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery, VectorStoreQueryMode
from llama_index_mrl import MatryoshkaEmbedding, MatryoshkaVectorStore

from mrl_rag import TwoStageIndex
from mrl_rag.errors import DimensionMismatch, IndexMismatch, InvalidIds, InvalidInput
from mrl_rag.testing import DeterministicEncoder

ENCODER = DeterministicEncoder(32)


def embedded(*nodes):
    for node in nodes:
        node.embedding = ENCODER.encode_documents([node.get_content()])[0].tolist()
    return list(nodes)


def text_nodes(*texts, **fields):
    return embedded(*(TextNode(id_=text, text=text, **fields) for text in texts))


def ask(text, k=10, **arguments):
    vector = ENCODER.encode_queries([text])[0].tolist()
    return VectorStoreQuery(query_embedding=vector, similarity_top_k=k, **arguments)


def test_every_kind_of_node_comes_back_whole():
    chapter = IndexNode(id_="i", text="chapter three", index_id="three", obj=TextNode(id_="inner", text="inside"))
    nodes = embedded(
        TextNode(
            id_="t",
            text="Übergröße 東京 \n\t",
            metadata={"page": 1, "score": 0.5, "draft": True, "none": None, "tags": ["a", "b"], "deep": {"a": [1, {}]}},
            excluded_llm_metadata_keys=["page"],
            start_char_idx=5,
            end_char_idx=9,
            relationships={
                NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc", metadata={"x": 1}, hash="h"),
                NodeRelationship.NEXT: RelatedNodeInfo(node_id="i"),
            },
        ),
        chapter,
        ImageNode(id_="p", text="a picture", image="aGVsbG8=", metadata={"mixed": [1, "a", None], "empty": []}),
        Document(id_="d", text="a document", metadata={"number": float("inf")}),
        TextNode(id_="e", text=""),
    )
    store = MatryoshkaVectorStore()
    store.add(nodes)
    found = store.get_nodes([node.node_id for node in nodes])
    for before, after in zip(nodes, found, strict=True):
        expected = before.model_copy(update={"embedding": None})
        if isinstance(before, Document):
            assert (after.text, after.id_) == (before.text, before.id_)
            continue
        assert type(after) is type(before)
        assert after.to_dict() == expected.to_dict()
    assert found[1].obj.text == "inside"
    assert store.query(ask("picture", 1)).nodes[0].image == "aGVsbG8="


def test_filters_see_lists_and_pass_over_what_chroma_cannot_hold():
    store = MatryoshkaVectorStore()
    store.add(text_nodes("a", metadata={"tags": ["x", "y"], "none": None}) + text_nodes("b", metadata={"none": 1}))

    def ids(operator, key, value=None):
        filters = MetadataFilters(filters=[MetadataFilter(key=key, operator=operator, value=value)])
        return store.query(ask("a", filters=filters)).ids

    assert ids("contains", "tags", "x") == ids("any", "tags", ["y", "z"]) == ids("is_empty", "none") == ["a"]
    assert ids("==", "none", 1) == ids("is_empty", "tags") == ["b"]


def test_more_is_asked_for_than_there_is():
    store = MatryoshkaVectorStore()
    assert store.query(ask("a")).ids == []
    store.add(text_nodes("a", "b"))
    assert len(store.query(ask("a", 100)).ids) == len(store.query(ask("a", 100, mode="mmr")).ids) == 2


def test_adding_again_replaces_and_one_id_twice_stores_the_last():
    store = MatryoshkaVectorStore()
    first, second = embedded(TextNode(id_="a", text="one", metadata={"old": 1}), TextNode(id_="a", text="two"))
    assert store.add([first]) == ["a"]
    assert store.add(node for node in (first, second)) == ["a", "a"]
    assert [(node.text, node.metadata) for node in store.get_nodes()] == [("two", {})]
    assert store.add([]) == []


def test_a_deleted_node_is_found_no_more():
    store = MatryoshkaVectorStore()
    store.add(text_nodes("a", "b"))
    store.delete_nodes(["a"])
    assert store.query(ask("a")).ids == ["b"]
    for nothing in ({}, {"filters": MetadataFilters(filters=[])}):
        with pytest.raises(InvalidIds, match="clear"):
            store.delete_nodes(**nothing)
    store.delete_nodes([])
    assert store.query(ask("a")).ids == ["b"]
    store.delete("None")
    assert store.query(ask("a")).ids == []


@pytest.mark.parametrize("place", ["memory", "server"])
def test_an_id_given_twice_is_one_node(place, request):
    client = request.getfixturevalue("server") if place == "server" else None
    store = MatryoshkaVectorStore("twice", client=client)
    store.add(text_nodes("a", "b", "c"))
    assert [node.node_id for node in store.get_nodes(["b", "a", "b"])] == ["b", "a"]
    store.delete_nodes(["b", "a", "b"])
    assert [node.node_id for node in store.get_nodes()] == ["c"]


def test_what_chromas_core_refuses_is_refused_by_name():
    with pytest.raises(InvalidInput, match="collection is 'a b'"):
        MatryoshkaVectorStore("a b")
    store = MatryoshkaVectorStore()
    with pytest.raises(InvalidInput, match=r"the key '\$schema'"):
        store.add(text_nodes("a", metadata={"$schema": "x"}))
    store.add(text_nodes("a", metadata={"n": 1}))
    for operator, value in (("==", 2**70), (">", 2**70), ("in", [1, 2**70]), ("==", float("nan")), ("==", "\ud800")):
        filters = MetadataFilters(filters=[MetadataFilter(key="n", operator=operator, value=value)])
        for call in (store.get_nodes, lambda **given: store.query(ask("a", **given)), store.delete_nodes):
            with pytest.raises(InvalidInput, match="'n'"):
                call(filters=filters)
    long = MetadataFilters(filters=[MetadataFilter(key="n", operator="in", value=list(range(40_000)))])
    assert store.query(ask("a", filters=long)).ids == ["a"]


def test_similarities_are_python_floats_falling():
    store = MatryoshkaVectorStore()
    store.add(text_nodes("a b", "b c", "c d", "a"))
    similarities = store.query(ask("a")).similarities
    assert all(type(value) is float for value in similarities)
    assert similarities == sorted(similarities, reverse=True)
    expected = ENCODER.encode_documents(["a"])[0] @ ENCODER.encode_queries(["a"])[0]
    assert similarities[0] == pytest.approx(float(expected), abs=1e-3)


def test_a_search_within_given_nodes_and_documents():
    store = MatryoshkaVectorStore()
    words = [f"word {i}" for i in range(40)]
    for i, node in enumerate(nodes := text_nodes(*words)):
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=f"doc {i % 2}")
    store.add(nodes)
    assert set(store.query(ask("word 3", node_ids=words[5:8])).ids) == set(words[5:8])
    assert store.query(ask("word 6", 1, node_ids=words[5:8])).ids == ["word 6"]
    assert set(store.query(ask("word", 40, doc_ids=["doc 1"])).ids) == set(words[1::2])
    assert store.query(ask("word", 40, doc_ids=["doc 1"], node_ids=words[:2])).ids == [words[1]]
    assert store.query(ask("word", doc_ids=[])).ids == []
    both = store.query(ask("word", 40, node_ids=words[:10], mode="mmr"), where={"doc_id": "doc 0"})
    assert set(both.ids) == set(words[0:10:2])


def test_an_index_of_text_and_index_nodes_finds_both():
    nodes = [TextNode(id_="t", text="about cats"), IndexNode(id_="i", text="about dogs", index_id="dogs")]
    index = VectorStoreIndex(
        nodes,
        storage_context=storage(MatryoshkaVectorStore()),
        embed_model=MatryoshkaEmbedding(encoder=ENCODER),
    )
    assert [n.node.node_id for n in index.as_retriever(similarity_top_k=2).retrieve("about cats")] == ["t", "i"]


def storage(store):
    from llama_index.core import StorageContext

    return StorageContext.from_defaults(vector_store=store)


def test_mmr_chooses_in_order_and_takes_its_settings_from_either_place():
    store = MatryoshkaVectorStore()
    nodes = text_nodes("pool of threads", "numpy arrays", "json texts")
    nodes += embedded(*(TextNode(id_=f"copy {i}", text="pool of threads") for i in range(5)))
    store.add(nodes)
    query = ask("pool of threads", 3, mode=VectorStoreQueryMode.MMR)
    chosen = store.query(query, mmr_threshold=0.3).ids
    assert len({node.text for node in store.get_nodes(chosen)}) == 3
    assert store.get_nodes(chosen)[0].text == "pool of threads"
    query.mmr_threshold = 0.3
    assert store.query(query).ids == chosen
    assert store.query(query, mmr_threshold=1.0).ids == store.query(ask("pool of threads", 3)).ids
    texts = {node.text for node in store.get_nodes(store.query(query, mmr_prefetch_k=3).ids)}
    assert texts == {node.text for node in store.get_nodes(store.query(query, mmr_prefetch_factor=1).ids)}
    assert texts == {"pool of threads"}
    with pytest.raises(InvalidInput, match="mmr_prefetch"):
        store.query(query, mmr_prefetch_k=3, mmr_prefetch_factor=1)
    with pytest.raises(InvalidInput, match="lambda_mult"):
        store.query(query, mmr_threshold=2)


def test_conditions_in_chromas_language_come_on_top():
    store = MatryoshkaVectorStore()
    store.add(text_nodes("a b", "b", metadata={"page": 1}) + text_nodes("a", metadata={"page": 2}))
    filters = MetadataFilters(filters=[MetadataFilter(key="page", value=1)])
    assert store.query(ask("a", filters=filters), where_document={"$contains": "a"}).ids == ["a b"]
    assert store.query(ask("a", filters=filters), where={"page": 2}).ids == []


def test_a_misspelt_setting_is_refused(tmp_path):
    with pytest.raises(ValueError, match="persist_directory"):
        MatryoshkaVectorStore(persist_directory=str(tmp_path))
    with pytest.raises(InvalidInput, match="both given"):
        MatryoshkaVectorStore(persist_dir=str(tmp_path), client=chromadb.EphemeralClient())


@pytest.mark.parametrize("place", ["folder", "server", "client on a folder", "client of a server"])
def test_a_store_goes_through_a_dict_and_a_pickle(place, tmp_path, request):
    port = request.getfixturevalue("chroma_server") if "server" in place else None
    name = f"docs-{time.time_ns()}"
    store = {
        "folder": lambda: MatryoshkaVectorStore(name, str(tmp_path), shortlist_dim=8),
        "server": lambda: MatryoshkaVectorStore(name, host="127.0.0.1", port=port, shortlist_dim=8),
        "client on a folder": lambda: MatryoshkaVectorStore(name, client=chromadb.PersistentClient(tmp_path)),
        "client of a server": lambda: MatryoshkaVectorStore(
            index=TwoStageIndex(collection=name, client=chromadb.HttpClient("127.0.0.1", port))
        ),
    }[place]()
    store.add(text_nodes("a", "b"))
    settings = store.to_dict()
    assert settings["class_name"] == store.class_name() == "MatryoshkaVectorStore"
    for again in (MatryoshkaVectorStore.from_dict(settings), pickle.loads(pickle.dumps(store))):
        assert again.to_dict() == settings
        assert again.query(ask("a", 1)).ids == ["a"]


def test_secrets_stay_out_of_the_dict(chroma_server):
    store = MatryoshkaVectorStore("x-docs", host="127.0.0.1", port=chroma_server, headers={"Authorization": "secret"})
    assert "secret" not in f"{store.to_dict()} {store!r}"
    assert pickle.loads(pickle.dumps(store)).headers == {"Authorization": "secret"}


def test_copies_share_the_index_and_memory_is_not_pickled():
    store = MatryoshkaVectorStore()
    store.add(text_nodes("a"))
    copied = copy.deepcopy(store)
    assert copied.index is store.index
    assert copied.query(ask("a", 1)).ids == ["a"]
    with pytest.raises(InvalidInput, match="memory"):
        pickle.dumps(store)


def test_two_dimensions_of_one_model_live_side_by_side(tmp_path):
    stores = {}
    for dim in (8, 32):
        model = MatryoshkaEmbedding(encoder=ENCODER, dim=dim)
        stores[dim] = MatryoshkaVectorStore(f"docs-{dim}", str(tmp_path))
        VectorStoreIndex([TextNode(text="cats")], storage_context=storage(stores[dim]), embed_model=model)
    assert {dim: store.index.full_dim for dim, store in stores.items()} == {8: 8, 32: 32}
    with pytest.raises(DimensionMismatch):
        MatryoshkaVectorStore("docs-8", str(tmp_path), full_dim=32)
    with pytest.raises(ValueError, match="8"):
        stores[8].query(ask("cats"))


def test_a_collection_made_with_another_model_is_refused(tmp_path):
    MatryoshkaVectorStore("docs", str(tmp_path), fingerprint=ENCODER.fingerprint).add(text_nodes("a"))
    with pytest.raises(IndexMismatch, match=ENCODER.fingerprint):
        MatryoshkaVectorStore("docs", str(tmp_path), fingerprint="another")


def test_32_threads_write_and_read(tmp_path):
    store = MatryoshkaVectorStore(persist_dir=str(tmp_path))
    store.add(text_nodes("start"))

    def work(i):
        store.add(text_nodes(f"text {i}"))
        return store.query(ask(f"text {i}", 1)).ids

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(work, range(64))) == [[f"text {i}"] for i in range(64)]
    assert store.index.verify().ok


async def test_no_async_call_holds_up_the_event_loop(monkeypatch):
    store = MatryoshkaVectorStore()
    loop_thread, threads = threading.get_ident(), []

    def seen(work):
        return lambda *args, **named: threads.append(threading.get_ident()) or work(*args, **named)

    for name in ("upsert", "search", "get", "delete", "clear"):
        monkeypatch.setattr(store.index, name, seen(getattr(store.index, name)))
    await store.async_add(text_nodes("a", "b", "c"))
    assert (await store.aquery(ask("a", 1))).ids == ["a"]
    assert len(await store.aget_nodes(["a", "b"])) == 2
    await asyncio.gather(store.adelete("nobody"), store.adelete_nodes(["a"]))
    await store.aclear()
    assert len(threads) >= 6 and loop_thread not in threads
    assert await store.aget_nodes() == []


def test_a_numpy_vector_is_taken():
    store = MatryoshkaVectorStore()
    store.add(text_nodes("a", "b"))
    query = ask("a", 1)
    query.query_embedding = np.array(query.query_embedding)
    assert store.query(query).ids == ["a"]


def test_metadata_comes_back_in_the_order_in_which_it_was_added(tmp_path):
    # Two orders of one set of keys, and what Chroma can't hold among them.
    orders = {"a": ["z", "none", "a", "m", "empty", "b"], "b": ["b", "empty", "m", "a", "none", "z"]}
    values = {"z": "1", "none": None, "a": 2, "m": 0.5, "empty": [], "b": ["x"]}
    nodes = [
        TextNode(id_=id_, text=id_, metadata={key: values[key] for key in keys}, embedding=[1.0, 0.0])
        for id_, keys in orders.items()
    ]
    store = MatryoshkaVectorStore(persist_dir=str(tmp_path))
    store.add(nodes)
    for read in (
        store.get_nodes(),
        store.query(VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=2)).nodes,
    ):
        assert [list(node.metadata) for node in read] == list(orders.values())
        assert [node.hash for node in read] == [node.hash for node in nodes]
