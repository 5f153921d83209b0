"""A stream of texts is encoded block by block, in constant memory."""

import itertools
import tracemalloc

import numpy as np
import pytest

from mrl_rag import CachedEncoder, MatryoshkaEncoder
from mrl_rag.errors import InvalidDimension, InvalidInput, InvalidTexts


@pytest.fixture(scope="module")
def encoder(tiny_bert, default_dtype):
    return MatryoshkaEncoder(tiny_bert, device="cpu")


def test_blocks_come_in_order_with_their_texts_and_the_vectors_of_encode(encoder, passages):
    found = list(encoder.encode_iter(iter(passages), "query", 8, chunk_size=10))
    assert [len(texts) for texts, _ in found] == [10] * (len(passages) // 10) + [len(passages) % 10]
    assert [text for texts, _ in found for text in texts] == passages
    vectors = np.concatenate([vectors for _, vectors in found])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.encode_queries(passages, dim=8), atol=1e-5)


def test_nothing_gives_no_blocks(encoder):
    assert list(encoder.encode_iter([])) == []


def test_a_cached_encoder_streams_too(tiny_bert, encoder, passages, tmp_path):
    cached = CachedEncoder(MatryoshkaEncoder(tiny_bert, device="cpu"), tmp_path / "vectors.sqlite3")
    vectors = np.concatenate([vectors for _, vectors in cached.encode_iter(iter(passages), chunk_size=20)])
    np.testing.assert_allclose(vectors, encoder.encode(passages), atol=1e-5)
    cached.close()


def test_a_stream_without_end_is_read_two_blocks_ahead_at_most(encoder):
    read = itertools.count()
    stream = encoder.encode_iter((f"text {next(read)}" for _ in itertools.count()), chunk_size=4)
    for blocks in range(1, 6):
        texts, _ = next(stream)
        assert texts == [f"text {i}" for i in range(4 * blocks - 4, 4 * blocks)]
        assert next(read) - 4 * blocks <= 8 + blocks  # this look at the counter takes a number itself
        read = itertools.count(4 * blocks + 4)
    stream.close()


def test_memory_does_not_grow_with_the_stream(encoder):
    def peak(texts):
        tracemalloc.start()
        for _ in encoder.encode_iter((f"a text {i}" for i in range(texts)), chunk_size=256):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(8192) < 1.25 * peak(2048)


def test_cut_texts_are_counted_once_at_the_end(tiny_bert, default_dtype):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", max_length=8)
    stream = encoder.encode_iter(["a " * 20, "a", "a " * 10], chunk_size=1)
    next(stream), next(stream), next(stream)
    with pytest.warns(UserWarning, match=r"2 of 3 texts .* the longest by 14 tokens"):
        assert next(stream, None) is None
    assert encoder.last_truncation == (2, 14)


@pytest.mark.parametrize(
    ("texts", "settings", "error"),
    [
        ("a text", {}, InvalidTexts),
        (None, {}, InvalidTexts),
        (["a"], {"dim": 0}, InvalidDimension),
        (["a"], {"task": "x"}, InvalidInput),
        (["a"], {"chunk_size": 0}, InvalidInput),
    ],
)
def test_bad_arguments_are_refused_before_the_first_text_is_read(encoder, texts, settings, error):
    with pytest.raises(error):
        encoder.encode_iter(texts, **settings)


def test_what_is_not_a_text_is_named_by_its_place_in_the_stream(encoder):
    stream = encoder.encode_iter(iter(["a", "b", "c", "d", None]), chunk_size=2)
    next(stream)
    with pytest.raises(InvalidTexts, match=r"texts\[4\] is None"):
        list(stream)
