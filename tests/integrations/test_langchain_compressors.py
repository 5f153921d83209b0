import copy
import logging
import pickle

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_mrl import MatryoshkaReranker, TokenBudget

from mrl_rag.errors import InvalidInput, InvalidPlan

DOCUMENTS = [
    Document(id=str(i), page_content=text, metadata={"i": i})
    for i, text in enumerate(["the sea is calm", "a dog barks", "a cat sleeps", "rain falls"])
]


class Everything(BaseRetriever):
    def _get_relevant_documents(self, query, *, run_manager):
        return [document.model_copy(deep=True) for document in DOCUMENTS]


def ids(documents):
    return [document.id for document in documents]


async def test_the_nearest_come_first_whatever_their_order_was(words):
    reranker = MatryoshkaReranker(embeddings=words, top_n=2)
    found = reranker.compress_documents(DOCUMENTS, "which cat sleeps")
    assert ids(found)[0] == "2"
    assert len(found) == 2
    assert await reranker.acompress_documents(DOCUMENTS, "which cat sleeps") == found
    assert found[0] is DOCUMENTS[2]
    assert ids(MatryoshkaReranker(embeddings=words).compress_documents(DOCUMENTS, "rain"))[0] == "3"
    assert reranker.compress_documents([], "x") == await reranker.acompress_documents([], "x") == []


def test_documents_are_ordered_by_their_cosine_with_the_question(words):
    reranker = MatryoshkaReranker(embeddings=words, add_scores=True)
    scores = [d.metadata["relevance_score"] for d in reranker.compress_documents(DOCUMENTS, "a dog barks")]
    query = words.embed_query("a dog barks")
    cosines = [
        sum(a * b for a, b in zip(query, vector, strict=True))
        for vector in words.embed_documents([d.page_content for d in DOCUMENTS])
    ]
    assert scores == pytest.approx(sorted(cosines, reverse=True), abs=1e-5)
    assert {type(score) for score in scores} == {float}
    assert all(document.metadata == {"i": i} for i, document in enumerate(DOCUMENTS))


async def test_any_embeddings_and_any_retriever(words):
    fake = DeterministicFakeEmbedding(size=16)  # near to itself alone
    for reranker in (MatryoshkaReranker(embeddings=fake, top_n=1), MatryoshkaReranker(embeddings=words, top_n=1)):
        chain = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=Everything())
        assert ids(chain.invoke("a cat sleeps")) == ids(await chain.ainvoke("a cat sleeps")) == ["2"]
    with pytest.raises(InvalidPlan):
        MatryoshkaReranker(embeddings=fake, top_n=0).compress_documents(DOCUMENTS, "x")


async def test_what_fits_is_kept_in_order_and_the_rest_is_reported(caplog):
    budget = TokenBudget(max_tokens=20, reserve=10, encoding=lambda text: len(text.split()), separator="")
    documents = [Document(id=str(n), page_content=" ".join(["w"] * n), metadata={"n": n}) for n in (4, 7, 5, 1, 1)]
    with caplog.at_level(logging.INFO, logger="langchain_mrl"):
        kept = budget.compress_documents(documents, "a question")
    assert [d.metadata["n"] for d in kept] == [4, 5, 1]
    assert "2 of 5 documents left out: 10 tokens of 10" in caplog.text
    assert (budget.fit(documents).left_out, budget.fit(documents).tokens) == ((1, 4), 10)
    assert kept[0] is documents[0]
    assert await budget.acompress_documents(documents, "a question") == kept
    assert budget.compress_documents([], "x") == []


def test_the_first_is_kept_however_long_and_special_tokens_are_text(no_network):
    budget = TokenBudget(max_tokens=5)
    documents = [Document(page_content="<|endoftext|> " * 50), Document(page_content="short")]
    assert budget.compress_documents(documents, "") == documents[:1]
    assert budget.fit(documents).tokens > 100


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 0}, {"max_tokens": 10, "reserve": 10}, {"max_tokens": 9, "encoding": "no-such"}], ids=str
)
def test_a_budget_without_room_is_refused_at_once(fields):
    with pytest.raises(InvalidInput):
        TokenBudget(**fields)


async def test_both_in_a_pipeline(words):
    pipeline = DocumentCompressorPipeline(
        transformers=[
            MatryoshkaReranker(embeddings=words),
            TokenBudget(max_tokens=4, encoding="cl100k_base"),
        ]
    )
    chain = ContextualCompressionRetriever(base_compressor=pipeline, base_retriever=Everything())
    found = chain.invoke("a cat sleeps")
    assert ids(found) == ids(await chain.ainvoke("a cat sleeps")) == ["2"]
    assert found[0].metadata == {"i": 2}


def test_copies_and_pickles(words):
    for compressor in (MatryoshkaReranker(embeddings=words, top_n=1), TokenBudget(max_tokens=4)):
        expected = compressor.compress_documents(DOCUMENTS, "a cat sleeps")
        for again in (copy.deepcopy(compressor), pickle.loads(pickle.dumps(compressor))):
            assert again.compress_documents(DOCUMENTS, "a cat sleeps") == expected
