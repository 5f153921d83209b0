"""OpenAI's tokens, as tiktoken makes them."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from typing import TYPE_CHECKING

from mrl_rag.compat.llama_index import tiktoken_tables
from mrl_rag.errors import InvalidInput
from mrl_rag.extras import require

if TYPE_CHECKING:
    import tiktoken

# Characters per tokenizer call: tiktoken's regular expression runs out of stack on a million spaces.
_MAX_CHARACTERS = 100_000
_ENVIRONMENT = threading.Lock()


@lru_cache
def load_encoding(name: str, extra: str) -> tiktoken.Encoding:
    """Return an encoding of tiktoken, loaded once per process.

    tiktoken downloads an encoding's table once and keeps it in TIKTOKEN_CACHE_DIR. Where that isn't set, the tables in
    an installed llama-index-core are used.

    Args:
        name: the encoding's own ("o200k_base", "cl100k_base") or a model's ("gpt-4o").
        extra: the extra of mrl-rag that the caller would install for tiktoken.

    Raises:
        InvalidInput: tiktoken knows no such encoding.
        MissingExtra: tiktoken is not installed.
        OSError: the table can't be downloaded.
    """
    library = require("tiktoken", extra)
    try:
        found: str = name if name in library.list_encoding_names() else library.encoding_name_for_model(name)
    except KeyError as error:
        known = ", ".join(library.list_encoding_names())
        raise InvalidInput(f"encoding is {name!r}; tiktoken knows {known}, and models by name.") from error
    # tiktoken takes the folder of its tables from the environment only.
    with _ENVIRONMENT:
        tables = None if {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"} & set(os.environ) else tiktoken_tables()
        if tables is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = str(tables)
        try:
            encoding: tiktoken.Encoding = library.get_encoding(found)
        finally:
            if tables is not None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
    return encoding


def tokenize(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Return the tokens of a text; "<|endoftext|>" and the like are plain text."""
    ids: list[int] = []
    for start in range(0, len(text), _MAX_CHARACTERS):
        ids += encoding.encode_ordinary(text[start : start + _MAX_CHARACTERS])
    return ids
