"""From token vectors to one vector per text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mrl_rag.encoder.recipe import Pooling


def pool(
    hidden: torch.Tensor, lengths: torch.Tensor, poolings: Sequence[Pooling], prompt_lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Pool the token vectors of sequences that lie end to end.

    Args:
        hidden: [tokens, d], any float dtype.
        lengths: int64 [n], each at least 1; they add up to `tokens`.
        poolings: "mean", "mean_sqrt_len_tokens" (the sum divided by the root of the length), "weightedmean" (weights
            1, 2, 3, ... along the sequence), "max", "cls" (first token) or "lasttoken". The vectors of several
            are concatenated.
        prompt_lengths: int64 [n], how many of a sequence's first tokens are left out; None for none. Where they are
            the whole sequence, "cls" takes the first token, as sentence-transformers does, and the others give zeros.

    Returns:
        float32 [n, d * len(poolings)]. Sums run in float32 whatever the dtype of `hidden`.
    """
    import torch

    parts = [_pool(hidden, lengths, pooling, prompt_lengths) for pooling in poolings]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _pool(
    hidden: torch.Tensor, lengths: torch.Tensor, pooling: Pooling, prompt_lengths: torch.Tensor | None
) -> torch.Tensor:
    import torch

    starts = lengths.cumsum(0) - lengths
    pooled = lengths if prompt_lengths is None else lengths - prompt_lengths  # how many tokens are pooled
    if pooling == "cls":
        return hidden[starts if prompt_lengths is None else starts + torch.where(pooled > 0, prompt_lengths, 0)].float()
    if pooling == "lasttoken":
        return hidden[starts + lengths - 1].float().masked_fill((pooled <= 0)[:, None], 0)
    sequence = None  # of each token, [tokens]
    if len(lengths) > 1:
        sequence = torch.arange(len(lengths), device=hidden.device)
        sequence = sequence.repeat_interleave(lengths, output_size=len(hidden))
    tokens = hidden.float()
    places = torch.arange(1, len(hidden) + 1, device=hidden.device)[:, None] - _per_token(starts, sequence)[:, None]
    if prompt_lengths is not None:
        dropped = places <= _per_token(prompt_lengths, sequence)[:, None]
        tokens = tokens.masked_fill(dropped, -torch.inf if pooling == "max" else 0)
        places = places.masked_fill(dropped, 0)
    if pooling == "max":
        return _largest(tokens, sequence, len(lengths)).masked_fill((pooled <= 0)[:, None], 0)
    weight = pooled[:, None]
    if pooling == "weightedmean":
        tokens, weight = tokens * places, _sums(places, sequence, len(lengths))
    weight = weight.clamp(min=1)
    return _sums(tokens, sequence, len(lengths)) / (weight.sqrt() if pooling == "mean_sqrt_len_tokens" else weight)


def _per_token(values: torch.Tensor, sequence: torch.Tensor | None) -> torch.Tensor:
    """Give each token its sequence's value."""
    return values if sequence is None else values[sequence]


def _sums(values: torch.Tensor, sequence: torch.Tensor | None, count: int) -> torch.Tensor:
    # Not `index_add_` for one sequence: it wakes torch's threads, which then keep OpenVINO's off the cores.
    if sequence is None:
        return values.sum(0, keepdim=True)
    return values.new_zeros(count, values.shape[1]).index_add_(0, sequence, values)


def _largest(values: torch.Tensor, sequence: torch.Tensor | None, count: int) -> torch.Tensor:
    if sequence is None:
        return values.amax(0, keepdim=True)
    found = values.new_full((count, values.shape[1]), -float("inf"))
    return found.scatter_reduce_(0, sequence[:, None].expand_as(values), values, "amax")
