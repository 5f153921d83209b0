"""LlamaIndex's metadata filters, in Chroma's language where it can express them, and in Python otherwise.

A filter means the same as in LlamaIndex's own `SimpleVectorStore`; nested filters work as well. A record that lacks the
key, or has None there, meets only `!=`, `nin` and `is_empty`. A NOT group is met where none of its filters is. There
are two differences: a value of another type doesn't meet the filter, where `SimpleVectorStore` raises; and `contains`,
`any` and `all` compare whole list members, or the whole value, never parts of a string, which `text_match` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from mrl_rag.errors import InvalidInput

Where: TypeAlias = dict[str, Any]

_ORDERS: dict[FilterOperator, Callable[[Any, Any], bool]] = {
    FilterOperator.GT: lambda stored, wanted: stored > wanted,
    FilterOperator.GTE: lambda stored, wanted: stored >= wanted,
    FilterOperator.LT: lambda stored, wanted: stored < wanted,
    FilterOperator.LTE: lambda stored, wanted: stored <= wanted,
}
_CHROMA_ORDERS = {
    FilterOperator.GT: "$gt",
    FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt",
    FilterOperator.LTE: "$lte",
}
_LISTS = (FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL)
_TEXTS = (FilterOperator.TEXT_MATCH, FilterOperator.TEXT_MATCH_INSENSITIVE)


@dataclass(frozen=True)
class Condition:
    """A filter, translated.

    Attributes:
        where: a condition in Chroma's language that every record meets which meets the filter; None where there is
            none.
        exact: whether `where` is met by those records only.
        meets: returns whether a record's metadata meets the filter.
    """

    where: Where | None
    exact: bool
    meets: Callable[[Mapping[str, Any]], bool]


def condition(filters: MetadataFilters | None) -> Condition | None:
    """Translate filters; None for no filters or an empty group.

    Raises:
        InvalidInput: an operator has a value of the wrong kind.
    """
    return None if filters is None else _condition(filters, negated=False)


def _condition(filters: MetadataFilters | MetadataFilter, negated: bool) -> Condition | None:
    if isinstance(filters, MetadataFilter):
        return _leaf(filters, negated)
    joined = filters.condition or FilterCondition.AND
    # NOT means none of them. By De Morgan's laws it is moved down to the single filters.
    found = [_condition(part, negated != (joined == FilterCondition.NOT)) for part in filters.filters]
    parts = [part for part in found if part is not None]
    return _join(parts, every=(joined == FilterCondition.OR) == negated) if parts else None


def _join(parts: Sequence[Condition], every: bool) -> Condition:
    wheres = [part.where for part in parts if part.where is not None]
    quantifier = all if every else any
    return Condition(
        _joined(wheres, every) if every or len(wheres) == len(parts) else None,
        all(part.exact for part in parts),
        lambda metadata: quantifier(part.meets(metadata) for part in parts),
    )


def _joined(wheres: Sequence[Where], every: bool) -> Where | None:
    if len(wheres) < 2:
        return wheres[0] if wheres else None
    return {"$and" if every else "$or": list(wheres)}


def _leaf(filter_: MetadataFilter, negated: bool) -> Condition:
    key, operator, wanted = filter_.key, FilterOperator(filter_.operator), filter_.value
    _check(filter_)

    def meets(metadata: Mapping[str, Any]) -> bool:
        return _meets(operator, metadata.get(key), wanted) != negated

    yes = not negated
    values = wanted if isinstance(wanted, list) else [wanted]
    # Chroma truncates a fractional number before comparing it with an integer: to it, 1 is not less than 1.5.
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        return Condition(None, False, meets)
    if operator in _CHROMA_ORDERS and isinstance(wanted, int | float) and yes:
        # In Chroma a boolean never equals a number; in Python True equals 1.
        bools = [value for value in (False, True) if _ORDERS[operator](value, wanted)]
        numbers: Where = {key: {_CHROMA_ORDERS[operator]: wanted}}
        return Condition(_joined([numbers, *({key: {"$eq": value}} for value in bools)], every=False), True, meets)
    if operator in (FilterOperator.EQ, FilterOperator.NE) and not isinstance(wanted, list):
        return Condition(_among(key, values, yes == (operator == FilterOperator.EQ)), True, meets)
    if operator in (FilterOperator.IN, FilterOperator.NIN):
        return Condition(_among(key, values, yes == (operator == FilterOperator.IN)), True, meets)
    if operator == FilterOperator.CONTAINS:
        return Condition(_holding(key, wanted, yes), True, meets)
    if operator in (FilterOperator.ANY, FilterOperator.ALL) and values:
        every = (operator == FilterOperator.ALL) == yes
        return Condition(_joined([_holding(key, value, yes) for value in values], every), True, meets)
    return Condition(None, False, meets)


def _among(key: str, values: Sequence[Any], yes: bool) -> Where | None:
    """Return a condition that the value is (or isn't) one of these; as in Python, 1 equals 1.0 and True."""
    by_type: dict[type, list[Any]] = {}
    for value in values:
        for equal in (value, bool(value)) if value in (0, 1) else (value,):
            by_type.setdefault(type(equal), []).append(equal)
    if not by_type:
        return {"$and": [{key: {"$eq": ""}}, {key: {"$ne": ""}}]} if yes else None
    return _joined([{key: {"$in" if yes else "$nin": equals}} for equals in by_type.values()], every=not yes)


def _holding(key: str, value: Any, yes: bool) -> Where:
    """Return a condition that the metadata is the value or a list that has it as a member; or that it isn't."""
    same = [value]
    if isinstance(value, int | float):
        # Chroma looks for an integer among integers only.
        same += [float(value)] if isinstance(value, int) else [int(value)] if value.is_integer() else []
        same += [bool(value)] if value in (0, 1) else []
    inside: list[Where] = [{key: {"$contains" if yes else "$not_contains": number}} for number in same]
    alone = _among(key, [value], yes)
    return {"$or" if yes else "$and": [*inside, alone]}


def _meets(operator: FilterOperator, stored: Any, wanted: Any) -> bool:
    if operator == FilterOperator.IS_EMPTY:
        return stored is None or stored in ("", [])
    if stored is None:
        return operator in (FilterOperator.NE, FilterOperator.NIN)
    if operator in (FilterOperator.EQ, FilterOperator.NE):
        return bool(stored == wanted) == (operator == FilterOperator.EQ)
    if operator in (FilterOperator.IN, FilterOperator.NIN):
        return (stored in wanted) == (operator == FilterOperator.IN)
    if operator in _ORDERS:
        alike = isinstance(stored, str) == isinstance(wanted, str) and not isinstance(stored, list)
        return alike and _ORDERS[operator](stored, wanted)
    if operator in _TEXTS:
        if not isinstance(stored, str):
            return False
        return wanted in stored if operator == FilterOperator.TEXT_MATCH else wanted.lower() in stored.lower()
    held = stored if isinstance(stored, list) else [stored]
    if operator == FilterOperator.CONTAINS:
        return wanted in held
    return (all if operator == FilterOperator.ALL else any)(value in held for value in wanted)


def _check(filter_: MetadataFilter) -> None:
    operator, value = FilterOperator(filter_.operator), filter_.value
    if operator == FilterOperator.IS_EMPTY:
        return
    if operator in _LISTS:
        wanted, right = "a list", isinstance(value, list)
    elif operator in _TEXTS:
        wanted, right = "a string", isinstance(value, str)
    elif operator in (FilterOperator.EQ, FilterOperator.NE):
        wanted, right = "a value; 'is_empty' asks for None", value is not None
    else:
        wanted, right = "a string or a number", isinstance(value, str | int | float)
    if any(part != part for part in (value if isinstance(value, list) else [value])):
        wanted, right = "no NaN, because nothing equals it", False
    if not right:
        raise InvalidInput(f"filter {filter_.key!r} {operator.value} {value!r}: this operator takes {wanted}.")
