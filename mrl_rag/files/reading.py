"""Reads one file as parts of text, each with its place."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from mrl_rag.extras import require
from mrl_rag.tasks import is_unicode

# Of a row of a table: the fields that may hold the text, and the title.
_TEXT_FIELDS = ("text", "content", "page_content", "document", "body", "passage")
# Bytes looked at to tell an encoding: an even number, since UTF-16 has two bytes or four per character. Guessing from
# more takes seconds.
_SAMPLE = 200_000
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    # Before UTF-16, whose mark is the beginning of this one.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MARKDOWN = frozenset({".md", ".markdown", ".mdx", ".mkd", ".qmd", ".rmd"})
# markitdown's classes, which make Markdown of these files. Its `MarkItDown` would guess what kind of file it is.
_CONVERTED = {
    ".docx": "DocxConverter",
    ".epub": "EpubConverter",
    ".htm": "HtmlConverter",
    ".html": "HtmlConverter",
    ".ipynb": "IpynbConverter",
    ".xhtml": "HtmlConverter",
}
# tree-sitter grammars, by the ends of their languages' files: module and function.
_GRAMMARS = {
    ".bash": ("tree_sitter_bash", "language"),
    ".c": ("tree_sitter_c", "language"),
    ".cc": ("tree_sitter_cpp", "language"),
    ".cpp": ("tree_sitter_cpp", "language"),
    ".cs": ("tree_sitter_c_sharp", "language"),
    ".cxx": ("tree_sitter_cpp", "language"),
    ".go": ("tree_sitter_go", "language"),
    ".h": ("tree_sitter_c", "language"),
    ".hpp": ("tree_sitter_cpp", "language"),
    ".java": ("tree_sitter_java", "language"),
    ".js": ("tree_sitter_javascript", "language"),
    ".jsx": ("tree_sitter_javascript", "language"),
    ".mjs": ("tree_sitter_javascript", "language"),
    ".php": ("tree_sitter_php", "language_php"),
    ".py": ("tree_sitter_python", "language"),
    ".pyi": ("tree_sitter_python", "language"),
    ".rb": ("tree_sitter_ruby", "language"),
    ".rs": ("tree_sitter_rust", "language"),
    ".sh": ("tree_sitter_bash", "language"),
    ".ts": ("tree_sitter_typescript", "language_typescript"),
    ".tsx": ("tree_sitter_typescript", "language_tsx"),
}
# Bytes that a DOCX or EPUB file may unpack to.
_MAX_UNPACKED_BYTES = 500 << 20
# What Chroma takes as metadata: no other keys, and so many of them.
_RESERVED_KEYS = ("$", "#", "chroma:")
_MAX_FIELDS = 1000
# pdfium may be used by one thread at a time (pypdfium2's README, "Thread incompatibility").
_PDFIUM = threading.Lock()


class NotText(ValueError):
    """A file can't be read as text; the message says why."""


class NoDocument(NotText):
    """A file isn't meant to be read as text: it is binary, or a picture."""


@dataclass(frozen=True)
class Part:
    """A piece of a file that no chunk reaches beyond: a page, a row, or all of it.

    Attributes:
        text: any string of valid Unicode.
        line: 1-based line of the file where it starts; None where lines are not those of the file.
        page: 1-based page; None where there are none.
        title: of this part; None for the file's.
        metadata: further fields of a row.
    """

    text: str
    line: int | None = None
    page: int | None = None
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """The text of a file.

    Attributes:
        parts: the text.
        syntax: "text", "markdown" or "code".
        title: its title; None for its name.
        grammar: the tree-sitter grammar of code, as a splitter takes it.
        prose: whether it is written in a human language.
    """

    parts: list[Part]
    syntax: str = "text"
    title: str | None = None
    grammar: Any = None
    prose: bool = True


def read(path: Path, content: bytes) -> Document:
    """Return the text of a file.

    Args:
        path: its name tells what kind of file it is.
        content: its bytes.

    Raises:
        NoDocument: it is binary, or a picture.
        NotText: it is damaged, or encrypted.
        MissingExtra: a package that reads it is not installed.
    """
    suffix = path.suffix.lower()
    if suffix == ".svg":
        raise NoDocument("it is a picture")
    if suffix == ".pdf":
        return _pdf(content)
    if suffix in _CONVERTED:
        return _converted(content, suffix)
    text = decode(content)
    if suffix in _MARKDOWN:
        return Document([Part(text, 1)], "markdown")
    if suffix in _GRAMMARS:
        return Document([Part(text, 1)], "code", grammar=_grammar(suffix), prose=False)
    if suffix in (".jsonl", ".ndjson"):
        return Document(list(_json_lines(text)))
    if suffix in (".csv", ".tsv"):
        return Document(list(_table(text, suffix)))
    return Document([Part(text, 1)], prose=suffix in ("", ".txt", ".rst", ".text"))


