"""Splits text into chunks by its structure, measured in the encoder's tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from mrl_rag.arguments import check_integer
from mrl_rag.encoder import Encoder
from mrl_rag.extras import require

_CHUNK_TOKENS = 256
# The least that a chunk must have room for beside prompt and special tokens.
_LEAST_TOKENS = 8
# For encoders that can't count; English has four and more.
_CHARACTERS_PER_TOKEN = 3
# First guess; each text that is split corrects it.
_FIRST_RATIO = 3.5
# The share of the room that a guess fills, so that few chunks turn out too long.
_FILL = 0.9
# Markdown of headings alone.
_HEADINGS = re.compile(r"(#{1,6} [^\n]*\s*)+")
_LINE = re.compile(r"[^\n]+")
# Longer lines are cut before they are split: the time that takes grows with the square of a line's length, to 65 s for
# one of 5 MB.
_MAX_LINE = 20_000
# Longer code is cut, too: where tree-sitter meets what its grammar can't read, parsing 75 KB of C took minutes.
_MAX_CODE = 20_000


class Splitter:
    """Splits texts into chunks of up to so many tokens.

    Counting tokens for every place where a text could be split takes half as long as encoding it. So texts are split by
    characters, at a guess of how many fit; then the tokens of all chunks are counted, and chunks that are too long are
    split again, at a guess of their own.

    Args:
        encoder: its tokenizer counts.
        chunk_tokens: tokens per chunk at most, the document prompt and special tokens counted; None for 256, or the
            encoder's `max_length` if that is less.

    Attributes:
        chunk_tokens: tokens per chunk at most.

    Raises:
        InvalidInput: `chunk_tokens` is out of range.
        MissingExtra: semantic-text-splitter is not installed.
    """

    def __init__(self, encoder: Encoder, chunk_tokens: int | None) -> None:
        self._library = require("semantic_text_splitter", "files")
        self._encoder = encoder
        # Tokens of prompt and special tokens; None if the encoder can't count.
        self._fixed = next(iter(encoder.count_tokens([""]) or []), None)
        most = encoder.max_length
        wanted = min(_CHUNK_TOKENS, most or _CHUNK_TOKENS) if chunk_tokens is None else chunk_tokens
        self.chunk_tokens = check_integer("chunk_tokens", wanted, (self._fixed or 0) + _LEAST_TOKENS, most)
        self._ratios: dict[str, float] = {}

    def split(self, text: str, syntax: str, grammar: Any = None) -> Iterator[tuple[int, str]]:
        """Yield the chunks of a text, and the position of each in it.

        Args:
            text: any string.
            syntax: "text", "markdown" or "code".
            grammar: the tree-sitter grammar of code.
        """
        pieces: Iterable[tuple[int, str]] = [(0, text)]
        if any(len(line[0]) > _MAX_LINE for line in _LINE.finditer(text)):
            syntax, pieces = "text", _pieces(text, _MAX_LINE, "\n", " ")
        elif syntax == "code":
            # Preferably before a line without indentation that follows an empty one.
            pieces = _pieces(text, _MAX_CODE, r"\n\n(?=\S)", "\n")
        for start, piece in pieces:
            for offset, chunk in self._split(piece, syntax, grammar):
                yield start + offset, chunk

    def _split(self, text: str, syntax: str, grammar: Any) -> Iterator[tuple[int, str]]:
        if self._fixed is None:
            yield from self._by(syntax, grammar, self.chunk_tokens * _CHARACTERS_PER_TOKEN).chunk_indices(text)
            return
        found = list(self._fit(text, syntax, grammar, self._ratios.get(syntax, _FIRST_RATIO)))
        if tokens := sum(count - self._fixed for _, _, count in found):
            self._ratios[syntax] = max(0.1, sum(len(chunk) for _, chunk, _ in found) / tokens)
        heading: tuple[int, str] | None = None
        for start, chunk, _ in found:
            if heading is not None:
                # A heading alone says nothing: it goes with what stands under it, if that leaves room.
                both = text[heading[0] : start + len(chunk)]
                if (self._encoder.count_tokens([both]) or [0])[0] <= self.chunk_tokens:
                    start, chunk = heading[0], both
                else:
                    yield heading
            heading = (start, chunk) if syntax == "markdown" and _HEADINGS.fullmatch(chunk) else None
            if heading is None:
                yield start, chunk
        if heading is not None:
            yield heading

    def _fit(self, text: str, syntax: str, grammar: Any, ratio: float) -> Iterator[tuple[int, str, int]]:
        """Yield the chunks, their positions and their numbers of tokens.

        Args:
            text: any string.
            syntax: as for `split`.
            grammar: as for `split`.
            ratio: guess of the characters per token.
        """
        assert self._fixed is not None
        room = self.chunk_tokens - self._fixed
        found = self._by(syntax, grammar, max(1, int(room * ratio * _FILL))).chunk_indices(text)
        counts = self._encoder.count_tokens([chunk for _, chunk in found]) or []
        for (start, chunk), count in zip(found, counts, strict=True):
            if count <= self.chunk_tokens or len(chunk) == 1:
                yield start, chunk, count
            else:
                # Ends, since these pieces are shorter than the chunk.
                again = self._fit(chunk, syntax, grammar, len(chunk) / (count - self._fixed))
                yield from ((start + offset, piece, part) for offset, piece, part in again)

    def _by(self, syntax: str, grammar: Any, capacity: int) -> Any:
        """Return a splitter by characters."""
        if syntax == "code":
            return self._library.CodeSplitter(grammar, capacity)
        if syntax == "markdown":
            return self._library.MarkdownSplitter(capacity)
        return self._library.TextSplitter(capacity)


def _pieces(text: str, most: int, *ends: str) -> Iterator[tuple[int, str]]:
    """Yield a text in pieces of up to `most` characters, with their positions.

    Args:
        text: any string.
        most: characters per piece at most.
        ends: regular expressions of what a piece should end with, the best first.
    """
    start = 0
    while len(text) - start > most:
        piece = text[start : start + most]
        found = ([match.end() for match in re.finditer(end, piece)] for end in ends)
        cut = next((places[-1] for places in found if places), most)
        yield start, piece[:cut]
        start += cut
    yield start, text[start:]
