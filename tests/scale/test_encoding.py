"""A corpus becomes shards: each record once, with its own vector, whatever it came in and whatever happened."""

import json
import sys
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl_rag import TwoStageIndex
from mrl_rag.errors import IndexMismatch, InvalidIds, InvalidInput, InvalidTexts, MissingExtra, MrlRagError, ShardError
from mrl_rag.index.export import Batch, Header
from mrl_rag.index.location import Location
from mrl_rag.index.shards import ShardFolder
from mrl_rag.scale import encode_dataset
from mrl_rag.testing import DeterministicEncoder

from .conftest import record

RECORDS = [record(number) for number in range(25)]


def as_jsonl(folder, encoder):
    (folder / "in.jsonl").write_text("\n\n".join(map(json.dumps, RECORDS)))
    return folder / "in.jsonl"


def as_parquet(folder, encoder):
    table = {
        "id": [fields["id"] for fields in RECORDS],
        "text": [fields["text"] for fields in RECORDS],
        "metadata": [json.dumps(fields["metadata"]) for fields in RECORDS],
    }
    pq.write_table(pa.table(table), folder / "in.parquet", row_group_size=7)
    return folder / "in.parquet"


def as_columns(folder, encoder):
    columns = {key: [fields["metadata"][key] for fields in RECORDS] for key in RECORDS[0]["metadata"]}
    both = {key: [fields[key] for fields in RECORDS] for key in ("id", "text")}
    pq.write_table(pa.table(both | columns), folder / "in.parquet")
    return folder / "in.parquet"


def as_folder(folder, encoder):
    (folder / "in" / "deeper").mkdir(parents=True)
    for number, fields in enumerate(RECORDS):
        (folder / "in" / "deeper" / f"{number:02}.jsonl").write_text(json.dumps(fields))
    (folder / "in" / "notes.txt").write_text("no record")
    return folder / "in"


def as_index(folder, encoder):
    with TwoStageIndex(folder / "db", full_dim=4) as index:
        texts, metadatas = zip(*((fields["text"], fields["metadata"]) for fields in RECORDS), strict=True)
        index.upsert([fields["id"] for fields in RECORDS], np.ones((25, 4)), texts, metadatas)
    return folder / "db"


def as_exported(folder, encoder):
    with TwoStageIndex(as_index(folder, encoder)) as index:
        index.export(folder / "exported")
    return folder / "exported"


def contents(place):
    """Everything in the shards that their manifest names."""
    folder = ShardFolder(place)
    manifest = folder.complete()
    folder.check(manifest)
    batches = list(folder.read_ahead(manifest))
    ids = [id_ for batch in batches for id_ in batch.ids]
    texts = [text for batch in batches for text in batch.documents]
    metadatas = [metadata for batch in batches for metadata in batch.metadatas]
    return ids, texts, metadatas, np.concatenate([batch.vectors for batch in batches])


@pytest.mark.parametrize("given", [as_jsonl, as_parquet, as_columns, as_folder, as_index, as_exported])
def test_each_record_is_there_once_with_its_own_vector(tmp_path, encoder, output, given):
    done = encode_dataset(given(tmp_path, encoder), output, encoder, shard_records=10)
    assert (done.records, done.shards, done.reused, done.truncated) == (25, 3, 0, 0)
    ids, texts, metadatas, vectors = contents(output)
    order = sorted(range(25), key=lambda row: int(ids[row].removeprefix("id-")))
    assert [ids[row] for row in order] == [fields["id"] for fields in RECORDS]
    assert [texts[row] for row in order] == [fields["text"] for fields in RECORDS]
    # With the types of the values and the order of the keys.
    assert [repr(metadatas[row]) for row in order] == [repr(fields["metadata"]) for fields in RECORDS]
    np.testing.assert_allclose(vectors, encoder.encode_documents(texts), atol=1e-3)


def test_a_shard_is_read_by_other_tools(corpus, tmp_path, encoder):
    encode_dataset(corpus, tmp_path / "shards", encoder, shard_records=10)
    table = pq.read_table(sorted((tmp_path / "shards").glob("*.parquet"))[0])
    assert table.column_names == ["id", "document", "metadata", "vector"]
    assert table.schema.field("vector").type == pa.list_(pa.float16(), encoder.full_dim)
    manifest = json.loads((tmp_path / "shards" / "_manifest.json").read_text())
    assert (manifest["model"], manifest["fingerprint"]) == (encoder.model, encoder.fingerprint)
    assert [shard["records"] for shard in manifest["shards"]] == [10, 10, 5]
    # All shards have one schema, so that a folder of them is one table.
    assert pq.read_table(tmp_path / "shards").num_rows == 25


