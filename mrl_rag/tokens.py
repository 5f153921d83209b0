"""OpenAI's tokens, as tiktoken makes them."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mrl_rag.errors import InvalidInput
from mrl_rag.extras import require

if TYPE_CHECKING:
    import tiktoken

# Characters tokenized in one go: tiktoken's regular expression runs out of stack in a run of a million spaces.
_PART = 100_000
_ENVIRONMENT = threading.Lock()


@lru_cache
def load_encoding(name: str, extra: str) -> tiktoken.Encoding:
    """Return an encoding; what was loaded once is kept.

    tiktoken fetches an encoding's table once and keeps it in TIKTOKEN_CACHE_DIR; the tables that an installed
    llama-index-core carries are used where that isn't set.

    Args:
        name: of tiktoken, its own ("o200k_base", "cl100k_base") or a model's ("gpt-4o").
        extra: the extra of this distribution that brings tiktoken to the caller.

    Raises:
        InvalidInput: tiktoken knows no such encoding.
        MissingExtra: tiktoken is not installed.
        OSError: the table can't be fetched.
    """
    library = require("tiktoken", extra)
    try:
        found: str = name if name in library.list_encoding_names() else library.encoding_name_for_model(name)
    except KeyError as error:
        known = ", ".join(library.list_encoding_names())
        raise InvalidInput(f"encoding is {name!r}; tiktoken knows {known}, and models by name.") from error
    # tiktoken reads where its tables are from the environment alone.
    with _ENVIRONMENT:
        carried = None if {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"} & set(os.environ) else _carried_tables()
        if carried is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = str(carried)
        try:
            encoding: tiktoken.Encoding = library.get_encoding(found)
        finally:
            if carried is not None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
    return encoding


def tokenize(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Return the tokens of a text; what looks like a special token ("<|endoftext|>") is text like any other."""
    ids: list[int] = []
    for start in range(0, len(text), _PART):
        ids += encoding.encode_ordinary(text[start : start + _PART])
    return ids


def _carried_tables() -> Path | None:
    try:
        spec = find_spec("llama_index.core")
    except ModuleNotFoundError:
        return None
    folder = Path(spec.origin).parent / "_static" / "tiktoken_cache" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None
