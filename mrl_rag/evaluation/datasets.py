"""Collections with questions whose answers are known: folders in the BEIR layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mrl_rag.errors import InvalidInput

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Dataset:
    """A retrieval test collection.

    Attributes:
        corpus: document id -> text, title first.
        queries: query id -> text.
        qrels: query id -> document id -> relevance, 0 for none.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: Path | str) -> Dataset:
    """Read a test collection in the BEIR layout.

    Args:
        folder: holds `corpus.jsonl`, `queries.jsonl`, and `qrels.tsv` or `qrels/test.tsv`.

    Returns:
        The collection; queries without judgments are left out.

    Raises:
        InvalidInput: a file is missing, or one of its lines is not in the layout.
    """
    folder = Path(folder)
    judged = next((f for f in (folder / "qrels.tsv", folder / "qrels" / "test.tsv") if f.is_file()), None)
    if judged is None:
        raise InvalidInput(f"{folder} has no qrels.tsv and no qrels/test.tsv; pass a folder in the BEIR layout.")
    qrels: dict[str, dict[str, int]] = {}
    for query_id, document_id, score in _lines(judged, _judgment, skip=1):
        qrels.setdefault(query_id, {})[document_id] = score
    corpus = dict(_lines(folder / "corpus.jsonl", _document))
    queries = dict(_lines(folder / "queries.jsonl", _document))
    return Dataset(corpus, {id_: text for id_, text in queries.items() if id_ in qrels}, qrels)


def _judgment(line: str) -> tuple[str, str, int]:
    query_id, document_id, score = line.split("\t")
    return query_id, document_id, int(score)


def _document(line: str) -> tuple[str, str]:
    entry = json.loads(line)
    return str(entry["_id"]), f"{entry.get('title') or ''} {entry['text']}".strip()


def _lines(file: Path, parse: Callable[[str], Parsed], skip: int = 0) -> list[Parsed]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidInput(f"{file} can't be read: {error}. Pass a folder in the BEIR layout.") from error
    parsed = []
    for number, line in enumerate(lines[skip:], start=skip + 1):
        if line.strip():
            try:
                parsed.append(parse(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInput(f"{file}, line {number}, is not in the BEIR layout: {line[:80]!r}") from error
    return parsed
