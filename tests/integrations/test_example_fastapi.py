"""The FastAPI example, as its docstring says: two workers of uvicorn over a real `chroma run`."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXTS = ["numpy.pad adds zeros around an array.", "A thread pool runs functions in parallel."]


@pytest.fixture(scope="module")
def address(chroma_server, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "--workers", "2", "--port", str(port)]
    environment = {**os.environ, "CHROMA_HOST": "127.0.0.1", "CHROMA_PORT": str(chroma_server), "COLLECTION": "fastapi"}
    log = tmp_path_factory.mktemp("uvicorn") / "log"
    with log.open("w") as file:
        server = subprocess.Popen([*command, "fastapi_app:app"], env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 180
        while log.read_text().count("Application startup complete") < 2:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def test_what_one_worker_stores_every_worker_finds(address):
    stored = httpx.post(f"{address}/texts", json={"texts": TEXTS, "metadatas": [{"page": 1}, {"page": 2}]}, timeout=60)
    assert stored.status_code == 200, stored.text
    found = {}
    deadline = time.monotonic() + 120
    while len(found) < 2:
        # A new connection each, which the operating system gives to either worker.
        answer = httpx.get(f"{address}/search", params={"question": "parallel work", "k": 1}, timeout=60).json()
        found[answer["worker"]] = answer["hits"]
        assert time.monotonic() < deadline, f"only worker {list(found)} answers"
    for hits in found.values():
        assert (hits[0]["document"], hits[0]["metadata"], hits[0]["id"]) == (
            TEXTS[1],
            {"page": 2},
            stored.json()["ids"][1],
        )


def test_a_bad_request_is_told_what_is_wrong(address):
    answer = httpx.get(f"{address}/search", params={"question": "parallel work", "k": 0}, timeout=60)
    assert (answer.status_code, "at least 1" in answer.json()["detail"]) == (422, True)
