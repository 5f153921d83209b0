"""Memory over time: `make test-long` runs these for an hour, or for MRL_RAG_LONG_SECONDS."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from mrl_rag import MatryoshkaEncoder, TwoStageRetriever

SECONDS = float(os.environ.get("MRL_RAG_LONG_SECONDS", "0"))
pytestmark = [
    pytest.mark.skipif(not SECONDS, reason="takes MRL_RAG_LONG_SECONDS, which is not set"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

RECORDS = 600
# Allowed above the first quarter's level: what glibc and torch keep in reserve goes up and down by a few MB.
SLACK = 24
# And per deleted record: Chroma's graph keeps its room until `reindex` (docs/storage.md), with its id in three maps.
BYTES_PER_DELETED = 2000


def resident(process="self"):
    """Return a process's own memory in MB, without mapped files, which the system takes back as it likes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon")


def texts_of(passages, rng, count):
    words = " ".join(passages).split()
    return [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(count)]


def test_memory_is_flat_over_mixed_reads_and_writes(tmp_path, passages, capsys):
    rng = random.Random(0)
    with (
        MatryoshkaEncoder("minilm", device="cpu", dtype="float32") as encoder,
        TwoStageRetriever(encoder, tmp_path / "db") as retriever,
    ):
        retriever.index_texts(texts_of(passages, rng, RECORDS), [f"id-{i}" for i in range(RECORDS)])
        index, began = retriever.index, time.monotonic()
        samples, deleted, steps = [], 0, dict.fromkeys(("search", "write", "delete", "read"), 0)
        while (passed := time.monotonic() - began) < SECONDS:
            step = rng.choices(list(steps), [12, 4, 1, 3])[0]
            steps[step] += 1
            ids = [f"id-{i}" for i in rng.sample(range(RECORDS), 8)]
            if step == "search":
                where = {"n": rng.randint(0, 9)} if rng.random() < 0.3 else None
                retriever.search(texts_of(passages, rng, 1)[0], k=10, where=where)
            elif step == "write":
                retriever.index_texts(texts_of(passages, rng, 8), ids, [{"n": rng.randint(0, 9)} for _ in ids])
            elif step == "delete":
                deleted += len(index.get(ids[:2]))
                index.delete(ids[:2])
            else:
                assert all(record.vector is not None for record in index.get(ids))
            samples.append((passed, deleted, resident()))
        report = index.verify()
        # Chroma's graph may lose its way to records that are replaced over and over: `unreachable` (docs/storage.md).
        assert not (report.missing or report.damaged or report.stale or report.misplaced or report.orphaned)
    quarters = [
        [sample for sample in samples if SECONDS * part / 4 <= sample[0] < SECONDS * (part + 1) / 4]
        for part in range(4)
    ]
    # The first eighth warms up: allocators, torch's compiled kernels, Chroma's caches.
    quarters[0] = [sample for sample in quarters[0] if sample[0] >= SECONDS / 8]
    levels = [median(sample[2] for sample in quarter) for quarter in quarters]
    gone = quarters[-1][-1][1] - quarters[0][0][1]
    with capsys.disabled():
        print(f"\n{SECONDS:.0f} s, {steps}, {gone} deleted; MB by quarter: {[round(level, 1) for level in levels]}")  # noqa: T201
    assert levels[-1] - levels[0] <= SLACK + gone * BYTES_PER_DELETED / 2**20


UNLOADING = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_memory import resident
from mrl_rag import MatryoshkaEncoder

texts = ["a text of the corpus, and another one"] * 8
with MatryoshkaEncoder("minilm", device="cpu", dtype="bfloat16", keep_alive=0.2) as encoder:
    weights = sum(weight.nbytes for weight in encoder._network.module.parameters()) / 2**20
    levels = []
    for _ in range(8):
        encoder.encode(texts)
        loaded = resident()
        while encoder.loaded:
            time.sleep(0.05)
        time.sleep(0.2)
        levels.append((loaded, resident()))
print(weights, *(level for pair in levels for level in pair))
"""


def test_an_unloaded_models_memory_goes_back_to_the_system_each_time(capsys):
    # In bfloat16 nothing of the file is mapped, so that all weights are in the process's own memory.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", UNLOADING, str(Path(__file__).parent)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    weights, *levels = map(float, ran.stdout.split())
    loaded, unloaded = levels[::2], levels[1::2]
    with capsys.disabled():
        print(f"\nweights {weights:.0f} MB; loaded {loaded[1:]}, unloaded {unloaded[1:]}")  # noqa: T201
    assert all(more - less >= 0.8 * weights for more, less in zip(loaded[1:], unloaded[1:], strict=True))
    assert unloaded[-1] - unloaded[1] <= 0.2 * weights


def test_processes_of_several_devices_end_and_start_again(passages):
    with MatryoshkaEncoder("minilm", device=["cpu", "cpu"], dtype="float32", keep_alive=1) as encoder:
        expected = encoder.encode(passages[:8])
        with encoder._held._used() as workers:
            processes = [process for pool in workers._pools.values() for process in pool._processes.values()]
        deadline = time.monotonic() + 120
        while encoder.loaded or any(process.is_alive() for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (encoder.encode(passages[:8]) == expected).all()


@pytest.mark.parametrize("piece", ["some words ", "!", "\n", "\0"])
def test_a_text_of_100_mb_is_encoded_in_little_time_and_memory(minilm, piece):
    text = piece * (100_000_000 // len(piece))
    before, began = resident(), time.process_time()
    minilm.encode([text])
    # Of the text itself a second copy at most, as UTF-8.
    assert resident() - before < 150
    assert time.process_time() - began < 30
