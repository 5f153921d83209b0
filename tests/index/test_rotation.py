"""The rotation is fitted on the index's own vectors; full-dimension scores never change."""

import warnings

import numpy as np
import pytest

from mrl_rag import Plan, TwoStageIndex
from mrl_rag.errors import ArchiveError, InvalidDimension, InvalidInput
from mrl_rag.evaluation import exact_scan, recall_at_k
from mrl_rag.rotation import explained_energy, fit


def decaying(count, seed=0, dims=64):
    """Vectors with a decaying spectrum, in randomly rotated coordinates."""
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(99).normal(size=(dims, dims)))[0]
    return (random.normal(size=(count, dims)) * 0.9 ** np.arange(dims) @ turn).astype(np.float32)


def test_the_map_is_orthogonal_and_keeps_the_most():
    vectors = decaying(500)
    rotation = fit(vectors)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(64), atol=1e-5)
    energies = [explained_energy(vectors, rotation, dim) for dim in (8, 16, 64)]
    assert energies == sorted(energies)
    assert energies[0] > 2 * explained_energy(vectors, np.eye(64, dtype=np.float32), 8)
    assert energies[2] == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(fit(vectors), rotation)


@pytest.mark.parametrize("batches", [1, 6])
def test_an_index_fits_itself_once_it_does_not_score_all(open_index, batches, request, score_all_up_to):
    score_all_up_to(256)
    index, vectors, queries = open_index(shortlist_dim=16), decaying(600), decaying(40, seed=1)
    ids = [str(number) for number in range(600)]
    plain = TwoStageIndex(shortlist_dim=16, rotation="none")
    plain.upsert(ids, vectors)
    for part in np.array_split(np.arange(600), batches):
        index.upsert([ids[row] for row in part], vectors[part], documents=[f"text {row}" for row in part])
    if batches > 1 and any(place in request.node.callspec.id for place in ("server", "client")):
        # Other clients may be writing there, so it does not rebuild the collection.
        assert index.rotation == "auto"
        index.reindex(rotation="fit")
    assert (index.rotation, plain.rotation) == ("fit", "none")

    expected = [[ids[row] for row in found] for found in exact_scan(vectors, queries, 10)]
    plan = Plan(dims=(16, 64), sizes=(30,))
    ours, cut = ([[hit.id for hit in hits] for hits in i.search(queries, plan=plan)] for i in (index, plain))
    assert recall_at_k(ours, expected) > 0.95 > recall_at_k(cut, expected) + 0.1

    everything = Plan(dims=(16, 64), sizes=(600,))
    for one, other in zip(index.search(queries, plan=everything), plain.search(queries, plan=everything), strict=True):
        assert [hit.id for hit in one] == [hit.id for hit in other]
        assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], abs=1e-3)
    assert index.get(["7"])[0].document == "text 7"
    assert index.verify().ok
    assert open_index().search(queries[:3], plan=everything) == index.search(queries[:3], plan=everything)


def test_too_few_vectors_are_left_as_they_are():
    index = TwoStageIndex(shortlist_dim=16)
    index.upsert([str(number) for number in range(100)], decaying(100))
    assert index.rotation == "auto"


def test_a_funnel_looks_at_rotated_coordinates_too(open_index, score_all_up_to):
    score_all_up_to(256)
    index, vectors = open_index(shortlist_dim=8), decaying(400)
    index.upsert([str(number) for number in range(400)], vectors)
    funnel = Plan(dims=(8, 24, 64), sizes=(100, 20))
    found = [[hit.id for hit in hits] for hits in index.search(vectors[:30], k=5, plan=funnel)]
    assert recall_at_k(found, [[str(row) for row in rows] for rows in exact_scan(vectors, vectors[:30], 5)]) > 0.95


