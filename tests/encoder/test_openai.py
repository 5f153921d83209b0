import asyncio
import base64
import hashlib
import pickle
import signal
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_index.core
import numpy as np
import pytest
import tiktoken
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaVectorStore
from llama_index_mrl import MatryoshkaEmbedding

from mrl_rag import CachedEncoder, TwoStageIndex, TwoStageRetriever, truncate
from mrl_rag.encoder.openai import OpenAIEncoder
from mrl_rag.encoder.remote import request_batches
from mrl_rag.errors import EncoderClosed, InvalidDimension, InvalidInput, InvalidTexts, RemoteEncoderError

KEY = "sk-test-0123456789abcdef"
SIZES = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536, "org/tiny": 24}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    tables = Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tables))
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


def vector(text, size):
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    row = np.random.default_rng(seed).normal(size=size)
    return (row / np.linalg.norm(row)).astype("<f4")


def complaint(body, headers):
    """Say what OpenAI would refuse in a request, and with which status."""
    if headers.get("Authorization") != f"Bearer {KEY}":
        return 401, f"Incorrect API key provided: {headers.get('Authorization', '').removeprefix('Bearer ')}."
    if body.get("model") not in SIZES:
        return 404, f"The model {body.get('model')!r} does not exist"
    if set(body) - {"model", "input", "dimensions", "encoding_format"}:
        return 400, f"unknown argument among {sorted(body)}"
    if body.get("encoding_format", "float") not in ("float", "base64"):
        return 400, "encoding_format is invalid"
    if "dimensions" in body:
        size = body["dimensions"]
        if body["model"] == "text-embedding-ada-002":
            return 400, "This model does not support specifying dimensions."
        if not isinstance(size, int) or not 1 <= size <= SIZES[body["model"]]:
            return 400, "dimensions is invalid"
    return complaint_about_inputs(body)


def complaint_about_inputs(body):
    inputs = body.get("input")
    if not isinstance(inputs, list) or not inputs or not all(isinstance(i, str) and i for i in inputs):
        return 400, "'$.input' is invalid."
    if body["model"] == "org/tiny":
        return (413, f"batch size {len(inputs)} > maximum allowed batch size 32") if len(inputs) > 32 else None
    lengths = [len(t) for t in tiktoken.get_encoding("cl100k_base").encode_ordinary_batch(inputs)]
    if len(inputs) > 2048:
        return 400, "'$.input' is too long: 2048 items at most"
    if max(lengths) > 8192:
        return 400, f"This model's maximum context length is 8192 tokens, however you requested {max(lengths)} tokens"
    if sum(lengths) > 300_000:
        return 400, f"Requested {sum(lengths)} tokens, max 300000 tokens per request"
    return None


@pytest.fixture
def server(serve, answer):
    def respond(path, headers, body):
        if path != "/v1/embeddings":
            return answer(404, {"error": {"message": f"no such path: {path}"}})
        if found := complaint(body, headers):
            return answer(found[0], {"error": {"message": found[1], "type": "invalid_request_error"}})
        rows = [vector(text, SIZES[body["model"]]) for text in body["input"]]
        if size := body.get("dimensions"):
            rows = [row[:size] / np.linalg.norm(row[:size]) for row in rows]
        packed = body.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(row.tobytes()).decode() if packed else [float(x) for x in row],
            }
            for index, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        # Out of order, for it is `index` that says which is which.
        return answer(200, {"object": "list", "data": data[::-1], "model": body["model"], "usage": usage})

    return serve(respond)


@pytest.fixture
def connect(server):
    made = []

    def make(model="text-embedding-3-small", **settings):
        made.append(OpenAIEncoder(model, **{"api_key": KEY, "base_url": server.url} | settings))
        return made[-1]

    yield make
    for encoder in made:
        encoder.close()


def expected(texts, size=1536):
    return np.stack([vector(text, size) for text in texts])


