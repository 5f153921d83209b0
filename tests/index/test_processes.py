"""In a folder one process writes, and any number of others read and find what it has written."""

import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chromadb
import numpy as np
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.errors import IndexClosed, IndexNotWritable, TwoStageIndexError

DIM = 16
VECTORS = "np.random.default_rng(0).normal(size=(1200, 16)).astype(np.float32)"
linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts in /proc")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def elsewhere(tmp_path, other_process):
    """Run code in another process, which has `index` and `vectors`; see `other_process`. It must not fail."""

    def run(code):
        answer, error = other_process(code)
        assert error is None
        return answer

    run("import numpy as np; from mrl_rag import TwoStageIndex")
    run(f"vectors = {VECTORS}; index = TwoStageIndex({str(tmp_path)!r}, shortlist_dim=8, rotation='none')")
    return run


@pytest.fixture(params=["every record", "scan", "graph"])
def stage_one(request, score_all_up_to):
    """How this process searches."""
    score_all_up_to(20_000 if request.param == "every record" else 0)
    if request.param == "graph":
        request.getfixturevalue("conditions_ask_the_graph")
    return request.param


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(1200, DIM)).astype(np.float32)


def nearest(index, vectors, **settings):
    return [hits[0].id if hits else None for hits in index.search(vectors, k=1, **settings)]


def write(first, last, ahead=0):
    """Upsert the records `first` to `last`, with their own vectors or those `ahead` places further on."""
    ids, metadatas = f"[str(i) for i in range({first}, {last})]", f"[{{'n': 1}}] * {last - first}"
    return f"index.upsert({ids}, vectors[{first + ahead}:{last + ahead}], metadatas={metadatas})"


def test_a_second_writing_process_is_refused_and_may_read(tmp_path, elsewhere):
    elsewhere(write(0, 1))
    index = TwoStageIndex(tmp_path)
    for change in (lambda: index.upsert(["x"], np.eye(1, DIM)), lambda: index.delete(["0"]), index.repair):
        with pytest.raises(IndexNotWritable, match="another process"):
            change()
    assert len(index) == 1
    elsewhere("index.close()")
    index.upsert(["ours"], np.eye(1, DIM))
    assert len(index) == 2


@pytest.mark.parametrize("most_recent", [10_000, 50])
def test_an_open_reader_finds_what_another_process_writes(
    tmp_path, elsewhere, vectors, stage_one, most_recent, monkeypatch
):
    if stage_one != "graph" and most_recent < 10_000:
        pytest.skip("only a search of the graph looks at recent records by themselves")
    monkeypatch.setattr("mrl_rag.index.search._MAX_RECENT", most_recent)
    monkeypatch.setattr("mrl_rag.index.archive._MAX_LOGGED_TRANSACTIONS", 32)
    elsewhere("import mrl_rag.index.archive as archive; archive._MAX_LOGGED_TRANSACTIONS = 32")
    elsewhere(write(0, 300))
    index = TwoStageIndex(tmp_path)
    where = {"n": 1} if stage_one == "graph" else None
    # Chroma's graph, read again, may lose its way to a record that was replaced.
    most_missed = 2 if (stage_one, most_recent) == ("graph", 50) else 0

    def missed(first, last):
        found = nearest(index, vectors[first + 700 : last + 700], where=where)
        return sum(id_ != str(row) for id_, row in zip(found, range(first, last), strict=True))

    index.search(vectors[:3], where=where)
    elsewhere(write(300, 340))
    assert nearest(index, vectors[300:340], where=where) == [str(row) for row in range(300, 340)]
    # So few records meet the condition that all of these are scored, unless the graph is asked.
    assert nearest(index, vectors[300:340], where={"n": 1}) == [str(row) for row in range(300, 340)]
    for first, last in ((150, 160), (160, 230)):
        elsewhere(write(first, last, ahead=700))
        assert missed(150, last) <= most_missed
    elsewhere("index.delete([str(i) for i in range(0, 150)])")
    answers = index.search(vectors[:100], k=4, where=where)
    assert {len(hits) for hits in answers} == {4}
    assert all(int(hit.id) >= 150 for hits in answers for hit in hits)
    # More transactions than are logged.
    elsewhere("for i in range(340, 380): index.upsert([str(i)], vectors[i:i + 1], metadatas=[{'n': 1}])")
    elsewhere("index.upsert(['200'], vectors[1199:], metadatas=[{'n': 1}])")
    assert nearest(index, vectors[[345, 379, 1199]], where=where) == ["345", "379", "200"]
    elsewhere("for i in range(300, 340): index.upsert([str(i)], vectors[i + 700:i + 701], metadatas=[{'n': 1}])")
    assert missed(300, 340) <= most_missed
    index.close()


