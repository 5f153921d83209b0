"""transformers: what its networks keep in attributes that are not documented."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TESTED = ">=5.23,<5.24"

# Networks with a decoder of which sentence-transformers loads the encoder alone. `AutoModelForTextEncoding` knows T5
# and its kin; of others, such as BART, the decoder's states are taken.
_ENCODER_CLASSES = {
    "blenderbot": "BlenderbotEncoder",
    "blenderbot-small": "BlenderbotSmallEncoder",
    "longt5": "LongT5EncoderModel",
    "m2m_100": "M2M100Encoder",
    "marian": "MarianEncoder",
    "pegasus": "PegasusEncoder",
    "pegasus_x": "PegasusXEncoder",
    "prophetnet": "ProphetNetEncoder",
    "switch_transformers": "SwitchTransformersEncoderModel",
}


def encoder_class(config: Any) -> Any:
    """Return the class that loads a network's encoder alone; None where `AutoModel` is right.

    Raises:
        ImportError: this version of transformers has the class under another name; `AutoModel` would give the
            decoder's states.
    """
    name = _ENCODER_CLASSES.get(config.model_type)
    if name is None:
        return None
    modeling = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    try:
        return getattr(modeling, name)
    except AttributeError as error:
        raise ImportError(f"this version of transformers has no {name}") from error


def count_positions(network: torch.nn.Module) -> tuple[int | None, int]:
    """Return the padding token that positions are counted from, and how many positions there are.

    RoBERTa and its kin give padding tokens no position and start at the padding token's id + 1; others start at 0. A
    network without a table of positions under a name that is known has 2**31.
    """
    import torch

    for name, table in network.named_modules():
        if isinstance(table, torch.nn.Embedding) and name.endswith("position_embeddings"):
            padding = table.padding_idx
            return padding, table.num_embeddings - (0 if padding is None else padding + 1)
        if isinstance(table, torch.nn.Embedding) and name.endswith(("embed_positions", "wpe")):
            return None, table.num_embeddings - int(getattr(table, "offset", 0))
    return None, 2**31


class BatchDependence:
    """Keeps a text's vector independent of the texts that are encoded with it and before it.

    Two kinds of network need that; all others, and these where a version keeps its state otherwise, are left alone.
    Dynamic rotary scaling (NTK): past the training length, transformers computes the angles from the longest sequence
    of a batch, and goes on with them for shorter ones later. BigBird: the first short batch ends its block-sparse
    attention for good, and which tokens a long sequence attends to depends on the longest of its batch.

    Args:
        network: any network.

    Attributes:
        key: length of a sequence -> a number that sequences must share to share a forward pass; None where all may.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        modules: list[Any] = list(network.modules())
        self._rotary = [
            module
            for module in modules
            if "dynamic" in (getattr(module, "rope_type", None) or ()) and hasattr(module, "original_inv_freq")
        ]
        # The outermost of nested modules: its `set_attention_type` switches the others.
        self._sparse = next((m for m in modules if getattr(m, "attention_type", None) == "block_sparse"), None)
        self.key: Callable[[int], int] | None = None
        if self._rotary:
            limit = min(module.original_max_seq_len for module in self._rotary)
            self.key = lambda length: max(length, limit)
        elif self._sparse is not None:
            self.key = self._blocks

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Split a batch into groups that may share a forward pass.

        Args:
            lengths: tokens per sequence.

        Returns:
            Positions into `lengths`, each exactly once.
        """
        groups: dict[int, list[int]] = {}
        for position, length in enumerate(lengths):
            groups.setdefault(self.key(length) if self.key else 0, []).append(position)
        return list(groups.values())

    def prepare(self, length: int) -> None:
        """Undo what earlier batches left behind, before a batch whose longest sequence has `length` tokens."""
        for module in self._rotary:
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len
        if self._sparse is not None:
            self._sparse.set_attention_type("block_sparse" if self._blocks(length) else "original_full")

    def _blocks(self, length: int) -> int:
        """Return the number of blocks in a sequence, 0 where BigBird attends to all of it."""
        config: Any = self._sparse.config  # type: ignore[union-attr]
        if length <= (5 + 2 * config.num_random_blocks) * config.block_size:
            return 0
        return -(-length // int(config.block_size))
