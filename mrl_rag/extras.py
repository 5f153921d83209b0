"""Ask for an optional package once, and raise with the pip line when it is missing."""

from __future__ import annotations

import importlib
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
        raise MissingExtra(f"{module} is not installed: pip install 'mrl-rag[{extra}]'") from error
