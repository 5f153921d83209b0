"""Attention over sequences packed end to end, for every network that follows transformers' attention interface."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mrl_rag.encoder.batching import Packing

PACKED = "mrl_rag_packed"
# Its `made` is set by each call, per thread: some networks accept a `packing` and ignore it.
CALLS = threading.local()
# Arguments of some networks that this attention doesn't implement: such networks get padded batches.
_UNSUPPORTED = ("position_bias", "softcap", "s_aux", "head_mask")


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence only; a function for transformers' attention interface, whose arguments it takes.

    Args:
        module: the attention layer; its `is_causal` says whether a token attends to what follows it.
        query: [1, heads, tokens, head_dim], the sequences of `packing` end to end.
        key: [1, key_heads, tokens, head_dim].
        value: [1, key_heads, tokens, head_dim].
        attention_mask: must be None; `packing` replaces it.
        packing: where the sequences are; it was passed to the network's forward.
        scaling: of the scores; None for 1 / sqrt(head_dim).
        sliding_window: a token attends to those less than this far away; None for all.
        is_causal: overrides the module's own.
        settings: the network's other arguments.

    Returns:
        [1, tokens, heads, head_dim], and None for the weights.

    Raises:
        NotImplementedError: the network needs something this attention lacks.
    """
    CALLS.made = True
    unsupported = [name for name in _UNSUPPORTED if settings.get(name) is not None]
    if unsupported or attention_mask is not None:
        raise NotImplementedError(f"packed attention has no {', '.join(unsupported) or 'attention_mask'}")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    shared: dict[str, Any] = {"scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    if query.is_cuda:
        return _varlen(query, key, value, packing, sliding_window, causal, shared), None
    parts, found = (query, key, value), []
    for start, count, length in packing.groups:
        end = start + count * length
        # Sequences of one length are a batch without a copy: [count, heads, length, head_dim].
        q, k, v = (part[0, :, start:end].view(-1, count, length, part.shape[3]).transpose(0, 1) for part in parts)
        if sliding_window is None or length <= sliding_window:
            attended = scaled_dot_product_attention(q, k, v, is_causal=causal, **shared)
        else:
            attended = _windowed(q, k, v, sliding_window, causal, shared)
        found.append(attended.transpose(1, 2).flatten(0, 1))  # [tokens, heads, head_dim]
    return (torch.cat(found) if len(found) > 1 else found[0])[None], None


def _windowed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, causal: bool, shared: dict[str, Any]
) -> torch.Tensor:
    """Attend window by window, so that the cost grows with the length and not with its square."""
    length = query.shape[2]
    found = torch.empty_like(query[..., : value.shape[3]])
    for start in range(0, length, window):
        end = min(start + window, length)
        first, last = max(start - window + 1, 0), end if causal else min(end + window - 1, length)
        ahead = torch.arange(first, last) - torch.arange(start, end)[:, None]  # [queries, keys]
        mask = ((ahead <= 0) if causal else (ahead < window)) & (ahead > -window)
        found[:, :, start:end] = scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, first:last], value[:, :, first:last], attn_mask=mask, **shared
        )
    return found


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    window: int | None,
    causal: bool,
    shared: dict[str, Any],
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    side = -1 if window is None else window - 1
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [tokens, heads, head_dim]
    offsets, longest = packing.offsets, packing.longest
    sides = (side, 0 if causal else side)
    found: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=sides, **shared)
    attended: torch.Tensor = found[None]
    return attended


AttentionInterface.register(PACKED, packed_attention)
