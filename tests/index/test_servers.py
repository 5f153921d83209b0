"""A Chroma server that is restarted, slow or out of reach, and how little is asked of it."""

import asyncio
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import chromadb
import numpy as np
import pytest

from mrl_rag import Plan, RetryPolicy, TwoStageIndex
from mrl_rag.errors import IndexClosed, InvalidInput, InvalidPlan, ServerUnavailable, TwoStageIndexError
from mrl_rag.index.documents import vector_segment

HOST = "127.0.0.1"
TOO_MANY = b'HTTP/1.1 429 Too Many\r\nContent-Length: 49\r\n\r\n{"error": "RateLimitError", "message": "slower!"}'
LOCKED = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 62\r\n\r\n"
    b'{"error": "InternalError", "message": "database is locked..."}'
)
RACED = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 60\r\n\r\n"
    b'{"error": "InternalError", "message": "...Error finding id"}'
)
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy"
NOT_CHROMA = b"HTTP/1.1 404 Not Found\r\nContent-Length: 13\r\n\r\nanother place"
IMPATIENT = RetryPolicy(attempts=2, seconds=5, timeout=0.3)


class Proxy:
    """A TCP proxy before a server, which counts connections and requests, and treats the next requests badly.

    `faults` has one entry per request to come: None passes it on, "drop" closes the connection, "lose" passes it on and
    drops the answer, "ignore" leaves it unanswered, and bytes are answered in the server's place.
    """

    def __init__(self, target):
        self.connections, self.requests, self.faults = 0, [], []
        self._target = target
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(ours,), daemon=True).start()

    def _serve(self, ours):
        with ours, socket.create_connection((HOST, self._target)) as theirs:
            while (request := self._message(ours)) is not None:
                method, path, _ = request.split(b"\r\n", 1)[0].decode().split()
                self.requests.append(f"{method} {path.partition('?')[0].rpartition('/')[2]}")
                fault = self.faults.pop(0) if self.faults else None
                if fault == "drop":
                    return
                if isinstance(fault, bytes):
                    ours.sendall(fault)
                elif fault == "ignore":
                    self._message(ours)  # returns when the client gives up
                    return
                else:
                    theirs.sendall(request)
                    answer = self._message(theirs)
                    if answer is None or fault == "lose":
                        return
                    ours.sendall(answer)

    @staticmethod
    def _message(connection):
        """Return a whole HTTP message; None at the end of the connection."""
        data = b""
        try:
            while b"\r\n\r\n" not in data:
                part = connection.recv(1 << 16)
                if not part:
                    return None
                data += part
            head, _, body = data.partition(b"\r\n\r\n")
            lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if b"content-length" in line]
            while len(body) < int(lengths[0] if lengths else 0):
                part = connection.recv(1 << 16)
                body, data = body + part, data + part
            return data
        except OSError:
            return None

    def close(self):
        self._listener.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Send requests again after hundredths of a second."""
    monkeypatch.setattr("mrl_rag.index.server._FIRST_WAIT", 0.02)
    monkeypatch.setattr("mrl_rag.index.server._JITTER", 0.01)


@pytest.fixture(autouse=True)
def healthy(proxy):
    """Leave no fault to the next test."""
    yield
    proxy.faults = []


@pytest.fixture(scope="module")
def proxy(chroma_server):
    proxy = Proxy(chroma_server)
    yield proxy
    proxy.close()


@pytest.fixture
def name():
    return f"docs-{np.random.default_rng().integers(2**60)}"


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(250, 16)).astype(np.float32)


@contextmanager
def closing(client):
    """chromadb leaves connections open, which Python warns of."""
    try:
        yield client
    finally:
        client._server._session.close()


@pytest.fixture(scope="module")
def client(proxy):
    with closing(chromadb.HttpClient(HOST, proxy.port)) as client:
        yield client


def fill(index, vectors, first=0):
    rows = range(first, first + len(vectors))
    index.upsert(
        [str(row) for row in rows],
        vectors,
        [f"text {row}" for row in rows],
        [{"half": row % 2, "page": row} for row in rows],
    )


@pytest.fixture
def index(client, name, vectors):
    """An index to write to."""
    with TwoStageIndex(client=client, collection=name, shortlist_dim=8, rotation="none") as index:
        fill(index, vectors[:40])
        yield index


@pytest.fixture(scope="module")
def filled(client, vectors):
    """An index to read, longer than a shortlist."""
    name = f"docs-{np.random.default_rng().integers(2**60)}"
    with TwoStageIndex(client=client, collection=name, shortlist_dim=8, rotation="none") as index:
        fill(index, vectors)
        yield index


def asked(proxy, index):
    """What a search asked for, but for the look at the collection's settings once a second."""
    return Counter(request for request in proxy.requests if request != f"GET {index.name}")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"k": 50},
        {"where": {"half": 1}},
        {"where_document": {"$contains": "text 1"}},
        {"explain": True},
        {"plan": Plan(dims=(8, 12, 16), sizes=(100, 50))},
    ],
    ids=str,
)
def test_a_search_is_one_query_and_one_get(filled, proxy, vectors, settings):
    for search in (filled.search, lambda *args, **kwargs: asyncio.run(filled.asearch(*args, **kwargs))):
        search(vectors[3], **settings)
        proxy.requests.clear()
        hits = search(vectors[3], **settings)
        assert asked(proxy, filled) == {"POST query": 1, "POST get": 1}
        assert all(hit.document == f"text {hit.id}" for hit in hits)
        assert [list(hit.metadata) for hit in hits] == [["half", "page"]] * settings.get("k", 10)


