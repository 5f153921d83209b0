"""Whatever a model's folder says of its use: the vectors of sentence-transformers, or a word that says why not."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from mrl_rag import MatryoshkaEncoder
from mrl_rag.errors import InvalidInput, ModelFilesError

TEXTS = ["the thread", "a query of the document, then the string", "x", "the end of it " * 3]


@pytest.fixture
def compare(cosine_distance):
    """Compare questions and passages with the reference's; return both encoders."""

    def check(folder, texts=TEXTS, **settings):
        encoder = MatryoshkaEncoder(folder, device="cpu", dtype="float32", **settings)
        reference = SentenceTransformer(str(folder), device="cpu")
        assert encoder.full_dim == reference.get_embedding_dimension()
        for task in ("query", "document"):
            expected = getattr(reference, f"encode_{task}")(texts)
            assert cosine_distance(encoder.encode(texts, task), expected).max() < 1e-5
        return encoder, reference

    return check


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_template(folder, single):
    """Give a folder's tokenizer another post-processor."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = [part.split(":")[0] for part in single.split() if not part.startswith("$")]
    specials = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("name", "made_for"),
    [
        ("bert", {}),
        ("bert", {"architectures": ["BertForMaskedLM"]}),
        ("qwen3", {"architectures": ["Qwen3ForCausalLM"]}),
        ("qwen3", {"architectures": ["Qwen3ForCausalLM"], "is_causal": False}),
    ],
)
def test_without_modules_the_pooling_follows_what_the_network_was_made_for(save_model, compare, name, made_for):
    """And the files that go with modules.json are not read."""
    folder = save_model(name, pooling="mean", prompts={"query": "find: "}, sentence_transformers={"truncate_dim": 8})
    (folder / "modules.json").unlink()
    rewrite(folder / "config.json", **made_for)
    encoder, reference = compare(folder)
    assert encoder.max_length == reference.max_seq_length == 128


def test_a_chat_template_counts_only_where_no_file_says_how_vectors_are_made(save_model, compare):
    folder = save_model("qwen3")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|im_end|>{{ m['content'] }}{% endfor %}")
    compare(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(ModelFilesError, match=r"chat template.*modules\.json"):
        MatryoshkaEncoder(folder, device="cpu", dtype="float32")


def test_the_authors_dimension_is_the_full_one(save_model, compare, cosine_distance):
    folder = save_model("bert", modules=[("Dense", {"out_features": 24})], sentence_transformers={"truncate_dim": 8})
    encoder, reference = compare(folder)
    assert (encoder.full_dim, encoder.dims) == (8, (8,))
    expected = reference.encode_document(TEXTS, truncate_dim=3)
    assert cosine_distance(encoder.encode(TEXTS, dim=3), expected).max() < 1e-5
    averaging, _ = compare(folder, long_inputs="average")
    assert averaging.encode(["the long one " * 40]).shape == (1, 8)
    head = np.eye(8)[::-1]
    turned = MatryoshkaEncoder(folder, device="cpu", dtype="float32", head=head)
    whole = SentenceTransformer(str(folder), device="cpu", truncate_dim=24).encode_document(TEXTS)
    assert cosine_distance(turned.encode(TEXTS), whole[:, 7::-1]).max() < 1e-5


@pytest.mark.parametrize("how", ["dot", "manhattan"])
def test_another_comparison_than_cosine_is_said_where_it_ranks_otherwise(save_model, compare, how):
    said = {"similarity_fn_name": how}
    with pytest.warns(UserWarning, match=f"compare its vectors by '{how}'"):
        compare(save_model("bert", sentence_transformers=said))
    if how == "dot":
        compare(save_model("bert", modules=[("Normalize", {})], sentence_transformers=said))


def test_a_prompt_named_passage_is_for_who_asks_for_it(save_model, compare, cosine_distance):
    """The reference's `encode_document` misses it: its own empty "document" prompt hides it."""
    folder = save_model("bert", prompts={"query": "query: ", "passage": "passage: "})
    with pytest.warns(UserWarning, match=r"prompts=\{'document': 'passage: '\}"):
        _, reference = compare(folder)
    compare(folder, prompts={"document": ""})
    asked = MatryoshkaEncoder(folder, device="cpu", dtype="float32", prompts={"document": "passage: "})
    expected = reference.encode(TEXTS, prompt_name="passage")
    assert cosine_distance(asked.encode_documents(TEXTS), expected).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("bert", "[CLS]:0 $A:1 [SEP]:1"),
        ("bert", "[CLS]:1 $A:0 [SEP]:0"),
        ("xlm-roberta", "<s>:0 $A:1 </s>:1"),
        ("nomic", "[CLS]:0 $A:1 [SEP]:0"),
        ("mpnet", "<s>:0 $A:1 </s>:1"),  # which has no token types
    ],
)
@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_token_types_are_those_of_the_tokenizers_template(
    save_model, compare, cosine_distance, name, template, backend
):
    if backend == "openvino":
        pytest.importorskip("openvino")
    folder = save_model(name, type_vocab_size=2)
    with_template(folder, template)
    encoder, _ = compare(folder, backend=backend)
    alone = np.vstack([encoder.encode([text]) for text in TEXTS])
    assert cosine_distance(alone, encoder.encode(TEXTS)).max() < 1e-5


