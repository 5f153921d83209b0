"""A Chroma server that is slow, restarted or out of reach for a while: what is sent again, and for how long."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial, wraps
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar

from mrl_rag.arguments import check_integer
from mrl_rag.compat.chroma import address_of, async_server, is_remote, limit_silence, says_race, status_of, with_server
from mrl_rag.errors import InvalidInput, ServerUnavailable, TwoStageIndexError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    import httpx
    from chromadb.api import ClientAPI
    from tenacity import RetryCallState

Retrier = TypeVar("Retrier")

# Seconds between two attempts: before the second, at most, and a random part, so that clients that failed together
# don't come back together.
_FIRST_WAIT, _MAX_WAIT, _JITTER = 0.25, 5.0, 0.5
# Calls of chromadb's server API that may arrive twice. Reads change nothing; a record is written whole, by its id;
# deleting an unknown id does nothing; name, metadata and configuration of a collection, addressed by its id, are set to
# given values. If another client writes the same between both arrivals, ours comes last, as it could have anyway: it
# had not returned.
_REPEATABLE = frozenset(
    {
        *("_count", "_get", "_query", "_upsert", "_delete", "_modify"),
        *("get_collection", "get_or_create_collection", "list_collections", "get_max_batch_size"),
    }
)
# Calls that are only sent again if the first wasn't carried out: of two, the second creation would fail, and the second
# deletion could hit a collection that another client has made under the name meanwhile.
_ONCE = frozenset({"create_collection", "delete_collection"})
# HTTP statuses: of a request that was refused unread, and of one that may succeed later.
_REFUSED, _TEMPORARY = 429, (408, 429, 502, 503, 504)
# How often a request is sent again whose records were just being written.
_MAX_RACES = 3
# Characters of an answer that an error quotes.
_MAX_QUOTED = 300


@dataclass(frozen=True)
class RetryPolicy:
    """How long an index waits for its Chroma server.

        TwoStageIndex(client=client, retries=RetryPolicy(attempts=3, seconds=10))    # give up sooner
        TwoStageIndex(client=client, retries=RetryPolicy(attempts=1))                # at once

    A request is sent again if it isn't answered, or with HTTP status 408, 429, 502, 503 or 504, or if other writers
    keep the server's database locked: after 0.25, 0.5, 1, 2 and 4 seconds, then every 5, each time up to half a second
    later.

    Attributes:
        attempts: how often a request is sent at most, 1 or more.
        seconds: no attempt begins later than this after the first. So a call takes at most as long as this and
            `timeout` together, unless answers come in drips.
        timeout: seconds of silence on the connection after which an attempt has failed.

    Raises:
        InvalidInput: `attempts` is not an integer of at least 1, or another is not a positive number.
    """

    attempts: int = 30
    seconds: float = 120.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        check_integer("attempts", self.attempts, 1)
        for name in ("seconds", "timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
                raise InvalidInput(f"{name} is {value!r}; it must be a positive number of seconds.")


def check_retries(policy: object) -> RetryPolicy | None:
    """Return a policy, or None for the default.

    Raises:
        InvalidInput: it is something else.
    """
    if not isinstance(policy, RetryPolicy | None):
        raise InvalidInput(f"retries is {policy!r}; it must be a RetryPolicy, as in RetryPolicy(attempts=3).")
    return policy


def with_retries(client: ClientAPI, policy: RetryPolicy) -> ClientAPI:
    """Return a client like this one, whose requests are sent again as a policy says; one without a server as it is.

    The connection of the client that was given gets the policy's timeout, if it has none: chromadb would wait forever.
    """
    if not is_remote(client.get_settings()):
        return client
    limit_silence(client, policy.timeout)
    return with_server(client, lambda server: RetryingServer(server, policy))


class RetryingServer:
    """Chromadb's connection to a server, whose calls are made again if the server doesn't answer.

    Args:
        server: chromadb's.
        policy: how often and how long.

    Raises:
        ServerUnavailable: by a call, once the policy is exhausted.
        TwoStageIndexError: by a call, if something else than Chroma answers.
    """

    def __init__(self, server: Any, policy: RetryPolicy) -> None:
        self._server = server
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_server":  # asked of a copy that isn't filled yet
            raise AttributeError(name)
        attribute = getattr(self._server, name)
        if name not in _REPEATABLE and name not in _ONCE:
            return attribute
        return self._retried(attribute, _may_pass if name in _REPEATABLE else _was_refused)

    def _retried(self, call: Callable[..., Any], temporary: Callable[[BaseException], bool]) -> Callable[..., Any]:
        from tenacity import Retrying

        def attempt(*args: Any, **kwargs: Any) -> Any:
            with _statuses():
                return call(*args, **kwargs)

        @wraps(call)
        def retried(*args: Any, **kwargs: Any) -> Any:
            with self._failures() as attempts:
                return self._retrier(Retrying, temporary, attempts)(attempt, *args, **kwargs)

        return retried

    def _retrier(
        self, kind: Callable[..., Retrier], temporary: Callable[[BaseException], bool], attempts: list[int]
    ) -> Retrier:
        from tenacity import (
            retry_any,
            retry_if_exception,
            stop_after_attempt,
            stop_before_delay,
            wait_exponential,
            wait_random,
        )

        return kind(
            stop=stop_after_attempt(self._policy.attempts) | stop_before_delay(self._policy.seconds),
            wait=wait_exponential(multiplier=_FIRST_WAIT, max=_MAX_WAIT) + wait_random(0, _JITTER),
            retry=retry_any(retry_if_exception(temporary), _raced),
            before=lambda state: attempts.append(state.attempt_number),
            reraise=True,
        )

    @contextmanager
    def _failures(self) -> Iterator[list[int]]:
        """Translate what the last attempt raised; the caller fills the list that this yields, an entry per attempt."""
        attempts: list[int] = []
        start = time.monotonic()
        try:
            yield attempts
        except Exception as error:
            if _may_pass(error):
                tried = "an attempt" if len(attempts) == 1 else f"{len(attempts)} attempts"
                said = str(error) if isinstance(error, _BadStatus) else f"{type(error).__name__}: {error}"
                raise ServerUnavailable(
                    f"the Chroma server at {address_of(self._server)} didn't answer {tried} in "
                    f"{time.monotonic() - start:.1f} s ({said}). Check that it runs and can "
                    "be reached, then call again: what was stored before is there, and storing it again does no "
                    "harm. TwoStageIndex(retries=RetryPolicy(...)) sets how long to wait."
                ) from error
            if not isinstance(error, _BadStatus):
                raise
            raise TwoStageIndexError(
                f"{address_of(self._server)} answered, not as a Chroma server does: {error}. Check the client's host, "
                "port, ssl and headers."
            ) from error


class AsyncRetryingServer(RetryingServer):
    """The same for chromadb's async connection: its calls are coroutines."""

    def _retried(self, call: Callable[..., Any], temporary: Callable[[BaseException], bool]) -> Callable[..., Any]:
        from tenacity import AsyncRetrying

        async def attempt(*args: Any, **kwargs: Any) -> Any:
            with _statuses():
                return await call(*args, **kwargs)

        @wraps(call)
        async def retried(*args: Any, **kwargs: Any) -> Any:
            with self._failures() as attempts:
                return await self._retrier(AsyncRetrying, temporary, attempts)(attempt, *args, **kwargs)

        return retried


