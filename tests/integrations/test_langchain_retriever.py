import asyncio
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever, ParentDocumentRetriever
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.load import dumpd
from langchain_core.runnables import RunnableLambda
from langchain_core.stores import InMemoryStore
from langchain_core.tools import create_retriever_tool
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaReranker, MatryoshkaVectorStore, TwoStageRetriever
from langchain_text_splitters import CharacterTextSplitter

from mrl_rag import Plan
from mrl_rag.errors import InvalidInput, InvalidPlan, InvalidTexts
from mrl_rag.testing import DeterministicEncoder

TEXTS = ["a cat sleeps", "a dog barks", "the sea is calm", "rain falls on the sea"]
QUESTIONS = ["a sleeping cat", "which dog barks", "the calm sea"]


class Counting(DeterministicEncoder):
    calls = 0

    def encode(self, texts, *args, **kwargs):
        self.calls += 1
        return super().encode(texts, *args, **kwargs)


class Trace(BaseCallbackHandler):
    def __init__(self):
        self.started, self.ended, self.failed = [], [], []

    def on_retriever_start(self, serialized, query, *, run_id, parent_run_id=None, tags=None, metadata=None, **more):
        self.started.append((run_id, query, parent_run_id, tags, metadata, more.get("name")))

    def on_retriever_end(self, documents, *, run_id, **more):
        self.ended.append((run_id, documents))

    def on_retriever_error(self, error, *, run_id, **more):
        self.failed.append((run_id, type(error)))


class AsyncTrace(AsyncCallbackHandler, Trace):
    async def on_retriever_start(self, *args, **kwargs):
        Trace.on_retriever_start(self, *args, **kwargs)

    async def on_retriever_end(self, *args, **kwargs):
        Trace.on_retriever_end(self, *args, **kwargs)

    async def on_retriever_error(self, *args, **kwargs):
        Trace.on_retriever_error(self, *args, **kwargs)


@pytest.fixture
def store():
    embeddings = MatryoshkaEmbeddings(encoder=Counting(64))
    metadatas = [{"page": i} for i in range(4)]
    return MatryoshkaVectorStore.from_texts(TEXTS, embeddings, metadatas, ids=list("abcd"), shortlist_dim=16)


@pytest.fixture
def retriever(store):
    return TwoStageRetriever(vectorstore=store, k=2)


def ids(documents):
    return [document.id for document in documents]


OVERRIDES = [
    ({"k": 1}, "c"),
    ({"k": 4, "filter": {"page": {"$lt": 2}}}, "ab"),
    ({"k": 4, "where_document": {"$contains": "dog"}}, "b"),
    ({"k": 4, "score_threshold": 0.8}, "c"),
    ({"k": 4, "plan": Plan(dims=(16, 64), sizes=(4,))}, "abcd"),
    ({"filter": {}}, "cd"),
]


@pytest.mark.parametrize(("overrides", "found"), OVERRIDES, ids=str)
async def test_every_field_can_be_overridden_for_one_call(retriever, overrides, found):
    question = "the sea is calm"
    answers = [
        retriever.invoke(question, **overrides),
        await retriever.ainvoke(question, **overrides),
        *retriever.batch([question, question], **overrides),
        *await retriever.abatch([question], **overrides),
        retriever.bind(**overrides).invoke(question),
        TwoStageRetriever(vectorstore=retriever.vectorstore, **({"k": 2} | overrides)).invoke(question),
    ]
    assert {"".join(sorted(ids(answer))) for answer in answers} == {found}
    assert retriever.k == 2


async def test_an_unknown_or_impossible_override_is_refused(retriever):
    for wrong, error in (
        ({"kk": 3}, InvalidInput),
        ({"k": 0}, InvalidPlan),
        ({"plan": Plan((8, 64), (9,))}, InvalidPlan),
    ):
        with pytest.raises(error):
            retriever.invoke("a", **wrong)
        with pytest.raises(error):
            await retriever.ainvoke("a", **wrong)
        with pytest.raises(error):
            retriever.batch(["a", "b"], **wrong)


