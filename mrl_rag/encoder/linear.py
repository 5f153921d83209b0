"""Linear layers that answer short inputs sooner on a CPU."""

from __future__ import annotations

import platform

import torch

# oneDNN compiles a kernel for every number of rows and shape of weights, and keeps it: half a megabyte each, more for
# more rows. A question seldom has more tokens, and of many the usual kernels are as fast.
_MOST_ROWS = 32
# Bytes of weights above which a network is left as it is: each layer keeps its own in two orders.
_MOST_BYTES = 2**29


class PrepackedLinear(torch.nn.Linear):
    """A linear layer that has its weights in the order of the processor's kernels, too, and uses these for few rows.

    With oneDNN's operators, the ones that `torch.compile` uses for it, and without the time that compiling takes.

    Args:
        linear: shares its weights with this one.

    Attributes:
        packed: the weights in that order; None to do without.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.packed: torch.Tensor | None = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _MOST_ROWS)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features] of [..., in_features]."""
        if self.packed is None or input.numel() > _MOST_ROWS * self.in_features:
            return super().forward(input)
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")
        return found


def can_prepack(network: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether this processor and this build of torch have the operators, and the network is small enough."""
    known = platform.machine() in ("x86_64", "AMD64")
    if not known or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    layers = (layer.weight for layer in network.modules() if type(layer) is torch.nn.Linear)
    if sum(weight.nbytes for weight in layers) > _MOST_BYTES:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack(module: torch.nn.Module) -> None:
    """Replace all linear layers within a network that is on the CPU."""
    for name, child in module.named_children():
        if type(child) is torch.nn.Linear:
            setattr(module, name, PrepackedLinear(child))
        else:
            prepack(child)


def unpack(module: torch.nn.Module) -> None:
    """Let the layers of a network do without again."""
    for layer in module.modules():
        if isinstance(layer, PrepackedLinear):
            layer.packed = None
