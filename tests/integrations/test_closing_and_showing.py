"""Every object of the adapters closes what it opened, and shows what it is."""

import pytest
from chroma_mrl import MatryoshkaEmbeddingFunction
from langchain_mrl import MatryoshkaEmbeddings
from langchain_mrl import MatryoshkaVectorStore as LangChainStore
from langchain_mrl import TwoStageRetriever as LangChainRetriever
from llama_index_mrl import MatryoshkaEmbedding
from llama_index_mrl import MatryoshkaVectorStore as LlamaIndexStore
from llama_index_mrl import TwoStageRetriever as LlamaIndexRetriever

from mrl_rag.errors import EncoderClosed
from mrl_rag.testing import DeterministicEncoder

ENCODER = DeterministicEncoder(32)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize(
    ("make", "embed"),
    [
        (lambda folder: MatryoshkaEmbeddings(model=folder, device="cpu"), lambda made: made.embed_query("a")),
        (lambda folder: MatryoshkaEmbedding(folder, device="cpu"), lambda made: made.get_query_embedding("a")),
        (lambda folder: MatryoshkaEmbeddingFunction(folder, device="cpu"), lambda made: made(["a"])),
    ],
    ids=["langchain", "llama_index", "chroma"],
)
def test_an_encoder_that_was_made_is_closed(make, embed, tiny_bert):
    with make(str(tiny_bert)) as made:
        embed(made)
    with pytest.raises(EncoderClosed):
        embed(made)


@pytest.mark.parametrize("make", [MatryoshkaEmbeddings, MatryoshkaEmbedding, MatryoshkaEmbeddingFunction])
@pytest.mark.usefixtures("default_dtype")
def test_an_encoder_that_was_passed_in_stays_open(make, tiny_bert):
    from mrl_rag import MatryoshkaEncoder

    with MatryoshkaEncoder(tiny_bert, device="cpu") as encoder:
        with make(encoder=encoder):
            pass
        assert encoder.encode(["a"]).shape == (1, 16)


def test_objects_show_what_they_are():
    embeddings = MatryoshkaEmbeddings(encoder=ENCODER, dim=16)
    store = LangChainStore(embeddings)
    store.add_texts(["a"])
    nodes = LlamaIndexStore(index=store.index, model_name="DeterministicEncoder")
    embed_model = MatryoshkaEmbedding(encoder=ENCODER, task="clustering")
    for shown, says in (
        (embeddings, ["MatryoshkaEmbeddings", "DeterministicEncoder", "dim=16"]),
        (embed_model, ["MatryoshkaEmbedding", "DeterministicEncoder", "task='clustering'"]),
        (store, ["MatryoshkaVectorStore", "1 records", "MatryoshkaEmbeddings(DeterministicEncoder)"]),
        (LangChainStore(), ["no embeddings"]),
        (nodes, ["MatryoshkaVectorStore", "1 records", "model_name='DeterministicEncoder'"]),
        (LangChainRetriever(vectorstore=store, k=7), ["TwoStageRetriever", "1 records", "k=7"]),
        (LlamaIndexRetriever(LlamaIndexStore(), embed_model), ["TwoStageRetriever", "0 records", "similarity_top_k=2"]),
        (MatryoshkaEmbeddingFunction(dim=8), ["MatryoshkaEmbeddingFunction", "'minilm'", "dim=8"]),
    ):
        assert all(word in repr(shown) for word in says), repr(shown)