@pytest.mark.parametrize("encoding_format", ["base64", "float"])
def test_rows_are_float32_unit_vectors_in_the_order_given(server, connect, encoding_format):
    texts = [f"text {i}" for i in range(40)]
    vectors = connect(encoding_format=encoding_format).encode(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected(texts), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert server.bodies[0]["encoding_format"] == encoding_format


@pytest.mark.parametrize("dim", [1, 256, 512, 1535, 1536])
def test_a_cut_here_is_what_the_server_cuts(server, connect, dim):
    here, there = connect(), connect(send_dimensions=True)
    np.testing.assert_allclose(here.encode(["a", "b"], dim=dim), there.encode(["a", "b"], dim=dim), atol=1e-6)
    assert ["dimensions" in body for body in server.bodies] == [False, dim < 1536]


@pytest.mark.parametrize(
    ("model", "dims"),
    [
        ("text-embedding-3-small", (1536, 512)),
        ("text-embedding-3-large", (3072, 1024, 256)),
        ("text-embedding-ada-002", (1536,)),
    ],
)
def test_known_models_need_no_request_to_tell_their_size(server, connect, model, dims):
    encoder = connect(model)
    assert (encoder.dims, encoder.full_dim, encoder.max_length) == (dims, dims[0], 8192)
    assert server.bodies == []
    assert encoder.encode(["a"], dim=100).shape == (1, 100)


def test_no_texts_give_no_rows_and_no_request(server, connect):
    assert connect().encode([], dim=64).shape == (0, 64)
    assert server.bodies == []


def test_an_empty_string_is_encoded_like_any_text(server, connect):
    vectors = connect().encode(["a", "", "b"])
    assert server.bodies[0]["input"] == ["a", " ", "b"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("texts", ["one text", ["a", None], ["a", 3], [b"bytes"], ["\ud800"], None])
def test_what_is_not_a_list_of_strings_is_refused_before_it_is_sent(server, connect, texts):
    with pytest.raises(InvalidTexts):
        connect().encode(texts)
    assert server.bodies == []


@pytest.mark.parametrize("dim", [0, -1, 1537, 64.0, "64", True])
def test_a_dimension_out_of_range_is_refused(connect, dim):
    with pytest.raises(InvalidDimension, match="1 to 1536"):
        connect().encode(["a"], dim=dim)


def test_an_unknown_task_is_refused(connect):
    with pytest.raises(InvalidInput, match="'summary'"):
        connect().encode(["a"], task="summary")


def test_prompts_are_put_before_texts_and_never_twice(server, connect):
    encoder = connect(prompts={"query": "query: "})
    encoder.encode_queries(["how", "query: how"])
    encoder.encode_documents(["how"])
    assert [body["input"] for body in server.bodies] == [["query: how", "query: how"], ["how"]]


def test_requests_carry_2048_inputs_at_most(server, connect):
    texts = [f"{i}" for i in range(2100)]
    np.testing.assert_allclose(connect(concurrency=1).encode(texts, dim=8), truncate(expected(texts), 8), atol=1e-5)
    assert [len(body["input"]) for body in server.bodies] == [2048, 52]


def test_requests_carry_300_000_tokens_at_most(server, connect):
    texts = [f"{i}" + " tok" * 8000 for i in range(40)]
    np.testing.assert_allclose(connect().encode(texts), expected(texts), atol=1e-6)
    assert sorted(len(body["input"]) for body in server.bodies) == [3, 37]


@pytest.mark.parametrize(
    ("costs", "batches"),
    [
        ([], []),
        ([9], [(0, 1)]),
        ([2, 3, 1, 5], [(0, 2), (2, 3), (3, 4)]),
        ([1, 1, 1, 1], [(0, 3), (3, 4)]),
        ([9, 9], [(0, 1), (1, 2)]),
    ],
)
def test_batches_are_in_order_and_as_large_as_the_limits_let_them_be(costs, batches):
    assert [(batch.start, batch.stop) for batch in request_batches(costs, 3, 5)] == batches


def test_long_texts_are_cut_at_the_limit_and_counted_once_a_call(server, connect):
    encoder = connect(max_length=8)
    with pytest.warns(UserWarning, match=r"2 of 3 texts .* max_length=8 .* the longest by 12 tokens") as record:
        encoder.encode(["short", " tok" * 10, " tok" * 20])
    assert len(record) == 1
    assert server.bodies[0]["input"] == ["short", " tok" * 8, " tok" * 8]


@pytest.mark.parametrize(
    "text",
    ["東京は夜の七時 " * 20, "👩‍👩‍👧‍👦" * 20, "naïve   \n\n  x" * 20, "�é" * 30],
    ids=["kanji", "emoji", "spaces", "replacement characters"],
)
def test_a_cut_keeps_whole_characters_and_stays_under_the_limit(server, connect, text):
    encoding = tiktoken.get_encoding("cl100k_base")
    for max_length in (1, 2, 3, 5, 8, 11):
        with pytest.warns(UserWarning, match="were cut"):
            connect(max_length=max_length).encode([text])
        (sent,) = server.bodies[-1]["input"]
        assert len(encoding.encode_ordinary(sent)) <= max_length
        assert text.startswith(sent) or sent == " "


def test_a_text_beyond_8192_tokens_is_accepted_by_the_server_once_cut(server, connect):
    with pytest.warns(UserWarning, match="the longest by 1 tokens"):
        connect().encode([" tok" * 8193])
    assert server.statuses == [200]


def test_a_vast_run_of_spaces_does_not_bring_the_tokenizer_down(server, connect):
    with pytest.warns(UserWarning, match="were cut"):
        connect(max_length=64).encode([" " * 1_000_000 + "a"])
    assert server.statuses == [200]


def test_special_tokens_in_a_text_are_text(server, connect):
    texts = ["<|endoftext|>", "before <|fim_prefix|> after <|endofprompt|>"]
    np.testing.assert_allclose(connect().encode(texts), expected(texts), atol=1e-6)
    with pytest.warns(UserWarning, match="longest by 3 tokens"):
        connect(max_length=4).encode(["<|endoftext|>"])


def test_an_unknown_model_tells_its_size_by_its_first_answer(server, connect):
    encoder = connect("org/tiny")
    assert server.bodies == []
    assert (encoder.full_dim, encoder.dims, encoder.max_length) == (24, (24,), None)
    assert len(server.bodies) == 1
    np.testing.assert_allclose(encoder.encode(["a"]), expected(["a"], 24), atol=1e-6)
    with pytest.raises(InvalidDimension, match="1 to 24"):
        encoder.encode(["a"], dim=25)


def test_an_unknown_model_gets_small_requests(server, connect):
    texts = [f"text {i}" for i in range(100)] + ["x" * 60_000] * 3
    connect("org/tiny", full_dim=24, concurrency=1).encode(texts)
    assert [len(body["input"]) for body in server.bodies] == [32, 32, 32, 5, 1, 1]


def test_another_server_needs_no_key(server, answer):
    server.respond = lambda path, headers, body: answer(
        200, {"object": "list", "data": [{"index": 0, "embedding": [3.0, 4.0], "object": "embedding"}]}
    )
    encoder = OpenAIEncoder("org/other", base_url=server.url)
    np.testing.assert_allclose(encoder.encode(["a"]), [[0.6, 0.8]], atol=1e-6)
    encoder.close()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(server, connect, answer, status):
    server.script = [answer(status, {"error": {"message": "wait"}}, {"retry-after-ms": "10"})] * 2
    np.testing.assert_allclose(connect().encode(["a"]), expected(["a"]), atol=1e-6)
    assert server.statuses == [status, status, 200]


def test_a_dropped_connection_is_tried_again(server, connect, monkeypatch):
    monkeypatch.setattr("mrl_rag.encoder.connection._FIRST_WAIT_S", 0.01)
    server.script = ["hang up"]
    np.testing.assert_allclose(connect().encode(["a"]), expected(["a"]), atol=1e-6)


def test_a_wait_is_really_waited(server, connect, answer):
    server.script = [answer(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.2"})]
    connect().encode(["a"])
    assert server.times[1] - server.times[0] >= 0.2


def test_a_wrong_key_raises_an_error_that_does_not_show_it(server, connect):
    wrong = "sk-wrong-fedcba9876543210"
    with pytest.raises(RemoteEncoderError, match=r"127\.0\.0\.1 answered 401: .*\[key\].*OPENAI_API_KEY") as caught:
        connect(api_key=wrong).encode(["a"])
    shown = "".join(traceback.format_exception(caught.value))
    assert wrong not in shown + repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert server.statuses == [401]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "too odd", "type": "invalid"}}, "too odd"),
        ({"error": "too odd", "error_type": "Validation"}, "too odd"),
        ({"object": "error", "message": "too odd"}, "too odd"),
        ({"detail": [{"msg": "too odd"}]}, "too odd"),
        ("<html>too odd</html>", "<html>too odd</html>"),
    ],
    ids=["openai", "text-embeddings-inference", "vllm", "fastapi", "html"],
)
def test_a_refusal_is_not_tried_again_and_says_what_the_server_said(server, connect, answer, body, said):
    server.script = [answer(404, body)]
    with pytest.raises(RemoteEncoderError, match=f"answered 404: .*{said}.*check model"):
        connect().encode(["a"])
    assert server.statuses == [404]


