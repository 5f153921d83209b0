"""Every architecture that transformers carries: the encoder's vectors are those of sentence-transformers.

Random weights: an error of any size in positions, masks, pooling or the modules after it shows in full.
"""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from mrl_rag import MatryoshkaEncoder
from mrl_rag.encoder.network import _TOLERANCE
from mrl_rag.encoder.recipe import Pooling, read_recipe
from mrl_rag.errors import ModelFilesError
from mrl_rag.models import MODELS, ModelSpec, PackagedWeights
from mrl_rag.tasks import PROMPT_NAMES, TASKS

ARCHITECTURES = (
    *("bert", "distilbert", "mpnet", "xlm-roberta", "nomic", "modernbert"),
    *("gte", "jina-v3", "gemma3", "qwen3", "t5", "longt5", "m2m100", "xlnet"),
)

# T5 adds a bias by position to its scores; the others don't follow transformers' attention interface, or take no
# positions.
PADDED_ONLY = {"mpnet", "t5", "longt5", "m2m100", "xlnet"}
PATHS = [f"{name} packed" for name in ARCHITECTURES if name not in PADDED_ONLY]
PATHS += [f"{name} padded" for name in ARCHITECTURES]
STRIP = {"strip_left": True, "strip_right": True}


@pytest.fixture(scope="module")
def texts(passages):
    """Of one to a hundred and more tokens, some longer than the models take."""
    return [*dict.fromkeys(text[:150] for text in passages[:16]), "the thread", "the document"]


@pytest.fixture(scope="module", params=PATHS)
def both(save_model, request):
    """An encoder and the reference, on every path that the encoder has for the architecture."""
    name, path = request.param.split()
    encoder, reference = open_both(save_model(name))
    assert encoder._network.packs == (name not in PADDED_ONLY)
    if path == "padded" and encoder._network.packs:
        encoder._network._states = type(encoder._network)._padded
        encoder._network.module.set_attn_implementation("sdpa")
    return encoder, reference


def open_both(folder):
    return MatryoshkaEncoder(folder, device="cpu", dtype="float32"), SentenceTransformer(str(folder), device="cpu")


def reference_vectors(reference, texts, task, **settings):
    if task in ("query", "document"):
        return getattr(reference, f"encode_{task}")(texts, **settings)
    name = next((name for name in PROMPT_NAMES[task] if name in reference.prompts), None)
    return reference.encode(texts, prompt=reference.prompts[name] if name else "", **settings)


