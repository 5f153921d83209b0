"""The documented examples of LlamaIndex's Chroma store, with only the class changed, and its filled collections."""

import inspect
import re
import time

import chromadb
import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index_mrl import MatryoshkaEmbedding, MatryoshkaVectorStore

from mrl_rag import TwoStageIndex
from mrl_rag.errors import InvalidInput, PlainCollection
from mrl_rag.testing import DeterministicEncoder

ENCODER = DeterministicEncoder(32)
EMBED_MODEL = MatryoshkaEmbedding(encoder=ENCODER)
DOCUMENTS = [
    Document(doc_id="pad", text="numpy.pad adds zeros around an array.", metadata={"author": "x", "year": None}),
    Document(doc_id="pool", text="A thread pool runs functions.", metadata={"author": "y", "year": 2001}),
]
BOTH = pytest.mark.parametrize("store_class", [ChromaVectorStore, MatryoshkaVectorStore])


@pytest.fixture
def name():
    return f"docs-{time.time_ns()}"


@BOTH
def test_the_example_in_its_docstring(store_class, name):
    code = re.search(r"```python\n(.*?)```", ChromaVectorStore.__doc__, re.DOTALL)[1]
    code = re.sub("(?m)^        ", "", code).replace("example_collection", name)
    code = code.replace(
        "from llama_index.vector_stores.chroma import ChromaVectorStore",
        f"from {store_class.__module__.removesuffix('.base')} import {store_class.__name__} as ChromaVectorStore",
    )
    known = {"MockLLM": MockLLM, "documents": DOCUMENTS, "embed_model": EMBED_MODEL}
    known |= {"VectorStoreIndex": VectorStoreIndex, "StorageContext": StorageContext}
    # The docstring leaves out how its index is made, and takes the LLM from the settings.
    code = code.replace(
        "query_engine = index.as_query_engine(",
        "storage_context = StorageContext.from_defaults(vector_store=vector_store)\n"
        "index = VectorStoreIndex.from_documents(documents, storage_context=storage_context, embed_model=embed_model)\n"
        "query_engine = index.as_query_engine(llm=MockLLM(), ",
    )
    exec(code, known)
    assert isinstance(known["vector_store"], store_class)
    assert known["query_engine"].query("A thread pool").source_nodes[0].text == DOCUMENTS[1].text


@BOTH
def test_the_tutorial_on_disk(store_class, name, tmp_path):
    # Save to disk
    db = chromadb.PersistentClient(path=str(tmp_path))
    chroma_collection = db.get_or_create_collection(name)
    vector_store = store_class(chroma_collection=chroma_collection)
    storage_context = StorageContext.from_defaults(vector_store=vector_store)
    VectorStoreIndex.from_documents(DOCUMENTS, storage_context=storage_context, embed_model=EMBED_MODEL)

    # Load from disk
    db2 = chromadb.PersistentClient(path=str(tmp_path))
    chroma_collection = db2.get_or_create_collection(name)
    vector_store = store_class(chroma_collection=chroma_collection)
    index = VectorStoreIndex.from_vector_store(vector_store, embed_model=EMBED_MODEL)
    engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=1)
    assert "numpy.pad" in str(engine.query("zeros around an array"))

    # Filter by metadata, update and delete
    filters = MetadataFilters(filters=[MetadataFilter(key="author", value="y")])
    assert [n.text for n in index.as_retriever(filters=filters).retrieve("array")] == [DOCUMENTS[1].text]
    doc_to_update = chroma_collection.get(limit=1)
    doc_to_update["metadatas"][0] = {**doc_to_update["metadatas"][0], "author": "Paul"}
    chroma_collection.update(ids=[doc_to_update["ids"][0]], metadatas=[doc_to_update["metadatas"][0]])
    assert chroma_collection.get(limit=1)["metadatas"][0]["author"] == "Paul"
    assert chroma_collection.count() == 2
    chroma_collection.delete(ids=[doc_to_update["ids"][0]])
    assert chroma_collection.count() == 1
    assert len(index.as_retriever().retrieve("array")) == 1


@BOTH
def test_the_tutorial_over_a_server(store_class, name, chroma_server):
    remote_db = chromadb.HttpClient(port=chroma_server)
    vector_store = store_class(chroma_collection=remote_db.get_or_create_collection(name))
    storage_context = StorageContext.from_defaults(vector_store=vector_store)
    index = VectorStoreIndex.from_documents(DOCUMENTS, storage_context=storage_context, embed_model=EMBED_MODEL)
    assert index.as_retriever(similarity_top_k=1).retrieve("thread pool")[0].text == DOCUMENTS[1].text


@BOTH
def test_the_other_ways_to_make_one(store_class, name, tmp_path, chroma_server):
    node = TextNode(id_="a", text="a", embedding=[1.0, 0.0])
    query = VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=1)
    for store in (
        store_class.from_collection(chromadb.EphemeralClient().get_or_create_collection(name)),
        store_class.from_params(name, persist_dir=str(tmp_path)),
        store_class.from_params(collection_name=name, host="127.0.0.1", port=chroma_server),
        store_class(collection_name=f"{name}-2", host="127.0.0.1", port=str(chroma_server)),
    ):
        store.add([node])
        assert store.query(query).ids == ["a"]
    with pytest.raises(ValueError, match="persist_dir"):
        store_class.from_params(name)


def filled(client, name):
    """A collection that LlamaIndex's Chroma store filled."""
    collection = client.create_collection(name)
    vectors = ENCODER.encode_documents([document.text for document in DOCUMENTS]).tolist()
    ChromaVectorStore(chroma_collection=collection).add(
        [
            TextNode(
                id_=document.doc_id,
                text=document.text,
                metadata=document.metadata,
                embedding=vector,
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"source {document.doc_id}")},
            )
            for document, vector in zip(DOCUMENTS, vectors, strict=True)
        ]
    )
    return collection


