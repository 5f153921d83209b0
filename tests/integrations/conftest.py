import socket
from collections import Counter

import chromadb
import pytest
from langchain_mrl import MatryoshkaEmbeddings

from mrl_rag.testing import DeterministicEncoder


@pytest.fixture
def words():
    """Embeddings that know words alone, whose queries and documents differ a little."""
    return MatryoshkaEmbeddings(encoder=DeterministicEncoder(64))


@pytest.fixture
def named():
    """Makes embeddings of another vendor, for LangChain or LlamaIndex, that know their model by name alone."""
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from llama_index.core.embeddings import MockEmbedding

    class HuggingFaceEmbeddings(DeterministicFakeEmbedding):
        model_name: str = ""

    def make(framework, model, size=64):
        if framework == "llama_index":
            made = MockEmbedding(embed_dim=size)
            made.model_name = model
            return made
        return HuggingFaceEmbeddings(size=size, model_name=model)

    return make


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network is disabled")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def events():
    """How often LlamaIndex sent each event, by the event's name."""
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.event_handlers import BaseEventHandler

    class Count(BaseEventHandler):
        seen: Counter

        def handle(self, event, **kwargs):
            self.seen[event.class_name()] += 1

    handler = Count(seen=Counter())
    get_dispatcher().add_event_handler(handler)
    yield handler.seen
    get_dispatcher().event_handlers.remove(handler)


@pytest.fixture(scope="session")
def server(chroma_server):
    """A client of a real `chroma run`, one for all: each leaves connections open, which Python warns of."""
    return chromadb.HttpClient(port=chroma_server)
