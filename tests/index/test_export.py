"""An export is a backup: every record whole, readable by other tools, and the same again after an import."""

import functools
import json
import multiprocessing
import sys
import threading
import tracemalloc

import chromadb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.errors import ArchiveError, DimensionMismatch, IndexMismatch, InvalidInput, MissingExtra

DIM = 24
VECTORS = np.random.default_rng(0).normal(size=(130, DIM)).astype(np.float32)
IDS = [f"id-{number}" for number in range(130)]
TEXTS = [f"text {number}\r\n\u2028 «é» 東京 😀" for number in range(130)]
METADATAS = [
    {
        "z": number,
        "a": 'quotes " and \\ and ünïcode',
        "large": 2**62 + number,
        "float": 1.0,
        "small": 0.1 * number,
        "flag": number % 2 == 0,
        "texts": ["b", "a"],
        "numbers": [1, 2, 3],
        "floats": [1.0, 0.5],
        "flags": [True, False],
    }
    for number in range(130)
]
EITHER = pytest.mark.parametrize("name", ["backup.parquet", "backup.jsonl"])


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """So that the records are several batches, the last one a short one."""
    for module in ("index", "export"):
        monkeypatch.setattr(f"mrl_rag.index.{module}.BATCH", 50)


def fill(index):
    index.upsert(IDS[:-2], VECTORS[:-2], TEXTS[:-2], METADATAS[:-2])
    # One without metadata, one without a document.
    index.upsert(IDS[-2:], VECTORS[-2:], [TEXTS[-2], None], [None, METADATAS[-1]])
    return index


def everything(index):
    """All that is stored, with the types of the values and the order of the keys."""
    return [(record.id, record.document, repr(record.metadata)) for record in index.get(vectors=False)]


def stored(index, ids=IDS):
    return index._session.open().stores.archive.read(ids)[1]


@EITHER
def test_what_is_imported_is_what_was_exported(open_index, tmp_path, name):
    index = fill(open_index(model="a model", fingerprint="abc"))
    assert index.export(tmp_path / name) == 130
    assert [file.name for file in tmp_path.glob("*backup*")] == [name]
    again = TwoStageIndex()
    assert again.import_records(tmp_path / name) == 130
    assert everything(again) == everything(index)
    assert (again.model, again.fingerprint, again.full_dim) == ("a model", "abc", DIM)
    assert again.verify().ok
    np.testing.assert_allclose(stored(again), stored(index), atol=1e-3)
    assert again.search(VECTORS[7], k=1)[0].id == "id-7"


@EITHER
@pytest.mark.parametrize("dim", [2, DIM])
def test_vectors_come_back_bit_for_bit(tmp_path, name, dim):
    index = TwoStageIndex()
    ids = [str(number) for number in range(500)]
    index.upsert(ids, np.random.default_rng(0).normal(size=(500, dim)))
    index.export(tmp_path / name)
    again = TwoStageIndex()
    again.import_records(tmp_path / name)
    assert np.array_equal(stored(again, ids), stored(index, ids))
    # What is there already is left alone.
    version = again._session.open().stores.archive.version
    again.import_records(tmp_path / name)
    assert again._session.open().stores.archive.version == version


@EITHER
@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_an_archive_of_any_precision_can_be_exported(tmp_path, name, precision):
    index = fill(TwoStageIndex(precision=precision))
    index.export(tmp_path / name)
    again = TwoStageIndex(precision=precision)
    again.import_records(tmp_path / name)
    np.testing.assert_allclose(stored(again), stored(index), atol=1e-2)
    assert again.verify().ok


@pytest.mark.parametrize(("precision", "number"), [("float16", pa.float16()), ("int8", pa.float32())])
def test_a_parquet_file_is_read_by_other_tools(tmp_path, precision, number):
    fill(TwoStageIndex(model="a model", fingerprint="abc", precision=precision)).export(tmp_path / "backup.parquet")
    table = pq.read_table(tmp_path / "backup.parquet")
    assert table.column_names == ["id", "document", "metadata", "vector"]
    assert table.schema.field("vector").type == pa.list_(number, DIM)
    about = json.loads(table.schema.metadata[b"mrl_rag"])
    assert (about["model"], about["fingerprint"], about["full_dim"]) == ("a model", "abc", DIM)
    row = table.slice(3, 1).to_pylist()[0]
    assert (row["id"], row["document"], json.loads(row["metadata"])) == ("id-3", TEXTS[3], METADATAS[3])
    np.testing.assert_allclose(np.array(row["vector"], float), VECTORS[3] / np.linalg.norm(VECTORS[3]), atol=1e-2)
    assert pq.read_metadata(tmp_path / "backup.parquet").row_group(0).num_rows == 50


