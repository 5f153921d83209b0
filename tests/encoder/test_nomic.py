import hashlib
import pickle
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import httpx
import numpy as np
import pytest

from mrl_rag import TwoStageIndex, TwoStageRetriever, truncate
from mrl_rag.encoder.connection import retry_delay
from mrl_rag.encoder.nomic import NomicEncoder
from mrl_rag.errors import EncoderClosed, InvalidDimension, InvalidInput, InvalidTexts, RemoteEncoderError
from mrl_rag.truncation import layer_norm

KEY = "nk-test-0123456789abcdef"
MODELS = ("nomic-embed-text-v1", "nomic-embed-text-v1.5")
TASK_TYPES = ("search_document", "search_query", "classification", "clustering")


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch):
    monkeypatch.delenv("NOMIC_API_KEY", raising=False)


def pooled(text):
    """What the network makes of a text with its prefix, before the layer norm; off centre, so that it shows."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    return np.random.default_rng(seed).normal(loc=0.3, size=768)


def expected(texts, dim=768, prefix="search_document: "):
    return truncate(layer_norm([pooled(prefix + text) for text in texts]), dim)


def complaint(body):
    """Say what the API's schema doesn't allow in a request."""
    if set(body) - {"model", "texts", "task_type", "long_text_mode", "max_tokens_per_text", "dimensionality"}:
        return f"extra fields not permitted in {sorted(body)}"
    if body.get("model") not in MODELS:
        return "model is not a valid enumeration member"
    texts = body.get("texts")
    if not isinstance(texts, list) or not 1 <= len(texts) <= 50 or not all(isinstance(t, str) and t for t in texts):
        return "texts is invalid"
    if body.get("task_type", "search_document") not in TASK_TYPES:
        return "task_type is not one of the four"
    if body.get("long_text_mode", "mean") not in ("truncate", "mean"):
        return "long_text_mode is not a valid enumeration member"
    size = body.get("dimensionality", 768)
    if not isinstance(size, int) or not 1 <= size <= 768 or (size < 768 and body["model"] != MODELS[1]):
        return "dimensionality is invalid"
    return None


@pytest.fixture
def server(serve, answer):
    def respond(path, headers, body):
        if path != "/v1/embedding/text":
            return answer(404, {"detail": f"no such path: {path}"})
        if headers.get("Authorization") != f"Bearer {KEY}":
            return answer(401, {"detail": f"Invalid key: {headers.get('Authorization', '')}"})
        if found := complaint(body):
            return answer(422, {"detail": [{"loc": ["body"], "msg": found, "type": "value_error"}]})
        rows = np.stack([pooled(f"{body['task_type']}: {text}") for text in body["texts"]])
        if size := body.get("dimensionality"):
            rows = layer_norm(rows)[:, :size]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return answer(200, {"embeddings": rows.tolist(), "usage": usage, "model": body["model"]})

    return serve(respond)


@pytest.fixture
def connect(server):
    made = []

    def make(model="nomic-embed-text-v1.5", **settings):
        made.append(NomicEncoder(model, **{"api_key": KEY, "base_url": server.url} | settings))
        return made[-1]

    yield make
    for encoder in made:
        encoder.close()


def test_rows_are_float32_unit_vectors_in_the_order_given(connect):
    texts = [f"text {i}" for i in range(120)]
    vectors = connect().encode(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected(texts), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 64, 256, 767])
def test_a_cut_here_is_what_the_server_cuts(server, connect, dim):
    here, there = connect(), connect(send_dimensions=True)
    np.testing.assert_allclose(here.encode(["a", "b"], dim=dim), there.encode(["a", "b"], dim=dim), atol=1e-6)
    assert [body.get("dimensionality") for body in server.bodies] == [None, dim]


def test_the_vectors_of_v1_are_not_layer_normed(connect):
    row = pooled("search_document: a")
    np.testing.assert_allclose(connect("nomic-embed-text-v1").encode(["a"]), [row / np.linalg.norm(row)], atol=1e-6)


@pytest.mark.parametrize(
    ("task", "task_type"),
    [
        ("query", "search_query"),
        ("document", "search_document"),
        ("classification", "classification"),
        ("clustering", "clustering"),
    ],
)
def test_each_task_goes_along_as_its_type(server, connect, task, task_type):
    vectors = connect().encode(["a", f"{task_type}: a"], task=task)
    assert server.bodies[0]["task_type"] == task_type
    assert server.bodies[0]["texts"] == ["a", "a"]
    np.testing.assert_allclose(vectors, expected(["a", "a"], prefix=f"{task_type}: "), atol=1e-6)


def test_long_texts_are_cut_by_the_service_at_the_limit(server, connect):
    connect().encode(["a"])
    connect(max_length=512).encode(["a"])
    assert [body["long_text_mode"] for body in server.bodies] == ["truncate"] * 2
    assert [body["max_tokens_per_text"] for body in server.bodies] == [8192, 512]


def test_a_prompt_comes_after_the_services_own(server, connect):
    connect(prompts={"query": "in French: "}).encode_queries(["how"])
    assert server.bodies[0]["texts"] == ["in French: how"]


def test_requests_stay_under_the_limits(server, connect):
    texts = [f"text {i}" for i in range(120)] + ["x" * 60_000] * 2
    connect(concurrency=1).encode(texts)
    assert [len(body["texts"]) for body in server.bodies] == [50, 50, 21, 1]


def test_no_texts_give_no_rows_and_no_request(server, connect):
    assert connect().encode([], dim=64).shape == (0, 64)
    assert server.bodies == []


def test_an_empty_string_is_encoded_like_any_text(server, connect):
    vectors = connect().encode(["", "search_document: "])
    assert server.bodies[0]["texts"] == [" ", " "]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("texts", ["one text", ["a", None], [b"bytes"], ["\ud800"], None])
def test_what_is_not_a_list_of_strings_is_refused_before_it_is_sent(server, connect, texts):
    with pytest.raises(InvalidTexts):
        connect().encode(texts)
    assert server.bodies == []


@pytest.mark.parametrize("dim", [0, 769, 64.0])
def test_a_dimension_out_of_range_is_refused(connect, dim):
    with pytest.raises(InvalidDimension, match="1 to 768"):
        connect().encode(["a"], dim=dim)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(server, connect, answer, status):
    server.script = [answer(status, {"detail": "wait"}, {"retry-after-ms": "10"})] * 2
    np.testing.assert_allclose(connect().encode(["a"]), expected(["a"]), atol=1e-6)
    assert server.statuses == [status, status, 200]


def test_a_dropped_connection_is_tried_again(server, connect, monkeypatch):
    monkeypatch.setattr("mrl_rag.encoder.connection._FIRST_WAIT_S", 0.01)
    server.script = ["hang up"]
    np.testing.assert_allclose(connect().encode(["a"]), expected(["a"]), atol=1e-6)


def test_a_wait_is_really_waited(server, connect, answer):
    server.script = [answer(429, {"detail": "slow down"}, {"Retry-After": "0.2"})]
    connect().encode(["a"])
    assert server.times[1] - server.times[0] >= 0.2


def delay(status=503, attempt=0, **headers):
    return retry_delay(
        status, httpx.Headers({name.replace("_", "-"): value for name, value in headers.items()}), attempt
    )


def test_the_wait_a_server_asks_for_is_kept():
    assert delay(Retry_After="3") == 3
    assert delay(Retry_After="0") == 0
    assert delay(retry_after_ms="250", Retry_After="3") == 0.25
    assert delay(Retry_After=formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=1.5)
    assert delay(Retry_After=formatdate(time.time() - 30, usegmt=True)) == 0
    assert delay(Retry_After="3600") is None


def test_waits_double_up_to_a_limit_when_the_server_asks_for_none():
    for attempt, longest in enumerate([0.5, 1, 2, 4, 8, 8, 8]):
        for headers in ({}, {"Retry_After": "soon"}, {"Retry_After": "nan"}):
            assert 0.75 * longest <= delay(None, attempt, **headers) <= longest
    assert delay(attempt=10_000) <= 8


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 422])
def test_what_will_not_pass_is_not_tried_again(status):
    assert delay(status) is None


def test_a_wrong_key_raises_an_error_that_does_not_show_it(server, connect):
    wrong = "nk-wrong-fedcba9876543210"
    with pytest.raises(RemoteEncoderError, match=r"127\.0\.0\.1 answered 401: .*\[key\].*NOMIC_API_KEY") as caught:
        connect(api_key=wrong).encode(["a"])
    assert wrong not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None
    assert server.statuses == [401]


def test_a_refusal_is_not_tried_again_and_says_what_the_server_said(server, connect):
    with pytest.raises(RemoteEncoderError, match=r"answered 422: .*valid enumeration member.*check model"):
        connect("nomic-embed-code").encode(["a"])
    assert server.statuses == [422]


def test_retries_end(server, connect, answer):
    server.script = [answer(503, {"detail": "overloaded"}, {"retry-after-ms": "1"})] * 9
    with pytest.raises(RemoteEncoderError, match=r"answered 503: overloaded.*CachedEncoder keeps what was fetched"):
        connect(max_retries=3).encode(["a"])
    assert server.statuses == [503] * 4


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<html>welcome</html>", "can't be read"),
        ({"vectors": []}, "can't be read"),
        ({"embeddings": []}, "gave 0 vectors"),
        ({"embeddings": [[0.1] * 7]}, "vectors of 7 numbers .* 768 were expected"),
        ({"embeddings": [[float("nan")] * 768]}, "NaN or infinity"),
    ],
    ids=["html", "no embeddings", "too few", "another length", "nan"],
)
def test_an_answer_that_is_none_is_reported(server, connect, answer, body, complaint):
    server.script = [answer(200, body)]
    with pytest.raises(RemoteEncoderError, match=complaint) as caught:
        connect().encode(["a"])
    assert caught.value.__context__ is None


def test_an_unknown_model_tells_its_size_by_its_first_answer(server, connect, answer):
    server.respond = lambda path, headers, body: answer(200, {"embeddings": [[3.0, 4.0]] * len(body["texts"])})
    encoder = connect("nomic-embed-next")
    assert (encoder.full_dim, encoder.dims) == (2, (2,))
    np.testing.assert_allclose(encoder.encode(["a"]), [[0.6, 0.8]], atol=1e-6)


def test_threads_together_keep_to_the_concurrency(server, connect):
    server.seconds = 0.01
    encoder = connect(concurrency=3)
    calls = [[f"call {c} text {i}" for i in range(70)] for c in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for texts, vectors in zip(calls, pool.map(encoder.encode, calls), strict=True):
            np.testing.assert_allclose(vectors, expected(texts), atol=1e-6)
    assert 2 <= server.most_in_flight <= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 8193}, "1 to 8192"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_retries": 1.5}, "max_retries"),
        ({"prompts": {"query": None}}, "prompts"),
        ({"base_url": "api.example"}, "base_url"),
        ({"api_key": "nk line"}, "a space"),
        ({"api_key": None}, "NOMIC_API_KEY"),
        ({"model": "nomic-embed-text-v1", "send_dimensions": True}, "one dimension"),
    ],
)
def test_bad_settings_are_refused(connect, settings, message):
    with pytest.raises(InvalidInput, match=message):
        connect(**settings)


def test_the_fingerprint_follows_what_changes_a_vector_and_nothing_else(connect):
    fingerprint = connect().fingerprint
    others = [
        connect("nomic-embed-text-v1"),
        connect(base_url="https://api-atlas.nomic.ai/v1/"),
        connect(base_url="https://api-atlas.nomic.ai/proxy"),
        connect(prompts={"query": "q: "}),
        connect(max_length=512),
    ]
    assert connect(api_key="nk-other", concurrency=1, timeout=1.0).fingerprint == fingerprint
    assert len({fingerprint, *(encoder.fingerprint for encoder in others)}) == 6


def test_a_pickled_encoder_carries_its_settings_and_not_its_key(connect, monkeypatch):
    encoder = connect(prompts={"query": "q: "}, max_length=512)
    data = pickle.dumps(encoder)
    assert KEY.encode() not in data
    monkeypatch.setenv("NOMIC_API_KEY", KEY)
    copy = pickle.loads(data)
    assert copy.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(copy.encode_queries(["a"]), encoder.encode_queries(["a"]))
    copy.close()


def test_the_key_is_in_no_repr_and_no_log(connect, caplog):
    caplog.set_level("DEBUG")
    encoder = connect()
    encoder.encode(["a"])
    assert KEY not in repr(encoder) + str(encoder) + caplog.text


def test_a_closed_encoder_says_so(connect):
    encoder = connect()
    encoder.close()
    encoder.close()
    with pytest.raises(EncoderClosed):
        encoder.encode(["a"])


def test_it_works_in_a_two_stage_retriever(connect):
    encoder = connect()
    retriever = TwoStageRetriever(encoder, TwoStageIndex(fingerprint=encoder.fingerprint))
    retriever.index_texts([f"passage {i}" for i in range(60)])
    assert len(retriever.search("a question", k=3)) == 3
