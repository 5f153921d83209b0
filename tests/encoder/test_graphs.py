"""Short texts by CUDA graphs. Without a GPU a stand-in computes what one would have captured."""

import numpy as np
import pytest
import torch

from mrl_rag import MatryoshkaEncoder
from mrl_rag.encoder.batching import TokenSequence
from mrl_rag.encoder.graphs import BUCKETS, pad_to_bucket
from mrl_rag.encoder.network import Network

TEXTS = ["a", "two words", "a sentence of several words", "another of as many words", "x" * 40, "y " * 200]


class Computed:
    """Computes when it is called, as `CapturedGraph` would have the GPU do; refuses what a graph could not do."""

    made = 0

    def __init__(self, compute, example, device, other=None):
        Computed.made += 1
        assert other is None or isinstance(other, Computed)
        self.compute, self.shape, self.calls = compute, example.shape, 0

    def __call__(self, values):
        assert (values.shape, values.dtype) == (self.shape, np.int64)
        self.calls += 1
        return self.compute(torch.from_numpy(values)).numpy()


@pytest.fixture
def network(tiny_bert, monkeypatch, default_dtype):
    monkeypatch.setattr("mrl_rag.encoder.network.CapturedGraph", Computed)
    monkeypatch.setattr(Computed, "made", 0)
    states = Network._run_packed

    def from_the_device(self, inputs, counts, longest):
        # A GPU's attention reads the lengths from the device; a CPU's goes by the Python numbers beside them.
        lengths = inputs[-len(counts) :].tolist()
        assert max(lengths) <= longest
        return states(self, inputs, lengths, longest)

    monkeypatch.setattr(Network, "_run_packed", from_the_device)
    network = MatryoshkaEncoder(tiny_bert, device="cpu")._network
    network._captures = True
    return network


def row(tokens):
    return TokenSequence([2, *(4 + i % 20 for i in range(tokens - 2)), 3][:tokens])


@pytest.mark.parametrize("tokens", [1, 15, 16, 31, 127])
def test_a_sequence_is_padded_to_the_next_bucket_by_another(tokens):
    first, filler = pad_to_bucket(row(tokens), 0, 512)
    assert first == row(tokens)
    assert set(filler.ids) == {0}
    assert tokens + len(filler.ids) == next(size for size in BUCKETS if size > tokens)


@pytest.mark.parametrize(("tokens", "positions"), [(BUCKETS[-1], 512), (33, 63), (9, 10)])
def test_a_long_sequence_is_not_nor_one_beyond_what_the_network_knows(tokens, positions):
    assert pad_to_bucket(row(tokens), 0, positions) is None


def test_vectors_are_those_without_and_a_graph_serves_all_of_its_size(network):
    rows = [row(tokens) for tokens in (*range(1, 32), 3, 20, 40, 63, 64)]
    found = np.concatenate([network.run([one]) for one in rows])
    assert Computed.made == 3
    assert sorted(network._graphs) == [16, 32, 64]
    assert network._graphs[16].calls == 15 + 1 + 1  # the first is tried before it counts
    network._captures = False
    np.testing.assert_allclose(found, np.concatenate([network.run([one]) for one in rows]), atol=1e-6)


def test_what_a_graph_has_no_place_for_goes_without(network):
    expected = network.run([row(5), row(9)])
    without_prompt = network.run([TokenSequence(row(9).ids, prompt_length=2)])
    assert Computed.made == 0
    np.testing.assert_allclose(network.run([row(9)]), expected[1:], atol=1e-6)
    assert Computed.made == 1
    assert not np.allclose(without_prompt, expected[1:])


@pytest.mark.parametrize("fault", ["error", "wrong"])
def test_a_graph_that_fails_or_differs_is_left_out_and_not_tried_again(network, monkeypatch, fault):
    def call(self, values):
        if fault == "error":
            raise RuntimeError("operation not permitted when stream is capturing")
        return np.ones((2, 16), dtype=np.float32)

    monkeypatch.setattr(Computed, "__call__", call)
    network._captures = False
    expected = network.run([row(5)])
    network._captures = True
    for _ in range(3):
        np.testing.assert_array_equal(network.run([row(5)]), expected)
    assert Computed.made == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_a_gpu_texts_alone_get_what_they_get_together_and_without_graphs(tiny_bert, dtype):
    encoder = MatryoshkaEncoder(tiny_bert, device="cuda", dtype=dtype)
    assert encoder._network._captures
    alone = [np.concatenate([encoder.encode([text]) for text in TEXTS]) for _ in range(2)]
    graphs = encoder._network._graphs
    assert graphs
    assert None not in graphs.values()
    together = encoder.encode(TEXTS)
    encoder._network._captures = False
    without = np.concatenate([encoder.encode([text]) for text in TEXTS])
    exact = MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32").encode(TEXTS)
    np.testing.assert_array_equal(*alone)
    for vectors in (alone[0], together, without):
        assert (1 - (vectors * exact).sum(axis=1)).max() < 1e-3


def test_a_cpu_has_none(minilm):
    assert isinstance(minilm._network, Network)
    minilm.encode(["a question"])
    assert not minilm._network._graphs
