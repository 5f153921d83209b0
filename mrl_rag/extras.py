"""Import an optional package, or raise with the line that installs it."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType

from mrl_rag.errors import MissingExtra


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: name of the module to import.
        extra: the extra of this distribution that brings it.

    Returns:
        The imported module.

    Raises:
        MissingExtra: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        packages = " ".join(f"'{package}'" for package in _packages_of(extra))
        raise MissingExtra(
            f"{module} is not installed. It comes with mrl-rag[{extra}]: pip install {packages}"
        ) from error


def _packages_of(extra: str) -> list[str]:
    """Return the requirements of an extra.

    Not "mrl-rag[extra]": pip finds that on an index only, and this package may have come from git or a folder.
    """
    try:
        found = [line.partition(";") for line in requires("mrl-rag") or ()]
    except PackageNotFoundError:
        found = []
    packages = [name.strip() for name, _, marker in found if marker.replace("'", '"').strip() == f'extra == "{extra}"']
    return packages or [f"mrl-rag[{extra}]"]
