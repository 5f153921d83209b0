"""Linear layers with weights in the kernels' own order."""

import numpy as np
import pytest
import torch

from mrl_rag import MatryoshkaEncoder
from mrl_rag.encoder.linear import PrepackedLinear, can_prepack

pytestmark = pytest.mark.skipif(not can_prepack(torch.float32), reason="this processor has no such kernels")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (16, 24), (2, 7, 24)])
def test_it_computes_what_the_layer_does_and_gives_it_back_to_the_bit(bias, shape):
    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(24, 40, bias), torch.randn(shape)
    packed = PrepackedLinear(linear)
    with torch.inference_mode():
        torch.testing.assert_close(packed(rows), linear(rows))
        assert torch.equal(packed.unpacked()(rows), linear(rows))


def test_a_network_on_a_cpu_has_them(minilm):
    assert any(isinstance(module, PrepackedLinear) for module in minilm._network.module.modules())


@pytest.mark.parametrize("broken", [lambda self, rows: rows.new_zeros(()), lambda self, rows: self.no_such_part])
def test_a_network_that_they_do_not_serve_keeps_its_own(tiny_bert, monkeypatch, broken):
    expected = MatryoshkaEncoder(tiny_bert, device="cpu").encode(["a text"])
    monkeypatch.setattr(PrepackedLinear, "forward", broken)
    encoder = MatryoshkaEncoder(tiny_bert, device="cpu")
    assert not any(isinstance(module, PrepackedLinear) for module in encoder._network.module.modules())
    np.testing.assert_allclose(encoder.encode(["a text"]), expected, atol=1e-6)
