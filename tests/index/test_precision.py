import numpy as np
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.errors import IndexMismatch, InvalidInput


@pytest.fixture
def decaying():
    """120 groups of ten near each other: the members of a group are each other's top ten."""
    rng = np.random.default_rng(0)
    spectrum = 1 / np.sqrt(np.arange(1, 97))
    vectors = np.repeat(rng.normal(size=(120, 96)), 10, axis=0) * spectrum
    vectors += 0.3 * rng.normal(size=(1200, 96)) * spectrum
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("precision", "error"), [("float16", 5e-4), ("int8", 4e-3), ("binary", 4e-3)])
@pytest.mark.parametrize("stage_one", ["every record", "scan", "graph"])
def test_each_precision_finds_the_same_records(
    tmp_path, decaying, precision, error, stage_one, score_all_up_to, conditions_ask_the_graph
):
    score_all_up_to(10_000 if stage_one == "every record" else 0)
    index = TwoStageIndex(tmp_path, shortlist_dim=32, precision=precision)
    index.upsert([f"id-{row:04}" for row in range(1200)], decaying, metadatas=[{"page": 1}] * 1200)
    index.close()
    index = TwoStageIndex(tmp_path)
    exact = decaying[:50] @ decaying.T
    where = {"page": 1} if stage_one == "graph" else None
    hits = index.search(decaying[:50], k=10, where=where)
    for row, (found, scores) in enumerate(zip(hits, exact, strict=True)):
        assert {hit.id for hit in found} == {f"id-{row // 10 * 10 + member:04}" for member in range(10)}
        assert all(abs(hit.score - scores[int(hit.id[3:])]) < error for hit in found)
    np.testing.assert_allclose(index.get(["id-0007"])[0].vector, decaying[7], atol=error)
    assert index.verify().ok
    index.reindex(shortlist_dim=48, rotation="fit")
    assert [hit.id for hit in index.search(decaying[:1], k=1, where=where)[0]] == ["id-0000"]


def test_bits_choose_the_candidates_that_are_read_whole(decaying, score_all_up_to):
    score_all_up_to(0)
    index = TwoStageIndex(shortlist_dim=32, precision="binary")
    index.upsert([str(row) for row in range(1200)], decaying)
    hit = index.search(decaying[:1], k=3, explain=True)[0][0]
    shortlist, whole = hit.stages
    assert (shortlist.dim, whole.dim) == (32, 96)
    assert whole.candidates == max(shortlist.candidates // 2, 4 * 3)
    assert hit.stages[1].score == hit.score


def test_a_condition_that_few_records_meet_is_scored_exactly(decaying):
    index = TwoStageIndex(shortlist_dim=32, precision="binary")
    index.upsert([str(row) for row in range(1200)], decaying, metadatas=[{"row": row} for row in range(1200)])
    exact = np.argsort(-(decaying[:1] @ decaying[:500].T)[0])[:20]
    hits = index.search(decaying[:1], k=20, where={"row": {"$lt": 500}})[0]
    assert len({hit.id for hit in hits} & set(map(str, exact))) >= 19


def test_another_precision_than_the_stored_one_is_refused(tmp_path):
    TwoStageIndex(tmp_path, precision="int8").upsert(["a"], [[1.0, 2.0]])
    with pytest.raises(IndexMismatch, match=r"int8; float16 was asked for"):
        TwoStageIndex(tmp_path, precision="float16")
    assert TwoStageIndex(tmp_path).search([[1.0, 2.0]])[0][0].id == "a"


def test_an_unknown_precision_or_one_for_a_server_is_refused():
    import chromadb

    with pytest.raises(InvalidInput, match="'int4'"):
        TwoStageIndex(precision="int4")
    with pytest.raises(InvalidInput, match="float32 in Chroma"):
        TwoStageIndex(client=chromadb.EphemeralClient(), precision="int8")


def test_a_zero_vector_is_stored_in_every_precision():
    for precision in ("float16", "int8", "binary"):
        index = TwoStageIndex(precision=precision)
        index.upsert(["a", "b"], [[0.0, 0.0], [0.0, 1.0]])
        assert [(hit.id, hit.score) for hit in index.search([[0.0, 1.0]])[0]] == [("b", pytest.approx(1)), ("a", 0)]


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
@pytest.mark.parametrize("rotation", ["none", "auto"])
def test_vectors_that_one_number_dominates_are_sound(precision, rotation):
    vectors = 0.03 * np.random.default_rng(0).normal(size=(1200, 256))
    vectors[:, 200] = -0.9
    index = TwoStageIndex(shortlist_dim=64, precision=precision, rotation=rotation)
    index.upsert([str(row) for row in range(1200)], vectors)
    assert index.verify().misplaced == []