@pytest.mark.parametrize(
    "name", ["XLMRoberta", "Camembert", "RobertaPreLayerNorm", "Data2VecText", "Xmod", "Esm", "Longformer", "MPNet"]
)
def test_a_text_that_holds_the_token_that_pads_keeps_the_references_positions(save_model, compare, name):
    own = {"Longformer": {"attention_window": 8}, "Xmod": {"languages": ["en"], "default_language": "en"}}
    folder = save_model("xlm-roberta", network=name, type_vocab_size=2, **own.get(name, {}))
    encoder, _ = compare(folder, ["the <pad> thread", "<pad><pad>a query", "the query", "the string<pad>"])
    assert encoder._network.packs == (name not in ("Longformer", "MPNet"))


def test_bigbird_attends_sparsely_to_long_texts_whatever_came_before(save_model, cosine_distance):
    """The reference's attention turns full with the first short batch, and follows the padding: it is asked afresh."""
    folder = save_model("bigbird", max_length=120)
    texts = ["the thread", "a b c d " * 20, "e f " * 9, "x" * 40, "a b " * 17]
    encoder = MatryoshkaEncoder(folder, device="cpu", dtype="float32")
    expected = [SentenceTransformer(str(folder), device="cpu").encode_document([text])[0] for text in texts]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0], [1]):
        found = encoder.encode([texts[i] for i in order])
        assert cosine_distance(found, [expected[i] for i in order]).max() < 1e-5


def byt5(save_model):
    from transformers import ByT5Tokenizer

    folder = save_model("t5", vocab_size=400, pad_token_id=0)
    return folder, ByT5Tokenizer()


def canine(save_model):
    from transformers import CanineTokenizer

    return save_model("canine", bos_token_id=1, eos_token_id=2), CanineTokenizer()


def phobert(save_model):
    from transformers import PhobertTokenizer

    folder = save_model("xlm-roberta")
    (folder / "vocab.txt").write_text("".join(f"{c}{end} 1\n" for c in "abcdehinorstuwxy" for end in ("", "@@")))
    (folder / "bpe.codes").write_text("#version: 0.2\nt h 5\n")
    return folder, PhobertTokenizer(str(folder / "vocab.txt"), str(folder / "bpe.codes"))


@pytest.fixture(params=[byt5, canine, phobert])
def in_python(request, save_model):
    """The folder of a model whose tokenizer is in Python alone."""
    folder, tokenizer = request.param(save_model)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_in_python_gives_the_references_vectors(in_python, compare):
    encoder, _ = compare(in_python, ["the thread of it", "a query, then a string", "the end of it " * 3])
    with pytest.warns(UserWarning, match="1 of 2 texts were longer"):
        encoder.encode(["the thread of it", "the end of it " * 30])
    assert encoder.last_truncation.texts == 1
    with pytest.raises(InvalidInput, match="tokens are"):
        encoder.token_offsets("a text")
    with pytest.raises(InvalidInput, match="tokens are"):
        MatryoshkaEncoder(in_python, device="cpu", dtype="float32", long_inputs="average")


@pytest.mark.parametrize("long_inputs", ["truncate", "average"])
def test_a_text_without_tokens_gets_zeros_as_in_the_references_batches(save_model, cosine_distance, long_inputs):
    folder = save_model("bert", pooling="mean")
    with_template(folder, "$A:0")
    encoder = MatryoshkaEncoder(folder, device="cpu", dtype="float32", long_inputs=long_inputs)
    expected = SentenceTransformer(str(folder), device="cpu").encode_document(["the thread", "", "a query"])
    found = encoder.encode(["the thread", "", "a query"])
    assert cosine_distance(found[::2], expected[::2]).max() < 1e-5
    assert not found[1].any()
    assert not expected[1].any()
    assert not encoder.encode([""]).any()


async def test_and_alone_in_a_coroutine(save_model):
    folder = save_model("bert", pooling="mean")
    with_template(folder, "$A:0")
    assert not (await MatryoshkaEncoder(folder, device="cpu", dtype="float32").aencode([""])).any()


