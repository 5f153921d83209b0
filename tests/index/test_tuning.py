"""The cheapest search that reaches a target recall."""

import json

import numpy as np
import pytest

from mrl_rag import Plan, TwoStageIndex
from mrl_rag.cli import main
from mrl_rag.errors import InvalidDimension, InvalidInput, InvalidVectors
from mrl_rag.truncation import normalize

DIM = 128


def made(count, seed=0, axes=12):
    """Vectors that lie near a few axes, in random directions."""
    generator = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(9).normal(size=(DIM, DIM)))[0]
    return normalize(generator.normal(size=(count, DIM)) * np.r_[np.ones(axes), np.full(DIM - axes, 0.05)] @ directions)


def filled(folder=None, count=1000, **settings):
    index = TwoStageIndex(folder, full_dim=DIM, **settings)
    index.upsert([f"id-{row}" for row in range(count)], made(count))
    return index


@pytest.fixture(scope="module")
def index():
    with filled() as opened:
        yield opened


def test_the_cheapest_plan_is_found_on_some_records_and_measured_on_others(index):
    before = repr(index)
    tuning = index.tune(0.95)
    assert tuning.plan == Plan(dims=(32, DIM), sizes=(20,))
    assert tuning.reached
    assert (tuning.asked, tuning.held_out, tuning.measured) == ("records", 50, None)
    assert tuning.chosen.recall.low <= tuning.chosen.recall.mean <= tuning.chosen.recall.high
    assert [candidate.plan.dims[0] for candidate in tuning.candidates] == [32, 64, 96, 128]
    assert repr(index) == before
    assert index.tune(0.95) == tuning


def test_real_questions_choose_otherwise_than_records(index):
    far = normalize(np.random.default_rng(3).normal(size=(80, DIM)))
    tuning = index.tune(0.95, queries=far, dims=(16, 64))
    assert (tuning.asked, tuning.held_out) == ("queries", 40)
    assert tuning.candidates[0].recall.mean < index.tune(0.95, dims=(16,)).candidates[0].recall.mean


def test_a_target_out_of_reach_chooses_nothing_and_changes_nothing(index):
    before = repr(index)
    tuning = index.tune(1.0, dims=(1,), apply=True)
    assert (tuning.chosen, tuning.plan, tuning.reached, tuning.measured) == (None, None, False, None)
    assert tuning.candidates[0].plan.sizes == (400,)
    assert repr(index) == before


def test_applying_reindexes_and_measures_the_index_itself(tmp_path):
    with filled(tmp_path / "db", shortlist_dim=8) as index:
        vectors = index.get(["id-3"])[0].vector
        tuning = index.tune(0.9, queries=made(60, seed=5), dims=(32,), apply=True)
        assert (index.shortlist_dim, index.rotation, len(index)) == (32, "fit", 1000)
        assert tuning.measured.mean >= 0.9
        np.testing.assert_array_equal(index.get(["id-3"])[0].vector, vectors)
        assert index.verify().ok
    with TwoStageIndex(tmp_path / "db") as reopened:
        assert reopened.shortlist_dim == 32
        found = reopened.search(made(60, seed=5)[0], 10, tuning.plan)
        assert len(found) == 10


def test_an_index_without_a_rotation_is_tuned_without_one():
    with filled(rotation="none", shortlist_dim=8) as index:
        tuning = index.tune(0.9, dims=(16, 64, 120), apply=True)
        assert (index.shortlist_dim, index.rotation) == (tuning.plan.dims[0], "none")
        assert tuning.plan.dims[0] > 16


def test_few_records_are_not_measured():
    with filled(count=99) as index:
        tuning = index.tune(apply=True)
        assert (tuning.candidates, tuning.chosen, tuning.held_out) == ((), None, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_recall": 0}, InvalidInput, "recall is 0"),
        ({"queries": np.ones((9, DIM))}, InvalidInput, "9 queries"),
        ({"queries": np.ones((20, 8))}, InvalidVectors, "8 numbers and this index 128"),
        ({"dims": ()}, InvalidDimension, "at least one"),
        ({"dims": (129,)}, InvalidDimension, "dim is 129"),
    ],
)
def test_bad_arguments_are_refused(index, arguments, error, message):
    with pytest.raises(error, match=message):
        index.tune(**arguments)


def test_an_empty_index_is_refused():
    with pytest.raises(InvalidInput, match="nothing to tune"):
        TwoStageIndex(full_dim=8).tune()


def test_the_command_shows_and_applies_the_choice(tmp_path, capsys):
    filled(tmp_path / "db", count=400).close()
    assert main(["tune", str(tmp_path / "db"), "--target", "0.9", "--dims", "32,64"]) == 0
    out = capsys.readouterr().out
    assert "docs: recall of the exact top 10, over 20 records held out" in out
    assert out.count("<- cheapest") == 1
    assert main(["tune", str(tmp_path / "db"), "--target", "0.9", "--dims", "64", "--apply", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["plan"]["dims"], found["reached"]) == ([64, DIM], True)
    assert found["measured"]["mean"] >= 0.9
