"""Linear layers with a second copy of their weights for short inputs."""

import numpy as np
import pytest
import torch

from mrl_rag import MatryoshkaEncoder
from mrl_rag.encoder.linear import PrepackedLinear, can_prepack, unpack

pytestmark = pytest.mark.skipif(
    not can_prepack(torch.nn.Linear(1, 1), torch.float32), reason="this processor has no such kernels"
)


def layers(encoder):
    return [module for module in encoder._network.module.modules() if isinstance(module, PrepackedLinear)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (13, 24), (32, 24), (33, 24), (2, 7, 24), (9, 8, 24)])
def test_it_computes_what_the_layer_does(bias, shape):
    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(24, 40, bias), torch.randn(shape)
    packed = PrepackedLinear(linear)
    with torch.inference_mode():
        torch.testing.assert_close(packed(rows), linear(rows))
        unpack(packed)
        assert torch.equal(packed(rows), linear(rows))


def test_a_network_on_a_cpu_has_them(minilm):
    assert all(layer.packed is not None for layer in layers(minilm))
    # Not every processor that has them for float32 has them for bfloat16.
    assert bool(layers(minilm)) == can_prepack(torch.nn.Linear(1, 1), minilm.dtype)


@pytest.mark.usefixtures("default_dtype")
def test_a_large_network_keeps_its_weights_once(tiny_bert, monkeypatch):
    monkeypatch.setattr("mrl_rag.encoder.linear._MOST_BYTES", 1000)
    assert not layers(MatryoshkaEncoder(tiny_bert, device="cpu"))


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("broken", [torch.zeros(1), None])
def test_a_network_that_they_do_not_serve_does_without(tiny_bert, monkeypatch, broken):
    expected = MatryoshkaEncoder(tiny_bert, device="cpu").encode(["a text"])
    forward = PrepackedLinear.forward
    monkeypatch.setattr(
        PrepackedLinear, "forward", lambda self, rows: broken * rows if self.packed is not None else forward(self, rows)
    )
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu")
    assert all(layer.packed is None for layer in layers(encoder))
    np.testing.assert_allclose(encoder.encode(["a text"]), expected, atol=1e-6)
