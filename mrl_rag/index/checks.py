"""Checks of the arguments of an index, made before anything is done."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from numbers import Real
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from mrl_rag.errors import InvalidIds, InvalidInput, InvalidTexts, UnknownArgument
from mrl_rag.index.chroma_errors import chroma_input
from mrl_rag.tasks import SURROGATE_ADVICE, is_unicode
from mrl_rag.truncation import Float32Array, as_rows

P = ParamSpec("P")
Answer = TypeVar("Answer")
Metadata: TypeAlias = Mapping[str, Any]
Where: TypeAlias = Mapping[str, Any]

# What LangChain, LlamaIndex and Chroma call an argument, and what it is called here.
_OTHER_NAMES = {"filter": "where", "filters": "where", "top_k": "k", "n_results": "k", "similarity_top_k": "k"}

# Chroma refuses metadata keys that begin so, and drops those of the last kind in silence.
_RESERVED = ("$", "#", "chroma:")
# Metadata values per record: Chroma writes each with six SQLite variables, and SQLite has 32,766. With more, this write
# and every later one fails.
_MAX_VALUES = 5460
# Characters of a collection's name: Chroma takes 512, `reencode` adds 22, and `reindex` 45 for a while.
_MAX_NAME = 440
# What `reencode` adds to an index's name: for the collection that it fills, and for the old one that it keeps.
NEXT, KEPT = "-mrl_rag-next-", "-mrl_rag-kept-"
_ADDED = re.compile(rf"(?:{NEXT}|{KEPT})[0-9a-f]{{8}}$")


def explain_other_names(method: Callable[P, Answer]) -> Callable[P, Answer]:
    """Have a method say the right name where an argument is given under another library's.

    Raises:
        UnknownArgument: by the method, for such an argument.
    """

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> Answer:
        for name in _OTHER_NAMES.keys() & kwargs.keys():
            raise UnknownArgument(f"{method.__qualname__} has no argument {name}=; it is {_OTHER_NAMES[name]}= here.")
        return method(*args, **kwargs)

    return call


def check_choice(name: str, value: Answer, *choices: Answer) -> Answer:
    """Return an argument's value when it is one of the choices.

    Raises:
        InvalidInput: it isn't.
    """
    if value not in choices:
        raise InvalidInput(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")
    return value


def check_name(name: str) -> str:
    """Return a collection's name when Chroma takes it.

    Raises:
        InvalidInput: it doesn't.
    """
    if (
        not isinstance(name, str)
        or not re.fullmatch(rf"[a-zA-Z0-9][a-zA-Z0-9._-]{{1,{_MAX_NAME - 2}}}[a-zA-Z0-9]", _ADDED.sub("", name))
        or ".." in name
        or re.fullmatch(r"\d+(\.\d+){3}", name)
    ):
        raise InvalidInput(
            f"collection is {str(name)[:100]!r}; it must be 3 to {_MAX_NAME} ASCII letters, digits, '.', '_' and "
            "'-', with a letter or digit at both ends, without '..', and no IP address: Chroma takes no other."
        )
    return name


def check_ids(ids: Sequence[str], unique: bool = True, first: int = 0) -> list[str]:
    """Return the ids as a list.

    Args:
        ids: what the caller gave.
        unique: whether to refuse an id that occurs twice.
        first: position of the first one, for messages.

    Raises:
        InvalidIds: not a list of non-empty strings, or one is repeated.
    """
    if isinstance(ids, str):
        raise InvalidIds(f"ids is a single string ({ids[:40]!r}); pass a list of strings.")
    try:
        checked = list(ids)
    except TypeError as error:
        raise InvalidIds(f"ids is {ids!r}; pass a list of strings.") from error
    for position, id_ in enumerate(checked, first):
        if not isinstance(id_, str) or not id_:
            raise InvalidIds(f"ids[{position}] is {id_!r}; an id is a non-empty string.")
        if not is_unicode(id_):
            raise InvalidIds(f"ids[{position}] is no valid Unicode ({id_!r}); {SURROGATE_ADVICE}")
    if unique and len(set(checked)) < len(checked):
        seen: set[str] = set()
        twice = next(id_ for id_ in checked if id_ in seen or seen.add(id_))  # type: ignore[func-returns-value]
        raise InvalidIds(f"id {twice!r} occurs more than once in ids; give each record its own.")
    return checked


def as_queries(vectors: npt.ArrayLike) -> tuple[Float32Array, bool]:
    """Return query vectors as float32 [n, d], and whether a single one of shape [d] was given.

    Raises:
        InvalidVectors: neither of these shapes, or NaN or infinity.
    """
    try:
        array = np.asarray(vectors, dtype=np.float32)
    except (TypeError, ValueError):
        return as_rows(vectors, "query_vectors"), False
    single = array.ndim == 1 and array.size > 0
    return as_rows(array[None] if single else array, "query_vectors"), single


def check_documents(documents: Sequence[str | None]) -> None:
    """Accept strings, and None for a record without a document.

    Raises:
        InvalidTexts: one is not a string, or holds a lone surrogate.
    """
    for position, text in enumerate(documents):
        if text is not None and not isinstance(text, str):
            raise InvalidTexts(f"documents[{position}] is {text!r}; a document is a string, or None.")
        if text is not None and not is_unicode(text):
            raise InvalidTexts(f"documents[{position}] is no valid Unicode ({text[:40]!r}); {SURROGATE_ADVICE}")


def check_threshold(threshold: float | None) -> float | None:
    """Return the threshold as a float, or None for none.

    Raises:
        InvalidInput: it is not a number.
    """
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or np.isnan(float(threshold)):
        raise InvalidInput(f"score_threshold is {threshold!r}; it must be a cosine from -1 to 1, or None.")
    return float(threshold)


def check_metadatas(metadatas: Sequence[Metadata | None], first: int = 0) -> list[Metadata]:
    """Return the metadatas, an empty one for None.

    Args:
        metadatas: what the caller gave.
        first: position of the first one, for messages.

    Raises:
        InvalidInput: Chroma can't store one of them.
    """
    if not any(metadatas):
        # Without Chroma, which takes a second to import.
        return [{} for _ in metadatas]
    from chromadb.api.types import validate_metadata

    checked: list[Metadata] = []
    for position, metadata in enumerate(metadatas, first):
        if metadata:
            with chroma_input(**{f"metadatas[{position}]": metadata}):
                _check_size(metadata)
                validate_metadata(dict(metadata))
                _check_metadata(metadata)
        checked.append(metadata or {})
    return checked


def _check_metadata(metadata: Metadata) -> None:
    """Raise ValueError for what Chroma's client accepts and its core then refuses, changes or drops."""
    for key, value in metadata.items():
        if not key or key.startswith(_RESERVED):
            raise ValueError(f"the key {key!r} is empty, or starts with {', '.join(_RESERVED)}; give it another name")
        texts = value if isinstance(value, list) else [value]
        if not all(is_unicode(text) for text in (key, *texts) if isinstance(text, str)):
            raise ValueError(f"{key!r} is no valid Unicode; {SURROGATE_ADVICE}")
        for number in texts:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{key!r} is {number}; leave the key out")
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise ValueError(f"{key!r} is {number}, no 64-bit integer; store it as a string")
            if not isinstance(number, str | int | float | None):
                raise ValueError(f"{key!r} is a {type(number).__name__}; store it as a string")


def _check_size(metadata: Metadata) -> None:
    if not isinstance(metadata, Mapping):
        raise ValueError(f"it is a {type(metadata).__name__}; pass a dict, or None")
    members = sum(len(value) for value in metadata.values() if isinstance(value, list))
    if max(len(metadata), members) > _MAX_VALUES:
        raise ValueError(
            f"it has {len(metadata)} keys and {members} list items; Chroma stores up to {_MAX_VALUES} of each"
        )


def check_recall(recall: object) -> float:
    """Return the target recall as a float.

    Raises:
        InvalidInput: it is not a number above 0 and up to 1.
    """
    if isinstance(recall, bool) or not isinstance(recall, Real) or not 0 < float(recall) <= 1:
        raise InvalidInput(f"recall is {recall!r}; it must be a number above 0 and up to 1, as in recall=0.99.")
    return float(recall)
