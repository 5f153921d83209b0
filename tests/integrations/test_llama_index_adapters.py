import numpy as np
import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeRelationship, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index_mrl import MatryoshkaEmbedding, MatryoshkaVectorStore, TwoStageRetriever

from mrl_rag import Plan
from mrl_rag.errors import IndexMismatch, InvalidDimension, InvalidInput, UnknownModel

TEXTS = ["numpy.pad adds zeros around an array", "a thread pool runs functions", "json reads and writes text"]


@pytest.fixture
def embed_model(minilm):
    return MatryoshkaEmbedding(encoder=minilm)


@pytest.fixture
def nodes(embed_model):
    vectors = embed_model.get_text_embedding_batch(TEXTS)
    return [
        TextNode(
            id_=id_,
            text=text,
            embedding=vector,
            metadata={"page": page, "odd": page % 2 == 1, "name": id_},
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"doc-{id_}")},
        )
        for page, (id_, text, vector) in enumerate(zip("abc", TEXTS, vectors, strict=True))
    ]


@pytest.fixture(params=["memory", "folder"])
def store(request, nodes, tmp_path):
    store = MatryoshkaVectorStore(persist_dir=str(tmp_path) if request.param == "folder" else None)
    assert store.add(nodes) == ["a", "b", "c"]
    return store


def ask(embed_model, text="text", k=3, **arguments):
    return VectorStoreQuery(query_embedding=embed_model.get_query_embedding(text), similarity_top_k=k, **arguments)


def where(*filters, condition=FilterCondition.AND):
    return MetadataFilters(
        filters=[
            f if isinstance(f, MetadataFilters) else MetadataFilter(key=f[0], operator=f[1], value=f[2])
            for f in filters
        ],
        condition=condition,
    )


def test_embeddings_are_the_encoders(embed_model, minilm):
    np.testing.assert_allclose(embed_model.get_query_embedding("a"), minilm.encode_queries(["a"])[0], atol=1e-6)
    np.testing.assert_allclose(embed_model.get_text_embedding_batch(TEXTS), minilm.encode_documents(TEXTS), atol=1e-6)
    assert embed_model.get_text_embedding(TEXTS[0]) == pytest.approx(minilm.encode_documents(TEXTS[:1])[0].tolist())
    assert len(MatryoshkaEmbedding(encoder=minilm, dim=64).get_query_embedding("a")) == 64


async def test_async_embeddings_are_the_same(embed_model):
    assert await embed_model.aget_query_embedding("a") == embed_model.get_query_embedding("a")
    np.testing.assert_allclose(
        await embed_model.aget_text_embedding_batch(TEXTS), embed_model.get_text_embedding_batch(TEXTS), atol=1e-6
    )


@pytest.mark.usefixtures("default_dtype")
def test_queries_and_documents_get_their_own_prompts(tiny_bert):
    model = MatryoshkaEmbedding(model_name=str(tiny_bert), device="cpu", prompts={"query": "query: "})
    assert model.get_query_embedding("a text") == model.get_text_embedding("query: a text")
    assert model.get_query_embedding("a text") != model.get_text_embedding("a text")


@pytest.mark.usefixtures("default_dtype")
def test_a_task_serves_queries_and_documents_alike(tiny_bert):
    prompts = {"query": "query: ", "classification": "classification: "}
    model = MatryoshkaEmbedding(model_name=str(tiny_bert), device="cpu", prompts=prompts, task="classification")
    plain = MatryoshkaEmbedding(model_name=str(tiny_bert), device="cpu")
    assert (
        model.get_query_embedding("a text")
        == model.get_text_embedding("a text")
        == plain.get_text_embedding("classification: a text")
    )


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (InvalidDimension, {"dim": 0, "dtype": "float32"}),
        (UnknownModel, {"model_name": "nobody/nothing", "local_files_only": True}),
        (InvalidInput, {"dimension": 64}),
        (InvalidInput, {"model_name": object()}),
    ],
)
def test_bad_settings_are_refused_at_once(error, arguments):
    with pytest.raises(error):
        MatryoshkaEmbedding(**arguments)


def test_the_models_name_comes_first():
    with pytest.raises(UnknownModel, match="nomic-v15"):
        MatryoshkaEmbedding("nomic-v15", local_files_only=True)


