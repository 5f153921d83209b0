"""Retriever, node postprocessors and ingestion pipelines, in LlamaIndex's own engines."""

import asyncio
import copy
import logging
import uuid

import chromadb
import numpy as np
import pytest
from llama_index.core import Document, Settings, StorageContext, VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index_mrl import (
    MatryoshkaEmbedding,
    MatryoshkaReranker,
    MatryoshkaVectorStore,
    TokenBudget,
    TwoStageRetriever,
)

from mrl_rag import Plan
from mrl_rag.errors import InvalidInput
from mrl_rag.testing import DeterministicEncoder

ENCODER = DeterministicEncoder(64)
EMBED_MODEL = MatryoshkaEmbedding(encoder=ENCODER)
TEXTS = {
    "pad": "numpy pad adds zeros around an array",
    "pool": "a thread pool runs functions",
    "json": "json reads and writes text",
    "many": "threads threads threads",
}


@pytest.fixture
def store():
    store = MatryoshkaVectorStore()
    nodes = [TextNode(id_=id_, text=text, metadata={"secret": "x " * 40}) for id_, text in TEXTS.items()]
    for node in nodes:
        node.excluded_embed_metadata_keys = node.excluded_llm_metadata_keys = ["secret"]
    store.add(EMBED_MODEL(nodes))
    return store


def scored(*ids):
    return [NodeWithScore(node=TextNode(id_=id_, text=TEXTS[id_]), score=0.0) for id_ in ids]


def cosine(text, question):
    return float(ENCODER.encode_documents([text])[0] @ ENCODER.encode_queries([question])[0])


async def test_scores_are_cosines_at_full_dimension_sync_and_async(store):
    retriever = TwoStageRetriever(store, EMBED_MODEL, similarity_top_k=4, plan=Plan(dims=(64, 64), sizes=(4,)))
    found = retriever.retrieve("zeros around an array")
    assert [node.score for node in found] == pytest.approx(
        [cosine(node.text, "zeros around an array") for node in found], abs=1e-3
    )
    assert [n.node_id for n in found] == [n.node_id for n in await retriever.aretrieve("zeros around an array")]
    assert found[0].node_id == "pad"


async def test_a_given_vector_is_used_as_it_is_numpy_or_not(store):
    retriever = TwoStageRetriever(store, MockEmbedding(embed_dim=3), similarity_top_k=1)
    for vector in (ENCODER.encode_queries(["json text"])[0], ENCODER.encode_queries(["json text"])[0].tolist()):
        bundle = QueryBundle("something else")
        bundle.embedding = vector
        assert retriever.retrieve(bundle)[0].node_id == (await retriever.aretrieve(bundle))[0].node_id == "json"


def test_the_settings_embedding_is_the_default(store, monkeypatch):
    monkeypatch.setattr(Settings, "_embed_model", EMBED_MODEL)
    assert TwoStageRetriever(store, similarity_top_k=1).retrieve("thread pool")[0].node_id == "pool"
    assert MatryoshkaReranker().embed_model is EMBED_MODEL


def test_a_copied_retriever_works(store):
    copied = copy.deepcopy(TwoStageRetriever(store, EMBED_MODEL, similarity_top_k=1))
    assert copied.retrieve("thread pool")[0].node_id == "pool"


async def test_each_retrieval_sends_its_events_once(store, events):
    retriever = TwoStageRetriever(store, EMBED_MODEL, similarity_top_k=1)
    once = {"RetrievalStartEvent": 1, "RetrievalEndEvent": 1, "EmbeddingStartEvent": 1, "EmbeddingEndEvent": 1}
    retriever.retrieve("threads")
    assert {name: events[name] for name in once} == once
    events.clear()
    await retriever.aretrieve("threads")
    assert {name: events[name] for name in once} == once


async def test_the_sync_engine_works_in_a_running_event_loop(store):
    engine = RetrieverQueryEngine.from_args(TwoStageRetriever(store, EMBED_MODEL, similarity_top_k=1), llm=MockLLM())
    assert TEXTS["pad"] in str(engine.query("zeros around an array"))
    answers = await asyncio.gather(*(engine.aquery(text) for text in TEXTS.values()))
    assert [answer.source_nodes[0].node_id for answer in answers] == list(TEXTS)


