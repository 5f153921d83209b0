import asyncio
import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_classic.storage import LocalFileStore
from langchain_mrl import MatryoshkaEmbeddings

from mrl_rag import CachedEncoder
from mrl_rag.errors import InvalidInput
from mrl_rag.testing import DeterministicEncoder


def cached(embeddings, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LangChain's advice against SHA-1
        return CacheBackedEmbeddings.from_bytes_store(
            embeddings,
            LocalFileStore(folder / "documents"),
            namespace=embeddings.namespace,
            query_embedding_cache=LocalFileStore(folder / "queries"),
        )


def test_a_question_with_the_words_of_a_passage_keeps_its_own_vector_in_a_cache(words, tmp_path):
    cache = cached(words, tmp_path)
    for _ in range(2):  # the second time from the cache
        assert cache.embed_documents(["the same words"]) == words.embed_documents(["the same words"])
        assert cache.embed_query("the same words") == words.embed_query("the same words")
    assert words.embed_query("the same words") != words.embed_documents(["the same words"])[0]
    assert [len(list((tmp_path / kind).iterdir())) for kind in ("documents", "queries")] == [1, 1]


async def test_the_cache_serves_coroutines_alike(words, tmp_path):
    cache = cached(words, tmp_path)
    for _ in range(2):
        assert await cache.aembed_documents(["a text"]) == words.embed_documents(["a text"])
        assert await cache.aembed_query("a text") == words.embed_query("a text")


@pytest.mark.usefixtures("default_dtype")
def test_models_dimensions_and_tasks_share_a_cache_and_mix_nothing(make_tiny_bert, tmp_path):
    several = [
        MatryoshkaEmbeddings(encoder=DeterministicEncoder(64)),
        MatryoshkaEmbeddings(encoder=DeterministicEncoder(64), dim=16),
        MatryoshkaEmbeddings(encoder=DeterministicEncoder(64), task="clustering"),
        MatryoshkaEmbeddings(encoder=DeterministicEncoder(32)),
        MatryoshkaEmbeddings(model=str(make_tiny_bert(seed=1)), device="cpu"),
        MatryoshkaEmbeddings(model=str(make_tiny_bert(seed=2)), device="cpu"),
        MatryoshkaEmbeddings(model=str(make_tiny_bert(seed=2)), device="cpu", prompts={"document": "passage: "}),
    ]
    assert len({embeddings.namespace for embeddings in several}) == len(several)
    for embeddings in several * 2:
        assert cached(embeddings, tmp_path).embed_documents(["a text"]) == embeddings.embed_documents(["a text"])
    assert MatryoshkaEmbeddings(encoder=DeterministicEncoder(64), dim=64).namespace == several[0].namespace


def test_the_encoders_own_cache_keeps_questions_and_passages_apart_in_one_file(words, tmp_path):
    for _ in range(2):
        kept = MatryoshkaEmbeddings(encoder=CachedEncoder(DeterministicEncoder(64), tmp_path / "vectors.sqlite3"))
        assert kept.embed_documents(["a text"])[0] == pytest.approx(words.embed_documents(["a text"])[0], abs=1e-6)
        assert kept.embed_query("a text") == pytest.approx(words.embed_query("a text"), abs=1e-6)
        assert kept.namespace == words.namespace


def test_every_number_is_a_python_float(words):
    rows = [*words.embed_documents(["a", "b"]), words.embed_query("a"), *words.embed_queries(["a"])]
    assert {type(row) for row in rows} == {list}
    assert {type(number) for row in rows for number in row} == {float}
    assert words.embed_documents([]) == []


async def test_async_gives_the_same_inside_a_running_loop(words):
    assert words.embed_query("a") == await words.aembed_query("a") == (await words.aembed_queries(["a"]))[0]
    assert words.embed_documents(["a", "b"]) == await words.aembed_documents(["a", "b"])


@pytest.mark.usefixtures("default_dtype")
async def test_questions_awaited_together_share_forward_passes(tiny_bert, monkeypatch):
    embeddings = MatryoshkaEmbeddings(model=str(tiny_bert), device="cpu")
    embeddings.embed_query("warm")
    passes = []
    forward = embeddings.encoder._batcher._forward
    monkeypatch.setattr(embeddings.encoder._batcher, "_forward", lambda *rows: passes.append(1) or forward(*rows))
    texts = [f"question {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    found = await asyncio.gather(*map(embeddings.aembed_query, texts))
    assert len(passes) < len(texts)
    for text, vector in zip(texts, found, strict=True):
        assert vector == pytest.approx(embeddings.embed_query(text), abs=1e-5)


@pytest.mark.usefixtures("default_dtype")
def test_32_threads_get_what_one_gets(tiny_bert):
    embeddings = MatryoshkaEmbeddings(model=str(tiny_bert), device="cpu")
    texts = ["a", "a cat", "a cat and a dog", "the sea"] * 16
    expected = {text: embeddings.embed_query(text) for text in set(texts)}
    with ThreadPoolExecutor(32) as pool:
        for text, vector in zip(texts, pool.map(embeddings.embed_query, texts), strict=True):
            assert vector == pytest.approx(expected[text], abs=1e-5)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_and_pickles_give_the_same_vectors(tiny_bert, words, copied):
    bert = MatryoshkaEmbeddings(model=str(tiny_bert), device="cpu", dim=8, prompts={"query": "query: "})
    for embeddings in (bert, words):
        again = copied(embeddings)
        assert again.embed_query("a text") == embeddings.embed_query("a text")
        assert again.namespace == embeddings.namespace


@pytest.mark.usefixtures("default_dtype")
def test_its_fields_make_it_again(tiny_bert):
    bert = MatryoshkaEmbeddings(model=str(tiny_bert), device="cpu", dim=8, task="clustering")
    assert MatryoshkaEmbeddings(**bert.model_dump()).embed_query("a") == bert.embed_query("a")


@pytest.mark.usefixtures("default_dtype")
def test_settings_of_an_encoder_that_exists_are_refused(words, tiny_bert):
    with pytest.raises(InvalidInput, match="max_length"):
        MatryoshkaEmbeddings(encoder=words.encoder, max_length=8)
    assert words.model == "DeterministicEncoder"
    made = MatryoshkaEmbeddings(model=str(tiny_bert), device="cpu")
    assert MatryoshkaEmbeddings(encoder=made.encoder).model == str(tiny_bert)


@pytest.mark.usefixtures("default_dtype")
def test_a_local_model_needs_no_network(tiny_bert, no_network):
    assert len(MatryoshkaEmbeddings(model=str(tiny_bert), device="cpu").embed_query("a")) == 16
    assert len(MatryoshkaEmbeddings(device="cpu").embed_query("a")) == 384


def test_openvino_may_run_the_network(minilm):
    found = MatryoshkaEmbeddings(backend="openvino", device="cpu", dtype="float32").embed_query("a question")
    assert found == pytest.approx(minilm.encode_queries(["a question"])[0].tolist(), abs=1e-4)
