"""chromadb: its clients and their connections, the causes of its errors, and its command."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mrl_rag.errors import ServerUnavailable

if TYPE_CHECKING:
    import httpx
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection
    from chromadb.config import Settings

# The program of the `chroma` command, whose script may be in a folder that this process doesn't know.
COMMAND = "import chromadb_rust_bindings, sys; chromadb_rust_bindings.cli(sys.argv)"
TESTED = ">=1.5.9,<1.6"
# Connections of one event loop to a server, unless the client's settings name a number. httpcore looks at all of them
# at each request: with 100, a hundred searches at once take two to four times as long as with 8.
_MAX_CONNECTIONS = 8

# What SQLite says within an error of Chroma's: the folder can't be written; a pattern has more than 50,000 bytes, or a
# regular expression takes too much memory; other writers don't let this one in within seconds.
_NOT_WRITABLE = ("readonly database", "database or disk is full", "disk I/O error", "unable to open database file")
_BUSY = "database is locked"
# A read met a record that another client was just writing or deleting: Chroma's two stores of it differed.
_RACE = "Error finding id"
_TOO_LARGE = ("LIKE or GLOB pattern too complex", "(code: 1043)")


def settings_of(collection: Collection) -> Settings | None:
    """Return the settings of a collection's client; None where this version doesn't tell, and a caller must."""
    client = getattr(collection, "_client", None)
    return None if client is None else client.get_settings()


def is_open(folder: str) -> bool:
    """Say whether a client of this process has a folder open; False where this version doesn't tell."""
    from chromadb.api.shared_system_client import SharedSystemClient

    return folder in getattr(SharedSystemClient, "_identifier_to_refcount", {})


def forget_folder(folder: str) -> object:
    """Have the next client open a folder anew, and return what Chroma would have shared with it.

    Chroma keeps a system that failed to start, and in a forked process its parent's. Where this version keeps them
    elsewhere, nothing is done: the folder can then be opened in a new process.
    """
    from chromadb.api.shared_system_client import SharedSystemClient

    getattr(SharedSystemClient, "_identifier_to_refcount", {}).pop(folder, None)
    return getattr(SharedSystemClient, "_identifier_to_system", {}).pop(folder, None)


def is_panic(error: BaseException) -> bool:
    """Say whether Chroma's Rust core panicked. Such an error is no `Exception`, and its class can't be imported.

    Where this version names it otherwise, it passes through as it is.
    """
    return type(error).__name__ == "PanicException"


def says_not_writable(message: str) -> bool:
    """Say whether an error is about the disk or its permissions; otherwise it is shown as any other."""
    return any(words in message for words in _NOT_WRITABLE)


def says_too_large(message: str) -> bool:
    """Say whether an error is about a condition with too long a string; otherwise it is shown as any other."""
    return any(words in message for words in _TOO_LARGE)


def is_remote(settings: Settings) -> bool:
    """Say whether a client with these settings speaks to a server."""
    return bool(settings.chroma_server_host)


@contextmanager
def reaching(host: str) -> Iterator[None]:
    """Translate what chromadb raises when it makes a client of a server that it can't reach.

    Raises:
        ServerUnavailable: instead of that.
    """
    import httpx

    try:
        yield
    except (ValueError, httpx.TransportError) as error:
        if isinstance(error, ValueError) and not isinstance(error.__context__, httpx.TransportError):
            raise
        raise ServerUnavailable(
            f"the Chroma server at {host} can't be reached ({error}). Check that it runs there, and the port."
        ) from error


def with_server(client: ClientAPI, wrap: Callable[[Any], Any]) -> ClientAPI:
    """Return a client like this one, with `wrap(server)` for its connection to the server.

    Where this version keeps it elsewhere, the client itself: requests are then sent once.
    """
    server = getattr(client, "_server", None)
    if server is None:
        return client
    wrapped = copy.copy(client)
    wrapped._server = wrap(server)  # type: ignore[attr-defined]
    return wrapped


def limit_silence(client: ClientAPI, seconds: float) -> None:
    """Have a client's requests fail after so many seconds without a byte, if it has no timeout yet.

    Where this version keeps the connection elsewhere, it waits as long as Chroma does.
    """
    import httpx

    session = getattr(getattr(client, "_server", None), "_session", None)
    if isinstance(session, httpx.Client) and session.timeout == httpx.Timeout(None):
        session.timeout = httpx.Timeout(seconds)


def async_server(client: ClientAPI, timeout: float) -> tuple[Any, httpx.AsyncClient]:
    """Return what `chromadb.AsyncHttpClient` uses to speak to the server of a sync client, for the running event loop.

    Chromadb makes one `httpx.AsyncClient` per loop for all servers together, with the headers of the first, without
    its auth provider's, without a timeout, and without checking certificates. Here it has one of its own with the
    client's headers; whoever calls this closes it.

    Args:
        client: a client of a server.
        timeout: seconds of silence after which a request has failed.
    """
    import httpx
    from chromadb.api import AsyncServerAPI
    from chromadb.config import System

    settings = client.get_settings().model_copy(update={"chroma_api_impl": "chromadb.api.async_fastapi.AsyncFastAPI"})
    server: Any = System(settings).instance(AsyncServerAPI)  # type: ignore[type-abstract]
    verify = settings.chroma_server_ssl_verify
    if verify is None:
        # httpx reads the certificates, which takes a tenth of a second, also for a server that needs none.
        verify = server.get_api_url().startswith("https:")
    limits = server.http_limits
    most = limits.max_connections or _MAX_CONNECTIONS
    http = httpx.AsyncClient(
        headers=client._server.get_request_headers(),  # type: ignore[attr-defined]
        timeout=httpx.Timeout(timeout, pool=None),
        verify=verify,
        limits=httpx.Limits(
            max_connections=most,
            max_keepalive_connections=limits.max_keepalive_connections or most,
            keepalive_expiry=limits.keepalive_expiry,
        ),
    )
    server._clients = {hash(asyncio.get_running_loop()): http}
    return server, http


def address_of(server: Any) -> str:
    """Return the address of a connection's server, for messages."""
    return str(server.get_api_url()).partition("/api/")[0]


def says_race(error: BaseException) -> bool:
    """Say whether a read may have failed because another client wrote the same records; else it fails each time."""
    from chromadb.errors import InternalError

    return isinstance(error, InternalError) and _RACE in str(error)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an answer that chromadb has raised as an error; None for Chroma's own errors.

    Chromadb raises a bare `Exception` for an answer that isn't Chroma's, within the error of httpx. Of Chroma's own,
    429 stands for a limit of its rate, and 503 for a server whose other writers kept its database locked.
    """
    import httpx
    from chromadb.errors import InternalError, RateLimitError

    if isinstance(error, RateLimitError):
        return 429
    if isinstance(error, InternalError) and _BUSY in str(error):
        return 503
    cause = error.__context__
    return cause.response.status_code if isinstance(cause, httpx.HTTPStatusError) else None