def test_retries_end(server, connect, answer):
    server.script = [answer(503, {"error": {"message": "overloaded"}}, {"retry-after-ms": "1"})] * 9
    with pytest.raises(RemoteEncoderError, match=r"answered 503: overloaded.*CachedEncoder keeps what was fetched"):
        connect(max_retries=3).encode(["a"])
    assert server.statuses == [503] * 4


def test_a_server_that_is_not_there_is_named(connect, unused_port):
    encoder = connect(base_url=f"http://127.0.0.1:{unused_port}/v1", max_retries=0)
    with pytest.raises(RemoteEncoderError, match=r"127\.0\.0\.1 didn't answer.*Check base_url"):
        encoder.encode(["a"])


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<html>welcome</html>", "can't be read"),
        ('{"object": "list", "data": [', "can't be read"),
        ({"object": "list"}, "can't be read"),
        ({"data": [{"index": 0, "embedding": "§§§§"}]}, "can't be read"),
        ({"data": []}, "gave 0 vectors"),
        ({"data": [{"index": 0, "embedding": [0.1] * 7}]}, "vectors of 7 numbers .* 1536 were expected"),
        ({"data": [{"index": 0, "embedding": [float("nan")] * 1536}]}, r"NaN or infinity for texts\[0\] \('a', 1 char"),
        ({"data": [{"index": 0, "embedding": [0.0] * 1536}]}, r"nothing but zeros for texts\[0\] \('a', 1 char"),
        ({"error": {"message": "still loading the model", "code": 503}}, "answered 200, .*: still loading the model"),
        ({"message": "still loading the model"}, "answered 200, .*: still loading the model"),
    ],
    ids=["html", "broken", "no data", "no base64", "too few", "another length", "nan", "zeros", "error", "message"],
)
def test_an_answer_that_is_none_is_reported(server, connect, answer, body, complaint):
    headers = {"Content-Type": "text/html"} if isinstance(body, str) and body.startswith("<") else {}
    server.script = [answer(200, body, headers)] * 2
    with pytest.raises(RemoteEncoderError, match=complaint):
        connect(max_retries=0).encode(["a"])