def test_many_questions_are_one_query_and_two_gets(filled, proxy, vectors):
    alone = [filled.search(vector, k=5) for vector in vectors[:40]]
    proxy.requests.clear()
    assert filled.search(vectors[:40], k=5) == alone
    assert asked(proxy, filled) == {"POST query": 1, "POST get": 2}


def test_searches_share_one_connection(filled, proxy, vectors):
    before = proxy.connections
    for vector in vectors[:20]:
        filled.search(vector)
    assert proxy.connections == before

    async def search_in_turn():
        for vector in vectors[:20]:
            await filled.asearch(vector)

    asyncio.run(search_in_turn())
    assert proxy.connections == before + 1


@pytest.mark.parametrize(
    "fault", ["drop", "lose", UNAVAILABLE, TOO_MANY, LOCKED], ids=["dropped", "lost", "503", "429", "locked"]
)
def test_a_request_that_is_not_answered_is_sent_again(index, proxy, vectors, fault):
    expected = index.search(vectors[0])
    proxy.faults = [fault, fault, None, fault]
    assert index.search(vectors[0]) == expected
    proxy.faults = [fault, None, fault]
    assert asyncio.run(index.asearch(vectors[0])) == expected
    proxy.faults = [fault, None] * 3
    index.upsert(["0", "new"], vectors[[5, 249]], ["another", "new"])
    proxy.faults = [fault, None] * 2
    index.delete(["1"])
    assert [record.document for record in index.get(["0", "1", "new"])] == ["another", "new"]
    assert index.verify().ok


def test_an_index_is_made_although_answers_are_lost(client, proxy, name, vectors):
    proxy.faults = [None, "lose"] * 8
    with TwoStageIndex(client=client, collection=name) as index:
        fill(index, vectors[:10])
        proxy.faults.clear()
        assert len(index) == 10
        assert index.verify().ok


def test_a_silent_server_is_given_up_in_bounded_time(client, index, proxy, name, vectors):
    with TwoStageIndex(client=client, collection=name, retries=IMPATIENT) as impatient:
        client._server._session.timeout = 0.3
        for search in (impatient.search, lambda vector: asyncio.run(impatient.asearch(vector))):
            impatient.search(vectors[0])
            proxy.faults = ["ignore"] * 2
            with pytest.raises(ServerUnavailable, match=rf"http://{HOST}:{proxy.port} didn't answer 2 attempts in \d"):
                search(vectors[0])
            assert search(vectors[0])[0].id == "0"