def test_a_network_without_a_limit_gets_no_more_than_a_batch_of_tokens(save_model, monkeypatch):
    folder = save_model("t5", max_length=None)
    rewrite(folder / "tokenizer_config.json", model_max_length=int(1e30))
    encoder = MatryoshkaEncoder(folder, device="cpu", dtype="float32")
    given, run = [], encoder._network.run
    monkeypatch.setattr(encoder._network, "run", lambda rows: (given.append([len(r.ids) for r in rows]), run(rows))[1])
    encoder.encode(["a b c d e " * 100] * 30)
    assert max(map(sum, given)) <= 4096
    assert len(encoder.encode(["a b c d e " * 2000])) == 1


@pytest.mark.parametrize(("name", "positions"), [("Bert", 130), ("XLMRoberta", 128), ("OPT", 130), ("GPT2", 130)])
def test_no_text_is_longer_than_the_networks_positions(save_model, name, positions):
    """The reference takes the number in its file, and fails on the first text that is longer."""
    own = {"OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}}
    folder = save_model("xlm-roberta", network=name, max_length=1000, **own.get(name, {}))
    encoder = MatryoshkaEncoder(folder, device="cpu", dtype="float32")
    assert encoder.max_length == positions
    with pytest.warns(UserWarning, match=f"max_length={positions}"):
        encoder.encode(["a b c " * 100])
    with pytest.raises(InvalidInput, match=f"3 to {positions}"):
        MatryoshkaEncoder(folder, device="cpu", dtype="float32", max_length=positions + 1)


def pickled(folder, weights="model.safetensors"):
    """Save weights as pickles, as before safetensors."""
    import torch
    from safetensors.torch import load_file

    file = folder / weights
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


@pytest.mark.parametrize("weights", ["model.safetensors", "2_Dense/model.safetensors"])
def test_pickled_weights_are_loaded_for_who_asks(save_model, compare, weights):
    folder = save_model("distilbert")
    before = MatryoshkaEncoder(folder, device="cpu", dtype="float32", pickled_weights=True)
    pickled(folder, weights)
    with pytest.raises(ModelFilesError, match=r"no weights in model\.safetensors.*pickled_weights=True"):
        MatryoshkaEncoder(folder, device="cpu", dtype="float32")
    encoder, _ = compare(folder, pickled_weights=True)
    np.testing.assert_array_equal(encoder.encode(TEXTS), before.encode(TEXTS))
    fingerprint = encoder.fingerprint
    import torch

    file = (folder / weights).with_name("pytorch_model.bin")
    torch.save({key: value * 2 for key, value in torch.load(file).items()}, file)
    assert MatryoshkaEncoder(folder, device="cpu", dtype="float32", pickled_weights=True).fingerprint != fingerprint


@pytest.mark.parametrize("weights", ["model.safetensors", "2_Dense/model.safetensors"])
def test_a_pickle_that_would_run_code_is_refused(save_model, tmp_path, weights):
    import pickle

    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = save_model("distilbert")
    (folder / weights).unlink()
    (folder / weights).with_name("pytorch_model.bin").write_bytes(pickle.dumps({"linear.weight": Runs()}, 2))
    with pytest.raises(ModelFilesError, match=str(folder)):
        MatryoshkaEncoder(folder, device="cpu", dtype="float32", pickled_weights=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "file",
    ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "bpe.codes"],
)
def test_the_fingerprint_follows_every_file_that_a_tokenizer_reads(save_model, file):
    folder, tokenizer = phobert(save_model) if file == "bpe.codes" else (save_model("bert"), None)
    if tokenizer:
        (folder / "tokenizer.json").unlink()
        rewrite(folder / "tokenizer_config.json", tokenizer_class="PhobertTokenizer")
    before = MatryoshkaEncoder(folder, device="cpu", dtype="float32").fingerprint
    (folder / file).write_text((folder / file).read_text() + "\n" if (folder / file).is_file() else "{}")
    assert MatryoshkaEncoder(folder, device="cpu", dtype="float32").fingerprint != before


def test_the_fingerprint_follows_code_of_the_models_own(save_model):
    folder = save_model("bert")
    settings = {"device": "cpu", "dtype": "float32", "trust_remote_code": True}
    before = MatryoshkaEncoder(folder, **settings).fingerprint
    (folder / "modeling_own.py").touch()
    assert MatryoshkaEncoder(folder, **settings).fingerprint != before


def test_the_fingerprint_follows_what_the_files_cut(save_model):
    fingerprints = [
        MatryoshkaEncoder(save_model("bert", **settings), device="cpu", dtype="float32").fingerprint
        for settings in (
            {},
            {"sentence_transformers": {"truncate_dim": 8}},
            {"settings": {"tokenizer_args": {"truncation_side": "left"}}},
            {"pooling": ["cls", "mean"]},
        )
    ]
    assert len(set(fingerprints)) == len(fingerprints)
