"""From token vectors to one vector a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mrl_rag.encoder.loading import Pooling


def pool(
    hidden: torch.Tensor, lengths: torch.Tensor, poolings: Sequence[Pooling], skips: torch.Tensor | None = None
) -> torch.Tensor:
    """Pool the token vectors of sequences that lie end to end.

    Args:
        hidden: [tokens, d], any float dtype.
        lengths: int64 [n], each at least 1; they add up to `tokens`.
        poolings: "mean", "mean_sqrt_len_tokens" (the sum by the root of the length), "weightedmean" (a token weighs
            its place in the sequence, 1 the first), "max", "cls" (first token) or "lasttoken". The vectors of several
            are joined.
        skips: int64 [n], how many of a sequence's first tokens are left out; None for none. Where they are all of it,
            "cls" takes the first token, as sentence-transformers does, and the others give zeros.

    Returns:
        float32 [n, d * len(poolings)]. Sums run in float32 whatever the dtype of `hidden`.
    """
    import torch

    parts = [_pool(hidden, lengths, pooling, skips) for pooling in poolings]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _pool(hidden: torch.Tensor, lengths: torch.Tensor, pooling: Pooling, skips: torch.Tensor | None) -> torch.Tensor:
    import torch

    starts = lengths.cumsum(0) - lengths
    left = lengths if skips is None else lengths - skips
    if pooling == "cls":
        return hidden[starts if skips is None else starts + torch.where(left > 0, skips, 0)].float()
    if pooling == "lasttoken":
        return hidden[starts + lengths - 1].float().masked_fill((left <= 0)[:, None], 0)
    owners = None
    if len(lengths) > 1:
        owners = torch.arange(len(lengths), device=hidden.device)
        owners = owners.repeat_interleave(lengths, output_size=len(hidden))  # [tokens]
    tokens = hidden.float()
    places = torch.arange(1, len(hidden) + 1, device=hidden.device)[:, None] - _spread(starts, owners)[:, None]
    if skips is not None:
        dropped = places <= _spread(skips, owners)[:, None]
        tokens = tokens.masked_fill(dropped, -torch.inf if pooling == "max" else 0)
        places = places.masked_fill(dropped, 0)
    if pooling == "max":
        return _largest(tokens, owners, len(lengths)).masked_fill((left <= 0)[:, None], 0)
    share = left[:, None]
    if pooling == "weightedmean":
        tokens, share = tokens * places, _sums(places, owners, len(lengths))
    share = share.clamp(min=1)
    return _sums(tokens, owners, len(lengths)) / (share.sqrt() if pooling == "mean_sqrt_len_tokens" else share)


def _spread(values: torch.Tensor, owners: torch.Tensor | None) -> torch.Tensor:
    """Give each token its sequence's value."""
    return values if owners is None else values[owners]


def _sums(values: torch.Tensor, owners: torch.Tensor | None, count: int) -> torch.Tensor:
    # `index_add_` would wake torch's threads, and while they wait for more they keep OpenVINO's off the cores.
    if owners is None:
        return values.sum(0, keepdim=True)
    return values.new_zeros(count, values.shape[1]).index_add_(0, owners, values)


def _largest(values: torch.Tensor, owners: torch.Tensor | None, count: int) -> torch.Tensor:
    if owners is None:
        return values.amax(0, keepdim=True)
    found = values.new_full((count, values.shape[1]), -float("inf"))
    return found.scatter_reduce_(0, owners[:, None].expand_as(values), values, "amax")
