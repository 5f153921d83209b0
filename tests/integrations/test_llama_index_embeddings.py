"""`MatryoshkaEmbedding` in what LlamaIndex does with embedding models: caches, batches, copies, events."""

import asyncio
import copy
import pickle
import subprocess
import sys
import threading

import pytest
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index_mrl import MatryoshkaEmbedding

from mrl_rag import CachedEncoder
from mrl_rag.errors import IndexMismatch, InvalidInput
from mrl_rag.testing import DeterministicEncoder


class Watched(DeterministicEncoder):
    """Counts what it is asked, and how many ask at once."""

    def __init__(self, full_dim=32):
        super().__init__(full_dim)
        self.calls, self.now, self.most, self.lock = [], 0, 0, threading.Lock()

    def encode(self, texts, task="document", dim=None, progress=False):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.calls.append((task, list(texts)))
        vectors = super().encode(texts, task, dim, progress)
        threading.Event().wait(0.01)
        with self.lock:
            self.now -= 1
        return vectors


def numbers(vector):
    return all(type(number) is float for number in vector)


async def test_vectors_are_lists_of_python_floats():
    model = MatryoshkaEmbedding(encoder=DeterministicEncoder(16))
    assert numbers(model.get_query_embedding("a")) and numbers(await model.aget_query_embedding("a"))
    assert all(map(numbers, model.get_text_embedding_batch(["a", "b"])))
    assert all(map(numbers, await model.aget_text_embedding_batch(["a", "b"])))


async def test_async_calls_keep_the_roles_apart():
    model = MatryoshkaEmbedding(encoder=DeterministicEncoder(16))
    assert await model.aget_query_embedding("a") == model.get_query_embedding("a")
    assert await model.aget_text_embedding("a") == model.get_text_embedding("a") != model.get_query_embedding("a")


async def test_one_batch_is_in_flight_however_many_there_are():
    model = MatryoshkaEmbedding(encoder=Watched(), embed_batch_size=2, num_workers=4)
    texts = [f"text {i}" for i in range(11)]
    assert await model.aget_text_embedding_batch(texts) == model.get_text_embedding_batch(texts)
    assert model.encoder.most == 1
    assert [len(texts) for _, texts in model.encoder.calls] == [2, 2, 2, 2, 2, 1] * 2


def test_one_model_serves_one_event_loop_after_another():
    model = MatryoshkaEmbedding(encoder=Watched(), embed_batch_size=1)
    for _ in range(2):
        assert len(asyncio.run(model.aget_text_embedding_batch(["a", "b", "c"]))) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"encoder": DeterministicEncoder(16)},
        {"encoder": DeterministicEncoder(32), "dim": 16},
        {"encoder": DeterministicEncoder(32), "task": "clustering"},
    ],
)
def test_the_ingestion_cache_never_mixes_two_models(other):
    cache = IngestionCache()

    def vector(**settings):
        pipeline = IngestionPipeline(transformations=[MatryoshkaEmbedding(**settings)], cache=cache)
        return pipeline.run(nodes=[TextNode(id_="a", text="a text")])[0].embedding

    first = vector(encoder=DeterministicEncoder(32))
    assert vector(**other) == MatryoshkaEmbedding(**other).get_text_embedding("a text") != first


def test_the_ingestion_cache_spares_the_same_model_its_work():
    encoder, cache = Watched(), IngestionCache()
    for _ in range(2):
        pipeline = IngestionPipeline(transformations=[MatryoshkaEmbedding(encoder=encoder)], cache=cache)
        pipeline.run(nodes=[TextNode(id_="a", text="a text")])
    assert len(encoder.calls) == 1


@pytest.mark.usefixtures("default_dtype")
def test_prompts_of_a_given_encoder_are_in_the_cache_key(make_tiny_bert):
    from mrl_rag import MatryoshkaEncoder

    folder = str(make_tiny_bert())
    plain, prompted = (
        MatryoshkaEmbedding(encoder=MatryoshkaEncoder(folder, device="cpu", prompts=prompts))
        for prompts in (None, {"document": "text: "})
    )
    assert plain.model_name == prompted.model_name == folder
    assert prompted.prompts["document"] == "text: "
    assert plain.to_dict() != prompted.to_dict()


@pytest.mark.usefixtures("default_dtype")
def test_settings_go_through_a_dict_and_back(tiny_bert):
    model = MatryoshkaEmbedding(model_name=str(tiny_bert), dim=8, device="cpu", prompts={"query": "q: "}, max_length=16)
    settings = model.to_dict()
    assert settings["class_name"] == "MatryoshkaEmbedding"
    again = MatryoshkaEmbedding.from_dict(settings)
    assert again.to_dict() == settings
    assert again.get_query_embedding("a text") == model.get_query_embedding("a text")
    assert MatryoshkaEmbedding.from_json(model.to_json()).to_dict() == settings


