"""Token rows in, pooled vectors out: a model's network on its device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mrl_rag.encoder.attention import PACKED
from mrl_rag.encoder.batching import Packing, Row, length_groups
from mrl_rag.encoder.graphs import Recorded, filled_up
from mrl_rag.encoder.lengths import OwnLengths
from mrl_rag.encoder.linear import can_prepack, prepack, unpack
from mrl_rag.encoder.loading import Recipe, load_network
from mrl_rag.encoder.openvino import OpenVINONetwork
from mrl_rag.encoder.pooling import pool
from mrl_rag.encoder.steps import load_steps
from mrl_rag.errors import EncoderOutOfMemory, InvalidInput
from mrl_rag.truncation import Float32Array

if TYPE_CHECKING:
    from mrl_rag.encoder.encoder import Backend

_LOG = logging.getLogger("mrl_rag")
# Most tokens that OpenVINO is given: of more, torch is as fast (benchmarks/README.md).
_SHORT = 128
# How far packed vectors may be from padded ones, and a CUDA graph's from those without, in cosine distance: far above
# rounding, far below a wrong mask.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


class Network:
    """A network, pooling, and the modules after it.

    Sequences are packed end to end where the network takes that, and padded to the longest elsewhere. A short one alone
    takes the way that answers soonest: OpenVINO where it is asked for; on a GPU a CUDA graph, recorded when the first
    of about its length comes; otherwise linear layers with a second copy of their weights.

    Args:
        folder: the model's folder.
        recipe: what `read_recipe` read there.
        device: where it runs.
        dtype: number format of the network.
        trust_remote_code: let the folder run code of its own.
        pad_id: the token that pads.
        sample: rows of different lengths, to try packing and OpenVINO on.
        backend: what runs short sequences that come alone: "torch" or "openvino".

    Attributes:
        module: the network itself.
        packs: whether sequences need no padding.
        full_dim: length of a vector.
        positions: most tokens that a table of positions has room for; 2**31 where there is no such table.

    Raises:
        InvalidInput: OpenVINO can't run the network.
        ModelFilesError: as `load_network` and `load_steps`.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        *,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool,
        pad_id: int,
        sample: Sequence[Row],
        backend: Backend = "torch",
    ) -> None:
        # OpenVINO makes its own bfloat16.
        loaded = dtype if backend == "torch" else torch.float32
        module: Any = load_network(folder, recipe, dtype=loaded, trust_remote_code=trust_remote_code)
        self.module = module.to(device)
        self._device = device
        self._poolings = recipe.poolings
        self._pad_id = pad_id
        self._lengths = OwnLengths(module)
        steps, self.full_dim = load_steps(folder, recipe.steps, module.config.hidden_size * len(recipe.poolings))
        self._steps = steps.to(device)
        self._typed = "token_type_ids" in signature(module.forward).parameters
        self._padding, self.positions = _count_positions(module)
        # A plain function: a method bound to `self` would keep the weights alive after the last reference to it.
        self._states = Network._padded
        # CUDA graphs by their tokens; None where recording failed.
        self._graphs: dict[int, Recorded | None] = {}
        self._records = False
        self._openvino: OpenVINONetwork | None = None
        if backend == "openvino":
            self._openvino = self._converted(sample, dtype)
        if device.type == "cpu" and self._openvino is None and can_prepack(self.module, dtype):
            self._try_prepacking(sample)
        if device.type == "cpu" or (device.type == "cuda" and dtype != torch.float32):
            self._try_packing(sample)
        self.packs = self._states is not Network._padded
        self._records = device.type == "cuda" and self.packs and self._lengths.alike is None

    def run(self, rows: Sequence[Row]) -> Float32Array:
        """Return the vectors of rows, float32 [n, full_dim].

        Where memory doesn't suffice, they run in halves, down to one row.

        Raises:
            EncoderOutOfMemory: one row alone does not fit.
        """
        try:
            return self._forward(rows)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            known = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not known and "can't allocate memory" not in str(error):
                raise
            if len(rows) == 1:
                raise EncoderOutOfMemory(
                    f"a text of {len(rows[0].ids)} tokens alone does not fit the memory of {self._device}: {error} "
                    "Lower max_length, or free memory there."
                ) from error
        # Outside of `except`: the error holds on to the tensors that did not fit.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(rows) // 2
        return np.concatenate([self.run(rows[:half]), self.run(rows[half:])])

    def _forward(self, rows: Sequence[Row]) -> Float32Array:
        groups = self._lengths.groups([len(row.ids) for row in rows])
        if len(groups) > 1:
            vectors = np.empty((len(rows), self.full_dim), dtype=np.float32)
            for group in groups:
                vectors[group] = self._forward([rows[i] for i in group])
            return vectors
        self._lengths.prepare(max(len(row.ids) for row in rows))
        with torch.inference_mode():
            if len(rows) == 1:
                if self._openvino is not None and len(rows[0].ids) <= _SHORT and rows[0].types is None:
                    return self._by_openvino(self._openvino, rows[0])
                recorded = self._by_graph(rows[0]) if self._records else None
                if recorded is not None:
                    return recorded
            return self._finished(rows, *self._states(self, rows))

    def _finished(self, rows: Sequence[Row], hidden: torch.Tensor, lengths: torch.Tensor) -> Float32Array:
        """Return the vectors of rows, float32 [n, full_dim], whose hidden states [tokens, d] are given."""
        skips = self._put([row.skip for row in rows]) if any(row.skip for row in rows) else None
        found: Float32Array = self._steps(pool(hidden, lengths, self._poolings, skips)).cpu().numpy()
        return found

    def _by_openvino(self, network: OpenVINONetwork, row: Row) -> Float32Array:
        """Return the vector of a row, float32 [1, full_dim], by OpenVINO."""
        hidden = network(np.array([row.ids], dtype=np.int64))[0]
        return self._finished([row], hidden, torch.tensor([len(row.ids)]))

    def _by_graph(self, row: Row) -> Float32Array | None:
        """Return the vector of a row, float32 [1, full_dim], by a CUDA graph; None where there is none for it."""
        rows = filled_up(row, self._pad_id, self.positions)
        if rows is None or row.skip or row.types is not None:
            return None
        inputs, counts = self._joined(rows), [len(row.ids) for row in rows]
        size = sum(counts)
        if size not in self._graphs:
            self._graphs[size] = None

            def compute(inputs: torch.Tensor) -> torch.Tensor:
                # Others that come through this graph may be longer.
                vectors: torch.Tensor = self._steps(pool(*self._packed_states(inputs, counts, size), self._poolings))
                return vectors

            try:
                others = [other for other in self._graphs.values() if other is not None]
                new = Recorded(compute, inputs, self._device, *others[:1])
                if _distance(new(inputs)[:1], self._forward([row])) < _TOLERANCE[self.module.dtype]:
                    self._graphs[size] = new
            except RuntimeError as error:
                _LOG.info("no CUDA graph of %d tokens for a %s: %s", size, type(self.module).__name__, error)
        graph = self._graphs[size]
        return None if graph is None else graph(inputs)[:1]

    def _packed(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states [tokens, d] of the rows end to end, and their lengths."""
        counts = [len(row.ids) for row in rows]
        types = self._types(rows)
        more = {} if types is None else {"token_type_ids": self._put(types[None])}
        return self._packed_states(self._put(self._joined(rows)), counts, max(counts), **more)

    def _joined(self, rows: Sequence[Row]) -> npt.NDArray[np.int64]:
        """Return token ids, their positions and the rows' lengths in one array, to be copied at once."""
        ids = np.concatenate([row.ids for row in rows])
        places = np.concatenate([self._places(np.asarray(row.ids)) for row in rows])
        return np.concatenate([ids, places, [len(row.ids) for row in rows]]).astype(np.int64)

    def _places(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Return the positions of a row's tokens, int64 [tokens], as the network itself would count them."""
        if self._padding is None:
            return np.arange(len(ids))
        counted = ids != self._padding
        places: npt.NDArray[np.int64] = np.cumsum(counted) * counted + self._padding
        return places

    def _types(self, rows: Sequence[Row]) -> npt.NDArray[np.int64] | None:
        """Return the rows' token types end to end, None where the network needs none: all are 0, or it takes none."""
        if not self._typed or all(row.types is None for row in rows):
            return None
        types = [np.zeros(len(row.ids)) if row.types is None else row.types for row in rows]
        return np.concatenate(types).astype(np.int64)

    def _packed_states(
        self, inputs: torch.Tensor, counts: Sequence[int], longest: int, **more: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `_packed` does, of what `_joined` does on the device; no row has more than `longest` tokens."""
        total = sum(counts)
        tokens, positions, lengths = torch.split(inputs, [total, total, len(counts)])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        packing = Packing(length_groups(counts), offsets, longest)
        found = self.module(input_ids=tokens[None], position_ids=positions[None], packing=packing, **more)
        return found.last_hidden_state[0], lengths

    def _padded(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `_packed` does."""
        lengths = np.array([len(row.ids) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]  # [n, tokens]
        tokens = np.full(mask.shape, self._pad_id, dtype=np.int64)
        tokens[mask] = np.concatenate([row.ids for row in rows])
        more = {}
        if (types := self._types(rows)) is not None:
            padded = np.zeros_like(tokens)
            padded[mask] = types
            more["token_type_ids"] = self._put(padded)
        seen = self._put(mask)
        hidden = self.module(input_ids=self._put(tokens), attention_mask=seen.long(), **more).last_hidden_state
        return hidden[seen], self._put(lengths)

    def _put(self, values: Any) -> torch.Tensor:
        """Copy to the device, without waiting for it."""
        tensor = torch.as_tensor(values)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _try_prepacking(self, sample: Sequence[Row]) -> None:
        """Have the linear layers answer short inputs sooner, where the vectors stay the same."""
        expected = self._forward(sample)
        try:
            prepack(self.module)
            if _distance(self._forward(sample), expected) < _TOLERANCE[self.module.dtype]:
                return
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            pass
        unpack(self.module)

    def _try_packing(self, sample: Sequence[Row]) -> None:
        """Pack the sample, and keep to packing if the vectors are those of padding.

        Some networks don't follow the attention interface, some don't heed the positions they are given, some ask
        for what packed attention hasn't.
        """
        usual = self.module.config._attn_implementation
        try:
            if not self.module._can_set_attn_implementation():
                return
            expected = self._forward(sample)
            self.module.set_attn_implementation(PACKED)
            self._states = Network._packed
            if _distance(self._forward(sample), expected) < _TOLERANCE[self.module.dtype]:
                return
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            pass
        self._states = Network._padded
        self.module.set_attn_implementation(usual)

    def _converted(self, sample: Sequence[Row], dtype: torch.dtype) -> OpenVINONetwork:
        name = type(self.module).__name__
        if self._lengths.alike is not None:
            raise InvalidInput(
                f"backend='openvino' can't run a {name} whose attention follows the length. Leave it out."
            )
        network = OpenVINONetwork(self.module, dtype)
        expected = self._forward(sample)
        with torch.inference_mode():
            found = np.concatenate([self._by_openvino(network, row) for row in sample])
        if not _distance(found, expected) < _TOLERANCE[dtype]:
            raise InvalidInput(
                f"OpenVINO computes other vectors than torch for a {name}. Leave backend='openvino' out."
            )
        self.module.to(dtype)
        return network


def _count_positions(module: torch.nn.Module) -> tuple[int | None, int]:
    """Return the token over which positions are counted, and how many there are.

    RoBERTa and its kin count the tokens that aren't the one that pads, and from its id on; others count all, from 0.
    """
    for name, table in module.named_modules():
        if isinstance(table, torch.nn.Embedding) and name.endswith("position_embeddings"):
            padding = table.padding_idx
            return padding, table.num_embeddings - (0 if padding is None else padding + 1)
        if isinstance(table, torch.nn.Embedding) and name.endswith(("embed_positions", "wpe")):
            return None, table.num_embeddings - int(getattr(table, "offset", 0))
    return None, 2**31


def _distance(vectors: Float32Array, others: Float32Array) -> float:
    """The largest cosine distance of two rows."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    return float((1 - (vectors * others).sum(axis=1) / np.maximum(lengths, 1e-12)).max())