def test_a_record_that_another_process_is_deleting_is_left_out(tmp_path, elsewhere, vectors, stage_one):
    elsewhere(write(0, 100))
    index = TwoStageIndex(tmp_path)
    where = {"n": 1} if stage_one == "graph" else None
    index.search(vectors[:3], where=where)
    elsewhere(write(5, 6, ahead=100))
    assert nearest(index, vectors[105:106], where=where) == ["5"]
    # Halfway: Chroma no longer has it, and the archive still does.
    elsewhere("index.collection().delete(['5'])")
    found = [hit.id for hit in index.search(vectors[105:106], k=4, where=where)[0]]
    assert len(found) == 4
    assert "5" not in found
    index.close()


def test_a_condition_that_many_records_meet_finds_what_another_process_writes(tmp_path, elsewhere, vectors):
    elsewhere(write(0, 1050))
    index = TwoStageIndex(tmp_path)
    index.search(vectors[:3], where={"n": 1})
    elsewhere(write(1050, 1060))
    elsewhere("index.upsert(['other'], vectors[1100:1101], metadatas=[{'n': 2}])")
    assert nearest(index, vectors[1050:1060], where={"n": 1}) == [str(row) for row in range(1050, 1060)]
    assert nearest(index, vectors[1100:1101], where={"n": 1}) != ["other"]
    assert nearest(index, vectors[1100:1101]) == ["other"]


def test_a_process_that_has_read_may_write_after_another(tmp_path, elsewhere, vectors, conditions_ask_the_graph):
    elsewhere(write(0, 100))
    index = TwoStageIndex(tmp_path)
    index.search(vectors[:3], where={"n": 1})
    elsewhere(write(100, 400))
    elsewhere("index.close()")
    index.upsert([str(row) for row in range(400, 700)], vectors[400:700], metadatas=[{"n": 1}] * 300)
    assert index.verify().ok
    index.close()
    index = TwoStageIndex(tmp_path)
    assert index.verify().ok
    assert nearest(index, vectors[:700:20], where={"n": 1}) == [str(row) for row in range(0, 700, 20)]


def test_a_client_that_another_process_has_overtaken_may_not_write(tmp_path, elsewhere, vectors):
    elsewhere(write(0, 100))
    index = TwoStageIndex(client=chromadb.PersistentClient(tmp_path))
    index.search(vectors[:3])
    elsewhere(write(100, 200))
    elsewhere("index.close()")
    with pytest.raises(IndexNotWritable, match="by its path"):
        index.upsert(["x"], vectors[:1])
    assert nearest(index, vectors[150:151]) == ["150"]
    index.close()


def test_a_client_whose_graph_is_too_old_for_a_search_is_refused(
    tmp_path, elsewhere, vectors, conditions_ask_the_graph, monkeypatch
):
    monkeypatch.setattr("mrl_rag.index.search._MAX_RECENT", 5)
    elsewhere(write(0, 100))
    index = TwoStageIndex(client=chromadb.PersistentClient(tmp_path))
    index.search(vectors[:3], where={"n": 1})
    for first in (0, 10):
        elsewhere(write(first, first + 10, ahead=100))
    with pytest.raises(TwoStageIndexError, match="by its path"):
        index.search(vectors[:3], where={"n": 1})
    index.close()


