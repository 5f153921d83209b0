"""Vectors in memory are always those of the archive."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl_rag import TwoStageIndex
from mrl_rag.index.loaded import Loader

DIM = 24


def vector(seed):
    return np.random.default_rng(seed).normal(size=(1, DIM)).astype(np.float32)


def records(loaded):
    rows = set(range(len(loaded.codes))) - set(loaded.removed.tolist())
    assert len(rows) == len(loaded)
    scales = loaded.scales if loaded.full is not None else np.ones(len(loaded.codes))
    found = {loaded.ids[row]: (scales[row] * loaded.codes[row]).tolist() for row in rows}
    assert len(found) == len(rows)
    return found


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["upsert", "upsert", "delete", "load"]), st.sampled_from("abcde"), st.integers(0, 3)),
        max_size=15,
    ),
    full=st.booleans(),
)
def test_a_record_is_found_as_it_was_last_written(steps, full):
    with_rows = TwoStageIndex(full_dim=DIM, shortlist_dim=8, rotation="none")
    with_rows.upsert(["z"], vector(9))
    stores = with_rows._session.opened.stores
    loader = Loader(stores)
    for action, id_, seed in [("load", "", 0), *steps]:
        if action == "upsert":
            with_rows.upsert([id_], vector(seed))
        elif action == "delete":
            with_rows.delete([id_])
        else:
            assert loader.load(full) is loader.load(full)
    assert records(loader.load(full)) == records(Loader(stores).load(full))
    assert set(records(loader.load(full))) == {record.id for record in with_rows.get()}
    assert set(records(loader.load(not full))) == {record.id for record in with_rows.get()}
    with_rows.close()


@pytest.mark.parametrize("stage_one", ["scan", "lists", "every record"])
def test_each_search_sees_what_was_written_before_it(tmp_path, score_all_up_to, stage_one):
    score_all_up_to(1000 if stage_one == "every record" else 0, lists=stage_one == "lists")
    rows = np.random.default_rng(0).normal(size=(700, DIM)).astype(np.float32)
    ids = [str(number) for number in range(700)]
    index = TwoStageIndex(tmp_path, shortlist_dim=16)
    index.upsert(ids[:300], rows[:300])
    for start in range(0, 300, 50):
        index.delete(ids[start : start + 10])
        index.upsert(ids[start + 20 : start + 30], rows[start + 320 : start + 330] if start < 80 else -rows[:10])
        index.upsert([f"new-{start}"], rows[699 - start : 700 - start])
        (nearest,) = index.search(rows[699 - start : 700 - start], k=1)
        assert (nearest[0].id, round(nearest[0].score, 2)) == (f"new-{start}", 1)
        answers = index.search(rows[start : start + 10], k=5)
        assert {hit.id for hits in answers for hit in hits}.isdisjoint(ids[start : start + 10])
        assert [len(hits) for hits in answers] == [5] * 10
    index.close()
