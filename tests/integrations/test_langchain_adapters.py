import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaVectorStore, TwoStageRetriever

from mrl_rag import Plan
from mrl_rag.errors import IndexMismatch, InvalidDimension, InvalidInput, InvalidTexts, UnknownModel

TEXTS = ["numpy.pad adds zeros around an array", "a thread pool runs functions", "json reads and writes text"]


@pytest.fixture
def embeddings(minilm):
    return MatryoshkaEmbeddings(encoder=minilm)


@pytest.fixture
def store(embeddings):
    return MatryoshkaVectorStore.from_texts(
        TEXTS, embeddings, [{"page": i, "odd": i % 2 == 1} for i in range(3)], ids=["a", "b", "c"]
    )


def test_embeddings_are_the_encoders(embeddings, minilm):
    np.testing.assert_allclose(embeddings.embed_query("a"), minilm.encode_queries(["a"])[0], atol=1e-6)
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), minilm.encode_documents(TEXTS), atol=1e-6)
    assert all(type(number) is float for number in embeddings.embed_query("a"))
    assert len(MatryoshkaEmbeddings(encoder=minilm, dim=64).embed_query("a")) == 64


@pytest.mark.usefixtures("default_dtype")
def test_queries_and_documents_get_their_own_prompts(tiny_bert):
    embeddings = MatryoshkaEmbeddings(model=str(tiny_bert), device="cpu", prompts={"query": "query: "})
    assert embeddings.embed_query("a text") == embeddings.embed_documents(["query: a text"])[0]
    assert embeddings.embed_query("a text") != embeddings.embed_documents(["a text"])[0]


@pytest.mark.usefixtures("default_dtype")
def test_a_task_serves_queries_and_documents_alike(tiny_bert):
    prompts = {"query": "query: ", "classification": "classification: "}
    model = MatryoshkaEmbeddings(model=str(tiny_bert), device="cpu", prompts=prompts, task="classification")
    plain = MatryoshkaEmbeddings(model=str(tiny_bert), device="cpu")
    assert (
        model.embed_query("a text")
        == model.embed_documents(["a text"])[0]
        == plain.embed_documents(["classification: a text"])[0]
    )


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (InvalidDimension, {"dim": 385, "dtype": "float32"}),
        (UnknownModel, {"model": "nobody/nothing", "local_files_only": True}),
    ],
)
def test_bad_settings_are_refused_at_once(error, arguments):
    with pytest.raises(error):
        MatryoshkaEmbeddings(**arguments)
    with pytest.raises(ValueError, match="dimension"):
        MatryoshkaEmbeddings(dimension=64)


def test_a_text_that_is_no_string_is_refused(store):
    with pytest.raises(InvalidTexts):
        store.similarity_search(None)
    with pytest.raises(InvalidTexts):
        store.add_texts(["a", None])


def test_documents_come_back_with_their_ids_and_nothing_added(store):
    found = store.similarity_search("how do I pad an array with zeros?", k=1)
    assert found == [Document(id="a", page_content=TEXTS[0], metadata={"page": 0, "odd": False})]


def test_scores_are_cosines_and_relevance_is_between_0_and_1(store, minilm):
    scored = store.similarity_search_with_score("threads", k=3)
    expected = minilm.encode_documents([d.page_content for d, _ in scored]) @ minilm.encode_queries(["threads"])[0]
    np.testing.assert_allclose([score for _, score in scored], expected, atol=1e-3)
    assert [s for _, s in scored] == sorted((s for _, s in scored), reverse=True)
    relevance = store.similarity_search_with_relevance_scores("threads", k=3)
    assert all(0 <= score <= 1 for _, score in relevance)
    assert store.similarity_search_with_relevance_scores("threads", k=3, score_threshold=0.99) == []


def test_filters_as_plain_dicts_and_in_chromas_language(store):
    def ids(**search):
        return {document.id for document in store.similarity_search("text", k=3, **search)}

    assert ids(filter={"odd": False}) == {"a", "c"}
    assert ids(filter={"odd": False, "page": 2}) == {"c"}
    assert ids(filter={"page": {"$gte": 1}}) == {"b", "c"}
    assert ids(where_document={"$contains": "thread"}) == {"b"}
    assert ids(filter={}) == {"a", "b", "c"}


def test_mmr_prefers_what_differs(embeddings):
    store = MatryoshkaVectorStore.from_texts(["a thread pool"] * 3 + ["numpy arrays"], embeddings, ids=list("abcd"))
    assert {d.id for d in store.similarity_search("a thread pool", k=2)} == {"a", "b"}
    assert {d.id for d in store.max_marginal_relevance_search("a thread pool", k=2, lambda_mult=0.1)} == {"a", "d"}


