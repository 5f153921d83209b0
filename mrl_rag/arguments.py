"""Checks of arguments that every room needs."""

from __future__ import annotations

import numbers
from collections.abc import Collection

from mrl_rag.errors import InvalidInput


def is_integer(value: object, least: int, most: int | None = None) -> bool:
    """Say whether a value is an integer from `least` to `most`; NumPy's integers are, `True` and `False` are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return False
    return least <= int(value) and (most is None or int(value) <= most)


def check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return `value` as an int when it is an integer from `least` to `most`.

    Raises:
        InvalidInput: it is not.
    """
    if not is_integer(value, least, most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidInput(f"{name} is {value!r}; it must be an integer {limits}. Pass one, or leave it out.")
    return int(value)  # type: ignore[call-overload, no-any-return]


def check_names(given: Collection[str], known: Collection[str], owner: str) -> None:
    """Refuse arguments that were passed by name and that `owner` doesn't have.

    Raises:
        InvalidInput: there is one; the message lists those that `owner` has.
    """
    if unknown := sorted(set(given) - set(known)):
        raise InvalidInput(
            f"{owner} has no argument {', '.join(map(repr, unknown))}. It takes {', '.join(sorted(known))}."
        )