def indexed(server, index_of):
    """Have the server number its answers by `index_of(position)`; None leaves the number out."""
    own = server.respond

    def respond(path, headers, body):
        found = own(path, headers, body)
        for item in found.body["data"]:
            index = index_of(item.pop("index"))
            item |= {} if index is None else {"index": index}
        return found

    server.respond = respond


def test_an_index_that_is_a_string_counts_as_its_number(server, connect):
    indexed(server, str)
    texts = [f"text {i}" for i in range(12)]
    np.testing.assert_allclose(connect().encode(texts), expected(texts), atol=1e-6)


@pytest.mark.parametrize("index", [None, 0], ids=["none", "all zero"])
def test_where_no_index_tells_texts_apart_the_order_is_that_of_the_answer(server, connect, index):
    indexed(server, lambda position: index)
    texts = [f"text {i}" for i in range(12)]
    # The server answers backwards.
    np.testing.assert_allclose(connect().encode(texts), expected(texts[::-1]), atol=1e-6)


@pytest.mark.parametrize(
    "index_of",
    [lambda i: None if i == 1 else i, lambda i: min(i, 1), lambda i: i + 1, lambda i: "one" if i == 1 else i],
    ids=["one missing", "one twice", "from 1 on", "no number"],
)
def test_an_index_that_leaves_a_text_without_a_vector_is_an_error(server, connect, index_of):
    indexed(server, index_of)
    with pytest.raises(RemoteEncoderError, match=r"index .*each from 0 to 2 is needed once"):
        connect().encode(["a", "b", "c"])


