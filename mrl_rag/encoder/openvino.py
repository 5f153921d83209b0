"""A torch network as OpenVINO runs it on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mrl_rag.compat.openvino import convert
from mrl_rag.errors import InvalidInput
from mrl_rag.extras import require


class OpenVINONetwork:
    """A network converted in memory.

    Args:
        module: a network of transformers, float32, on the CPU.
        dtype: what it computes in: float32 or bfloat16.

    Raises:
        MissingExtra: `openvino` is not installed.
        InvalidInput: the network can't be converted.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        openvino = require("openvino", extra="openvino")
        from openvino.frontend import OpConversionFailure

        # Two sequences of three tokens: a size of 1 would be taken for fixed.
        example = torch.tensor([[5, 6, 7], [8, 9, 10]])
        try:
            converted = convert(_Hidden(module).eval(), example)
        except (RuntimeError, TypeError, ValueError, OpConversionFailure) as error:
            raise InvalidInput(
                f"backend='openvino' can't convert a {type(module).__name__}: {str(error)[:300]}. Leave backend out."
            ) from error
        ids = converted.inputs[0].get_node()
        ids.set_partial_shape(openvino.PartialShape([-1, -1]))
        ids.set_element_type(openvino.Type.i64)
        converted.validate_nodes_and_infer_types()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def __call__(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return hidden states, float32 [n, tokens, d], of sequences of one length, int64 [n, tokens]."""
        found: torch.Tensor = torch.from_numpy(self._request.infer([ids])[0])
        return found


class _Hidden(torch.nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # Without a mask some networks make their own, in a way that can't be converted.
        mask = torch.ones_like(input_ids)
        hidden: torch.Tensor = self.network(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden
