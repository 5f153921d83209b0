import json
import subprocess
import sys

import chromadb
import numpy as np
import pytest

from mrl_rag import TwoStageIndex

# Runs what it is sent, and answers with `answer` and the error.
OTHER_PROCESS = """
import json, sys
for line in sys.stdin:
    answer = failure = None
    try:
        exec(json.loads(line))
    except Exception as error:
        failure = type(error).__name__, str(error)
    print(json.dumps([answer, failure]), flush=True)
"""


@pytest.fixture(params=["folder", "client_in_memory", "server"])
def open_index(request, tmp_path):
    """Open the same index repeatedly, in a folder, on a client in memory, or on a server."""
    name = f"docs-{np.random.default_rng().integers(2**60)}"
    if request.param == "folder":
        place = {"path": tmp_path / "db"}
    elif request.param == "client_in_memory":
        place = {"client": chromadb.EphemeralClient()}
    else:
        place = {"client": chromadb.HttpClient(port=request.getfixturevalue("chroma_server"))}
    return lambda **settings: TwoStageIndex(collection=name, **place, **settings)


@pytest.fixture
def other_process():
    """Run code in another process, and return its `answer`, and its error's name and message or None."""
    command = [sys.executable, "-W", "ignore", "-c", OTHER_PROCESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(code):
            process.stdin.write(json.dumps(code) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.communicate()


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)


@pytest.fixture
def filled(open_index, vectors):
    index = open_index(full_dim=32, shortlist_dim=8)
    index.upsert(
        [f"id-{i}" for i in range(300)],
        vectors,
        documents=[f"text {i}" for i in range(300)],
        metadatas=[{"page": i, "even": i % 2 == 0} for i in range(300)],
    )
    return index
