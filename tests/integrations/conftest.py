import socket

import chromadb
import pytest
from langchain_mrl import MatryoshkaEmbeddings

from mrl_rag.testing import DeterministicEncoder


@pytest.fixture
def words():
    """Embeddings that know words alone, whose queries and documents differ a little."""
    return MatryoshkaEmbeddings(encoder=DeterministicEncoder(64))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network is disabled")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def server(chroma_server):
    """A client of a real `chroma run`, one for all: each leaves connections open, which Python warns of."""
    return chromadb.HttpClient(port=chroma_server)
