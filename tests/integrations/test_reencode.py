"""A store of either framework changes its model, and answers with the new one."""

import pickle

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_mrl import MatryoshkaEmbeddings
from langchain_mrl import MatryoshkaVectorStore as LangChainStore
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index_mrl import MatryoshkaEmbedding
from llama_index_mrl import MatryoshkaVectorStore as LlamaIndexStore

from mrl_rag import TwoStageIndex
from mrl_rag.errors import IndexMismatch, InvalidInput, InvalidTexts
from mrl_rag.testing import DeterministicEncoder

TEXTS = ["numpy.pad adds zeros around an array", "a thread pool runs functions", "json reads and writes text"]


class Vendors(BaseEmbedding):
    """Another vendor's embeddings of LlamaIndex."""

    length: int = 40

    def _get_text_embedding(self, text):
        return DeterministicEncoder(self.length).encode_documents([text])[0].tolist()

    def _get_query_embedding(self, query):
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)


@pytest.mark.parametrize(
    "new",
    [MatryoshkaEmbeddings(encoder=DeterministicEncoder(48)), DeterministicFakeEmbedding(size=40)],
    ids=["ours", "another vendor's"],
)
def test_a_langchain_store_answers_with_its_new_embeddings(tmp_path, new):
    old = MatryoshkaEmbeddings(encoder=DeterministicEncoder(32))
    metadatas = [{"page": page} for page in range(3)]
    with LangChainStore.from_texts(TEXTS, old, metadatas, list("abc"), persist_directory=str(tmp_path)) as store:
        kept = store.reencode(new, shortlist_dim=16)
        assert (store.embeddings, store.index.shortlist_dim, store.index.kept()) == (new, 16, [kept])
        found = store.similarity_search_by_vector(new.embed_documents(TEXTS[:1])[0], k=1)
        assert found == [Document(id="a", page_content=TEXTS[0], metadata={"page": 0})]
        store.add_texts(["more"], ids=["d"])
        assert [document.id for document in store.similarity_search_by_vector(new.embed_documents(["more"])[0], 1)] == [
            "d"
        ]
        restored = pickle.loads(pickle.dumps(store))
        assert (type(restored.embeddings), len(restored.index)) == (type(new), 4)
        restored.close()
    if isinstance(new, MatryoshkaEmbeddings):
        with pytest.raises(IndexMismatch):
            LangChainStore(old, persist_directory=str(tmp_path))


@pytest.mark.parametrize(
    "new",
    [MatryoshkaEmbedding(encoder=DeterministicEncoder(48)), Vendors(model_name="theirs")],
    ids=["ours", "another vendor's"],
)
def test_a_llama_index_store_embeds_its_nodes_as_llama_index_does(tmp_path, new):
    old = MatryoshkaEmbedding(encoder=DeterministicEncoder(32))
    nodes = [TextNode(id_=str(page), text=text, metadata={"page": page}) for page, text in enumerate(TEXTS)]
    for node in nodes:
        node.embedding = old.get_text_embedding(node.get_content(MetadataMode.EMBED))
    with LlamaIndexStore(persist_dir=str(tmp_path), embed_model=old) as store:
        store.add(nodes)
        store.index.upsert(["plain"], DeterministicEncoder(32).encode_documents(["plain"]), ["plain"], [{"page": 9}])
        kept = store.reencode(new)
        assert (store.index.kept(), store.index.model) == ([kept], new.model_name)
        # With the metadata that LlamaIndex shows to embedding models; a record of another framework as it is.
        texts = ["page: 0\n\n" + TEXTS[0], "page: 1\n\n" + TEXTS[1], "page: 2\n\n" + TEXTS[2], "plain"]
        vectors = [record.vector for record in store.index.get(["0", "1", "2", "plain"])]
        np.testing.assert_allclose(vectors, new.get_text_embedding_batch(texts), atol=1e-3)
        asked = VectorStoreQuery(query_embedding=new.get_text_embedding(texts[1]), similarity_top_k=1)
        assert store.query(asked).nodes[0].get_content(MetadataMode.ALL) == nodes[1].get_content(MetadataMode.ALL)
        restored = pickle.loads(pickle.dumps(store))
        assert len(restored.index) == 4
        restored.close()


def test_wrong_embeddings_are_refused_and_records_without_a_text_named(tmp_path):
    index = TwoStageIndex(tmp_path)
    index.upsert(["bare"], np.ones((1, 32)))
    encoder = DeterministicEncoder(48)
    for store, embeddings in (
        (LangChainStore(index=index), MatryoshkaEmbeddings(encoder=encoder)),
        (LlamaIndexStore(index=index), MatryoshkaEmbedding(encoder=encoder)),
    ):
        for wrong in ("a name", None):
            with pytest.raises(InvalidInput, match=r"must be a|pass the new"):
                store.reencode(wrong)
        with pytest.raises(InvalidTexts, match="'bare'"):
            store.reencode(embeddings)
    index.close()