@pytest.mark.parametrize("setting", [{"model_name": "minilm"}, {"max_length": 8}, {"dtype": "float32"}])
def test_settings_of_an_encoder_that_exists_are_refused(minilm, setting):
    with pytest.raises(InvalidInput, match=next(iter(setting))):
        MatryoshkaEmbedding(encoder=minilm, **setting)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"top_k": 3}, "'top_k'.* similarity_top_k"),
        ({"plan": 100}, "plan is 100"),
        ({"embed_model": "minilm"}, "embed_model is 'minilm'"),
        ({"vector_store": None}, "must be a MatryoshkaVectorStore"),
    ],
    ids=str,
)
def test_a_retriever_refuses_wrong_arguments_when_it_is_made(embed_model, wrong, said):
    with pytest.raises(InvalidInput, match=said):
        TwoStageRetriever(**({"vector_store": MatryoshkaVectorStore(), "embed_model": embed_model} | wrong))
    with pytest.raises(InvalidInput, match="vector_store is MatryoshkaEmbedding"):
        TwoStageRetriever(embed_model, MatryoshkaVectorStore())


def test_k_is_llama_indexs_default_unless_it_is_given(store, embed_model):
    found = TwoStageRetriever(store, embed_model).retrieve("text")
    index = VectorStoreIndex.from_vector_store(store, embed_model=embed_model)
    assert len(found) == len(index.as_retriever().retrieve("text")) == 2


def test_a_node_comes_back_as_it_was(store, nodes, embed_model):
    result = store.query(ask(embed_model, "how do I pad an array with zeros?", k=1))
    node = result.nodes[0]
    assert result.ids == ["a"]
    assert (node.node_id, node.text, node.metadata, node.ref_doc_id) == ("a", TEXTS[0], nodes[0].metadata, "doc-a")
    expected = np.dot(nodes[0].embedding, embed_model.get_query_embedding("how do I pad an array with zeros?"))
    assert result.similarities[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (where(("page", "==", 1)), "b"),
        (where(("page", "!=", 1)), "ac"),
        (where(("page", ">", 0), ("page", "<", 2)), "b"),
        (where(("page", ">=", 1)), "bc"),
        (where(("page", "<=", 1)), "ab"),
        (where(("name", "in", ["a", "c"])), "ac"),
        (where(("name", "nin", ["a", "c"])), "b"),
        (where(("page", "==", 0), ("page", "==", 2), condition=FilterCondition.OR), "ac"),
        (where(where(("page", "==", 0), ("page", "==", 1), condition=FilterCondition.OR), ("name", "==", "b")), "b"),
        (where(), "abc"),
    ],
)
def test_metadata_filters(store, embed_model, filters, expected):
    assert set(store.query(ask(embed_model, filters=filters)).ids) == set(expected)
    assert {node.node_id for node in store.get_nodes(filters=filters)} == set(expected)


def test_doc_ids_restrict_a_query(store, embed_model):
    assert set(store.query(ask(embed_model, doc_ids=["doc-a", "doc-b"])).ids) == {"a", "b"}
    assert store.query(ask(embed_model, doc_ids=["doc-a", "doc-b"], filters=where(("page", "==", 1)))).ids == ["b"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"filters": where(("page", "in", 1))},
        {"filters": where(("page", "any", "a"))},
        {"filters": where(("page", "==", None))},
        {"filters": where(("page", ">", None))},
        {"filters": where(("page", "contains", ["a"]))},
        {"filters": where(("page", "text_match", 1))},
        {"mode": VectorStoreQueryMode.HYBRID},
        {"mode": "hybrid"},
        {"k": 0},
        {"k": None},
    ],
)
def test_what_the_store_cannot_do_is_refused_and_not_ignored(store, embed_model, arguments):
    with pytest.raises(InvalidInput):
        store.query(ask(embed_model, **arguments))
    with pytest.raises(InvalidInput, match="no embedding"):
        store.query(VectorStoreQuery(query_str="text"))


def test_mmr_prefers_what_differs_and_scores_stay_cosines(embed_model):
    texts = ["a thread pool"] * 3 + ["numpy arrays"]
    vectors = embed_model.get_text_embedding_batch(texts)
    store = MatryoshkaVectorStore()
    store.add([TextNode(id_=i, text=t, embedding=v) for i, t, v in zip("abcd", texts, vectors, strict=True)])
    query = ask(embed_model, "a thread pool", k=2)
    assert store.query(query).ids == ["a", "b"]
    query.mode, query.mmr_threshold = VectorStoreQueryMode.MMR, 0.1
    result = store.query(query)
    assert set(result.ids) == {"a", "d"}
    assert result.similarities == pytest.approx(
        [np.dot(query.query_embedding, vectors["abcd".index(i)]) for i in result.ids], abs=1e-3
    )


