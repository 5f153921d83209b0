"""llama-index-core: tiktoken's tables, which it carries for use offline."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

TESTED = ">=0.14,<0.15"


def tiktoken_tables() -> Path | None:
    """Return the folder of tiktoken's tables in an installed llama-index-core; None to let tiktoken download them."""
    try:
        spec = find_spec("llama_index.core")
    except ModuleNotFoundError:
        return None
    folder = Path(spec.origin).parent / "_static" / "tiktoken_cache" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None
