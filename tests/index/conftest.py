import json
import multiprocessing
from contextlib import contextmanager

import chromadb
import numpy as np
import pytest

from mrl_rag import TwoStageIndex

# Runs what it is sent, and answers with `answer` and the error.
OTHER_PROCESS = """
import json, warnings
warnings.simplefilter("ignore")
while True:
    try:
        code = connection.recv()
    except EOFError:
        break
    answer = failure = None
    try:
        exec(code)
    except Exception as error:
        failure = type(error).__name__, str(error)
    connection.send(json.dumps([answer, failure]))
"""


@pytest.fixture(scope="module", params=["folder", "client_in_memory", "server"])
def new_place(request, tmp_path_factory, keep_highest_row):
    """Make a place for an index, in each kind: a function that opens the index there, as often as it is called."""

    @contextmanager
    def make():
        name = f"docs-{np.random.default_rng().integers(2**60)}"
        if request.param == "folder":
            place = {"path": tmp_path_factory.mktemp("index") / "db"}
        elif request.param == "client_in_memory":
            place = {"client": chromadb.EphemeralClient()}
        else:
            place = {"client": chromadb.HttpClient(port=request.getfixturevalue("chroma_server"))}
        yield lambda **settings: TwoStageIndex(collection=name, **place, **settings)
        if "client" in place:
            # The more collections a client has, the longer each write takes.
            keep_highest_row(place["client"])
            TwoStageIndex(collection=name, **place).drop()

    return make


@pytest.fixture
def open_index(new_place):
    """Open the same index repeatedly, in a folder, on a client in memory, or on a server."""
    with new_place() as open_index:
        yield open_index


@pytest.fixture
def other_process(start_process):
    """Run code in another process, and return its `answer`, and its error's name and message or None."""
    ours, theirs = multiprocessing.Pipe()
    process = start_process(OTHER_PROCESS, connection=theirs)
    theirs.close()

    def run(code):
        ours.send(code)
        return json.loads(ours.recv())

    yield run
    ours.close()
    process.join()


@pytest.fixture(scope="session")
def vectors():
    vectors = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    vectors.flags.writeable = False
    return vectors


def fill(index, vectors):
    numbers = range(len(vectors))
    index.upsert(
        [f"id-{i}" for i in numbers],
        vectors,
        documents=[f"text {i}" for i in numbers],
        metadatas=[{"page": i, "even": i % 2 == 0} for i in numbers],
    )
    return index


@pytest.fixture(scope="module")
def open_filled(new_place, vectors):
    """Open an index of 300 records repeatedly. The tests share it, so none may write to it."""
    with new_place() as open_index:
        fill(open_index(full_dim=32, shortlist_dim=8), vectors)
        yield open_index


@pytest.fixture(scope="module")
def filled(open_filled):
    """An open index of 300 records, which no test may write to."""
    with open_filled() as index:
        yield index


@pytest.fixture
def writable(open_index, vectors):
    """An index of 120 records for one test: Chroma builds a graph from 100 on."""
    return fill(open_index(full_dim=32, shortlist_dim=8), vectors[:120])
