"""Shards are loaded into any index: all of them, once, and none that isn't what its manifest says."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.errors import (
    DimensionMismatch,
    IndexMismatch,
    InvalidIds,
    InvalidInput,
    ShardError,
    TwoStageIndexError,
)
from mrl_rag.index.shards import ShardFolder
from mrl_rag.scale import encode_dataset, load
from mrl_rag.testing import DeterministicEncoder

from .conftest import record


def everything(index):
    """All that is stored but the vectors, with the types of the values and the order of the keys."""
    return sorted((found.id, found.document, repr(found.metadata)) for found in index.get(vectors=False))


@pytest.fixture
def shards(corpus, output):
    encode_dataset(corpus, output, DeterministicEncoder(16), shard_records=10)
    return output


@pytest.fixture
def folder(corpus, tmp_path):
    """Shards on the disk."""
    encode_dataset(corpus, tmp_path / "shards", DeterministicEncoder(16), shard_records=10)
    return tmp_path / "shards"


def test_what_was_encoded_is_found(shards, tmp_path):
    assert load(shards, tmp_path / "db", shortlist_dim=8) == 25
    with TwoStageIndex(tmp_path / "db") as index:
        assert (index.model, index.fingerprint) == ("DeterministicEncoder", "deterministic-16")
        assert (index.full_dim, index.shortlist_dim, index.verify().ok) == (16, 8, True)
        expected = [(fields["id"], fields["text"], repr(fields["metadata"])) for fields in map(record, range(25))]
        assert everything(index) == sorted(expected)
        query = DeterministicEncoder(16).encode_queries(["passage number 7"])
        assert index.search(query, k=1)[0][0].id == "id-7"


def test_a_server_is_loaded_by_its_url(folder, chroma_server):
    import chromadb

    url = f"http://127.0.0.1:{chroma_server}"
    assert load(folder, url, "loaded", shortlist_dim=8) == 25
    assert load(folder, url, "loaded") == 25
    index = TwoStageIndex(collection="loaded", client=chromadb.HttpClient("127.0.0.1", chroma_server))
    assert (len(index), index.shortlist_dim, index.verify().ok) == (25, 8, True)
    with pytest.raises(TwoStageIndexError, match="can't be reached"):
        load(folder, "http://127.0.0.1:9")
    for url in ("ftp://host", "http://host:port", "http://host/path"):
        with pytest.raises(InvalidInput, match="no Chroma server"):
            load(folder, url)


def test_loading_again_writes_nothing(folder, tmp_path):
    load(folder, tmp_path / "db")
    with TwoStageIndex(tmp_path / "db") as index:
        before = index._session.open().stores.archive.version
        assert load(folder, index) == 25
        assert index._session.open().stores.archive.version == before


def test_an_interrupted_load_goes_on(folder, monkeypatch):
    index, store, calls = TwoStageIndex(), TwoStageIndex._store, []

    def interrupted(self, *given, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        store(self, *given, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(TwoStageIndex, "_store", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(folder, index)
    assert len(index) == 20
    assert load(folder, index) == 25
    assert len(index) == 25
    assert index.verify().ok


def test_the_rotation_is_fitted_once_on_a_sample_of_all_shards(write_lines, tmp_path, monkeypatch):
    from mrl_rag.index import index as module

    records = write_lines({"id": f"{n}", "text": f"{'oak' if n < 200 else 'boat'} {n}"} for n in range(400))
    encode_dataset(records, tmp_path / "shards", DeterministicEncoder(128), shard_records=100)
    fitted, fit = [], module.fit_shortlist
    monkeypatch.setattr("mrl_rag.index.search._EXACT_RECORDS", 150)

    def noting(read, count, *rest):
        fitted.append(read(np.arange(count)))
        return fit(read, count, *rest)

    monkeypatch.setattr(module, "fit_shortlist", noting)
    monkeypatch.setattr("mrl_rag.index.rebuild.fit_shortlist", None)
    index = TwoStageIndex()
    assert load(tmp_path / "shards", index) == 400
    assert index.rotation == "fit"
    assert index.recall > 0.9
    (sample,) = fitted
    half = DeterministicEncoder(128).encode_documents(["oak", "boat"]) @ sample.T
    assert 0.3 < (half[0] > half[1]).mean() < 0.7


def test_shards_of_another_model_or_length_are_refused_before_anything_is_stored(folder):
    other = TwoStageIndex(fingerprint="another")
    other.upsert(["x"], np.ones((1, 16)))
    with pytest.raises(IndexMismatch, match=r"deterministic-16.*another"):
        load(folder, other)
    longer = TwoStageIndex()
    longer.upsert(["x"], np.ones((1, 32)))
    with pytest.raises(DimensionMismatch, match="16 numbers, and index 'docs' of 32"):
        load(folder, longer)
    assert len(other) == len(longer) == 1


def rewrite(folder, change):
    """Change the first shard's table, and have the manifest say so."""
    manifest = json.loads((folder / "_manifest.json").read_text())
    shard = manifest["shards"][0]
    file = folder / shard["file"]
    pq.write_table(change(pq.read_table(file)), file)
    data = file.read_bytes()
    shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "_manifest.json").write_text(json.dumps(manifest))


def column(name, values, type_=None):
    def change(table):
        array = pa.array(values(table[name].to_pylist()), type_ or table.schema.field(name).type)
        place = table.schema.get_field_index(name)
        changed = table.set_column(place, pa.field(name, array.type), array)
        return changed.replace_schema_metadata(table.schema.metadata)

    return change