@pytest.mark.parametrize("task", TASKS)
def test_the_vectors_are_the_references_at_every_dimension(both, texts, cosine_distance, task):
    encoder, reference = both
    full = encoder.encode(texts, task)
    assert full.shape[1] == encoder.full_dim == reference.get_embedding_dimension()
    for dim in (encoder.full_dim, encoder.full_dim // 2, 3):
        expected = reference_vectors(reference, texts, task, truncate_dim=dim)
        assert cosine_distance(encoder.encode(texts, task, dim=dim), expected).max() < 1e-5
    # The weights make a difference of every text.
    assert np.triu(full @ full.T, k=1).max() < 1 - 1e-3


# M2M100 attends within the sequences, but ignores their positions.
@pytest.mark.parametrize("name", sorted(PADDED_ONLY - {"m2m100"}))
def test_a_network_that_ignores_how_sequences_are_packed_gets_padding_however_near_its_vectors(
    save_model, monkeypatch, name
):
    monkeypatch.setitem(_TOLERANCE, torch.float32, 3.0)
    assert not MatryoshkaEncoder(save_model(name), device="cpu", dtype="float32")._network.packs


def test_a_vector_does_not_depend_on_its_neighbours(both, texts):
    encoder, _ = both
    together = encoder.encode(texts)
    alone = np.vstack([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6, rtol=0)
    np.testing.assert_allclose(encoder.encode(texts[::-1])[::-1], together, atol=1e-6, rtol=0)


# Three will do: an encoder, one with Dense modules, one that looks at the last token.
@pytest.mark.parametrize("name", ["bert", "gemma3", "qwen3"])
def test_half_precision_is_near_the_reference(save_model, name, texts, cosine_distance):
    folder = save_model(name, initializer_range=0.05)
    expected = reference_vectors(SentenceTransformer(str(folder), device="cpu"), texts, "document")
    half = MatryoshkaEncoder(folder, device="cpu", dtype="bfloat16").encode(texts)
    assert half.dtype == np.float32
    assert cosine_distance(half, expected).max() < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_a_gpu_gives_the_references_vectors_too(save_model, name, dtype, tolerance, texts, cosine_distance):
    """Packed, padded, and alone: by a CUDA graph that is recorded the first time and run the second."""
    folder = save_model(name, initializer_range=0.05)
    expected = reference_vectors(SentenceTransformer(str(folder), device="cpu"), texts, "document")
    encoder = MatryoshkaEncoder(folder, device="cuda", dtype=dtype)
    for found in (encoder.encode(texts), *(np.vstack([encoder.encode([text]) for text in texts]) for _ in range(2))):
        assert cosine_distance(found, expected).max() < tolerance


@pytest.mark.parametrize("name", ["modernbert", "gemma3", "qwen3"])
def test_a_text_of_many_windows_gets_the_references_vector(save_model, passages, cosine_distance, name):
    """Windows of 16 tokens and a few: the edges of each, the last one short."""
    windows = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0} if name == "qwen3" else {}
    encoder, reference = open_both(save_model(name, max_length=120, **windows))
    texts = [("the thread " * 40)[:length] for length in (5, 15, 16, 17, 30, 33, 64, 90, 110)] + passages[:8]
    asked = [getattr(module, "sliding_window", None) for module in encoder._network.module.modules()]
    assert any(window and window < 40 for window in asked)
    expected = reference_vectors(reference, texts, "query")
    assert cosine_distance(encoder.encode_queries(texts), expected).max() < 1e-5


def test_a_prompt_a_text_carries_gives_the_references_vector(both, texts, cosine_distance):
    encoder, reference = both
    prompt = encoder.prompts["query"]
    carried = encoder.encode_queries([prompt + text for text in texts])
    assert cosine_distance(carried, reference_vectors(reference, texts, "query")).max() < 1e-5


def test_right_padding_here_is_left_padding_there(save_model, texts, cosine_distance):
    encoder, reference = open_both(save_model("qwen3"))
    batch = reference.tokenizer(["a", "a longer one"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert cosine_distance(encoder.encode(texts), reference.encode(texts, batch_size=len(texts))).max() < 1e-5


def test_a_causal_networks_vectors_ignore_what_follows_and_a_bidirectional_ones_do_not(save_model, cosine_distance):
    """That the flag of EmbeddingGemma is heeded: its first token sees the last."""
    texts = ["the thread", "the query"]
    causal, bidirectional = (
        MatryoshkaEncoder(
            save_model("gemma3", pooling="cls", modules=[], prompts={}, use_bidirectional_attention=flag),
            device="cpu",
            dtype="float32",
        ).encode(texts)
        for flag in (False, True)
    )
    assert cosine_distance(causal[:1], causal[1:]) < 1e-6
    assert cosine_distance(bidirectional[:1], bidirectional[1:]) > 1e-3


@pytest.mark.parametrize("length", [40, 90])
def test_rotary_scaling_past_the_training_follows_each_text_alone(save_model, cosine_distance, length):
    """The reference's own angles depend on the batch and on what went before, so it is asked afresh for each text."""
    folder = save_model(
        "nomic",
        max_length=120,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
    )
    texts = ["ab " * (length // 2), "a short one", "cd " * 55]  # a letter a token
    encoder = MatryoshkaEncoder(folder, device="cpu", dtype="float32")
    assert encoder.max_length == 120
    encoder.encode(texts)
    expected = np.vstack(
        [SentenceTransformer(str(folder), device="cpu").encode([text], prompt_name="document") for text in texts]
    )
    assert cosine_distance(encoder.encode(texts), expected).max() < 1e-5


@pytest.mark.parametrize(
    "modules",
    [
        [("Dense", {"out_features": 40}), ("LayerNorm", {}), ("Dense", {"out_features": 16, "bias": False})],
        [("LayerNorm", {}), ("Normalize", {})],
        [("Normalize", {}), ("Dense", {"out_features": 32, "use_residual": True}), ("Dropout", {"dropout": 0.5})],
        [("Dense", {"out_features": 20, "use_residual": True, "activation_function": "torch.nn.PReLU"})],
    ],
    ids=["dense-norm-dense", "layer-norm", "residual-after-normalize", "learned-activation"],
)
def test_modules_after_pooling_are_applied_in_their_order(save_model, texts, cosine_distance, modules):
    encoder, reference = open_both(save_model("bert", modules=modules))
    assert encoder.full_dim == reference.get_embedding_dimension()
    for dim in (encoder.full_dim, 8):
        expected = reference.encode(texts, truncate_dim=dim)
        assert cosine_distance(encoder.encode(texts, dim=dim), expected).max() < 1e-5


@pytest.mark.parametrize("pooling", [*get_args(Pooling), ["weightedmean", "max", "cls"]], ids=str)
@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "gemma3", "qwen3"])
def test_a_prompt_left_out_of_pooling_is_left_out_as_by_the_reference(
    save_model, texts, cosine_distance, name, pooling
):
    """With special tokens before and after it, only after it, and a space at its end that joins the next word."""
    prompts = {"query": "find the query: ", "clustering": "sort:"}
    modules = [] if isinstance(pooling, list) else None
    folder = save_model(name, pooling=pooling, modules=modules, prompts=prompts)
    pooling_file = folder / "1_Pooling" / "config.json"
    pooling_file.write_text(json.dumps(json.loads(pooling_file.read_text()) | {"include_prompt": False}))
    encoder, reference = open_both(folder)
    for task in ("query", "document", "clustering"):
        expected = reference_vectors(reference, texts, task)
        assert cosine_distance(encoder.encode(texts, task), expected).max() < 1e-5
    # Carried by the text, the prompt is the prompt as well.
    carried = encoder.encode_queries([prompts["query"] + text for text in texts])
    assert cosine_distance(carried, reference_vectors(reference, texts, "query")).max() < 1e-5
    pooling_file.write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": pooling}))
    pooled, _ = open_both(folder)
    assert pooled.fingerprint != encoder.fingerprint
    if "mean" in pooling:
        assert cosine_distance(pooled.encode_queries(texts), encoder.encode_queries(texts)).max() > 1e-3


@pytest.mark.parametrize("name", ["modernbert", "bert", "xlm-roberta"])
def test_texts_are_lower_cased_where_the_files_say_so(save_model, cosine_distance, name):
    """Before a tokenizer's own normalizer, of whatever kind: none, one, several."""
    folder = save_model(name, settings={"do_lower_case": True})
    if name == "xlm-roberta":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Strip"} | STRIP]}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoder, reference = open_both(folder)
    texts = ["The Thread AND the STRING", "the thread and the string"]
    vectors = encoder.encode(texts)
    assert cosine_distance(vectors[:1], vectors[1:]) < 1e-6
    assert cosine_distance(vectors, reference_vectors(reference, texts, "document")).max() < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"max_seq_length": None},
        {"max_seq_length": 40},
        {"max_seq_length": 20, "tokenizer_args": {"truncation_side": "left"}},
        {"max_seq_length": 40, "tokenizer_args": {"model_max_length": 20}},
        {"max_seq_length": None, "processor_kwargs": {"model_max_length": 20}},
        {"config_kwargs": {"layer_norm_eps": 0.5}, "model_kwargs": {"attn_implementation": "sdpa"}},
        {
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
    ],
)
def test_settings_of_the_networks_module_are_read_under_old_and_new_names(save_model, texts, cosine_distance, settings):
    encoder, reference = open_both(save_model("bert", settings=settings))
    assert encoder.max_length == reference.max_seq_length
    assert cosine_distance(encoder.encode(texts), reference.encode(texts)).max() < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_what_sentence_transformers_saves_today_is_read(save_model, texts, cosine_distance, tmp_path, name):
    """Modules under their new names, and padding in tokenizer.json."""
    reference = SentenceTransformer(str(save_model(name)), device="cpu")
    expected = reference_vectors(reference, texts, "query")
    reference.save(str(tmp_path), create_model_card=False)
    encoder = MatryoshkaEncoder(tmp_path, device="cpu", dtype="float32")
    assert encoder.max_length == reference.max_seq_length
    assert cosine_distance(encoder.encode_queries(texts), expected).max() < 1e-5


def test_a_network_in_a_folder_of_its_own_is_found(save_model, texts, cosine_distance):
    """The layout before sentence-transformers 2: `0_Transformer` beside `1_Pooling`."""
    folder = save_model("bert")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "0_Transformer").mkdir()
    for file in [*folder.glob("*.json"), folder / "model.safetensors"]:
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(folder / "0_Transformer" / file.name)
    (folder / "modules.json").write_text(json.dumps(modules))
    encoder, reference = open_both(folder)
    assert encoder.max_length == 64
    assert cosine_distance(encoder.encode(texts), reference.encode(texts)).max() < 1e-5


