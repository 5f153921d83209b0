"""What an editor, a type checker and Python itself see of the packages in the environment that runs the tests."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADAPTERS = sorted(path.parent.name for path in (ROOT / "integrations").glob("*/__init__.py"))


def test_a_type_checker_sees_every_public_name(tmp_path):
    lines = []
    for package in ("mrl_rag", *ADAPTERS):
        lines += [f"import {package}", *(f"{package}.{name}" for name in importlib.import_module(package).__all__)]
    lines.append('reveal_type(mrl_rag.TwoStageIndex("./db").search([[1.0]])[0])')
    (tmp_path / "script.py").write_text("\n".join(lines))
    # The frameworks' own code needs no checking.
    ours = ",".join(
        f"mypy-{package}.*" if package == "mrl_rag" else f"{package}.*" for package in ("mrl_rag", *ADAPTERS)
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = skip\n[{ours}]\nfollow_imports = silent\n")
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "script.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "mrl_rag.index.search.Hit" in ran.stdout


@pytest.mark.parametrize("package", ADAPTERS)
def test_a_class_is_the_same_by_the_folders_name(package):
    # An editable install has the root on the path, so that this import works as well.
    by_name, by_folder = (importlib.import_module(name) for name in (package, f"integrations.{package}"))
    assert all(getattr(by_folder, name) is getattr(by_name, name) for name in by_name.__all__)