def header(**changed):
    def change(table):
        about = json.loads(table.schema.metadata[b"mrl_rag"]) | changed
        return table.replace_schema_metadata({"mrl_rag": json.dumps(about)})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (header(fingerprint="another"), "fingerprint='another'"),
        (header(format=99), "no metadata 'mrl_rag' of format"),
        (lambda table: table.drop(["metadata"]), "its columns are"),
        (lambda table: table.slice(1), "it has 9 records; the manifest says 10"),
        (column("vector", lambda rows: [row[:8] for row in rows], pa.list_(pa.float16(), 8)), "full_dim=8"),
        (column("vector", lambda rows: rows, pa.list_(pa.float64(), 16)), "not a fixed-size list of float16"),
        (column("vector", lambda rows: [[float("nan")] * 16, *rows[1:]]), "NaN"),
        (column("id", lambda rows: list(range(10)), pa.int64()), "not strings"),
        (column("id", lambda rows: [None, *rows[1:]]), "id"),
        (column("metadata", lambda rows: ["{", *rows[1:]]), "Expecting"),
        (column("metadata", lambda rows: ["[" * 100_000, *rows[1:]]), "recursion"),
        (column("metadata", lambda rows: ['{"a": {}}', *rows[1:]]), "Chroma doesn't take"),
    ],
)
def test_a_shard_with_other_types_or_values_is_refused(folder, change, said):
    rewrite(folder, change)
    index = TwoStageIndex()
    with pytest.raises(ShardError, match=f"shard-00000.*{said}"):
        load(folder, index)
    assert len(index) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["shards"][0].update(file="../../etc/passwd"), "a shard is"),
        (lambda m: m["shards"][0].update(file="shard-00009-0123456789abcdef.parquet"), "should have"),
        (lambda m: m["shards"][0].update(bytes=10), "should have 10 bytes, and has"),
        (lambda m: m["shards"][0].update(bytes=10**12), "at most"),
        (lambda m: m["shards"][0].update(records=3), "its shards are"),
        (lambda m: (m["shards"][0].update(records=9), m["shards"][1].update(records=11)), "the manifest says"),
        (lambda m: m["shards"][0].update(sha256="0" * 64), "checksum"),
        (lambda m: m["shards"][0].update(sha256=7), "a shard is"),
        (lambda m: m["shards"].append(m["shards"][0]), "repeated"),
        (lambda m: m["shards"].pop(), "its shards are"),
        (lambda m: m.update(full_dim=99), "full_dim=99"),
        (lambda m: m.update(full_dim=True), "full_dim is True"),
        (lambda m: m.update(precision="int4"), "int4"),
        (lambda m: m.update(fingerprint="another"), "another"),
        (lambda m: m.update(format=2), "format"),
        (lambda m: m.update(shards={}), "shards is"),
        (lambda m: m.update(shards=None), "isn't complete"),
        (lambda m: m.clear(), "format"),
    ],
)
def test_a_manifest_that_lies_is_refused(folder, change, said):
    manifest = json.loads((folder / "_manifest.json").read_text())
    change(manifest)
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    index = TwoStageIndex()
    with pytest.raises(ShardError, match=said):
        load(folder, index)
    assert len(index) == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, b"\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / "_manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ShardError, match="manifest"):
        load(folder, TwoStageIndex())
    (folder / "_manifest.json").unlink()
    with pytest.raises(ShardError, match=r"has no _manifest\.json"):
        load(folder, folder.parent / "db")
    assert not (folder.parent / "db").exists()


def test_an_id_in_two_shards_is_named(folder):
    rewrite(folder, column("id", lambda rows: ["id-24", *rows[1:]]))
    index = TwoStageIndex()
    with pytest.raises(InvalidIds, match=r"id 'id-24' occurs in shard-00000.* and in shard-00002"):
        load(folder, index)
    assert len(index) == 0


def test_an_export_is_loaded_again_bit_for_bit(shards, output, monkeypatch):
    monkeypatch.setattr("mrl_rag.index.shards.SHARD_RECORDS", 10)
    index, again = TwoStageIndex(), TwoStageIndex()
    load(shards, index)
    backup = f"{output}-backup"
    assert index.export(backup) == 25
    assert load(backup, again) == 25
    assert everything(again) == everything(index)
    ids = index.ids()
    stored = [opened._session.open().stores.archive.read(ids)[1] for opened in (index, again)]
    assert np.array_equal(*stored)


def test_an_export_replaces_the_one_before_when_it_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr("mrl_rag.index.shards.SHARD_RECORDS", 500)
    index = TwoStageIndex()
    index.upsert([f"{n}" for n in range(1200)], np.ones((1200, 4)))
    index.export(tmp_path / "backup")
    before = sorted(file.name for file in (tmp_path / "backup").iterdir())
    assert len(before) == 4
    index.upsert(["0"], [[1.0, 2.0, 3.0, 4.0]])
    with monkeypatch.context() as patch:
        patch.setattr("mrl_rag.index.shards.ShardFolder.finish", None)
        with pytest.raises(TypeError):
            index.export(tmp_path / "backup")
    assert load(tmp_path / "backup", TwoStageIndex()) == 1200
    index.clear()
    assert index.export(tmp_path / "backup") == 0
    assert [file.name for file in (tmp_path / "backup").iterdir()] == ["_manifest.json"]
    assert load(tmp_path / "backup", TwoStageIndex()) == 0


def test_a_folder_that_cannot_be_written_is_named(folder):
    index = TwoStageIndex()
    index.upsert(["a"], np.ones((1, 4)))
    file = folder / "_manifest.json"
    with pytest.raises(InvalidInput, match="can't be read or written"):
        ShardFolder(file / "below").begin(None or ShardFolder(folder).manifest().header)
