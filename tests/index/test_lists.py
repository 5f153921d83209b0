"""Inverted lists hold every record once, and the lists nearest to a query hold nearly all of its nearest records."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl_rag import TwoStageIndex
from mrl_rag.index.lists import best, group, leading, preselect, product
from mrl_rag.index.loaded import LoadedVectors
from mrl_rag.quantization import quantize, unit_codes
from mrl_rag.truncation import normalize


def clustered(count, dim=32, clusters=60, seed=0):
    centres = np.random.default_rng(9).normal(size=(clusters, dim))
    random = np.random.default_rng(seed)
    return normalize(centres[random.integers(clusters, size=count)] + 0.5 * random.normal(size=(count, dim)))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 300), distinct=st.integers(1, 300), share=st.floats(0, 1))
def test_every_record_stands_in_one_list(count, distinct, share):
    codes = unit_codes(normalize(np.random.default_rng(count).normal(size=(distinct, 8))))
    repeated = np.arange(count) % distinct
    rows, lists = group(codes[repeated])
    assert sorted(rows.tolist()) == list(range(count))
    assert lists.starts[0] == 0
    assert lists.size == count
    assert (np.diff(lists.starts) >= 0).all()
    assert lists.near(codes[0], 1.0).tolist() == list(range(count))
    near = lists.near(codes[0], share)
    chosen = np.unique(lists.list_of(near))
    assert len(chosen) <= max(round(share * len(lists.centroids)), 1)
    assert near.tolist() == [row for row in range(count) if lists.list_of(np.array([row]))[0] in chosen]


def test_a_tenth_of_the_lists_holds_nearly_all_that_is_near():
    vectors, queries = clustered(6000), clustered(50, seed=1)
    rows, lists = group(unit_codes(vectors))
    true = np.argsort(-queries @ vectors.T, axis=1)[:, :10]
    found = [set(rows[lists.near(query, 0.1)].tolist()) for query in quantize(queries)[0]]
    assert np.mean([len(looked_at) for looked_at in found]) < 1500
    assert np.mean([len(looked_at & set(ids)) / 10 for looked_at, ids in zip(found, true.tolist(), strict=True)]) > 0.95


def decaying(count, dim=256, seed=0):
    """Return vectors as a rotation makes them: most of their length is in the first numbers."""
    return normalize(np.random.default_rng(seed).normal(size=(count, dim)) / np.arange(1, dim + 1) ** 0.6)


def test_the_first_numbers_of_rotated_vectors_preselect_nearly_all_of_the_nearest():
    codes = unit_codes(decaying(20_000))
    first, rows = leading(codes), np.arange(0, 20_000, 2)
    for query in quantize(decaying(20, seed=1))[0]:
        kept = preselect(first, rows, query, 400)
        assert len(kept) == 400
        assert (np.diff(kept) > 0).all()
        assert set(kept.tolist()) <= set(rows.tolist())
        nearest = set(rows[best(product(codes, rows, query), 10)].tolist())
        assert len(nearest & set(kept.tolist())) >= 9
        # Too few to be worth it, or too many wanted.
        assert preselect(first, rows[:2000], query, 10).tolist() == rows[:2000].tolist()
        assert preselect(first, rows, query, 3000).tolist() == rows.tolist()


def test_vectors_with_their_length_in_all_numbers_are_not_preselected():
    even = unit_codes(normalize(np.random.default_rng(0).normal(size=(10_000, 256))))
    assert leading(even) is None
    assert preselect(None, np.arange(10_000), even[0], 10).tolist() == list(range(10_000))
    assert leading(unit_codes(decaying(10_000, dim=128))) is None
    assert leading(unit_codes(decaying(1000))) is None


@settings(max_examples=20, deadline=None)
@given(count=st.integers(0, 60), rows=st.integers(1, 50), seed=st.integers(0, 5))
def test_the_best_places_have_the_highest_scores(count, rows, seed):
    random = np.random.default_rng(seed)
    codes = random.integers(-127, 128, size=(50, 8)).astype(np.int8)
    query = random.integers(-127, 128, size=8).astype(np.int8)
    taken = np.sort(random.permutation(50)[:rows])
    scores = product(codes, taken, query)
    np.testing.assert_array_equal(scores, codes[taken].astype(np.int64) @ query.astype(np.int64))
    if count:
        chosen = best(scores, count)
        np.testing.assert_array_equal(np.sort(scores[chosen])[::-1], np.sort(scores)[::-1][:count])


@settings(max_examples=20, deadline=None)
@given(
    size=st.sampled_from([1, 20, 300]),
    removed=st.sampled_from([0, 1, 15_000]),
    copies=st.sampled_from([1, 5000]),
    seed=st.integers(0, 5),
)
def test_many_queries_together_find_the_nearest_of_all_records(size, removed, copies, seed):
    count = 20_000
    vectors = np.repeat(clustered(count // copies, dim=8, seed=seed), copies, axis=0)
    codes, queries = unit_codes(vectors), clustered(130, dim=8, seed=seed + 10)
    gone = np.random.default_rng(seed).permutation(count)[:removed]
    loaded = LoadedVectors(
        0, list(map(str, range(count))), codes, slots=np.arange(count), removed=gone, lists=group(codes[:64])[1]
    )
    scores = np.delete(codes.astype(np.int64), gone, axis=0) @ quantize(queries)[0].T.astype(np.int64)
    for place, rows in enumerate(loaded.nearest(queries, size, 0.1, size)):
        assert len(set(loaded.candidates(rows).ids)) == size
        assert not set(rows.tolist()) & set(gone.tolist())
        nearest = codes[rows].astype(np.int64) @ quantize(queries[place][None])[0][0]
        np.testing.assert_array_equal(nearest, np.sort(scores[:, place])[::-1][:size])


def test_the_same_records_are_grouped_in_the_same_way():
    codes = unit_codes(clustered(2000))
    (first, lists), (again, lists_again) = group(codes), group(codes)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(lists.starts, lists_again.starts)


def test_an_index_that_is_opened_again_reads_its_lists(tmp_path, score_all_up_to, monkeypatch):
    score_all_up_to(0, lists=True)
    vectors = clustered(1500)
    with TwoStageIndex(tmp_path, shortlist_dim=16) as index:
        index.upsert([str(row) for row in range(1500)], vectors)
        before = index.search(vectors[:20])
    monkeypatch.setattr("mrl_rag.index.loaded.group", lambda *_: pytest.fail("grouped again"))
    with TwoStageIndex(tmp_path) as index:
        assert index.search(vectors[:20]) == before


def test_a_damaged_file_of_lists_is_made_anew(tmp_path, score_all_up_to):
    score_all_up_to(0, lists=True)
    vectors = clustered(1500)
    with TwoStageIndex(tmp_path, shortlist_dim=16) as index:
        index.upsert([str(row) for row in range(1500)], vectors)
        before = index.search(vectors[:20])
    (saved,) = tmp_path.glob("archive-*.shortlist.npz")
    saved.write_bytes(saved.read_bytes()[:5000])
    with TwoStageIndex(tmp_path) as index:
        assert index.search(vectors[:20]) == before


def test_a_search_scans_twice_the_lists_while_a_hit_is_late_in_the_shortlist(score_all_up_to):
    score_all_up_to(0, lists=True)
    vectors = clustered(3000, clusters=3)
    with TwoStageIndex(shortlist_dim=8, rotation="none") as index:
        index.upsert([str(row) for row in range(3000)], vectors)
        hits = index.search(vectors[:30], explain=True)
        assert max(hit.stages[0].rounds for answer in hits for hit in answer) > 1
        assert all(len({hit.id for hit in answer}) == 10 for answer in hits)
        assert [[hit.id for hit in answer] for answer in hits] == [
            [hit.id for hit in index.search(query[None])[0]] for query in vectors[:30]
        ]


def test_a_search_returns_k_hits_even_if_the_lists_near_the_query_hold_fewer(score_all_up_to):
    score_all_up_to(0, lists=True)
    with TwoStageIndex(shortlist_dim=8, rotation="none") as index:
        index.upsert([str(row) for row in range(1000)], clustered(1000))
        assert [len(hits) for hits in index.search(clustered(3, seed=1), k=900)] == [900] * 3


@settings(max_examples=30, deadline=None)
@given(first=st.integers(1, 200), more=st.integers(0, 200), dropped=st.integers(0, 50))
def test_lists_are_extended_by_new_records_and_drop_deleted_ones(first, more, dropped):
    codes = unit_codes(normalize(np.random.default_rng(first).normal(size=(first + more, 8))))
    _, lists = group(codes[:first])
    kept = np.arange(min(dropped, first - 1), first)
    order, extended = lists.extended(lists.list_of(kept), codes[first:])
    assert sorted(order.tolist()) == list(range(len(kept) + more))
    assert extended.size == len(kept) + more
    # An old record stays in its list.
    places = np.flatnonzero(order < len(kept))
    np.testing.assert_array_equal(extended.list_of(places), lists.list_of(kept)[order[places]])
