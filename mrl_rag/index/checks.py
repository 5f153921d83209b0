"""What a caller gives an index, checked before anything is done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mrl_rag.errors import InvalidIds, InvalidInput, InvalidTexts
from mrl_rag.tasks import SURROGATE_ADVICE, is_unicode


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
    if threshold is not None and (
        isinstance(threshold, bool) or not isinstance(threshold, int | float) or np.isnan(threshold)
    ):
        raise InvalidInput(f"score_threshold is {threshold!r}; it must be a cosine from -1 to 1, or None.")
    return threshold