def test_a_line_of_json_is_a_record(tmp_path):
    fill(TwoStageIndex(model="a model", fingerprint="abc")).export(tmp_path / "backup.jsonl")
    lines = (tmp_path / "backup.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 131
    record = json.loads(lines[3])
    assert list(record) == ["id", "document", "metadata", "vector", "model", "fingerprint"]
    assert (record["id"], record["document"], record["metadata"]) == ("id-3", TEXTS[3], METADATAS[3])
    assert (len(record["vector"]), record["model"], record["fingerprint"]) == (DIM, "a model", "abc")


WRITER = """
import numpy as np
from mrl_rag import TwoStageIndex
index = TwoStageIndex(folder)
def vectors(turn): return np.random.default_rng(turn).normal(size=(200, 24))
turn = 0
while True:
    turn += 1
    index.upsert([f"r{n}" for n in range(200)], vectors(turn), [f"{turn} {n}" for n in range(200)],
                 [{"turn": turn}] * 200)
    index.upsert([f"new {turn}"], vectors(turn)[:1], [f"{turn} 0"], [{"turn": turn}])
    index.delete([f"new {turn - 2}"])
    if turn % 5 == 0: index.reindex()
    if turn % 7 == 0: index.compact()
    connection.send(turn)
"""


def test_each_record_is_whole_while_another_process_writes(tmp_path, start_process):
    ours, theirs = multiprocessing.Pipe()
    writer = start_process(WRITER, folder=tmp_path / "db", connection=theirs)
    ours.recv()
    index = TwoStageIndex(tmp_path / "db")
    for _ in range(4):
        index.export(tmp_path / "backup.parquet")
        again = TwoStageIndex()
        again.import_records(tmp_path / "backup.parquet")
        records = {record.id: record for record in again.get()}
        assert {f"r{n}" for n in range(200)} <= records.keys()
        for record in records.values():
            turn, row = map(int, record.document.split())
            assert record.metadata == {"turn": turn}
            expected = vectors_of(turn)[row]
            np.testing.assert_allclose(record.vector, expected / np.linalg.norm(expected), atol=1e-3)
    assert writer.is_alive()
    writer.kill()
    writer.join()
    index.close()


@functools.cache
def vectors_of(turn):
    return np.random.default_rng(turn).normal(size=(200, 24))


@EITHER
def test_memory_holds_no_more_than_a_batch(tmp_path, name):
    index = TwoStageIndex()
    text = "x" * 20_000
    rows = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    index.upsert([str(row) for row in range(500)], rows, [f"{row} {text}" for row in range(500)])
    again = TwoStageIndex()
    # 10 MB of documents, and 1 MB in a batch.
    peaks = []
    for work in (lambda: index.export(tmp_path / name), lambda: again.import_records(tmp_path / name)):
        tracemalloc.start()
        assert work() == 500
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 5_000_000


@EITHER
def test_an_export_that_fails_leaves_the_old_file(tmp_path, name, archive_of):
    index = fill(TwoStageIndex(tmp_path / "db"))
    index.export(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    index.close()
    archive_of(tmp_path / "db").damage("id-90")
    with TwoStageIndex(tmp_path / "db") as damaged, pytest.raises(ArchiveError, match="id-90"):
        damaged.export(tmp_path / name)
    assert (tmp_path / name).read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, "db"])