class _BadStatus(Exception):
    """An answer that isn't Chroma's, or a refusal because of too many requests.

    Args:
        status: its HTTP status.
        said: its text.
    """

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"HTTP status {status}, {said[:_MAX_QUOTED]}")
        self.status = status


@contextmanager
def _statuses() -> Iterator[None]:
    """Raise `_BadStatus` for such an answer, at once: an error that is raised again forgets what it came from."""
    try:
        yield
    except Exception as error:
        status = status_of(error)
        if status is None:
            raise
        raise _BadStatus(status, str(error)) from error


def _may_pass(error: BaseException) -> bool:
    """Return whether a request that failed like this may succeed later."""
    import httpx

    if isinstance(error, _BadStatus):
        return error.status in _TEMPORARY
    return isinstance(error, httpx.TransportError) and not isinstance(
        error, httpx.UnsupportedProtocol | httpx.LocalProtocolError
    )


def _raced(state: RetryCallState) -> bool:
    """Return whether the last attempt may have met another client's write; not often, as the records may be damaged."""
    error = None if state.outcome is None else state.outcome.exception()
    return error is not None and says_race(error) and state.attempt_number <= _MAX_RACES


def _was_refused(error: BaseException) -> bool:
    """Return whether a request that failed like this was not carried out, and may succeed later."""
    import httpx

    if isinstance(error, _BadStatus):
        return error.status == _REFUSED
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)


class AsyncConnections:
    """Chromadb's async connections to a client's server: one per event loop, as an async connection is bound to it.

    Each is made at its first use, with the client's settings, and closed when its loop ends by `asyncio.run` or a
    framework that ends loops as that does.

    Args:
        client: a client of a server.
        policy: how often and how long calls are made again.
    """

    def __init__(self, client: ClientAPI, policy: RetryPolicy) -> None:
        self._client = client
        self._policy = policy
        self._opened: dict[AbstractEventLoop, tuple[Any, AsyncGenerator[None, None]]] = {}

    async def server(self) -> Any:
        """Return the connection of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._opened:
            self._opened = {other: held for other, held in self._opened.items() if not other.is_closed()}
            server, http = async_server(self._client, self._policy.timeout)
            until_end = self._closed_with(loop, http)
            self._opened[loop] = AsyncRetryingServer(server, self._policy), until_end
            await anext(until_end)
        return self._opened[loop][0]

    async def _closed_with(self, loop: AbstractEventLoop, http: httpx.AsyncClient) -> AsyncGenerator[None, None]:
        """Close the connection when this generator is closed, which `asyncio.run` does with all at its end."""
        try:
            yield
        finally:
            self._opened.pop(loop, None)
            await http.aclose()

    def close(self) -> None:
        """Have each loop close its connection."""
        for loop, (_, until_end) in list(self._opened.items()):
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(partial(_close_soon, loop, until_end))


_CLOSING: set[asyncio.Task[None]] = set()


def _close_soon(loop: AbstractEventLoop, until_end: AsyncGenerator[None, None]) -> None:
    # The loop itself keeps only a weak reference to a task.
    task = loop.create_task(until_end.aclose())
    _CLOSING.add(task)
    task.add_done_callback(_CLOSING.discard)
