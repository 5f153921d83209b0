"""One collection, filled and read by both frameworks."""

import chromadb
import pytest
from langchain_core.documents import Document
from langchain_mrl import MatryoshkaEmbeddings
from langchain_mrl import MatryoshkaVectorStore as LangChainStore
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from llama_index_mrl import MatryoshkaEmbedding
from llama_index_mrl import MatryoshkaVectorStore as LlamaIndexStore

from mrl_rag import TwoStageIndex
from mrl_rag.testing import DeterministicEncoder

ENCODER = DeterministicEncoder(64)
TEXTS = {"pad": "numpy.pad adds zeros around an array", "pool": "a thread pool runs functions · 東京"}
METADATA = {
    "pad": {"page": 1, "share": 0.5, "draft": True, "tags": ["a", "b"]},
    "pool": {"page": 2, "share": 1.5, "draft": False, "tags": ["b"]},
}


@pytest.fixture(params=["memory", "folder", "server"])
def stores(request, tmp_path):
    """A store of each framework over one collection, opened apart."""
    if request.param == "memory":
        index = TwoStageIndex()
        places = ({"index": index}, {"index": index})
    elif request.param == "folder":
        places = (
            {"collection_name": "docs", "persist_directory": str(tmp_path)},
            {"collection_name": "docs", "persist_dir": str(tmp_path)},
        )
    else:
        client = chromadb.HttpClient(port=request.getfixturevalue("chroma_server"))
        name = f"docs-{tmp_path.name}"
        places = ({"collection_name": name, "client": client}, {"collection_name": name, "client": client})
    langchain = LangChainStore(MatryoshkaEmbeddings(encoder=ENCODER), **places[0])
    return langchain, LlamaIndexStore(**places[1])


def fill_from_langchain(store):
    store.add_documents([Document(id=id_, page_content=text, metadata=METADATA[id_]) for id_, text in TEXTS.items()])


def fill_from_llama_index(store):
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="a book")}
    nodes = [
        TextNode(id_=id_, text=text, metadata={**METADATA[id_], "none": None}, relationships=source)
        for id_, text in TEXTS.items()
    ]
    store.add(MatryoshkaEmbedding(encoder=ENCODER)(nodes))


def where(key, operator, value):
    return MetadataFilters(filters=[MetadataFilter(key=key, operator=operator, value=value)])


def retrieve(store, question, **arguments):
    index = VectorStoreIndex.from_vector_store(store, embed_model=MatryoshkaEmbedding(encoder=ENCODER))
    return [found.node for found in index.as_retriever(**arguments).retrieve(question)]


def test_what_langchain_filled_llama_index_finds_intact(stores):
    langchain, llama_index = stores
    fill_from_langchain(langchain)
    node = retrieve(llama_index, "thread pool", similarity_top_k=1)[0]
    assert (node.node_id, node.text, node.metadata) == ("pool", TEXTS["pool"], METADATA["pool"])
    assert [n.node_id for n in retrieve(llama_index, "text", filters=where("page", ">", 1))] == ["pool"]
    assert [n.node_id for n in retrieve(llama_index, "text", filters=where("tags", "contains", "a"))] == ["pad"]
    llama_index.delete_nodes(["pad"])
    assert langchain.get_by_ids(["pad", "pool"]) == [
        Document(id="pool", page_content=TEXTS["pool"], metadata=METADATA["pool"])
    ]


def test_what_llama_index_filled_langchain_finds_intact(stores):
    langchain, llama_index = stores
    fill_from_llama_index(llama_index)
    document = langchain.similarity_search("thread pool", k=1)[0]
    assert (document.id, document.page_content) == ("pool", TEXTS["pool"])
    assert METADATA["pool"].items() <= document.metadata.items()
    assert [d.id for d in langchain.similarity_search("text", k=2, filter={"page": {"$gt": 1}})] == ["pool"]
    langchain.delete(["pool"])
    assert [node.node_id for node in llama_index.get_nodes()] == ["pad"]


def test_what_langchain_changes_llama_index_sees(stores):
    langchain, llama_index = stores
    fill_from_llama_index(llama_index)
    document = langchain.get_by_ids(["pad"])[0]
    document.page_content = "numpy.pad, changed"
    document.metadata |= {"page": 7, "new": "key"}
    del document.metadata["draft"]
    langchain.add_documents([document])
    node = llama_index.get_nodes(["pad"])[0]
    assert node.text == "numpy.pad, changed"
    assert node.metadata == {"page": 7, "share": 0.5, "tags": ["a", "b"], "new": "key", "none": None}
    assert node.ref_doc_id == "a book"
    assert llama_index.get_nodes(["pool"])[0].metadata == {**METADATA["pool"], "none": None}


def test_both_fill_one_collection_and_find_each_others_records(stores):
    langchain, llama_index = stores
    fill_from_langchain(langchain)
    llama_index.add(MatryoshkaEmbedding(encoder=ENCODER)([TextNode(id_="json", text="json reads text")]))
    assert langchain.similarity_search("json text", k=1)[0].id == "json"
    assert {node.node_id for node in retrieve(llama_index, "text", similarity_top_k=9)} == {"json", "pad", "pool"}
    assert langchain.index.verify().ok
