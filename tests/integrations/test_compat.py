"""Undocumented parts of the frameworks: they are as they were, and without them the public way serves."""

from importlib.metadata import version

import chromadb
import langchain_mrl.compat
import llama_index_mrl.compat
import pytest
from langchain_chroma import Chroma
from langchain_core.vectorstores import InMemoryVectorStore
from packaging.specifiers import SpecifierSet

from mrl_rag.errors import InvalidInput


@pytest.mark.parametrize(
    ("module", "distribution"),
    [(langchain_mrl.compat, "langchain-chroma"), (llama_index_mrl.compat, "llama-index-core")],
)
def test_the_installed_version_is_one_that_was_tried(module, distribution):
    """If this fails: run tests/integrations with the new version, then widen the range."""
    assert version(distribution) in SpecifierSet(module.TESTED)


def test_the_collection_of_a_langchain_chroma_store_is_found(words):
    store = Chroma("compat", words, client=chromadb.EphemeralClient())
    collection = langchain_mrl.compat.collection_of(store)
    assert collection.name == "compat"
    assert langchain_mrl.compat.collection_of(collection) is collection
    with pytest.raises(InvalidInput, match="get_collection"):
        langchain_mrl.compat.collection_of(InMemoryVectorStore(words))


def test_nodes_are_stored_under_the_keys_of_collections_that_are_filled_already():
    """If this fails: nodes in existing collections are not recognised any more."""
    keys = {"_node_content", "_node_type", "document_id", "doc_id", "ref_doc_id"}
    assert keys == llama_index_mrl.compat.NODE_KEYS
    assert (llama_index_mrl.compat.TYPE_KEY, llama_index_mrl.compat.DOCUMENT_KEY) == ("_node_type", "document_id")
