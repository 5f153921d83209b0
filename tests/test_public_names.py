"""The front doors: what is exported, how fast the door opens, which version is behind it."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import chroma_mrl
import langchain_mrl
import llama_index_mrl
import pytest

import mrl_rag
from mrl_rag import errors

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "package", [mrl_rag, chroma_mrl, langchain_mrl, llama_index_mrl], ids=lambda package: package.__name__
)
def test_all_is_sorted_complete_and_documented(package):
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__doc__ or name == "Task"  # a Literal has none
    assert (Path(package.__file__).parent / "py.typed").is_file()


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, mrl_rag; print([m for m in ('torch', 'transformers', 'chromadb', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert mrl_rag.__version__ == project["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] in ("Unreleased", project["version"])


def test_every_error_stands_in_the_drawn_tree_under_its_parent():
    drawn = {}
    stack = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"^([│├└─ ]*)(\w+)(?: \(\w+\))?$", line)
        if found and found.group(2) in vars(errors):
            depth = len(found.group(1)) // 4
            stack[depth:] = [found.group(2)]
            drawn[found.group(2)] = stack[depth - 1] if depth else None
    defined = {
        name: next((base.__name__ for base in value.__bases__ if base.__module__ == errors.__name__), None)
        for name, value in vars(errors).items()
        if isinstance(value, type)
    }
    assert drawn == defined


def test_a_missing_framework_gives_a_pip_line_that_needs_no_index_with_this_package():
    package_of = {"langchain": "langchain-core>=", "llama-index": "llama-index-core>="}
    code = "import sys; sys.modules['{0}'] = None; import {1}"
    for module, package, extra in (
        ("langchain_core", "langchain_mrl", "langchain"),
        ("llama_index.core", "llama_index_mrl", "llama-index"),
    ):
        ran = subprocess.run([sys.executable, "-c", code.format(module, package)], capture_output=True, text=True)
        assert f"mrl-rag[{extra}]: pip install '{package_of[extra]}" in ran.stderr.splitlines()[-1]


def test_installed_metadata_names_the_distribution():
    assert version("mrl-rag") == mrl_rag.__version__
