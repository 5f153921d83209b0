"""Workers of real web servers over one folder, which another process fills meanwhile."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest

from mrl_rag import TwoStageIndex

SECONDS = float(os.environ.get("MRL_RAG_LONG_SECONDS", 0))
pytestmark = pytest.mark.skipif(not SECONDS, reason="make test-long")

HOST = "127.0.0.1"
DIM = 32
# With PRELOAD the index is opened when the module is imported, before gunicorn forks.
APP = """
import json, os
import numpy as np
from mrl_rag import TwoStageIndex

def opened():
    return TwoStageIndex(os.environ["FOLDER"])

index = opened() if os.environ.get("PRELOAD") else None

def answer(hits):
    return json.dumps([os.getpid(), [[hit.id, hit.document] for hit in hits]]).encode()

def wsgi(environ, start_response):
    global index
    body = json.loads(environ["wsgi.input"].read())
    try:
        index = index or opened()
        status, said = "200 OK", answer(index.search(np.array(body["vector"]), 3, where=body["where"]))
    except Exception as error:
        status, said = "500 Error", f"{type(error).__name__}: {error}".encode()
    start_response(status, [("Content-Length", str(len(said)))])
    return [said]

async def asgi(scope, receive, send):
    global index
    if scope["type"] == "lifespan":
        await receive()
        index = opened()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        index.close()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = b""
    while True:
        part = await receive()
        body += part.get("body", b"")
        if not part.get("more_body"):
            break
    body = json.loads(body)
    said = answer(await index.asearch(np.array(body["vector"]), 3, where=body["where"]))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": said})
"""


@contextmanager
def serving(folder, tmp_path, command, **environment):
    """Run a web server of two workers with that app; yields its port."""
    (tmp_path / "workers_app.py").write_text(APP)
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "FOLDER": str(folder), "PYTHONPATH": paths, **environment}
    command = [sys.executable, "-W", "ignore", "-m", *(part.format(port=port) for part in command)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


UVICORN = ["uvicorn", "workers_app:asgi", "--workers", "2", "--host", HOST, "--port", "{port}"]
GUNICORN = ["gunicorn", "workers_app:wsgi", "--workers", "2", "--bind", f"{HOST}:{{port}}"]


def ask(port, vector, where=None):
    """Ask either worker, over a new connection; return its number, the ids and the texts."""
    connection = http.client.HTTPConnection(HOST, port, timeout=300)
    try:
        connection.request("POST", "/", json.dumps({"vector": vector.tolist(), "where": where}))
        reply = connection.getresponse()
        said = reply.read()
    finally:
        connection.close()
    assert reply.status == 200, said.decode()
    worker, hits = json.loads(said)
    return worker, dict(hits)


@pytest.mark.parametrize(
    ("command", "environment"),
    [(UVICORN, {}), (GUNICORN, {}), ([*GUNICORN, "--preload"], {})],
    ids=["uvicorn", "gunicorn", "gunicorn --preload"],
)
@pytest.mark.parametrize("stored", [300, 21_000], ids=["every record", "two stages"])
def test_every_worker_finds_what_was_written_at_its_next_search(tmp_path, command, environment, stored):
    """The bound: a search that begins after the write has returned finds what it wrote, with a condition as well."""
    vectors = np.random.default_rng(0).normal(size=(stored + 2000, DIM)).astype(np.float32)
    folder = tmp_path / "db"
    with TwoStageIndex(folder) as index:
        index.upsert([str(row) for row in range(stored)], vectors[:stored], metadatas=[{"half": 0}] * stored)
    workers, row, asked = set(), stored, 0
    with serving(folder, tmp_path, command, **environment) as port, TwoStageIndex(folder) as index:
        warm = set()
        while len(warm) < 2:  # Chroma reads its graph at the first search that needs it
            warm.add(ask(port, vectors[0], {"half": {"$gte": 0}})[0])
        end = time.monotonic() + min(SECONDS, 120) / 6
        while (time.monotonic() < end or len(workers) < 2) and row < stored + 2000:
            index.upsert([str(row)], vectors[row : row + 1], [f"text {row}"], [{"half": 1}])
            for where in (None, {"half": 1}, {"half": {"$gte": 0}}, None):
                worker, found = ask(port, vectors[row], where)
                assert found.get(str(row)) == f"text {row}", (where, found)
                workers.add(worker)
                asked += 1
            index.delete([str(row)])
            for where in (None, {"half": 1}):
                worker, found = ask(port, vectors[row], where)
                assert str(row) not in found
            row += 1
    assert len(workers) == 2
    print(f"{asked} searches after {row - stored} writes, none stale")  # noqa: T201


def test_an_index_that_was_opened_before_the_fork_says_what_to_do(tmp_path):
    folder = tmp_path / "db"
    with TwoStageIndex(folder) as index:
        index.upsert(["a"], np.ones((1, DIM)))
    command = [*GUNICORN, "--preload"]
    with (
        serving(folder, tmp_path, command, PRELOAD="1") as port,
        pytest.raises(AssertionError, match=r"IndexClosed: index 'docs' was open .* Open it only after the fork"),
    ):
        ask(port, np.ones(DIM))
