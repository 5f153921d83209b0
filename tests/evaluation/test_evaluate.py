"""What an evaluation says of a collection whose answers are known."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrl_rag import MatryoshkaHead, TwoStageIndex
from mrl_rag.cli import main
from mrl_rag.errors import InvalidDimension, InvalidInput, InvalidVectors
from mrl_rag.evaluation import Dataset, EncodedDataset, Evaluation, evaluate, evaluate_index, exact_scan, sweep
from mrl_rag.evaluation.evaluate import made_questions
from mrl_rag.evaluation.ways import PRECISIONS, ScanningSearcher, Way
from mrl_rag.rotation import fit
from mrl_rag.truncation import normalize, truncate

TEXTS = {
    "jib": "A jib is a triangular sail. It is set in front of the mast.",
    "oak": "An oak sheds its leaves in autumn. A spruce keeps its needles.",
    "tax": "Income tax is paid once a year. The form is sent by post.",
    "owl": "Owls hunt at night. They hear a mouse under the snow.",
    "tea": "Green tea is brewed below the boiling point of water.",
}
ASKED = {"q1": "which sail has three corners?", "q2": "which bird hunts mice in the dark?", "q3": "how hot is the tea?"}
QRELS = {"q1": {"jib": 1}, "q2": {"owl": 1}, "q3": {"tea": 1, "oak": 0}}


def of(evaluation, method, dim, precision="float32"):
    (result,) = [r for r in evaluation.results if (r.method, r.dim, r.precision) == (method, dim, precision)]
    return result


@pytest.fixture(scope="module")
def judged(minilm):
    return evaluate(Dataset(TEXTS, ASKED, QRELS, "notes"), minilm, dims=(64, 2), sizes=(10, 20), precisions=PRECISIONS)


@pytest.fixture
def clustered():
    """400 vectors whose first axes say little, and 30 questions near them."""
    generator = np.random.default_rng(0)
    axes = np.linalg.qr(generator.normal(size=(32, 32)))[0] * np.geomspace(1, 0.01, 32)[:, None]
    vectors = normalize(generator.normal(size=(400, 32)) @ axes)
    return vectors, normalize(vectors[:30] + 0.02 * generator.normal(size=(30, 32)))


def unlabelled(vectors, queries, **fields):
    ids, questions = [str(row) for row in range(len(vectors))], [f"q{row}" for row in range(len(queries))]
    return EncodedDataset("made", "none", "none (exact)", ids, ids, vectors, questions, queries, None, **fields)


def test_judged_questions_are_scored_by_trec_evals_measures(judged):
    assert judged.reference.scores.keys() == {"nDCG@10", "MRR@10", "recall@10"}
    assert judged.reference.scores["nDCG@10"].mean == 1
    assert judged.reference.per_question["MRR@10"] == [1, 1, 1]
    assert judged.questions == list(ASKED.values())
    assert (judged.name, judged.labels, judged.records, judged.full_dim) == ("notes", "judgments", 5, 384)
    assert judged.encode_rate > 0
    assert Evaluation.from_json(judged.to_json()) == judged


def test_every_way_is_tried_and_its_bytes_are_counted(judged):
    bytes_of = {(r.method, r.dim, r.shortlist_size, r.precision): r.bytes_per_record for r in judged.results}
    assert judged.reference.bytes_per_record == 1536
    assert [bytes_of["plain cut", 64, None, precision] for precision in PRECISIONS] == [256, 128, 68, 8]
    assert bytes_of["fitted projection", 2, None, "binary"] == 1
    assert bytes_of["two stages", 64, 20, "int8"] == 68 + 768
    assert len(bytes_of) == len(judged.results) == 3 + 2 * 2 * 4 + 2 * 2
    assert all(0 <= score.low <= score.mean <= score.high <= 1 for r in judged.results for score in r.scores.values())
    assert all(r.milliseconds > 0 for r in judged.results)


def test_the_questions_that_lost_most_show_what_was_lost(minilm):
    # One number is a sign: of five passages, those on the question's side are equal.
    corpus = {**TEXTS, **{f"copy {i}": text for i, text in enumerate(TEXTS.values())}}
    found = evaluate(Dataset(corpus, ASKED, QRELS), minilm, dims=(1,), precisions=("binary",), sizes=(), k=1)
    assert found.lost
    falls = [lost.before - lost.after for lost in found.lost]
    assert falls == sorted(falls, reverse=True)
    assert falls[-1] > 0
    assert all(id_ in {"jib", "owl", "tea"} and text == TEXTS[id_] for lost in found.lost for id_, text in lost.lost)


def test_without_judgments_titles_and_first_sentences_are_asked(minilm):
    found = evaluate(Dataset(TEXTS, {}, {}), minilm, dims=(192,), precisions=("float32",), k=2)
    assert set(found.questions) == {text.partition(".")[0] + "." for text in TEXTS.values()}
    assert found.labels == "none (exact search at full dimension, of titles and first sentences)"
    assert found.reference.scores.keys() == {"recall@2"}
    assert found.reference.scores["recall@2"].mean == 1


def test_made_questions_are_titles_or_whole_first_sentences():
    first, second = "\u821f\u662f\u6728\u9020\u7684\u3002", "\u5b83\u5f88\u957f\u3002"
    documents = ["1. Sails\nA jib is one.", "", first + second, "kept"]
    metadatas = [{}, {"title": "A title"}, {}, {"title": "b.csv", "path": "a/b.csv"}]
    assert set(made_questions(documents, metadatas)) == {"1. Sails A jib is one.", "A title", first, "kept"}
    assert len(made_questions([f"sentence number {i}" for i in range(9)], most=4)) == 4


def test_the_projection_keeps_what_a_plain_cut_loses(clustered):
    found = sweep(unlabelled(*clustered), dims=(4,), precisions=("float32",), sizes=(100,))
    plain, fitted = (of(found, method, 4).scores["recall@10"] for method in ("plain cut", "fitted projection"))
    assert fitted.low > plain.high
    assert of(found, "two stages", 4, "int8").scores["recall@10"].mean > 0.99


def test_records_that_are_asked_fit_no_projection(clustered):
    vectors, _ = clustered
    with TwoStageIndex(full_dim=32) as index:
        index.upsert([str(row) for row in range(400)], vectors)
        found = evaluate_index(index, dims=(4,), precisions=("float32",), questions=1000)
    assert len(found.questions) == 200
    plain, fitted = (of(found, method, 4).scores["recall@10"] for method in ("plain cut", "fitted projection"))
    assert fitted.low > plain.high


@pytest.mark.parametrize("kind", ["array", "head", "file"])
def test_a_head_is_tried_at_every_dimension_and_the_full_one(clustered, kind, tmp_path):
    head = fit(clustered[0])
    if kind != "array":
        head = MatryoshkaHead(head)
    if kind == "file":
        head.save(tmp_path / "head.safetensors")
        head = tmp_path / "head.safetensors"
    found = sweep(unlabelled(*clustered), dims=(4,), precisions=("float32",), head=head)
    assert of(found, "head", 32).scores["recall@10"].mean == 1
    assert of(found, "head", 4).per_question == of(found, "fitted projection", 4).per_question


def test_a_record_that_is_a_question_is_not_its_own_answer(clustered):
    vectors, _ = clustered
    rows = np.array([3, 7, 7])
    found = ScanningSearcher(Way("", (32,)), vectors).search(vectors[rows], 399, rows)
    assert [sorted({*range(400)} - {*row}) for row in found.tolist()] == [[3], [7], [7]]


@given(
    st.integers(1, 12), st.integers(1, 8), st.integers(1, 5), st.sampled_from(["float32", "float16", "int8", "binary"])
)
def test_a_search_in_two_stages_over_all_records_is_the_exact_one(count, dim, k, precision):
    generator = np.random.default_rng(count)
    vectors, queries = normalize(generator.normal(size=(count, 8))), normalize(generator.normal(size=(3, 8)))
    way = Way("", (dim, 8), (count + k,), precision)
    np.testing.assert_array_equal(ScanningSearcher(way, vectors).search(queries, k), exact_scan(vectors, queries, k))


def test_a_funnel_scores_each_stage_at_its_dimension(clustered):
    vectors, queries = clustered
    found = ScanningSearcher(Way("", (2, 8, 32), (100, 20)), vectors).search(queries, 5)
    first = exact_scan(truncate(vectors, 2), truncate(queries, 2), 100)
    for query, rows, got in zip(queries, first, found, strict=True):
        kept = rows[exact_scan(truncate(vectors[rows], 8), truncate(query[None], 8), 20)[0]]
        assert set(got) == set(kept[exact_scan(vectors[kept], query[None], 5)[0]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dims": (33,)}, InvalidDimension, "dim is 33"),
        ({"sizes": (5,)}, InvalidInput, "shortlist size is 5"),
        ({"precisions": ("int4",)}, InvalidInput, "'int4' is none of"),
        ({"head": np.eye(8)}, InvalidVectors, r"shape \(8, 8\)"),
        ({"k": 0}, InvalidInput, "k is 0"),
    ],
)
def test_bad_settings_are_refused(clustered, arguments, error, message):
    with pytest.raises(error, match=message):
        sweep(unlabelled(*clustered), **arguments)


def test_nothing_to_search_or_ask_is_refused(clustered, minilm):
    vectors, queries = clustered
    with pytest.raises(InvalidInput, match="0 questions"):
        sweep(unlabelled(vectors, queries[:0]))
    with pytest.raises(InvalidInput, match="no passages"):
        evaluate(Dataset({}, {}, {}), minilm)


# An index


@pytest.fixture
def index(minilm, tmp_path):
    with TwoStageIndex(tmp_path / "db", fingerprint=minilm.fingerprint, model="minilm") as opened:
        opened.upsert(list(TEXTS), minilm.encode(list(TEXTS.values())), list(TEXTS.values()))
        yield opened


def test_an_index_is_evaluated_without_a_model(index):
    found = evaluate_index(index, dims=(192,), precisions=("float32",))
    assert len(found.questions) == 2  # half of the records: the others fit the projection
    assert set(found.questions) < set(TEXTS.values())
    assert math.isnan(found.encode_rate)
    own = found.results[-1]
    assert (own.method, own.dim, own.shortlist_size) == ("two stages", index.shortlist_dim, 50)
    assert own.scores["recall@10"].mean == 1


def test_pairs_are_answered_by_texts_or_ids_of_the_index(index, minilm):
    pairs = Dataset({"1": TEXTS["jib"], "2": "owl"}, ASKED, {"q1": {"1": 1}, "q2": {"2": 1}}, "asked", "pairs")
    found = evaluate_index(index, minilm, pairs=pairs, dims=(192,), precisions=("float32",))
    assert (found.labels, found.questions) == ("pairs", list(ASKED.values())[:2])
    assert found.reference.scores["MRR@10"].mean == found.results[-1].scores["MRR@10"].mean == 1
    strange = Dataset({"1": "a text of another index"}, ASKED, {"q1": {"1": 1}})
    with pytest.raises(InvalidInput, match="1 of 1 passages are neither a text nor an id"):
        evaluate_index(index, minilm, pairs=strange)


def test_what_an_index_lacks_is_named(index):
    with pytest.raises(InvalidInput, match="pass the encoder"):
        evaluate_index(index, ask="sentences")
    with pytest.raises(InvalidInput, match="0 records"):
        evaluate_index(TwoStageIndex(full_dim=8))


def test_the_command_saves_an_evaluation(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mrl_rag.encoder.encoder.pick_dtype", lambda device: torch.float32)
    index.close()
    asked, saved = tmp_path / "asked.tsv", tmp_path / "found.json"
    asked.write_text(f"{ASKED['q1']}\tjib\n")
    arguments = ["--pairs", str(asked), "--dims", "192,64", "--sizes", "20", "--save", str(saved), "--json"]
    assert main(["evaluate", str(tmp_path / "db"), *arguments]) == 0
    found = Evaluation.from_json(saved.read_text())
    assert json.loads(saved.read_text()) == json.loads(capsys.readouterr().out)
    assert {result.dim for result in found.results} == {384, 192, 96, 64}
    assert main(["evaluate", str(tmp_path / "db"), "--dims", "a"]) == 2
    assert "--dims is 'a'; it must be integers" in capsys.readouterr().err
