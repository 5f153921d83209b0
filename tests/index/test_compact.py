"""`compact` gives disk space back; other processes go on reading, and nothing that others put there is touched."""

import os
import shutil
import uuid

import chromadb
import numpy as np
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.errors import IndexNotWritable, InvalidInput

IDS = [f"id-{number}" for number in range(2000)]
VECTORS = np.random.default_rng(0).normal(size=(2000, 128)).astype(np.float32)
TEXTS = [f"text {number} " * 10 for number in range(2000)]
ELSEWHERE = """
import numpy as np
from mrl_rag import TwoStageIndex
import mrl_rag.index.search as search
vectors = np.random.default_rng(0).normal(size=(2000, 128)).astype(np.float32)
def nearest(index, rows, **settings):
    return [hits[0].id for hits in index.search(vectors[rows], k=1, **settings)]
"""


@pytest.fixture
def elsewhere(other_process):
    """Run code in another process, which has `vectors` and `nearest`, and return its `answer`, or its error."""

    def run(code):
        answer, error = other_process(code)
        return answer if error is None else ": ".join(error)

    assert run(ELSEWHERE) is None
    return run


def fill(index):
    index.upsert(IDS, VECTORS, TEXTS, [{"n": number} for number in range(2000)])
    return index


@pytest.fixture(scope="module")
def filled_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled") / "db"
    fill(TwoStageIndex(folder)).close()
    return folder


@pytest.fixture(scope="module")
def half_deleted(filled_folder, tmp_path_factory):
    folder = shutil.copytree(filled_folder, tmp_path_factory.mktemp("half_deleted") / "db")
    with TwoStageIndex(folder) as index:
        index.delete(IDS[:1000])
    return folder


@pytest.fixture
def folder(filled_folder, tmp_path):
    """A folder with an index of all records, for one test."""
    return shutil.copytree(filled_folder, tmp_path / "db")


