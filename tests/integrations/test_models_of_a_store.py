"""A store remembers the model that filled it, and refuses another one's vectors of the same length."""

import pytest
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_classic.storage import InMemoryByteStore
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_mrl import MatryoshkaEmbeddings
from langchain_mrl import MatryoshkaVectorStore as LangChainStore
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.schema import TextNode
from llama_index_mrl import MatryoshkaEmbedding, TwoStageRetriever
from llama_index_mrl import MatryoshkaVectorStore as LlamaIndexStore

from mrl_rag import Encoder, TwoStageIndex
from mrl_rag.binding import may_be_one_model
from mrl_rag.errors import DimensionMismatch, IndexMismatch, InvalidInput
from mrl_rag.testing import DeterministicEncoder

FRAMEWORKS = ["langchain", "llama_index"]


class Named(DeterministicEncoder):
    def __init__(self, model, full_dim=64):
        super().__init__(full_dim)
        self.model = model
        self.fingerprint_of_model = f"{model}-{full_dim}"

    @property
    def fingerprint(self):
        return self.fingerprint_of_model


def ours(framework, encoder, **fields):
    return (MatryoshkaEmbeddings if framework == "langchain" else MatryoshkaEmbedding)(encoder=encoder, **fields)


def opened(framework, folder, embeddings, **more):
    if framework == "langchain":
        return LangChainStore(embeddings, "docs", str(folder), **more)
    return LlamaIndexStore("docs", str(folder), embed_model=embeddings, **more)


def fill(framework, folder, embeddings):
    with opened(framework, folder, embeddings) as store:
        if framework == "langchain":
            store.add_texts(["a text"], ids=["a"])
        else:
            store.add([TextNode(id_="a", text="a text", embedding=embeddings.get_text_embedding("a text"))])


@pytest.mark.parametrize("second", FRAMEWORKS)
@pytest.mark.parametrize("first", FRAMEWORKS)
def test_another_encoder_is_refused_with_both_named_and_the_same_one_is_let_in(first, second, tmp_path):
    fill(first, tmp_path, ours(first, Named("model-a")))
    with pytest.raises(IndexMismatch, match=r"filled by 'model-a'.*'model-b'"):
        opened(second, tmp_path, ours(second, Named("model-b")))
    with pytest.raises(IndexMismatch):
        opened(second, tmp_path, ours(second, Named("model-a"), task="clustering"))
    with pytest.raises(DimensionMismatch):
        opened(second, tmp_path, ours(second, Named("model-a"), dim=32))
    with opened(second, tmp_path, ours(second, Named("model-a"))) as store:
        assert len(store.index) == 1


@pytest.mark.parametrize("second", FRAMEWORKS)
@pytest.mark.parametrize("first", FRAMEWORKS)
def test_other_vendors_models_are_told_apart_by_name(first, second, tmp_path, named):
    fill(first, tmp_path, named(first, "BAAI/bge-small-en"))
    for other in (named(second, "intfloat/e5-small"), ours(second, Named("minilm"))):
        with pytest.raises(IndexMismatch, match=r"'BAAI/bge-small-en'.*model(_name)?='BAAI/bge-small-en'"):
            opened(second, tmp_path, other)
    for same in (named(second, "bge-small-en"), ours(second, Named("BAAI/bge-small-en"))):
        opened(second, tmp_path, same).close()
    opened(second, tmp_path, None).close()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_store_of_ours_refuses_another_vendors_model_unless_told_that_it_is_the_same(framework, tmp_path, named):
    fill(framework, tmp_path, ours(framework, Named("minilm")))
    with pytest.raises(IndexMismatch, match=r"'minilm'.*'BAAI/bge-small-en'"):
        opened(framework, tmp_path, named(framework, "BAAI/bge-small-en"))
    opened(framework, tmp_path, named(framework, "sentence-transformers/all-MiniLM-L6-v2")).close()
    told = {"model" if framework == "langchain" else "model_name": "minilm"}
    with opened(framework, tmp_path, named(framework, "my-own-name"), **told) as store:
        assert len(store.index) == 1
        if framework == "llama_index":
            assert TwoStageRetriever(store, named(framework, "my-own-name")).retrieve("a")[0].node_id == "a"


