"""`Connection`: JSON requests to a server, with retries, and errors that quote the server."""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from mrl_rag.errors import InvalidInput, RemoteEncoderError
from mrl_rag.extras import require

if TYPE_CHECKING:
    import httpx

# Seconds: before the first retry, and before any; the longest wait that a server may ask for.
_FIRST_WAIT_S, _MAX_WAIT_S, _MAX_RETRY_AFTER_S = 0.5, 8.0, 120.0
# Statuses with which servers refuse a text that is too long, or too many texts.
REFUSED = (400, 413, 422)
# Characters of a server's message that an error quotes.
_MAX_QUOTED = 500


class Reply(NamedTuple):
    """What a server answered.

    Attributes:
        status: its HTTP status; None when no answer came.
        text: the body, or what went wrong on the way.
    """

    status: int | None
    text: str


class Connection:
    """Sends JSON to a server, and retries where that may help.

    A request that is answered with 408, 409, 429 or 5xx, or not at all, is sent again after the time the server asks
    for (`Retry-After`, up to two minutes), else after a wait that doubles.

    Args:
        base_url: the server's address.
        key: the API key; None for a server that needs none.
        variable: the environment variable the key is read from.
        extra: the extra of this distribution that brings httpx.
        headers: sent with every request, in addition to the key.
        timeout: seconds to wait for an answer.
        max_retries: how often a failed request is retried.

    Raises:
        MissingExtra: `httpx` is not installed.
    """

    _client: httpx.Client | None

    def __init__(
        self,
        base_url: str,
        key: str | None,
        variable: str,
        *,
        extra: str,
        timeout: float,
        max_retries: int,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.host = host_of(base_url)
        self._key = key
        self._variable = variable
        self._max_retries = max_retries
        self._httpx = require("httpx", extra=extra)
        self._connect = partial(
            self._httpx.Client,
            base_url=base_url,
            headers=dict(headers or {}) | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=timeout,
            follow_redirects=True,
        )
        self.reset()

    def post(self, path: str, body: dict[str, Any], stop: threading.Event) -> Reply:
        """Return the answer to a request, after retries the last one.

        Args:
            path: relative to `base_url`.
            body: sent as JSON.
            stop: once it is set, nothing more is sent.

        Raises:
            CancelledError: `stop` was set before anything was sent.
        """
        if stop.is_set():
            raise CancelledError
        with self._lock:
            self._client = client = self._client or self._connect()
        attempt = 0
        while True:
            headers: Mapping[str, str] = {}
            try:
                answer = client.post(path, json=body)
                reply, headers = Reply(answer.status_code, answer.text), answer.headers
            except self._httpx.RequestError as error:
                reply = Reply(None, f"{type(error).__name__}: {error}")
            delay = retry_delay(reply.status, headers, attempt) if attempt < self._max_retries else None
            if delay is None or stop.wait(delay):
                return reply
            attempt += 1

    def failure(self, reply: Reply, text: str) -> RemoteEncoderError:
        """Return the error for a reply without vectors; the key is removed from it.

        Args:
            reply: what came.
            text: a description of the text, where one was sent alone; else "".
        """
        said = _message_in(reply.text)
        if self._key:
            said = said.replace(self._key, "[key]")
        happened = "didn't answer" if reply.status is None else f"answered {reply.status}"
        if reply.status == 200:
            happened = "answered 200, but with something that can't be read as embeddings"
        elif text and reply.status in REFUSED:
            happened += f" to {text}"
        remedy = _remedy(reply.status, self._variable)
        return RemoteEncoderError(f"{self.host} {happened}: {said[:_MAX_QUOTED].rstrip('. ')}. {remedy}")

    def reset(self) -> None:
        """Open a new connection for the next request: in a forked child, which must not share the parent's."""
        self._lock = threading.Lock()
        self._client = None

    def close(self) -> None:
        """Close what is connected."""
        if self._client is not None:
            self._client.close()


def retry_delay(status: int | None, headers: Mapping[str, str], attempt: int) -> float | None:
    """Return the seconds to wait before the next attempt; None where a retry can't help.

    Args:
        status: HTTP status; None when no answer came.
        headers: those of the answer.
        attempt: number of attempts before this one.
    """
    if status is not None and status < 500 and status not in (408, 409, 429):
        return None
    # OpenAI's own header: 429 also stands for a quota that is used up.
    if headers.get("x-should-retry") == "false":
        return None
    asked = _retry_after(headers)
    if asked is not None:
        return max(asked, 0.0) if asked <= _MAX_RETRY_AFTER_S else None
    # Jitter, so that requests that failed together don't come back together.
    wait = min(_FIRST_WAIT_S * 2.0 ** min(attempt, 10), _MAX_WAIT_S)
    return wait * (1 - 0.25 * random.random())


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Read `retry-after-ms`, else `Retry-After` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        try:
            seconds = float(value) / unit if value else math.nan
        except ValueError:
            seconds = math.nan
        if not math.isnan(seconds):
            return seconds
    try:
        return parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time()
    except ValueError:
        return None


def read_key(api_key: str | None, variable: str) -> str | None:
    """Return the key given, else the one in the environment, else None.

    Raises:
        InvalidInput: it can't be sent in a header. The message doesn't contain it.
    """
    key = api_key or os.environ.get(variable) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidInput(
            f"the API key holds a space, a line break or a sign outside ASCII; a header can't carry that. "
            f"Pass api_key or set {variable} without it."
        )
    return key


def host_of(base_url: str) -> str:
    """Return the host of a server's address.

    Raises:
        InvalidInput: it is no http address.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput(
            f"base_url is {base_url!r}; it must be an address such as 'http://localhost:8000/v1'. Write it in full."
        )
    return parts.hostname


def server_of(base_url: str) -> str:
    """Return host, port and path of a server's address, the same for all spellings of it.

    Raises:
        InvalidInput: it is no http address.
    """
    host, parts = host_of(base_url), urlsplit(base_url)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except ValueError as error:
        raise InvalidInput(f"base_url is {base_url!r}; its port must be a number from 0 to 65535.") from error
    return f"{host}:{port}{parts.path.rstrip('/')}"


def _remedy(status: int | None, variable: str) -> str:
    if status is None:
        return "Check base_url and the network, then call again; a CachedEncoder keeps what was fetched."
    if status == 200:
        return "Check base_url, and that the model is an embedding model there."
    if status in (401, 403):
        return f"A key that may use this model is needed: pass api_key or set {variable}."
    if status == 404:
        return "A model and an address the server knows are needed: check model and base_url."
    if status == 429:
        return "Wait, lower concurrency or raise the quota, then call again; a CachedEncoder keeps what was fetched."
    if status >= 500 or status in (408, 409):
        return "Call again later; a CachedEncoder keeps what was fetched."
    return "The server takes no such request: check model, dimensions and the text's length."


def _message_in(body: str) -> str:
    """Return the message in an error's body: `error.message`, `error`, `message` or `detail`, else all of it."""
    try:
        found = json.loads(body)
    except ValueError:
        return body
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)
