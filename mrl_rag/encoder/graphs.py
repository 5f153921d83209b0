"""CUDA graphs: the kernels of a forward pass, captured once and launched together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from mrl_rag.encoder.batching import TokenSequence
from mrl_rag.truncation import Float32Array

# Tokens per graph. Up to the largest, a GPU spends more time on launching kernels than on computing.
BUCKETS = (16, 32, 64, 128)


class CapturedGraph:
    """A function of one tensor, as a CUDA graph.

    Args:
        compute: int64 [m] -> float32 [n, d], on the device; it must not synchronise. It is not kept.
        example: int64 [m].
        device: a CUDA device.
        other: a graph to share memory with; the two must never run at the same time.

    Raises:
        RuntimeError: the function can't be captured.
    """

    def __init__(
        self,
        compute: Callable[[torch.Tensor], torch.Tensor],
        example: npt.NDArray[np.int64],
        device: torch.device,
        other: CapturedGraph | None = None,
    ) -> None:
        self._pinned = torch.from_numpy(example).pin_memory()
        self._input = self._pinned.to(device)
        self._graph = torch.cuda.CUDAGraph()
        pool = None if other is None else other._graph.pool()
        with torch.cuda.device(device):
            # Libraries initialise themselves on their first call, and that can't be captured.
            compute(self._input)
            # "thread_local": other threads, of other encoders or of the caller, may use the GPU meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._output = compute(self._input)

    def __call__(self, values: npt.NDArray[np.int64]) -> Float32Array:
        """Return float32 [n, d] of int64 [m]."""
        self._pinned.numpy()[:] = values
        self._input.copy_(self._pinned, non_blocking=True)
        self._graph.replay()
        found: Float32Array = self._output.cpu().numpy()
        return found


def pad_to_bucket(sequence: TokenSequence, pad_id: int, positions: int) -> list[TokenSequence] | None:
    """Add a second sequence, of padding, so that the two together have as many tokens as a graph takes.

    A graph computes one shape only; the vector of the padding is thrown away.

    Args:
        sequence: the tokens.
        pad_id: the token that pads.
        positions: how many positions the network has.

    Returns:
        Two sequences; None where the first is too long for every graph.
    """
    size = next((size for size in BUCKETS if len(sequence.ids) < size <= positions), None)
    return None if size is None else [sequence, TokenSequence([pad_id] * (size - len(sequence.ids)))]
