"""The text that heads are fitted and measured on: test collections, and the documentation of installed packages."""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mrl_rag import MatryoshkaEncoder
from mrl_rag.evaluation import read_beir
from mrl_rag.truncation import Float32Array

# Docstrings of one package at most: torch alone would be an eighth of all.
_PER_PACKAGE = 2000
_MAX_CHARACTERS = 600


class Collection(NamedTuple):
    """Documents and questions as full vectors, and which documents answer a question.

    Attributes:
        documents: float32 [n, full_dim].
        queries: float32 [q, full_dim].
        qrels: per query, relevance by row of the document, 0 for none.
    """

    documents: Float32Array
    queries: Float32Array
    qrels: list[dict[int, int]]

    def half(self, rows: np.ndarray) -> Collection:
        """Return the same documents with some of the queries."""
        return self._replace(queries=self.queries[rows], qrels=[self.qrels[row] for row in rows])

    def pairs(self) -> tuple[Float32Array, Float32Array]:
        """Return queries and the relevant documents, float32 [p, full_dim] each, a row per judgment."""
        rows = [(q, d) for q, judged in enumerate(self.qrels) for d, relevance in judged.items() if relevance > 0]
        queries, documents = np.array(rows).T
        return self.queries[queries], self.documents[documents]


class Vectors:
    """Encodes each set of texts once, and keeps the vectors in a folder.

    Args:
        folder: where they are kept.
        encoder: makes them.
    """

    def __init__(self, folder: Path, encoder: MatryoshkaEncoder) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._encoder = encoder

    def of(self, name: str, texts: list[str], questions: bool = False) -> Float32Array:
        """Return float32 [n, full_dim] of n texts."""
        file = self._folder / f"{name}.npy"
        if file.is_file() and len(kept := np.load(file)) == len(texts):
            return np.asarray(kept, dtype=np.float32)
        encode = self._encoder.encode_queries if questions else self._encoder.encode_documents
        with warnings.catch_warnings():
            # Long documents are cut, as in every table of `minilm`.
            warnings.simplefilter("ignore", UserWarning)
            vectors = encode(texts)
        np.save(file, vectors)
        return vectors


def collection(folder: Path, vectors: Vectors) -> Collection:
    """Read a folder in the BEIR layout."""
    data = read_beir(folder)
    row_of = {id_: row for row, id_ in enumerate(data.corpus)}
    return Collection(
        vectors.of(f"{folder.name}-documents", list(data.corpus.values())),
        vectors.of(f"{folder.name}-queries", list(data.queries.values()), questions=True),
        [
            {row_of[id_]: relevance for id_, relevance in data.qrels[query].items() if id_ in row_of}
            for query in data.queries
        ],
    )


def customer_questions(folder: Path, vectors: Vectors) -> Float32Array:
    """Return the vectors of banking77's questions for training, float32 [10003, full_dim]."""
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return vectors.of("banking77-train", [json.loads(line)["text"] for line in lines], questions=True)


def docstrings(cache: Path) -> list[tuple[str, str]]:
    """Return first paragraph and the rest of the docstrings in this environment, shuffled; the rest may be ""."""
    file = cache / "docstrings.json"
    if file.is_file():
        return [(summary, rest) for summary, rest in json.loads(file.read_text(encoding="utf-8"))]
    found = list(_docstrings())
    random.Random(0).shuffle(found)
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def _docstrings() -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for root in (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))):
        for package in sorted(root.iterdir()):
            taken = 0
            files = [package] if package.suffix == ".py" else sorted(package.rglob("*.py"))
            random.Random(0).shuffle(files)
            for path in files:
                if taken >= _PER_PACKAGE or {"site-packages", "tests", "test"} & set(path.relative_to(root).parts):
                    continue
                for summary, rest in _of_file(path):
                    if summary not in seen:
                        seen.add(summary)
                        taken += 1
                        yield summary, rest


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
            if len(first) >= 40:
                yield " ".join(first.split())[:_MAX_CHARACTERS], " ".join(rest.split())[:_MAX_CHARACTERS]