@pytest.mark.parametrize("full_dim", [None, 24])
@pytest.mark.parametrize("wide", ["<f2", "<f8"])
def test_base64_of_other_numbers_than_float32_is_asked_for_again_as_numbers(server, connect, wide, full_dim):
    own = server.respond

    def respond(path, headers, body):
        found = own(path, headers, body)
        for item in found.body["data"] if body["encoding_format"] == "base64" else []:
            row = np.frombuffer(base64.b64decode(item["embedding"]), dtype="<f4")
            item["embedding"] = base64.b64encode(row.astype(wide).tobytes()).decode()
        return found

    server.respond = respond
    encoder = connect("org/tiny", full_dim=full_dim)
    texts = [f"text {i}" for i in range(40)]
    np.testing.assert_allclose(encoder.encode(texts), expected(texts, 24), atol=1e-6)
    server.bodies.clear()
    encoder.encode(["again"])
    assert [body["encoding_format"] for body in server.bodies] == ["float"]


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_base64_is_asked_for_numbers(server, connect, answer, status):
    own = server.respond

    def respond(path, headers, body):
        if body["encoding_format"] == "base64":
            return answer(status, {"error": {"message": "unknown encoding_format"}})
        return own(path, headers, body)

    server.respond = respond
    encoder = connect()
    np.testing.assert_allclose(encoder.encode(["a", "b"]), expected(["a", "b"]), atol=1e-6)
    encoder.encode(["c"])
    assert [body["encoding_format"] for body in server.bodies] == ["base64", "float", "float"]


def longest(server, answer, status, characters, inputs):
    """Have the server refuse longer texts, and more of them."""
    own = server.respond

    def respond(path, headers, body):
        if max(map(len, body["input"])) > characters or len(body["input"]) > inputs:
            return answer(status, {"error": {"message": f"{characters} characters, {inputs} inputs at most"}})
        return own(path, headers, body)

    server.respond = respond


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_text_that_a_server_finds_too_long_is_named(server, connect, answer, status):
    longest(server, answer, status, 20, 32)
    texts = [f"text {i}" for i in range(100)]
    texts[70] = "far too long for " * 9
    with pytest.raises(RemoteEncoderError, match=rf"answered {status} to texts\[70\] \('far too .*153 char"):
        connect("org/tiny", full_dim=24).encode(texts)


def test_a_batch_that_a_server_finds_too_large_goes_in_smaller_ones(server, connect, answer):
    longest(server, answer, 413, 20, 10)
    texts = [f"text {i}" for i in range(100)]
    np.testing.assert_allclose(connect("org/tiny", full_dim=24).encode(texts), expected(texts, 24), atol=1e-6)


def requesting():
    return [thread for thread in threading.enumerate() if thread.name == "mrl_rag-request"]


@pytest.mark.parametrize("texts", [1, 320], ids=["one request", "many"])
def test_ctrl_c_ends_the_retries(server, connect, answer, texts):
    both = threading.Barrier(min(texts, 2), lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))

    def interrupt(path, headers, body):
        both.wait()
        return answer(503, {"error": {"message": "overloaded"}}, {"Retry-After": "100"})

    server.respond = interrupt
    with pytest.raises(KeyboardInterrupt):
        connect("org/tiny", full_dim=24, concurrency=2).encode([f"text {i}" for i in range(texts)])
    for thread in requesting():
        thread.join(20)
    assert not requesting()


async def test_a_coroutine_that_is_cancelled_ends_the_retries(server, connect, answer):
    waiting = asyncio.Event()
    loop = asyncio.get_running_loop()

    def refuse(path, headers, body):
        loop.call_soon_threadsafe(waiting.set)
        return answer(503, {"error": {"message": "overloaded"}}, {"Retry-After": "100"})

    server.respond = refuse
    call = asyncio.create_task(connect("org/tiny", full_dim=24).aencode([f"text {i}" for i in range(320)]))
    await waiting.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await loop.shutdown_default_executor()
    assert not requesting()


