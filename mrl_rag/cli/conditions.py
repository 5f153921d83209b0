"""Conditions and lists of numbers, as they are typed in a shell."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

from mrl_rag.errors import InvalidInput

_OPERATORS = {"=": "$eq", "!=": "$ne", "<": "$lt", "<=": "$lte", ">": "$gt", ">=": "$gte"}
_AMONG = {"=": "$in", "!=": "$nin"}
_CONDITION = re.compile(r"\s*([^=!<>]+?)\s*(!=|<=|>=|=|<|>)(.*)", re.DOTALL)


def parse_where(conditions: Sequence[str]) -> dict[str, Any] | None:
    """Return a condition in Chroma's language: all of `conditions` must hold; None for none.

    Args:
        conditions: "page=3", "year>=2020", "draft!=true". What looks like a number, true or false is one; quotes make a
            string of it: "zip='01234'". A path may be relative to the current folder.

    Raises:
        InvalidInput: one is not of that form, or compares the order of strings.
    """
    parsed = [_parse(condition) for condition in conditions]
    return None if not parsed else parsed[0] if len(parsed) == 1 else {"$and": parsed}


def _parse(condition: str) -> dict[str, Any]:
    found = _CONDITION.fullmatch(condition)
    if found is None:
        raise InvalidInput(f"--where is {condition!r}; write KEY=VALUE, such as page=3, or with !=, <, <=, > or >=.")
    key, operator, value = found[1], found[2], _value(found[3].strip())
    if key == "path" and operator in _AMONG and isinstance(value, str):
        # `index` stores absolute paths, and `search` prints those below the current folder as relative ones.
        return {key: {_AMONG[operator]: [value, os.path.abspath(value)]}}
    if operator in ("<", "<=", ">", ">=") and not _is_number(value):
        raise InvalidInput(f"--where is {condition!r}; {operator} compares numbers, and {found[3]!r} is none.")
    return {key: {_OPERATORS[operator]: value}}


def _value(text: str) -> str | int | float | bool:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            number: int | float = kind(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    return text


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_integers(option: str, text: str) -> list[int]:
    """Return the numbers of "256,64".

    Raises:
        InvalidInput: a part is not an integer.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInput(f"{option} is {text!r}; it must be integers with commas between, as in 256,64.") from None