def test_a_cutoff_works_on_the_scores(store):
    retriever = TwoStageRetriever(store, EMBED_MODEL, similarity_top_k=4)
    cutoff = SimilarityPostprocessor(similarity_cutoff=0.5)
    assert [node.node_id for node in cutoff.postprocess_nodes(retriever.retrieve(TEXTS["json"]))] == ["json"]


@pytest.mark.parametrize("embed_model", [EMBED_MODEL, MockEmbedding(embed_dim=4)], ids=["ours", "another"])
async def test_the_reranker_orders_the_nodes_of_any_retriever(embed_model, events):
    reranker = MatryoshkaReranker(embed_model=embed_model, top_n=2)
    nodes = scored("json", "many", "pool", "pad")
    found = reranker.postprocess_nodes(nodes, query_str="a thread pool")
    assert len(found) == 2
    assert embed_model is not EMBED_MODEL or found[0].node_id == "pool"
    assert all(type(node.score) is float for node in found)
    assert found[0].score >= found[1].score
    assert await reranker.apostprocess_nodes(nodes, query_str="a thread pool") == found
    assert [node.score for node in nodes] == [0.0] * 4
    assert (events["ReRankStartEvent"], events["ReRankEndEvent"]) == (2, 2)


def test_the_rerankers_scores_are_the_retrievers(store):
    reranker = MatryoshkaReranker(embed_model=EMBED_MODEL)
    question = QueryBundle("zeros around an array")
    retrieved = TwoStageRetriever(store, EMBED_MODEL, similarity_top_k=4).retrieve(question)
    found = reranker.postprocess_nodes(retrieved[::-1], question)
    assert [node.node_id for node in found] == [node.node_id for node in retrieved]
    assert [n.score for n in found] == pytest.approx([n.score for n in retrieved], abs=1e-3)
    assert reranker.postprocess_nodes([], question) == []
    question.embedding = ENCODER.encode_queries(["json"])[0].tolist()
    assert reranker.postprocess_nodes(found, question)[0].node_id == "json"
    with pytest.raises(InvalidInput, match="question"):
        reranker.postprocess_nodes(found)


def test_the_budget_counts_what_the_language_model_sees(store, caplog):
    nodes = TwoStageRetriever(store, EMBED_MODEL, similarity_top_k=4).retrieve("numpy array")
    budget = TokenBudget(max_tokens=40, reserve=20, encoding="cl100k_base")
    with caplog.at_level(logging.INFO, "llama_index_mrl"):
        kept = budget.postprocess_nodes(nodes)
    packed = budget.fit(nodes)
    assert 0 < len(kept) < 4
    assert kept == [nodes[i] for i in packed.kept]
    assert packed.tokens <= 20
    assert f"{len(kept)} of 4 nodes fit" in caplog.text
    for node in nodes:
        node.node.excluded_llm_metadata_keys = []
    assert budget.postprocess_nodes(nodes) == nodes[:1]


def test_the_budget_takes_special_tokens_as_text_and_any_counter():
    nodes = [NodeWithScore(node=TextNode(text="<|endoftext|>" * 3)), NodeWithScore(node=TextNode(text="b c"))]
    assert TokenBudget(max_tokens=1000).postprocess_nodes(nodes) == nodes
    words = TokenBudget(max_tokens=3, encoding=lambda text: len(text.split()))
    assert words.fit(nodes).tokens == 3
    assert words.postprocess_nodes([]) == []


def test_postprocessors_go_through_a_dict(tmp_path):
    budget = TokenBudget(max_tokens=40, reserve=20)
    assert TokenBudget.from_dict(budget.to_dict()).to_dict() == budget.to_dict()
    assert budget.to_dict()["class_name"] == "TokenBudget"
    reranker = MatryoshkaReranker(embed_model=EMBED_MODEL, top_n=3).to_dict()
    assert (reranker["class_name"], reranker["top_n"]) == ("MatryoshkaReranker", 3)
    assert reranker["embed_model"]["fingerprint"] == ENCODER.fingerprint


