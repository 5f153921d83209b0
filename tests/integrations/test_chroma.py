"""Chroma by itself, with this package's encoder."""

import chromadb
import numpy as np
import pytest
from chroma_mrl import MatryoshkaEmbeddingFunction

from mrl_rag.errors import IndexMismatch, InvalidInput, InvalidTexts
from mrl_rag.testing import DeterministicEncoder

TEXTS = ["a cat sleeps on the sofa", "the stock market fell", "rain and thunder"]


def test_a_collection_is_filled_asked_and_opened_again(tmp_path, minilm, cosine_distance, default_dtype):
    client = chromadb.PersistentClient(tmp_path)
    collection = client.create_collection("docs", embedding_function=MatryoshkaEmbeddingFunction(dim=64))
    collection.add(ids=["a", "b", "c"], documents=TEXTS)
    stored = collection.get(ids=["a"], include=["embeddings"])["embeddings"][0]
    tolerance = {"float32": 1e-6, "bfloat16": 1e-3}[default_dtype]
    assert cosine_distance([stored], minilm.encode_documents(TEXTS[:1], dim=64)).max() < tolerance
    assert collection.configuration_json["hnsw"]["space"] == "cosine"
    again = chromadb.PersistentClient(tmp_path).get_collection("docs")
    assert again.query(query_texts=["weather"], n_results=1)["ids"] == [["c"]]


def test_queries_get_their_own_prompt():
    function = MatryoshkaEmbeddingFunction(encoder=DeterministicEncoder(32), dim=8)
    document, query = function(["a cat"])[0], function.embed_query(["a cat"])[0]
    np.testing.assert_array_equal(document, DeterministicEncoder(32).encode_documents(["a cat"], dim=8)[0])
    assert not np.allclose(document, query)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"model": "nomic-v1.5"}, "model"), ({"max_length": 8}, "max_length"), ({"encoder": 7}, "is 7")]
)
def test_an_encoder_comes_without_settings_for_making_one(wrong, said):
    with pytest.raises(InvalidInput, match=said):
        MatryoshkaEmbeddingFunction(**({"encoder": DeterministicEncoder(32)} | wrong))


def test_an_encoder_object_is_asked_for_again(tmp_path):
    function = MatryoshkaEmbeddingFunction(encoder=DeterministicEncoder(32))
    chromadb.PersistentClient(tmp_path).create_collection("docs", embedding_function=function).add(
        ["a"], documents=TEXTS[:1]
    )
    client = chromadb.PersistentClient(tmp_path)
    with pytest.raises(InvalidInput, match=r"encoder=\.\.\."):
        client.get_collection("docs").query(query_texts=["a"])
    assert client.get_collection("docs", embedding_function=function).query(query_texts=["a"])["ids"] == [["a"]]


@pytest.mark.usefixtures("default_dtype")
def test_a_model_whose_files_have_changed_is_refused():
    config = MatryoshkaEmbeddingFunction().get_config()
    assert MatryoshkaEmbeddingFunction.build_from_config(config).get_config() == config
    with pytest.raises(IndexMismatch, match="fingerprint 0000"):
        MatryoshkaEmbeddingFunction.build_from_config(config | {"fingerprint": "0000"})(["a"])


def test_what_vectors_depend_on_cannot_change():
    function = MatryoshkaEmbeddingFunction(encoder=DeterministicEncoder(32))
    config = function.get_config()
    function.validate_config(config)
    function.validate_config_update(config, config)
    with pytest.raises(InvalidInput, match="dim can't change from None to 8"):
        function.validate_config_update(config, config | {"dim": 8})
    for broken, said in (({}, "lacks.*'model'"), ({"dim": 10}, "lacks.*'model'"), (config | {"no": 1}, "'no'")):
        for use in (function.validate_config, function.build_from_config):
            with pytest.raises(InvalidInput, match=said):
                use(broken)


def test_a_string_is_not_its_characters():
    function = MatryoshkaEmbeddingFunction(encoder=DeterministicEncoder(32), dim=8)
    for embed in (function, function.embed_query):
        with pytest.raises(InvalidTexts, match="abc"):
            embed("abc")
