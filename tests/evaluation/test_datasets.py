import pytest

from mrl_rag.errors import InvalidInput
from mrl_rag.evaluation import Dataset, read_dataset, read_pairs

PAIRS = [("who?", "one"), ("what, then?", "two\u2028lines"), ("who?", "three"), ("where?", "one")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.jsonl",
            '{"question": "who?", "passage": "one"}\n["what, then?", "two\u2028lines"]\n\n["who?", "three"]\n'
            '["where?", "one"]\n',
        ),
        ("a.csv", '\ufeffquestion,passage\nwho?,one\n"what, then?","two\u2028lines"\nwho?,three\nwhere?,one\n'),
        ("a.tsv", "who?\tone\nwhat, then?\ttwo\u2028lines\nwho?\tthree\nwhere?\tone"),
    ],
)
def test_pairs_are_read_from_json_lines_and_tables(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    data = read_pairs(tmp_path / name)
    assert (data.name, data.labels) == ("a", "pairs")
    assert len(data.corpus) == len(data.queries) == 3
    found = {(data.queries[q], data.corpus[p]) for q, passages in data.qrels.items() for p in passages}
    assert found == set(PAIRS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a\tb", "pass a .jsonl, .csv or .tsv file"),
        ("a.jsonl", '["a", "b"]\n["a"]', "line 2, is not a question and a passage"),
        ("a.jsonl", '{"query": "a"}', "line 1"),
        ("a.jsonl", '["a", 2]', "line 1"),
        ("a.csv", "a,b\na,b,c", "row 2, has 3 columns"),
        ("a.csv", "question,passage\n", "no pairs"),
        ("a.tsv", "", "no pairs"),
    ],
)
def test_other_files_are_refused_by_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInput, match=message):
        read_pairs(tmp_path / name)


def test_a_missing_file_of_pairs_is_named(tmp_path):
    for name in ("none.csv", "none.jsonl"):
        with pytest.raises(InvalidInput, match=name):
            read_pairs(tmp_path / name)


def test_a_beir_folder_without_judgments_is_its_corpus(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "one"}')
    data = read_dataset(tmp_path, None)
    assert (data.corpus, data.qrels, data.name) == ({"1": "one"}, {}, tmp_path.name)
    with pytest.raises(InvalidInput, match="not both"):
        read_dataset(tmp_path, data)
    assert read_dataset(tmp_path / "index", data) is None
    assert read_dataset(None, data) is data


def test_judgments_of_unknown_questions_and_passages_make_no_pairs():
    data = Dataset({"d": "text"}, {"q": "asked"}, {"q": {"d": 1, "gone": 1, "e": 0}, "unknown": {"d": 1}})
    assert data.pairs == [("asked", "text")]
