"""`keep_alive` and `to`: where the model is, while its vectors stay the same."""

import asyncio
import os
import pickle
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import pytest
import torch
from langchain_mrl import MatryoshkaEmbeddings
from llama_index_mrl import MatryoshkaEmbedding

from mrl_rag import MatryoshkaEncoder
from mrl_rag.errors import EncoderClosed, InvalidInput, ModelFilesError

SOON = 0.02


def wait_until(reached):
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_until_unloaded(encoder):
    wait_until(lambda: not encoder.loaded)


def weights_of(encoder):
    with encoder._held._used() as network:
        return [weakref.ref(weight) for weight in network.module.parameters()]


@pytest.fixture
def encoder(tiny_bert):
    with MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", keep_alive=SOON) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def plain(tiny_bert):
    return MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32")


def test_an_idle_model_is_gone_and_the_next_call_gives_the_same_vectors_bit_for_bit(minilm, passages):
    texts = passages[:8]
    expected = minilm.encode(texts)
    with MatryoshkaEncoder("minilm", device="cpu", keep_alive=SOON) as encoder:
        weights = weights_of(encoder)
        wait_until_unloaded(encoder)
        wait_until(lambda: not any(weight() is not None for weight in weights))
        np.testing.assert_array_equal(encoder.encode(texts), expected)
        assert encoder.fingerprint == minilm.fingerprint


def test_every_way_to_encode_loads_an_unloaded_model(encoder, plain, passages):
    texts = passages[:4]
    expected = plain.encode(texts)
    for encode in (
        encoder.encode,
        encoder.encode_queries,
        lambda texts: asyncio.run(encoder.aencode(texts)),
        lambda texts: np.concatenate([vectors for _, vectors in encoder.encode_iter(texts)]),
    ):
        wait_until_unloaded(encoder)
        np.testing.assert_array_equal(encode(texts), expected)


def test_threads_may_call_while_the_model_comes_and_goes(encoder, plain, passages):
    expected = plain.encode(passages)
    loads = []
    load = encoder._held._load
    encoder._held._load = lambda: (loads.append(1), load())[1]

    def ask(position):
        time.sleep(position % 5 * SOON)
        np.testing.assert_allclose(encoder.encode([passages[position]])[0], expected[position], atol=1e-5)

    with ThreadPoolExecutor(4) as threads:
        for positions in range(0, 12, 4):
            wait_until_unloaded(encoder)
            list(threads.map(ask, range(positions, positions + 4)))
    assert len(loads) >= 3


def test_a_model_is_not_unloaded_while_it_encodes(encoder):
    load, loaded = encoder._held._load, []

    def load_slow():
        network = load()
        run = network.run
        network.run = lambda sequences: (time.sleep(10 * SOON), loaded.append(encoder.loaded), run(sequences))[2]
        return network

    wait_until_unloaded(encoder)
    encoder._held._load = load_slow
    encoder.encode(["a"])
    assert loaded == [True]


@pytest.mark.parametrize("unloaded", [False, True], ids=["loaded", "unloaded"])
def test_a_child_loads_and_unloads_a_model_of_its_own(in_child, tiny_bert, unloaded):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", keep_alive=SOON if unloaded else 1000)
    expected = encoder.encode(["a", "b"])
    if unloaded:
        wait_until_unloaded(encoder)

    def work():
        np.testing.assert_allclose(encoder.encode(["a", "b"]), expected, atol=1e-5)
        if unloaded:
            wait_until_unloaded(encoder)
            assert encoder.encode(["a"]).shape == (1, 16)

    in_child(work)
    np.testing.assert_array_equal(encoder.encode(["a", "b"]), expected)
    encoder.close()


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_the_thread_that_waits_keeps_neither_the_process_nor_the_model_and_ends_with_it(tiny_bert, how):
    before = set(threading.enumerate())
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", keep_alive=1000)
    encoder.encode(["a"])
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
    weights = weights_of(encoder)
    if how == "closed":
        encoder.close()
    else:
        del encoder
    thread.join(30)
    assert not thread.is_alive()
    assert [weight for weight in weights if weight() is not None] == []


