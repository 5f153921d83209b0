"""What is uploaded: built, checked, unpacked alone, and imported without one framework, the other, and both."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mrl_rag

ROOT = Path(__file__).parents[1]
PACKAGES = ("mrl_rag", "chroma_mrl", "langchain_mrl", "llama_index_mrl")


def run(*command, **settings):
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, **settings)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for package in ("mrl_rag", "integrations"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    # The environment's own hatchling: no network.
    run("-m", "build", "--no-isolation", "--outdir", str(folder), str(source))
    return folder


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    """The wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = next(built.glob("*.whl"))
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def test_twine_finds_nothing_wrong(built):
    files = sorted(str(file) for file in built.iterdir())
    assert len(files) == 2
    assert run("-m", "twine", "check", "--strict", *files).count("PASSED") == 2


def test_the_wheel_holds_four_typed_packages_and_nothing_else(built):
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, f"mrl_rag-{mrl_rag.__version__}.dist-info"}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "mrl_rag").rglob("*.py")}
    sources |= {str(p.relative_to(ROOT / "integrations")) for p in (ROOT / "integrations").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


FRAMEWORKS = {
    "langchain": ("langchain_core", "langchain_mrl"),
    "llama-index": ("llama_index.core", "llama_index_mrl"),
}


@pytest.mark.parametrize("there", [(), ("langchain",), ("llama-index",), ("langchain", "llama-index")])
def test_it_imports_with_neither_framework_either_and_both(unpacked, there):
    missing = [modules[0] for extra, modules in FRAMEWORKS.items() if extra not in there]
    code = f"""
import sys
for name in {missing}:
    sys.modules[name] = None
import mrl_rag
from mrl_rag import *
import chroma_mrl
from mrl_rag.testing import DeterministicEncoder
assert mrl_rag.__file__.startswith({str(unpacked)!r}), mrl_rag.__file__
assert DeterministicEncoder(8).encode(["a"]).shape == (1, 8)
for package in ("langchain_mrl", "llama_index_mrl"):
    try:
        __import__(package)
        print("imported")
    except mrl_rag.errors.MissingExtra as error:
        print(error)
"""
    # Outside the checkout, and without an editable install's path.
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    lines = run("-W", "ignore", "-c", code, env=environment, cwd=unpacked).splitlines()
    for line, (extra, (module, _)) in zip(lines, FRAMEWORKS.items(), strict=True):
        lacking = f"{module} is not installed. It comes with mrl-rag[{extra}]: pip install '{extra}-core>="
        assert line.startswith("imported" if extra in there else lacking)