def test_new_vectors_that_differ_are_warned_of(score_all_up_to):
    score_all_up_to(256)
    index = TwoStageIndex(shortlist_dim=16)
    index.upsert([f"a{number}" for number in range(400)], decaying(400))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.upsert([f"b{number}" for number in range(300)], decaying(300, seed=5))
    strangers = np.random.default_rng(2).normal(size=(300, 64))
    with pytest.warns(UserWarning, match="reindex"):
        index.upsert([f"c{number}" for number in range(300)], strangers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        index.upsert([f"d{number}" for number in range(300)], strangers)
    index.reindex(rotation="fit")
    assert index.rotation == "fit"


def test_reindexing_changes_the_shortlist_and_nothing_else(open_index, writable, vectors):
    everything = {8: Plan(dims=(8, 32), sizes=(120,)), 20: Plan(dims=(20, 32), sizes=(120,))}
    before = writable.search(vectors[:5], plan=everything[8])
    records = writable.get(["id-3", "id-4"])
    for shortlist_dim, rotation, kind in (
        (20, "none", "none"),
        (8, "fit", "fit"),
        (20, None, "fit"),
        (8, "none", "none"),
    ):
        writable.reindex(shortlist_dim=shortlist_dim, rotation=rotation, hnsw={"ef_search": 200})
        assert (writable.shortlist_dim, writable.rotation, len(writable)) == (shortlist_dim, kind, 120)
        assert writable.search(vectors[:5], plan=everything[shortlist_dim]) == before
        again = writable.get(["id-3", "id-4"])
        assert [(r.id, r.document, r.metadata) for r in again] == [(r.id, r.document, r.metadata) for r in records]
        assert writable.verify().ok
    other = open_index()
    assert other.search(vectors[:5], plan=everything[8]) == before


def test_another_handle_follows_a_reindexing(tmp_path, vectors):
    one, other = TwoStageIndex(tmp_path), TwoStageIndex(tmp_path)
    one.upsert(["a", "b"], vectors[:2])
    before = other.search(vectors[:1])
    one.reindex(rotation="none")
    assert other.search(vectors[:1]) == before
    other.upsert(["c"], vectors[2:3])
    assert len(one) == 3


@pytest.fixture(scope="module")
def one_record(new_place, vectors):
    """An index whose reindexing is always refused."""
    with new_place() as open_index, open_index(full_dim=32, shortlist_dim=8) as index:
        index.upsert(["a"], vectors[:1])
        yield index


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (InvalidDimension, {"shortlist_dim": 33}),
        (InvalidDimension, {"shortlist_dim": 0}),
        (InvalidInput, {"rotation": "auto"}),
        (InvalidInput, {"hnsw": {"ef_search": -1}}),
        (InvalidInput, {"hnsw": {"no_such_setting": 1}}),
    ],
)
def test_a_bad_reindexing_is_refused_and_the_index_answers_on(one_record, vectors, error, arguments):
    with pytest.raises(error):
        one_record.reindex(**arguments)
    assert [hit.id for hit in one_record.search(vectors[:1])[0]] == ["a"]
    assert one_record.shortlist_dim == 8


def test_an_interrupted_reindexing_leaves_the_old_collection(tmp_path, vectors, monkeypatch):
    index = TwoStageIndex(tmp_path)
    index.upsert(["a", "b"], vectors[:2])

    def stop(self, old):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mrl_rag.index.shortlist.ShortlistCollection.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            index.reindex(rotation="fit")
    assert len(index.search(vectors[:1])[0]) == 2
    assert len(index.client.list_collections()) == 2
    assert index.repair().ok
    assert len(index.client.list_collections()) == 1
    assert len(index.search(vectors[:1])[0]) == 2


def test_a_switch_that_stopped_between_the_names_is_finished(tmp_path, vectors, monkeypatch):
    index = TwoStageIndex(tmp_path)
    index.upsert(["a", "b"], vectors[:2])
    client = index.client
    modify = type(client.get_collection("docs")).modify

    def stop_at_the_second_name(self, name=None, **changes):
        if name == "docs":
            raise KeyboardInterrupt
        modify(self, name=name, **changes)

    with monkeypatch.context() as patched:
        patched.setattr(type(client.get_collection("docs")), "modify", stop_at_the_second_name)
        with pytest.raises(KeyboardInterrupt):
            index.reindex(rotation="none")
    assert "docs" not in [collection.name for collection in client.list_collections()]
    index.close()
    again = TwoStageIndex(tmp_path)
    assert len(again.search(vectors[:1])[0]) == 2
    assert again.repair().ok
    assert [collection.name for collection in again.client.list_collections()] == ["docs"]


def test_a_lost_rotation_is_named_and_repaired(tmp_path, archive_of, score_all_up_to):
    score_all_up_to(256)
    vectors = decaying(400)
    index = TwoStageIndex(tmp_path, shortlist_dim=16)
    index.upsert([str(number) for number in range(400)], vectors)
    everything = Plan(dims=(16, 64), sizes=(400,))
    expected = index.search(vectors[:3], k=3, plan=everything)
    index.close()
    archive_of(tmp_path).lose_rotations()
    again = TwoStageIndex(tmp_path)
    with pytest.raises(ArchiveError, match="rotation"):
        again.search(vectors[:1])
    assert not again.verify().ok
    assert again.repair().ok
    assert again.search(vectors[:3], k=3, plan=everything) == expected