async def test_a_batch_is_one_pass_and_one_search(retriever, monkeypatch):
    searches = []
    search = retriever.vectorstore.index.search
    monkeypatch.setattr(
        retriever.vectorstore.index, "search", lambda *args, **more: searches.append(1) or search(*args, **more)
    )
    alone = [retriever.invoke(question) for question in QUESTIONS]
    encoder = retriever.vectorstore.embeddings.encoder
    encoder.calls, searches[:] = 0, []
    assert retriever.batch(QUESTIONS) == alone
    assert (encoder.calls, len(searches)) == (1, 1)
    assert await retriever.abatch(QUESTIONS) == alone
    assert (encoder.calls, len(searches)) == (2, 2)
    assert retriever.batch([]) == await retriever.abatch([]) == []


def test_a_batch_over_any_other_embeddings(monkeypatch):
    store = MatryoshkaVectorStore.from_texts(TEXTS, DeterministicFakeEmbedding(size=32), ids=list("abcd"))
    found = TwoStageRetriever(vectorstore=store, k=1).batch(TEXTS)
    assert [documents[0].id for documents in found] == list("abcd")


async def test_a_batch_in_the_first_step_of_a_chain_is_one_pass_too(retriever):
    chain = retriever | RunnableLambda(lambda documents: documents[0].id)
    encoder = retriever.vectorstore.embeddings.encoder
    encoder.calls = 0
    assert chain.batch(QUESTIONS) == list("abc")
    assert await chain.abatch(QUESTIONS) == list("abc")
    assert encoder.calls == 2


@pytest.mark.parametrize("trace_class", [Trace, AsyncTrace])
async def test_callbacks_see_one_run_per_question(retriever, trace_class):
    for asynchronous in (False, True) if trace_class is Trace else (True,):
        trace = trace_class()
        config = {"callbacks": [trace], "tags": ["mine"], "metadata": {"user": 7}, "run_name": "search"}
        found = await retriever.abatch(QUESTIONS, config) if asynchronous else retriever.batch(QUESTIONS, config)
        question_of = {run: query for run, query, *_ in trace.started}
        assert sorted(question_of.values()) == sorted(QUESTIONS)
        ended = {question_of[run]: documents for run, documents in trace.ended}
        assert ended == dict(zip(QUESTIONS, found, strict=True))
        assert not trace.failed
        for _, _, parent, tags, metadata, name in trace.started:
            assert (parent, tags, name) == (None, ["mine"], "search")
            assert metadata["user"] == 7


async def test_a_batch_is_traced_as_a_call_is(retriever):
    retriever.tags, retriever.metadata = ["own"], {"team": "docs"}
    traces = [Trace() for _ in range(4)]
    retriever.invoke("a", {"callbacks": [traces[0]]})
    await retriever.ainvoke("a", {"callbacks": [traces[1]]})
    retriever.batch(["a"], {"callbacks": [traces[2]]})
    await retriever.abatch(["a"], {"callbacks": [traces[3]]})
    assert {str(trace.started[0][2:]) for trace in traces} == {str(traces[0].started[0][2:])}
    metadata = traces[2].started[0][4]
    assert metadata["ls_retriever_name"] == "twostage"
    assert metadata["team"] == "docs"


def test_a_config_per_question_and_runs_under_their_chain(retriever):
    trace = Trace()
    retriever.batch(QUESTIONS, [{"callbacks": [trace], "tags": [question]} for question in QUESTIONS])
    assert {query: tags for _, query, _, tags, *_ in trace.started} == {question: [question] for question in QUESTIONS}
    trace = Trace()
    (retriever | RunnableLambda(len)).batch(QUESTIONS, {"callbacks": [trace]})
    assert len({parent for _, _, parent, *_ in trace.started} - {None}) == 3
    with pytest.raises(ValueError, match="same length"):
        retriever.batch(QUESTIONS, [{}])


async def test_one_bad_question_does_not_spoil_the_others(retriever):
    questions = ["a cat sleeps", None, "the sea is calm"]
    for asynchronous in (False, True):
        trace = Trace()
        config = {"callbacks": [trace]}
        with pytest.raises(InvalidTexts):
            await retriever.abatch(questions, config) if asynchronous else retriever.batch(questions, config)
        assert [error for _, error in trace.failed] == [InvalidTexts]
        trace = Trace()
        config = {"callbacks": [trace]}
        if asynchronous:
            found = await retriever.abatch(questions, config, return_exceptions=True)
        else:
            found = retriever.batch(questions, config, return_exceptions=True)
        assert ids(found[0])[0] == "a" and isinstance(found[1], InvalidTexts) and ids(found[2])[0] == "c"
        assert (len(trace.started), len(trace.ended), len(trace.failed)) == (3, 2, 1)


