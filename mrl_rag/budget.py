"""`fit_to_context`: choose the passages that fit into a language model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mrl_rag.arguments import check_integer
from mrl_rag.errors import InvalidInput
from mrl_rag.tasks import check_texts
from mrl_rag.tokens import load_encoding, tokenize


@dataclass(frozen=True, slots=True)
class ContextFit:
    """Which texts fit into a context.

    Attributes:
        kept: positions of the texts that fit, ascending.
        left_out: positions of the others.
        tokens: number of tokens of the kept texts and the separators between them.
    """

    kept: tuple[int, ...]
    left_out: tuple[int, ...]
    tokens: int


def fit_to_context(
    texts: Sequence[str],
    max_tokens: int,
    reserve: int = 0,
    encoding: str | Callable[[str], int] = "o200k_base",
    separator: str = "\n\n",
) -> ContextFit:
    """Choose the texts that fit into a language model's context, best first.

    A text that doesn't fit is left out, and shorter ones after it may still fit. The first text is always kept, however
    long. "<|endoftext|>" and the like are counted as plain text.

    Args:
        texts: n strings, best first.
        max_tokens: size of the model's context.
        reserve: tokens to keep free for the instructions, the question and the answer.
        encoding: an encoding of tiktoken, by its own name ("o200k_base", "cl100k_base") or a model's ("gpt-4o"); or a
            function that returns the number of tokens of a string. tiktoken downloads an encoding's table once and
            keeps it in TIKTOKEN_CACHE_DIR; where that isn't set, the tables in an installed llama-index-core are used.
        separator: the text that will be put between two texts.

    Raises:
        InvalidInput: nothing is left after `reserve`, or tiktoken knows no such encoding.
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
    return ContextFit(tuple(kept), tuple(left_out), used)


def counter(encoding: str) -> Callable[[str], int]:
    """Return a function that counts the tokens of a string.

    Args:
        encoding: of tiktoken, by its own name or a model's.

    Raises:
        InvalidInput: tiktoken knows no such encoding, or can't download its table.
        MissingExtra: tiktoken is not installed.
    """
    try:
        table = load_encoding(encoding, extra="tokens")
    except OSError as error:  # which errors of requests are
        raise InvalidInput(
            f"the table of encoding {encoding!r} can't be downloaded: {error}. Set TIKTOKEN_CACHE_DIR to a folder that "
            "has it, or pass a function that counts tokens."
        ) from error
    return lambda text: len(tokenize(table, text))
