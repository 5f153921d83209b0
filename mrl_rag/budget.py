"""As many of the best passages as fit a language model's context, counted in its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mrl_rag.arguments import check_integer
from mrl_rag.errors import InvalidInput
from mrl_rag.tasks import check_texts
from mrl_rag.tokens import load_encoding, tokenize


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
        check_integer(name, value, least)
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
    try:
        table = load_encoding(encoding, extra="tokens")
    except OSError as error:  # requests' errors are of this kind
        raise InvalidInput(
            f"the table of encoding {encoding!r} can't be fetched: {error}. Set TIKTOKEN_CACHE_DIR to a folder that "
            "has it, or pass a function that counts tokens."
        ) from error
    return lambda text: len(tokenize(table, text))
