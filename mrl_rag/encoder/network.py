"""`Network`: token sequences in, vectors out, on one device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mrl_rag.compat.torch import is_out_of_memory
from mrl_rag.compat.transformers import BatchDependence, count_positions
from mrl_rag.encoder.attention import CALLS, PACKED
from mrl_rag.encoder.batching import Packing, TokenSequence, length_groups
from mrl_rag.encoder.graphs import CapturedGraph, pad_to_bucket
from mrl_rag.encoder.loading import ModelFiles, no_warnings
from mrl_rag.encoder.modules import load_modules
from mrl_rag.encoder.openvino import OpenVINONetwork
from mrl_rag.encoder.pooling import pool
from mrl_rag.errors import EncoderOutOfMemory, InvalidInput
from mrl_rag.lifetime import return_freed_memory
from mrl_rag.truncation import Float32Array

if TYPE_CHECKING:
    from mrl_rag.encoder.settings import Backend

_LOG = logging.getLogger("mrl_rag")
# Longest sequence for OpenVINO: with more tokens, torch is as fast (benchmarks/README.md).
_OPENVINO_MAX_TOKENS = 128
# On a CPU, packed batches are filled up to a multiple of so many tokens; small ones by a sixteenth at most. oneDNN
# keeps compiled code for each number of tokens that it has seen, which took 0.9 GB more.
_MAX_FILL_STEP = 64
# Largest cosine distance between packed and padded vectors, and between those with and without a CUDA graph: far above
# rounding, far below a wrong mask.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


class Network:
    """A transformers network, its pooling, and the modules after it.

    Sequences are packed end to end where the network supports that, else padded to the longest. A short sequence alone
    goes the fastest way there is: OpenVINO where it was asked for; on a GPU a CUDA graph, captured at the first
    sequence of about that length.

    Args:
        files: the model.
        device: where it runs.
        dtype: number format of the network.
        pad_id: the token that pads.
        sample: sequences of different lengths, to try packing and OpenVINO on.
        backend: what runs a short sequence alone: "torch" or "openvino".

    Attributes:
        module: the network itself.
        packs: whether sequences need no padding.
        full_dim: length of a vector.
        positions: number of positions the network has; 2**31 where there is no limit.

    Raises:
        InvalidInput: OpenVINO can't run the network.
        ModelFilesError: as `ModelFiles.load_network` and `load_modules`.
    """

    def __init__(
        self,
        files: ModelFiles,
        *,
        device: torch.device,
        dtype: torch.dtype,
        pad_id: int,
        sample: Sequence[TokenSequence],
        backend: Backend = "torch",
    ) -> None:
        # OpenVINO converts float32 to bfloat16 by itself.
        module: Any = files.load_network(dtype if backend == "torch" else torch.float32)
        self.module = module.to(device)
        self._device = device
        self._poolings = files.recipe.poolings
        self._pad_id = pad_id
        self._dependence = BatchDependence(module)
        width = module.config.hidden_size * len(self._poolings)
        modules, self.full_dim = load_modules(files.folder, files.recipe.modules, width)
        self._modules = modules.to(device)
        self._takes_types = "token_type_ids" in signature(module.forward).parameters
        self._padding, self.positions = count_positions(module)
        # A plain function: a method bound to `self` would keep the weights alive after the last reference to it.
        self._states = Network._padded
        # CUDA graphs by their number of tokens; None where capturing failed.
        self._graphs: dict[int, CapturedGraph | None] = {}
        self._captures = False
        self._openvino: OpenVINONetwork | None = None
        if backend == "openvino":
            self._openvino = self._convert(sample, dtype)
        if device.type == "cpu" or (device.type == "cuda" and dtype != torch.float32):
            self._try_packing(sample)
        self.packs = self._states is not Network._padded
        self._captures = device.type == "cuda" and self.packs and self._dependence.key is None

    def close(self) -> None:
        """Free the weights."""
        del self.module, self._modules
        self._graphs.clear()
        self._openvino = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            return_freed_memory()

    def run(self, sequences: Sequence[TokenSequence]) -> Float32Array:
        """Return the vectors of sequences, float32 [n, full_dim].

        Where memory is short, they run in halves, down to one sequence.

        Raises:
            EncoderOutOfMemory: one sequence alone does not fit.
        """
        try:
            return self._forward(sequences)
        except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError
            if not is_out_of_memory(error):
                raise
            if len(sequences) == 1:
                raise EncoderOutOfMemory(
                    f"a text of {len(sequences[0].ids)} tokens alone does not fit the memory of {self._device}: "
                    f"{error} Lower max_length, or free memory there."
                ) from error
        # Outside of `except`: the error holds on to the tensors that did not fit.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(sequences) // 2
        return np.concatenate([self.run(sequences[:half]), self.run(sequences[half:])])

    def _forward(self, sequences: Sequence[TokenSequence]) -> Float32Array:
        lengths = [len(sequence.ids) for sequence in sequences]
        groups = self._dependence.groups(lengths)
        if len(groups) > 1:
            vectors = np.empty((len(sequences), self.full_dim), dtype=np.float32)
            for group in groups:
                vectors[group] = self._forward([sequences[i] for i in group])
            return vectors
        self._dependence.prepare(max(lengths))
        with torch.inference_mode():
            if len(sequences) == 1 and (vector := self._run_short(sequences[0])) is not None:
                return vector
            return self._pool(sequences, *self._states(self, sequences))

    def _run_short(self, sequence: TokenSequence) -> Float32Array | None:
        """Return float32 [1, full_dim] of a sequence by OpenVINO or a CUDA graph; None where neither takes it."""
        if self._openvino is not None and len(sequence.ids) <= _OPENVINO_MAX_TOKENS and sequence.type_ids is None:
            return self._run_openvino(self._openvino, sequence)
        return self._run_graph(sequence) if self._captures else None

    def _pool(self, sequences: Sequence[TokenSequence], hidden: torch.Tensor, lengths: torch.Tensor) -> Float32Array:
        """Return the vectors of sequences, float32 [n, full_dim], from their hidden states [tokens, d]."""
        prompts = [sequence.prompt_length for sequence in sequences]
        pooled = pool(hidden, lengths, self._poolings, self._put(prompts) if any(prompts) else None)
        found: Float32Array = self._modules(pooled).cpu().numpy()
        return found

    def _run_openvino(self, network: OpenVINONetwork, sequence: TokenSequence) -> Float32Array:
        hidden = network(np.array([sequence.ids], dtype=np.int64))[0]
        return self._pool([sequence], hidden, torch.tensor([len(sequence.ids)]))

    def _run_graph(self, sequence: TokenSequence) -> Float32Array | None:
        sequences = pad_to_bucket(sequence, self._pad_id, self.positions)
        if sequences is None or sequence.prompt_length or sequence.type_ids is not None:
            return None
        inputs, lengths = self._pack_inputs(sequences), [len(each.ids) for each in sequences]
        if sum(lengths) not in self._graphs:
            self._graphs[sum(lengths)] = self._capture(inputs, lengths, sequence)
        graph = self._graphs[sum(lengths)]
        return None if graph is None else graph(inputs)[:1]

    def _capture(
        self, inputs: npt.NDArray[np.int64], lengths: list[int], sequence: TokenSequence
    ) -> CapturedGraph | None:
        """Return a graph for as many tokens, None where that fails or gives other vectors."""
        size = sum(lengths)
        # While `_forward` is called below, it must not come here again.
        self._graphs[size] = None

        def compute(inputs: torch.Tensor) -> torch.Tensor:
            # `size` as the longest length: other sequences that use this graph may be longer.
            vectors: torch.Tensor = self._modules(pool(*self._run_packed(inputs, lengths, size), self._poolings))
            return vectors

        try:
            others = [other for other in self._graphs.values() if other is not None]
            graph = CapturedGraph(compute, inputs, self._device, *others[:1])
            same = _distance(graph(inputs)[:1], self._forward([sequence])) < _TOLERANCE[self.module.dtype]
        except RuntimeError as error:
            _LOG.info("no CUDA graph of %d tokens for a %s: %s", size, type(self.module).__name__, error)
            return None
        return graph if same else None

    def _packed(self, sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states [tokens, d] of the sequences end to end, and their lengths, int64 [n]."""
        count, total = len(sequences), sum(len(sequence.ids) for sequence in sequences)
        filler = -total % min(_MAX_FILL_STEP, 1 << max(total.bit_length() - 5, 0))
        if filler and count > 1 and self._device.type == "cpu":
            sequences = [*sequences, TokenSequence(np.full(filler, self._pad_id, dtype=np.int32))]
        lengths = [len(sequence.ids) for sequence in sequences]
        types = self._type_ids(sequences)
        more = {} if types is None else {"token_type_ids": self._put(types[None])}
        hidden, counts = self._run_packed(self._put(self._pack_inputs(sequences)), lengths, max(lengths), **more)
        return hidden[:total], counts[:count]

    def _pack_inputs(self, sequences: Sequence[TokenSequence]) -> npt.NDArray[np.int64]:
        """Return token ids, positions and lengths in one array, int64 [2 * tokens + n], to be copied at once."""
        ids = np.concatenate([sequence.ids for sequence in sequences])
        positions = np.concatenate([self._positions(np.asarray(sequence.ids)) for sequence in sequences])
        return np.concatenate([ids, positions, [len(sequence.ids) for sequence in sequences]]).astype(np.int64)

    def _positions(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Return the positions of a sequence's tokens, int64 [tokens], as the network itself would count them."""
        if self._padding is None:
            return np.arange(len(ids))
        counted = ids != self._padding
        positions: npt.NDArray[np.int64] = np.cumsum(counted) * counted + self._padding
        return positions

    def _type_ids(self, sequences: Sequence[TokenSequence]) -> npt.NDArray[np.int64] | None:
        """Return the token types end to end, None where the network needs none: all are 0, or it takes none."""
        if not self._takes_types or all(sequence.type_ids is None for sequence in sequences):
            return None
        types = [np.zeros(len(each.ids)) if each.type_ids is None else each.type_ids for each in sequences]
        return np.concatenate(types).astype(np.int64)

    def _run_packed(
        self, inputs: torch.Tensor, lengths: Sequence[int], longest: int, **more: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `_packed` does, from `_pack_inputs` on the device; no sequence is longer than `longest`."""
        total = sum(lengths)
        tokens, positions, counts = torch.split(inputs, [total, total, len(lengths)])
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        packing = Packing(length_groups(lengths), offsets, longest)
        found = self.module(input_ids=tokens[None], position_ids=positions[None], packing=packing, **more)
        return found.last_hidden_state[0], counts

    def _padded(self, sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `_packed` does, with padding on the way."""
        lengths = np.array([len(sequence.ids) for sequence in sequences])
        mask = np.arange(lengths.max()) < lengths[:, None]  # [n, tokens]
        tokens = np.full(mask.shape, self._pad_id, dtype=np.int64)
        tokens[mask] = np.concatenate([sequence.ids for sequence in sequences])
        more = {}
        if (types := self._type_ids(sequences)) is not None:
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

    def _try_packing(self, sample: Sequence[TokenSequence]) -> None:
        """Pack from here on if the sample's vectors are those of padding.

        Some networks don't follow transformers' attention interface, some ignore the positions they are given, some
        need what packed attention lacks.
        """
        expected = self._forward(sample)
        try:
            with no_warnings():  # of networks that don't follow the interface
                self.module.set_attn_implementation(PACKED)
            self._states = Network._packed
            CALLS.made = False
            if _distance(self._forward(sample), expected) < _TOLERANCE[self.module.dtype] and CALLS.made:
                return
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            pass
        self._states = Network._padded
        self._use_default_attention()

    def _use_default_attention(self) -> None:
        """Choose attention as transformers does by default."""
        for name in ("sdpa", "eager"):
            try:
                with no_warnings():
                    self.module.set_attn_implementation(name)
                return
            except (AttributeError, ImportError, ValueError):
                continue

    def _convert(self, sample: Sequence[TokenSequence], dtype: torch.dtype) -> OpenVINONetwork:
        name = type(self.module).__name__
        if self._dependence.key is not None:
            raise InvalidInput(
                f"backend='openvino' can't run a {name} whose attention depends on the length. Leave it out."
            )
        network = OpenVINONetwork(self.module, dtype)
        expected = self._forward(sample)
        with torch.inference_mode():
            found = np.concatenate([self._run_openvino(network, sequence) for sequence in sample])
        if not _distance(found, expected) < _TOLERANCE[dtype]:
            raise InvalidInput(
                f"OpenVINO computes other vectors than torch for a {name}. Leave backend='openvino' out."
            )
        self.module.to(dtype)
        return network


def _distance(vectors: Float32Array, others: Float32Array) -> float:
    """Return the largest cosine distance between rows of the same position."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    return float((1 - (vectors * others).sum(axis=1) / np.maximum(lengths, 1e-12)).max())