def test_every_kind_of_retriever_a_store_makes(store):
    for kind, search in (("similarity", {}), ("mmr", {}), ("similarity_score_threshold", {"score_threshold": 0.0})):
        found = store.as_retriever(search_type=kind, search_kwargs={"k": 2, **search}).invoke("an array of zeros")
        assert found[0].id == "a"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"top_k": 3}, "'top_k'.* k,"),
        ({"plan": 100}, "plan is 100"),
        ({"vectorstore": MatryoshkaEmbeddings}, "must be a MatryoshkaVectorStore"),
    ],
    ids=str,
)
def test_a_retriever_refuses_wrong_arguments_when_it_is_made(store, wrong, said):
    with pytest.raises(InvalidInput, match=said):
        TwoStageRetriever(**({"vectorstore": store} | wrong))


def test_k_is_langchains_default_unless_it_is_given(embeddings):
    store = MatryoshkaVectorStore.from_texts([f"text {i}" for i in range(12)], embeddings)
    found = TwoStageRetriever(vectorstore=store).invoke("text")
    assert len(found) == len(store.similarity_search("text")) == len(store.as_retriever().invoke("text")) == 4


def test_the_retrievers_fields_can_be_overridden_for_one_call(store):
    retriever = TwoStageRetriever(vectorstore=store, k=3, plan=Plan(dims=(96, 384), sizes=(3,)))
    assert len(retriever.invoke("text")) == 3
    assert len(retriever.invoke("text", k=1)) == 1
    assert [d.id for d in retriever.invoke("text", filter={"page": 1})] == ["b"]
    narrow = TwoStageRetriever(vectorstore=store, k=3, filter={"page": 1}, score_threshold=0.99)
    assert narrow.invoke("text") == []
    assert len(narrow.invoke("text", score_threshold=None)) == 1
    assert len(narrow.invoke("text", score_threshold=None, filter=None)) == 3


async def test_the_async_retriever_takes_the_same_overrides(store):
    retriever = TwoStageRetriever(vectorstore=store, k=3)
    assert [d.id for d in await retriever.ainvoke("text", k=1, filter={"page": 1})] == ["b"]


def test_a_chain_answers_from_the_retrieved_text(store):
    prompt = ChatPromptTemplate.from_template("{context}\n{question}")
    seen = []

    def remember(value):
        seen.append(value.to_string())
        return value

    chain = (
        {
            "context": TwoStageRetriever(vectorstore=store, k=1) | (lambda docs: docs[0].page_content),
            "question": RunnablePassthrough(),
        }
        | prompt
        | remember
        | FakeListChatModel(responses=["numpy.pad"])
        | StrOutputParser()
    )
    assert chain.invoke("how do I pad an array?") == "numpy.pad"
    assert TEXTS[0] in seen[0]


def test_delete_by_id_filter_and_start_over(store):
    store.delete(["a", "nobody"])
    assert [d.id for d in store.get_by_ids(["c", "a", "b"])] == ["c", "b"]
    store.delete(filter={"page": 1})
    assert [d.id for d in store.get_by_ids(["c", "b"])] == ["c"]
    store.reset_collection()
    assert len(store.index) == 0


def test_documents_with_some_ids_missing_get_new_ones(embeddings):
    store = MatryoshkaVectorStore(embeddings)
    ids = store.add_documents([Document(id="kept", page_content="a"), Document(page_content="b")])
    assert ids[0] == "kept"
    assert [d.page_content for d in store.get_by_ids(ids)] == ["a", "b"]
    assert store.add_texts([]) == []


def test_a_store_opened_again_finds_what_was_stored(embeddings, tmp_path):
    MatryoshkaVectorStore.from_documents(
        [Document(page_content=text) for text in TEXTS], embeddings, persist_directory=str(tmp_path), shortlist_dim=32
    )
    again = MatryoshkaVectorStore(embeddings, persist_directory=str(tmp_path))
    assert again.index.shortlist_dim == 32
    assert again.similarity_search("threads", k=1)[0].page_content == TEXTS[1]


@pytest.mark.usefixtures("default_dtype")
def test_a_store_of_another_model_is_refused(embeddings, tiny_bert, tmp_path):
    MatryoshkaVectorStore.from_texts(TEXTS, embeddings, persist_directory=str(tmp_path))
    with pytest.raises(IndexMismatch):
        MatryoshkaVectorStore(MatryoshkaEmbeddings(model=str(tiny_bert), device="cpu"), persist_directory=str(tmp_path))


def test_any_embeddings_of_langchain_will_do():
    fake = DeterministicFakeEmbedding(size=100)
    store = MatryoshkaVectorStore.from_texts(TEXTS, fake)
    assert (store.index.full_dim, store.index.shortlist_dim) == (100, 64)
    assert store.similarity_search(TEXTS[2], k=1)[0].page_content == TEXTS[2]
