import gc
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from mrl_rag import MatryoshkaEncoder, truncate
from mrl_rag.encoder.loading import file_sha256
from mrl_rag.errors import EncoderClosed, InvalidDimension, InvalidInput, InvalidTexts, InvalidVectors
from mrl_rag.models import MODELS, ModelSpec, PackagedWeights
from mrl_rag.truncation import layer_norm


def test_rows_are_float32_unit_vectors_in_the_order_given(minilm, passages):
    vectors = minilm.encode(passages)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(passages), minilm.full_dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_smaller_dimension_is_the_cut_full_vector(minilm, passages):
    full = minilm.encode(passages[:8])
    np.testing.assert_allclose(minilm.encode(passages[:8], dim=64), truncate(full, 64), atol=1e-6)


def test_no_texts_give_no_rows(minilm):
    assert minilm.encode([], dim=64).shape == (0, 64)


def test_an_empty_string_is_encoded_like_any_text(minilm):
    assert np.linalg.norm(minilm.encode([""])[0]) == pytest.approx(1)


@pytest.mark.parametrize("texts", ["one text", ["a", None], ["a", 3], [b"bytes"], ["\ud800"], None])
def test_what_is_not_a_list_of_strings_is_refused(minilm, texts):
    with pytest.raises(InvalidTexts):
        minilm.encode(texts)


@pytest.mark.parametrize("dim", [0, -1, 385, 64.0, "64", float("nan")])
def test_a_dimension_out_of_range_is_refused(minilm, dim):
    with pytest.raises(InvalidDimension, match="1 to 384"):
        minilm.encode(["a"], dim=dim)


def test_an_unknown_task_is_refused(minilm):
    with pytest.raises(InvalidInput, match="'summary'"):
        minilm.encode(["a"], task="summary")


@pytest.mark.usefixtures("default_dtype")
def test_a_prompt_the_text_carries_is_not_added_twice(tiny_bert):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", prompts={"query": "query: "})
    np.testing.assert_array_equal(encoder.encode_queries(["query: how"]), encoder.encode_queries(["how"]))


@pytest.mark.usefixtures("default_dtype")
def test_cut_texts_are_counted_once_a_call(tiny_bert):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", max_length=8)
    # Six letters fit beside the two special tokens.
    with pytest.warns(UserWarning, match=r"2 of 3 texts .* the longest by 14 tokens") as record:
        encoder.encode(["a b", "a " * 7, "a " * 20])
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["a " * 6])


@pytest.mark.usefixtures("default_dtype")
def test_many_threads_get_the_vectors_one_thread_gets(tiny_bert, passages):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu")
    expected = encoder.encode(passages)
    with ThreadPoolExecutor(32) as pool:
        rows = list(pool.map(lambda text: encoder.encode([text])[0], passages))
    np.testing.assert_allclose(rows, expected, atol=1e-5)


