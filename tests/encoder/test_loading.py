import json
from dataclasses import replace

import pytest

from mrl_rag import MatryoshkaEncoder
from mrl_rag.errors import ModelFilesError, UnknownModel
from mrl_rag.models import MODELS, PackagedWeights, find_row


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
        MatryoshkaEncoder("minilm", local_files_only=False)
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
        ("1_Pooling/config.json", json.dumps({"pooling_mode": "attention"})),
        ("1_Pooling/config.json", json.dumps({"pooling_mode": ["mean", "attention"]})),
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


@pytest.fixture
def hub(make_tiny_bert, tmp_path, monkeypatch):
    """Put a model into a cache of the hub under a name, and no model elsewhere."""

    def put(hub_id):
        folder = tmp_path / f"models--{hub_id.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots").mkdir()
        (folder / "snapshots" / ("0" * 40)).symlink_to(make_tiny_bert())

    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    return put


@pytest.mark.parametrize(
    ("hub_id", "name"),
    [
        ("org/model", "org/model"),
        ("sentence-transformers/all-mpnet-base-v2", "all-mpnet-base-v2"),
        ("bert-base-uncased", "bert-base-uncased"),
    ],
)
def test_a_model_is_found_in_the_folder_of_sentence_transformers(hub, hub_id, name):
    """Its own models by their names alone."""
    hub(hub_id)
    assert MatryoshkaEncoder(name, device="cpu", dtype="float32", local_files_only=True).full_dim == 16


def test_minilm_goes_without_its_organisation():
    assert find_row("all-MiniLM-L6-v2") is MODELS["minilm"]


def test_a_folder_goes_before_the_hub_and_a_short_name_before_a_folder(make_tiny_bert, tmp_path, monkeypatch):
    (tmp_path / "BAAI").mkdir()
    (tmp_path / "BAAI" / "bge-small-en-v1.5").symlink_to(make_tiny_bert())
    (tmp_path / "minilm").symlink_to(make_tiny_bert())
    monkeypatch.chdir(tmp_path)
    for name, prompt in (("BAAI/bge-small-en-v1.5", True), ("./BAAI/bge-small-en-v1.5", False)):
        encoder = MatryoshkaEncoder(name, device="cpu", dtype="float32")
        assert (encoder.full_dim, bool(encoder.prompts["query"])) == (16, prompt)
    assert MatryoshkaEncoder("minilm", device="cpu", dtype="float32").full_dim == 384
    assert MatryoshkaEncoder("./minilm", device="cpu", dtype="float32").full_dim == 16


def test_a_gated_models_own_message_is_passed_on(monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError

    def refuse(hub_id, **settings):
        message = (
            "403 Client Error.\n\nCannot access gated repo.\nVisit https://huggingface.co/org/gated to ask for access."
        )
        raise GatedRepoError(message, response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        UnknownModel, match=r"to ask for access\.\)\. Accept its terms at https://huggingface\.co/org/gated"
    ):
        MatryoshkaEncoder("org/gated", local_files_only=False)


@pytest.mark.parametrize(("name", "meant"), [("nomic-v15", "nomic-v1.5"), ("miniml", "minilm")])
def test_a_name_near_a_known_one_brings_it_up(name, meant):
    with pytest.raises(UnknownModel, match=f"Did you mean '{meant}'"):
        MatryoshkaEncoder(name, local_files_only=True)


def test_offline_a_known_model_is_not_called_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    with pytest.raises(UnknownModel, match=r"^model 'nomic-v1.5' is known, but its files .* are not on this machine"):
        MatryoshkaEncoder("nomic-v1.5", local_files_only=True)
