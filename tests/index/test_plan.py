import numpy as np
import pytest

from mrl_rag import Plan, rank
from mrl_rag.errors import InvalidPlan, InvalidVectors
from mrl_rag.index.search import mmr
from mrl_rag.truncation import normalize


@pytest.mark.parametrize(
    ("dims", "sizes"),
    [
        ((64,), ()),
        ((64, 384), ()),
        ((64, 384), (50, 10)),
        ((384, 64), (50,)),
        ((64, 128, 384), (10, 50)),
        ((64, 384), (0,)),
        ((0, 384), (50,)),
        ((64, 384.0), (50,)),
        ((64, 384), 50),
        ((True, 384), (50,)),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(dims, sizes):
    with pytest.raises(InvalidPlan):
        Plan(dims=dims, sizes=sizes)


def test_a_plan_takes_lists_and_compares_by_value():
    assert Plan(dims=[64, 384], sizes=[50]) == Plan(dims=(64, 384), sizes=(50,))


def test_candidates_found_elsewhere_are_ranked_by_cosine():
    ranked = rank([2.0, 0.0], [[0, 1], [3, 0], [1, 1], [5, 0]])
    assert [row for row, _ in ranked] == [1, 3, 2, 0]
    assert [score for _, score in ranked] == pytest.approx([1, 1, 0.5**0.5, 0])
    assert rank([1.0], []) == []
    assert len(rank([1.0], [[1], [2]], k=1)) == 1
    with pytest.raises(InvalidVectors, match="3 numbers and the query 2"):
        rank([1, 2], [[1, 2, 3]])


@pytest.mark.parametrize("lambda_mult", [0, 0.2, 0.5, 0.9, 1])
def test_mmr_chooses_the_row_with_the_highest_marginal_relevance(lambda_mult):
    vectors = normalize(np.random.default_rng(0).normal(size=(30, 4)))
    scores = (vectors @ vectors[7]).astype(np.float64)
    chosen = mmr(scores, vectors, 12, lambda_mult)
    for place, row in enumerate(chosen):
        before = chosen[:place]
        value = {
            other: lambda_mult * scores[other]
            - (1 - lambda_mult) * max((float(vectors[other] @ vectors[taken]) for taken in before), default=0)
            for other in set(range(30)) - set(before)
        }
        assert value[row] == pytest.approx(max(value.values()), abs=1e-6)
    assert len(set(chosen)) == 12


def test_mmr_chooses_the_first_of_equal_rows_and_no_more_than_there_are():
    same = np.ones((3, 1), dtype=np.float32)
    assert mmr(np.ones(3), same, 9, 0.5) == [0, 1, 2]
    assert mmr(np.array([0.1, 0.3, 0.2]), same, 2, 1) == [1, 2]
    assert mmr(np.zeros(0), np.zeros((0, 1), dtype=np.float32), 5, 0.5) == []


def test_a_funnel_doubles_the_numbers_and_halves_the_candidates():
    assert Plan.funnel(64, 768, size=800) == Plan(dims=(64, 128, 256, 512, 768), sizes=(800, 400, 200, 100))
    assert Plan.funnel(384, 384, size=10) == Plan(dims=(384, 384), sizes=(10,))
    for wrong in ((0, 384, 10), (64, 384, 0), (512, 384, 10), ("64", 384, 10)):
        with pytest.raises(InvalidPlan):
            Plan.funnel(*wrong)
