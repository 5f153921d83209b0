"""Evaluating a collection with an encoder, or an index that stands."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np

from mrl_rag.arguments import check_integer
from mrl_rag.binding import model_of
from mrl_rag.encoder import Encoder
from mrl_rag.errors import InvalidInput
from mrl_rag.evaluation.datasets import Dataset
from mrl_rag.evaluation.results import Evaluation, Result
from mrl_rag.evaluation.sweep import EncodedDataset, Search, SweepSettings, default_dims, sweep
from mrl_rag.evaluation.ways import Rows, bytes_per_vector
from mrl_rag.index import Plan, TwoStageIndex
from mrl_rag.index.plan import check_k, first_size
from mrl_rag.models import find_row
from mrl_rag.truncation import Float32Array, unit_rows

_NO_LABELS = {
    "records": "none (exact search at full dimension, of records)",
    "sentences": "none (exact search at full dimension, of titles and first sentences)",
}
# Questions that are made of passages, where there are no others.
_MADE_QUESTIONS = 500
_PAGE = 5_000
# An end of a sentence: a mark and a space, a Chinese or Japanese mark, or the end of a line.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s|(?<=[\u3002\uff01\uff1f])|\n")
# A shorter first sentence, such as "1.", asks for nothing. In UTF-8: two English words, or four Chinese letters.
_MIN_BYTES = 12


def encode_dataset(data: Dataset, encoder: Encoder, progress: bool = False) -> EncodedDataset:
    """Encode passages and questions at full dimension.

    Args:
        data: the passages; without judgments, up to 500 of their titles or first sentences are the questions.
        encoder: encodes them.
        progress: show a bar when standard error is a terminal.

    Raises:
        InvalidInput: there are no passages.
    """
    if not data.corpus:
        raise InvalidInput(f"{data.name} has no passages, so there is nothing to search.")
    texts = list(data.corpus.values())
    start = time.perf_counter()
    vectors = encoder.encode(texts, "document", encoder.full_dim, progress=progress)
    rate = len(texts) / (time.perf_counter() - start)
    if data.qrels:
        questions = [text for id_, text in data.queries.items() if id_ in data.qrels]
        labels, relevant = data.labels, [data.qrels[id_] for id_ in data.queries if id_ in data.qrels]
    else:
        questions, relevant, labels = made_questions(texts), None, _NO_LABELS["sentences"]
    queries = encoder.encode_queries(questions, encoder.full_dim)
    ids = list(data.corpus)
    return EncodedDataset(
        *(data.name, model_of(encoder), labels, ids, texts, vectors, questions, queries, relevant), encode_rate=rate
    )


def evaluate(
    data: Dataset,
    encoder: Encoder,
    *,
    dims: Sequence[int] | None = None,
    k: int = 10,
    progress: bool = False,
    **settings: Unpack[SweepSettings],
) -> Evaluation:
    """Measure what fewer dimensions and bytes cost on a collection.

        evaluate(read_beir("./cranfield"), MatryoshkaEncoder())
        evaluate(read_pairs("questions.csv"), MatryoshkaEncoder("nomic-v1.5"), dims=(256, 64))

    Args:
        data: from `read_beir` or `read_pairs`, or one's own; without judgments, recall is measured against the exact
            answer at full dimension, of questions made of titles and first sentences.
        encoder: encodes passages and questions.
        dims: dimensions to try; None for those the model was trained for, or six shares of the full one.
        k: hits per question.
        progress: show a bar when standard error is a terminal.
        settings: `sizes`, `precisions` and `head`, as for `sweep`.

    Returns:
        The evaluation.

    Raises:
        InvalidInput: there are no passages, or an argument is out of range.
        MissingExtra: there are judgments, and ir-measures is not installed.
    """
    encoded = encode_dataset(data, encoder, progress)
    tried = default_dims(encoder.full_dim, encoder.dims) if dims is None else dims
    return sweep(encoded, tried, k=k, **settings)


def evaluate_index(
    index: TwoStageIndex,
    encoder: Encoder | None = None,
    *,
    pairs: Dataset | None = None,
    ask: Literal["records", "sentences"] = "records",
    questions: int = _MADE_QUESTIONS,
    dims: Sequence[int] | None = None,
    k: int = 10,
    **settings: Unpack[SweepSettings],
) -> Evaluation:
    """Measure what fewer dimensions and bytes cost on an index; no record is encoded again.

        evaluate_index(index)                                       # records of its own are the questions
        evaluate_index(index, encoder, ask="sentences")             # its passages' titles and first sentences are
        evaluate_index(index, encoder, pairs=read_pairs("asked.csv"))

    All full vectors are read into memory. The index's own search is measured as well, as "two stages" at its dimension
    with its shortlist size.

    Args:
        index: with records.
        encoder: that filled it, for questions that are texts; None needs none.
        pairs: questions and the passages that answer them: texts of records, or their ids.
        ask: without `pairs`, what is asked. "records": records are queries, each left out of its own answers, and the
            truth is the exact top k at full dimension. "sentences": so are titles (metadata "title") and first
            sentences.
        questions: at most so many records (and half of them, since they fit no projection) or sentences, by a seeded
            choice.
        dims: dimensions to try; None for those the model was trained for, or six shares of the full one.
        k: hits per question.
        settings: `sizes`, `precisions` and `head`, as for `sweep`.

    Raises:
        InvalidInput: the index is empty, an encoder is needed and missing, or a passage of `pairs` is not in it.
        MissingExtra: there are pairs, and ir-measures is not installed.
    """
    check_integer("questions", questions, 1)
    k = check_k(k)
    if len(index) < 2:
        raise InvalidInput(f"index {index.name!r} has {len(index)} records; evaluating needs two at least.")
    ids, documents, metadatas, vectors = _contents(index)
    if encoder is None and (pairs is not None or ask == "sentences"):
        raise InvalidInput("these questions are texts; pass the encoder that filled the index.")
    relevant, left_out, labels = None, None, "pairs" if pairs is not None else _NO_LABELS[ask]
    if pairs is not None:
        relevant = _relevant_records(pairs, ids, documents, index.name)
        texts = [pairs.queries[query] for query in pairs.qrels]
    elif ask == "sentences":
        texts = made_questions(documents, metadatas, questions)
    else:
        chosen = np.sort(np.random.default_rng(0).permutation(len(ids))[: min(questions, len(ids) // 2)])
        texts, left_out = [documents[row] or ids[row] for row in chosen], chosen
    if not texts:
        raise InvalidInput(f"the records of index {index.name!r} have no texts to make questions of; ask its records.")
    queries = vectors[left_out] if left_out is not None else _encoded(index, encoder, texts)
    data = EncodedDataset(
        *(index.name, index.model or "not known", labels, ids, documents, vectors, texts, queries, relevant), left_out
    )
    row = find_row(index.model) if index.model else None
    tried = default_dims(data.full_dim, row.dims if row else ()) if dims is None else dims
    return sweep(data, tried, k=k, own=[_own_search(index, ids, k + (left_out is not None))], **settings)


def made_questions(
    documents: Sequence[str], metadatas: Sequence[Mapping[str, Any]] = (), most: int = _MADE_QUESTIONS
) -> list[str]:
    """Return titles, or first sentences where there is none, as questions: distinct ones, by a seeded choice.

    Args:
        documents: passages.
        metadatas: one per passage, whose "title" is taken; or none.
        most: questions at most.
    """
    asked: dict[str, None] = {}
    for row in np.random.default_rng(0).permutation(len(documents)).tolist():
        text = (_title(metadatas[row]) if metadatas else "") or _first_sentence(documents[row])
        if text.strip():
            asked[text.strip()] = None
        if len(asked) == most:
            break
    return list(asked)


def _title(metadata: Mapping[str, Any]) -> str:
    """Return a title that says more than the file's name; "" for none."""
    title = metadata.get("title")
    return title if isinstance(title, str) and title != Path(str(metadata.get("path"))).name else ""


