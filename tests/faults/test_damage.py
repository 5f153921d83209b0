"""Disks that fill up, folders that can't be written, files that are cut short or have bits flipped, clocks that jump.

What a user gets is an error that says what to do, a repaired index, or a report that names what is lost: never a wrong
answer in silence, a hang or a crash. Eight random damages a kind in `make test`, 150 in `make test-faults`.
"""

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import chromadb
import numpy as np
import pytest

from mrl_rag import Plan, TwoStageIndex
from mrl_rag.errors import ArchiveError, IndexMismatch, MrlRagError, TwoStageIndexError

DAMAGES = int(os.environ.get("MRL_RAG_DAMAGES", "2"))
# Above Chroma's 1000, from where on it writes its graph to the disk.
COUNT, DIM = 1200, 32
VECTORS = np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
QUERIES = VECTORS[::100]
IDS = [f"r{i}" for i in range(COUNT)]
KEPT = []
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import test_damage
test_damage.children(sys.argv[2], sys.argv[3:])
"""


def upsert(index, rows):
    index.upsert(
        [IDS[i] for i in rows], VECTORS[rows], [f"text {i}" for i in rows], [{"n": i, "even": i % 2 == 0} for i in rows]
    )


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "db"
    index = TwoStageIndex(folder, shortlist_dim=16, rotation="none")
    upsert(index, list(range(COUNT)))
    assert index.verify().ok
    index.close()
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "db"))


def children(task, folders):
    """Do a task on each folder in a process of its own, and print what came of it."""
    for folder in folders:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with open(writer, "w") as out:
                out.write(json.dumps(globals()[task](Path(folder))))
            os._exit(0)
        os.close(writer)
        with open(reader) as said:
            text = said.read()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(json.dumps(None if status else json.loads(text)) + "\n")
        sys.stdout.flush()


def in_children(task, folders):
    command = [sys.executable, "-W", "ignore", "-c", CHILD, os.path.dirname(__file__), task, *map(str, folders)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in answer.stdout.splitlines()]


def attempt(work, *arguments):
    try:
        return {"value": work(*arguments)}
    except MrlRagError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        return {"untyped": f"{type(error)}: {error}"}


def as_plain(report):
    return asdict(report) | {"ok": report.ok}


def look(folder):
    """Open, search, read, verify, repair, search and read again."""
    said = {}

    def opened():
        said["index"] = TwoStageIndex(folder)

    result = {"open": attempt(opened)}
    if "value" in result["open"]:
        index = said["index"]
        for name in ("", " after repair"):
            if name:
                result["repair"] = attempt(lambda: as_plain(index.repair()))
            result[f"search{name}"] = attempt(
                lambda: [
                    [(hit.id, hit.score, hit.document, hit.metadata) for hit in hits]
                    for hits in index.search(QUERIES, k=10)
                ]
            )
            result[f"get{name}"] = attempt(
                lambda: [
                    (
                        r.id,
                        r.vector is None or bool(np.abs(r.vector - VECTORS[IDS.index(r.id)]).max() < 2e-3),
                        r.document,
                        r.metadata,
                    )
                    for r in index.get()
                ]
            )
            if not name:
                result["verify"] = attempt(lambda: as_plain(index.verify()))
    return result


def open_plainly(folder):
    """Open the folder with Chroma alone."""
    return attempt(lambda: chromadb.PersistentClient(folder).count_collections())


def wrong_records(records):
    """Ids whose document or metadata isn't what was stored."""
    rows = {id_: i for i, id_ in enumerate(IDS)}
    return {
        id_
        for id_, _, document, metadata in records
        if (document, metadata) != (f"text {rows[id_]}", {"n": rows[id_], "even": rows[id_] % 2 == 0})
    }


def judge(result, what, undamaged):
    assert result is not None, f"{what}: the process crashed or hung"
    for step, outcome in result.items():
        assert "untyped" not in outcome, (what, step, outcome)
    if "error" in result["open"]:
        return
    rows = {id_: i for i, id_ in enumerate(IDS)}
    for when, check in (("", "verify"), (" after repair", "repair")):
        report = result[check].get("value")
        named = report is None or not report["ok"]
        for query, hits in zip(QUERIES, result[f"search{when}"].get("value", []), strict=False):
            for id_, score, _, _ in hits:
                # A record that has lost its full vector is scored by what Chroma has, with a warning.
                lost = report is None or id_ in report["missing"]
                right = score == pytest.approx(float(query @ VECTORS[rows[id_]]), abs=1e-3)
                assert right or lost, (what, when, id_)
            assert named or not wrong_records(hits), (what, when)
        if not named:
            # Chroma's graph is approximate: one that lost a link is not wrong.
            found, best = (
                {(number, hit[0]) for number, hits in enumerate(answer) for hit in hits}
                for answer in (result[f"search{when}"]["value"], undamaged["search"]["value"])
            )
            assert len(found & best) >= 0.9 * len(best), (what, when)
            records = result[f"get{when}"]["value"]
            assert sorted(record[0] for record in records) == sorted(IDS), (what, when)
            assert not wrong_records(records), (what, when)
        assert all(right for _, right, _, _ in result[f"get{when}"].get("value", [])), (what, when)


