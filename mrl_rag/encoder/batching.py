"""Which sequences share a forward pass, and how they lie in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


class TokenSequence(NamedTuple):
    """The tokens of one text, or of one piece of a long text.

    Attributes:
        ids: token ids, special tokens among them.
        prompt_length: how many of the first tokens are a prompt to leave out of pooling; 0 where the prompt is pooled.
        type_ids: token types; None where all are 0.
    """

    ids: Sequence[int] | npt.NDArray[np.int32]
    prompt_length: int = 0
    type_ids: Sequence[int] | npt.NDArray[np.int32] | None = None


class Packing(NamedTuple):
    """Where sequences lie that are packed end to end, without padding.

    Attributes:
        groups: runs of sequences of one length: (first token, number of sequences, length).
        offsets: int32 [n + 1], the first token of each sequence and the end of the last, on the network's device.
        longest: tokens of the longest sequence.
    """

    groups: list[tuple[int, int, int]]
    offsets: torch.Tensor
    longest: int


def length_groups(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the runs of sequences of one length, as `Packing.groups` has them."""
    groups = []
    start = 0
    for length, same in groupby(lengths):
        count = sum(1 for _ in same)
        groups.append((start, count, length))
        start += count * length
    return groups


def token_batches(lengths: Sequence[int], token_budget: int, *, padded: bool = True) -> Iterator[list[int]]:
    """Group sequences of similar length into batches that fit a token budget.

    Args:
        lengths: tokens per sequence.
        token_budget: most tokens per batch. A longer sequence is a batch of its own.
        padded: count the padding that takes each sequence to the length of its batch's longest.

    Yields:
        Positions into `lengths`, each exactly once, longest sequences first: a batch too large for memory
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
