"""Which records share a colour."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from mrl_rag.index import Record

# More colours can't be told apart.
MOST = 8
OTHER, MISSING = "other values", "no value"


def group(records: Sequence[Record], key: str | None) -> tuple[list[str], list[str]]:
    """Group records by a metadata key.

    The commonest 8 values have a group each, and the rest are together. Numbers with more than 8 values make up to 5
    ranges with about as many records each.

    Args:
        records: n of them.
        key: of their metadata; None for no groups.

    Returns:
        The label of each record, "" without a key; and the labels in the order of a legend.
    """
    if key is None:
        return [""] * len(records), []
    values = [record.metadata.get(key) for record in records]
    if ranges := _ranges(values):
        labels = [MISSING if v is None else next(label for most, label in ranges if v <= most) for v in values]
        shown = [label for _, label in ranges]
    else:
        labels = [MISSING if value is None else shorten(str(value)) for value in values]
        shown = [label for label, _ in Counter(label for label in labels if label != MISSING).most_common(MOST)]
        labels = [label if label in {*shown, MISSING} else OTHER for label in labels]
    return labels, shown + [label for label in (OTHER, MISSING) if label in labels]


def telling_key(records: Sequence[Record]) -> str | None:
    """Return the key of texts whose commonest values, 2 to 8, are those of most records; None if of less than half.

    Of keys that say the same, such as a file's path and its hash, it is the one with the shortest values.
    """
    telling = []
    for key in {key for record in records for key, value in record.metadata.items() if isinstance(value, str)}:
        labels, shown = group(records, key)
        covered = sum(label not in (OTHER, MISSING) for label in labels)
        if len({*shown} - {OTHER, MISSING}) > 1 and covered > len(records) / 2:
            telling.append((-covered, sum(map(len, shown)), key))
    return min(telling)[-1] if telling else None


def shorten(text: str, cells: int = 28) -> str:
    """Return a text on one line, without control characters, in at most so many columns; Chinese letters take two."""
    printable = "".join(letter if letter.isprintable() or letter.isspace() else "\ufffd" for letter in text)
    line = " ".join(printable.split())
    return line if cell_len(line) <= cells else f"{set_cell_size(line, cells - 1).rstrip()}…"


def _ranges(values: Sequence[Any]) -> list[tuple[float, str]]:
    """Return the greatest number of each range and its label; none if the values aren't numbers, or are few."""
    given = [value for value in values if value is not None]
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in given):
        return []
    numbers = np.unique(given)
    if len(numbers) <= MOST:
        return []
    ends = np.unique(np.quantile(given, [0.2, 0.4, 0.6, 0.8, 1], method="inverted_cdf"))
    parts = np.split(numbers, np.searchsorted(numbers, ends[:-1], side="right"))
    return [(float(part[-1]), f"{_number(part[0])} to {_number(part[-1])}") for part in parts]


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