async def test_scores_are_added_only_when_asked_for_and_to_copies(retriever):
    assert retriever.invoke("the sea is calm")[0].metadata == {"page": 2}
    for found in (
        retriever.invoke("the sea is calm", add_scores=True),
        await retriever.ainvoke("the sea is calm", add_scores=True),
        TwoStageRetriever(vectorstore=retriever.vectorstore, k=2, add_scores=True).batch(["the sea is calm"])[0],
    ):
        scored = retriever.vectorstore.similarity_search_with_score("the sea is calm", k=2)
        for rank, (document, (_, score)) in enumerate(zip(found, scored, strict=True), start=1):
            assert document.metadata["relevance_score"] == pytest.approx(score)
            # Of so few records all are ranked, in one stage.
            assert document.metadata["stage_ranks"] == [rank]
            assert type(document.metadata["relevance_score"]) is float
    index = retriever.vectorstore.index
    plan = Plan(dims=(index.shortlist_dim, index.full_dim), sizes=(50,))
    (first, *_) = retriever.invoke("the sea is calm", add_scores=True, plan=plan)
    assert first.metadata["stage_ranks"] == [1, 1]
    assert retriever.invoke("the sea is calm")[0].metadata == {"page": 2}
    assert retriever.vectorstore.get_by_ids(["c"])[0].metadata == {"page": 2}


def test_32_threads_and_many_coroutines_get_what_one_gets(retriever):
    expected = {question: retriever.invoke(question) for question in QUESTIONS}
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(retriever.invoke, QUESTIONS * 20))
    assert found == [expected[question] for question in QUESTIONS * 20]

    async def all_at_once():
        return await asyncio.gather(*(retriever.ainvoke(question) for question in QUESTIONS * 20))

    assert asyncio.run(all_at_once()) == found


async def test_it_works_inside_a_running_loop_sync_and_async(retriever):
    assert retriever.invoke("a cat sleeps") == await retriever.ainvoke("a cat sleeps")
    assert [chunk async for chunk in retriever.astream("a cat sleeps")] == [retriever.invoke("a cat sleeps")]


def test_copies_pickles_and_serialisation(words, tmp_path):
    store = MatryoshkaVectorStore.from_texts(TEXTS, words, persist_directory=str(tmp_path))
    retriever = TwoStageRetriever(vectorstore=store, k=1, plan=Plan(dims=(64, 64), sizes=(4,)), filter={})
    for again in (copy.copy(retriever), copy.deepcopy(retriever), pickle.loads(pickle.dumps(retriever))):
        assert again.invoke("a dog barks")[0].page_content == "a dog barks"
        assert again.plan == retriever.plan
    assert dumpd(retriever)["id"][-1] == "TwoStageRetriever"


def test_langchains_own_retrievers_take_it(retriever, words):
    tool = create_retriever_tool(retriever, "search", "Searches.")
    assert tool.invoke({"query": "the calm sea"}).startswith("the sea is calm")
    both = EnsembleRetriever(retrievers=[retriever, retriever.vectorstore.as_retriever(search_type="mmr")])
    assert both.invoke("the calm sea")[0].id == "c"
    reranked = ContextualCompressionRetriever(
        base_compressor=MatryoshkaReranker(embeddings=words, top_n=1), base_retriever=retriever
    )
    assert ids(reranked.invoke("the calm sea")) == ["c"]
    parents = ParentDocumentRetriever(
        vectorstore=MatryoshkaVectorStore(words),
        docstore=InMemoryStore(),
        child_splitter=CharacterTextSplitter(separator=" ", chunk_size=8, chunk_overlap=0),
    )
    parents.add_documents(retriever.vectorstore.get_by_ids(["a", "c"]), ids=["a", "c"])
    assert parents.invoke("sea")[0].page_content == "the sea is calm"
