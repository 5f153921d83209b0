"""Several devices: a process each, the same vectors, a clean end. Two CPU workers stand for two GPUs."""

import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mrl_rag import MatryoshkaEncoder
from mrl_rag.encoder.batching import TokenSequence
from mrl_rag.errors import EncoderClosed, InvalidInput, MrlRagError


@pytest.fixture(scope="module", autouse=True)
def _workers_start_at_once(forkserver):
    """A new process takes seconds to import torch. The script below, which is interrupted, starts such ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mrl_rag.encoder.workers.get_context", lambda method: forkserver)
        yield


@pytest.fixture(scope="module")
def two(tiny_bert, default_dtype):
    encoder = MatryoshkaEncoder(tiny_bert, device=["cpu", "cpu"])
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def one(tiny_bert, default_dtype):
    return MatryoshkaEncoder(tiny_bert, device="cpu")


def test_the_vectors_are_those_of_one_device_in_the_order_given(two, one, passages):
    assert (two.full_dim, two.dims, two.fingerprint) == (one.full_dim, one.dims, one.fingerprint)
    two._batcher.token_budget = 64
    np.testing.assert_allclose(two.encode(passages), one.encode(passages), atol=1e-5)
    streamed = [vectors for _, vectors in two.encode_iter(iter(passages), "query", 8, chunk_size=16)]
    np.testing.assert_allclose(np.concatenate(streamed), one.encode_queries(passages, dim=8), atol=1e-5)
    assert two.encode([]).shape == (0, 16)
    assert two.dtype == one.dtype


def test_both_devices_work_at_once(two, passages):
    two._batcher.token_budget = 64
    taken = []
    run = two._network.run
    two._network.run = lambda rows: (taken.append(two._network._free.qsize()), run(rows))[1]
    two.encode(passages * 4)
    del two._network.run
    # Whoever came second found one device free, then none.
    assert min(taken) < 2


def test_many_threads_and_coroutines_may_ask(two, one, passages):
    expected = one.encode(passages)
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda text: two.encode([text])[0], passages))
    np.testing.assert_allclose(rows, expected, atol=1e-5)


async def test_a_coroutine_may_ask(two, one):
    np.testing.assert_allclose(await two.aencode(["a text"]), one.encode(["a text"]), atol=1e-5)


def test_what_a_worker_cannot_load_is_raised_here(tiny_bert):
    before = multiprocessing.active_children()
    with pytest.raises((MrlRagError, AssertionError, RuntimeError)):
        MatryoshkaEncoder(tiny_bert, device=["cpu", "xpu:7"], dtype="float32")
    assert [child for child in multiprocessing.active_children() if child not in before] == []


def test_a_child_that_was_forked_is_told_to_make_an_encoder_of_its_own(two, in_child):
    def work():
        with pytest.raises(EncoderClosed, match="Make it after the fork"):
            two.encode(["a"])
        two.close()

    in_child(work)
    assert two.encode(["a"]).shape == (1, 16)


def test_a_pickled_encoder_carries_its_devices(two):
    assert pickle.loads(pickle.dumps(two.__reduce__()[0].keywords))["device"] == ["cpu", "cpu"]


def test_no_device_is_refused(tiny_bert):
    with pytest.raises(InvalidInput, match="empty list"):
        MatryoshkaEncoder(tiny_bert, device=[])


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ["cpu", "cuda:99"], 1.5j])
def test_a_device_that_is_not_there_is_refused_by_name(tiny_bert, device):
    missing = device[-1] if isinstance(device, list) else device
    with pytest.raises(InvalidInput, match=re.escape(repr(missing))):
        MatryoshkaEncoder(tiny_bert, device=device)


SCRIPT = """
import multiprocessing, signal, sys
from mrl_rag import MatryoshkaEncoder
if __name__ == "__main__":
    # What a shell starts in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    encoder = MatryoshkaEncoder(sys.argv[1], device=["cpu", "cpu"], dtype="float32")
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    while True:
        try:
            encoder.encode(["a text of the corpus"] * 5000)
        except KeyboardInterrupt:
            print(encoder.encode(["a text"]).shape, flush=True)
"""


def test_ctrl_c_interrupts_the_work_alone_and_no_worker_outlives_its_parent(tiny_bert, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, script, tiny_bert], **pipes, start_new_session=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.3)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    assert parent.stdout.readline() == "(1, 16)\n"
    assert all(map(alive, workers))
    parent.kill()
    assert "Traceback" not in parent.communicate()[1]
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_a_worker_that_dies_is_reported_and_closing_ends_the_others(two):
    """The last here: it ends the encoder that the others share."""
    processes = [process for pool in two._network._pools.values() for process in pool._processes.values()]
    assert len(processes) == 2
    os.kill(processes[0].pid, signal.SIGKILL)
    with pytest.raises(EncoderClosed, match="device 0, cpu, died"):
        for _ in range(2):
            two.encode(["a"])
    workers = two._network
    two.close()
    two.close()
    assert not any(process.is_alive() for process in processes)
    with pytest.raises(EncoderClosed):
        two.encode(["a"])
    with pytest.raises(EncoderClosed, match="closed while it was encoding"):
        workers.run([TokenSequence([2, 3])])  # a call that had begun


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
