import json
import uuid

import pytest

from mrl_rag import MatryoshkaEncoder


def record(number):
    """Metadata of every type that Chroma stores."""
    metadata = {"z": number, "a": 'é "quoted"', "float": 1.0, "flag": True, "tags": ["b", "a"], "sizes": [1.5, 2.0]}
    return {"id": f"id-{number}", "text": f"passage number {number}", "metadata": metadata}


@pytest.fixture
def write_lines(tmp_path):
    """Write records as JSON lines, and return the file."""

    def write(records, name="corpus.jsonl"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(fields) + "\n" for fields in records), encoding="utf-8")
        return file

    return write


@pytest.fixture
def corpus(write_lines):
    """The file of 25 records."""
    return write_lines(record(number) for number in range(25))


@pytest.fixture(scope="session")
def encoder(tiny_bert):
    return MatryoshkaEncoder(tiny_bert, dtype="float32", device="cpu")


@pytest.fixture(params=["local", "memory"])
def output(request, tmp_path):
    """An empty place for shards, on the disk and in memory."""
    return str(tmp_path / "shards") if request.param == "local" else f"memory://{uuid.uuid4().hex}/shards"