def damage(file, chance):
    how = chance.choice(["flip", "flip", "cut", "zeros"])
    data = bytearray(file.read_bytes())
    if how == "flip":
        for bit in chance.choices(range(len(data) * 8), k=chance.choice([1, 1, 8, 64])):
            data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    elif how == "cut":
        os.truncate(file, chance.randrange(len(data)))
    else:
        start = chance.randrange(len(data))
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
        file.write_bytes(data)
    return f"{file.name} {how}"


@pytest.mark.parametrize("files", ["archive-*.lmdb", "chroma.sqlite3", "*/*"])
def test_a_damaged_file_gives_an_error_or_the_right_answer_or_a_report(sound, tmp_path, files):
    chance = random.Random(files)
    folders, whats = [shutil.copytree(sound, tmp_path / "undamaged")], []
    for number in range(DAMAGES):
        folders.append(shutil.copytree(sound, tmp_path / str(number)))
        chosen = chance.choice(sorted(path for path in folders[-1].glob(files) if path.stat().st_size))
        whats.append(f"{number}: {damage(chosen, chance)}")
    undamaged, *results = in_children("look", folders)
    for result, what, folder in zip(results, whats, folders[1:], strict=True):
        if files == "*/*" and result is None:
            # Chroma itself ends the process on some damaged graphs. All that a graph holds is in the archive, too.
            for graph in folder.glob("*-*/"):
                shutil.rmtree(graph)
            (result,) = in_children("look", [folder])
        if files == "chroma.sqlite3" and result is None and in_children("open_plainly", [folder]) == [None]:
            # Chroma ends the process as it opens a file with other bytes than UTF-8 in its table of migrations.
            continue
        judge(result, what, undamaged)
        if files == "*/*":
            assert result["repair"]["value"]["ok"], what