def test_close_ends_the_retries_and_says_so(server, connect, answer):
    server.script = [answer(503, {"error": {"message": "overloaded"}}, {"Retry-After": "100"})] * 2
    encoder = connect()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(encoder.encode, ["a"])
        while not server.statuses:
            time.sleep(0.005)
        encoder.close()
        with pytest.raises(EncoderClosed):
            call.result(20)


def test_one_request_needs_no_thread(server, connect):
    started = []

    def look(path, headers, body):
        started.extend(requesting())
        return own(path, headers, body)

    own, server.respond = server.respond, look
    connect("org/tiny", full_dim=24).encode(["a"])
    assert started == []


def test_with_a_cache_a_call_made_again_fetches_only_what_is_missing(server, connect, answer, tmp_path, monkeypatch):
    monkeypatch.setattr("mrl_rag.encoder.cache._BATCH", 32)
    texts = [f"text {i}" for i in range(32 * 6)]
    cached = CachedEncoder(connect("org/tiny", full_dim=24, concurrency=1), tmp_path / "vectors.sqlite3")
    server.script = [None, None, None] + [answer(401, {"error": {"message": "no"}})] * 3
    with pytest.raises(RemoteEncoderError):
        cached.encode(texts)
    server.script.clear()
    server.bodies.clear()
    np.testing.assert_allclose(cached.encode(texts, dim=8), truncate(expected(texts, 24), 8), atol=1e-5)
    assert [body["input"][0] for body in server.bodies] == ["text 96", "text 128", "text 160"]


