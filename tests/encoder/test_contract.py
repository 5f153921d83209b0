"""One contract for every encoder, and an encoder of one's own in ten lines."""

import pickle
import warnings

import numpy as np
import pytest

from mrl_rag import (
    CachedEncoder,
    Encoder,
    MatryoshkaEncoder,
    NomicEncoder,
    OpenAIEncoder,
    TwoStageIndex,
    TwoStageRetriever,
    truncate,
)
from mrl_rag.errors import EncoderClosed, InvalidDimension, InvalidInput, InvalidTexts, InvalidVectors
from mrl_rag.testing import DeterministicEncoder


class Letters(Encoder):
    """Counts letters."""

    full_dim = 26
    dims = (26,)
    max_length = None
    fingerprint = "letters-1"

    def _encode(self, texts, task, dim, advance):
        counts = [[text.count(chr(ord("a") + i)) for i in range(26)] for text in texts]
        return truncate(counts, dim)


class Uncut(Letters):
    def _encode(self, texts, task, dim, advance):
        return super()._encode(texts, task, self.full_dim, advance)


@pytest.fixture(params=["own", "matryoshka", "cached", "deterministic"])
def encoder(request, tiny_bert, default_dtype, tmp_path):
    makers = {
        "own": Letters,
        "matryoshka": lambda: MatryoshkaEncoder(tiny_bert, device="cpu"),
        "cached": lambda: CachedEncoder(Letters(), tmp_path / "vectors.sqlite3"),
        "deterministic": lambda: DeterministicEncoder(16),
    }
    with makers[request.param]() as encoder:
        yield encoder


async def test_every_encoder_gives_unit_rows_by_every_method(encoder):
    texts = ["abc", "bcd"]
    documents, queries = encoder.encode(texts, dim=4), encoder.encode(texts, "query", 4)
    assert documents.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), 1, atol=1e-6)
    for found, expected in (
        (encoder.encode_documents(texts, 4), documents),
        (encoder.encode_queries(texts, 4), queries),
        (encoder.encode_document(texts, 4), documents),
        (encoder.encode_document("bcd", 4), documents[1]),
        (encoder.encode_query("bcd", dim=4), queries[1]),
        (await encoder.aencode(texts, "query", 4), queries),
        (np.concatenate([rows for _, rows in encoder.encode_iter(texts, dim=4, chunk_size=1)]), documents),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert encoder.encode([], dim=3).shape == (0, 3)
    assert encoder.encode(texts).shape == (2, encoder.full_dim) == (2, encoder.dim)


@pytest.mark.parametrize(
    ("texts", "settings", "error"),
    [
        ("a text", {}, InvalidTexts),
        (["a", None], {}, InvalidTexts),
        (["a"], {"task": "search"}, InvalidInput),
        (["a"], {"dim": 99}, InvalidDimension),
        ([], {"dim": 0}, InvalidDimension),
    ],
)
async def test_every_encoder_refuses_the_same_arguments(encoder, texts, settings, error):
    with pytest.raises(error):
        encoder.encode(texts, **settings)
    with pytest.raises(error):
        await encoder.aencode(texts, **settings)
    with pytest.raises(error):
        list(encoder.encode_iter(texts, **settings))


def test_an_encoder_of_ones_own_serves_a_retriever():
    retriever = TwoStageRetriever(Letters(), TwoStageIndex(fingerprint="letters-1"))
    retriever.index_texts(["banana", "cherry"])
    assert retriever.search("cherries", k=1)[0].document == "cherry"


def test_vectors_of_the_wrong_shape_are_refused_with_the_line_that_mends_them():
    with pytest.raises(InvalidVectors, match=r"Uncut._encode .* \(1, 26\) .*dim=4.*truncate\(vectors, dim\)"):
        Uncut().encode(["a"], dim=4)


@pytest.mark.parametrize("settings", [{"dim": 8}, {"truncate_dim": 8}, {"dim": 8, "truncate_dim": 8}])
def test_a_default_dimension_changes_neither_full_vectors_nor_the_fingerprint(tiny_bert, settings, tmp_path):
    whole = MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32")
    short = MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", **settings)
    assert (short.dim, short.full_dim) == (8, 16)
    assert short.fingerprint == whole.fingerprint
    np.testing.assert_allclose(short.encode(["a"]), truncate(whole.encode(["a"]), 8), atol=1e-6)
    np.testing.assert_allclose(short.encode(["a"], dim=16), whole.encode(["a"]), atol=1e-6)
    assert pickle.loads(pickle.dumps(short)).encode_query("a").shape == (8,)
    assert CachedEncoder(short, tmp_path / "vectors.sqlite3").encode(["a"]).shape == (1, 8)


def test_a_default_dimension_is_given_once_and_in_range(tiny_bert):
    for settings in ({"dim": 8, "truncate_dim": 4}, {"dim": 17}, {"truncate_dim": 0}):
        with pytest.raises(InvalidDimension):
            MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", **settings)


def test_a_closed_encoder_refuses_even_no_texts(tiny_bert, tmp_path):
    for encoder in (
        MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32"),
        CachedEncoder(Letters(), tmp_path / "vectors.sqlite3"),
    ):
        encoder.close()
        with pytest.raises(EncoderClosed):
            encoder.encode([])


def test_an_encoder_says_which_it_is_without_loading_or_asking(tiny_bert, tmp_path):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", dim=8)
    assert repr(encoder) == f"MatryoshkaEncoder({str(tiny_bert)!r}, full_dim=16, dim=8, device='cpu', dtype='float32')"
    path = tmp_path / "vectors.sqlite3"
    assert (
        repr(CachedEncoder(DeterministicEncoder(8), path)) == f"CachedEncoder(DeterministicEncoder(8), {str(path)!r})"
    )
    remote = OpenAIEncoder("org/tiny", base_url="http://localhost:1/v1")
    assert repr(remote) == "OpenAIEncoder('org/tiny', full_dim=None, server='localhost')"
    assert repr(NomicEncoder(api_key="k")).startswith("NomicEncoder('nomic-embed-text-v1.5', full_dim=768, server=")
    assert repr(Letters()) == "Letters(full_dim=26)"


class TestCountingTokens:
    def test_a_text_with_as_many_tokens_as_the_encoder_reads_is_not_cut(self, make_tiny_bert, tmp_path):
        prompts = {"query": "find: ", "document": "it says: "}
        encoder = MatryoshkaEncoder(make_tiny_bert(prompts=prompts, max_length=32), dtype="float32", device="cpu")
        cached = CachedEncoder(encoder, tmp_path / "cache")
        for task in ("query", "document"):
            texts = ["ab" * length for length in range(20)]
            counts = cached.count_tokens(texts, task)
            assert max(counts) > 32
            assert counts == encoder.count_tokens(texts, task)
            for text, count in zip(texts, counts, strict=True):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    encoder.encode([text], task)
                assert encoder.last_truncation.tokens == max(count - 32, 0)

    def test_openais_models_are_counted_here_and_others_are_not(self):
        encoder = OpenAIEncoder("text-embedding-3-small", api_key="key", prompts={"document": "a b "})
        assert encoder.count_tokens(["", "c d e"]) == [3, 5]
        assert OpenAIEncoder("other", base_url="http://localhost:1/v1").count_tokens(["c"]) is None

    def test_an_encoder_of_ones_own_need_not_count(self):
        assert DeterministicEncoder().count_tokens(["a"]) is None
