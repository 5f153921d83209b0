"""What a caller gives an index, checked before anything is done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from mrl_rag.errors import InvalidIds, InvalidInput, InvalidTexts
from mrl_rag.index.chroma_errors import chroma_input
from mrl_rag.tasks import SURROGATE_ADVICE, is_unicode

Metadata: TypeAlias = Mapping[str, Any]
Where: TypeAlias = Mapping[str, Any]


def check_ids(ids: Sequence[str], unique: bool = True) -> list[str]:
    """Return the ids as a list.

    Args:
        ids: what the caller gave.
        unique: whether an id may stand in it only once.

    Raises:
        InvalidIds: not a list of non-empty strings, or one is repeated.
    """
    if isinstance(ids, str):
        raise InvalidIds(f"ids is a single string ({ids[:40]!r}); pass a list of strings.")
    try:
        checked = list(ids)
    except TypeError as error:
        raise InvalidIds(f"ids is {ids!r}; pass a list of strings.") from error
    for position, id_ in enumerate(checked):
        if not isinstance(id_, str) or not id_:
            raise InvalidIds(f"ids[{position}] is {id_!r}; an id is a non-empty string.")
        if not is_unicode(id_):
            raise InvalidIds(f"ids[{position}] is no valid Unicode ({id_!r}); {SURROGATE_ADVICE}")
    if unique and len(set(checked)) < len(checked):
        seen: set[str] = set()
        twice = next(id_ for id_ in checked if id_ in seen or seen.add(id_))  # type: ignore[func-returns-value]
        raise InvalidIds(f"id {twice!r} stands more than once in ids; give each record one id.")
    return checked


def check_documents(documents: Sequence[str | None]) -> None:
    """Refuse what is no text; None stands for a record without.

    Raises:
        InvalidTexts: one is not a string, or holds a lone surrogate.
    """
    for position, text in enumerate(documents):
        if text is not None and not isinstance(text, str):
            raise InvalidTexts(f"documents[{position}] is {text!r}; a document is a string, or None.")
        if text is not None and not is_unicode(text):
            raise InvalidTexts(f"documents[{position}] is no valid Unicode ({text[:40]!r}); {SURROGATE_ADVICE}")


def check_threshold(threshold: float | None) -> float | None:
    """Return the threshold.

    Raises:
        InvalidInput: not a number.
    """
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or np.isnan(float(threshold)):
        raise InvalidInput(f"score_threshold is {threshold!r}; it must be a cosine from -1 to 1, or None.")
    return float(threshold)


def check_where(where: Where | None, where_document: Where | None) -> tuple[Where | None, Where | None]:
    """Return both conditions, None for an empty one.

    Raises:
        InvalidInput: a condition isn't in Chroma's language.
    """
    from chromadb.api.types import validate_where, validate_where_document

    if where:
        with chroma_input(f"where={where!r}"):
            validate_where(where)  # type: ignore[arg-type]
    if where_document:
        with chroma_input(f"where_document={where_document!r}"):
            validate_where_document(where_document)  # type: ignore[arg-type]
    return where or None, where_document or None


def check_metadatas(metadatas: Sequence[Metadata | None]) -> list[Metadata]:
    """Return the metadatas, an empty one for None.

    Raises:
        InvalidInput: Chroma can't store one of them.
    """
    from chromadb.api.types import validate_metadata

    checked: list[Metadata] = []
    for position, metadata in enumerate(metadatas):
        if metadata:
            with chroma_input(f"metadatas[{position}]={metadata!r}"):
                validate_metadata(dict(metadata))
                for key, value in metadata.items():
                    texts = value if isinstance(value, list) else [value]
                    if not all(is_unicode(text) for text in (key, *texts) if isinstance(text, str)):
                        raise ValueError(f"{key!r} is no valid Unicode; {SURROGATE_ADVICE}")
                    # Chroma itself would store nothing for such a float, or another number, and say nothing.
                    for number in texts:
                        if isinstance(number, float) and not math.isfinite(number):
                            raise ValueError(f"{key!r} is {number}; leave the key out")
                        if isinstance(number, int) and not -(2**63) <= number < 2**63:
                            raise ValueError(f"{key!r} is {number}, no 64-bit integer; store it as a string")
        checked.append(metadata or {})
    return checked


def check_recall(recall: object) -> float:
    """Return the recall that searches should reach.

    Raises:
        InvalidInput: not a number above 0 and up to 1.
    """
    if isinstance(recall, bool) or not isinstance(recall, Real) or not 0 < float(recall) <= 1:
        raise InvalidInput(f"recall is {recall!r}; it must be a number above 0 and up to 1, as in recall=0.99.")
    return float(recall)
