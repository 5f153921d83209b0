"""Which texts share a forward pass, and how they lie in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


class Row(NamedTuple):
    """One sequence for the network.

    Attributes:
        ids: token ids, special tokens among them.
        skip: how many of the first are the prompt's, to be left out of pooling; 0 where the prompt is pooled.
        types: token types; None where all are 0.
    """

    ids: Sequence[int] | npt.NDArray[np.int32]
    skip: int = 0
    types: Sequence[int] | npt.NDArray[np.int32] | None = None


class Packing(NamedTuple):
    """Where sequences lie that are packed end to end, without padding.

    Attributes:
        groups: neighbours of one length: (first token, how many sequences, length).
        offsets: int32 [n + 1], the first token of each sequence and the end of the last, on the network's device.
        longest: tokens of the longest sequence.
    """

    groups: list[tuple[int, int, int]]
    offsets: torch.Tensor
    longest: int


def length_groups(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return neighbours of one length, as `Packing.groups` has them."""
    groups = []
    start = 0
    for length, same in groupby(lengths):
        count = sum(1 for _ in same)
        groups.append((start, count, length))
        start += count * length
    return groups


def token_batches(lengths: Sequence[int], token_budget: int, *, padded: bool = True) -> Iterator[list[int]]:
    """Group texts of like length so that each batch fits a token budget.

    Args:
        lengths: tokens of each text.
        token_budget: most tokens in a batch. A longer text is a batch of its own.
        padded: count each text with the padding that takes it to the length of its batch's longest.

    Yields:
        Positions into `lengths`, each exactly once, longest texts first: a batch too large for memory
        then fails at the start of the work and not at its end.
    """
    batch: list[int] = []
    tokens = 0
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost = lengths[batch[0]] if batch and padded else lengths[position]
        if batch and tokens + cost > token_budget:
            yield batch
            batch, tokens, cost = [], 0, lengths[position]
        batch.append(position)
        tokens += cost
    if batch:
        yield batch