def test_the_nomic_recipe_is_the_published_snippet(save_model, texts, cosine_distance, tmp_path, monkeypatch):
    """Mean pooling, layer norm over the whole vector, the cut, then length 1: the card of nomic-embed-text-v1.5."""
    folder = save_model("nomic")
    (tmp_path / "packaged_nomic").mkdir()
    (tmp_path / "packaged_nomic" / "model").symlink_to(folder)
    (tmp_path / "packaged_nomic" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    from mrl_rag.encoder.loading import file_sha256

    row = ModelSpec(
        name="tiny-nomic",
        hub_id="nobody/tiny-nomic",
        architecture="nomic_bert",
        pooling="mean",
        full_dim=32,
        dims=(32, 16, 8),
        max_length=64,
        licence="Apache-2.0",
        languages="en",
        layer_norm=MODELS["nomic-v1.5"].layer_norm,
        packaged=PackagedWeights("packaged_nomic", "model", file_sha256(folder / "model.safetensors")),
    )
    monkeypatch.setitem(MODELS, "tiny-nomic", row)
    encoder = MatryoshkaEncoder("tiny-nomic", device="cpu", dtype="float32")
    pooled = SentenceTransformer(str(folder), device="cpu").encode(texts, prompt_name="query", convert_to_tensor=True)
    for dim in (32, 16, 8):
        expected = torch.nn.functional.layer_norm(pooled, normalized_shape=(pooled.shape[1],))
        expected = torch.nn.functional.normalize(expected[:, :dim], p=2, dim=1)
        ours = encoder.encode_queries(texts, dim=dim)
        assert cosine_distance(ours, expected).max() < 1e-5
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_row_may_leave_pooling_and_dense_to_the_models_files(save_model, cosine_distance):
    """acge_text_embedding's layout in small: BERT, Pooling, Dense to a longer vector; cut with the length set to 1."""
    folder = save_model(
        "bert",
        pooling="mean",
        modules=[("Dense", {"out_features": 56, "activation_function": "torch.nn.modules.linear.Identity"})],
    )
    row = MODELS["acge_text_embedding"]
    recipe = read_recipe(folder, row)
    assert (recipe.poolings, [module.kind for module in recipe.modules]) == (("mean",), ["Dense"])
    encoder, reference = open_both(folder)
    assert encoder.full_dim == 56
    texts = ["the thread", "a query of the document"]
    for dim in (56, 32):
        expected = reference.encode(texts, truncate_dim=dim, normalize_embeddings=True)
        assert cosine_distance(encoder.encode(texts, dim=dim), expected).max() < 1e-5
    (folder / "modules.json").unlink()
    with pytest.raises(ModelFilesError, match=r"no modules\.json.*acge_text_embedding"):
        read_recipe(folder, row)


def test_the_fingerprint_follows_every_part_of_the_recipe(save_model):
    def fingerprint(**changes):
        return MatryoshkaEncoder(save_model("bert", **changes), device="cpu", dtype="float32").fingerprint

    plain = fingerprint()
    dense = ("Dense", {"out_features": 32})
    others = [
        fingerprint(modules=[dense]),
        fingerprint(modules=[("Dense", {"out_features": 32, "activation_function": "torch.nn.ReLU"})]),
        fingerprint(modules=[dense, ("LayerNorm", {})]),
        fingerprint(modules=[("Normalize", {}), dense]),
        fingerprint(settings={"do_lower_case": True}),
        fingerprint(settings={"config_kwargs": {"layer_norm_eps": 0.5}}),
        fingerprint(layer_norm_eps=0.5),
        fingerprint(pooling="mean"),
    ]
    assert fingerprint(modules=[("Normalize", {})]) == plain == fingerprint()
    assert len({plain, *others}) == 9


def test_the_fingerprint_follows_a_modules_weights(save_model):
    folder = save_model("distilbert")
    before = MatryoshkaEncoder(folder, device="cpu", dtype="float32").fingerprint
    module = SentenceTransformer(str(folder), device="cpu")[2]
    module.linear.bias.data += 1
    module.save(str(folder / "2_Dense"))
    assert MatryoshkaEncoder(folder, device="cpu", dtype="float32").fingerprint != before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task"),
        ("sentence_bert_config.json", {"query_length": 32}, "query_length"),
        ("sentence_bert_config.json", {"modality_config": {"message": {"method": "forward"}}}, "modality_config"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"add_special_tokens": False}}}, "add_special"),
        ("sentence_bert_config.json", {"model_kwargs": {"default_task": "x"}}, "default_task"),
        ("sentence_bert_config.json", {"max_seq_length": "many"}, "'many'"),
        ("sentence_bert_config.json", {"tokenizer_name_or_path": "bert-base-cased"}, "from 'bert-base-cased'"),
        ("sentence_bert_config.json", {"max_sequence_length": 20}, "max_sequence_length"),
        ("sentence_bert_config.json", [], "no JSON dict"),
        ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim"),
        ("modules.json", [{"type": "custom_st.Transformer", "path": ""}], "custom_st"),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": "../x"}], "outside"),
        ("modules.json", [{"type": "sentence_transformers.models.Pooling", "path": ""}], "then Pooling"),
        ("2_Dense/config.json", {"in_features": 16, "out_features": 24}, "2_Dense"),
        ("2_Dense/config.json", {"in_features": 32}, "out_features"),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 24, "activation_function": "os.system"}, "os"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "sentence_embedding"),
        ("adapter_config.json", {}, "merge_and_unload"),
        ("retrieval_query/adapter_config.json", {}, "merge_and_unload"),
    ],
)
def test_a_step_that_would_be_missing_is_refused_by_name(save_model, file, content, message):
    folder = save_model("distilbert", files={file: content})
    with pytest.raises(ModelFilesError, match=message) as caught:
        MatryoshkaEncoder(folder, device="cpu", dtype="float32")
    assert str(folder) in str(caught.value)


def test_a_module_that_does_not_fit_the_one_before_it_is_refused(save_model):
    folder = save_model("distilbert", modules=[("Dense", {"out_features": 24})] * 2)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules[:2], modules[3]]))
    with pytest.raises(ModelFilesError, match="takes vectors of 24 numbers; what comes before it gives 32"):
        MatryoshkaEncoder(folder, device="cpu", dtype="float32")


def test_weights_that_lack_part_of_the_network_are_refused(save_model):
    """Transformers fills the gap with random numbers: another architecture's weights would go unnoticed."""
    from safetensors.torch import load_file, save_file

    folder = save_model("bert")
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "layer.1.attention.self.query" not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFilesError, match="lack 2 parts of a bert network"):
        MatryoshkaEncoder(folder, device="cpu", dtype="float32")
