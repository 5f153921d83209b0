"""The fine-tuning example: sentence-transformers trains, and the folder it saves is a model like any other."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from mrl_rag import MatryoshkaEncoder

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import finetune_matryoshka as example

PAIRS = [
    example.Pair(f"{word} the {thing}", f"how to {word} a {thing}, and when")
    for word in ("open", "close", "read", "write", "send", "find")
    for thing in ("file", "stream", "archive", "socket", "queue", "page", "text", "key")
]


@pytest.fixture(scope="module")
def trained(make_tiny_bert, tmp_path_factory):
    """A tiny BERT before and after a handful of steps."""
    before = make_tiny_bert(max_length=64)
    after = tmp_path_factory.mktemp("trained")
    example.train(str(before), PAIRS, after, dims=(16, 8, 4), steps=4)
    return before, after


def test_training_changes_the_model_and_its_folder_gives_the_references_vectors(trained, cosine_distance):
    before, after = trained
    texts = [pair.passage for pair in PAIRS]
    reference = SentenceTransformer(str(after), device="cpu")
    encoder = MatryoshkaEncoder(after, dtype="float32", device="cpu")
    for dim in (16, 8, 4):
        expected = reference.encode_document(texts, truncate_dim=dim)
        assert cosine_distance(encoder.encode_documents(texts, dim=dim), expected).max() < 1e-5
    untrained = MatryoshkaEncoder(before, dtype="float32", device="cpu")
    assert encoder.fingerprint != untrained.fingerprint
    assert not np.allclose(encoder.encode(texts), untrained.encode(texts), atol=1e-6)


@pytest.mark.usefixtures("default_dtype")
def test_it_is_measured_at_each_dimension(trained):
    found = example.evaluate(trained[1], [example.Pair(pair.passage, pair.passage) for pair in PAIRS], dims=(16, 4))
    assert found == {16: 1.0, 4: 1.0}
    # A question whose passage is any other one finds it among ten of 48 as chance has it.
    turned = [example.Pair(pair.passage, other.passage) for pair, other in zip(PAIRS, PAIRS[::-1], strict=True)]
    assert example.evaluate(trained[1], turned, dims=(16,))[16] < 0.7


def test_pairs_are_read_from_json_lines_and_from_a_beir_folder(tmp_path):
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in PAIRS[:3]) + "\n")
    assert example.read_pairs(lines) == PAIRS[:3]
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "title": "Files", "text": "are opened."}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "what are files?"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    assert example.read_pairs(tmp_path) == [("what are files?", "Files are opened.")]


def test_pairs_come_from_docstrings_and_the_halves_share_no_passage():
    pairs = example.docstring_pairs({"json", "shutil", "logging", "threading"})
    assert any(pair.question.startswith("Recursively copy a directory tree") for pair in pairs)
    first, second = example.split([*pairs, *(pair._replace(question="again") for pair in pairs)])
    assert len(first) + len(second) == 2 * len(pairs)
    assert abs(len(first) - len(second)) <= 2
    assert not {pair.passage for pair in first} & {pair.passage for pair in second}
