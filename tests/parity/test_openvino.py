"""OpenVINO's vectors are those of sentence-transformers, architecture by architecture."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from mrl_rag import MatryoshkaEncoder
from mrl_rag.errors import InvalidInput, MissingExtra


@pytest.mark.parametrize("name", ["bert", "distilbert", "mpnet", "xlm-roberta", "nomic", "modernbert", "qwen3", "t5"])
def test_a_short_text_alone_gets_the_references_vector(save_model, passages, cosine_distance, monkeypatch, name):
    pytest.importorskip("openvino")
    folder = save_model(name)
    encoder = MatryoshkaEncoder(folder, device="cpu", dtype="float32", backend="openvino")
    reference = SentenceTransformer(str(folder), device="cpu")
    texts = [text[:150] for text in passages[:16]]
    given = spy(encoder._network, monkeypatch)
    together = encoder.encode_documents(texts)
    assert not given
    assert cosine_distance(together, reference.encode_document(texts)).max() < 1e-5
    alone = np.vstack([encoder.encode([text]) for text in texts])
    assert len(given) == len(texts)
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)
    assert encoder.fingerprint == MatryoshkaEncoder(folder, device="cpu", dtype="float32").fingerprint


def spy(network, monkeypatch):
    """A list of what OpenVINO is given from here on."""
    given, real = [], network._openvino

    def call(ids):
        given.append(ids)
        return real(ids)

    monkeypatch.setattr(network, "_openvino", call)
    return given


def test_long_texts_and_bfloat16_go_with_it(minilm, monkeypatch, cosine_distance):
    pytest.importorskip("openvino")
    encoder = MatryoshkaEncoder("minilm", device="cpu", dtype="bfloat16", backend="openvino")
    assert encoder._network.module.dtype == torch.bfloat16
    given = spy(encoder._network, monkeypatch)
    question, passage = "what is a thread", "the thread of the process " * 40
    assert cosine_distance(encoder.encode([question]), minilm.encode([question])).max() < 1e-3
    assert cosine_distance(encoder.encode([passage]), minilm.encode([passage])).max() < 1e-3
    assert [ids.shape[0] for ids in given] == [1]


def test_a_conversion_is_reported_to_nobody(tiny_bert, monkeypatch):
    pytest.importorskip("openvino")
    telemetry = pytest.importorskip("openvino_telemetry")
    sent = []
    monkeypatch.setattr(telemetry.Telemetry, "send_event", lambda *event, **more: sent.append(event))
    MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", backend="openvino")
    assert not sent


def test_a_network_that_cannot_be_converted_is_refused_by_name(save_model):
    pytest.importorskip("openvino")
    with pytest.raises(InvalidInput, match="Gemma3TextModel"):
        MatryoshkaEncoder(save_model("gemma3"), device="cpu", dtype="float32", backend="openvino")
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}
    with pytest.raises(InvalidInput, match="depends on the length"):
        MatryoshkaEncoder(save_model("nomic", rope_parameters=rope), device="cpu", dtype="float32", backend="openvino")


@pytest.mark.parametrize(("backend", "device"), [("onnx", "cpu"), ("openvino", "cuda"), ("openvino", ["cpu", "cuda"])])
def test_a_backend_that_is_not_there_is_refused(tiny_bert, backend, device):
    with pytest.raises(InvalidInput, match="backend"):
        MatryoshkaEncoder(tiny_bert, device=device, backend=backend)


def test_without_the_extra_the_pip_line_is_given(tiny_bert, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r"pip install 'openvino>="):
        MatryoshkaEncoder(tiny_bert, device="cpu", dtype="float32", backend="openvino")
