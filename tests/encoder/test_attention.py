"""Attention over packed sequences, on numbers that a plain formula gives as well."""

import pytest
import torch

from mrl_rag.encoder.attention import _varlen, packed_attention
from mrl_rag.encoder.batching import Packing, length_groups


def packing(lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return Packing(length_groups(lengths), offsets, max(lengths))


class Layer(torch.nn.Module):
    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_token_sees_its_own_sequence_within_the_window_and_nothing_else(causal, window, key_heads):
    lengths = [11, 7, 7, 3, 1]
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(lengths), 8)
    key, value = torch.randn(2, 1, key_heads, sum(lengths), 8)
    places = torch.arange(sum(lengths))
    owners = places.new_tensor(range(len(lengths))).repeat_interleave(torch.tensor(lengths))
    ahead = places - places[:, None]
    seen = owners == owners[:, None]
    if causal:
        seen &= ahead <= 0
    if window:
        seen &= ahead.abs() < window
    scores = query @ key.repeat_interleave(4 // key_heads, 1).mT * 0.3
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(4 // key_heads, 1)
    found, _ = packed_attention(
        Layer(causal), query, key, value, None, packing=packing(lengths), scaling=0.3, sliding_window=window
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_what_it_lacks_is_refused():
    query = torch.randn(1, 1, 3, 8)
    with pytest.raises(NotImplementedError, match="softcap"):
        packed_attention(Layer(False), query, query, query, None, packing=packing([3]), softcap=30.0)


@pytest.mark.parametrize(("window", "causal"), [(None, False), (None, True), (16, False), (16, True)])
def test_the_kernel_of_gpus_is_called_as_its_signature_asks(window, causal):
    """On tensors without numbers: shapes and arguments are checked, and what it computes is not."""
    query, key = (torch.empty(1, heads, 10, 8, device="meta", dtype=torch.bfloat16) for heads in (4, 2))
    shared = {"scale": 0.3, "enable_gqa": True}
    found = _varlen(query, key, key, packing([6, 4]), window, causal, shared)
    assert found.shape == (1, 10, 4, 8)