@pytest.mark.usefixtures("default_dtype")
def test_a_given_encoder_that_a_dict_cannot_name_must_be_given_again(tiny_bert):
    model = MatryoshkaEmbedding(encoder=DeterministicEncoder(16), dim=8)
    settings = model.to_dict()
    assert MatryoshkaEmbedding.from_dict(settings, encoder=DeterministicEncoder(16)).to_dict() == settings
    with pytest.raises(IndexMismatch, match="fingerprint"):
        MatryoshkaEmbedding.from_dict(settings, encoder=DeterministicEncoder(32))
    with pytest.raises(IndexMismatch, match="encoder=encoder"):
        MatryoshkaEmbedding.from_dict(settings | {"model_name": str(tiny_bert), "device": "cpu"})


@pytest.mark.usefixtures("default_dtype")
def test_copies_share_the_encoder_and_pickles_load_it_again(tiny_bert):
    model = MatryoshkaEmbedding(model_name=str(tiny_bert), dim=8, device="cpu")
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert copied.encoder is model.encoder and pickled.encoder is not model.encoder
    for other in (copied, pickled, copy.deepcopy({"nested": [model]})["nested"][0], copy.copy(model)):
        assert other.to_dict() == model.to_dict()
        assert other.get_text_embedding("a text") == model.get_text_embedding("a text")
    given = pickle.loads(pickle.dumps(MatryoshkaEmbedding(encoder=DeterministicEncoder(16))))
    assert given.get_query_embedding("a") == MatryoshkaEmbedding(encoder=DeterministicEncoder(16)).get_query_embedding(
        "a"
    )
    assert len(pickle.dumps(model)) < 2000


def test_a_question_that_is_also_a_document_keeps_its_own_vector_with_a_cache_on(tmp_path):
    plain = MatryoshkaEmbedding(encoder=DeterministicEncoder(16))
    cached = MatryoshkaEmbedding(encoder=CachedEncoder(DeterministicEncoder(16), tmp_path / "vectors.sqlite3"))
    for _ in range(2):
        for ask in ("get_text_embedding", "get_query_embedding"):
            assert getattr(cached, ask)("the same") == pytest.approx(getattr(plain, ask)("the same"), abs=1e-6)
    with pytest.raises(InvalidInput, match="CachedEncoder"):
        MatryoshkaEmbedding(encoder=DeterministicEncoder(16), embeddings_cache=SimpleKVStore())


def test_two_dimensions_of_one_encoder_live_side_by_side():
    encoder = DeterministicEncoder(64)
    narrow, wide = (MatryoshkaEmbedding(encoder=encoder, dim=dim) for dim in (16, 64))
    assert [len(model.get_query_embedding("a")) for model in (narrow, wide, narrow)] == [16, 64, 16]


def test_32_threads_get_what_one_gets(minilm):
    from concurrent.futures import ThreadPoolExecutor

    model = MatryoshkaEmbedding(encoder=minilm)
    texts = [f"text number {i % 5}" for i in range(64)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(model.get_query_embedding, texts))
    alone = {text: model.get_query_embedding(text) for text in set(texts)}
    assert all(vector == pytest.approx(alone[text], abs=1e-5) for text, vector in zip(texts, together, strict=True))


async def test_the_sync_calls_work_in_a_running_event_loop():
    model = MatryoshkaEmbedding(encoder=DeterministicEncoder(16))
    assert model.get_text_embedding_batch(["a", "b"]) == await model.aget_text_embedding_batch(["a", "b"])


async def test_each_call_sends_its_events_once(events):
    model = MatryoshkaEmbedding(encoder=DeterministicEncoder(16), embed_batch_size=2)
    model.get_query_embedding("a")
    await model.aget_query_embedding("a")
    assert events == {"EmbeddingStartEvent": 2, "EmbeddingEndEvent": 2}
    events.clear()
    await model.aget_text_embedding_batch(["a", "b", "c"])
    assert events == {"EmbeddingStartEvent": 2, "EmbeddingEndEvent": 2}


def test_openvino_may_run_the_network(minilm):
    found = MatryoshkaEmbedding(backend="openvino", device="cpu", dtype="float32").get_query_embedding("a question")
    assert found == pytest.approx(minilm.encode_queries(["a question"])[0].tolist(), abs=1e-4)


WORKERS = """
import asyncio, sys
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index_mrl import MatryoshkaEmbedding

if __name__ == "__main__":
    model = MatryoshkaEmbedding(device="cpu", dtype="float32")
    nodes = [TextNode(text=f"passage {number}") for number in range(4)]
    pipeline = IngestionPipeline(transformations=[model])
    found = asyncio.run(pipeline.arun(nodes=nodes, num_workers=2, in_place=False))
    alone = model.get_text_embedding_batch([node.text for node in nodes])
    print(max(abs(a - b) for node, row in zip(found, alone) for a, b in zip(node.embedding, row)) < 1e-5)
"""


def test_a_pipeline_embeds_in_worker_processes():
    ran = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "True\n", ran.stderr
