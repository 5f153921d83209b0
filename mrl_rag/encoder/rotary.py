"""Rotary positions whose angles follow the length of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class DynamicRotary:
    """Keeps a network with dynamic rotary scaling (NTK) true to each text's own length.

    Past the length of the training, transformers computes the angles from the longest row of a batch, and goes on with
    them for shorter rows later: a vector would depend on what was encoded beside and before it. Here every text gets
    the angles it gets alone on a fresh network.

    Args:
        network: any network; most have nothing of the kind.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self._modules: list[Any] = [
            module for module in network.modules() if "dynamic" in (getattr(module, "rope_type", None) or ())
        ]
        self._limit: int = min((module.original_max_seq_len for module in self._modules), default=0)

    @property
    def changes(self) -> bool:
        """Whether the angles depend on the length of the input."""
        return bool(self._modules)

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Split a batch into those that may share a forward pass.

        Args:
            lengths: tokens of each row.

        Returns:
            Positions into `lengths`, each exactly once; one group where the network needs no care.
        """
        if not self.changes:
            return [list(range(len(lengths)))]
        groups: dict[int, list[int]] = {}
        for position, length in enumerate(lengths):
            groups.setdefault(max(length, self._limit), []).append(position)
        return list(groups.values())

    def reset(self) -> None:
        """Forget the lengths of earlier batches."""
        for module in self._modules:
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len
