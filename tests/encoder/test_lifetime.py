"""Forks, the end of the process, `with`, and use after `close`: an encoder works, or says why not."""

import asyncio
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from langchain_mrl import MatryoshkaEmbeddings
from llama_index_mrl import MatryoshkaEmbedding

from mrl_rag import CachedEncoder, MatryoshkaEncoder
from mrl_rag.encoder.nomic import NomicEncoder
from mrl_rag.encoder.openai import OpenAIEncoder
from mrl_rag.errors import EncoderClosed
from mrl_rag.testing import DeterministicEncoder


@pytest.mark.parametrize("used", [False, True], ids=["made", "used"])
def test_a_child_encodes_whatever_its_parent_did_before_the_fork(in_child, used, cosine_distance):
    passages = ["numpy.pad adds zeros or other values around an array.", "json.loads turns a JSON text into objects."]
    encoder = MatryoshkaEncoder("minilm", device="cpu", dtype="float32")
    embeddings, model = MatryoshkaEmbeddings(encoder=encoder), MatryoshkaEmbedding(encoder=encoder)
    if used:
        expected = encoder.encode(passages)
        asyncio.run(encoder.aencode(["a"]))

    def work():
        found = encoder.encode(passages)
        if used:
            assert cosine_distance(found, expected).max() < 1e-5
        question = embeddings.embed_query("a")
        assert question == model.get_query_embedding("a") == asyncio.run(embeddings.aembed_query("a"))
        new = MatryoshkaEncoder("minilm", device="cpu", dtype="float32")
        assert cosine_distance(new.encode(passages), found).max() < 1e-5

    in_child(work)
    assert encoder.encode(passages).shape == (len(passages), 384)


@pytest.mark.usefixtures("default_dtype")
def test_a_child_does_not_wait_for_a_thread_that_encoded_in_its_parent(in_child, tiny_bert):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu")
    encoding, may_go_on = threading.Event(), threading.Event()
    run = encoder._network.run

    def held(rows):
        encoding.set()
        may_go_on.wait(30)
        return run(rows)

    encoder._network.run = held
    thread = threading.Thread(target=encoder.encode, args=(["a"],))
    thread.start()
    encoding.wait(30)

    def work():
        encoder._network.run = run
        assert encoder.encode(["a", "b"]).shape == (2, 16)
        assert asyncio.run(encoder.aencode(["a"])).shape == (1, 16)

    in_child(work)
    may_go_on.set()
    thread.join()


def test_a_child_reads_and_writes_a_cache_by_a_connection_of_its_own(in_child, tmp_path):
    cached = CachedEncoder(DeterministicEncoder(8), tmp_path / "vectors.sqlite3")
    expected = cached.encode(["a", "b"])
    with cached._lock:  # as in another thread's write
        in_child(lambda: np.testing.assert_array_equal(cached.encode(["b", "a", "c"])[1::-1], expected))
    assert cached._connection.execute("SELECT count(*) FROM vectors").fetchone() == (3,)
    cached.close()


@pytest.fixture(params=["openai", "nomic"])
def remote(request, serve, answer):
    """An encoder over a server, which asks it one text at a time, and the server."""
    name = "input" if request.param == "openai" else "texts"

    def respond(path, headers, body):
        rows = [[float(len(text)), 1.0] for text in body[name]]
        if name == "input":
            return answer(200, {"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]})
        return answer(200, {"embeddings": rows})

    server = serve(respond)
    make = OpenAIEncoder if request.param == "openai" else NomicEncoder
    with make("org/tiny", api_key="key", base_url=server.url, concurrency=1) as encoder:
        yield encoder, server


def lengths(vectors):
    return (vectors[:, 0] / vectors[:, 1]).round().astype(int).tolist()


def test_a_child_asks_a_server_by_a_connection_of_its_own(in_child, remote, answer):
    encoder, server = remote
    assert lengths(encoder.encode(["abc"])) == [3]
    # Another thread has the only turn, and waits to try again.
    refused = threading.Event()
    server.script = [answer(503, {"detail": "later"}, {"Retry-After": "100"})]
    own = server._serve
    server._serve = lambda handler: (own(handler), refused.set())
    waiting = ThreadPoolExecutor(1).submit(encoder.encode, ["a"])
    refused.wait(30)

    def work():
        assert lengths(encoder.encode(["x" * n for n in range(1, 60)])) == list(range(1, 60))

    in_child(work)
    encoder.close()
    with pytest.raises(EncoderClosed):
        waiting.result(30)


SCRIPT = """
import os, random, sys, threading, time
from mrl_rag import MatryoshkaEncoder
encoder = MatryoshkaEncoder(sys.argv[1], device="cpu", dtype="float32")
texts = [f"a text of the corpus {number}" for number in range(50)]
children = []
for number in range(4):
    pid = os.fork()
    if not pid:
        break
    children.append(pid)
else:
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
    sys.exit()

def work():
    while True:
        encoder.encode(texts)

threading.Thread(target=work, daemon=True).start()
time.sleep(0.1 + 0.2 * random.random())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system doesn't fork")
def test_a_process_ends_cleanly_while_a_daemon_thread_encodes(tiny_bert):
    ran = subprocess.run([sys.executable, "-c", SCRIPT, tiny_bert], capture_output=True, text=True, timeout=120)
    assert (ran.stdout, ran.stderr) == (f"{[0] * 4}\n", "")


@pytest.mark.usefixtures("default_dtype")
def test_with_closes_what_it_opens_and_a_closed_encoder_says_so(tiny_bert, tmp_path):
    file = tmp_path / "vectors.sqlite3"
    for make in (
        lambda: MatryoshkaEncoder(tiny_bert, device="cpu"),
        lambda: CachedEncoder(DeterministicEncoder(8), file),
        lambda: OpenAIEncoder("org/tiny", base_url="http://127.0.0.1:1/v1", full_dim=8),
    ):
        with make() as encoder:
            pass
        for again in (encoder.encode, lambda texts, encoder=encoder: asyncio.run(encoder.aencode(texts))):
            with pytest.raises(EncoderClosed, match="was closed"):
                again(["a"])
        encoder.close()


def test_no_thread_is_started_by_making_an_encoder_or_by_encoding(tiny_bert):
    before = threading.active_count()
    with MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32") as encoder:
        encoder.encode(["a", "b"])
        assert threading.active_count() == before


def test_a_pickled_cache_opens_the_file_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached = CachedEncoder(DeterministicEncoder(8), "vectors.sqlite3")
    expected = cached.encode(["a"])
    monkeypatch.chdir("/")
    with pickle.loads(pickle.dumps(cached)) as copy:
        np.testing.assert_array_equal(copy.encode(["a"]), expected)
    cached.close()