def test_delete_by_document_by_node_by_filter_and_everything(store):
    store.delete("doc-a")
    assert [n.node_id for n in store.get_nodes()] == ["b", "c"]
    store.delete_nodes(["b", "nobody"])
    assert [n.node_id for n in store.get_nodes()] == ["c"]
    store.delete_nodes(filters=where(("page", "==", 0)))
    assert [n.node_id for n in store.get_nodes(["c", "a"])] == ["c"]
    store.clear()
    assert store.get_nodes() == []


async def test_the_async_surface(nodes, embed_model):
    store = MatryoshkaVectorStore()
    assert await store.async_add(nodes) == ["a", "b", "c"]
    assert (await store.aquery(ask(embed_model, "threads", k=1))).ids == ["b"]
    assert [n.node_id for n in await store.aget_nodes(["a"])] == ["a"]
    await store.adelete("doc-a")
    await store.adelete_nodes(["b"])
    assert [n.node_id for n in await store.aget_nodes()] == ["c"]
    await store.aclear()
    assert await store.aget_nodes() == []


@pytest.fixture
def vector_index(store, embed_model):
    return VectorStoreIndex.from_vector_store(store, embed_model=embed_model)


def test_an_index_over_a_filled_store_retrieves(vector_index):
    found = vector_index.as_retriever(similarity_top_k=2).retrieve("run functions in threads")
    assert found[0].node.node_id == "b"
    assert found[0].score > found[1].score


def test_a_query_engine_answers_from_the_retrieved_text(vector_index):
    response = vector_index.as_query_engine(llm=MockLLM(), similarity_top_k=1).query("how do I pad an array?")
    assert [source.node.text for source in response.source_nodes] == [TEXTS[0]]
    assert TEXTS[0] in str(response)


async def test_an_async_query_engine_answers(vector_index):
    response = await vector_index.as_query_engine(llm=MockLLM(), similarity_top_k=1).aquery("how do I pad an array?")
    assert [source.node.text for source in response.source_nodes] == [TEXTS[0]]


def test_an_index_is_filled_from_documents_and_a_document_can_go(embed_model, tmp_path):
    store = MatryoshkaVectorStore(persist_dir=str(tmp_path))
    documents = [Document(doc_id=f"doc-{i}", text=f"{text}. " * 40) for i, text in enumerate(TEXTS)]
    index = VectorStoreIndex.from_documents(
        documents,
        storage_context=StorageContext.from_defaults(vector_store=store),
        transformations=[SentenceSplitter(chunk_size=100, chunk_overlap=0)],
        embed_model=embed_model,
    )
    assert len(store.index) > 3
    index.delete_ref_doc("doc-1")
    again = MatryoshkaVectorStore(persist_dir=str(tmp_path))
    assert {node.ref_doc_id for node in again.get_nodes()} == {"doc-0", "doc-2"}


def test_the_two_stage_retriever(store, embed_model):
    retriever = TwoStageRetriever(
        store,
        embed_model,
        similarity_top_k=2,
        plan=Plan(dims=(96, 384), sizes=(3,)),
        filters=where(("page", ">", 0)),
    )
    assert [found.node.node_id for found in retriever.retrieve("threads")] == ["b", "c"]
    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM())
    assert TEXTS[1] in str(engine.query("threads"))


async def test_the_two_stage_retriever_async_and_with_a_given_vector(store, embed_model):
    retriever = TwoStageRetriever(store, embed_model, similarity_top_k=1)
    assert [found.node.node_id for found in await retriever.aretrieve("threads")] == ["b"]
    given = QueryBundle("threads", embedding=embed_model.get_query_embedding("an array of zeros"))
    assert [found.node.node_id for found in retriever.retrieve(given)] == ["a"]


def test_a_store_of_another_model_or_dimension_is_refused(nodes, tmp_path, minilm):
    MatryoshkaVectorStore(persist_dir=str(tmp_path), fingerprint=minilm.fingerprint).add(nodes)
    for other in ({"fingerprint": "another"}, {"full_dim": 64}, {"shortlist_dim": 32}):
        with pytest.raises(IndexMismatch):
            MatryoshkaVectorStore(persist_dir=str(tmp_path), **other)
