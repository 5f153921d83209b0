"""The undocumented parts of chromadb that this package relies on are as they were when it was tested."""

import ast
import asyncio
import sqlite3
import ssl
from contextlib import closing
from pathlib import Path

import chromadb
import httpx
import numpy as np
import pytest
from chromadb.api.shared_system_client import SharedSystemClient
from chromadb.errors import InternalError
from packaging.specifiers import SpecifierSet

from mrl_rag import TwoStageIndex
from mrl_rag.compat import chroma
from mrl_rag.errors import InvalidInput, TwoStageIndexError

INDEX = Path(__file__).parents[1] / "mrl_rag" / "index"


def test_this_version_was_tested():
    assert chromadb.__version__ in SpecifierSet(chroma.TESTED)


def test_a_collection_tells_its_clients_settings(tmp_path):
    collection = chromadb.PersistentClient(tmp_path).create_collection("docs")
    assert chroma.settings_of(collection).persist_directory == str(tmp_path)
    del collection._client
    assert chroma.settings_of(collection) is None
    with pytest.raises(InvalidInput, match="pass it as client="):
        TwoStageIndex.from_chroma(collection, in_place=True)


def test_chroma_shares_the_system_of_a_folder_until_it_is_forgotten(tmp_path):
    folder = str(tmp_path)
    assert not chroma.is_open(folder)
    client = chromadb.PersistentClient(folder)
    assert chroma.is_open(folder)
    with pytest.raises(ValueError, match="different settings"):
        chromadb.PersistentClient(folder, settings=chromadb.Settings(allow_reset=True))
    assert chroma.forget_folder(folder) is not None
    assert not chroma.is_open(folder)
    assert chromadb.PersistentClient(folder, settings=chromadb.Settings(allow_reset=True)) is not client


def test_a_folder_that_failed_to_open_can_be_opened_once_it_is_mended(tmp_path):
    file = tmp_path / "chroma.sqlite3"
    file.write_text("no database")
    with pytest.raises(TwoStageIndexError, match="can't open"):
        TwoStageIndex(tmp_path)
    file.unlink()
    with TwoStageIndex(tmp_path) as index:
        index.upsert(["a"], np.ones((1, 8)))


def test_without_a_shared_registry_nothing_is_forgotten(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for part in ("_identifier_to_refcount", "_identifier_to_system"):
            patch.delattr(SharedSystemClient, part)
        assert (chroma.is_open(str(tmp_path)), chroma.forget_folder(str(tmp_path))) == (False, None)


def test_errors_say_what_they_are_about(tmp_path):
    collection = chromadb.PersistentClient(tmp_path).create_collection("docs", embedding_function=None)
    collection.add(["a"], np.ones((1, 8)), documents=["a text"])
    with pytest.raises(InternalError) as too_large:
        collection.get(where_document={"$contains": "x" * 60_000})
    assert chroma.says_too_large(str(too_large.value))
    said = []
    for attempt in map(str, range(5)):
        collection = chromadb.PersistentClient(tmp_path / attempt).create_collection("docs", embedding_function=None)
        (tmp_path / attempt / "chroma.sqlite3").unlink()
        with pytest.raises(InternalError) as not_writable:
            collection.add(["b"], np.ones((1, 8)))
        said.append(str(not_writable.value))
    # On a busy machine Chroma may open the removed file anew, and miss its tables.
    assert any(map(chroma.says_not_writable, said)), said


def test_an_async_connection_is_the_clients_own_and_checks_certificates(chroma_server):
    headers = [{"x-chroma-token": "one"}, {"x-chroma-token": "other"}]
    clients = [chromadb.HttpClient("127.0.0.1", chroma_server, headers=each) for each in headers]

    async def connect():
        pairs = [chroma.async_server(client, 7.0) for client in clients]
        for server, http in pairs:
            assert server._get_client() is http
            assert (http.timeout.connect, http.timeout.read, http.timeout.pool) == (7.0, 7.0, None)
        assert [http.headers["x-chroma-token"] for _, http in pairs] == ["one", "other"]
        assert await pairs[0][0].get_max_batch_size() > 0
        for _, http in pairs:
            await http.aclose()

        clients[0].get_settings().chroma_server_ssl_enabled = True
        server, http = chroma.async_server(clients[0], 7.0)
        assert server.get_api_url().startswith("https://")
        with pytest.raises(httpx.ConnectError):
            await server.get_version()
        assert http._transport._pool._ssl_context.verify_mode == ssl.CERT_REQUIRED
        await http.aclose()

    asyncio.run(connect())
    for client in clients:
        client._server._session.close()


def test_a_connection_gets_a_timeout_unless_it_has_one(chroma_server):
    client = chromadb.HttpClient("127.0.0.1", chroma_server)
    for seconds in (3.0, 5.0):
        chroma.limit_silence(client, seconds)
        assert client._server._session.timeout == httpx.Timeout(3.0)
    assert chroma.address_of(client._server) == f"http://127.0.0.1:{chroma_server}"
    client._server._session.close()
    del client._server
    chroma.limit_silence(client, 1.0)
    assert chroma.with_server(client, lambda server: None) is client


def test_a_panic_of_chromas_core_is_known_by_its_name(tmp_path):
    with TwoStageIndex(tmp_path) as index:
        index.upsert(["a"], np.ones((1, 8)))
    with closing(sqlite3.connect(tmp_path / "chroma.sqlite3")) as connection:
        connection.execute("UPDATE segments SET scope = x'ff'")
        connection.commit()
    with pytest.raises(TwoStageIndexError, match="Chroma failed") as failed:
        TwoStageIndex(tmp_path).search(np.ones(8), where={"page": 1})
    assert chroma.is_panic(failed.value.__cause__)
    assert not chroma.is_panic(KeyboardInterrupt())


def test_no_other_module_of_the_index_reaches_into_a_private_part_of_chroma():
    for file in INDEX.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("_client", "_model", "_server", "_system"):
                assert ast.unparse(node.value) == "self", f"{file.name}, line {node.lineno}"
