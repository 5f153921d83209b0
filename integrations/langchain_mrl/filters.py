"""Filters: LangChain's plain dicts in the form that Chroma takes."""

from __future__ import annotations

from typing import Any

from mrl_rag.errors import InvalidInput

Filter = dict[str, Any]


def chroma_where(filter: Filter | None) -> Filter | None:
    """Return a filter as Chroma's `where`: one key and one operator per dict, `$and` and `$or` of two or more.

    Args:
        filter: a dict of any number of keys, and of operators per key; all must be met. None or {} for no condition.

    Raises:
        InvalidInput: `filter` is not a dict. Whether Chroma knows the operators is checked by the index.
    """
    if not filter:
        return None
    if not isinstance(filter, dict):
        raise InvalidInput(
            f"filter is {filter!r}; it must be a dict, as in {{'page': 1}} or {{'page': {{'$gte': 1}}}}."
        )
    parts: list[Filter] = []
    for key, value in filter.items():
        if key in ("$and", "$or") and isinstance(value, list) and value:
            inner: list[Any] = [chroma_where(each) for each in value]
            parts.append(inner[0] if len(inner) == 1 else {key: inner})
        elif isinstance(value, dict) and len(value) > 1:
            parts += [{key: {operator: operand}} for operator, operand in value.items()]
        else:
            parts.append({key: value})
    return parts[0] if len(parts) == 1 else {"$and": parts}
