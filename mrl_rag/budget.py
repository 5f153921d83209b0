"""As many of the best passages as fit a language model's context, counted in its tokens."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mrl_rag.errors import InvalidInput
from mrl_rag.extras import require
from mrl_rag.tasks import check_texts

if TYPE_CHECKING:
    import tiktoken

# Characters counted in one go: tiktoken's regular expression runs out of stack in a run of a million spaces.
_PART = 100_000
_ENVIRONMENT = threading.Lock()


@dataclass(frozen=True, slots=True)
class Packed:
    """What fits, and what doesn't.

    Attributes:
        kept: positions of the texts that fit, ascending.
        left_out: positions of those that don't.
        tokens: of what is kept, separators between them counted.
    """

    kept: tuple[int, ...]
    left_out: tuple[int, ...]
    tokens: int


def pack(
    texts: Sequence[str],
    max_tokens: int,
    reserve: int = 0,
    encoding: str | Callable[[str], int] = "o200k_base",
    separator: str = "\n\n",
) -> Packed:
    """Choose the texts that go into a context, best first.

    A text that doesn't fit is left out, and the next ones are still tried. The first text is always kept, however long.
    What looks like a special token ("<|endoftext|>") is counted as the plain text it is.

    Args:
        texts: n strings in the order of their rank.
        max_tokens: what the model takes in all.
        reserve: tokens of it kept free for the instructions, the question and the answer.
        encoding: of tiktoken, by its own name ("o200k_base", "cl100k_base") or a model's ("gpt-4o"); or a function that
            returns the number of tokens of a string. tiktoken fetches an encoding's table once and keeps it in
            TIKTOKEN_CACHE_DIR; the tables that an installed llama-index-core carries are used where that isn't set.
        separator: what will stand between two texts.

    Raises:
        InvalidInput: the numbers leave no room, or tiktoken knows no such encoding.
        InvalidTexts: a text is not a string.
        MissingExtra: tiktoken is not installed.
    """
    texts = check_texts(texts)
    for name, value, least in (("max_tokens", max_tokens, 1), ("reserve", reserve, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidInput(f"{name} is {value!r}; it must be an integer of at least {least}.")
    room = max_tokens - reserve
    if room < 1:
        raise InvalidInput(f"max_tokens={max_tokens} less reserve={reserve} leaves no room; lower the reserve.")
    count = counter(encoding) if isinstance(encoding, str) else encoding
    between = count(separator) if separator else 0
    kept: list[int] = []
    used = 0
    for position, text in enumerate(texts):
        cost = count(text) + (between if kept else 0)
        if not kept or used + cost <= room:
            kept.append(position)
            used += cost
    left_out = sorted(set(range(len(texts))) - set(kept))
    return Packed(tuple(kept), tuple(left_out), used)


def counter(encoding: str) -> Callable[[str], int]:
    """Return a function that counts the tokens of a string.

    Args:
        encoding: of tiktoken, by its own name or a model's.

    Raises:
        InvalidInput: tiktoken knows no such encoding, or can't fetch its table.
        MissingExtra: tiktoken is not installed.
    """
    table = _load(encoding)

    def count(text: str) -> int:
        parts = (text[start : start + _PART] for start in range(0, len(text), _PART))
        return sum(len(table.encode_ordinary(part)) for part in parts)

    return count


def _load(name: str) -> tiktoken.Encoding:
    library = require("tiktoken", extra="tokens")
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
            table: tiktoken.Encoding = library.get_encoding(found)
        except OSError as error:  # requests' errors are of this kind
            raise InvalidInput(
                f"the table of encoding {found!r} can't be fetched: {error}. Set TIKTOKEN_CACHE_DIR to a folder that "
                "has it, or pass a function that counts tokens."
            ) from error
        finally:
            if carried is not None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
    return table


def _carried_tables() -> Path | None:
    try:
        spec = find_spec("llama_index.core")
    except ModuleNotFoundError:
        return None
    folder = Path(spec.origin).parent / "_static" / "tiktoken_cache" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None