def test_a_refused_connection_is_no_chroma_error(client, index, proxy, name, vectors):
    with TwoStageIndex(client=client, collection=name, retries=RetryPolicy(attempts=1)) as impatient:
        proxy.faults = ["drop"]
        with pytest.raises(ServerUnavailable, match="an attempt"):
            impatient.upsert(["x"], vectors[:1])
        # Of two deletions of a collection the second could hit a new one, so it is sent once.
        proxy.faults = [None, "drop"]
        with pytest.raises(ServerUnavailable, match="call again"):
            index.drop()
        index.drop()
        assert len(index) == 0


def test_a_read_of_records_that_are_just_being_written_is_tried_a_few_times(filled, proxy, vectors):
    expected = filled.search(vectors[0])
    proxy.faults = [None, RACED, RACED]
    assert filled.search(vectors[0]) == expected
    proxy.faults = [RACED] * 4
    with pytest.raises(TwoStageIndexError, match="Error finding id"):
        filled.search(vectors[0])
    assert proxy.faults == []


def test_another_server_at_that_address_is_named(filled, proxy, vectors):
    proxy.faults = [NOT_CHROMA] * 3
    with pytest.raises(TwoStageIndexError, match=r"HTTP status 404.*another place"):
        filled.search(vectors[0])


@pytest.mark.parametrize(
    "bad", [{"attempts": 0}, {"attempts": 1.5}, {"seconds": 0}, {"timeout": "1"}, {"timeout": float("inf")}], ids=str
)
def test_a_bad_policy_is_refused(bad):
    with pytest.raises(InvalidInput, match=next(iter(bad))):
        RetryPolicy(**bad)
    with pytest.raises(InvalidInput, match="RetryPolicy"):
        TwoStageIndex(retries=3)


class Server:
    """A `chroma run` that can be killed and started again in the same place."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = probe.getsockname()[1]
        chroma = Path(sys.executable).parent / "chroma"
        self._command = [str(chroma), "run", "--host", HOST, "--port", str(self.port), "--path", str(folder)]
        self.start()

    def start(self):
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex((HOST, self.port)) == 0:
                    return
            time.sleep(0.05)

    def kill(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.kill()


def test_an_ingest_goes_on_when_the_server_was_killed_and_restarted(server, name, vectors):
    with closing(chromadb.HttpClient(HOST, server.port)) as client:
        index = TwoStageIndex(client=client, collection=name, shortlist_dim=8, rotation="none")
        fill(index, vectors[:20])
        stored = threading.Event()

        def ingest():
            for first in range(20, 200, 10):
                fill(index, vectors[first : first + 10], first)
                stored.set()

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(ingest)
            stored.wait()
            server.kill()
            server.start()
            done.result()
        assert len(index) == 200
        assert [hits[0].id for hits in index.search(vectors[:200], k=1)] == [str(row) for row in range(200)]
        assert index.verify().ok
        index.close()


def test_a_server_that_has_lost_its_graph_answers_all_the_same_or_names_repair(server, tmp_path, name, monkeypatch):
    # Above Chroma's 1000, from where on it writes its graph to the disk.
    vectors = np.random.default_rng(0).normal(size=(1200, 16)).astype(np.float32)
    with closing(chromadb.HttpClient(HOST, server.port)) as client:
        index = TwoStageIndex(client=client, collection=name, shortlist_dim=8, rotation="none")
        fill(index, vectors)
        graph = tmp_path / vector_segment(tmp_path, str(index.collection().id))
        server.kill()
        shutil.rmtree(graph)
        server.start()
        assert [hits[0].id for hits in index.search(vectors[::100], k=1)] == [str(row) for row in range(0, 1200, 100)]
        monkeypatch.setattr("mrl_rag.index.server_search._MAX_SCANNED", 1000)
        with pytest.raises(TwoStageIndexError, match=r"finds \d+ of the 1200 records.*Call repair\(\)"):
            index.search(vectors[:1])
        assert index.repair().ok
        assert index.search(vectors[7:8])[0][0].id == "7"
        index.close()


def test_clients_that_store_the_first_records_at_once_make_one_index(proxy, name, vectors):
    def store(part):
        with (
            closing(chromadb.HttpClient(HOST, proxy.port)) as client,
            TwoStageIndex(client=client, collection=name) as index,
        ):
            fill(index, vectors[part * 10 : part * 10 + 10], part * 10)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(store, range(4)))
    with (
        closing(chromadb.HttpClient(HOST, proxy.port)) as client,
        TwoStageIndex(client=client, collection=name) as index,
    ):
        assert len(index) == 40
        assert index.verify().ok


def test_a_reader_gets_a_record_and_its_own_vectors_score_while_another_client_replaces_it(
    index, client, name, vectors, monkeypatch
):
    with TwoStageIndex(client=client, collection=name) as writer:
        writer.search(vectors[0])
        archive = writer._session.opened.stores.archive
        with monkeypatch.context() as patch:
            # As if its process had ended between the two stores.
            patch.setattr(archive, "commit_staged", lambda *_: pytest.fail("ended"))
            with pytest.raises(pytest.fail.Exception):
                writer.upsert(["7"], -vectors[7:8], ["the new text"])
        for search in (index.search, lambda *args: asyncio.run(index.asearch(*args))):
            hit = search(-vectors[7], 1)[0]
            assert (hit.id, hit.document) == ("7", "the new text")
            assert hit.score == pytest.approx(1, abs=1e-5)
            assert search(vectors[7], 1)[0].id != "7"
    index.repair()
    assert index.verify().ok


class NoThreads:
    """An event loop's executor that refuses work."""

    def submit(self, *args, **kwargs):
        raise AssertionError("a thread was asked for")


