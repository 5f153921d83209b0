"""Conditions in Chroma's language: those its core can't take are refused, those too large are split into requests.

Chroma 1.5's client accepts conditions that its core refuses, fails at, or answers with nothing. Each was found by trial
and has a test in `tests/index/test_filters.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from mrl_rag.errors import InvalidInput
from mrl_rag.index.checks import Where
from mrl_rag.index.chroma_errors import chroma_input
from mrl_rag.tasks import SURROGATE_ADVICE, is_unicode

Pair: TypeAlias = tuple[Where | None, Where | None]

# Levels of $and and $or: the core takes 63 in a process, and 62 over a server.
_MAX_DEPTH = 60
# In one request. SQLite takes 32,766 variables (a comparison needs up to 5, a value of a list 2), and expressions 1000
# levels deep.
_MAX_COMPARISONS, _MAX_VALUES = 500, 10_000
_LISTS = ("$in", "$nin")
_KINDS = (bool, int, float, str)
_ORDERS = ("$gt", "$gte", "$lt", "$lte")


def check_where(where: Where | None, where_document: Where | None) -> tuple[Where | None, Where | None]:
    """Return both conditions, None for an empty one.

    Raises:
        InvalidInput: a condition isn't in Chroma's language, or has a value that Chroma can't compare with.
    """
    from chromadb.api.types import validate_where, validate_where_document

    for name, condition, validate in (
        ("where", where, validate_where),
        ("where_document", where_document, validate_where_document),
    ):
        if condition:
            for key, operator, operand in _comparisons(condition, name):
                _check_operand(name, key, operator, operand)
            with chroma_input(f"{name}={condition!r}"):
                validate(condition)  # type: ignore[arg-type]
    return where or None, where_document or None


def fits(where: Where | None, where_document: Where | None) -> bool:
    """Say whether Chroma takes both conditions in one request."""
    operands = [operand for each in (where, where_document) if each for _, _, operand in _comparisons(each)]
    values = sum(len(operand) for operand in operands if isinstance(operand, list))
    return len(operands) <= _MAX_COMPARISONS and values <= _MAX_VALUES


def halves(where: Where | None, where_document: Where | None) -> tuple[bool, Pair, Pair]:
    """Split conditions that don't fit into two halves.

    Returns:
        Whether a record must meet both halves (otherwise one of them), and the halves, each as (where, where_document).
    """
    if where and where_document:
        return True, (where, None), (None, where_document)
    every, one, other = _cut(where or where_document or {})
    return (every, (one, None), (other, None)) if where else (every, (None, one), (None, other))


def _cut(condition: Where) -> tuple[bool, Where, Where]:
    ((key, value),) = condition.items()
    if key in ("$and", "$or"):
        one, other = ({key: part} if len(part) > 1 else part[0] for part in _halved(value))
        return key == "$and", one, other
    ((operator, operands),) = value.items()
    one, other = ({key: {operator: part}} for part in _halved(operands))
    return operator == "$nin", one, other


def _halved(items: list[Any]) -> tuple[list[Any], list[Any]]:
    return items[: len(items) // 2], items[len(items) // 2 :]


def _comparisons(condition: Any, name: str = "", depth: int = 1) -> Iterator[tuple[str, str, Any]]:
    """Yield key, operator and operand of each comparison; the key is "" in a condition on documents."""
    if depth > _MAX_DEPTH:
        raise InvalidInput(f"{name} nests $and and $or more than {_MAX_DEPTH} levels deep; Chroma takes no more.")
    for key, value in condition.items() if isinstance(condition, Mapping) else ():
        if key in ("$and", "$or") and isinstance(value, list):
            for part in value:
                yield from _comparisons(part, name, depth + 1)
        elif isinstance(value, Mapping):
            yield from ((key, operator, operand) for operator, operand in value.items())
        else:
            yield ("", key, value) if name == "where_document" else (key, "$eq", value)


def _check_operand(name: str, key: object, operator: object, operand: Any) -> None:
    given = f"{name} has {key!r} {operator!r}" if key else f"{name} has {operator!r}"
    if isinstance(key, str) and (key.startswith("$") or not is_unicode(key)):
        raise InvalidInput(f"{name} has the key {key!r}, which no record can have; name one that a record has.")
    values = operand if isinstance(operand, list) else [operand]
    for value in values:
        if isinstance(value, str) and not is_unicode(value):
            raise InvalidInput(f"{given} with {value[:40]!r}: {SURROGATE_ADVICE}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInput(f"{given} with {value}, which no record has; leave the comparison out.")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InvalidInput(f"{given} with {value}, which no 64-bit integer equals; compare with a float.")
    if operator in _ORDERS and isinstance(operand, bool):
        raise InvalidInput(f"{given} with {operand}; it takes a number.")
    if isinstance(operand, list) and operator not in _LISTS:
        raise InvalidInput(f"{given} with a list; it takes one value. $in takes a list.")
    kinds = {_kind(value) for value in values}
    if operator in _LISTS and (len(kinds) != 1 or not kinds <= set(_KINDS)):
        raise InvalidInput(
            f"{given} with {str(operand)[:100]}; it takes a list of strings, of integers, of floats or of booleans."
        )


def _kind(value: object) -> type:
    return next((kind for kind in _KINDS if isinstance(value, kind)), type(value))