def test_one_folder_in_several_spellings_is_one(tmp_path, vectors, monkeypatch, conditions_ask_the_graph):
    monkeypatch.chdir(tmp_path)
    os.symlink(tmp_path / "db", tmp_path / "link", target_is_directory=True)
    (tmp_path / "sub").mkdir()
    places = ["db", tmp_path / "db", "link", f"sub/{os.pardir}/db/"]
    indexes = [TwoStageIndex(place) for place in places]
    for turn in range(0, 800, 100):
        index = indexes[turn // 100 % 4]
        ids = [str(row) for row in range(turn, turn + 100)]
        index.upsert(ids, vectors[turn : turn + 100], metadatas=[{"n": 1}] * 100)
        assert nearest(index, vectors[turn : turn + 2], where={"n": 1}) == ids[:2]
    monkeypatch.chdir(tmp_path / "sub")
    indexes[0].upsert(["x"], vectors[-1:])
    assert all(index.verify().ok and len(index) == 801 for index in indexes)
    assert not (tmp_path / "sub" / "db").exists()
    for index in indexes:
        index.close()


def test_a_folder_that_was_removed_is_filled_anew(tmp_path, vectors, conditions_ask_the_graph):
    kept = []
    for turn in range(3):
        index = TwoStageIndex(tmp_path / "db")
        index.upsert([str(row) for row in range(turn, 50)], vectors[turn:50], metadatas=[{"n": 1}] * (50 - turn))
        kept.append(index)
        assert len(index) == 50 - turn
        assert nearest(index, vectors[40:42], where={"n": 1}) == ["40", "41"]
        shutil.rmtree(tmp_path / "db")
    kept[0].upsert(["again"], vectors[:1])
    assert len(kept[0]) == 1


def in_child(work):
    """Fork, call `work` in the child, and return what it returned or raised."""
    ours, theirs = multiprocessing.Pipe()

    def run():
        try:
            theirs.send(work())
        except Exception as error:
            theirs.send(error)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    answer = ours.recv() if ours.poll(60) else "nothing for a minute"
    child.kill()
    child.join()
    return answer


@forks
@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_of_a_process_that_used_chroma_refuses_at_once(tmp_path, vectors):
    index = TwoStageIndex(tmp_path)
    index.upsert(["a"], vectors[:1])
    for work in (
        lambda: index.search(vectors[:1]),
        lambda: index.upsert(["b"], vectors[1:2]),
        lambda: TwoStageIndex(tmp_path),
        lambda: TwoStageIndex(),
    ):
        error = in_child(work)
        assert isinstance(error, IndexClosed)
        assert "only after the fork" in str(error)
    index.upsert(["b"], vectors[1:2])
    assert nearest(index, vectors[:2]) == ["a", "b"]


@forks
@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_that_closes_an_index_in_memory_leaves_it_to_its_parent(vectors):
    with TwoStageIndex() as index:
        index.upsert(["a"], vectors[:1])
        assert in_child(index.close) is None
        index.upsert(["b"], vectors[1:2])
        assert nearest(index, vectors[:2]) == ["a", "b"]


IN_CHILD = """
import multiprocessing, sys
import numpy as np
from mrl_rag import TwoStageIndex
kept = TwoStageIndex(sys.argv[1])
assert len(kept) == 0
def work():
    for index in (kept, TwoStageIndex(sys.argv[2])):
        index.upsert(["a", "b"], np.eye(2, 16))
        assert [hit.id for hit in index.search(np.eye(1, 16, 1), where={"no": {"$ne": 1}})[0]] == ["b", "a"]
        index.close()
child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join(60)
assert child.exitcode == 0, child.exitcode
assert len(kept) == 2
kept.upsert(["c"], np.eye(1, 16, 2))
assert kept.verify().ok
"""


@forks
def test_a_child_of_a_process_that_has_read_nothing_uses_its_index(tmp_path):
    places = [str(tmp_path / "one"), str(tmp_path / "other")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", IN_CHILD, *places], check=True, timeout=120)


def held():
    gc.collect()
    # A dropped index is released when the next one is made.
    TwoStageIndex().close()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@linux
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "dropped"])
@pytest.mark.parametrize("place", ["memory", "folder"])
def test_a_closed_or_dropped_index_leaves_no_open_files_or_threads(tmp_path, vectors, closed, place):
    def use(number):
        index = TwoStageIndex(tmp_path / str(number) if place == "folder" else None)
        index.upsert(["a"], vectors[:1], documents=["text"])
        assert nearest(index, vectors[:1]) == ["a"]
        if closed:
            index.close()

    use("first")
    before = held()
    for number in range(8):
        use(number)
    assert [now - then <= 2 for now, then in zip(held(), before, strict=True)] == [True, True]