class Interrupted(DeterministicEncoder):
    """Is interrupted at its third shard."""

    calls = 0

    def _encode(self, texts, task, dim, advance):
        Interrupted.calls += 1
        if Interrupted.calls == 3:
            raise KeyboardInterrupt
        return super()._encode(texts, task, dim, advance)


def test_what_was_interrupted_goes_on(corpus, output, monkeypatch):
    monkeypatch.setattr(Interrupted, "calls", 0)
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(corpus, output, Interrupted(8), shard_records=5)
    with pytest.raises(ShardError, match="isn't complete yet"):
        contents(output)
    done = encode_dataset(corpus, output, Interrupted(8), shard_records=5)
    assert (done.records, done.shards, done.reused) == (25, 5, 2)
    assert sorted(contents(output)[0]) == sorted(fields["id"] for fields in RECORDS)
    assert Interrupted.calls == 6


@pytest.mark.parametrize("place", [0.02, 0.2, 0.3, 0.5, 0.8, None])
def test_a_damaged_shard_is_made_again(corpus, tmp_path, encoder, place):
    shards = tmp_path / "shards"
    encode_dataset(corpus, shards, encoder, shard_records=10)
    before = contents(shards)
    damaged = sorted(shards.glob("shard-00001-*"))[0]
    data = bytearray(damaged.read_bytes())
    if place is None:
        del data[-10:]
    else:
        data[int(place * len(data))] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard-00001.* is damaged"):
        contents(shards)
    encode_dataset(corpus, shards, encoder, shard_records=10)
    after = contents(shards)
    assert after[:3] == before[:3]
    np.testing.assert_allclose(after[3], before[3], atol=1e-3)


def test_only_shards_of_changed_records_are_made_again(write_lines, tmp_path, encoder):
    shards = tmp_path / "shards"
    encode_dataset(write_lines(RECORDS), shards, encoder, shard_records=10)
    changed = [fields | {"text": "another"} if fields["id"] == "id-3" else fields for fields in RECORDS]
    assert encode_dataset(write_lines(changed), shards, encoder, shard_records=10).reused == 2
    assert contents(shards)[1][3] == "another"
    # What the manifest doesn't name is gone.
    assert encode_dataset(write_lines(RECORDS[:8]), shards, encoder, shard_records=10).records == 8
    assert len(list(shards.iterdir())) == 2


@pytest.mark.parametrize("files", [1, 2])
def test_an_id_that_occurs_twice_is_named_before_anything_is_encoded(write_lines, tmp_path, files):
    twice = [RECORDS[7], RECORDS[20]]
    inputs = [write_lines(RECORDS + twice)] if files == 1 else [write_lines(RECORDS), write_lines(twice, "more.jsonl")]
    with pytest.raises(InvalidIds, match=r"id 'id-(7|20)' occurs in .*jsonl"):
        encode_dataset(inputs, tmp_path / "shards", Interrupted(8), shard_records=10)
    assert not list((tmp_path / "shards").glob("*.parquet"))


def test_shards_of_another_model_are_not_replaced(corpus, output):
    encode_dataset(corpus, output, DeterministicEncoder(8))
    with pytest.raises(IndexMismatch, match=r"has shards of .*deterministic-8.*deterministic-16"):
        encode_dataset(corpus, output, DeterministicEncoder(16))
    assert len(contents(output)[0]) == 25


