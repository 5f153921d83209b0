"""One server and the way to it: requests that are tried again, and errors in the server's own words."""

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

# Seconds before the first retry, and at most; a longer wait asked for by the server is not worth waiting.
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_ASKED = 0.5, 8.0, 120.0
# What servers answer where one text of several is too long, or they are too many.
REFUSED = (400, 413, 422)
# How much of a server's own words an error repeats.
_QUOTED = 500


class Reply(NamedTuple):
    """What a server answered.

    Attributes:
        status: its HTTP status; None when no answer came.
        text: the body, or what went wrong on the way.
    """

    status: int | None
    text: str


class Connection:
    """Sends JSON to a server, again where that may help.

    What is answered with 408, 409, 429 or 5xx, or not at all, is sent again after the time the server names
    (`Retry-After`, up to two minutes), else after a wait that doubles.

    Args:
        base_url: the server's address.
        key: the API key; None for a server that wants none.
        variable: the environment variable the key is read from.
        extra: the extra of this distribution that brings httpx.
        headers: sent with every request, beside the key.
        timeout: seconds to wait for an answer.
        max_retries: how often a failed request is tried again.

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
        self.renew()

    def post(self, path: str, body: dict[str, Any], stop: threading.Event) -> Reply:
        """Return the answer to a request, the last one where it was tried again.

        Args:
            path: below the server's address.
            body: what is sent, as JSON.
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
        """Make the error for a reply of no use; the key is struck out of it.

        Args:
            reply: what came.
            text: which text was sent, where it was sent alone; else "".
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
        return RemoteEncoderError(f"{self.host} {happened}: {said[:_QUOTED].rstrip('. ')}. {remedy}")

    def renew(self) -> None:
        """Connect anew for the next request: after a fork, parent and child would read each other's answers."""
        self._lock = threading.Lock()
        self._client = None

    def close(self) -> None:
        """Close what is connected."""
        if self._client is not None:
            self._client.close()


def retry_delay(status: int | None, headers: Mapping[str, str], attempt: int) -> float | None:
    """Return the seconds to wait before the next attempt; None when another is of no use.

    Args:
        status: HTTP status; None when no answer came.
        headers: those of the answer.
        attempt: attempts made before this one.
    """
    if status is not None and status < 500 and status not in (408, 409, 429):
        return None
    # OpenAI's own header: a quota that is used up answers 429, too.
    if headers.get("x-should-retry") == "false":
        return None
    asked = _retry_after(headers)
    if asked is not None:
        return max(asked, 0.0) if asked <= _LONGEST_ASKED else None
    # Jitter keeps requests that failed together from coming back together.
    wait = min(_FIRST_WAIT * 2.0 ** min(attempt, 10), _LONGEST_WAIT)
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
        InvalidInput: it can't be sent in a header. The message doesn't show it.
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
    """Return host, port and path of a server's address: which server it is, however the address is spelled.

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
        return "Check base_url and the network, then call again: what was fetched is kept."
    if status == 200:
        return "Check base_url, and that the model is an embedding model there."
    if status in (401, 403):
        return f"A key that may use this model is needed: pass api_key or set {variable}."
    if status == 404:
        return "A model and an address the server knows are needed: check model and base_url."
    if status == 429:
        return "Wait, lower concurrency or raise the quota, then call again: what was fetched is kept."
    if status >= 500 or status in (408, 409):
        return "Call again later: what was fetched is kept."
    return "The server takes no such request: check model, dimensions and the text's length."


def _message_in(body: str) -> str:
    """Find the words in an error's body: `error.message`, `error`, `message` or `detail`, else all of it."""
    try:
        found = json.loads(body)
    except ValueError:
        return body
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)
