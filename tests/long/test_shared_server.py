"""Eight processes read an index on one server while two write, and the server is killed in between."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import chromadb
import pytest

from mrl_rag import TwoStageIndex

SECONDS = float(os.environ.get("MRL_RAG_LONG_SECONDS", 0))
pytestmark = pytest.mark.skipif(not SECONDS, reason="make test-long")

HOST, READERS, WRITERS = "127.0.0.1", 8, 2
PROGRAM = Path(__file__).with_name("shared_server.py")


def start(port, folder):
    command = [str(Path(sys.executable).parent / "chroma"), "run", "--host", HOST, "--port", str(port)]
    with folder.with_suffix(".log").open("a") as log:
        server = subprocess.Popen([*command, "--path", str(folder)], stdout=log, stderr=log)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                break
        time.sleep(0.1)
    return server


def test_no_write_is_lost_and_no_answer_is_wrong(tmp_path):
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    server = start(port, tmp_path / "server")
    processes = []
    try:
        for role, number in [("write", n) for n in range(WRITERS)] + [("read", n) for n in range(READERS)]:
            command = [sys.executable, "-W", "ignore", str(PROGRAM), role, str(port), "docs", str(tmp_path)]
            processes.append(
                subprocess.Popen(
                    [*command, str(number), str(SECONDS)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        time.sleep(SECONDS / 2)
        server.kill()
        server.wait()
        server = start(port, tmp_path / "server")
        said = [process.communicate(timeout=SECONDS + 300) for process in processes]
        failures = [error[-2000:] for _, error in said if error]
        assert not failures, "\n\n".join([*failures, (tmp_path / "server.log").read_text()[-2000:]])
        for role, (counts, _) in zip(["writer"] * WRITERS + ["reader"] * READERS, said, strict=True):
            print(role, counts.strip())  # noqa: T201
        expected = stored_at_the_end(tmp_path)
        client = chromadb.HttpClient(HOST, port)
        with TwoStageIndex(client=client, collection="docs") as index:
            found = {record.id: record.document for record in index.get()}
            assert found == expected
            assert index.verify().ok
        client._server._session.close()
    finally:
        for process in processes:
            process.kill()
        server.kill()
        server.wait()


def stored_at_the_end(folder):
    """Return the text of each record that the writers' notes say is there."""
    versions = {}
    for number in range(WRITERS):
        for line in (folder / f"{number}.log").read_text().splitlines():
            event, _, changes = json.loads(line)
            if event == "end":
                versions |= changes
    return {id_: f"{id_} version {version}" for id_, version in versions.items() if version is not None}
