"""`Recipe`: what a model's own files, in the sentence-transformers layout, say of how its vectors are made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeAlias, cast, get_args

from mrl_rag.errors import ModelFilesError
from mrl_rag.models import ModelSpec
from mrl_rag.tasks import TASKS, Task, prompts_by_task

Pooling: TypeAlias = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
ModuleKind: TypeAlias = Literal["Dense", "LayerNorm", "Normalize"]

# Flags of `1_Pooling/config.json` before sentence-transformers 5.4, which has one key, `pooling_mode`. The vectors of
# several are concatenated in this order.
_POOLING_FLAGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# Names that releases of sentence-transformers gave the Transformer module's settings.
_NETWORK_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
# Settings that don't change vectors, or that the encoder decides itself.
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
# Far above what these files have; reading takes many times as much memory.
_MAX_JSON_BYTES = 10 << 20
_DENSE_KEYS = ("in_features", "out_features", "bias", "activation_function", "use_residual")


@dataclass(frozen=True)
class ModuleSettings:
    """One module between pooling and truncation.

    Attributes:
        kind: "Dense" (a linear map and an activation), "LayerNorm" (with learned weights) or "Normalize".
        path: its folder, relative to the model's.
        settings: the values in its config.json.
    """

    kind: ModuleKind
    path: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How a network's token vectors become the vector that the model's authors intended.

    Attributes:
        poolings: how token vectors become one; the vectors of several are concatenated.
        prompts: task -> text put before the input.
        max_length: longest input in tokens, special tokens counted; None if the files don't say.
        include_prompt: whether the prompt's tokens are pooled with the text's.
        modules: the modules after pooling, in order.
        lower_case: whether texts are lower-cased before the tokenizer's own normalisation.
        truncate_dim: how many of the vector's numbers the authors keep; None for all.
        similarity: how the authors compare vectors ("cosine", "dot", ...); "cosine" where it ranks as theirs does.
        passage_prompt: a prompt for passages under a name that sentence-transformers doesn't use for documents.
        network: folder of the network and its tokenizer, relative to the model's.
        config_settings: values that override the network's config.json.
        tokenizer_settings: values that override the tokenizer's own.
    """

    poolings: tuple[Pooling, ...] = ("mean",)
    prompts: dict[Task, str] = field(default_factory=dict)
    max_length: int | None = None
    include_prompt: bool = True
    modules: tuple[ModuleSettings, ...] = ()
    lower_case: bool = False
    truncate_dim: int | None = None
    similarity: str = "cosine"
    passage_prompt: str = ""
    network: str = ""
    config_settings: dict[str, Any] = field(default_factory=dict)
    tokenizer_settings: dict[str, Any] = field(default_factory=dict)


def read_recipe(folder: Path, spec: ModelSpec | None = None) -> Recipe:
    """Read a recipe from a model's own files in the sentence-transformers layout.

    What the files don't say is taken from the model's row of the table. A folder without `modules.json` and without a
    row is read as sentence-transformers reads it: last-token pooling for a network made for causal language modelling,
    else the mean; prompts and other settings are then not read. Supported modules: one Transformer, one Pooling, then
    any number of Dense, LayerNorm, Normalize and Dropout.

    Args:
        folder: the model's folder.
        spec: its row of the table, None where it has none.

    Returns:
        The recipe. No weights are read yet.

    Raises:
        ModelFilesError: a file is damaged, or asks for something this encoder doesn't have.
    """
    paths = _read_modules(folder)
    own = spec.prompts if spec else {}
    if not paths:
        if spec and spec.pooling is None:
            raise ModelFilesError(
                f"{folder} has no modules.json, which says how {spec.name} makes its vectors. "
                "Download the model again, with all its folders."
            )
        poolings: tuple[Pooling, ...] = (spec.pooling,) if spec and spec.pooling else _default_pooling(folder)
        return Recipe(poolings=poolings, prompts={task: own.get(task, "") for task in TASKS})
    poolings, include_prompt = _read_pooling(folder / paths[1][1] / "config.json")
    modules = [_read_module(folder, kind, path) for kind, path in paths[2:] if kind != "Dropout"]
    config = _read_json(folder / "config_sentence_transformers.json", default={})
    prompts = config.get("prompts") or {}
    return Recipe(
        poolings=poolings,
        # sentence-transformers writes empty prompts into files whose authors gave none.
        prompts={task: prompt or own.get(task, "") for task, prompt in prompts_by_task(prompts).items()},
        include_prompt=include_prompt,
        modules=tuple(_without_final_normalize(modules)),
        truncate_dim=_read_truncate_dim(folder),
        similarity=_read_similarity(config, modules),
        passage_prompt=prompts.get("passage") or prompts.get("corpus") or "",
        network=paths[0][1],
        **_read_network_settings(folder / paths[0][1]),
    )


def _without_final_normalize(modules: list[ModuleSettings]) -> list[ModuleSettings]:
    """Leave out Normalize at the end: truncation normalises as well."""
    while modules and modules[-1].kind == "Normalize":
        modules = modules[:-1]
    return modules


