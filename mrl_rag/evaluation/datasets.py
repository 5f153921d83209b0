"""Passages, questions and which passages answer them: BEIR folders, and files of one's own pairs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
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
        qrels: query id -> document id -> relevance, 0 for none; empty where there are no judgments.
        name: of the collection.
        labels: how the judgments were made: "judgments" or "pairs".
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    name: str = "dataset"
    labels: str = "judgments"

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each question with each document that is relevant to it, as texts; judgments of unknown ones are left out."""
        return [
            (self.queries[query], self.corpus[id_])
            for query, judged in self.qrels.items()
            for id_, relevance in judged.items()
            if relevance > 0 and query in self.queries and id_ in self.corpus
        ]


def read_beir(folder: Path | str, judged: bool = True) -> Dataset:
    """Read a test collection in the BEIR layout.

    Args:
        folder: holds `corpus.jsonl`, `queries.jsonl`, and `qrels.tsv` or `qrels/test.tsv`.
        judged: False reads the corpus alone.

    Returns:
        The collection; queries without judgments are left out.

    Raises:
        InvalidInput: a file is missing, or one of its lines is not in the layout.
    """
    folder = Path(folder)
    if not judged:
        return Dataset(dict(_lines(folder / "corpus.jsonl", _document)), {}, {}, folder.resolve().name)
    judgments = next((f for f in (folder / "qrels.tsv", folder / "qrels" / "test.tsv") if f.is_file()), None)
    if judgments is None:
        raise InvalidInput(f"{folder} has no qrels.tsv and no qrels/test.tsv; pass a folder in the BEIR layout.")
    qrels: dict[str, dict[str, int]] = {}
    for query_id, document_id, score in _lines(judgments, _judgment, skip=1):
        qrels.setdefault(query_id, {})[document_id] = score
    corpus = dict(_lines(folder / "corpus.jsonl", _document))
    queries = dict(_lines(folder / "queries.jsonl", _document))
    return Dataset(corpus, {id_: text for id_, text in queries.items() if id_ in qrels}, qrels, folder.resolve().name)


def read_pairs(file: Path | str) -> Dataset:
    """Read (question, passage) pairs.

    Args:
        file: `.jsonl` with `{"question": ..., "passage": ...}` or `[question, passage]` per line; or `.csv` or `.tsv`
            (separated by tabs) with two columns, whose first line may be `question,passage`.

    Returns:
        The distinct passages as the corpus, the distinct questions, and each question's passages with relevance 1. Ids
        are numbers, in the order of the file.

    Raises:
        InvalidInput: the file can't be read, has no pairs or another ending, or a line is not a pair.
    """
    file = Path(file)
    delimiter = {".csv": ",", ".tsv": "\t"}.get(file.suffix.lower())
    if delimiter is None and file.suffix.lower() != ".jsonl":
        raise InvalidInput(f"{file} holds no pairs that can be read; pass a .jsonl, .csv or .tsv file.")
    pairs = _columns(file, delimiter) if delimiter else _lines(file, _pair, layout="a question and a passage")
    if not pairs:
        raise InvalidInput(f"{file} has no pairs; put a question and a passage that answers it into each line.")
    passages = _numbered(passage for _, passage in pairs)
    questions = _numbered(question for question, _ in pairs)
    qrels: dict[str, dict[str, int]] = {}
    for question, passage in pairs:
        qrels.setdefault(questions[question], {})[passages[passage]] = 1
    corpus = {id_: text for text, id_ in passages.items()}
    return Dataset(corpus, {id_: text for text, id_ in questions.items()}, qrels, file.stem, "pairs")


def read_dataset(path: Path | None, pairs: Dataset | None) -> Dataset | None:
    """Return what is to be encoded: a BEIR folder, with judgments if it has any, or pairs without a folder.

    Args:
        path: a BEIR folder, the folder of an index, or None.
        pairs: from `read_pairs`, or None.

    Returns:
        None where `path` is no BEIR folder, or there is neither: then an index is meant.

    Raises:
        InvalidInput: there are both a BEIR folder and pairs; or as `read_beir` does.
    """
    if path is None or not (path / "corpus.jsonl").is_file():
        return pairs if path is None else None
    if pairs is not None:
        raise InvalidInput(f"{path} is a BEIR folder, with questions of its own. Pass the folder or pairs, not both.")
    return read_beir(path, judged=(path / "qrels.tsv").is_file() or (path / "qrels").is_dir())


def _pair(line: str) -> tuple[str, str]:
    entry = json.loads(line)
    question, passage = (entry["question"], entry["passage"]) if isinstance(entry, dict) else entry
    if not (isinstance(question, str) and isinstance(passage, str)):
        raise TypeError("not two texts")
    return question, passage


def _columns(file: Path, delimiter: str) -> list[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = [(number, row) for number, row in enumerate(csv.reader(opened, delimiter=delimiter), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{file} can't be read: {error}. Pass a file with two columns.") from error
    for number, row in rows:
        if len(row) != 2:
            raise InvalidInput(f"{file}, row {number}, has {len(row)} columns; it must have a question and a passage.")
    pairs = [(question, passage) for _, (question, passage) in rows]
    return pairs[1:] if pairs and pairs[0] == ("question", "passage") else pairs


def _numbered(texts: Iterable[str]) -> dict[str, str]:
    return {text: str(number) for number, text in enumerate(dict.fromkeys(texts), 1)}


def _judgment(line: str) -> tuple[str, str, int]:
    query_id, document_id, score = line.split("\t")
    return query_id, document_id, int(score)


def _document(line: str) -> tuple[str, str]:
    entry = json.loads(line)
    return str(entry["_id"]), f"{entry.get('title') or ''} {entry['text']}".strip()


def _lines(
    file: Path, parse: Callable[[str], Parsed], skip: int = 0, layout: str = "in the BEIR layout"
) -> list[Parsed]:
    try:
        # Not `splitlines`: within JSON a text may hold a line separator of Unicode.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file} can't be read: {error}. Its lines must be {layout}.") from error
    parsed = []
    for number, line in enumerate(lines[skip:], start=skip + 1):
        if line.strip():
            try:
                parsed.append(parse(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInput(f"{file}, line {number}, is not {layout}: {line[:80]!r}") from error
    return parsed
