"""Texts in, vectors out, by Nomic's API: `NomicEncoder`."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from mrl_rag.arguments import check_integer
from mrl_rag.encoder.connection import Connection, Reply, host_of, read_key, server_of
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
    """Nomic's embedding models, by Nomic's own API.

        encoder = NomicEncoder()                                   # nomic-embed-text-v1.5, key from NOMIC_API_KEY
        encoder.encode_documents(["a text"])                       # float32 [1, 768], unit rows
        encoder.encode_queries(["a question"], dim=64)             # float32 [1, 64], unit rows
        encoder.encode(["a text"], task="clustering", dim=256)     # the API's task_type
        TwoStageRetriever(encoder, TwoStageIndex("./db", fingerprint=encoder.fingerprint))

    The task goes along as the API's `task_type`, and the service puts that task's prefix before each text. A text that
    carries the prefix already is sent without it, so that it doesn't get it twice.

    Full vectors are asked for and cut here, so that one request serves every dimension. Before the cut, the vectors of
    v1.5 are layer-normed, as its model card has it; doing that to vectors that are already changes nothing.

    Requests carry 50 inputs and 100,000 characters at most. What the server answers with 408, 409, 429 or 5xx, or
    doesn't answer, is tried again after the time it names (`Retry-After`, up to two minutes), else after a wait that
    doubles. What it refuses with 400, 413 or 422 is sent again in halves, down to the text that is at fault. After a
    failure for good, what was fetched is kept: see `encode`.

    Any number of threads may call one encoder; together they have no more than `concurrency` requests under way.
    A pickled encoder carries its settings, never the key: it reads that from the environment again.

    Args:
        model: the model's name, as the API knows it.
        api_key: the key; None for the one in `NOMIC_API_KEY`.
        base_url: the server's address.
        full_dim: length of the model's vectors; None to learn it from the first answer, where it isn't known.
        send_dimensions: have the server cut the vectors (`dimensionality`) and send less.
        max_length: longest input in tokens, 1 to 8192; None for 8192. The service counts and cuts, and doesn't say
            that it did: there is no warning.
        prompts: task -> prompt put before a text, after the service's own prefix; none by default.
        concurrency: requests under way at a time.
        max_retries: how often a failed request is tried again.
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
        dims = _DIMS.get(model, ())
        if send_dimensions and len(dims) == 1:
            raise InvalidInput(
                f"send_dimensions is on, and {model!r} has one dimension; the server would refuse. "
                "Leave it off: the vectors are then cut here."
            )
        server = server_of(base_url)
        key = read_key(api_key, _KEY)
        if key is None:
            raise InvalidInput(
                f"there is no API key, and {host_of(base_url)} asks for one. Pass api_key or set {_KEY}."
            )
        super().__init__(
            model=model,
            connection=Connection(
                base_url,
                key,
                _KEY,
                extra="nomic",
                timeout=timeout,
                max_retries=check_integer("max_retries", max_retries, 0),
            ),
            server=None if server == server_of(_BASE_URL) else server,
            full_dim=dims[0] if full_dim is None and dims else full_dim,
            dims=dims,
            max_length=_MAX_LENGTH if max_length is None else check_integer("max_length", max_length, 1, _MAX_LENGTH),
            prompts=prompts,
            send_dimensions=send_dimensions,
            concurrency=concurrency,
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