def without_threads(work):
    async def run():
        asyncio.get_running_loop().run_in_executor = lambda *args: NoThreads().submit()
        return await work()

    return asyncio.run(run())


def test_awaited_searches_find_the_same_without_a_thread(filled, vectors):
    expected = [filled.search(vector, k=3, where={"half": row % 2}) for row, vector in enumerate(vectors[:24])]

    async def search_all():
        searches = (filled.asearch(vector, k=3, where={"half": row % 2}) for row, vector in enumerate(vectors[:24]))
        return await asyncio.gather(*searches)

    for _ in range(2):  # each loop has its own connections
        assert without_threads(search_all) == expected


def test_cancelled_searches_leave_the_others_alone(filled, vectors):
    expected = [filled.search(vector, k=3) for vector in vectors[:20]]

    async def cancel_half():
        tasks = [asyncio.create_task(filled.asearch(vector, k=3)) for vector in vectors[:40]]
        await tasks[3]
        for task in tasks[20:]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(cancel_half())
    assert found[:20] == expected
    assert all(isinstance(answer, asyncio.CancelledError | list) for answer in found[20:])
    assert filled.search(vectors[0], k=3) == expected[0]


def test_asearch_takes_and_refuses_what_search_does(index, vectors):
    async def each():
        assert await index.asearch(vectors[:2], 3, ids=["1", "2", "no"]) == index.search(vectors[:2], 3, ids=["1", "2"])
        assert await index.asearch(vectors[0], score_threshold=0.99) == index.search(vectors[0], score_threshold=0.99)
        assert await index.asearch(vectors[:0]) == []
        many = {"page": {"$in": list(range(20_000))}}
        assert await index.asearch(vectors[0], where=many) == index.search(vectors[0], where=many)
        with pytest.raises(InvalidPlan):
            await index.asearch(vectors[0], plan=Plan(dims=(4, 16), sizes=(50,)))
        with pytest.raises(InvalidInput):
            await index.asearch(vectors[0], where={"$no": 1})
        index.close()
        with pytest.raises(IndexClosed):
            await index.asearch(vectors[0])

    asyncio.run(each())


def test_an_awaited_search_follows_what_other_clients_do_with_the_index(index, client, name, vectors):
    index = TwoStageIndex(client=client, collection=name)

    async def follow():
        await index.asearch(vectors[0])
        with TwoStageIndex(client=client, collection=name) as other:
            other.reindex(shortlist_dim=12)
            assert (await index.asearch(vectors[5], 1))[0].id == "5"
            other.drop()
            assert await index.asearch(vectors[5], 1) == []
            fill(other, vectors[:5])
            assert (await index.asearch(vectors[4], 1))[0].id == "4"

    asyncio.run(follow())


def test_without_a_server_a_thread_searches(vectors):
    with TwoStageIndex() as index:
        fill(index, vectors)
        assert asyncio.run(index.asearch(vectors[:3])) == index.search(vectors[:3])