@pytest.mark.parametrize("lost", ["missing", "stale"])
def test_a_record_without_the_vector_of_its_document_is_named(tmp_path, archive_of, lost, monkeypatch):
    monkeypatch.setattr("mrl_rag.index.export._WAIT", 0.001)
    fill(TwoStageIndex(tmp_path / "db")).close()
    if lost == "missing":
        archive_of(tmp_path / "db").lose("id-90")
    else:
        collection = chromadb.PersistentClient(tmp_path / "db").get_collection("docs")
        collection.update(["id-90"], documents=["changed"], embeddings=np.ones((1, DIM)))
    with TwoStageIndex(tmp_path / "db") as index, pytest.raises(ArchiveError, match=r"'id-90'.*repair"):
        index.export(tmp_path / "backup.jsonl")


def test_an_interrupted_import_goes_on(tmp_path, monkeypatch):
    fill(TwoStageIndex()).export(tmp_path / "backup.jsonl")
    index = TwoStageIndex()
    store, calls = TwoStageIndex._store, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        store(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(TwoStageIndex, "_store", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.import_records(tmp_path / "backup.jsonl")
    assert len(index) == 100
    assert index.import_records(tmp_path / "backup.jsonl") == 130
    assert index.verify().records == 130


@EITHER
def test_a_file_of_another_model_or_length_is_refused(tmp_path, name):
    fill(TwoStageIndex(model="a model", fingerprint="abc")).export(tmp_path / name)
    for given in ({"fingerprint": "def"}, {"model": "another"}):
        index = TwoStageIndex(**given)
        index.upsert(["x"], VECTORS[:1])
        with pytest.raises(IndexMismatch, match=r"a model.*abc.*Import it into a new collection"):
            index.import_records(tmp_path / name)
        assert len(index) == 1
    other = TwoStageIndex()
    other.upsert(["x"], VECTORS[:1, :8])
    with pytest.raises(DimensionMismatch, match="24 numbers, and index 'docs' of 8"):
        other.import_records(tmp_path / name)
    with pytest.raises(DimensionMismatch):
        TwoStageIndex(full_dim=8).import_records(tmp_path / name)


def good(**changed):
    return {
        "id": "a",
        "document": "text",
        "metadata": {},
        "vector": [1.0, 0.0],
        "model": "m",
        "fingerprint": "f",
    } | changed


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{not json"], "line 1"),
        (["[1, 2]"], "no JSON object"),
        ([json.dumps(good(vector=[10**400, 1]))], "line 1"),
        ([json.dumps(good())[:-9]], "line 1"),
        ([json.dumps({"id": "a"})], "vector"),
        ([json.dumps(good(vector="x"))], "no list of numbers"),
        ([json.dumps(good(vector=[1, None]))], "no list of numbers"),
        ([json.dumps(good(vector=[True, 1]))], "no list of numbers"),
        ([json.dumps(good(vector=[]))], "no list of numbers"),
        ([json.dumps(good(vector=[float("nan"), 1]))], "NaN"),
        ([json.dumps(good(id=7))], "id is a non-empty string"),
        ([json.dumps(good(document=7))], "a document is a string"),
        ([json.dumps(good(metadata=[1]))], "no JSON object"),
        ([json.dumps(good(metadata={"a": {"b": 1}}))], "Chroma doesn't take"),
        ([json.dumps(good(model=7))], "no string"),
        ([json.dumps(good()), json.dumps(good())], "'a'.* more than once"),
        ([json.dumps(good()), json.dumps(good(id="b", vector=[1.0]))], "line 2"),
        ([json.dumps(good()), json.dumps(good(id="b", fingerprint="g"))], "line 2"),
        ([json.dumps(good(id=f"{n}")) for n in range(50)] + [json.dumps(good(id="7"))], "'7'.* more than once"),
        ([json.dumps(good(id=f"{n}")) for n in range(50)] + ["nothing"], "line 51"),
    ],
)
def test_a_damaged_json_file_is_refused_before_anything_is_stored(tmp_path, lines, said):
    file = tmp_path / "backup.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    index = TwoStageIndex()
    with pytest.raises(InvalidInput, match=f"(?s)no file of records, or is damaged.*{said}"):
        index.import_records(file)
    assert len(index) == 0


def parquet(file, about=True, **changed):
    vector = pa.array([[1.0, 0.0]], pa.list_(pa.float32(), 2))
    columns = {"id": pa.array(["a"]), "document": pa.array(["text"]), "metadata": pa.array(["{}"]), "vector": vector}
    table = pa.table({name: column for name, column in (columns | changed).items() if column is not None})
    if about:
        header = {"format": 1, "model": "m", "fingerprint": "f", "full_dim": 2, "precision": "float32"}
        table = table.replace_schema_metadata({"mrl_rag": json.dumps(header)})
    pq.write_table(table, file)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"about": False}, "no metadata 'mrl_rag'"),
        ({"vector": None}, "its columns are"),
        ({"more": pa.array(["x"])}, "its columns are"),
        ({"id": pa.array([7])}, "not strings"),
        ({"id": pa.array([None], pa.string())}, "has no id"),
        ({"id": pa.array([""])}, "non-empty string"),
        ({"metadata": pa.array(["{"])}, "Expecting"),
        ({"metadata": pa.array(["[]"])}, "no JSON object"),
        ({"vector": pa.array([[1.0, 0.0]])}, "not a fixed-size list"),
        ({"vector": pa.array([[1, 0]], pa.list_(pa.int32(), 2))}, "not a fixed-size list"),
        ({"vector": pa.array([[1.0, None]], pa.list_(pa.float32(), 2))}, "missing numbers"),
        ({"vector": pa.array([None], pa.list_(pa.float32(), 2))}, "has no id, metadata or vector"),
    ],
)
def test_a_wrong_parquet_file_is_refused_before_anything_is_stored(tmp_path, changed, said):
    file = tmp_path / "backup.parquet"
    parquet(file)
    assert TwoStageIndex().import_records(file) == 1
    parquet(file, **changed)
    index = TwoStageIndex()
    with pytest.raises(InvalidInput, match=said):
        index.import_records(file)
    assert len(index) == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_parquet_file_is_refused(tmp_path, damage):
    file = tmp_path / "backup.parquet"
    fill(TwoStageIndex()).export(file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
    file.write_bytes({"cut": data[:-100], "flipped": data, "empty": b"", "text": b"some text" * 99}[damage])
    index = TwoStageIndex()
    with pytest.raises(InvalidInput, match="damaged"):
        index.import_records(file)
    assert len(index) == 0


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda index, folder: index.export(folder / "backup.csv"), r"end in \.parquet"),
        (lambda index, folder: index.export(folder / "nowhere" / "backup.jsonl"), "can't be written"),
        (lambda index, folder: index.export(folder / "nowhere" / "backup.parquet"), "can't be written"),
        (lambda index, folder: index.import_records(folder / "backup.csv"), r"end in \.parquet"),
        (lambda index, folder: index.import_records(folder / "backup.jsonl"), "can't be read"),
        (lambda index, folder: index.import_records(folder / "backup.parquet"), "can't be read"),
        (lambda index, folder: TwoStageIndex().export(folder / "backup.jsonl"), "nothing is stored"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, work, said):
    index = TwoStageIndex()
    index.upsert(["a"], VECTORS[:1])
    with pytest.raises(InvalidInput, match=said):
        work(index, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    index = TwoStageIndex()
    index.upsert(["a"], VECTORS[:1])
    with pytest.raises(MissingExtra, match=r"mrl-rag\[parquet\]"):
        index.export(tmp_path / "backup.parquet")
    assert index.export(tmp_path / "backup.jsonl") == 1


@EITHER
def test_an_emptied_index_is_exported_as_no_records(tmp_path, name):
    index = TwoStageIndex()
    index.upsert(["a"], VECTORS[:1])
    index.clear()
    assert index.export(tmp_path / name) == 0
    assert TwoStageIndex().import_records(tmp_path / name) == 0


def test_an_export_ends_with_an_error_when_the_index_is_dropped(tmp_path, monkeypatch):
    index = fill(TwoStageIndex(tmp_path / "db"))
    from mrl_rag.index import index as module

    read, dropped = module.read_whole, threading.Event()

    def reading(*given):
        if not dropped.is_set():
            dropped.set()
            threading.Thread(target=TwoStageIndex(tmp_path / "db").drop).run()
        return read(*given)

    monkeypatch.setattr(module, "read_whole", reading)
    with pytest.raises(Exception, match="dropped meanwhile"):
        index.export(tmp_path / "backup.jsonl")
    assert not (tmp_path / "backup.jsonl").exists()
    index.close()
