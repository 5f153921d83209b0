"""An index chooses its dimension and shortlist size so that searches reach the target recall."""

import logging
import warnings

import numpy as np
import pytest

from mrl_rag import Plan, TwoStageIndex, truncate
from mrl_rag.errors import InvalidInput
from mrl_rag.evaluation import exact_scan, recall_at_k
from mrl_rag.index.calibration import fit_shortlist
from mrl_rag.truncation import normalize


def decaying(count, seed=0, dims=256, power=0.7):
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(99).normal(size=(dims, dims)))[0]
    centres = np.random.default_rng(98).normal(size=(200, dims))
    rows = centres[random.integers(200, size=count)] + random.normal(size=(count, dims))
    return (rows * np.arange(1, dims + 1.0) ** -power @ turn).astype(np.float32)


def fill(index, vectors, batch=None):
    ids = [str(number) for number in range(len(vectors))]
    for start in range(0, len(vectors), batch or len(vectors)):
        part = slice(start, start + (batch or len(vectors)))
        index.upsert(ids[part], vectors[part], metadatas=[{"page": 1}] * len(vectors[part]))
    return index


def recall(index, vectors, queries, **settings):
    found = [[hit.id for hit in hits] for hits in index.search(queries, **settings)]
    return recall_at_k(found, [[str(row) for row in rows] for rows in exact_scan(vectors, queries, 10)])


@pytest.mark.parametrize(("place", "batch"), [("memory", None), ("folder", None), ("folder", 700)])
@pytest.mark.parametrize("stage_one", ["scan", "lists", "graph"])
def test_the_default_settings_find_nearly_all_of_the_true_top_ten(
    tmp_path, place, batch, stage_one, score_all_up_to, conditions_ask_the_graph, caplog
):
    score_all_up_to(1000, lists=stage_one == "lists")
    vectors, queries = decaying(4000), decaying(100, seed=1)
    where = {"page": 1} if stage_one == "graph" else None
    path = tmp_path if place == "folder" else None
    with caplog.at_level(logging.INFO, "mrl_rag"):
        index = fill(TwoStageIndex(path), vectors, batch)
    assert index.rotation == "fit"
    assert index.shortlist_dim % 32 == 0
    assert index.recall >= 0.98
    assert f"searched at {index.shortlist_dim} of 256 dimensions" in caplog.text
    assert recall(index, vectors, queries, where=where) >= 0.98
    if path:
        before, measured = index.search(queries[:5], where=where), index.recall
        index.close()
        again = TwoStageIndex(path)
        assert again.recall == measured
        assert recall(again, vectors, queries, where=where) >= 0.98
        assert again.search(queries[:5], where=where) == before or stage_one == "graph"


def test_a_lower_target_takes_no_more_dimensions(score_all_up_to):
    score_all_up_to(1000)
    vectors = decaying(3000, power=0.4)
    low, high = (fill(TwoStageIndex(recall=target), vectors) for target in (0.5, 0.999))
    assert low.shortlist_dim <= high.shortlist_dim
    assert high.recall > 0.97


def test_more_dimensions_are_chosen_if_the_first_ones_keep_less():
    chosen = []
    for power in (0.9, 0.5):
        vectors = normalize(decaying(3000, power=power))
        fitted = fit_shortlist(lambda rows, vectors=vectors: vectors[rows], 3000, 64, False, 0.99)
        chosen.append(fitted.shortlist_dim)
    assert chosen[0] < chosen[1]


def test_a_dimension_that_is_given_is_kept(score_all_up_to):
    score_all_up_to(1000)
    index = fill(TwoStageIndex(shortlist_dim=40), decaying(2000))
    assert (index.rotation, index.shortlist_dim) == ("fit", 40)