def test_threads_together_keep_to_the_concurrency(server, connect):
    server.seconds = 0.01
    encoder = connect("org/tiny", full_dim=24, concurrency=3)
    calls = [[f"call {c} text {i}" for i in range(70)] for c in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for texts, vectors in zip(calls, pool.map(encoder.encode, calls), strict=True):
            np.testing.assert_allclose(vectors, expected(texts, 24), atol=1e-6)
    assert 2 <= server.most_in_flight <= 3


def test_order_holds_when_answers_come_in_another(server, connect):
    own, turn = server.respond, iter([0.08, 0.04, 0.0, 0.0])

    def respond(path, headers, body):
        time.sleep(next(turn))
        return own(path, headers, body)

    server.respond = respond
    texts = [f"text {i}" for i in range(32 * 4)]
    vectors = connect("org/tiny", full_dim=24, concurrency=4).encode(texts)
    np.testing.assert_allclose(vectors, expected(texts, 24), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "1 to 8192"),
        ({"max_length": 8193}, "1 to 8192"),
        ({"max_length": True}, "1 to 8192"),
        ({"model": "org/tiny", "max_length": 512}, "can't be counted"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_retries": -1}, "max_retries"),
        ({"full_dim": 1.5}, "full_dim"),
        ({"encoding_format": "hex"}, "'base64' or 'float'"),
        ({"prompts": {"query": None}}, "prompts"),
        ({"prompts": {"search": "x"}}, "'search'"),
        ({"base_url": "localhost:8000/v1"}, "base_url"),
        ({"api_key": "sk-line\n"}, "line break"),
        ({"api_key": None, "base_url": None}, "OPENAI_API_KEY"),
        ({"model": "text-embedding-ada-002", "send_dimensions": True}, "one dimension"),
    ],
)
def test_bad_settings_are_refused(connect, settings, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        connect(**settings)
    assert "sk-line" not in str(caught.value)


def test_the_fingerprint_follows_what_changes_a_vector_and_nothing_else(connect, server):
    fingerprint = connect().fingerprint
    same = [
        connect(api_key="sk-other"),
        connect(concurrency=1, timeout=1.0, encoding_format="float"),
        connect(base_url=server.url + "/"),
    ]
    others = [
        connect("text-embedding-ada-002"),
        connect(base_url=None),
        connect(base_url="https://api.openai.com/proxy/v1"),
        connect(base_url=server.url.replace("/v1", "/proxy/v1")),
        connect(base_url="http://127.0.0.1:8000/v1"),
        connect(base_url="http://localhost:8000/v1"),
        connect(prompts={"query": "q: "}),
        connect(max_length=512),
        connect(full_dim=512),
    ]
    assert len(fingerprint) == 16
    assert int(fingerprint, 16) >= 0
    assert {encoder.fingerprint for encoder in same} == {fingerprint}
    assert len({fingerprint, *(encoder.fingerprint for encoder in others)}) == 10


def test_a_pickled_encoder_carries_its_settings_and_not_its_key(connect, server, monkeypatch):
    encoder = connect(prompts={"query": "q: "}, max_length=512, concurrency=2)
    data = pickle.dumps(encoder)
    assert KEY.encode() not in data
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    copy = pickle.loads(data)
    assert copy.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(copy.encode_queries(["a"]), encoder.encode_queries(["a"]))
    copy.close()


def test_the_key_is_in_no_repr_and_no_log(connect, caplog):
    caplog.set_level("DEBUG")
    encoder = connect()
    encoder.encode(["a"])
    assert KEY not in repr(encoder) + str(encoder) + caplog.text


def test_the_key_and_address_come_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    encoder = OpenAIEncoder()
    encoder.encode(["a"])
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    encoder.close()


def test_a_closed_encoder_says_so(connect):
    for encoder in (connect(), connect("org/tiny")):
        encoder.close()
        encoder.close()
        with pytest.raises(EncoderClosed):
            encoder.encode(["a"])


def test_a_call_that_meets_close_says_so(server, connect):
    server.seconds = 0.05
    encoder = connect("org/tiny", full_dim=24, concurrency=1)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(encoder.encode, [f"{i}" for i in range(320)])
        while not server.times:
            time.sleep(0.005)
        encoder.close()
        with pytest.raises(EncoderClosed):
            call.result(5)


def test_it_works_in_a_two_stage_retriever(connect):
    encoder = connect()
    retriever = TwoStageRetriever(encoder, TwoStageIndex(fingerprint=encoder.fingerprint))
    texts = [f"passage {i}" for i in range(50)]
    retriever.index_texts(texts)
    hits = retriever.search("passage 17", k=3)
    assert hits[0].document == "passage 17"
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert len(hits) == 3


def test_the_adapters_of_both_frameworks_take_it(connect):
    encoder = connect()
    texts = [f"passage {i}" for i in range(20)]
    store = MatryoshkaVectorStore.from_texts(texts, MatryoshkaEmbeddings(encoder=encoder))
    assert store.index.full_dim == encoder.full_dim
    assert store.similarity_search("passage 7", k=1)[0].page_content == "passage 7"
    model = MatryoshkaEmbedding(encoder=encoder, dim=64)
    np.testing.assert_allclose(model.get_text_embedding_batch(texts), encoder.encode(texts, dim=64), atol=1e-6)


async def test_coroutines_get_the_same_vectors(connect):
    encoder = connect()
    np.testing.assert_allclose(await encoder.aencode(["a", "b"], "query", 32), encoder.encode_queries(["a", "b"], 32))
    assert len(await MatryoshkaEmbeddings(encoder=encoder).aembed_query("a")) == encoder.full_dim


def test_a_cache_keeps_its_vectors(connect, tmp_path):
    encoder = connect()
    cached = CachedEncoder(encoder, tmp_path / "vectors.sqlite3")
    expected = cached.encode(["a", "b"], dim=16)
    encoder.close()
    np.testing.assert_array_equal(cached.encode(["b", "a"], dim=16)[::-1], expected)


def test_a_cache_keeps_two_servers_apart_on_one_host(serve, answer, tmp_path):
    def serving(row):
        return lambda path, headers, body: answer(200, {"data": [{"embedding": row} for _ in body["input"]]})

    found = []
    for server in (serve(serving([3.0, 4.0])), serve(serving([4.0, 3.0]))):
        encoder = OpenAIEncoder("org/tiny", base_url=server.url)
        found.append(CachedEncoder(encoder, tmp_path / "vectors.sqlite3").encode(["a"]))
        encoder.close()
    np.testing.assert_allclose(np.concatenate(found), [[0.6, 0.8], [0.8, 0.6]], atol=1e-6)
