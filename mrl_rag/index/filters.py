"""Checks of conditions in Chroma's filter language, and splitting of those that are too large for one request.

Chroma 1.5's client accepts conditions that its core refuses, fails at, or silently answers with nothing. These cases
were found by trial; each has a test in `tests/index/test_filters.py`.
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

# Levels of nested $and and $or. Chroma's core takes 63, over a server 62.
_MAX_DEPTH = 60
# Comparisons, and values in lists, per request. SQLite takes 32,766 variables (a comparison needs up to 5, a value in a
# list 2), and expressions of depth 1000.
_MAX_COMPARISONS, _MAX_VALUES = 500, 10_000
# Comparisons per condition, which take a second or two: a condition from outside must not keep an index busy for long.
_MOST_COMPARISONS = 20_000
_LIST_OPERATORS = ("$in", "$nin")
_ORDER_OPERATORS = ("$gt", "$gte", "$lt", "$lte")
# bool first: it is a subclass of int.
_TYPES = (bool, int, float, str)


def check_where(where: Where | None, where_document: Where | None) -> tuple[Where | None, Where | None]:
    """Check both conditions and return them, None for an empty one.

    Raises:
        InvalidInput: a condition isn't in Chroma's language, or has a value that Chroma can't compare with.
    """
    from chromadb.api.types import validate_where, validate_where_document

    for name, condition, validate in (
        ("where", where, validate_where),
        ("where_document", where_document, validate_where_document),
    ):
        if condition:
            for number, (key, operator, operand) in enumerate(_comparisons(condition, name), 1):
                if number > _MOST_COMPARISONS:
                    raise InvalidInput(
                        f"{name} has more than {_MOST_COMPARISONS} comparisons; $in and $nin compare with a whole list."
                    )
                _check_operand(name, key, operator, operand)
            with chroma_input(**{name: condition}):
                validate(condition)  # type: ignore[arg-type]
    return where or None, where_document or None


def fits(where: Where | None, where_document: Where | None) -> bool:
    """Return whether Chroma takes both conditions in one request."""
    operands = [operand for each in (where, where_document) if each for _, _, operand in _comparisons(each)]
    values = sum(len(operand) for operand in operands if isinstance(operand, list))
    return len(operands) <= _MAX_COMPARISONS and values <= _MAX_VALUES


def halves(where: Where | None, where_document: Where | None) -> tuple[bool, Pair, Pair]:
    """Split conditions that don't fit into one request.

    Returns:
        Whether a record must meet both halves (otherwise at least one), and the halves, each (where, where_document).
    """
    if where and where_document:
        return True, (where, None), (None, where_document)
    both, one, other = _split(where or where_document or {})
    return (both, (one, None), (other, None)) if where else (both, (None, one), (None, other))


def _split(condition: Where) -> tuple[bool, Where, Where]:
    """Split one condition; the bool is as in `halves`."""
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
    if operator in _ORDER_OPERATORS and isinstance(operand, bool):
        raise InvalidInput(f"{given} with {operand}; it takes a number.")
    if isinstance(operand, list) and operator not in _LIST_OPERATORS:
        raise InvalidInput(f"{given} with a list; it takes one value. $in takes a list.")
    types = {_type(value) for value in values}
    if operator in _LIST_OPERATORS and (len(types) != 1 or not types <= set(_TYPES)):
        raise InvalidInput(
            f"{given} with {str(operand)[:100]}; it takes a list of strings, of integers, of floats or of booleans."
        )


def _type(value: object) -> type:
    return next((type_ for type_ in _TYPES if isinstance(value, type_)), type(value))