def decode(content: bytes) -> str:
    r"""Return bytes as text, with "\n" at the ends of lines: UTF-8, what a byte order mark says, or the likeliest.

    Raises:
        NoDocument: they are binary.
        NotText: they are no text in the encoding they seem to have.
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    with suppress(UnicodeDecodeError):
        text = content.decode(encoding)
        # UTF-16 without a mark has zeros.
        if "\0" not in text:
            return _clean(text)
    encoding = _guess(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        raise NotText(f"it is no text in {encoding}") from None
    if "\0" in text:
        raise NoDocument("it is binary")
    return _clean(text)


def _guess(content: bytes) -> str:
    from charset_normalizer import from_bytes

    found = from_bytes(content[:_SAMPLE])
    best = found.best()
    if best is None:
        raise NoDocument("it is binary")
    # Among equals, Windows' extension of Latin-1, which is the most frequent after UTF-8 (W3Techs, "Usage statistics of
    # character encodings").
    equals = {match.encoding for match in found if (match.chaos, match.coherence) == (best.chaos, best.coherence)}
    return "cp1252" if "cp1252" in equals else best.encoding


def _clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Formulas in PDF files come as pairs of surrogates.
    return text if is_unicode(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _pdf(content: bytes) -> Document:
    # Not by markitdown, which gives a PDF's text without its pages.
    pdfium = require("pypdfium2", "files")
    parts = []
    with _PDFIUM:
        try:
            with closing(pdfium.PdfDocument(content)) as document:
                title = document.get_metadata_value("Title").strip() or None
                for number in range(len(document)):
                    with closing(document[number]) as page, closing(page.get_textpage()) as text:
                        # U+FFFE and U+0002 stand for a hyphen at the end of a line.
                        found = re.sub("[\ufffe\x02]\\s*", "", _clean(text.get_text_range()))
                        parts.append(Part(found.replace("\0", ""), page=number + 1))
        except pdfium.PdfiumError as error:
            encrypted = "password" in str(error).lower()
            raise NotText("it is encrypted" if encrypted else f"it is no PDF, or damaged ({error})") from None
    if not any(part.text.strip() for part in parts):
        raise NotText("its pages are pictures, without text; run it through OCR")
    return Document(parts, title=title)


def _converted(content: bytes, suffix: str) -> Document:
    if suffix in (".docx", ".epub"):
        _check_unpacked(content)
    markitdown = require("markitdown", "files")
    converter = getattr(require("markitdown.converters", "files"), _CONVERTED[suffix])()
    if _CONVERTED[suffix] == "HtmlConverter":
        content = decode(content).encode()
    info = markitdown.StreamInfo(extension=suffix, charset="utf-8")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = converter.convert(io.BytesIO(content), info)
    except Exception as error:  # markitdown passes on whatever its parsers raise
        reason = str(error).strip().splitlines()
        raise NotText(f"it can't be converted to text: {reason[-1] if reason else type(error).__name__}") from None
    return Document([Part(_clean(result.markdown))], "markdown", (result.title or "").strip() or None)


def _check_unpacked(content: bytes) -> None:
    """Refuse a ZIP archive that unpacks to very much: a thousand times its own size is possible."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # An archive that says less than it holds can't be unpacked: `zipfile` stops at these sizes.
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise NotText(f"it can't be converted to text: {error}") from None
    if unpacked > _MAX_UNPACKED_BYTES:
        raise NotText(f"it unpacks to {unpacked >> 20:,} MB, more than {_MAX_UNPACKED_BYTES >> 20} MB; split it")


@cache
def _grammar(suffix: str) -> Any:
    module, function = _GRAMMARS[suffix]
    language: Callable[[], Any] = getattr(require(module, "files"), function)
    return language()


def _json_lines(text: str) -> Iterator[Part]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                yield _row(row, number) if isinstance(row, dict) else Part(_as_text(row), number)
            except (ValueError, RecursionError) as error:
                raise NotText(f"line {number} is not JSON: {error}") from None


def _table(text: str, suffix: str) -> Iterator[Part]:
    delimiter = "\t" if suffix == ".tsv" else max(",;\t|", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, restkey="")
    try:
        _ = reader.fieldnames  # reads the header
        line = reader.line_num + 1
        for row in reader:
            yield _row(row, line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise NotText(f"line {reader.line_num} is not CSV: {error}") from None


def _row(row: Mapping[str, Any], line: int) -> Part:
    """Return a row: its text with the other fields as metadata, or else all fields as "name: value"."""
    values = {_clean(key.strip()): value for key, value in row.items() if value not in (None, "", [])}
    name = next((name for name in _TEXT_FIELDS if isinstance(values.get(name), str)), None)
    if name is None:
        lines = [f"{key}: {_as_text(value)}" if key else _as_text(value) for key, value in values.items()]
        return Part(_clean("\n".join(lines)), line)
    title = values.pop("title", None)
    text = _clean(values.pop(name) if title is None else f"{_as_text(title)}\n{values.pop(name)}")
    others = {key: _clean(value) if isinstance(value, str) else value for key, value in values.items()}
    others = dict(islice(((key, value) for key, value in others.items() if _is_storable(key, value)), _MAX_FIELDS))
    return Part(text, line, None, None if title is None else _clean(_as_text(title)), others)


def _is_storable(key: str, value: object) -> bool:
    """Say whether Chroma takes a field as metadata."""
    if not key or key.startswith(_RESERVED_KEYS):
        return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