@pytest.mark.parametrize("place", ["memory", "folder", "server"])
def test_a_filled_collection_is_taken_over_without_encoding(place, name, tmp_path, request):
    if place == "server":
        client = chromadb.HttpClient(port=request.getfixturevalue("chroma_server"))
    else:
        client = chromadb.EphemeralClient() if place == "memory" else chromadb.PersistentClient(tmp_path)
    collection = filled(client, name)
    before = ChromaVectorStore(chroma_collection=collection).get_nodes(None)
    with pytest.raises(PlainCollection, match="in_place=True"):
        MatryoshkaVectorStore(chroma_collection=collection)
    assert collection.count() == 2

    TwoStageIndex.from_chroma(collection, in_place=True)
    store = MatryoshkaVectorStore(chroma_collection=client.get_collection(name))
    assert store.get_nodes([node.node_id for node in before]) == before
    found = store.query(VectorStoreQuery(query_embedding=ENCODER.encode_documents(["thread pool"])[0].tolist()))
    assert found.ids == ["pool"]
    empty = MetadataFilters(filters=[MetadataFilter(key="year", operator="is_empty", value=None)])
    assert [node.node_id for node in store.get_nodes(filters=empty)] == ["pad"]
    store.delete("source pad")
    assert [node.node_id for node in store.get_nodes()] == ["pool"]


def test_settings_of_the_collection_are_kept_or_refused_not_ignored(name, tmp_path):
    cosine = {"metadata": {"hnsw:space": "cosine"}, "configuration": {"hnsw": {"space": "cosine"}}}
    for settings in (None, {}, {"metadata": None}, cosine):
        MatryoshkaVectorStore.from_params(name, persist_dir=str(tmp_path), collection_kwargs=settings)
    for settings in ({"metadata": {"hnsw:space": "l2"}}, {"embedding_function": object()}):
        with pytest.raises(InvalidInput, match="collection_kwargs"):
            MatryoshkaVectorStore.from_params(name, persist_dir=str(tmp_path), collection_kwargs=settings)


@BOTH
def test_the_collection_it_was_given_stays_the_users_own(store_class, name, tmp_path):
    node = TextNode(id_="a", text="a", embedding=[1.0, 0.0])
    collection = chromadb.PersistentClient(tmp_path).create_collection(name)
    store = store_class(collection)
    store.add([node])
    assert (collection.count(), collection.get()["documents"]) == (1, ["a"])
    chromadb.PersistentClient(tmp_path).create_collection("empty")
    opened = store_class.from_params("empty", persist_dir=str(tmp_path), collection_kwargs={})
    opened.add([node])
    assert opened.query(VectorStoreQuery(query_embedding=[1.0, 0.0])).ids == ["a"]


@BOTH
@pytest.mark.parametrize("vector", [None, []])
def test_without_a_vector_the_filters_alone_choose(store_class, name, vector):
    store = store_class(chroma_collection=chromadb.EphemeralClient().create_collection(name))
    store.add([TextNode(id_=i, text=i, metadata={"n": n}, embedding=[1.0, n]) for n, i in enumerate("abcde")])
    filters = MetadataFilters(filters=[MetadataFilter(key="n", value=1, operator=">=")])
    asked = VectorStoreQuery(query_embedding=vector, filters=filters, similarity_top_k=3)
    found = store.query(asked)
    assert (found.ids, [node.text for node in found.nodes], found.similarities) == (list("bcd"), list("bcd"), None)
    index = VectorStoreIndex.from_vector_store(store, embed_model=EMBED_MODEL)
    assert [n.node_id for n in index.as_retriever(filters=filters, similarity_top_k=3).retrieve("")] == list("bcd")


@BOTH
def test_flat_metadata_is_asked_for_or_not(store_class, name):
    nested = TextNode(id_="a", text="a", metadata={"deep": {"a": 1}}, embedding=[1.0, 0.0])
    store = store_class(chroma_collection=chromadb.EphemeralClient().create_collection(name), flat_metadata=True)
    with pytest.raises(ValueError, match="deep must be one of"):
        store.add([nested])
    assert store.get_nodes(None) == []
    free = MatryoshkaVectorStore(flat_metadata=False)
    free.add([nested])
    assert free.get_nodes()[0].metadata == {"deep": {"a": 1}}


@pytest.mark.parametrize(
    "method", [name for name in vars(ChromaVectorStore) if not name.startswith("_")] + ["__init__"]
)
def test_it_takes_every_argument_that_the_other_takes(method):
    theirs = getattr(ChromaVectorStore, method, None)
    if not callable(theirs):
        assert isinstance(theirs, property) or method in MatryoshkaVectorStore.model_fields or method == "model_config"
        return
    theirs = inspect.signature(theirs).parameters
    ours = inspect.signature(getattr(MatryoshkaVectorStore, method)).parameters
    known = {name for name, one in ours.items() if one.kind != one.VAR_KEYWORD}
    rest = {name for name, one in theirs.items() if one.kind != one.VAR_KEYWORD} - known
    if method == "from_params":
        rest -= set(inspect.signature(MatryoshkaVectorStore).parameters)
    assert rest <= ({"flat_metadata"} if method == "__init__" else set())
    if method != "__init__":  # whose order the docstring gives
        positions = [name for name, one in theirs.items() if one.kind == one.POSITIONAL_OR_KEYWORD]
        assert [name for name in ours if name in positions] == [name for name in positions if name in ours]
