"""CUDA graphs: what a network would launch kernel by kernel, recorded once and launched at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from mrl_rag.encoder.batching import Row
from mrl_rag.truncation import Float32Array

# How many tokens a graph may be of. Up to the largest a GPU spends its time on launches rather than on numbers.
SIZES = (16, 32, 64, 128)


class Recorded:
    """A function of one tensor, as a CUDA graph.

    Args:
        compute: int64 [m] -> float32 [n, d], on the device; it waits for nothing there, and is not kept.
        example: int64 [m].
        device: a CUDA device.
        other: a graph to share memory with; the two must never run at the same time.

    Raises:
        RuntimeError: the function can't be recorded.
    """

    def __init__(
        self,
        compute: Callable[[torch.Tensor], torch.Tensor],
        example: npt.NDArray[np.int64],
        device: torch.device,
        other: Recorded | None = None,
    ) -> None:
        self._given = torch.from_numpy(example).pin_memory()
        self._input = self._given.to(device)
        self._graph = torch.cuda.CUDAGraph()
        pool = None if other is None else other._graph.pool()
        with torch.cuda.device(device):
            # Libraries set themselves up when they are first called, and that can't be recorded.
            compute(self._input)
            # Other threads, of other encoders or the caller's own, may use the GPU meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._output = compute(self._input)

    def __call__(self, values: npt.NDArray[np.int64]) -> Float32Array:
        """Return float32 [n, d] of int64 [m]."""
        self._given.numpy()[:] = values
        self._input.copy_(self._given, non_blocking=True)
        self._graph.replay()
        found: Float32Array = self._output.cpu().numpy()
        return found


def filled_up(row: Row, filler: int, positions: int) -> list[Row] | None:
    """Add a row, so that the two together have as many tokens as a graph is of.

    A graph computes on one shape; what the second row gets is thrown away.

    Args:
        row: the tokens.
        filler: the token that fills up.
        positions: how many the network knows.

    Returns:
        Two rows; None where the first is too long.
    """
    size = next((size for size in SIZES if len(row.ids) < size <= positions), None)
    return None if size is None else [row, Row([filler] * (size - len(row.ids)))]