def test_a_closed_encoder_finishes_what_it_runs_and_does_not_load_again(tiny_bert):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", keep_alive=1000)
    run, running, may_end = encoder._network.run, threading.Event(), threading.Event()

    def held(sequences):
        running.set()
        may_end.wait(30)
        return run(sequences)

    encoder._network.run = held
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(encoder.encode, ["a"])
        running.wait(30)
        encoder.close()
        may_end.set()
        assert answer.result().shape == (1, 16)
    assert not encoder.loaded
    with pytest.raises(EncoderClosed):
        encoder.encode(["a"])


def test_files_that_changed_meanwhile_are_not_taken_for_the_same_model(tiny_bert, make_tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    with MatryoshkaEncoder(folder, device="cpu", dtype="float32", keep_alive=SOON) as encoder:
        wait_until_unloaded(encoder)
        shutil.copy(make_tiny_bert(seed=1) / "model.safetensors", folder)
        with pytest.raises(ModelFilesError, match="was changed or removed"):
            encoder.encode(["a"])
        os.remove(folder / "model.safetensors")
        with pytest.raises(ModelFilesError, match=r"model\.safetensors was changed or removed"):
            encoder.encode(["a"])


@pytest.mark.parametrize("keep_alive", [0, -1, "5m", True, float("nan")])
def test_a_keep_alive_that_is_no_number_of_seconds_is_refused(tiny_bert, keep_alive):
    with pytest.raises(InvalidInput, match="keep_alive"):
        MatryoshkaEncoder(tiny_bert, device="cpu", keep_alive=keep_alive)


def test_both_frameworks_pass_it_on(tiny_bert):
    settings = {"device": "cpu", "dtype": "float32", "keep_alive": SOON}
    with MatryoshkaEmbeddings(model=str(tiny_bert), **settings) as embeddings:
        wait_until_unloaded(embeddings.encoder)
        model = MatryoshkaEmbedding(str(tiny_bert), **settings)
        assert embeddings.embed_query("a") == model.get_query_embedding("a")
        model.close()


def test_a_moved_encoder_gives_the_same_vectors_and_leaves_nothing_behind(tiny_bert, passages, default_dtype):
    # As far as torch is concerned, "cpu:0" is another device than "cpu".
    with MatryoshkaEncoder(tiny_bert, device="cpu") as encoder:
        weights, expected = weights_of(encoder), encoder.encode(passages)
        assert encoder.to("cpu") is encoder
        assert all(weight() is not None for weight in weights)
        assert encoder.to("cpu:0") is encoder
        assert [weight for weight in weights if weight() is not None] == []
        assert (encoder.device, encoder.dtype) == (torch.device("cpu:0"), getattr(torch, default_dtype))
        np.testing.assert_array_equal(encoder.encode(passages), expected)
        with pickle.loads(pickle.dumps(encoder)) as copy:
            assert copy.device == torch.device("cpu:0")


def test_threads_may_call_while_an_encoder_is_moved(tiny_bert, passages):
    with MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32") as encoder:
        expected = encoder.encode(passages)
        stop = threading.Event()

        def ask():
            for position in count():
                row = position % len(passages)
                np.testing.assert_allclose(encoder.encode([passages[row]])[0], expected[row], atol=1e-5)
                if stop.is_set():
                    return

        with ThreadPoolExecutor(3) as threads:
            asking = [threads.submit(ask) for _ in range(3)]
            for device in ("cpu:0", "cpu", "cpu:0"):
                encoder.to(device)
            stop.set()
            for answer in asking:
                answer.result()


def test_an_encoder_stays_where_it_is_if_it_cannot_be_moved(tiny_bert):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(InvalidInput, match=device):
            encoder.to(device)
    assert encoder.device == torch.device("cpu")
    assert encoder.encode(["a"]).shape == (1, 16)
    encoder.close()
    with pytest.raises(EncoderClosed):
        encoder.to("cpu:0")
