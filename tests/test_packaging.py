"""What is uploaded and what is installed: built, checked, unpacked alone, imported, and seen by a type checker."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import langchain_mrl
import llama_index_mrl
import pytest

import mrl_rag

ROOT = Path(__file__).parents[1]
PACKAGES = ("mrl_rag", "langchain_mrl", "llama_index_mrl")


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


def test_the_wheel_holds_three_typed_packages_and_nothing_else(built):
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
        expected = "imported" if extra in there else f"{module} is not installed: pip install 'mrl-rag[{extra}]'"
        assert line == expected


def test_a_type_checker_sees_the_installed_packages(tmp_path):
    packages = (mrl_rag, langchain_mrl, llama_index_mrl)
    script = "".join(f"import {package.__name__}\n" for package in packages)
    script += "".join(f"{package.__name__}.{name}\n" for package in packages for name in package.__all__)
    script += 'reveal_type(mrl_rag.TwoStageIndex("./db").search([[1.0]]))\n'
    (tmp_path / "script.py").write_text(script)
    # The frameworks' own code needs no checking.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = skip\n[mypy-mrl_rag.*,langchain_mrl.*,llama_index_mrl.*]\nfollow_imports = silent\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    output = run("-m", "mypy", "script.py", cwd=tmp_path, env=environment)
    assert 'Revealed type is "list[list[mrl_rag.index.search.Hit]]"' in output


@pytest.mark.parametrize("package", [langchain_mrl, llama_index_mrl], ids=lambda package: package.__name__)
def test_a_class_is_the_same_by_the_folders_name(package):
    # An editable install has the root on the path, so that this import works as well.
    by_folder = importlib.import_module(f"integrations.{package.__name__}")
    assert all(getattr(by_folder, name) is getattr(package, name) for name in package.__all__)
