import subprocess
import sys

import numpy as np
import pytest

from mrl_rag import CachedEncoder, Encoder, MatryoshkaEncoder, TwoStageIndex, TwoStageRetriever
from mrl_rag.errors import EncoderCacheError, InvalidDimension, InvalidTexts
from mrl_rag.testing import DeterministicEncoder


class Counting(Encoder):
    """An encoder that remembers what it was given."""

    full_dim, dims, max_length, fingerprint = 0, (), None, ""

    def __init__(self, encoder):
        self.encoder, self.given = encoder, []
        self.full_dim, self.dims, self.max_length = encoder.full_dim, encoder.dims, encoder.max_length
        self.fingerprint, self.close = encoder.fingerprint, encoder.close

    def _encode(self, texts, task, dim, advance):
        self.given += [(task, text) for text in texts]
        return self.encoder.encode(texts, task, dim)


@pytest.fixture
def counting(tiny_bert, default_dtype):
    return Counting(MatryoshkaEncoder(tiny_bert, device="cpu", prompts={"query": "q: "}))


@pytest.fixture
def cached(counting, tmp_path):
    return CachedEncoder(counting, tmp_path / "folder" / "vectors.sqlite3")


def test_what_is_read_equals_what_was_computed(cached, counting, passages):
    first, again = cached.encode_documents(passages), cached.encode_documents(passages[::-1])[::-1]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first, counting.encoder.encode_documents(passages), atol=1e-6)
    assert len(counting.given) == len(set(passages))


def test_every_dimension_is_served_from_one_full_vector(cached, counting, passages):
    cached.encode(passages)
    asked = len(counting.given)
    for dim in (1, 4, 15, 16):
        np.testing.assert_allclose(
            cached.encode(passages, dim=dim), counting.encoder.encode(passages, dim=dim), atol=1e-5
        )
    assert len(counting.given) == asked


def test_queries_documents_and_models_are_kept_apart(cached, counting, tiny_bert, tmp_path):
    assert not np.allclose(cached.encode_queries(["a"]), cached.encode_documents(["a"]))
    other = Counting(MatryoshkaEncoder(tiny_bert, device="cpu", prompts={"query": "other: "}))
    np.testing.assert_allclose(
        CachedEncoder(other, tmp_path / "folder" / "vectors.sqlite3").encode_queries(["a"]),
        other.encoder.encode_queries(["a"]),
        atol=1e-6,
    )
    assert other.given == [("query", "a")]


def test_a_file_serves_the_next_process_too(cached, counting, passages, tmp_path):
    cached.encode(passages)
    asked = len(counting.given)
    again = CachedEncoder(counting, tmp_path / "folder" / "vectors.sqlite3")
    again.encode(passages)
    assert len(counting.given) == asked


def test_processes_may_write_one_file_at_once(tmp_path):
    code = """
import sys
from mrl_rag import CachedEncoder
from mrl_rag.testing import DeterministicEncoder
encoder = CachedEncoder(DeterministicEncoder(), sys.argv[1])
for number in range(400):
    encoder.encode([f"{sys.argv[2]} {number}", f"shared {number}"])
"""
    file = tmp_path / "vectors.sqlite3"
    command = [sys.executable, "-W", "ignore", "-c", code, str(file)]
    running = [subprocess.Popen([*command, name]) for name in ("one", "two")]
    assert [process.wait(120) for process in running] == [0, 0]
    counting = Counting(DeterministicEncoder())
    CachedEncoder(counting, file).encode([f"{name} {i}" for name in ("one", "two", "shared") for i in range(400)])
    assert counting.given == []


def test_an_interruption_keeps_what_was_committed(cached, counting, passages, monkeypatch):
    monkeypatch.setattr("mrl_rag.encoder.cache._BATCH", 10)
    encode = counting._encode

    def stop(texts, task, dim, advance):
        if len(counting.given) >= 20:
            raise KeyboardInterrupt
        return encode(texts, task, dim, advance)

    counting._encode = stop
    with pytest.raises(KeyboardInterrupt):
        cached.encode(passages)
    counting._encode, counting.given = encode, []
    cached.encode(passages)
    assert len(counting.given) == len(set(passages)) - 20


async def test_coroutines(cached, counting):
    np.testing.assert_allclose(await cached.aencode(["a"], "query"), counting.encoder.encode_queries(["a"]), atol=1e-6)


def test_a_retriever_takes_it(cached):
    retriever = TwoStageRetriever(cached, TwoStageIndex(fingerprint=cached.fingerprint))
    retriever.index_texts(["abc", "xyz"])
    assert len(retriever.search("abc")) == 2


def test_bad_input_is_refused_and_nothing_in_is_nothing_out(cached, counting):
    with pytest.raises(InvalidTexts):
        cached.encode(["a", None])
    with pytest.raises(InvalidDimension):
        cached.encode(["a"], dim=17)
    assert cached.encode([], dim=3).shape == (0, 3)
    assert counting.given == []


def test_a_file_that_is_no_cache_is_refused(counting, tmp_path):
    (tmp_path / "file").write_text("not a database, whatever its name says " * 100)
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path):
        with pytest.raises(EncoderCacheError, match="delete the file"):
            CachedEncoder(counting, path)


def test_a_row_cut_short_is_computed_again(cached, counting):
    expected = cached.encode(["a"])
    cached._connection.execute("UPDATE vectors SET vector = zeroblob(8)")
    cached._connection.commit()
    np.testing.assert_array_equal(cached.encode(["a"]), expected)
    assert len(counting.given) == 2