def test_an_engine_reranks_and_packs(store):
    index = VectorStoreIndex.from_vector_store(store, embed_model=EMBED_MODEL)
    engine = index.as_query_engine(
        llm=MockLLM(),
        similarity_top_k=4,
        node_postprocessors=[MatryoshkaReranker(embed_model=EMBED_MODEL, top_n=3), TokenBudget(max_tokens=8)],
    )
    response = engine.query("a thread pool runs functions")
    assert [node.node_id for node in response.source_nodes] == ["pool"]


def documents(**texts):
    return [Document(doc_id=id_, text=text) for id_, text in texts.items()]


@pytest.mark.parametrize("run", ["run", "arun"])
async def test_a_pipeline_replaces_what_changed_and_skips_what_did_not(run, tmp_path):
    class Counting(DeterministicEncoder):
        def encode(self, texts, task="document", dim=None, progress=False):
            seen.extend(texts)
            return super().encode(texts, task, dim, progress)

    async def ingest(*docs):
        result = getattr(pipeline, run)(documents=list(docs))
        return await result if run == "arun" else result

    def found(text):
        return store.query(VectorStoreQuery(query_embedding=ENCODER.encode_documents([text])[0].tolist())).nodes[0]

    seen = []
    store = MatryoshkaVectorStore(persist_dir=str(tmp_path))
    pipeline = IngestionPipeline(
        transformations=[
            SentenceSplitter(chunk_size=20, chunk_overlap=0),
            MatryoshkaEmbedding(encoder=Counting(64)),
        ],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )
    long = "One sentence about cats. Another one about dogs. " * 4
    await ingest(*documents(a=long, b="json"))
    chunks = len(store.index)
    assert chunks > 2 and found("json").ref_doc_id == "b"
    seen.clear()
    assert await ingest(*documents(a=long, b="json")) == []
    assert seen == [] and len(store.index) == chunks
    await ingest(*documents(a="now about trees", b="json"))
    assert seen == ["now about trees"]
    assert {node.text for node in store.get_nodes()} == {"now about trees", "json"}
    await ingest(*documents(b="json"))
    assert {node.ref_doc_id for node in store.get_nodes()} == {"b"}


def test_a_pipeline_persisted_and_loaded_still_knows_what_is_in_the_store(tmp_path):
    def pipeline():
        return IngestionPipeline(
            transformations=[EMBED_MODEL],
            vector_store=MatryoshkaVectorStore(persist_dir=str(tmp_path / "db")),
            docstore=SimpleDocumentStore(),
        )

    first = pipeline()
    assert len(first.run(documents=documents(a="cats"))) == 1
    first.persist(str(tmp_path / "pipeline"))
    again = pipeline()
    again.load(str(tmp_path / "pipeline"))
    assert again.run(documents=documents(a="cats")) == []
    assert len(again.vector_store.index) == 1


def test_nothing_needs_a_network(store, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    index = VectorStoreIndex.from_vector_store(store, embed_model=EMBED_MODEL)
    budget = TokenBudget(max_tokens=100)
    engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=2, node_postprocessors=[budget])
    assert np.isfinite([node.score for node in engine.query("numpy").source_nodes]).all()


@pytest.mark.parametrize("store_class", [ChromaVectorStore, MatryoshkaVectorStore])
def test_retrievers_are_fused_by_the_nodes_they_share(store_class):
    nodes = [
        TextNode(id_=id_, text=text, metadata={key: id_ for key in ("source", "author", "title", "page", "lang")})
        for id_, text in TEXTS.items()
    ]
    if store_class is ChromaVectorStore:
        collection = chromadb.EphemeralClient().create_collection(f"fused-{uuid.uuid4().hex}")
        index_store = ChromaVectorStore(chroma_collection=collection)
    else:
        index_store = MatryoshkaVectorStore()
    index = VectorStoreIndex(
        nodes, storage_context=StorageContext.from_defaults(vector_store=index_store), embed_model=EMBED_MODEL
    )
    pair = [index.as_retriever(similarity_top_k=3) for _ in range(2)]
    fusion = QueryFusionRetriever(
        pair, llm=MockLLM(), mode="reciprocal_rerank", num_queries=1, similarity_top_k=3, use_async=False
    )
    nearest = [node.node_id for node in pair[0].retrieve("threads")]
    assert len(set(nearest)) == 3
    for _ in range(5):
        assert [node.node_id for node in fusion.retrieve("threads")] == nearest
