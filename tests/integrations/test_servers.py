"""On a server the frameworks' async methods await the requests, and no thread is asked for."""

import asyncio
import socket

import chromadb
import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langchain_mrl import MatryoshkaVectorStore, TwoStageRetriever
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from llama_index_mrl import MatryoshkaVectorStore as LlamaStore
from llama_index_mrl import TwoStageRetriever as LlamaRetriever

from mrl_rag import TwoStageIndex
from mrl_rag.errors import ServerUnavailable
from mrl_rag.testing import DeterministicEncoder

ENCODER = DeterministicEncoder(32)
TEXTS = [f"text number {row} of many" for row in range(150)]


class Awaited(Embeddings):
    """Embeddings that await, as those of a vendor do."""

    def embed_documents(self, texts):
        return ENCODER.encode_documents(texts).tolist()

    def embed_query(self, text):
        return ENCODER.encode_queries([text])[0].tolist()

    async def aembed_query(self, text):
        await asyncio.sleep(0)
        return self.embed_query(text)


class AwaitedByLlama(BaseEmbedding):
    def _get_text_embedding(self, text):
        return ENCODER.encode_documents([text])[0].tolist()

    def _get_query_embedding(self, query):
        return ENCODER.encode_queries([query])[0].tolist()

    async def _aget_query_embedding(self, query):
        return self._get_query_embedding(query)


@pytest.fixture(scope="module")
def index(chroma_server):
    client = chromadb.HttpClient("127.0.0.1", chroma_server)
    name = f"docs-{np.random.default_rng().integers(2**60)}"
    index = TwoStageIndex(client=client, collection=name, full_dim=32, shortlist_dim=8, rotation="none")
    index.upsert(
        [str(row) for row in range(150)],
        ENCODER.encode_documents(TEXTS),
        TEXTS,
        [{"half": row % 2} for row in range(150)],
    )
    index.search(np.ones(32))
    yield index
    index.close()
    client._server._session.close()


def without_threads(work):
    def refuse(*args):
        raise AssertionError("a thread was asked for")

    async def run():
        asyncio.get_running_loop().run_in_executor = refuse
        return await work

    return asyncio.run(run())


def test_langchains_async_methods_await_on_a_server(index):
    store = MatryoshkaVectorStore(Awaited(), index=index)
    retriever = TwoStageRetriever(vectorstore=store, k=3, filter={"half": 1})
    vector = Awaited().embed_query(TEXTS[3])

    async def each():
        together = await asyncio.gather(*(retriever.ainvoke(text) for text in TEXTS[:8]))
        return (
            together,
            await store.asimilarity_search(TEXTS[3]),
            await store.asimilarity_search_with_relevance_scores(TEXTS[3]),
            await store.asimilarity_search_by_vector(vector),
            await retriever.abatch(TEXTS[:3]),
        )

    assert without_threads(each()) == (
        [retriever.invoke(text) for text in TEXTS[:8]],
        store.similarity_search(TEXTS[3]),
        store.similarity_search_with_relevance_scores(TEXTS[3]),
        store.similarity_search_by_vector(vector),
        retriever.batch(TEXTS[:3]),
    )


def test_llama_indexs_async_methods_await_on_a_server(index):
    model = AwaitedByLlama()
    store = LlamaStore(index=index)
    odd = MetadataFilters(filters=[MetadataFilter(key="half", value=1)])
    retrievers = [
        LlamaRetriever(vector_store=store, embed_model=model, similarity_top_k=3, filters=odd),
        VectorStoreIndex.from_vector_store(store, embed_model=model).as_retriever(similarity_top_k=3, filters=odd),
    ]

    def found(nodes):
        return [(scored.node.node_id, scored.score, scored.node.text) for scored in nodes]

    for retriever in retrievers:

        async def each(retriever=retriever):
            return await asyncio.gather(*(retriever.aretrieve(text) for text in TEXTS[:8]))

        assert list(map(found, without_threads(each()))) == [found(retriever.retrieve(text)) for text in TEXTS[:8]]
    assert isinstance(retrievers[0].retrieve(TEXTS[0])[0].node, TextNode)


def test_a_store_says_that_its_server_cant_be_reached():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for store in (
        lambda: MatryoshkaVectorStore(Awaited(), host="127.0.0.1", port=port),
        lambda: LlamaStore(host="127.0.0.1", port=port),
    ):
        with pytest.raises(ServerUnavailable, match=rf"127.0.0.1:{port} can't be reached"):
            store()
