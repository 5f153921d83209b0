"""Files to chunks that the encoder reads as a whole."""

from __future__ import annotations

import os
import re
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mrl_rag.encoder import Encoder
from mrl_rag.files.finding import Finder, Problem, absolute, reason_of
from mrl_rag.files.reading import NoDocument, NotText, read
from mrl_rag.files.splitting import Splitter


@dataclass(frozen=True)
class Chunk:
    """A passage of a file.

    Attributes:
        text: the passage, without the white space around it.
        path: of the file, absolute.
        title: of the document; the file's name where it has none.
        headings: those that the passage stands under, "Guide > Install > Linux"; "" for none.
        line: 1-based line of the file where it starts; None for PDF and what was converted.
        page: 1-based page of a PDF.
        number: 1-based number of the chunk in its file.
        fields: the other fields of a row of CSV or JSON lines that has a text field.
    """

    text: str
    path: str
    title: str
    headings: str
    line: int | None
    page: int | None
    number: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, Any]:
        """What an index stores with it: path, title, headings, line or page, chunk (its number), and its fields."""
        own = {"path": self.path, "title": self.title, "headings": self.headings, "line": self.line, "page": self.page}
        return {**self.fields, **{key: value for key, value in own.items() if value}, "chunk": self.number}


def load(
    paths: Sequence[str | os.PathLike[str]],
    encoder: Encoder,
    *,
    glob: Sequence[str] = (),
    exclude: Sequence[str] = (),
    chunk_tokens: int | None = None,
    on_problem: Callable[[Problem], object] | None = None,
) -> Iterator[Chunk]:
    """Yield the chunks of files, none of which the encoder has to cut.

        for chunk in load(["./docs", "./README.md"], encoder, exclude=["drafts"]):
            chunk.text, chunk.path, chunk.line, chunk.headings

    Markdown is split by headings, code by its syntax, tables by rows, PDF by pages, and other text by paragraphs and
    sentences. HTML, DOCX, EPUB and notebooks are converted to Markdown. Text may have any encoding that can be told
    from its bytes. Hidden files, `__pycache__`, `node_modules` and folders with an index are left out of folders.

    Args:
        paths: files and folders. Links are followed; a file is read once.
        encoder: whose tokenizer measures chunks, the document prompt and special tokens counted. For an encoder that
            can't count (`count_tokens`), a token is taken for three characters.
        glob: patterns of the files to take from folders, such as "*.md" or "api/*"; empty for every file.
        exclude: patterns of files and folders to leave out of folders.
        chunk_tokens: longest chunk; None for 256, or the encoder's `max_length` if that is less.
        on_problem: called with each file that can't be read; None warns of it, but not of binary files in folders.

    Raises:
        InvalidInput: `paths` is a string or empty, or `chunk_tokens` is out of range.
        MissingExtra: a package that reads files is not installed.
    """
    finder = Finder(absolute(paths), glob, exclude, on_problem or _warn, lambda problem: None)
    return _load(finder, Splitter(encoder, chunk_tokens), warns=on_problem is None)


def _load(finder: Finder, splitter: Splitter, warns: bool) -> Iterator[Chunk]:
    for path in finder.find():
        try:
            yield from chunks_of_file(path, path.read_bytes(), splitter)[0]
        except OSError as error:
            finder.unreadable(Problem(str(path), reason_of(path, error)))
        except NotText as error:
            # A folder may have many pictures: nobody needs a warning of each.
            if not warns or path in finder.paths or not isinstance(error, NoDocument):
                finder.unreadable(Problem(str(path), str(error)))


def _warn(problem: Problem) -> None:
    warnings.warn(f"{problem.path!r} is left out: {problem.reason}", stacklevel=3)


def chunks_of_file(path: Path, content: bytes, splitter: Splitter) -> tuple[list[Chunk], bool]:
    """Return the chunks of one file, and whether it is prose.

    Args:
        path: absolute.
        content: its bytes.
        splitter: of the encoder.

    Raises:
        NotText: it can't be read as text.
    """
    document = read(path, content)
    chunks: list[Chunk] = []
    title = document.title
    for part in document.parts:
        headings = _Headings(part.text) if document.syntax == "markdown" else None
        if title is None and headings is not None:
            title = headings.title
        # A list would take 36 bytes per line, and a file may have 100 million.
        starts = array("q", [0])
        starts.extend(match.end() for match in re.finditer("\n", part.text))
        for start, text in splitter.split(part.text, document.syntax, document.grammar):
            row = bisect_right(starts, start) - 1
            chunks.append(
                Chunk(
                    text=text,
                    path=str(path),
                    title=part.title or title or path.name,
                    headings="" if headings is None else headings.at(row),
                    line=None if part.line is None else part.line + row,
                    page=part.page,
                    number=len(chunks) + 1,
                    fields=part.metadata,
                )
            )
    return chunks, document.prose


class _Headings:
    """The headings of a Markdown text."""

    def __init__(self, text: str) -> None:
        from markdown_it import MarkdownIt

        tokens = MarkdownIt().disable("inline").parse(text)
        self._rows: list[int] = []
        self._trails: list[list[str]] = []
        trail: list[tuple[int, str]] = []
        self.title: str | None = None
        for opening, content in pairwise(tokens):
            if opening.type == "heading_open" and opening.map:
                level = int(opening.tag[1:])
                trail = [above for above in trail if above[0] < level] + [(level, content.content.strip())]
                self._rows.append(opening.map[0])
                self._trails.append([name for _, name in trail if name])
                self.title = self.title or (content.content.strip() if level == 1 else None)

    def at(self, row: int) -> str:
        """Return the headings above a 0-based line, and the one on it."""
        above = bisect_right(self._rows, row)
        return " > ".join(self._trails[above - 1]) if above else ""