@linux
def test_a_dropped_index_in_memory_frees_its_memory(vectors):
    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def use():
        with TwoStageIndex() as index:
            index.upsert(["a"], vectors[:1])

    for _ in range(10):
        use()
    before = resident()
    for _ in range(30):
        use()
    assert resident() - before < 30 << 20


@pytest.mark.parametrize("place", ["memory", "folder", "client"])
def test_a_closed_index_raises_index_closed(tmp_path, vectors, place):
    where = {"memory": {}, "folder": {"path": tmp_path}, "client": {"client": chromadb.EphemeralClient()}}[place]
    with TwoStageIndex(collection="closing", **where) as index:
        index.upsert(["a"], vectors[:1])
    index.close()
    for use in (
        lambda: index.search(vectors[:1]),
        lambda: index.upsert(["a"], vectors[:1]),
        lambda: index.get(["a"]),
        lambda: len(index),
        index.clear,
        index.verify,
        index.repair,
        index.reindex,
        lambda: index.client,
    ):
        with pytest.raises(IndexClosed, match="closed"):
            use()


AT_EXIT = """
import sys, threading, time
import numpy as np
from mrl_rag import TwoStageIndex
index = TwoStageIndex(sys.argv[1])
def write():
    for turn in range(10_000):
        index.upsert([f"{turn}-{i}" for i in range(200)], np.random.default_rng(turn).normal(size=(200, 16)))
threading.Thread(target=write, daemon=True).start()
while len(index) < 400:
    time.sleep(0.01)
"""


def test_a_process_ends_cleanly_while_a_daemon_thread_writes(tmp_path):
    for _ in range(3):
        subprocess.run([sys.executable, "-W", "ignore", "-c", AT_EXIT, str(tmp_path / "db")], check=True, timeout=120)
    with TwoStageIndex(tmp_path / "db") as index:
        assert index.repair().ok


def test_two_indexes_of_one_process_may_both_write(tmp_path):
    one, other = TwoStageIndex(tmp_path), TwoStageIndex(tmp_path)
    one.upsert(["a"], np.eye(1, 16))
    other.upsert(["b"], np.eye(1, 16, 1))
    one.close()
    other.upsert(["c"], np.eye(1, 16, 2))
    assert len(other) == 3


def test_what_one_index_writes_while_another_reindexes_is_kept(tmp_path):
    one, other = TwoStageIndex(tmp_path), TwoStageIndex(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(400, 16))
    one.upsert([f"a{i}" for i in range(200)], vectors[:200])
    with ThreadPoolExecutor(2) as pool:
        reindexing = [pool.submit(one.reindex, rotation=kind) for kind in ("fit", "none", "fit")]
        for row in range(200, 400, 20):
            other.upsert([f"b{i}" for i in range(row, row + 20)], vectors[row : row + 20])
            assert len(other.search(vectors[:1], k=5)[0]) == 5
            assert len(other.get(["a0", "a1"])) == 2
        for done in reindexing:
            done.result()
    assert len(one) == len(other) == 400
    assert one.verify().ok