def _first_sentence(text: str) -> str:
    begun = ""
    for part in _SENTENCE_END.split(text.strip()):
        begun = f"{begun} {part.strip()}".strip()
        if len(begun.encode(errors="replace")) >= _MIN_BYTES:
            break
    return begun


def _encoded(index: TwoStageIndex, encoder: Encoder | None, texts: Sequence[str]) -> Float32Array:
    assert encoder is not None
    index.bind(model_of(encoder), encoder.fingerprint)
    return encoder.encode_queries(texts, index.full_dim)


def _contents(index: TwoStageIndex) -> tuple[list[str], list[str], list[dict[str, Any]], Float32Array]:
    """Return ids, texts, metadatas and unit vectors of all records that have a full vector."""
    ids: list[str] = []
    documents: list[str] = []
    metadatas: list[dict[str, Any]] = []
    vectors: list[Float32Array] = []
    names = index.ids()
    for start in range(0, len(names), _PAGE):
        for record in index.get(names[start : start + _PAGE]):
            if record.vector is not None:
                ids.append(record.id)
                documents.append(record.document or "")
                metadatas.append(record.metadata)
                vectors.append(record.vector)
    return ids, documents, metadatas, unit_rows(np.array(vectors))


def _relevant_records(pairs: Dataset, ids: Sequence[str], documents: Sequence[str], name: str) -> list[dict[str, int]]:
    """Return the records that answer each question, by their texts or ids."""
    known: dict[str, list[str]] = {}
    for id_, document in zip(ids, documents, strict=True):
        for text in {id_, document.strip()}:
            known.setdefault(text, []).append(id_)
    if missing := [text for text in pairs.corpus.values() if text.strip() not in known]:
        raise InvalidInput(
            f"{len(missing)} of {len(pairs.corpus)} passages are neither a text nor an id of index {name!r}, the first "
            f"being {missing[0][:80]!r}. Pass pairs with passages as they were stored."
        )
    return [
        {id_: relevance for passage, relevance in judged.items() for id_ in known[pairs.corpus[passage].strip()]}
        for judged in pairs.qrels.values()
    ]


def _own_search(index: TwoStageIndex, ids: Sequence[str], k: int) -> tuple[Result, Search]:
    """Return the search that an index does in two stages, and what it keeps per record."""
    full, dim, row_of = index.full_dim, index.shortlist_dim, {id_: row for row, id_ in enumerate(ids)}
    assert full is not None and dim is not None  # known, since there are records
    size = first_size(0, k)
    plan = Plan(dims=(dim, full), sizes=(size,))

    def search(queries: Float32Array) -> Rows:
        answers = index.search(queries, k, plan)
        rows = [[row_of[hit.id] for hit in hits if hit.id in row_of] for hits in answers]
        fewest = min(map(len, rows))
        return np.array([row[:fewest] for row in rows], dtype=np.intp)

    kept = bytes_per_vector(dim, "int8") + bytes_per_vector(full, "float16")
    return Result("two stages", dim, size, "int8", kept, float("nan"), {}, {}), search
