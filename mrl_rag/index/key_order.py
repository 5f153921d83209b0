"""The order of metadata keys, which Chroma doesn't keep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any


class KeyOrders:
    """The order of the keys in each set of metadata keys that was stored; immutable.

    A set that isn't known gets its keys in the order in which they first occur in the known sets. Keys that none of
    those has come last, in alphabetical order.

    Args:
        text: JSON, a list of lists of keys, as the collection stores it; "" for none.
    """

    def __init__(self, text: str = "") -> None:
        self.text = text
        orders: list[list[str]] = json.loads(text or "[]")
        self._order_of = {frozenset(order): order for order in orders}
        self._rank = {key: rank for rank, key in enumerate(dict.fromkeys(chain.from_iterable(orders)))}

    def know(self, metadata: Mapping[str, Any]) -> bool:
        """Say whether the order of these keys is known; that of a single key always is."""
        return len(metadata) < 2 or frozenset(metadata) in self._order_of

    def sort(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata with its keys in the order they were stored in."""
        order = self._order_of.get(frozenset(metadata))
        if order is None:
            order = sorted(metadata, key=lambda key: (self._rank.get(key, len(self._rank)), key))
        return {key: metadata[key] for key in order}

    def adding(self, metadatas: Iterable[Mapping[str, Any]], room: int) -> KeyOrders:
        """Return these orders and those of more metadata, as many as fit into `room` bytes of text."""
        orders, size = dict(self._order_of), len(self.text.encode()) or len("[]")
        for metadata in metadatas:
            order = list(metadata)
            more = len(f"{json.dumps(order, ensure_ascii=False)}, ".encode())
            if len(order) > 1 and frozenset(order) not in orders and size + more <= room:
                orders[frozenset(order)] = order
                size += more
        return key_orders(json.dumps(list(orders.values()), ensure_ascii=False))


@lru_cache(maxsize=64)
def key_orders(text: str) -> KeyOrders:
    """Return the orders that a collection stores; each text is parsed once."""
    return KeyOrders(text)