@pytest.mark.usefixtures("default_dtype")
def test_the_fingerprint_follows_what_changes_a_vector_and_nothing_else(make_tiny_bert, tiny_bert):
    fingerprint = MatryoshkaEncoder(tiny_bert, device="cpu").fingerprint
    same = [MatryoshkaEncoder(tiny_bert, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    others = [
        MatryoshkaEncoder(make_tiny_bert(seed=1), device="cpu"),
        MatryoshkaEncoder(make_tiny_bert("cls"), device="cpu"),
        MatryoshkaEncoder(tiny_bert, device="cpu", prompts={"query": "q: "}),
        MatryoshkaEncoder(tiny_bert, device="cpu", max_length=8),
        MatryoshkaEncoder(tiny_bert, device="cpu", head=np.eye(16)),
    ]
    assert {encoder.fingerprint for encoder in same} == {fingerprint}
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 6


@pytest.mark.usefixtures("default_dtype")
def test_a_head_is_applied_before_the_cut(tiny_bert, passages):
    head = np.random.default_rng(0).normal(size=(16, 16))
    full = MatryoshkaEncoder(tiny_bert, device="cpu").encode(passages)
    cut = MatryoshkaEncoder(tiny_bert, device="cpu", head=head).encode(passages, dim=4)
    np.testing.assert_allclose(cut, truncate(full @ head, 4), atol=1e-4)


def test_a_head_of_another_shape_is_refused(tiny_bert):
    with pytest.raises(InvalidVectors, match=r"\(16, 16\)"):
        MatryoshkaEncoder(tiny_bert, device="cpu", head=np.eye(8), dtype="float32")


@pytest.fixture
def tabled(tmp_path, monkeypatch):
    """Put a folder into the model table, as weights that came in a package which must not be imported."""

    def put(folder, **facts):
        package = tmp_path / "packaged_tiny"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / "model").symlink_to(folder)
        monkeypatch.syspath_prepend(str(tmp_path))
        row = {"name": "tiny", "hub_id": "nobody/tiny", "architecture": "bert", "pooling": "mean", "full_dim": 16}
        row |= {"dims": (16, 4), "max_length": 48, "licence": "Apache-2.0", "languages": "en"}
        weights = PackagedWeights("packaged_tiny", "model", file_sha256(folder / "model.safetensors"))
        monkeypatch.setitem(MODELS, "tiny", ModelSpec(**(row | facts), packaged=weights))

    return put


@pytest.mark.parametrize("name", ["tiny", "nobody/tiny", "Nobody/Tiny"])
def test_a_row_of_the_model_table_asks_for_layer_norm_before_the_cut(
    make_tiny_bert, tabled, passages, cosine_distance, name, default_dtype
):
    folder = make_tiny_bert(modules=("Transformer", "Pooling"))
    # BERT ends with a norm of its own: with its biases at zero, as they begin, another one would change nothing.
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.bias"] += torch.linspace(0, 2, 16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tabled(folder, layer_norm=True)
    encoder = MatryoshkaEncoder(name, device="cpu")
    pooled = SentenceTransformer(str(folder), device="cpu").encode(passages)
    found, expected = encoder.encode(passages, dim=4), truncate(layer_norm(pooled), 4)
    if default_dtype == "float32":
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert cosine_distance(found, expected).max() < 1e-3
    assert cosine_distance(truncate(pooled, 4), expected).max() > 1e-2
    assert encoder.dims == (16, 4)


@pytest.mark.usefixtures("default_dtype")
def test_a_row_says_what_the_files_do_not(make_tiny_bert, tabled, passages):
    folder = make_tiny_bert("cls")
    same = MatryoshkaEncoder(folder, device="cpu", max_length=48)
    for file in ("modules.json", "sentence_bert_config.json"):
        (folder / file).unlink()
    tabled(folder, pooling="cls", prompts={"query": "query: "})
    encoder = MatryoshkaEncoder("tiny", device="cpu")
    assert encoder.max_length == 48
    assert encoder.prompts == {"query": "query: ", "document": "", "classification": "", "clustering": ""}
    np.testing.assert_allclose(encoder.encode(passages), same.encode(passages), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_queries(["a"]), same.encode(["query: a"]), atol=1e-6)


@pytest.mark.usefixtures("default_dtype")
def test_what_the_files_say_wins_over_the_row(make_tiny_bert, tabled):
    folder = make_tiny_bert("cls", prompts={"query": "q: "}, max_length=20)
    same = MatryoshkaEncoder(folder, device="cpu")
    tabled(folder, pooling="mean", prompts={"query": "query: "})
    encoder = MatryoshkaEncoder("tiny", device="cpu")
    assert (encoder.max_length, encoder.prompts["query"]) == (20, "q: ")
    np.testing.assert_array_equal(encoder.encode_queries(["abc"]), same.encode_queries(["abc"]))


@pytest.mark.parametrize("max_length", [0, 2, 65, 8.0, True, "8"])
def test_a_longest_input_the_network_cannot_take_is_refused(tiny_bert, max_length):
    with pytest.raises(InvalidInput, match="3 to 64"):
        MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", max_length=max_length)


@pytest.mark.parametrize(
    ("argument", "value"), [("dtype", "float8"), ("prompts", {"query": None}), ("prompts", {"search": "x"})]
)
def test_other_bad_settings_are_refused(tiny_bert, argument, value):
    with pytest.raises(InvalidInput):
        MatryoshkaEncoder(tiny_bert, device="cpu", **{argument: value})


@pytest.mark.usefixtures("default_dtype")
def test_a_closed_encoder_says_so(tiny_bert):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu")
    encoder.close()
    encoder.close()
    with pytest.raises(EncoderClosed):
        encoder.encode(["a"])


@pytest.mark.usefixtures("default_dtype")
def test_closing_frees_the_weights_at_once(tiny_bert):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu")
    encoder.encode(["a"])
    weights = weakref.ref(encoder._network.module)
    gc.disable()
    try:
        encoder.close()
        assert weights() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("default_dtype")
def test_a_pickled_encoder_carries_its_settings_and_not_its_weights(tiny_bert, passages):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", prompts={"query": "q: "})
    data = pickle.dumps(encoder)
    assert len(data) < 5_000
    np.testing.assert_array_equal(pickle.loads(data).encode_queries(passages), encoder.encode_queries(passages))


def test_token_offsets_span_the_whole_of_a_long_text(tiny_bert):
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", max_length=8)
    text = "abc de " * 50
    offsets = encoder.token_offsets(text)
    assert "".join(text[start:end] for start, end in offsets) == text.replace(" ", "")
