"""chromadb: the client of a collection, the clients a process shares, the causes of its errors, and its command."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection
    from chromadb.config import Settings

# The program of the `chroma` command, whose script may be in a folder that this process doesn't know.
COMMAND = "import chromadb_rust_bindings, sys; chromadb_rust_bindings.cli(sys.argv)"
TESTED = ">=1.5.9,<1.6"

# What SQLite says within an error of Chroma's: the folder can't be written; a pattern has more than 50,000 bytes, or a
# regular expression takes too much memory.
_NOT_WRITABLE = ("readonly database", "database or disk is full", "disk I/O error", "unable to open database file")
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