def test_embeddings_that_say_nothing_of_their_model_are_let_in(tmp_path):
    fill("langchain", tmp_path, ours("langchain", Named("model-a")))
    opened("langchain", tmp_path, DeterministicFakeEmbedding(size=64)).close()
    opened("llama_index", tmp_path, MockEmbedding(embed_dim=64)).close()


def test_embeddings_behind_a_cache_are_known(tmp_path):
    def cached(embeddings):
        return CacheBackedEmbeddings(embeddings, InMemoryByteStore())

    fill("langchain", tmp_path, cached(ours("langchain", Named("model-a"))))
    opened("langchain", tmp_path, ours("langchain", Named("model-a"))).close()
    with pytest.raises(IndexMismatch, match="model-b"):
        opened("langchain", tmp_path, cached(ours("langchain", Named("model-b"))))


def test_an_index_that_is_passed_in_is_bound_too():
    index = TwoStageIndex()
    LangChainStore(ours("langchain", Named("model-a")), index=index).add_texts(["a"])
    assert (index.model, index.fingerprint) == ("model-a", "model-a-64")
    with pytest.raises(IndexMismatch, match="model-b"):
        LlamaIndexStore(index=index, embed_model=ours("llama_index", Named("model-b")))
    with pytest.raises(IndexMismatch, match="model-b"):
        TwoStageRetriever(LlamaIndexStore(index=index), ours("llama_index", Named("model-b")))
    assert len(index) == 1


def test_a_dict_of_a_llama_index_store_carries_the_model(tmp_path):
    store = opened("llama_index", tmp_path, ours("llama_index", Named("model-a")))
    assert (store.to_dict()["model_name"], store.to_dict()["fingerprint"]) == ("model-a", "model-a-64")
    store.add([TextNode(text="a", embedding=[1.0] * 64)])
    assert len(LlamaIndexStore.from_dict(store.to_dict()).index) == 1


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_only_an_encoder_is_taken_for_one(framework):
    with pytest.raises(InvalidInput, match=r"must be an mrl_rag\.Encoder"):
        ours(framework, DeterministicFakeEmbedding(size=8))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_only_embeddings_are_taken_for_them(framework, tmp_path):
    with pytest.raises(InvalidInput, match=r"embed\w+ is 7; it must be a"):
        opened(framework, tmp_path, 7)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_encoder_of_ones_own_will_do(framework, tmp_path):
    class Ones(Encoder):
        full_dim, dims, max_length, fingerprint = 64, (64,), None, "ones"

        def _encode(self, texts, task, dim, advance):
            return DeterministicEncoder(64).encode(texts, task, dim)

    fill(framework, tmp_path, ours(framework, Ones()))
    with opened(framework, tmp_path, ours(framework, Ones())) as store:
        assert (store.index.model, store.index.fingerprint) == ("Ones", "ones")


@pytest.mark.parametrize(
    ("first", "second", "one"),
    [
        ("minilm", "sentence-transformers/all-MiniLM-L6-v2", True),
        ("minilm", "all-MiniLM-L6-v2", True),
        ("nomic-embed-text", "nomic-embed-text:latest", True),
        ("text-embedding-004", "models/text-embedding-004", True),
        ("text-embedding-3-small", "text-embedding-3-large", False),
        ("minilm", "bge-small", False),
        ("minilm", "/models/mine", True),
        ("minilm", "http://localhost:8080", True),
        ("minilm", None, True),
        ("", "minilm", True),
    ],
)
def test_names_are_of_one_model_unless_they_are_known_to_differ(first, second, one):
    assert may_be_one_model(first, second) == may_be_one_model(second, first) == one
