"""Linear layers whose weights lie as the processor's matrix kernels read them."""

from __future__ import annotations

import platform

import torch

# For how many rows the weights are laid out. The order holds for any number; of those tried it served a short question
# and a full batch alike.
_ROWS = 16


class PrepackedLinear(torch.nn.Module):
    """A `torch.nn.Linear` on a CPU that reorders its weights once, not in every call.

    With oneDNN's operators, the ones that `torch.compile` uses for it, and without the time that compiling takes. The
    first call with another number of rows takes a millisecond more.

    Args:
        linear: its weights are copied.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()
        # Some networks look there for the number format.
        self.weight = linear.weight.new_empty(0)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features] of [..., in_features]."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return found

    def unpacked(self) -> torch.nn.Linear:
        """Return the layer that this one was made of, to the bit."""
        weight = self._packed.to_dense()
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight, linear.bias = (
            None if part is None else torch.nn.Parameter(part, requires_grad=False) for part in (weight, self._bias)
        )
        return linear


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this processor and this build of torch have the operators for a number format."""
    known = platform.machine() in ("x86_64", "AMD64")
    if not known or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack(module: torch.nn.Module) -> None:
    """Replace all linear layers within a network on the CPU, one after another: never two copies of all weights."""
    for name, child in module.named_children():
        if type(child) is torch.nn.Linear:
            setattr(module, name, PrepackedLinear(child))
        else:
            prepack(child)


def unpack(module: torch.nn.Module) -> None:
    """Undo `prepack`."""
    for name, child in module.named_children():
        if isinstance(child, PrepackedLinear):
            setattr(module, name, child.unpacked())
        else:
            unpack(child)
