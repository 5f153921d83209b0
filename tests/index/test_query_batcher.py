"""Concurrent searches of several threads are answered as one batch, each with its own answers."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.index.query_batcher import QueryBatcher


def row(number):
    return np.full((1, 3), number, dtype=np.float32)


class Answering:
    """Blocks at first, so that other searches queue up; raises an error for 13."""

    def __init__(self):
        self.calls = []
        self.began, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, queries, request):
        self.calls.append((len(queries), request))
        self.began.set()
        self.may_go_on.wait(10)
        if 13 in queries[:, 0]:
            raise ValueError("13")
        return [(int(query[0]), request) for query in queries]


def ask_all(numbers, request_of=lambda number: "k"):
    answering = Answering()
    batcher = QueryBatcher()
    with ThreadPoolExecutor(len(numbers) + 1) as threads:
        first = threads.submit(batcher.search, row(0), "k", answering)
        answering.began.wait(10)
        asked = {n: threads.submit(batcher.search, row(n), request_of(n), answering) for n in numbers}
        while len(batcher._waiting) < len(numbers):
            threading.Event().wait(0.001)
        answering.may_go_on.set()
        assert first.result() == [(0, "k")]
    return asked, answering.calls


def test_searches_that_wait_are_answered_in_one_call():
    asked, calls = ask_all(range(1, 9))
    assert {n: future.result() for n, future in asked.items()} == {n: [(n, "k")] for n in range(1, 9)}
    assert calls == [(1, "k"), (8, "k")]


def test_searches_that_ask_for_something_else_are_not_mixed():
    asked, calls = ask_all(range(1, 9), lambda number: "odd" if number % 2 else "even")
    assert {n: future.result() for n, future in asked.items()} == {
        n: [(n, "odd" if n % 2 else "even")] for n in range(1, 9)
    }
    assert sorted(calls[1:]) == [(4, "even"), (4, "odd")]


def test_one_bad_search_does_not_fail_the_others():
    asked, _ = ask_all([11, 12, 13, 14])
    with pytest.raises(ValueError, match="13"):
        asked[13].result()
    assert [asked[n].result() for n in (11, 12, 14)] == [[(11, "k")], [(12, "k")], [(14, "k")]]


@pytest.mark.parametrize("stage_one", ["every record", "lists"])
def test_threads_get_what_each_would_get_alone(score_all_up_to, stage_one):
    score_all_up_to(5000 if stage_one == "every record" else 0, lists=stage_one == "lists")
    vectors = np.random.default_rng(0).normal(size=(2000, 24)).astype(np.float32)
    with TwoStageIndex(shortlist_dim=12) as index, ThreadPoolExecutor(8) as threads:
        index.upsert([str(number) for number in range(2000)], vectors)
        asked = [(vectors[start : start + 1 + start % 3], 5 + start % 2) for start in range(100)]
        alone = [index.search(queries, k) for queries, k in asked]
        assert list(threads.map(lambda pair: index.search(*pair), asked)) == alone
