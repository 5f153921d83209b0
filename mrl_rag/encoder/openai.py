"""`OpenAIEncoder`: texts to vectors, over OpenAI's API or any server that has the same."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mrl_rag.arguments import check_integer
from mrl_rag.encoder.connection import REFUSED, Reply, host_of, read_key
from mrl_rag.encoder.remote import MAX_CHARACTERS, RemoteEncoder, Requests, request_batches
from mrl_rag.errors import InvalidInput, RemoteEncoderError
from mrl_rag.lifetime import NATIVE_CODE
from mrl_rag.tasks import Task, check_texts, with_prompt
from mrl_rag.tokens import load_encoding, tokenize

if TYPE_CHECKING:
    import tiktoken

_BASE_URL = "https://api.openai.com/v1"
_KEY = "OPENAI_API_KEY"
# Headers that say who is billed, and their variables, as OpenAI's own client sends them.
_HEADERS = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
# platform.openai.com/docs/api-reference/embeddings/create, "input"
_MAX_INPUTS = 2048
_MAX_TOKENS = 300_000
# The default of text-embeddings-inference (--max-client-batch-size), the smallest of the known servers.
_MAX_INPUTS_ELSEWHERE = 32
# Texts tokenized at a time: a bound on the memory of their tokens.
_CHUNK_SIZE = 1024
# As in tiktoken's own `encode_ordinary_batch`.
_THREADS = 8


@dataclass(frozen=True)
class _Model:
    name: str
    dims: tuple[int, ...]
    encoding: str
    max_length: int


# Dimensions: openai.com/index/new-embedding-models-and-api-updates, the table of MTEB scores by size.
# Encodings: tiktoken/model.py. Longest input: platform.openai.com/docs/api-reference/embeddings/create, "input".
_MODELS = {
    model.name: model
    for model in (
        _Model("text-embedding-3-small", (1536, 512), "cl100k_base", 8192),
        _Model("text-embedding-3-large", (3072, 1024, 256), "cl100k_base", 8192),
        # Not trained with Matryoshka loss: truncation costs it more than the others.
        _Model("text-embedding-ada-002", (1536,), "cl100k_base", 8192),
    )
}


class OpenAIEncoder(RemoteEncoder):
    """OpenAI's embedding models, and those of any server with the same API.

        encoder = OpenAIEncoder()                                  # text-embedding-3-small, key from OPENAI_API_KEY
        encoder = OpenAIEncoder("text-embedding-3-large", concurrency=8)
        encoder = OpenAIEncoder("org/name", base_url="http://localhost:8000/v1")  # vLLM, Ollama, Infinity, ...
        encoder.encode_documents(["a text"])                       # float32 [1, full_dim], unit rows
        encoder.encode_queries(["a question"], dim=512)            # float32 [1, 512], unit rows
        TwoStageRetriever(encoder, TwoStageIndex("./db", fingerprint=encoder.fingerprint))

    Full vectors are requested and truncated here, so that one request serves every dimension.

    Requests stay within the service's limits: for OpenAI's own models 2,048 inputs and 300,000 tokens, counted with
    tiktoken, which downloads its table once; for others 32 inputs and 100,000 characters. A request that is answered
    with 408, 409, 429 or 5xx, or not at all, is retried after the time the server asks for (`Retry-After`, up to two
    minutes), else after a wait that doubles. One that is refused with 400, 413 or 422 is sent again in halves, down to
    the text at fault. An empty text is sent as a space, as servers refuse it. A `CachedEncoder` keeps what was fetched
    before a failure.

    Any number of threads may call one encoder; together they have at most `concurrency` requests under way.
    A pickled encoder carries its arguments without the key, which it reads from the environment again.

    Args:
        model: the model's name, as the server knows it.
        api_key: the key; None for the one in `OPENAI_API_KEY`. Servers other than OpenAI's may not need one.
        base_url: the server's address; None for `OPENAI_BASE_URL` in the environment, else OpenAI's.
        full_dim: length of the model's vectors; None for that of a known model, else to learn it from the first answer.
        send_dimensions: have the server truncate the vectors (`dimensions`), so that it sends less.
        max_length: longest input in tokens, 1 to 8192; None for 8192. Only for OpenAI's own models: of others, only
            the server can count tokens, and it truncates or refuses what is too long.
        prompts: task -> prompt put before a text; none by default.
        concurrency: requests under way at a time.
        max_retries: how often a failed request is retried.
        timeout: seconds to wait for an answer.
        encoding_format: how vectors are sent: "base64" takes a third of the bytes. A server that refuses it, or
            answers with anything but float32 in it, is asked again with "float".

    Attributes:
        model: the model's name.
        max_length: longest input in tokens; None if only the server knows.
        prompts: task -> prompt.

    Raises:
        InvalidInput: an argument breaks its rule, or OpenAI is asked without a key.
        MissingExtra: `httpx` or `tiktoken` is not installed.
    """

    def __init__(
        self,
        model: str = "text-embedding-3-small",
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        full_dim: int | None = None,
        send_dimensions: bool = False,
        max_length: int | None = None,
        prompts: Mapping[Task, str] | None = None,
        concurrency: int = 4,
        max_retries: int = 6,
        timeout: float = 60.0,
        encoding_format: Literal["base64", "float"] = "base64",
    ) -> None:
        if encoding_format not in ("base64", "float"):
            raise InvalidInput(
                f"encoding_format is {encoding_format!r}; it must be 'base64' or 'float'. Pass one of them."
            )
        known = _MODELS.get(model)
        address = base_url or os.environ.get("OPENAI_BASE_URL") or _BASE_URL
        key = read_key(api_key, _KEY)
        if key is None and host_of(address) == host_of(_BASE_URL):
            raise InvalidInput(f"there is no API key, and {host_of(address)} asks for one. Pass api_key or set {_KEY}.")
        self._encoding = load_encoding(known.encoding, extra="openai") if known else None
        self._format: str = encoding_format
        self._base64_works = False
        super().__init__(
            model,
            base_url=address,
            home=_BASE_URL,
            key=key,
            variable=_KEY,
            extra="openai",
            dims=known.dims if known else (),
            headers={name: os.environ[variable] for name, variable in _HEADERS.items() if variable in os.environ},
            full_dim=full_dim,
            send_dimensions=send_dimensions,
            max_length=_pick_max_length(max_length, known, model),
            prompts=prompts,
            concurrency=concurrency,
            max_retries=max_retries,
            timeout=timeout,
        )

    def count_tokens(self, texts: Sequence[str], task: Task = "document") -> list[int] | None:
        """Return how many tokens each text has, its prompt counted; None for a model that only the server knows."""
        checked = check_texts(texts)
        if self._encoding is None:
            return None
        return [len(tokenize(self._encoding, with_prompt(text, self.prompts[task]))) for text in checked]

    def _prepare(self, texts: list[str], task: Task) -> Requests:
        inputs = [text or " " for text in texts]
        if self._encoding is None or self.max_length is None:
            costs = [len(text) for text in inputs]
            return Requests(inputs, list(request_batches(costs, _MAX_INPUTS_ELSEWHERE, MAX_CHARACTERS)), [])
        costs, overruns = [], []
        with ThreadPoolExecutor(_THREADS) as threads:
            for start in range(0, len(inputs), _CHUNK_SIZE):
                chunk = inputs[start : start + _CHUNK_SIZE]
                for position, ids in enumerate(threads.map(partial(tokenize, self._encoding), chunk), start):
                    costs.append(min(len(ids), self.max_length))
                    if len(ids) > self.max_length:
                        overruns.append(len(ids) - self.max_length)
                        with NATIVE_CODE:
                            inputs[position] = _cut(self._encoding, ids, self.max_length)
        return Requests(inputs, list(request_batches(costs, _MAX_INPUTS, _MAX_TOKENS)), overruns)

    def _ask(
        self, inputs: list[str], task: Task, dim: int | None, stop: threading.Event
    ) -> tuple[Reply, list[Any] | None]:
        # The length is learned from numbers: from bytes it can't be, without knowing their type.
        encoding = self._format if self._full_dim is not None else "float"
        reply, vectors = self._request(inputs, dim, encoding, stop)
        if encoding == "base64" and vectors is not None:
            self._base64_works = True
        elif encoding == "base64" and not self._base64_works and reply.status in (200, *REFUSED):
            again, vectors = self._request(inputs, dim, "float", stop)
            if vectors is not None:
                reply, self._format = again, "float"
        return reply, vectors

    def _request(
        self, inputs: list[str], dim: int | None, encoding: str, stop: threading.Event
    ) -> tuple[Reply, list[Any] | None]:
        body: dict[str, Any] = {"model": self.model, "input": inputs, "encoding_format": encoding}
        if dim is not None:
            body["dimensions"] = dim
        reply = self._connection.post("/embeddings", body, stop)
        if reply.status != 200:
            return reply, None
        width = self._full_dim if dim is None else dim
        try:
            data = json.loads(reply.text)["data"]
            order = _order([item.get("index") for item in data], self._connection.host)
            return reply, [_decode(data[i]["embedding"], width) for i in order]
        except (AttributeError, KeyError, TypeError, ValueError):
            return reply, None


def _pick_max_length(asked: int | None, known: _Model | None, model: str) -> int | None:
    if known is not None:
        return known.max_length if asked is None else check_integer("max_length", asked, 1, known.max_length)
    if asked is not None:
        raise InvalidInput(
            f"max_length is {asked!r}, and the tokens of {model!r} can't be counted here. Leave it out, and set the "
            "limit where the model is served."
        )
    return None


def _cut(encoding: tiktoken.Encoding, ids: list[int], max_length: int) -> str:
    """Return the text of the first `max_length` tokens, in whole characters."""
    kept = max_length
    while True:
        text = encoding.decode_bytes(ids[:kept]).decode(errors="ignore")
        # The end of the shorter text may be split differently, into a token more.
        if len(tokenize(encoding, text)) <= max_length:
            return text or " "
        kept -= 1


def _order(indexes: list[Any], host: str) -> list[int]:
    """Return the position of each text's vector in an answer, from its `index` values; some servers send strings.

    Raises:
        RemoteEncoderError: a text has no vector, or several.
    """
    if len(set(map(str, indexes))) <= 1:
        # The server doesn't number its vectors: they are in the order of the texts.
        return list(range(len(indexes)))
    try:
        places = {int(index): position for position, index in enumerate(indexes)}
        return [places[text] for text in range(len(indexes))]
    except (KeyError, TypeError, ValueError):
        raise RemoteEncoderError(
            f"{host} gave vectors with index {', '.join(map(repr, indexes[:8]))}{', ...' if indexes[8:] else ''}; each "
            f"from 0 to {len(indexes) - 1} is needed once, to tell which vector belongs to which text. Report it to "
            "whoever runs the server."
        ) from None


def _decode(embedding: Any, width: int | None) -> Any:
    """Return a vector as numbers, from base64 of little-endian float32 or from numbers.

    Raises:
        ValueError: it is base64 of something else.
    """
    if not isinstance(embedding, str):
        return embedding
    data = base64.b64decode(embedding, validate=True)
    if width is None or len(data) != 4 * width:
        raise ValueError(f"{len(data)} bytes are no {width} numbers of float32")
    return np.frombuffer(data, dtype="<f4")
