"""LangChain's own standard suites, complete, sync and async; stores in each place one can live."""

import uuid

import pytest
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaVectorStore, TwoStageRetriever
from langchain_tests.integration_tests import (
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import EmbeddingsUnitTests

from mrl_rag.testing import DeterministicEncoder


@pytest.mark.usefixtures("default_dtype")
class TestEmbeddingsUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self):
        return MatryoshkaEmbeddings

    @property
    def embedding_model_params(self):
        return {"model": "minilm", "device": "cpu"}


@pytest.mark.usefixtures("default_dtype")
class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self):
        return MatryoshkaEmbeddings

    @property
    def embedding_model_params(self):
        return {"model": "minilm", "dim": 64, "device": "cpu"}


@pytest.fixture(params=["memory", "folder", "server"])
def place(request, tmp_path):
    if request.param == "memory":
        return {}
    if request.param == "folder":
        return {"persist_directory": str(tmp_path)}
    return {"client": request.getfixturevalue("server"), "collection_name": f"standard-{uuid.uuid4().hex}"}


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, place):
        return MatryoshkaVectorStore(self.get_embeddings(), **place)


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _in_each_place(self, place):
        self.place = place

    @property
    def retriever_constructor(self):
        return TwoStageRetriever

    @property
    def retriever_constructor_params(self):
        texts = ["a cat", "a dog", "the sea", "a poem about rain"]
        embeddings = MatryoshkaEmbeddings(encoder=DeterministicEncoder())
        return {"vectorstore": MatryoshkaVectorStore.from_texts(texts, embeddings, **self.place)}

    @property
    def retriever_query_example(self):
        return "animals"
