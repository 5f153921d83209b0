"""Everything works on paths of an object store: here a server that speaks S3's protocol, on loopback."""

import json
import logging

import pytest
from moto.server import ThreadedMotoServer

from mrl_rag import TwoStageIndex
from mrl_rag.errors import InvalidInput, ShardError
from mrl_rag.index.location import Location
from mrl_rag.scale import encode_dataset, load
from mrl_rag.testing import DeterministicEncoder

from .conftest import record


@pytest.fixture(scope="module")
def bucket():
    """The URL of a place in a bucket, without its options, and the options."""
    import pyarrow.fs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host = ":".join(map(str, server.get_host_and_port()))
        store = pyarrow.fs.S3FileSystem(endpoint_override=host, scheme="http", allow_bucket_creation=True)
        store.create_dir("bucket")
        yield lambda name: f"s3://bucket/{name}?endpoint_override={host}&scheme=http"
        server.stop()


def test_a_corpus_in_a_bucket_is_encoded_loaded_and_exported(bucket, tmp_path, monkeypatch):
    corpus = Location(bucket("corpus"))
    for part in range(2):
        lines = [json.dumps(record(number)) for number in range(10 * part, 10 * part + 10)]
        corpus.write(f"part-{part}.jsonl", "\n".join(lines).encode())
    given = (bucket("corpus"), bucket("shards"), DeterministicEncoder(16))
    assert encode_dataset(*given, shard_records=5).records == 20
    assert encode_dataset(*given, shard_records=5).reused == 4
    monkeypatch.setattr("mrl_rag.index.shards.SHARD_RECORDS", 8)
    with TwoStageIndex() as index, TwoStageIndex() as again:
        assert load(bucket("shards"), index) == 20
        assert index.export(bucket("backup")) == 20
        assert sorted(Location(bucket("backup")).files())[0] == "_manifest.json"
        assert load(bucket("backup"), again) == 20
        assert sorted(again.ids()) == sorted(f"id-{number}" for number in range(20))
        assert again.export(tmp_path / "backup") == 20


def test_what_is_not_in_the_bucket_is_named(bucket):
    with pytest.raises(ShardError, match=r"has no _manifest\.json"):
        load(bucket("nowhere"), TwoStageIndex())
    with pytest.raises(InvalidInput, match="nothing that can be read"):
        encode_dataset(bucket("nowhere.jsonl"), bucket("out"), DeterministicEncoder(16))
    with pytest.raises(InvalidInput, match=r"other.*can't be read or written"):
        encode_dataset(bucket("corpus"), bucket("out").replace("bucket", "other"), DeterministicEncoder(16))
