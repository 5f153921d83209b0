"""openvino: conversion of a traced network without its telemetry."""

from __future__ import annotations

import warnings
from typing import Any

import torch

TESTED = ">=2026.4,<2026.5"


def convert(network: torch.nn.Module, example: torch.Tensor) -> Any:
    """Return a network as an `openvino.Model`.

    `openvino.convert_model` does the same in three times the time, and reports each conversion over the network. It is
    used where this version of openvino lacks the classes below.

    Args:
        network: takes one tensor, returns one.
        example: a tensor that it takes.

    Raises:
        RuntimeError: the network can't be traced or converted; or TypeError, ValueError.
    """
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # tracing warns of fixed sizes; the caller makes them dynamic
        traced = torch.jit.trace(network, (example,), check_trace=False)  # type: ignore[no-untyped-call]
    try:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    except ImportError:
        import openvino

        return openvino.convert_model(traced, example_input=example)
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced)  # a name of its own: the front end keeps no reference
    return frontend.convert(frontend.load(decoder))
