"""What comes from strangers: it runs no code, leads out of no folder, takes bounded memory, and is refused by name."""

import ast
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mrl_rag import MatryoshkaEncoder, TwoStageIndex
from mrl_rag.encoder.loading import find_model
from mrl_rag.errors import InvalidInput, ModelFilesError
from mrl_rag.files import load
from mrl_rag.testing import DeterministicEncoder

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "mrl_rag").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else str(node.value) if isinstance(node, ast.Constant) else "?"


def calls():
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield file, dotted(node.func), {each.arg: dotted(each.value) for each in node.keywords}


def test_nothing_in_the_sources_unpickles_evaluates_or_starts_a_shell():
    for file, name, arguments in calls():
        assert name not in ("eval", "exec", "compile", "os.system", "yaml.load"), file
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "joblib.")), file
        assert "allow_pickle" not in arguments and "shell" not in arguments, file
        if name == "torch.load":
            assert arguments["weights_only"] == "True", file
        if "trust_remote_code" in arguments and "from_pretrained" in name:
            assert arguments["trust_remote_code"] == "self.trust_remote_code", file


class MakesFolder:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def model(tiny_bert, tmp_path):
    """A copy of a model, to be changed."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def find(model, **settings):
    given = {"revision": None, "trust_remote_code": False, "local_files_only": True, "pickled_weights": False}
    return find_model(model, **given | settings)


def test_pickled_weights_run_no_code_even_where_they_are_asked_for(model, tmp_path):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": MakesFolder(tmp_path / "ran")}, protocol=2))
    with pytest.raises(ModelFilesError, match="pickled_weights=True"):
        find(model)
    with pytest.raises(ModelFilesError, match="can't be loaded"):
        MatryoshkaEncoder(model, device="cpu", dtype="float32", pickled_weights=True)
    assert not (tmp_path / "ran").exists()


def test_a_models_own_code_is_not_run(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    with pytest.raises(ModelFilesError):
        MatryoshkaEncoder(model, device="cpu", dtype="float32")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_place_of_saved_vectors_is_not_loaded(tmp_path, score_all_up_to):
    score_all_up_to(0)
    vectors = np.random.default_rng(0).normal(size=(300, 16))
    with TwoStageIndex(tmp_path / "db", full_dim=16, shortlist_dim=8) as index:
        index.upsert([str(i) for i in range(300)], vectors)
        expected = [hit.id for hit in index.search(vectors[0])]
    (archive,) = (tmp_path / "db").glob("archive-*.lmdb")
    for saved in (tmp_path / "db").glob("archive-*.npz*"):
        saved.unlink()
    made = np.array([MakesFolder(tmp_path / "ran")], dtype=object)
    with open(archive.with_name(f"{archive.stem}.shortlist.npz"), "wb") as file:
        np.savez(file, about=made, ids=made, codes=made, scales=made, slots=made)
    with TwoStageIndex(tmp_path / "db") as index:
        assert [hit.id for hit in index.search(vectors[0])] == expected
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "path", ["../pooling", "/etc", "..\\pooling", "C:\\pooling", "\\\\host\\pooling", "a\0b", "link"]
)
def test_modules_outside_of_a_models_folder_are_refused(model, path):
    shutil.copytree(model / "1_Pooling", model.parent / "pooling")
    (model / "link").symlink_to(model.parent / "pooling")
    modules = json.loads((model / "modules.json").read_text())
    modules[1]["path"] = path
    (model / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelFilesError, match="outside its folder"):
        find(model)


def test_links_to_files_are_followed_as_the_hubs_cache_has_them(model):
    for name in ("model.safetensors", "config.json"):
        shutil.move(model / name, model.parent / name)
        (model / name).symlink_to(model.parent / name)
    find(model)


def test_weights_in_parts_outside_of_the_folder_are_refused(model):
    shutil.move(model / "model.safetensors", model.parent / "model.safetensors")
    parts = {"weight_map": {"embeddings.word_embeddings.weight": "../model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(parts))
    with pytest.raises(ModelFilesError, match="weights outside of its folder"):
        find(model)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="this system has no such device")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "1_Pooling/config.json"])
def test_a_device_in_place_of_a_models_file_is_not_read(model, name):
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    with pytest.raises(ModelFilesError, match="no file"):
        find(model)


@pytest.mark.parametrize("setting", [{"hidden_size": "x"}, {"hidden_size": -1}, {"num_attention_heads": 0}])
def test_a_config_with_strange_values_is_named(model, setting):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(ModelFilesError, match="can't be loaded"):
        MatryoshkaEncoder(model, device="cpu", dtype="float32")


def test_a_models_file_that_is_nested_too_deep_or_too_long_is_refused(model):
    for content in ("[" * 100_000 + "]" * 100_000, " " * (11 << 20)):
        (model / "modules.json").write_text(content)
        with pytest.raises(ModelFilesError, match=r"modules\.json can't be read"):
            find(model)


class Recording:
    """A tokenizer that remembers how many characters it was given at a time."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, []

    def encode_batch(self, texts):
        self.characters.append(sum(map(len, texts)))
        return self.tokenizer.encode_batch(texts)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.fixture
