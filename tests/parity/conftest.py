"""Small models of the real architectures, in the sentence-transformers layout."""

import json
import string
from collections.abc import Callable
from typing import NamedTuple

import pytest

LETTERS = string.ascii_lowercase + string.digits + ":_'.|-"
NOMIC_PROMPTS = {
    "query": "search_query: ",
    "document": "search_document: ",
    "classification": "classification: ",
    "clustering": "clustering: ",
}


def word_pieces(specials, cls, sep):
    """BERT's and MPNet's: letters as pieces, lower case, [CLS] text [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {t: i for i, t in enumerate([*specials, *LETTERS, *(f"##{letter}" for letter in LETTERS)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing((sep, vocab[sep]), (cls, vocab[cls]))
    return tokenizer, {"pad_token": specials[0], "unk_token": "[UNK]", "cls_token": cls, "sep_token": sep}


def bert_pieces():
    return word_pieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS]", "[SEP]")


def mpnet_pieces():
    """<s> is 0 and <pad> is 1, from which the network counts its positions."""
    tokenizer, names = word_pieces(["<s>", "<pad>", "</s>", "[UNK]"], "<s>", "</s>")
    return tokenizer, names | {"pad_token": "<pad>"}


def unigrams():
    """XLM-RoBERTa's: a word carries the space before it, <s> text </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    scores = [*((t, 0.0) for t in ("<s>", "<pad>", "</s>", "<unk>")), ("▁", -2.0)]
    scores += [(piece, -3.0 - 0.01 * i) for i, piece in enumerate([*LETTERS, "▁the", "▁a", "th", "er", "in", ":▁"])]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer, {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def byte_pairs(template, specials):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280 + len(specials),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["search the document for the query, then the thread and the string"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, tokenizer.token_to_id(t)) for t in specials if t in template]
    )
    return tokenizer


def modernbert_pairs():
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return byte_pairs("[CLS] $A [SEP]", list(names.values())), names


def gemma_pairs():
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return byte_pairs("<bos> $A <eos>", list(names.values())), names


def qwen_pairs():
    """The end of the text is also the padding, and that is on the left."""
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return byte_pairs("$A <|endoftext|>", list(names.values())), names | {"padding_side": "left"}


def xlnet_pieces():
    """XLNet's special tokens are at the end, [CLS] of a type of its own."""
    from tokenizers.processors import TemplateProcessing

    tokenizer, names = bert_pieces()
    tokenizer.post_processor = TemplateProcessing(
        single="$A:0 [SEP]:0 [CLS]:2", special_tokens=[("[SEP]", 3), ("[CLS]", 2)]
    )
    return tokenizer, names | {"padding_side": "left"}


def t5_unigrams():
    from tokenizers.processors import TemplateProcessing

    tokenizer, names = unigrams()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer, {key: names[key] for key in ("pad_token", "unk_token", "eos_token")}


BERT_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 130,
    "initializer_range": 0.3,  # at 0.02 every text gets nearly the same vector
}
T5_SHAPE = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
    "relative_attention_num_buckets": 8,
}
LINEAR = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
NORMALIZE = ("Normalize", {})


class Architecture(NamedTuple):
    name: str  # of its classes in transformers
    tokenizer: Callable
    config: dict  # what differs from BERT_SHAPE: the flags of the published model's config.json, in small
    pooling: str
    modules: list  # after pooling
    prompts: dict


