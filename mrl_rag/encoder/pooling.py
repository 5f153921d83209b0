"""From token vectors to one vector a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mrl_rag.encoder.loading import Pooling


def pool(hidden: torch.Tensor, lengths: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Pool right-padded token vectors.

    Args:
        hidden: [n, tokens, d], any float dtype; row i holds `lengths[i]` tokens, then padding.
        lengths: int64 [n], each at least 1.
        pooling: "mean", "cls" (first token) or "lasttoken".

    Returns:
        float32 [n, d]. Sums run in float32 whatever the dtype of `hidden`.
    """
    import torch

    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
    mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # [n, tokens]
    return (hidden.float() * mask[..., None]).sum(dim=1) / lengths[:, None]
