"""`verify` finds every difference; `repair` mends it and loses no acknowledged write."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import chromadb
import numpy as np
import pytest

from mrl_rag import Report, TwoStageIndex, truncate
from mrl_rag.errors import InvalidVectors


@pytest.fixture
def folder(tmp_path, vectors):
    index = TwoStageIndex(tmp_path, shortlist_dim=8)
    index.upsert([f"id-{i}" for i in range(300)], vectors, documents=[f"text {i}" for i in range(300)])
    index.close()
    return tmp_path


def test_a_sound_index_is_reported_sound(filled):
    assert filled.verify() == Report(records=300, tried=300)
    assert filled.verify().ok
    assert filled.repair().ok
    assert TwoStageIndex().verify().ok
    assert TwoStageIndex().repair().ok


def test_an_index_is_compared_while_records_are_deleted(vectors):
    index = TwoStageIndex()
    index.upsert([f"id-{i}" for i in range(300)], vectors)
    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(lambda: [index.delete([f"id-{i}"]) for i in range(100)])
        while not deleting.done():
            index.verify()
        deleting.result()
    assert (index.verify().records, index.verify().ok) == (200, True)


def test_missing_and_damaged_vectors_are_named_and_stay_until_upserted(folder, vectors, archive_of):
    archive_of(folder).lose("id-3")
    archive_of(folder).damage("id-4")
    index = TwoStageIndex(folder)
    report = index.repair()
    assert (report.missing, report.damaged, report.ok, report.records) == (["id-3"], ["id-4"], False, 300)
    index.upsert(["id-3", "id-4"], vectors[3:5], ["text 3", "text 4"])
    assert index.verify().ok


def test_repair_encodes_records_without_a_sound_full_vector_from_their_documents(folder, vectors, archive_of):
    archive_of(folder).lose("id-3")
    archive_of(folder).damage("id-4")
    collection = chromadb.PersistentClient(folder).get_collection("docs")
    collection.update(ids=["id-5"], embeddings=np.ones((1, 8)), documents=["changed"])
    collection.add(ids=["new", "bare"], embeddings=np.ones((2, 8)), documents=["new", None], metadatas=[{"a": 1}, None])
    row_of = {"text 3": 3, "text 4": 4, "changed": 7, "new": 8}
    index = TwoStageIndex(folder)
    with pytest.raises(InvalidVectors, match="`encode` gives have 31 numbers"):
        index.repair(encode=lambda texts: np.ones((len(texts), 31)))
    report = index.repair(encode=lambda texts: [vectors[row_of[text]] for text in texts])
    assert (report.missing, report.damaged, report.stale, report.to_encode) == (["bare"], [], [], 1)
    for id_, row in (("id-3", 3), ("id-4", 4), ("id-5", 7), ("new", 8)):
        np.testing.assert_allclose(index.get([id_])[0].vector, truncate(vectors[row : row + 1], 32)[0], atol=1e-3)
    assert (index.get(["new"])[0].document, index.get(["new"])[0].metadata) == ("new", {"a": 1})


def test_an_orphan_is_removed(folder, vectors):
    chromadb.PersistentClient(folder).get_collection("docs").delete(ids=["id-7"])
    index = TwoStageIndex(folder)
    assert index.verify().orphaned == ["id-7"]
    assert index.repair().ok
    assert len(index) == 299


def test_a_document_changed_past_the_index_is_named(folder):
    collection = chromadb.PersistentClient(folder).get_collection("docs", embedding_function=None)
    vector = collection.get(ids=["id-7"], include=["embeddings"])["embeddings"]
    collection.update(ids=["id-7"], embeddings=vector, documents=["another text"])
    index = TwoStageIndex(folder)
    assert index.verify().stale == ["id-7"]
    assert index.repair().stale == ["id-7"]


def test_shortlist_vectors_changed_past_the_index_are_put_back(folder, vectors):
    chromadb.PersistentClient(folder).get_collection("docs").update(ids=["id-7"], embeddings=[[1.0] + [0.0] * 7])
    index = TwoStageIndex(folder)
    assert index.verify().misplaced == ["id-7"]
    assert index.repair().ok
    assert index.search(vectors[7:8], k=1)[0][0].id == "id-7"


def test_a_record_without_its_vector_does_not_stop_a_repair(folder, vectors, archive_of):
    chromadb.PersistentClient(folder).get_collection("docs").update(ids=["id-7"], embeddings=[[1.0] + [0.0] * 7])
    archive_of(folder).lose("id-3")
    index = TwoStageIndex(folder)
    report = index.repair()
    assert (report.missing, report.misplaced, len(index)) == (["id-3"], [], 300)
    assert index._session.opened.stores.shortlist.get(["id-3"]) == {"id-3": ("text 3", {})}


def test_chromas_lost_graph_is_rebuilt_from_the_archive(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(1500, 16))
    index = TwoStageIndex(tmp_path, shortlist_dim=8, rotation="none")
    index.upsert([str(i) for i in range(1500)], vectors)
    before = index.search(vectors[:20], k=3)
    index.close()
    graphs = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert graphs
    for graph in graphs:
        shutil.rmtree(graph)
    again = TwoStageIndex(tmp_path)
    again.repair()
    assert again.verify().ok
    after = again.search(vectors[:20], k=3)
    assert [hits[0].id for hits in after] == [str(i) for i in range(20)]
    # Chroma builds a graph with several threads, so its approximate results differ each time.
    same = sum(len({h.id for h in old} & {h.id for h in new}) for old, new in zip(before, after, strict=True))
    assert same >= 0.9 * 60


def test_an_upsert_that_stopped_after_chroma_is_finished(tmp_path, vectors, monkeypatch):
    index = TwoStageIndex(tmp_path, full_dim=32, shortlist_dim=8)
    index.upsert(["a"], vectors[:1], documents=["old"])
    with monkeypatch.context() as patched:
        patched.setattr(index._session.opened.stores.archive, "commit_staged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.upsert(["a"], vectors[1:2], documents=["new"])
    index.close()
    again = TwoStageIndex(tmp_path)
    again.repair()
    assert again.verify().ok
    assert again.get(["a"])[0].document == "new"
    assert again.search(vectors[1:2])[0][0].score == pytest.approx(1, abs=1e-3)


def test_an_upsert_that_stopped_before_chroma_is_undone(tmp_path, vectors, monkeypatch):
    index = TwoStageIndex(tmp_path, full_dim=32, shortlist_dim=8)
    index.upsert(["a"], vectors[:1], documents=["old"])
    with monkeypatch.context() as patched:
        patched.setattr(index._session.opened.stores.shortlist, "upsert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.upsert(["a", "b"], vectors[1:3], documents=["new", "new"])
    assert index.search(vectors[:1])[0][0].score == pytest.approx(1, abs=1e-3)
    index.close()
    again = TwoStageIndex(tmp_path)
    assert again.verify().orphaned == ["b"]
    assert again.repair().ok
    assert (again.get(["a"])[0].document, len(again)) == ("old", 1)
    assert again.search(vectors[:1])[0][0].score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("precision", ["float16", "binary"])
@pytest.mark.parametrize("then", ["repair", "write"])
def test_a_record_that_was_losing_its_document_when_the_upsert_stopped_is_not_lost(
    tmp_path, vectors, monkeypatch, precision, then
):
    index = TwoStageIndex(tmp_path, full_dim=32, shortlist_dim=8, precision=precision)
    index.upsert(["a", "b"], vectors[:2], documents=["old", "kept"], metadatas=[{"page": 1}, None])
    with monkeypatch.context() as patched:
        patched.setattr("chromadb.api.models.Collection.Collection.upsert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.upsert(["a"], vectors[2:3], metadatas=[{"page": 2, "tags": ["x", "y"]}])
    index.close()
    with TwoStageIndex(tmp_path) as again:
        if then == "repair":
            again.repair()
        else:
            again.upsert(["c"], vectors[3:4])
        assert again.verify().ok
        (record,) = again.get(["a"])
        assert (record.document, record.metadata) == (None, {"page": 2, "tags": ["x", "y"]})
        assert again.search(vectors[2])[0].id == "a"
        assert again.search(vectors[2])[0].score == pytest.approx(1, abs=1e-2)
        assert again.get(["b"])[0].document == "kept"


def test_an_upsert_interrupted_on_a_server_is_reported_and_repaired(open_index, vectors, monkeypatch):
    index = open_index(full_dim=32, shortlist_dim=8)
    index.upsert(["a"], vectors[:1], documents=["old"])
    upsert_unsettled(index, vectors[1:2], "new", monkeypatch)
    assert index.verify().interrupted == ["a"]
    assert index.repair().ok
    assert index.search(vectors[1:2])[0][0].score == pytest.approx(1, abs=1e-3)


def interrupted(*arguments, **settings):
    raise KeyboardInterrupt


def upsert_unsettled(index, vector, text, monkeypatch):
    """Replace record "a", and stop when Chroma has it and the archive still has it staged."""
    with monkeypatch.context() as patched:
        patched.setattr(index._session.opened.stores.archive, "commit_staged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.upsert(["a"], vector, documents=[text])


@pytest.mark.parametrize("stage_one", ["every record", "scan", "graph"])
@pytest.mark.parametrize("rotation", ["none", "fit"])
def test_a_record_that_has_lost_its_full_vector_is_scored_by_chromas_with_a_warning(
    folder, vectors, archive_of, score_all_up_to, conditions_ask_the_graph, stage_one, rotation
):
    score_all_up_to(20_000 if stage_one == "every record" else 0)
    where_document = {"$contains": "text"} if stage_one == "graph" else None
    index = TwoStageIndex(folder)
    index.reindex(rotation=rotation)
    complete = index.search(vectors[3], k=300, where_document=where_document)
    low = truncate(index._session.opened.stores.project(truncate(vectors[3:4], 32)), 8)[0]
    index.close()
    archive_of(folder).lose("id-3")
    index = TwoStageIndex(folder)
    with pytest.warns(UserWarning, match=r"1 records of index 'docs' have no full vector, 'id-3' among them.*repair"):
        found = index.search(vectors[3], k=300, where_document=where_document)
    hits = {hit.id: hit.score for hit in found}
    kept = float(np.linalg.norm(index._session.opened.stores._lifted(low[None])[0] @ truncate(vectors[3:4], 32)[0]))
    assert hits["id-3"] == pytest.approx(kept, abs=1e-3)
    assert {hit.id: hit.score for hit in complete if hit.id != "id-3"} == {
        id_: score for id_, score in hits.items() if id_ != "id-3"
    }


def test_a_record_that_chroma_has_added_by_itself_is_found_with_a_warning_until_repair(folder, vectors):
    # Like those of a Matryoshka model: most of the length is in the first dimensions.
    full = truncate(np.random.default_rng(5).normal(size=(1, 32)) * ([3] * 8 + [1] * 24), 32)
    chromadb.PersistentClient(folder).get_collection("docs").add(["new"], truncate(full, 8), documents=["new"])
    index = TwoStageIndex(folder)
    for ask in (lambda: index.search(full), lambda: index.search(full, where_document={"$contains": "new"})):
        with pytest.warns(UserWarning, match="added through Chroma itself"):
            assert ask()[0][0].id == "new"
    with pytest.warns(UserWarning, match="added through Chroma itself"):
        assert "new" in {hit.id for hit in index.search_mmr(full, k=5)[0]}
    assert [record.vector is None for record in index.get(["id-1", "new"])] == [False, True]
    assert index.repair(encode=lambda texts: full).ok
    assert index.search(full)[0][0].score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("lost", "ok"), [(10, True), (11, False)])
def test_records_that_the_graph_lost_are_named_and_found_again(writable, monkeypatch, lost, ok):
    """Some unreachable records may be due to the graph's approximation."""
    shortlist = type(writable._session.opened.stores.shortlist)
    unreached, replace, rebuilt = shortlist.unreached, shortlist.replace, []
    names = [f"id-{number}" for number in range(lost)]
    monkeypatch.setattr(
        shortlist, "unreached", lambda self, ids, rows: unreached(self, ids, rows) if rebuilt else names
    )
    report = writable.verify()
    assert (report.unreachable, report.tried, report.ok) == (names, 120, ok)
    monkeypatch.setattr(shortlist, "replace", lambda *given: rebuilt.append(True) or replace(*given))
    assert writable.repair().ok
    assert bool(rebuilt) == (not ok)


def test_many_equal_records_are_all_reachable():
    index = TwoStageIndex(full_dim=4, shortlist_dim=2)
    index.upsert([str(row) for row in range(200)], [[1.0, 2.0, 3.0, 4.0]] * 199 + [[0.0] * 4])
    assert index.verify().ok


def test_an_upsert_after_an_interruption_wins(open_index, vectors, monkeypatch):
    index = open_index(full_dim=32, shortlist_dim=8)
    index.upsert(["a"], vectors[:1], documents=["text"])
    upsert_unsettled(index, vectors[1:2], "text", monkeypatch)
    index.upsert(["a"], vectors[:1], documents=["text"])
    assert index.repair().ok
    assert index.search(vectors[:1])[0][0].score == pytest.approx(1, abs=1e-3)
