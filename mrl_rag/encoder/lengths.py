"""Networks in which a text's vector would depend on the lengths of the texts beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class OwnLengths:
    """Gives each text the vector that it gets alone on a fresh network, whatever is encoded beside and before it.

    Dynamic rotary scaling (NTK): past the length of the training, transformers computes the angles from the longest row
    of a batch, and goes on with them for shorter rows later. BigBird: the first short batch ends its block-sparse
    attention for good, and which tokens a long row attends to follows the length of its batch.

    Args:
        network: any network; most have nothing of the kind.

    Attributes:
        alike: the length of a row -> what rows have in common that may share a forward pass; None where all may.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        modules: list[Any] = list(network.modules())
        self._rotary = [module for module in modules if "dynamic" in (getattr(module, "rope_type", None) or ())]
        # Of those that hold one another, the outermost switches the others.
        self._sparse = next((m for m in modules if getattr(m, "attention_type", None) == "block_sparse"), None)
        self.alike: Callable[[int], int] | None = None
        if self._rotary:
            limit = min(module.original_max_seq_len for module in self._rotary)
            self.alike = lambda length: max(length, limit)
        elif self._sparse is not None:
            self.alike = self._blocks

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Split a batch into those that may share a forward pass.

        Args:
            lengths: tokens of each row.

        Returns:
            Positions into `lengths`, each exactly once; one group where the network needs no care.
        """
        groups: dict[int, list[int]] = {}
        for position, length in enumerate(lengths):
            groups.setdefault(self.alike(length) if self.alike else 0, []).append(position)
        return list(groups.values())

    def prepare(self, length: int) -> None:
        """Forget the lengths of earlier batches, before one whose longest row has so many tokens."""
        for module in self._rotary:
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len
        if self._sparse is not None:
            self._sparse.set_attention_type("block_sparse" if self._blocks(length) else "original_full")

    def _blocks(self, length: int) -> int:
        """Return how many blocks a row has, 0 where BigBird attends to all of it."""
        config: Any = self._sparse.config  # type: ignore[union-attr]
        if length <= (5 + 2 * config.num_random_blocks) * config.block_size:
            return 0
        return -(-length // int(config.block_size))