def used(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def nearest(index, rows, **settings):
    return [hits[0].id for hits in index.search(VECTORS[rows], k=1, **settings)]


def test_what_deletions_and_reindexing_left_is_given_back(folder):
    with TwoStageIndex(folder) as index:
        for _ in range(3):
            index.reindex()
        index.delete(IDS[:1000])
        before = used(folder)
        freed = index.compact()
        assert used(folder) == pytest.approx(before - freed, rel=0.02)
        assert freed > 0.6 * before
        assert index.verify().ok
        assert [record.document for record in index.get()] == TEXTS[1000:]
        assert nearest(index, [1000, 1999], where={"n": {"$gt": 0}}) == ["id-1000", "id-1999"]
        # What plain Chroma embeds texts with reads its rotation from there.
        (archive,) = folder.glob("archive-*.lmdb")
        function = index.collection().configuration_json["embedding_function"]["config"]
        assert archive.name == f"archive-{function['archive']}.lmdb"
        # There is nothing more, and the index can be written as before.
        assert abs(index.compact()) < 0.02 * before
        index.upsert(["id-0"], VECTORS[:1])
        assert nearest(index, [0]) == ["id-0"]
        assert index.verify().ok
    with TwoStageIndex(folder) as again:
        assert (len(again), again.verify().ok, nearest(again, [1500])) == (1001, True, ["id-1500"])


@pytest.mark.parametrize("scored", ["every record", "scan", "graph"])
def test_another_process_reads_before_during_and_after(folder, elsewhere, scored):
    index = TwoStageIndex(folder)
    if scored != "every record":
        elsewhere("search._EXACT_RECORDS = 0")
    if scored == "graph":
        elsewhere("search.MAX_EXACT_MATCHES = 0")
    where = {"n": {"$gt": 0}} if scored == "graph" else None
    elsewhere(f"where = {where!r}")
    elsewhere(f"reader = TwoStageIndex({str(folder)!r})")
    ask = "answer = nearest(reader, {}, where=where) + nearest(reader, {}, where={{'n': {{'$gt': 0}}}})"
    assert elsewhere(ask.format([1, 1500], [1, 1500])) == ["id-1", "id-1500"] * 2
    index.reindex()
    index.delete(IDS[:1000])
    # It has not noticed yet what was written, and then searches without a pause.
    elsewhere(
        "import threading\n"
        "stop, seen = threading.Event(), []\n"
        "def ask():\n"
        "    while not stop.is_set():\n"
        "        try: seen.append(tuple(nearest(reader, [1001, 1500], where=where)))\n"
        "        except Exception as error: seen.append(repr(error))\n"
        "thread = threading.Thread(target=ask); thread.start()"
    )
    archive = index.info().vectors_bytes
    assert index.compact() > 0
    assert index.info().vectors_bytes < 0.7 * archive
    index.upsert(["new"], VECTORS[:1], ["new"], [{"n": 5}])
    assert elsewhere(ask.format([0, 1500], [0, 1500])) == ["new", "id-1500"] * 2
    elsewhere("stop.set(); thread.join()")
    assert elsewhere("answer = sorted(set(seen))") == [["id-1001", "id-1500"]]
    index.delete(["id-1500"])
    assert elsewhere("answer = len(reader), len(reader.get(['id-1500', 'new']))") == [1000, 1]
    # The reader may write once this process has closed the index.
    index.close()
    elsewhere("reader.upsert(['theirs'], vectors[1:2], ['theirs'], [{'n': 6}])")
    assert elsewhere(ask.format([1, 0], [1, 0])) == ["theirs", "new"] * 2
    assert elsewhere("answer = reader.verify().ok") is True


def test_the_indexes_of_this_process_go_on(folder, conditions_ask_the_graph):
    index = TwoStageIndex(folder)
    others = TwoStageIndex(folder), TwoStageIndex(client=chromadb.PersistentClient(folder))
    where = {"n": {"$gte": 0}}
    for other in others:
        assert nearest(other, [3, 1500], where=where) == ["id-3", "id-1500"]
    index.delete(IDS[:1000])
    assert index.compact() > 0
    index.upsert(["new"], VECTORS[:1], metadatas=[{"n": 0}])
    assert nearest(others[0], [0, 1500], where=where) == ["new", "id-1500"]
    assert others[0].verify().ok
    for opened in (index, *others):
        opened.close()


def test_a_client_that_a_compaction_has_overtaken_is_refused_or_right(tmp_path, elsewhere, conditions_ask_the_graph):
    elsewhere(f"index = TwoStageIndex({str(tmp_path)!r}, shortlist_dim=64)")
    elsewhere("index.upsert([f'id-{i}' for i in range(2000)], vectors, metadatas=[{'n': 1}] * 2000)")
    index = TwoStageIndex(client=chromadb.PersistentClient(tmp_path))
    assert nearest(index, [3], where={"n": 1}) == ["id-3"]
    elsewhere("index.delete([f'id-{i}' for i in range(1000)])")
    elsewhere("index.upsert(['new'], vectors[:1], metadatas=[{'n': 1}])")
    elsewhere("answer = index.compact()")
    with pytest.raises(Exception, match="by its path"):
        nearest(index, [0], where={"n": 1})
    index.close()


def test_only_what_nobody_uses_is_removed(folder):
    used_by_chroma = chromadb.PersistentClient(folder).create_collection("plain")
    # So many that Chroma writes its graph.
    used_by_chroma.add(IDS[:1200], VECTORS[:1200, :16], documents=TEXTS[:1200])
    index, other = TwoStageIndex(folder), TwoStageIndex(folder, "other")
    other.upsert(IDS[:10], VECTORS[:10], TEXTS[:10])
    theirs = {
        folder / "notes.txt",
        folder / str(uuid.uuid4()) / "photo.jpg",
        folder / str(uuid.uuid4()) / "data_level0.bin" / "file",
        folder / "archive-of-mine.lmdb",
        folder / f"archive-{uuid.uuid4().hex}.lmdb.backup",
    }
    for file in theirs:
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("mine")
    os.symlink(folder / "notes.txt", folder / str(uuid.uuid4()))
    left = folder / f"archive-{uuid.uuid4().hex}.lmdb"
    left.write_bytes(bytes(100_000))
    graph = folder / str(uuid.uuid4())
    graph.mkdir()
    (graph / "data_level0.bin").write_bytes(bytes(100_000))
    assert index.compact() >= 200_000
    assert not left.exists()
    assert not graph.exists()
    assert all(file.read_text() == "mine" for file in theirs)
    assert sum(path.is_symlink() for path in folder.iterdir()) == 1
    assert used_by_chroma.query(VECTORS[7:8, :16], n_results=1)["ids"] == [["id-7"]]
    assert index.verify().ok
    assert nearest(other, [3]) == ["id-3"]
    index.close()
    other.close()


def test_a_name_in_another_database_keeps_its_full_vectors(tmp_path):
    admin = chromadb.AdminClient(chromadb.Settings(is_persistent=True, persist_directory=str(tmp_path)))
    admin.create_database("theirs")
    elsewhere = TwoStageIndex(client=chromadb.PersistentClient(tmp_path, database="theirs"))
    elsewhere.upsert(IDS[:10], VECTORS[:10])
    with TwoStageIndex(tmp_path) as index:
        index.upsert(IDS[:10], VECTORS[:10])
        index.compact()
    assert elsewhere.verify().ok
    elsewhere.close()


def test_a_compaction_that_fails_loses_nothing(folder, monkeypatch):
    index = TwoStageIndex(folder)
    index.delete(IDS[:1000])
    for broken in ("raise SystemExit('no space left')", "import nothing_there"):
        monkeypatch.setattr("mrl_rag.index.compact.COMMAND", broken)
        with pytest.raises(IndexNotWritable, match="Nothing is lost"):
            index.compact()
        index.upsert(["new"], VECTORS[:1], ["new"])
        assert nearest(index, [0, 1500]) == ["new", "id-1500"]
        assert index.verify().ok
    index.close()


def test_writers_are_kept_out(folder, elsewhere):
    index = TwoStageIndex(folder)
    index.upsert(["new"], VECTORS[:1])
    elsewhere(f"other = TwoStageIndex({str(folder)!r})")
    assert "another process writes" in elsewhere("other.compact()")
    index.close()
    assert elsewhere("answer = other.compact() >= 0") is True


def test_in_memory_there_is_nothing_to_do_and_a_server_is_named(chroma_server):
    assert TwoStageIndex().compact() == 0
    with TwoStageIndex() as index:
        index.upsert(IDS[:5], VECTORS[:5])
        index.delete(IDS[:4])
        assert index.compact() == 0
    with pytest.raises(InvalidInput, match="chroma vacuum"):
        TwoStageIndex(client=chromadb.HttpClient(port=chroma_server)).compact()


def test_info_tells_the_bytes_of_each_part(tmp_path, score_all_up_to):
    score_all_up_to(0)
    assert TwoStageIndex().info().records == 0
    with TwoStageIndex(tmp_path, model="a model", fingerprint="abc") as index:
        empty = index.info()
        assert (empty.name, empty.records, empty.model, empty.vectors_bytes) == ("docs", 0, "a model", None)
        fill(index)
        nearest(index, [3])
        info = index.info()
        assert (info.model, info.fingerprint, info.records) == ("a model", "abc", 2000)
        assert (info.full_dim, info.shortlist_dim, info.precision) == (128, index.shortlist_dim, "float16")
        assert (info.rotation, info.recall, info.kept, info.unfinished) == (index.rotation, index.recall, (), ())
        parts = info.chroma_bytes, info.graph_bytes, info.vectors_bytes, info.cache_bytes
        assert all(size > 100_000 for size in parts)
        assert sum(parts) == pytest.approx(used(tmp_path), rel=0.4)


@pytest.mark.parametrize(
    "step",
    [
        "mrl_rag.index.archive.LmdbArchive.copy_to",
        "mrl_rag.index.archive.LmdbArchive.forget_changes",
        "mrl_rag.index.shortlist.ShortlistCollection.remember",
        "mrl_rag.index.shortlist._store_embedding_function",
        "mrl_rag.index.storage.Storage.remove_archive",
        "mrl_rag.index.compact.remove_unused",
        "mrl_rag.index.compact._run",
    ],
)
def test_an_interruption_anywhere_loses_nothing_and_the_next_call_cleans_up(half_deleted, tmp_path, monkeypatch, step):
    folder = shutil.copytree(half_deleted, tmp_path / "db")
    index = TwoStageIndex(folder)

    def interrupted(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.compact()
    # In this process, and in one that opens the folder after the crash.
    assert nearest(index, [1500]) == ["id-1500"]
    index.upsert(["new"], VECTORS[:1], ["new"])
    index.close()
    with TwoStageIndex(folder) as again:
        assert (nearest(again, [0, 1500]), again.verify().ok) == (["new", "id-1500"], True)
        assert again.compact() > 0
        assert len(list(folder.glob("archive-*.lmdb"))) == 1
        assert (nearest(again, [0, 1500]), again.verify().ok) == (["new", "id-1500"], True)
