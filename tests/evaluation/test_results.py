import math
import warnings

import numpy as np
import pytest

from mrl_rag.errors import InvalidInput
from mrl_rag.evaluation import Evaluation, LostQuestion, Result
from mrl_rag.intervals import estimate


def result(dim, **fields):
    scores = {"nDCG@10": estimate([0.0, 1.0, 0.5])}
    return Result("plain cut", dim, None, "float32", 4 * dim, 0.5, scores, {"nDCG@10": [0.0, 1.0, 0.5]}, **fields)


def test_an_evaluation_comes_back_from_json_as_it_was():
    before = Evaluation(
        *("notes", "minilm", 9, ["a?", "b?", "ü?"], "pairs", 384, result(384), [result(64)], 12.5),
        [LostQuestion("a?", 1.0, 0.5, [("1", "text")])],
    )
    assert Evaluation.from_json(before.to_json()) == before


def test_an_unknown_rate_is_null_in_json():
    evaluation = Evaluation("notes", "minilm", 9, [], "none (titles)", 384, result(384), [], math.nan, [])
    assert '"encode_rate": null' in evaluation.to_json()
    assert math.isnan(Evaluation.from_json(evaluation.to_json()).encode_rate)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"encode_rate": 1}'])
def test_other_json_is_refused(text):
    with pytest.raises(InvalidInput, match="not an evaluation"):
        Evaluation.from_json(text)


def test_the_interval_holds_the_true_mean_about_95_times_of_100():
    generator = np.random.default_rng(1)
    estimates = [estimate(generator.random(100) < 0.3) for _ in range(200)]
    held = sum(found.low <= 0.3 <= found.high for found in estimates)
    assert 180 <= held <= 198
    assert all(found.low <= found.mean <= found.high for found in estimates)


def test_the_interval_of_equal_values_is_a_point_and_of_none_unknown():
    assert str(estimate([0.5] * 9)) == "0.500 [0.500, 0.500]"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(estimate([]).mean)
