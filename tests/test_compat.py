"""Undocumented parts of other libraries: they are as they were, and without them the public way serves."""

import warnings
from importlib import import_module
from importlib.metadata import version

import numpy as np
import pytest
import torch
from packaging.specifiers import SpecifierSet

from mrl_rag.compat import llama_index, openvino, transformers
from mrl_rag.compat.torch import is_out_of_memory


@pytest.mark.parametrize(
    ("module", "distribution"),
    [
        ("llama_index", "llama-index-core"),
        ("openvino", "openvino"),
        ("torch", "torch"),
        ("transformers", "transformers"),
    ],
)
def test_the_installed_version_is_one_that_was_tried(module, distribution):
    """If this fails: run these tests and tests/parity with the new version, then widen the range."""
    assert version(distribution).split("+")[0] in SpecifierSet(import_module(f"mrl_rag.compat.{module}").TESTED)


def test_a_full_memory_is_told_from_another_error():
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**50)
    assert is_out_of_memory(full.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_llama_index_carries_the_tables_of_tiktoken(monkeypatch, tmp_path):
    assert any(llama_index.tiktoken_tables().iterdir())
    monkeypatch.setattr(llama_index, "find_spec", lambda name: type("Spec", (), {"origin": str(tmp_path / "x.py")}))
    assert llama_index.tiktoken_tables() is None


class Doubled(torch.nn.Module):
    def forward(self, values):
        return values * 2


@pytest.mark.parametrize("private", [True, False])
def test_openvino_converts_by_its_front_end_and_by_its_public_function(monkeypatch, private):
    runtime = pytest.importorskip("openvino")
    if not private:
        monkeypatch.setattr("openvino_telemetry.Telemetry.send_event", lambda *event, **more: None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runtime.convert_model(Doubled(), example_input=torch.ones(1, 2))  # imports what it needs
        monkeypatch.delattr("openvino.frontend.FrontEndManager")
        converted = []
        real = runtime.convert_model
        monkeypatch.setattr(
            runtime, "convert_model", lambda *model, **more: converted.append(1) or real(*model, **more)
        )
    model = openvino.convert(Doubled(), torch.tensor([[1.0, 2.0]]))
    found = runtime.Core().compile_model(model, "CPU")([np.array([[1, 2]], dtype=np.float32)])[0]
    assert found.tolist() == [[2.0, 4.0]]
    assert private or converted == [1]


@pytest.mark.parametrize("kind", transformers._ENCODER_CLASSES)
def test_transformers_has_the_encoders_that_are_loaded_alone(kind):
    from transformers import CONFIG_MAPPING

    assert issubclass(transformers.encoder_class(CONFIG_MAPPING[kind]()), torch.nn.Module)


def test_an_encoder_under_another_name_is_refused_and_other_networks_are_left_to_transformers(monkeypatch):
    from transformers import BertConfig, M2M100Config

    assert transformers.encoder_class(BertConfig()) is None
    monkeypatch.setitem(transformers._ENCODER_CLASSES, "m2m_100", "Renamed")
    with pytest.raises(ImportError, match="Renamed"):
        transformers.encoder_class(M2M100Config())


def tiny(config, **settings):
    from transformers import AutoModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return AutoModel.from_config(config(vocab_size=30, **size, **settings))


def test_positions_are_counted_where_their_table_has_a_known_name():
    from transformers import BertConfig, RobertaConfig

    assert transformers.count_positions(tiny(BertConfig, max_position_embeddings=40)) == (None, 40)
    roberta = tiny(RobertaConfig, max_position_embeddings=40, pad_token_id=1)
    assert transformers.count_positions(roberta) == (1, 38)
    assert transformers.count_positions(torch.nn.Linear(1, 1)) == (None, 2**31)


def test_networks_whose_vectors_depend_on_their_batch_are_recognised():
    from transformers import BertConfig, BigBirdConfig, LlamaConfig

    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    llama = tiny(LlamaConfig, max_position_embeddings=32, rope_parameters=scaled)
    assert transformers.BatchDependence(llama).groups([5, 20, 40, 50, 40]) == [[0, 1], [2, 4], [3]]
    sparse = tiny(BigBirdConfig, attention_type="block_sparse", block_size=4, num_random_blocks=1)
    assert transformers.BatchDependence(sparse).groups([5, 20, 28, 29, 33]) == [[0, 1, 2], [3], [4]]
    assert transformers.BatchDependence(tiny(BertConfig)).key is None
