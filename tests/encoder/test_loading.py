import json
from dataclasses import replace

import pytest

from mrl_rag import MatryoshkaEncoder
from mrl_rag.encoder.loading import find_model
from mrl_rag.errors import ModelFilesError, UnknownModel
from mrl_rag.models import MODELS, PackagedWeights


def test_an_unknown_model_is_refused_with_the_known_names():
    with pytest.raises(UnknownModel, match=r"'minilm'.*nobody/nothing"):
        MatryoshkaEncoder("nobody/nothing", local_files_only=True)


def test_a_name_that_cannot_be_a_hub_id_is_refused():
    with pytest.raises(UnknownModel, match="no such/model/at all"):
        MatryoshkaEncoder("no such/model/at all", local_files_only=True)


def test_without_its_package_the_default_model_is_asked_of_the_hub(monkeypatch):
    absent = replace(MODELS["minilm"], packaged=PackagedWeights("not_installed", "model", ""))
    monkeypatch.setitem(MODELS, "minilm", absent)
    asked = []

    def snapshot_download(hub_id, **settings):
        asked.append((hub_id, settings["local_files_only"]))
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UnknownModel, match="offline"):
        find_model("minilm", MODELS["minilm"], revision=None, trust_remote_code=False, local_files_only=False)
    assert asked == [("sentence-transformers/all-MiniLM-L6-v2", False)]


def test_packaged_weights_that_are_not_the_published_ones_are_refused(tmp_path, monkeypatch):
    (tmp_path / "damaged_package" / "model").mkdir(parents=True)
    (tmp_path / "damaged_package" / "__init__.py").touch()
    (tmp_path / "damaged_package" / "model" / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.syspath_prepend(str(tmp_path))
    row = replace(MODELS["minilm"], name="x", packaged=PackagedWeights("damaged_package", "model", "00ff"))
    monkeypatch.setitem(MODELS, "x", row)
    with pytest.raises(ModelFilesError, match="not the published 00ff"):
        MatryoshkaEncoder("x")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", "{"),
        ("modules.json", json.dumps([{"path": "", "type": "sentence_transformers.models.CNN"}])),
        ("modules.json", json.dumps([{"path": ""}])),
        ("1_Pooling/config.json", json.dumps({"pooling_mode": "weightedmean"})),
        ("1_Pooling/config.json", json.dumps({"pooling_mode": ["mean", "cls"]})),
        ("1_Pooling/config.json", "[]"),
        ("model.safetensors", "damaged"),
        ("config.json", "{}"),
        ("tokenizer.json", "{"),
    ],
)
def test_damaged_or_unsupported_files_are_refused_by_name(make_tiny_bert, file, content):
    folder = make_tiny_bert()
    (folder / file).write_text(content)
    with pytest.raises(ModelFilesError, match=str(folder)):
        MatryoshkaEncoder(folder, device="cpu", dtype="float32")


@pytest.mark.usefixtures("default_dtype")
def test_the_new_name_of_the_pooling_key_is_read(make_tiny_bert):
    folder = make_tiny_bert("cls")
    old = MatryoshkaEncoder(folder, device="cpu").encode(["a text"])
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    assert (MatryoshkaEncoder(folder, device="cpu").encode(["a text"]) == old).all()
