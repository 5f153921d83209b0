"""Heads: what a fit promises, what a file promises, and that encoder and index make the same of one."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mrl_rag import (
    CachedEncoder,
    HeadCard,
    MatryoshkaEncoder,
    MatryoshkaHead,
    TwoStageIndex,
    TwoStageRetriever,
    truncate,
)
from mrl_rag.errors import (
    HeadMismatch,
    InvalidDimension,
    InvalidInput,
    InvalidVectors,
    ModelFilesError,
)
from mrl_rag.heads.fitting import similarity_error
from mrl_rag.rotation import fit as pca

DIMS = (16, 8, 4, 2)


def topics(count, seed=0, dims=32, of=12):
    """Vectors around a few centres, in coordinates of which each matters alike."""
    centres = np.random.default_rng(99).normal(size=(of, dims))
    random = np.random.default_rng(seed)
    return (centres[random.integers(of, size=count)] + random.normal(scale=0.5, size=(count, dims))).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _short_fits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mrl_rag.heads.fitting._MAX_STEPS", 100)
        yield


@pytest.fixture(scope="module")
def head(_short_fits):
    return MatryoshkaHead.fit(topics(300), seed=3, data="made up", model="topics", fingerprint="ab12")


@pytest.fixture(scope="module")
def pairs():
    """Documents, and queries that are turned away from them: a linear map turns them back."""
    documents = topics(300, of=300)
    return documents + np.random.default_rng(7).normal(scale=1.5, size=documents.shape) * (
        np.arange(32) < 16
    ), documents


@pytest.fixture(scope="module")
def head_of_pairs(pairs, _short_fits):
    return MatryoshkaHead.fit(*pairs)


# The fit


def test_without_labels_full_dimension_stays_and_lower_ones_are_no_worse_than_pca(head):
    vectors = topics(500, seed=1)
    np.testing.assert_allclose(head.matrix.T @ head.matrix, np.eye(32), atol=1e-5)
    unit = truncate(vectors, 32)
    np.testing.assert_allclose(head.apply(vectors) @ head.apply(vectors).T, unit @ unit.T, atol=1e-5)
    error, of_pca, of_cut = (
        similarity_error(vectors, matrix, DIMS)
        for matrix in (head.matrix, pca(topics(300)), np.eye(32, dtype=np.float32))
    )
    assert error <= of_pca
    assert error < of_cut / 2


def test_with_pairs_held_out_queries_find_their_documents_sooner(head_of_pairs):
    card = head_of_pairs.card
    assert (card.kind, card.dims, card.fitted_on, card.held_out) == ("pairs", (32, 16, 8, 4, 2), 250, 50)
    assert card.after[8] > 1.2 * card.before[8]
    assert card.after[32] > card.before[32]


def test_the_card_says_what_was_fitted_on_and_what_was_gained(head):
    card = head.card
    assert (card.kind, card.full_dim, card.dims) == ("vectors", 32, DIMS)
    assert (card.fitted_on, card.held_out, card.seed) == (250, 50, 3)
    assert (card.data, card.model, card.fingerprint) == ("made up", "topics", "ab12")
    assert "top 10" in card.measure
    assert card.after[4] > card.before[4] + 0.1
    assert repr(head) == "MatryoshkaHead(32 numbers, fitted on 250 vectors of 'topics')"


def test_the_same_seed_gives_the_same_head_and_the_callers_random_numbers_stay():
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.inference_mode():
        one, two, three = (MatryoshkaHead.fit(topics(100), dims=[4], seed=seed).matrix for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - three).max() > 1e-3
    assert torch.equal(torch.rand(3), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 32), st.integers(0, 2**32 - 1))
def test_rows_are_unit_vectors_after_head_and_cut(head, dim, seed):
    rows = np.random.default_rng(seed).normal(size=(3, 32)) * 10.0 ** np.random.default_rng(seed).integers(-3, 4)
    cut = truncate(rows @ head.matrix, dim)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(truncate(head.apply(rows), dim), cut, atol=1e-5)


@pytest.mark.parametrize(
    ("vectors", "documents", "arguments", "error"),
    [
        (topics(99), None, {}, InvalidVectors),
        (topics(100)[:, :1], None, {}, InvalidVectors),
        (np.full((200, 8), np.nan), None, {}, InvalidVectors),
        (topics(200), topics(199), {}, InvalidVectors),
        (topics(200), None, {"dims": [33]}, InvalidDimension),
        (topics(200), None, {"seed": -1}, InvalidInput),
    ],
)
def test_what_cannot_be_fitted_is_refused(vectors, documents, arguments, error):
    with pytest.raises(error):
        MatryoshkaHead.fit(vectors, documents, **arguments)


def test_equal_rows_and_zero_rows_can_be_fitted():
    rows = np.zeros((120, 8), dtype=np.float32)
    rows[:, 0] = 1
    rows[::7] = 0
    assert np.isfinite(MatryoshkaHead.fit(rows).matrix).all()
    with pytest.raises(InvalidVectors, match="2 different queries"):
        MatryoshkaHead.fit(rows, rows)
    assert np.isfinite(MatryoshkaHead.fit(topics(120, dims=8), rows).matrix).all()


# The file


def test_a_head_comes_back_from_its_file_as_it_was(head, head_of_pairs, tmp_path):
    for saved in (head, head_of_pairs, MatryoshkaHead(np.eye(3))):
        saved.save(tmp_path / "head.safetensors")
        loaded = MatryoshkaHead.load(tmp_path / "head.safetensors")
        np.testing.assert_array_equal(loaded.matrix, saved.matrix)
        assert loaded.card == saved.card
        assert loaded.fingerprint_with("ab12") == saved.fingerprint_with("ab12")
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]
    with pytest.raises(InvalidInput, match="can't be written"):
        head.save(tmp_path / "nowhere" / "head.safetensors")


CARD = HeadCard(
    kind="vectors", full_dim=4, dims=(2,), fitted_on=9, held_out=1, seed=0, measure="", before={2: 0.1}, after={2: 0.2}
)
CLAIMS = json.loads(CARD.as_json())


@pytest.mark.parametrize(
    ("matrix", "claims", "said"),
    [
        (np.eye(4, dtype=np.float64), CLAIMS, "F64, not F32"),
        (np.eye(4, dtype=np.float32)[:3], CLAIMS, r"\(3, 4\)"),
        (np.ones(4, dtype=np.float32), CLAIMS, r"shape \(4,\)"),
        (np.full((4, 4), np.inf, dtype=np.float32), CLAIMS, "infinity"),
        (np.eye(5, dtype=np.float32), CLAIMS, "full_dim=4"),
        (np.eye(4, dtype=np.float32), {**CLAIMS, "kind": "magic"}, "other types"),
        (np.eye(4, dtype=np.float32), {**CLAIMS, "fitted_on": "many"}, "no integers"),
        (np.eye(4, dtype=np.float32), {**CLAIMS, "fingerprint": 7}, "other types"),
        (np.eye(4, dtype=np.float32), {**CLAIMS, "before": [1]}, "no head"),
        (np.eye(4, dtype=np.float32), {**CLAIMS, "dims": 3}, "no head"),
        (np.eye(4, dtype=np.float32), {"kind": "vectors"}, "other parts"),
        (np.eye(4, dtype=np.float32), [], "other parts"),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path, matrix, claims, said):
    file = tmp_path / "head.safetensors"
    save_file({"matrix": matrix}, file, {"format": "mrl-rag head 1", "card": json.dumps(claims)})
    with pytest.raises(ModelFilesError, match=said):
        MatryoshkaHead.load(file)


def test_what_is_no_head_is_refused(head, tmp_path):
    file = tmp_path / "head.safetensors"
    with pytest.raises(ModelFilesError):
        MatryoshkaHead.load(file)
    with pytest.raises(ModelFilesError):
        MatryoshkaEncoder("minilm", head=file, device="cpu", dtype="float32")
    for content in (b"", b"\x80\x04\x95pickle", b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(ModelFilesError):
            MatryoshkaHead.load(file)
    for tensors, metadata in (({"weight": np.eye(4)}, {"format": "mrl-rag head 1"}), ({"matrix": np.eye(4)}, {})):
        save_file(tensors, file, metadata)
        with pytest.raises(ModelFilesError, match="format"):
            MatryoshkaHead.load(file)
    head.save(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelFilesError):
        MatryoshkaHead.load(file)


@pytest.mark.parametrize("matrix", [np.ones((2, 3)), np.ones(4), [], ["head"]])
def test_an_array_that_is_no_square_is_refused(matrix):
    with pytest.raises(InvalidVectors):
        MatryoshkaHead(matrix)


# The encoder


@pytest.fixture(scope="module")
def tiny(tiny_bert):
    return lambda **arguments: MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", **arguments)


@pytest.fixture(scope="module")
def tiny_head(tiny):
    encoder = tiny()
    matrix = np.random.default_rng(0).normal(size=(16, 16))
    return MatryoshkaHead(matrix, replace(CARD, full_dim=16, model=encoder.model, fingerprint=encoder.fingerprint))


def test_an_encoder_with_a_head_fits_no_second_one(tiny, tiny_head, tmp_path):
    headed = tiny(head=tiny_head)
    for encoder in (headed, CachedEncoder(headed, tmp_path / "vectors.sqlite3")):
        with pytest.raises(HeadMismatch, match="has a head already"):
            encoder.fit_head(["a"], ["b"])


@pytest.mark.parametrize("long_inputs", ["truncate", "average"])
@pytest.mark.filterwarnings("ignore:.*were longer than max_length")
def test_an_encoder_gives_what_the_head_makes_of_its_vectors(tiny, tiny_head, passages, long_inputs, tmp_path):
    tiny_head.save(tmp_path / "head.safetensors")
    whole = tiny(long_inputs=long_inputs).encode(passages)
    bare = MatryoshkaHead(tiny_head.matrix)
    for one in (bare, tiny_head.matrix, *([tmp_path / "head.safetensors"] if long_inputs == "truncate" else [])):
        cut = tiny(long_inputs=long_inputs, head=one).encode(passages, dim=4)
        np.testing.assert_allclose(cut, truncate(whole @ tiny_head.matrix, 4), atol=1e-4)


def test_a_head_of_another_models_vectors_is_refused_with_both_named(tiny, tiny_head, make_tiny_bert, tiny_bert):
    other = make_tiny_bert(seed=1)
    there = MatryoshkaEncoder(other, device="cpu", dtype="float32").fingerprint
    with pytest.raises(HeadMismatch) as refused:
        MatryoshkaEncoder(other, device="cpu", dtype="float32", head=tiny_head)
    for name in (str(tiny_bert), tiny_head.card.fingerprint, str(other), there):
        assert name in str(refused.value)
    with pytest.raises(HeadMismatch):
        tiny(max_length=8, head=tiny_head)
    assert tiny(max_length=8, head=tiny_head.matrix).full_dim == 16


def test_the_fingerprint_is_that_of_the_model_and_the_head(tiny, tiny_head):
    plain, headed = tiny().fingerprint, tiny(head=tiny_head).fingerprint
    assert headed == tiny_head.fingerprint_with(plain) != plain
    assert tiny(head=tiny_head.matrix).fingerprint == headed
    assert tiny(head=np.eye(16)).fingerprint not in (plain, headed)


# The index


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_an_index_gets_the_vectors_of_the_encoder_with_the_head(
    tiny, tiny_head, tiny_bert, tmp_path, precision, monkeypatch
):
    # Letters alone: this model's vocabulary has no digits.
    texts = [f"{word} {one}{two}" for word in ("tree", "boat", "a ferry") for one in "abcde" for two in "fghijklm"]
    with TwoStageRetriever(tiny(), TwoStageIndex(tmp_path / "db", precision=precision)) as retriever:
        retriever.index_texts(texts, metadatas=[{"row": row} for row in range(120)])
        index = retriever.index
        index.upsert(["bare"], np.ones((1, 16)))
    headed = tiny(head=tiny_head)
    kept = index.apply_head(tiny_head)
    assert index.kept() == [kept]
    assert (index.model, index.fingerprint, len(index)) == (str(tiny_bert), headed.fingerprint, 121)
    records = [record for record in index.get() if record.document]
    expected = headed.encode([record.document for record in records])
    assert [texts.index(record.document) for record in records] == [record.metadata["row"] for record in records]
    np.testing.assert_allclose([r.vector for r in records], expected, atol=0.02 if precision == "int8" else 2e-3)
    assert index.verify().ok
    with TwoStageRetriever(headed, index) as retriever:
        assert retriever.search("boat ch", k=1)[0].score > 0.999
    with pytest.raises(HeadMismatch, match="has a head already"):
        index.apply_head(tiny_head.matrix)
    index.reindex(shortlist_dim=8, rotation="fit")
    index.close()
    # The head is in the index: no file is needed.
    monkeypatch.setattr("mrl_rag.encoder.encoder.pick_dtype", lambda device: headed.dtype)
    with TwoStageRetriever(None, tmp_path / "db") as retriever:
        assert retriever.encoder.fingerprint == headed.fingerprint
        assert retriever.search("boat ch", k=1)[0].document == "boat ch"
