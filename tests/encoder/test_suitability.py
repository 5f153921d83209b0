"""An encoder says once what its model was not trained for, and what that costs."""

import time
import warnings

import pytest

from mrl_rag import MatryoshkaEncoder, TwoStageIndex, TwoStageRetriever
from mrl_rag.encoder.suitability import dim_warning, language_warning, share_outside_latin
from mrl_rag.models import MODELS


@pytest.fixture
def fresh():
    return lambda **settings: MatryoshkaEncoder("minilm", device="cpu", dtype="float32", **settings)


@pytest.fixture(autouse=True)
def _every_warning_counts():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="minilm was trained")
        yield


def test_a_cut_below_the_trained_dimensions_is_warned_of_once_with_its_cost(fresh):
    encoder = fresh()
    encoder.encode(["full vectors are what it was trained for"])
    with pytest.warns(
        UserWarning, match=r"minilm was trained for dimension 384.*truncated to 64.*0\.50 to 0\.40 at 64.*'nomic-v1\.5'"
    ):
        encoder.encode(["a"], dim=64)
    encoder.encode(["a"], dim=32)
    with pytest.warns(UserWarning, match="truncated to 64"):
        fresh(truncate_dim=64).encode_query("a")


def test_a_two_stage_index_is_no_cause_for_it_whatever_its_shortlist(fresh):
    encoder = fresh()
    index = TwoStageIndex(full_dim=384, shortlist_dim=64, fingerprint=encoder.fingerprint)
    retriever = TwoStageRetriever(encoder, index)
    retriever.index_texts(["a cat", "a dog"])
    assert retriever.search("a cat", k=1)[0].document == "a cat"


@pytest.mark.parametrize("dim", [64, 100])
def test_a_matryoshka_model_may_be_cut_down_to_its_smallest_dimension(dim):
    assert not dim_warning(MODELS["nomic-v1.5"], dim)
    assert dim_warning(MODELS["nomic-v1.5"], 32)


@pytest.mark.parametrize(
    "text", ["如何在后台运行一个函数?", "Как запустить функцию в фоне?", "백그라운드에서 함수 실행"]
)
def test_another_script_is_warned_of_once_with_the_models_for_it(fresh, text):
    encoder = fresh()
    with pytest.warns(UserWarning, match=r"trained on English.*'multilingual-e5-small'"):
        encoder.encode_queries([text])
    encoder.encode_queries([text])
    with pytest.warns(UserWarning, match="trained on English"):
        list(fresh().encode_iter([text]))


def test_latin_text_code_and_a_foreign_word_are_no_cause_for_it(fresh):
    fresh().encode(["naïve café", "x → y ≤ 3 😀", "the word 東京 in an English text", "", "123"])
    assert not language_warning(MODELS["bge-m3"], ["如何在后台运行一个函数?"])
    assert not language_warning(MODELS["minilm"], [])


def test_looking_at_a_question_takes_microseconds():
    start = time.perf_counter()
    for _ in range(1000):
        share_outside_latin(["how do I run a function in the background?"])
    assert time.perf_counter() - start < 0.1
