"""On a real Ray cluster of two workers: a worker that dies loses nothing, and repeats nothing."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mrl_rag.errors import InvalidTexts
from mrl_rag.index.shards import ShardFolder
from mrl_rag.scale import encode_dataset
from mrl_rag.testing import DeterministicEncoder

# Ray Data sets options of its own that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data")


@pytest.fixture(scope="module")
def cluster():
    """A cluster on this machine, of two cores whatever it has."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # Workers of the lowest priority would wait for the other tests.
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            logging_level="error",
            log_to_driver=False,
        )
        yield ray
        ray.shutdown()


def actors():
    """The processes of this session's actors that make shards."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::MapWorker(MapBatches(_Worker)"):
            found.append(int(process.name))
    return found


@pytest.fixture
def model(request):
    """In the long run a model's own network; else an encoder that starts without torch."""
    return request.getfixturevalue("encoder") if "MRL_RAG_KILLS" in os.environ else DeterministicEncoder()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are found in /proc")
def test_a_worker_that_is_killed_loses_no_record_and_repeats_none(cluster, write_lines, tmp_path, model):
    # Of many words, so that the other worker isn't done with all before one is killed.
    records = [{"id": f"id-{n}", "text": " ".join(f"w{400 * n + word}" for word in range(400))} for n in range(200)]
    corpus, shards, left = write_lines(records), tmp_path / "shards", []

    def kill():
        while not list(shards.glob("shard-*.parquet")):
            time.sleep(0.01)
        os.kill(actors()[0], signal.SIGKILL)
        left.append(20 - len(list(shards.glob("shard-*.parquet"))))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done = encode_dataset(corpus, shards, model, engine="ray", shard_records=10, workers=2)
    killer.join(10)
    assert left[0] > 0
    assert (done.records, done.shards) == (200, 20)
    folder = ShardFolder(shards)
    batches = list(folder.read_ahead(folder.complete()))
    assert [id_ for batch in batches for id_ in batch.ids] == [f"id-{number}" for number in range(200)]
    texts = [text for batch in batches for text in batch.documents]
    vectors = np.concatenate([batch.vectors for batch in batches])
    np.testing.assert_allclose(vectors, model.encode_documents(texts), atol=1e-3)
    # A shard is the same, whichever engine made it.
    assert encode_dataset(corpus, shards, model, shard_records=10).reused == 20


def test_what_a_worker_raises_is_raised_here(cluster, write_lines, tmp_path):
    corpus = write_lines([{"id": "a", "text": "fine"}, {"id": "b", "text": 7}])
    with pytest.raises(InvalidTexts, match=r"corpus\.jsonl.*texts\[1\] is 7"):
        encode_dataset(corpus, tmp_path / "shards", DeterministicEncoder(8), engine="ray", shard_records=1, workers=1)
    assert json.loads((tmp_path / "shards" / "_manifest.json").read_text())["shards"] is None
