"""The dtype that is taken where none is named, for processors and GPUs that this machine need not have."""

import pytest
import torch

from mrl_rag import MatryoshkaEncoder

# By name, before the tests' own choice takes its place.
from mrl_rag.encoder.encoder import pick_dtype


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_processor_computes_in_bfloat16_where_it_has_the_instructions(monkeypatch, instructions, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert pick_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_does_where_nothing_is_emulated(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation)
    assert pick_dtype(torch.device("cuda")) == dtype


def test_another_device_computes_in_float32():
    assert pick_dtype(torch.device("mps")) == torch.float32


def test_the_network_has_the_dtype_that_was_chosen_or_the_one_that_is_named(tiny_bert, default_dtype):
    for named in (None, "float32", "bfloat16", "float16"):
        encoder = MatryoshkaEncoder(tiny_bert, device="cpu", dtype=named)
        assert encoder.dtype == getattr(torch, named or default_dtype)
        assert {weight.dtype for weight in encoder._network.module.parameters()} == {encoder.dtype}


def test_the_default_is_as_near_to_float32_as_its_dtype_promises(minilm, minilms, passages, cosine_distance):
    """On every tenth passage: a processor that lacks bfloat16 computes it slowly."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-3}[minilm.dtype]
    for dim in (384, 64):
        found, exact = (encoder.encode(passages[::10], dim=dim) for encoder in (minilm, minilms("float32")))
        assert cosine_distance(found, exact).max() < tolerance