def recorded(minilm, monkeypatch):
    recording = Recording(minilm._tokenizer._backend)
    monkeypatch.setattr(minilm._tokenizer, "_backend", recording)
    return recording.characters


@pytest.mark.parametrize("piece", ["some words ", "!", "\n", "\0", "東京", "a", "a\u0301"])
def test_of_a_text_of_any_length_no_more_is_tokenized_than_may_fit(minilm, recorded, piece):
    text = piece * (5_000_000 // len(piece))
    vector = minilm.encode([text])
    most = 100 * minilm.max_length
    assert recorded == [most]
    np.testing.assert_array_equal(vector, minilm.encode([text[:most]]))


def test_how_much_of_a_long_text_was_cut_is_estimated(minilm):
    text = "some words and more " * 5000
    minilm.encode([text])
    (tokens,) = minilm.count_tokens([text])
    assert minilm.last_truncation.tokens == pytest.approx(tokens, rel=0.02)


def test_many_long_texts_are_tokenized_a_few_at_a_time_and_counted_as_a_whole(minilm, passages, monkeypatch):
    text = "\n".join(passages)
    whole = minilm.count_tokens([text, "a", text])
    monkeypatch.setattr("mrl_rag.encoder.tokenizing._AT_A_TIME", 3000)
    recording = Recording(minilm._tokenizer._backend)
    monkeypatch.setattr(minilm._tokenizer, "_backend", recording)
    assert minilm.count_tokens([text, "a", text]) == whole
    assert max(recording.characters) <= 3000 < len(text)
    offsets = minilm.token_offsets(text)
    assert len(offsets) == whole[0] - 2 and offsets[-1][1] == len(text.rstrip())
    recording.characters.clear()
    minilm._tokenizer.tokenize(passages, "document")
    assert len(recording.characters) > 1 and max(recording.characters) <= max(3000, *map(len, passages))


@pytest.fixture(scope="module")
def index():
    with TwoStageIndex(full_dim=4, shortlist_dim=2) as index:
        index.upsert(["kept"], np.ones((1, 4)), ["a text"], [{"n": 1}])
        yield index


def test_a_condition_that_stands_for_endlessly_many_is_refused(index):
    doubled = {"n": 1}
    for _ in range(50):  # 2**50 comparisons in 51 dicts
        doubled = {"$and": [doubled, doubled]}
    itself = {"$or": [{"n": 1}]}
    itself["$or"].append(itself)
    for where, words in ((doubled, "more than 20000 comparisons"), (itself, "levels deep")):
        with pytest.raises(InvalidInput, match=words) as refused:
            index.search(np.ones(4), where=where)
        assert len(str(refused.value)) < 800


def test_metadata_of_endless_size_or_depth_is_refused_in_a_short_message(index):
    deep = []
    for _ in range(20_000):
        deep = [deep]
    for metadata in ({f"key {i}": i for i in range(20_000)}, {"a": deep}, {"a": "x", "b": [deep]}, "text", [1]):
        with pytest.raises(InvalidInput, match=r"metadatas\[0\]") as refused:
            index.upsert(["new"], np.ones((1, 4)), metadatas=[metadata])
        assert len(str(refused.value)) < 800
    while deep:  # one level at a time: freeing it at once would recurse
        deep = deep.pop()
    assert len(index) == 1


@pytest.mark.parametrize(
    "id_", ["../../x", "/etc/passwd", "a\0b", "\0", "..", "x" * 100_000, "'; DROP TABLE embeddings; --"]
)
def test_an_id_is_a_name_and_no_path(tmp_path, id_):
    folder = tmp_path / "outer" / "db"
    with TwoStageIndex(folder, full_dim=4, shortlist_dim=2) as index:
        index.upsert(["other", id_], np.eye(4)[:2], ["one", "two"], [{"path": id_[:100]}] * 2)
        assert [hit.id for hit in index.search(np.eye(4)[1], k=1)] == [id_]
        assert index.get([id_])[0].document == "two"
        index.delete([id_])
        assert [record.id for record in index.get()] == ["other"]
    assert [path.name for path in tmp_path.rglob("*") if folder not in path.parents] == ["outer", "db"]


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\0b", "..", "", "x" * 500, "ünï", "abc\n", 5])
def test_a_collections_name_is_no_path(tmp_path, name):
    with pytest.raises(InvalidInput, match="collection is"):
        TwoStageIndex(tmp_path, collection=name)


RECORD = {"id": "a", "document": "d", "metadata": {}, "vector": [1, 0, 0, 0], "model": None, "fingerprint": None}


@pytest.mark.parametrize(
    "changed",
    [
        '"metadata": ' + '{"a":' * 100_000 + "1" + "}" * 100_000,
        '"metadata": ' + json.dumps("[" * 100_000),
        '"vector": [1' + "0" * 5000 + ", 0, 0, 0]",
        '"vector": [NaN, 0, 0, 0]',
        '"vector": [1e999, 0, 0, 0]',
        '"vector": [true, false, true, false]',
        '"id": "\\ud800"',
        '"id": 5',
        '"document": ["d"]',
        '"model": [1]',
    ],
    ids=range(10),
)
def test_records_of_other_types_are_not_imported(tmp_path, changed):
    name = json.loads("{" + changed.partition(":")[0] + ":0}").popitem()[0]
    others = json.dumps({key: value for key, value in RECORD.items() if key != name})
    (tmp_path / "records.jsonl").write_text(f"{others[:-1]}, {changed}}}\n")
    with TwoStageIndex(full_dim=4, shortlist_dim=2) as index:
        with pytest.raises(InvalidInput, match=r"records\.jsonl"):
            index.import_records(tmp_path / "records.jsonl")
        assert len(index) == 0


def loaded(folder):
    problems = []
    return list(load([folder], DeterministicEncoder(8), on_problem=problems.append)), problems


def test_a_row_that_is_nested_too_deep_is_a_problem_of_its_file_alone(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "sound.txt").write_text("a text")
    chunks, (problem,) = loaded(tmp_path)
    assert ([chunk.text for chunk in chunks], Path(problem.path).name) == (["a text"], "deep.jsonl")


def test_fields_that_chroma_does_not_take_are_left_out_of_a_row(tmp_path):
    row = {"text": "a text", "#": 1, "$x": 2, "chroma:y": 3, "kept": 4}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {f"key {i}": i for i in range(2000)}))
    ((chunk,), _) = loaded(tmp_path)
    assert chunk.fields["kept"] == 4 and len(chunk.fields) == 1000
    assert not {"#", "$x", "chroma:y"} & set(chunk.fields)


def test_a_file_that_unpacks_to_very_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("mrl_rag.files.reading._MAX_UNPACKED_BYTES", 20 << 20)
    with (
        zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("word/document.xml", "w", force_zip64=True) as member,
    ):
        for _ in range(21):
            member.write(bytes(1 << 20))
    assert (tmp_path / "bomb.docx").stat().st_size < 1 << 16
    chunks, (problem,) = loaded(tmp_path)
    assert not chunks and "unpacks to 21 MB" in problem.reason
