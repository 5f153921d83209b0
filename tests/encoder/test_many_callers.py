"""Threads, coroutines, long texts and little memory: the vectors stay the same."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mrl_rag import MatryoshkaEncoder
from mrl_rag.encoder.batching import TokenSequence
from mrl_rag.encoder.dynamic_batching import DynamicBatcher
from mrl_rag.errors import EncoderClosed, EncoderOutOfMemory, InvalidInput, InvalidTexts


class Watched(torch.nn.Module):
    """A network that remembers its batches and can be slow, or short of memory."""

    def __init__(self, network, seconds=0.0, most_rows=None):
        super().__init__()
        self.network, self.seconds, self.most_rows, self.batches = network, seconds, most_rows, []

    def forward(self, packing, **inputs):
        rows = len(packing.offsets) - 1
        self.batches.append(rows)
        if self.most_rows is not None and rows > self.most_rows:
            raise torch.OutOfMemoryError("out of memory")
        time.sleep(self.seconds)
        return self.network(packing=packing, **inputs)


@pytest.fixture
def encoder(tiny_bert, default_dtype):
    return MatryoshkaEncoder(tiny_bert, device="cpu")


def watch(encoder, **settings):
    encoder._network.module = Watched(encoder._network.module, **settings)
    return encoder._network.module


def test_32_threads_share_forward_passes_and_get_the_same_vectors(encoder, passages):
    texts = passages[:32]
    expected = encoder.encode(texts)
    network = watch(encoder, seconds=0.05)
    together = threading.Barrier(32)

    def ask(text):
        together.wait()
        return encoder.encode_queries([text])[0]

    with ThreadPoolExecutor(32) as pool:
        np.testing.assert_allclose(list(pool.map(ask, texts)), expected, atol=1e-5)
    assert len(network.batches) < 16
    # Each batch may have a filler.
    assert 32 <= sum(network.batches) <= 32 + len(network.batches)


async def test_32_coroutines_share_forward_passes_and_get_the_same_vectors(encoder, passages):
    texts = passages[:32]
    expected = encoder.encode(texts)
    network = watch(encoder, seconds=0.02)
    found = await asyncio.gather(*(encoder.aencode([text], "query", dim=8) for text in texts))
    np.testing.assert_allclose(np.vstack(found), MatryoshkaEncoder.encode(encoder, texts, dim=8), atol=1e-5)
    np.testing.assert_allclose(await encoder.aencode(texts), expected, atol=1e-5)
    assert len(network.batches) < 8
    assert (await encoder.aencode([])).shape == (0, 16)


async def test_a_coroutine_that_gives_up_does_not_disturb_the_others(encoder, passages):
    expected = encoder.encode(passages[:3])
    watch(encoder, seconds=0.05)
    tasks = [asyncio.create_task(encoder.aencode([text])) for text in passages[:3]]
    await asyncio.sleep(0.01)
    tasks[1].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[1], asyncio.CancelledError)
    np.testing.assert_allclose(np.vstack([found[0], found[2]]), expected[[0, 2]], atol=1e-5)


def test_a_call_alone_is_not_kept_waiting(encoder):
    network = watch(encoder)
    encoder.encode_queries(["a"])
    assert network.batches == [1]


def test_a_question_gets_its_turn_while_a_corpus_is_encoded(encoder, passages):
    encoder._batcher.token_budget = 64
    watch(encoder, seconds=0.01)
    done = []
    with ThreadPoolExecutor(2) as pool:
        corpus = pool.submit(lambda: (encoder.encode(passages * 4), done.append("corpus")))
        time.sleep(0.05)
        pool.submit(lambda: (encoder.encode_queries(["a"]), done.append("question"))).result()
        corpus.result()
    assert done == ["question", "corpus"]


def test_one_callers_error_is_not_the_others():
    def forward(rows):
        if any(row.ids == [13] for row in rows):
            raise ValueError("thirteen")
        return np.array([row.ids for row in rows], dtype=np.float32)

    batcher = DynamicBatcher(forward, token_budget=100)
    answers = [batcher.submit([TokenSequence([number])]) for number in (1, 13, 2)]
    batcher.serve(answers[0])
    assert [answers[0].result(), answers[2].result()] == [[[1]], [[2]]]
    with pytest.raises(ValueError, match="thirteen"):
        answers[1].result()


def test_after_an_interruption_the_others_are_still_answered():
    interrupted = []

    def forward(rows):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return np.array([row.ids for row in rows], dtype=np.float32)

    batcher = DynamicBatcher(forward, token_budget=100)
    first, second = batcher.submit([TokenSequence([1])]), batcher.submit([TokenSequence([2])])
    with pytest.raises(KeyboardInterrupt):
        batcher.serve(first)
    batcher.serve(second)
    assert second.result() == [[2]]
    assert not batcher._waiting


def test_where_memory_does_not_suffice_batches_are_halved(encoder, passages):
    expected = encoder.encode(passages)
    network = watch(encoder, most_rows=3)
    np.testing.assert_allclose(encoder.encode(passages), expected, atol=1e-5)
    assert max(network.batches) > 3


def test_a_text_that_does_not_fit_alone_is_named_by_its_length(encoder):
    watch(encoder, most_rows=0)
    with pytest.raises(EncoderOutOfMemory, match="a text of 7 tokens"):
        encoder.encode(["abcde"])


def test_another_error_of_the_network_is_passed_on(encoder):
    def broken(**inputs):
        raise RuntimeError("broken")

    encoder._network.module = broken
    with pytest.raises(RuntimeError, match="broken"):
        encoder.encode(["a"])


LONG = " ".join("abcdefghij" * 3)


@pytest.mark.usefixtures("default_dtype")
def test_cut_texts_can_be_read_from_the_encoder(tiny_bert):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", max_length=12)
    with pytest.warns(UserWarning, match="1 of 2 texts"):
        encoder.encode([LONG, "a"])
    assert encoder.last_truncation == (1, 20)
    encoder.encode(["a"])
    assert encoder.last_truncation == (0, 0)


@pytest.mark.usefixtures("default_dtype")
def test_long_texts_are_refused_when_asked(tiny_bert):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", max_length=12, long_inputs="error")
    with pytest.raises(InvalidTexts, match=r"texts\[1\] is 20 tokens longer"):
        encoder.encode(["a", LONG])
    assert encoder.encode(["a"]).shape == (1, 16)


@pytest.mark.usefixtures("default_dtype")
def test_long_texts_are_averaged_over_their_pieces(tiny_bert, recwarn):
    settings = {"device": "cpu", "max_length": 12, "prompts": {"document": "ab "}}
    average = MatryoshkaEncoder(tiny_bert, long_inputs="average", **settings)
    plain = MatryoshkaEncoder(tiny_bert, **settings)
    # Of 12 tokens 2 are special and 2 the prompt's: 30 letters make four pieces.
    pieces = ["a b c d e f g", "h i j a b c d e", "f g h i j a b", "c d e f g h i j"]
    assert " ".join(pieces) == LONG
    weights = [len(piece.split()) + 4 for piece in pieces]
    expected = np.average(plain.encode(pieces), axis=0, weights=weights)
    found = average.encode([LONG, "a", "ab " + LONG])
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), atol=1e-5)
    np.testing.assert_allclose(found[1], plain.encode(["a"])[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)
    assert average.last_truncation == (0, 0)
    assert average.fingerprint != plain.fingerprint


@pytest.mark.usefixtures("default_dtype")
def test_a_prompt_that_leaves_no_room_is_refused(tiny_bert):
    encoder = MatryoshkaEncoder(
        tiny_bert, device="cpu", max_length=5, prompts={"document": "abcde "}, long_inputs="average"
    )
    with pytest.raises(InvalidInput, match="fills max_length=5"):
        encoder.encode(["a"])


def test_an_unknown_way_with_long_texts_is_refused(tiny_bert):
    with pytest.raises(InvalidInput, match="'split'"):
        MatryoshkaEncoder(tiny_bert, device="cpu", long_inputs="split")


async def test_a_closed_encoder_refuses_coroutines_too(encoder):
    await encoder.aencode(["a"])
    encoder.close()
    with pytest.raises(EncoderClosed):
        await encoder.aencode(["a"])
