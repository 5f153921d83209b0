"""Which records a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mrl_rag.evaluation import EncodedDataset
from mrl_rag.index import Record

if TYPE_CHECKING:
    from mrl_rag.index import TwoStageIndex

# More points hide each other, and make a page slow on a phone.
MAX_POINTS = 2_000

Item = TypeVar("Item")


def sample(records: Sequence[Record], most: int = MAX_POINTS, seed: int = 0) -> list[Record]:
    """Return the records with vectors, or so many of them, drawn at random, in their order.

    Args:
        records: records without a vector are left out.
        most: how many at most.
        seed: the same seed draws the same ones.
    """
    return _drawn([record for record in records if record.vector is not None], most, seed)


def index_records(index: TwoStageIndex, most: int = MAX_POINTS, seed: int = 0) -> list[Record]:
    """Return records of an index for a report, as `sample` draws them, reading no others."""
    return index.get(_drawn(index.ids(), most, seed))


def dataset_records(data: EncodedDataset) -> list[Record]:
    """Return the passages of a collection as records without metadata."""
    return [
        Record(id_, document, {}, vector)
        for id_, document, vector in zip(data.ids, data.documents, data.vectors, strict=True)
    ]


def _drawn(items: list[Item], most: int, seed: int) -> list[Item]:
    if len(items) <= most:
        return items
    rows = np.random.default_rng(seed).choice(len(items), most, replace=False)
    return [items[row] for row in sorted(rows)]