@pytest.mark.parametrize("count", [1, 7, 240, 1460])
def test_a_small_index_ranks_every_record(count):
    vectors, queries = decaying(count, power=0.1), decaying(20, seed=1, power=0.1)
    index = fill(TwoStageIndex(), vectors)
    assert recall(index, vectors, queries) == 1
    assert index.search(queries, k=10) == [index.search(query[None], k=10)[0] for query in queries]
    scores = [[hit.score for hit in hits] for hits in index.search(queries, k=count)]
    expected = np.sort(truncate(queries, 256) @ truncate(vectors, 256).T, axis=1)[:, ::-1]
    np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_recall_stays_high_while_an_index_outgrows_exhaustive_search(score_all_up_to):
    score_all_up_to(500)
    vectors, queries = decaying(700), decaying(30, seed=1)
    index = TwoStageIndex()
    for start in range(0, 700, 50):
        part = np.arange(start, start + 50)
        index.upsert([str(row) for row in part], vectors[part])
        assert recall(index, vectors[: start + 50], queries) >= 0.97, start


def test_a_search_doubles_its_shortlist_while_a_hit_is_late_in_it(score_all_up_to):
    score_all_up_to(0)
    vectors, queries = decaying(3000, power=0.2), decaying(30, seed=1, power=0.2)
    index = fill(TwoStageIndex(shortlist_dim=16, rotation="none"), vectors)
    hits = index.search(queries, explain=True)
    rounds = {hit.stages[0].rounds for answer in hits for hit in answer}
    assert max(rounds) > 1
    for answer in hits:
        for hit in answer:
            first = hit.stages[0]
            assert first.candidates == 50 * 2 ** (first.rounds - 1)
    fixed = index.search(queries, plan=Plan(dims=(16, 256), sizes=(50,)), explain=True)
    assert {hit.stages[0].rounds for answer in fixed for hit in answer} == {1}
    assert recall(index, vectors, queries) > recall(index, vectors, queries, plan=Plan(dims=(16, 256), sizes=(50,)))


def test_an_index_that_outgrew_its_dimension_says_so_once(score_all_up_to):
    score_all_up_to(300)
    index = fill(TwoStageIndex(), decaying(301, power=1.5))
    chosen = index.shortlist_dim
    wider = decaying(4000, seed=3, power=0.05)
    with pytest.warns(UserWarning, match="Call reindex"):
        fill(index, np.concatenate([decaying(301, power=1.5), wider]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.upsert(["one more"], wider[:1])
    index.reindex(rotation="fit")
    assert index.shortlist_dim > chosen


@pytest.mark.parametrize("bad", [0, -0.1, 1.1, "0.9", True, None])
def test_a_recall_out_of_range_is_refused(bad):
    with pytest.raises(InvalidInput, match="recall"):
        TwoStageIndex(recall=bad)


def test_an_interrupted_first_upsert_is_measured_by_the_next(tmp_path, score_all_up_to, monkeypatch):
    score_all_up_to(1000)

    def interrupted(*_):
        raise KeyboardInterrupt

    with TwoStageIndex(tmp_path) as index:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("mrl_rag.index.index.calibrate", interrupted)
            fill(index, decaying(2000))
        assert index.recall is None
    with TwoStageIndex(tmp_path) as index:
        index.upsert(["one more"], decaying(1, seed=5))
        assert index.recall >= 0.98


def test_another_dimension_is_measured_anew(tmp_path, score_all_up_to):
    score_all_up_to(1000, lists=True)
    with fill(TwoStageIndex(tmp_path), decaying(2000, power=0.3)) as index:
        before = index.recall
        index.reindex(shortlist_dim=16)
        assert index.shortlist_dim == 16
        assert index.recall != before
        index.reindex(rotation="none")
        assert index.recall is None


def test_copies_of_one_record_count_as_found_whichever_they_are(score_all_up_to):
    score_all_up_to(1000, lists=True)
    vectors = np.repeat(decaying(60), 40, axis=0)
    index = fill(TwoStageIndex(), vectors)
    assert index.recall == 1.0
    assert index._session.opened.stores.config.lists_share < 1