ARCHITECTURES = {
    "bert": Architecture("Bert", bert_pieces, {}, "cls", [], {"query": "Represent this sentence: "}),
    "distilbert": Architecture(
        "DistilBert",
        bert_pieces,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        "mean",
        [("Dense", {"out_features": 24})],
        {},
    ),
    "mpnet": Architecture(
        "MPNet", mpnet_pieces, {"pad_token_id": 1, "relative_attention_num_buckets": 32}, "mean", [NORMALIZE], {}
    ),
    "xlm-roberta": Architecture(
        "XLMRoberta",
        unigrams,
        {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        "mean",
        [NORMALIZE],
        {"query": "query: ", "document": "passage: "},
    ),
    "nomic": Architecture(
        "NomicBert",
        bert_pieces,
        {"hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        "mean",
        [],
        NOMIC_PROMPTS,
    ),
    "modernbert": Architecture(
        "ModernBert",
        modernbert_pairs,
        {
            "num_hidden_layers": 4,
            "local_attention": 16,
            "global_attn_every_n_layers": 3,
            "pad_token_id": 0,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        "mean",
        [NORMALIZE],
        NOMIC_PROMPTS,
    ),
    "gte": Architecture("Gte", unigrams, {"pad_token_id": 1, "type_vocab_size": 1}, "cls", [NORMALIZE], {}),
    "jina-v3": Architecture(
        "JinaEmbeddingsV3",
        unigrams,
        {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        "mean",
        [NORMALIZE],
        {"classification": "Classify: "},
    ),
    "gemma3": Architecture(
        "Gemma3Text",
        gemma_pairs,
        {
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "use_bidirectional_attention": True,
        },
        "mean",
        [("Dense", {"out_features": 64} | LINEAR), ("Dense", {"out_features": 32} | LINEAR), NORMALIZE],
        {
            "query": "task: search result | query: ",
            "document": "title: none | text: ",
            "Classification": "task: classification | query: ",
            "Clustering": "task: clustering | query: ",
        },
    ),
    "qwen3": Architecture(
        "Qwen3",
        qwen_pairs,
        {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
        "lasttoken",
        [NORMALIZE],
        {"query": "Instruct: find the passages that answer\nQuery:", "document": ""},
    ),
    "t5": Architecture(
        "T5",
        t5_unigrams,
        T5_SHAPE,
        "mean",
        [("Dense", {"out_features": 24} | LINEAR), NORMALIZE],
        {},
    ),
    "longt5": Architecture(
        "LongT5", t5_unigrams, T5_SHAPE | {"local_radius": 5}, "mean", [NORMALIZE], {"query": "query: "}
    ),
    "m2m100": Architecture(
        "M2M100",
        unigrams,
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "pad_token_id": 1,
            "init_std": 0.3,
        },
        "mean",
        [],
        {},
    ),
    "xlnet": Architecture(
        "XLNet",
        xlnet_pieces,
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "mean",
        [],
        {},
    ),
    "bigbird": Architecture(
        "BigBird",
        bert_pieces,
        {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
        "mean",
        [],
        {},
    ),
    "canine": Architecture(
        "Canine",
        bert_pieces,
        {"num_hash_buckets": 128, "num_hash_functions": 4, "local_transformer_stride": 16},
        "mean",
        [],
        {},
    ),
}


@pytest.fixture(scope="session")
def save_model(tmp_path_factory):
    """A function that saves a model of random weights: its folder, ready for both encoders."""
    import torch
    import transformers

    def save(
        architecture,
        *,
        network=None,  # classes of transformers, for another one with the same tokenizer and shape
        max_length=64,
        pooling=None,
        modules=None,
        prompts=None,
        settings=None,
        sentence_transformers=None,
        files=None,
        **config,
    ):
        own = ARCHITECTURES[architecture]
        folder = tmp_path_factory.mktemp(architecture)
        torch.manual_seed(0)
        tokenizer, names = own.tokenizer()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names).save_pretrained(
            folder
        )
        shape = {"vocab_size": tokenizer.get_vocab_size()} | BERT_SHAPE | own.config | config
        if own.name == "XLNet":
            del shape["max_position_embeddings"]  # it has no limit, and doesn't let one be set
        network = network or own.name
        network = getattr(transformers, f"{network}Model")(getattr(transformers, f"{network}Config")(**shape))
        if own.name == "M2M100":
            network = network.get_encoder()  # as checkpoints for embedding are saved
        # Norms begin as the identity, and biases at zero: what is wrong with them would not show.
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
        network.save_pretrained(folder)
        entries = [("", "Transformer"), ("1_Pooling", "Pooling")]
        write(
            folder / "1_Pooling" / "config.json",
            {"word_embedding_dimension": 32} | {"pooling_mode": pooling or own.pooling},
        )
        width = 32 * (len(pooling) if isinstance(pooling, list) else 1)
        for kind, module in own.modules if modules is None else modules:
            path = f"{len(entries)}_{kind}"
            entries.append((path, kind))
            width = save_module(folder / path, kind, module, width)
        write(
            folder / "modules.json",
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(entries)
            ],
        )
        write(folder / "sentence_bert_config.json", {"max_seq_length": max_length} | (settings or {}))
        prompts = own.prompts if prompts is None else prompts
        own_config = {"prompts": prompts, "similarity_fn_name": "cosine"} | (sentence_transformers or {})
        write(folder / "config_sentence_transformers.json", own_config)
        for file, content in (files or {}).items():
            write(folder / file, content)
        return folder

    return save


def save_module(folder, kind, settings, width):
    """Save one module with random weights, as sentence-transformers does; return the length of what it makes."""
    import torch
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm

    folder.mkdir()
    if kind == "Normalize":
        return width
    if kind == "Dropout":
        write(folder / "config.json", settings)
        return width
    if kind == "LayerNorm":
        module = LayerNorm(width)
    else:
        activation = settings.get("activation_function", "torch.nn.modules.activation.Tanh").rsplit(".", 1)[-1]
        module = Dense(width, **settings | {"activation_function": getattr(torch.nn, activation)()})
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    module.save(str(folder))
    return module.get_embedding_dimension()


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
