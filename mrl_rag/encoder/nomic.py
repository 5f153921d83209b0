"""`NomicEncoder`: texts to vectors, over Nomic's API."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from mrl_rag.arguments import check_integer
from mrl_rag.encoder.connection import Reply, host_of, read_key
from mrl_rag.encoder.remote import MAX_CHARACTERS, RemoteEncoder, Requests, request_batches
from mrl_rag.errors import InvalidInput
from mrl_rag.tasks import Task
from mrl_rag.truncation import Float32Array, layer_norm

_BASE_URL = "https://api-atlas.nomic.ai/v1"
_KEY = "NOMIC_API_KEY"
# MAX_TEXT_REQUEST_SIZE of the official client, github.com/nomic-ai/nomic, nomic/embed.py
_MAX_INPUTS = 50
# docs.nomic.ai/reference/api/embed-text-v-1-embedding-text-post, "max_tokens_per_text"
_MAX_LENGTH = 8192

# docs.nomic.ai/atlas/models/text-embedding
_DIMS = {
    "nomic-embed-text-v1": (768,),
    "nomic-embed-text-v1.5": (768, 512, 256, 128, 64),
    "gte-multilingual-base": (768,),
}
# Model card of nomic-embed-text-v1.5, "Adjusting dimensionality": layer norm, then the cut.
_LAYER_NORM = {"nomic-embed-text-v1.5"}
# docs.nomic.ai/reference/api/embed-text-v-1-embedding-text-post, "task_type"
_TASK_TYPES: dict[Task, str] = {
    "query": "search_query",
    "document": "search_document",
    "classification": "classification",
    "clustering": "clustering",
}


class NomicEncoder(RemoteEncoder):
    """Nomic's embedding models, over Nomic's API.

        encoder = NomicEncoder()                                   # nomic-embed-text-v1.5, key from NOMIC_API_KEY
        encoder.encode_documents(["a text"])                       # float32 [1, 768], unit rows
        encoder.encode_queries(["a question"], dim=64)             # float32 [1, 64], unit rows
        encoder.encode(["a text"], task="clustering", dim=256)     # the API's task_type
        TwoStageRetriever(encoder, TwoStageIndex("./db", fingerprint=encoder.fingerprint))

    The task is sent as the API's `task_type`, and the service puts that task's prefix before each text. A text that
    has the prefix already is sent without it.

    Full vectors are requested and truncated here, so that one request serves every dimension. Before that, vectors of
    v1.5 are layer-normed, as its model card asks; on vectors that the server has layer-normed it changes nothing.

    Requests carry at most 50 inputs and 100,000 characters. Retries and refused texts are as for `OpenAIEncoder`.

    Any number of threads may call one encoder; together they have at most `concurrency` requests under way.
    A pickled encoder carries its arguments without the key, which it reads from the environment again.

    Args:
        model: the model's name, as the API knows it.
        api_key: the key; None for the one in `NOMIC_API_KEY`.
        base_url: the server's address.
        full_dim: length of the model's vectors; None for that of a known model, else to learn it from the first answer.
        send_dimensions: have the server truncate the vectors (`dimensionality`), so that it sends less.
        max_length: longest input in tokens, 1 to 8192; None for 8192. The service truncates without saying so: there
            is no warning.
        prompts: task -> prompt put before a text, after the service's own prefix; none by default.
        concurrency: requests under way at a time.
        max_retries: how often a failed request is retried.
        timeout: seconds to wait for an answer.

    Attributes:
        model: the model's name.
        max_length: longest input in tokens.
        prompts: task -> prompt, the service's own prefixes left out.

    Raises:
        InvalidInput: an argument breaks its rule, or there is no key.
        MissingExtra: `httpx` is not installed.
    """

    def __init__(
        self,
        model: str = "nomic-embed-text-v1.5",
        *,
        api_key: str | None = None,
        base_url: str = _BASE_URL,
        full_dim: int | None = None,
        send_dimensions: bool = False,
        max_length: int | None = None,
        prompts: Mapping[Task, str] | None = None,
        concurrency: int = 4,
        max_retries: int = 6,
        timeout: float = 60.0,
    ) -> None:
        key = read_key(api_key, _KEY)
        if key is None:
            raise InvalidInput(
                f"there is no API key, and {host_of(base_url)} asks for one. Pass api_key or set {_KEY}."
            )
        super().__init__(
            model,
            base_url=base_url,
            home=_BASE_URL,
            key=key,
            variable=_KEY,
            extra="nomic",
            dims=_DIMS.get(model, ()),
            full_dim=full_dim,
            send_dimensions=send_dimensions,
            max_length=_MAX_LENGTH if max_length is None else check_integer("max_length", max_length, 1, _MAX_LENGTH),
            prompts=prompts,
            concurrency=concurrency,
            max_retries=max_retries,
            timeout=timeout,
        )

    def _prepare(self, texts: list[str], task: Task) -> Requests:
        prefix = f"{_TASK_TYPES[task]}: "
        inputs = [text.removeprefix(prefix) or " " for text in texts]
        return Requests(inputs, list(request_batches([len(i) for i in inputs], _MAX_INPUTS, MAX_CHARACTERS)), [])

    def _ask(
        self, inputs: list[str], task: Task, dim: int | None, stop: threading.Event
    ) -> tuple[Reply, list[Any] | None]:
        body: dict[str, Any] = {
            "model": self.model,
            "texts": inputs,
            "task_type": _TASK_TYPES[task],
            "long_text_mode": "truncate",
            "max_tokens_per_text": self.max_length,
        }
        if dim is not None:
            body["dimensionality"] = dim
        reply = self._connection.post("/embedding/text", body, stop)
        try:
            return reply, list(json.loads(reply.text)["embeddings"]) if reply.status == 200 else None
        except (KeyError, TypeError, ValueError):
            return reply, None

    def _finish(self, rows: Float32Array) -> Float32Array:
        return layer_norm(rows) if self.model in _LAYER_NORM else rows