def test_texts_that_were_cut_are_counted(write_lines, tmp_path, encoder):
    long = write_lines([{"id": "a", "text": "word " * 100}, {"id": "b", "text": "word"}])
    with pytest.warns(UserWarning, match="1 of 2 texts were longer"):
        assert encode_dataset(long, tmp_path / "shards", encoder).truncated == 1


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ("{not json", InvalidInput, r"in\.jsonl: record 1 can't be read"),
        ("[1]", InvalidInput, "no JSON object"),
        ("[" * 100_000, InvalidInput, "record 1 can't be read"),
        ({"text": "x"}, InvalidIds, "an id is None"),
        ({"id": "", "text": "x"}, InvalidIds, "non-empty"),
        ({"id": 1.5, "text": "x"}, InvalidIds, "an id is 1.5"),
        ({"id": "\ud800", "text": "x"}, InvalidIds, "surrogates"),
        ({"id": "b"}, InvalidTexts, r"texts\[1\] is None"),
        ({"id": "b", "text": 7}, InvalidTexts, r"texts\[1\] is 7"),
        ({"id": "b", "text": "\ud800"}, InvalidTexts, "Unicode"),
        ({"id": "b", "text": "x", "metadata": [1]}, InvalidInput, "no object"),
        ({"id": "b", "text": "x", "metadata": "{"}, InvalidInput, "can't be read"),
        ({"id": "b", "text": "x", "metadata": "[" * 100_000}, InvalidInput, "can't be read"),
        ({"id": "b", "text": "x", "metadata": {"deep": {"a": 1}}}, InvalidInput, "Chroma doesn't take"),
        ({"id": "b", "text": "x", "large": 2**70}, InvalidInput, "64-bit"),
        ({"id": "b", "text": "x", "metadata": {f"k{n}": 1 for n in range(6000)}}, InvalidInput, "stores up to"),
    ],
)
def test_a_record_that_cannot_be_stored_is_named(tmp_path, fields, error, said):
    line = fields if isinstance(fields, str) else json.dumps(fields)
    (tmp_path / "in.jsonl").write_text(f'{{"id": "a", "text": "fine"}}\n{line}\n')
    with pytest.raises(error, match=said) as raised:
        encode_dataset(tmp_path / "in.jsonl", tmp_path / "shards", DeterministicEncoder(8))
    assert "in.jsonl" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nothing.jsonl", None, "nothing"),
        ("in.csv", b"a,b", "file that can be read"),
        ("in.parquet", b"no parquet", "Parquet"),
        ("in.jsonl", b"\n", "no records"),
        ("empty/", None, "has no files"),
    ],
)
def test_an_input_that_cannot_be_read_is_named(tmp_path, name, content, said):
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=said):
        encode_dataset(tmp_path / name, tmp_path / "shards", DeterministicEncoder(8))


def test_columns_that_are_missing_are_named(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "body": ["x"]}), tmp_path / "in.parquet")
    with pytest.raises(InvalidInput, match=r"in\.parquet.*\['id', 'body'\]; it needs id, and document or text"):
        encode_dataset(tmp_path / "in.parquet", tmp_path / "shards", DeterministicEncoder(8))


def test_without_ray_or_the_package_of_a_url_the_install_line_is_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"mrl-rag\[ray\]"):
        encode_dataset(corpus, tmp_path / "shards", DeterministicEncoder(8), engine="ray")
    with pytest.raises(MissingExtra, match="adlfs"):
        Location("az://container/shards")
    with pytest.raises(InvalidInput, match="nosuch"):
        Location("nosuch://place")


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5), shard=st.integers(1, 9))
def test_however_files_and_shards_are_cut_each_record_is_in_one_shard(sizes, shard):
    place = Location(f"memory://{uuid.uuid4().hex}")
    expected = [f"{file}-{row}" for file, size in enumerate(sizes) for row in range(size)]
    for file, size in enumerate(sizes):
        lines = "".join(json.dumps({"id": f"{file}-{row}", "text": "é\u2028" * row}) + "\r\n" for row in range(size))
        place.write(f"{file}.jsonl", lines.encode())
    if not expected:
        with pytest.raises(MrlRagError, match="no records"):
            encode_dataset(place.name, f"{place.name}/out", DeterministicEncoder(2), shard_records=shard)
        return
    done = encode_dataset(place.name, f"{place.name}/out", DeterministicEncoder(2), shard_records=shard)
    assert contents(f"{place.name}/out")[0] == expected
    assert done.records == len(expected)
    assert all(len(ids) <= shard for ids in (entry.records * [0] for entry in _shards(f"{place.name}/out")))


def _shards(place):
    return ShardFolder(place).complete().shards


VALUES = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=1, max_size=3),
    st.lists(st.booleans(), min_size=1, max_size=3),
)
KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9).filter(
    lambda key: not key.startswith(("$", "#", "chroma:"))
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=4), min_size=1, max_size=5))
def test_every_metadata_value_comes_back_exactly(metadatas):
    folder, header = ShardFolder(f"memory://{uuid.uuid4().hex}"), Header("m", "f", 2, "float16")
    ids = [f"{row}" for row in range(len(metadatas))]
    batch = Batch(ids, ["text"] * len(ids), metadatas, np.ones((len(ids), 2), np.float32))
    manifest = folder.finish(header, [folder.write(0, None, header, [batch])])
    assert repr(folder.read(manifest.shards[0], header).metadatas) == repr(metadatas)
