"""From token vectors to one vector a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mrl_rag.encoder.loading import Pooling


def pool(
    hidden: torch.Tensor, lengths: torch.Tensor, pooling: Pooling, skips: torch.Tensor | None = None
) -> torch.Tensor:
    """Pool the token vectors of sequences that lie end to end.

    Args:
        hidden: [tokens, d], any float dtype.
        lengths: int64 [n], each at least 1; they add up to `tokens`.
        pooling: "mean", "cls" (first token) or "lasttoken".
        skips: int64 [n], how many of a sequence's first tokens are left out; None for none. Where they are all of it,
            the answer is sentence-transformers': the first token for "cls", else zeros.

    Returns:
        float32 [n, d]. Sums run in float32 whatever the dtype of `hidden`.
    """
    import torch

    starts = lengths.cumsum(0) - lengths
    left = lengths if skips is None else lengths - skips
    if pooling == "cls":
        return hidden[starts if skips is None else starts + torch.where(left > 0, skips, 0)].float()
    if pooling == "lasttoken":
        return hidden[starts + lengths - 1].float().masked_fill((left <= 0)[:, None], 0)
    if len(lengths) == 1:
        # `index_add_` would wake torch's threads, and while they wait for more they keep OpenVINO's off the cores.
        return hidden[0 if skips is None else int(skips[0]) :].float().sum(0, keepdim=True) / left.clamp(min=1)
    rows = torch.arange(len(lengths), device=hidden.device)
    owners = rows.repeat_interleave(lengths, output_size=len(hidden))  # [tokens]
    hidden = hidden.float()
    if skips is not None:
        positions = torch.arange(len(hidden), device=hidden.device)
        hidden = hidden.masked_fill((positions < (starts + skips)[owners])[:, None], 0)
    sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add_(0, owners, hidden)
    return sums / left.clamp(min=1)[:, None]