def _read_truncate_dim(folder: Path) -> int | None:
    file = folder / "config_sentence_transformers.json"
    found = _read_json(file, default={}).get("truncate_dim")
    if not (found is None or (isinstance(found, int) and found > 0)):
        raise ModelFilesError(f"{file} gives {found!r} as truncate_dim; it must be a number of dimensions.")
    return found


def _read_similarity(config: dict[str, Any], modules: list[ModuleSettings]) -> str:
    similarity = config.get("similarity_fn_name") or "cosine"
    unit = bool(modules) and modules[-1].kind == "Normalize" and config.get("truncate_dim") is None
    # Unit vectors are ranked alike by all three.
    return "cosine" if unit and similarity in ("dot", "euclidean") else str(similarity)


def check_shards(index: Path) -> None:
    """Refuse an index of weights in several files that names a file outside of its folder.

    Raises:
        ModelFilesError: it does, or can't be read.
    """
    shards = _read_json(index).get("weight_map")
    for shard in set(shards.values()) if isinstance(shards, dict) else ():
        if not isinstance(shard, str) or not is_inside(index.parent, shard):
            raise ModelFilesError(f"{index} names weights outside of its folder, {shard!r}. Use another model.")


def config_sha256(folder: Path) -> str:
    """Return a SHA-256, in hexadecimal, of the settings in a folder's config.json that change vectors.

    The release that wrote the file and the number format are left out.
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
        if not kind.startswith("sentence_transformers.") or not is_inside(folder, path):
            raise ModelFilesError(
                f"{file} has a module of type {kind!r} in {path!r}, which is code of the model's own or outside its "
                "folder. Use a model made of sentence-transformers' modules."
            )
        # The module path before the class name changes between releases; the class name doesn't.
        modules.append((kind.rsplit(".", 1)[-1], path))
    kinds = [kind for kind, _ in modules]
    after = {"Dense", "LayerNorm", "Normalize", "Dropout"}
    if modules and (kinds[:2] != ["Transformer", "Pooling"] or not after.issuperset(kinds[2:])):
        raise ModelFilesError(
            f"{file} has the modules {', '.join(kinds)}; this encoder has Transformer, then Pooling, then any of "
            "Dense, LayerNorm, Normalize and Dropout. Use a model made of these."
        )
    return modules


def is_inside(folder: Path, path: str) -> bool:
    """Say whether a path that a model's files name stays in its folder, on any system and through links to folders."""
    if any(pure.anchor or ".." in pure.parts for pure in (PurePosixPath(path), PureWindowsPath(path))) or "\0" in path:
        return False
    # Links to files lead out of every folder in the hub's cache.
    held = folder / path if (folder / path).is_dir() else (folder / path).parent
    return held.resolve().is_relative_to(folder.resolve())


def _read_module(folder: Path, kind: str, path: str) -> ModuleSettings:
    if kind == "Normalize":
        return ModuleSettings("Normalize")
    file = folder / path / "config.json"
    config = _read_json(file)
    name = "sentence_embedding"
    if config.get("module_input_name", name) != name or config.get("module_output_name") not in (None, name):
        raise ModelFilesError(
            f"{file} doesn't read and write the pooled vector, {name!r}; this encoder passes on nothing else."
        )
    keys = _DENSE_KEYS if kind == "Dense" else ("dimension",)
    return ModuleSettings(cast(ModuleKind, kind), path, {key: config[key] for key in keys if key in config})


def _read_pooling(file: Path) -> tuple[tuple[Pooling, ...], bool]:
    config = _read_json(file)
    modes = config.get("pooling_mode", [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or "mean")
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or not set(map(str, modes)) <= set(get_args(Pooling)):
        raise ModelFilesError(f"{file} asks for pooling {modes!r}; this encoder has {', '.join(get_args(Pooling))}.")
    return tuple(modes), bool(config.get("include_prompt", True))


def _default_pooling(folder: Path) -> tuple[Pooling, ...]:
    """Return how sentence-transformers pools a network whose files don't say."""
    config = _read_json(folder / "config.json")
    made_for = str((config.get("architectures") or [""])[0])
    causal = made_for.endswith("ForCausalLM") and config.get("is_causal", True)
    return ("lasttoken",) if causal else ("mean",)


def _read_network_settings(folder: Path) -> dict[str, Any]:
    """Return the fields of `Recipe` that the Transformer module's own file sets."""
    file = next((folder / name for name in _NETWORK_FILES if (folder / name).is_file()), folder / _NETWORK_FILES[0])
    config = _read_json(file, default={})
    _check_runs_as_text(file, config)
    # By their names in sentence-transformers 6, then by those before.
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
    """Refuse settings under which a network does more than turn plain text into token vectors."""
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
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")  # reading a device or a pipe may never end
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFilesError(f"{file} can't be read: {error}. Download the model again.") from error
    expected = dict if default is None else type(default)
    if not isinstance(content, expected):
        raise ModelFilesError(f"{file} holds no JSON {expected.__name__}. Download the model again.")
    return content