def write_until_full(folder):
    """Write under a limit on the size of any file; return the numbers of the writes that were acknowledged."""
    index = TwoStageIndex(folder)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    chance = random.Random(folder.name)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = chance.randrange(4096, 2 * max(sizes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    done, outcome = [], {}
    for number in range(1, 1000):
        if number % 4 == 0:
            outcome = attempt(index.reindex)
        else:
            outcome = attempt(index.upsert, *numbered(number))
            done += [number] if "value" in outcome else []
        if "value" not in outcome:
            break
    return {"done": done, "failed": number, "outcome": outcome, "rows": len(attempt(index.get).get("value") or [])}


def numbered(number):
    """Twenty records, every other of them one that the write before has written too."""
    rows = range(10 * number, 10 * number + 20)
    vectors = np.random.default_rng(number).normal(size=(20, DIM)).astype(np.float32)
    return [f"n{row}" for row in rows], vectors, [f"{row} {number}" for row in rows], [{"number": number}] * 20


def test_a_full_disk_is_an_error_and_loses_nothing_acknowledged(sound, tmp_path):
    folders = [shutil.copytree(sound, tmp_path / str(number)) for number in range(max(DAMAGES // 2, 1))]
    for folder, result in zip(folders, in_children("write_until_full", folders), strict=True):
        assert result is not None, f"{folder.name}: the process crashed or hung"
        assert result["outcome"].get("error") in ("IndexNotWritable", "TwoStageIndexError"), result
        index = TwoStageIndex(folder)
        report = index.repair()
        assert report.ok, report
        must = {}
        for number in result["done"]:
            ids, vectors, documents, _ = numbered(number)
            must |= {id_: (document, vector) for id_, vector, document in zip(ids, vectors, documents, strict=True)}
        may = set(numbered(result["failed"])[0])
        records = {record.id: record for record in index.get()}
        assert not {*IDS, *must} - set(records)
        for id_, (document, vector) in must.items():
            if id_ not in may:
                assert records[id_].document == document
                np.testing.assert_allclose(records[id_].vector, vector / np.linalg.norm(vector), atol=2e-3)
        ids, vectors, *rest = numbered(result["failed"])
        index.upsert(ids, vectors, *rest)
        assert [hits[0].id for hits in index.search(vectors, k=1)] == ids
        assert index.verify().ok
        index.close()


def test_an_archive_grows_past_its_map_under_its_readers(tmp_path, monkeypatch):
    monkeypatch.setattr("mrl_rag.index.archive._MAP_BYTES", 1 << 16)
    index = TwoStageIndex(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        done = threading.Event()

        def read():
            while not done.is_set():
                assert all(hit.score == pytest.approx(1, abs=1e-3) for hit in index.search(VECTORS[:1], k=1)[0])

        index.upsert(IDS[:1], VECTORS[:1])
        readers = [pool.submit(read) for _ in range(4)]
        for start in range(0, COUNT, 100):
            upsert(index, list(range(start, start + 100)))
        done.set()
        for reader in readers:
            reader.result()
    assert next(tmp_path.glob("archive-*.lmdb")).stat().st_size > 1 << 16
    assert (len(index), index.verify().ok) == (COUNT, True)


def open_unwritable(folder):
    """As somebody who may read all and write nothing."""
    with tempfile.TemporaryDirectory() as elsewhere:
        # What Python has yet to import may be closed to the other user.
        index = TwoStageIndex(elsewhere)
        index.upsert(["a"], VECTORS[:1])
        index.search(VECTORS[:1])
        index.verify()
        index.close()
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    said = attempt(TwoStageIndex, folder)
    return said if "value" not in said else look(folder)


@pytest.mark.parametrize("writable_folder", [False, True])
def test_a_folder_or_files_that_cannot_be_written_give_an_error_and_stay_as_they_are(sound, writable_folder):
    # Not in tmp_path, which is closed to other users.
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(shutil.copytree(sound, Path(place) / "db"))
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if writable_folder:
            folder.chmod(0o777)
        (result,) = in_children("open_unwritable", [folder])
        folder.chmod(0o755)
        assert result["error"] in ("IndexNotWritable", "TwoStageIndexError"), result
        assert "written" in result["message"]
        assert {path: path.read_bytes() for path in before} == before
        index = TwoStageIndex(folder) if os.geteuid() == 0 else None
        assert index is None or index.verify().ok


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    index = TwoStageIndex(tmp_path, shortlist_dim=16)
    years = 365.25 * 24 * 3600
    now, now_ns = time.time, time.time_ns
    for number, jump in enumerate([0, 10, -20, 3], start=1):
        monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump * years)
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: int(now_ns() + jump * years * 1e9))
        index.upsert(*numbered(1)[:2], [f"write {number}"] * 20)
        index.upsert([f"r{number}"], VECTORS[number : number + 1])
        if number == 2:
            index.reindex(rotation="none")
        assert {record.document for record in index.get(numbered(1)[0])} == {f"write {number}"}
        assert index.search(VECTORS[number : number + 1], k=1)[0][0].id == f"r{number}"
        # Chroma's threads can lose a record of a small graph, whatever the clock says: searches make up for it, and
        # `repair` mends it.
        report = index.verify()
        assert replace(report, unreachable=[]).ok
        assert not report.unreachable or index.repair().ok
    index.close()
    # Chroma's Rust core reads the clock itself; what it could go by on the disk are the files' dates.
    for path, jump in zip(sorted(tmp_path.rglob("*")), [10, -20] * 50, strict=False):
        os.utime(path, (now() + jump * years,) * 2)
    index = TwoStageIndex(tmp_path)
    assert index.repair().ok
    assert {record.document for record in index.get(numbered(1)[0])} == {"write 4"}


def test_a_lost_graph_is_rebuilt_from_what_full_vectors_there_are(folder, archive_of):
    archive_of(folder).lose("r3")
    archive_of(folder).damage("r4")
    for path in folder.glob("*/*.bin"):
        path.unlink()
    index = TwoStageIndex(folder)
    report = index.repair()
    assert (report.missing, report.damaged, report.search_broken, report.misplaced) == (["r3"], ["r4"], False, [])
    assert index._session.opened.stores.shortlist.get(["r3", "r4"]) == {
        f"r{i}": (f"text {i}", {"n": i, "even": i == 4}) for i in (3, 4)
    }
    plan = Plan(dims=(16, DIM), sizes=(100,))
    upsert(index, [3, 4])
    assert index.verify().ok
    assert [hits[0].id for hits in index.search(VECTORS[3:5], k=1, plan=plan)] == ["r3", "r4"]


def test_without_its_graph_an_index_says_so_and_answers_all_the_same(folder, conditions_ask_the_graph):
    for graph in folder.glob("*-*/"):
        shutil.rmtree(graph)
    index = TwoStageIndex(folder)
    for where in (None, {"n": {"$gte": 0}}):
        assert [hits[0].id for hits in index.search(QUERIES, k=1, where=where)] == IDS[::100]
    assert index.get(["r1"])[0].document == "text 1"
    assert index.verify().search_broken
    index.close()
    index = TwoStageIndex(folder)
    assert index.repair().ok
    assert [hits[0].id for hits in index.search(QUERIES, k=1, where={"n": {"$gte": 0}})] == IDS[::100]


def test_records_that_the_graph_has_lost_are_found_all_the_same(folder, conditions_ask_the_graph):
    # Past the index, as another program might.
    (graph,) = (path for path in folder.iterdir() if path.is_dir())
    (graph / "index_metadata.pickle").unlink()
    index = TwoStageIndex(folder)
    for where in (None, {"n": {"$gte": 0}}):
        assert [hits[0].id for hits in index.search(QUERIES, k=1, where=where)] == IDS[::100]
    assert index.verify().search_broken
    assert index.repair().ok


def test_no_folder_that_the_index_did_not_make_is_removed(folder):
    (folder / "11111111-1111-1111-1111-111111111111").mkdir()
    (folder / "11111111-1111-1111-1111-111111111111" / "header.bin").write_text("mine")
    index = TwoStageIndex(folder)
    index.reindex()
    assert index.repair().ok
    assert (folder / "11111111-1111-1111-1111-111111111111" / "header.bin").read_text() == "mine"


def test_a_renaming_that_was_cut_short_leaves_no_mark(folder):
    client = chromadb.PersistentClient(folder)
    collection = client.get_collection("docs", embedding_function=None)
    before = dict(collection.metadata)
    collection.modify(name="docs-mrl_rag-new-1", metadata=before | {"mrl_rag:replaces": "docs"})
    assert TwoStageIndex(folder).verify().ok
    assert client.get_collection("docs", embedding_function=None).metadata == before


def test_a_folder_that_failed_to_open_opens_once_it_is_put_back(folder, sound):
    os.truncate(folder / "chroma.sqlite3", 5000)
    with pytest.raises(TwoStageIndexError, match="backup"):
        TwoStageIndex(folder)
    shutil.copy(sound / "chroma.sqlite3", folder / "chroma.sqlite3")
    (archive,) = folder.glob("archive-*.lmdb")
    archive.rename(folder / "elsewhere")
    with pytest.raises(ArchiveError, match="is missing"):
        TwoStageIndex(folder)
    (folder / "elsewhere").rename(archive)
    assert TwoStageIndex(folder).verify().ok


def test_a_collection_that_forgot_its_dimensions_is_named(folder):
    collection = chromadb.PersistentClient(folder).get_collection("docs", embedding_function=None)
    collection.modify(metadata={key: v for key, v in collection.metadata.items() if key != "mrl_rag:shortlist_dim"})
    with pytest.raises(IndexMismatch, match=r"is damaged.*backup"):
        TwoStageIndex(folder)


def test_repair_changes_nothing_where_chromas_file_hides_records(folder):
    file = folder / "chroma.sqlite3"
    connection = sqlite3.connect(file)
    sql = "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_embeddings_1'"
    (page,), (size,) = connection.execute(sql).fetchone(), connection.execute("PRAGMA page_size").fetchone()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with open(file, "r+b") as chroma:
        chroma.seek((page - 1) * size)
        # A leaf of an index, with nothing in it: the records are there, and can't be found by their ids.
        chroma.write(bytes([10, 0, 0, 0, 0]) + size.to_bytes(2, "big") + b"\0")

    index = TwoStageIndex(folder)
    archive = index._session.opened.stores.archive
    before = list(archive.ids())
    report = index.repair()
    assert report.orphaned
    assert report.chroma_damaged
    with pytest.raises(TwoStageIndexError, match=r"can't be rebuilt.*Restore the folder from a backup"):
        index.reindex(rotation="fit")
    assert list(archive.ids()) == before
    # What SQLite itself brings back is all there.
    index.close()
    connection = sqlite3.connect(file)
    connection.execute("REINDEX")
    connection.execute("VACUUM")
    connection.close()
    assert TwoStageIndex(folder).verify().ok
