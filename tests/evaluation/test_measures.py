import json

import numpy as np
import pytest

from mrl_rag.errors import InvalidInput, InvalidVectors
from mrl_rag.evaluation import exact_scan, ndcg, read_beir, recall_at_k, timed


def test_an_exact_scan_ranks_by_cosine_whatever_the_lengths():
    vectors = [[0.0, 2.0], [10.0, 0.1], [1.0, 1.0], [4.0, 4.0]]
    np.testing.assert_array_equal(exact_scan(vectors, [[1.0, 0.0], [0.0, 1.0]], k=3), [[1, 2, 3], [0, 2, 3]])
    with pytest.raises(InvalidVectors, match="2 numbers and queries 3"):
        exact_scan(vectors, [[1.0, 0.0, 0.0]], k=1)


def test_agreement_is_the_share_of_the_expected_that_was_found():
    assert recall_at_k([["a", "b"], ["c", "x"]], [["b", "a"], ["c", "d"]]) == 0.75
    assert recall_at_k([["a"]], [[]]) == 1


def test_ndcg_is_trec_evals():
    qrels = {"q1": {"a": 1, "b": 0, "c": 2}, "q2": {"a": 1}}
    # By hand: gains 1 then 2 at ranks 1 and 3, over the ideal 2 then 1.
    expected = (1 / np.log2(2) + 2 / np.log2(4)) / (2 / np.log2(2) + 1 / np.log2(3))
    assert ndcg({"q1": {"a": 3.0, "b": 2.0, "c": 1.0}, "q2": {"a": 1.0}}, qrels) == pytest.approx((expected + 1) / 2)
    assert ndcg({"q2": {"a": 1.0}}, qrels) == pytest.approx(1 / 2)


def test_timing_returns_the_answers_in_order():
    answers, seconds = timed(lambda number: number * 2, [1, 2, 3])
    assert answers == [2, 4, 6]
    assert seconds > 0


@pytest.fixture
def folder(tmp_path):
    corpus = [{"_id": "d1", "title": "A title", "text": "a text"}, {"_id": 2, "text": "other"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(line) for line in corpus) + "\n")
    queries = [{"_id": "q1", "text": "asked"}, {"_id": "q2", "text": "not judged"}]
    (tmp_path / "queries.jsonl").write_text("\n".join(json.dumps(line) for line in queries))
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    return tmp_path


def test_a_beir_folder_is_read_with_titles_and_judged_queries_only(folder):
    data = read_beir(folder)
    assert data.corpus == {"d1": "A title a text", "2": "other"}
    assert data.queries == {"q1": "asked"}
    assert data.qrels == {"q1": {"d1": 1}}
    (folder / "qrels").mkdir()
    (folder / "qrels.tsv").rename(folder / "qrels" / "test.tsv")
    assert read_beir(folder) == data


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("corpus.jsonl", "{"),
        ("corpus.jsonl", '{"text": "no id"}'),
        ("queries.jsonl", "[]"),
        ("qrels.tsv", "a\nq1\td1\tx"),
    ],
)
def test_a_damaged_beir_folder_is_refused_by_file_and_line(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(InvalidInput, match=rf"{file}, line"):
        read_beir(folder)


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl", "qrels.tsv"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(InvalidInput, match=file):
        read_beir(folder)
