"""What `mrl_rag.doctor.examine` notices."""

import chromadb
import numpy as np
import pytest

from mrl_rag import TwoStageIndex, doctor
from mrl_rag.doctor import examine


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "pick_dtype", lambda device: torch.float32)


@pytest.fixture
def index(tmp_path):
    with TwoStageIndex(tmp_path, "notes", full_dim=16, model="minilm", fingerprint="ab12") as index:
        index.upsert([f"id-{i}" for i in range(20)], np.random.default_rng(0).normal(size=(20, 16)))
        yield index


def finding(subject, folder=None):
    return next(found for found in examine(folder) if found.subject == subject)


def test_a_sound_machine_has_no_trouble_and_the_models_checksum_is_right():
    assert {found.subject for found in examine()} >= {"mrl-rag", "packages", "device", "openvino", "minilm"}
    assert [found for found in examine() if found.kind == "trouble"] == []
    assert finding("minilm").text.endswith("with the published checksum")


def test_damaged_weights_are_trouble_and_reinstalling_is_advised(monkeypatch):
    monkeypatch.setattr("mrl_rag.encoder.loading.file_sha256", lambda path: "0" * 64)
    found = finding("minilm")
    assert found.kind == "trouble"
    assert "pip install --force-reinstall" in found.text


def test_a_processor_without_fast_bfloat16_is_noted():
    if any(found.text.startswith("GPU") for found in examine()):
        pytest.skip("it has a GPU")
    assert finding("dtype").kind == "note"


def test_versions_that_were_not_tested_are_noted(monkeypatch):
    monkeypatch.setitem(doctor._TESTED, "chromadb", ">=0.1,<0.2")
    found = finding("chromadb")
    assert (found.kind, found.advice) == ("note", "If something fails: pip install 'chromadb>=0.1,<0.2'.")


def test_a_missing_extra_is_noted_with_its_name(monkeypatch):
    monkeypatch.setattr(doctor, "_OPTIONAL", (("no_such_module", "files", "`mrl-rag index` reads files"),))
    assert (finding("no_such_module").kind, finding("no_such_module").advice) == (
        "note",
        "Install the extra mrl-rag[files].",
    )


def test_more_threads_than_cores_are_noted(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 4096)
    assert finding("threads").kind == "note"


def test_a_sound_index_is_ok(index):
    index.close()
    assert finding("notes", index.path).text == "20 records, nothing is wrong; model minilm"


def test_a_damaged_index_is_trouble_and_the_advice_mends_it(index):
    from mrl_rag.cli import main

    index.close()
    chromadb.PersistentClient(index.path).get_collection("notes").delete(ids=["id-0", "id-1"])
    found = finding("notes", index.path)
    assert (found.kind, found.text) == ("trouble", "18 records: 2 orphaned")
    assert found.advice == f"mrl-rag repair --db {index.path} --collection notes"
    assert main(found.advice.split()[1:]) == 0
    assert finding("notes", index.path).kind == "ok"


def test_old_collections_and_a_model_that_is_not_here_are_noted(tmp_path):
    with TwoStageIndex(tmp_path, "notes", model="minilm", fingerprint="ab12") as index:
        index.upsert(["a"], np.ones((1, 16)), ["a text"])
        index.reencode(lambda texts: np.ones((len(texts), 8)), "no/such-model", "cd34")
    notes = [found.text for found in examine(tmp_path) if found.subject == "notes" and found.kind == "note"]
    assert notes[0] == "its model no/such-model is not on this machine"
    assert notes[1].startswith("old collections are kept: notes-")


def test_a_folder_without_an_index_is_trouble(tmp_path):
    assert finding(str(tmp_path), tmp_path).advice == "Fill one: mrl-rag index PATH."
