"""torch: how it says that a CPU's memory is full."""

from __future__ import annotations

TESTED = ">=2.10,<2.14"


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory was full.

    A GPU raises `torch.OutOfMemoryError`. A CPU raises a plain RuntimeError, which only its text tells from others;
    under another text the error is passed on as it is.
    """
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
