"""Reads documents and metadata of search results straight from Chroma's SQLite file.

Reading ten records takes 0.06 ms; `Collection.get` takes six times that (`benchmarks/README.md`). The reader answers
only where Chroma would answer the same: the file has exactly the migrations that this module knows, Chroma's queue of
writes (its write-ahead log) holds nothing unapplied, every record is there, and every value has a known type. Otherwise
`read` returns None, and the caller asks Chroma.

Chroma brings its own copy of SQLite. Two copies in one process cancel each other's POSIX locks on a file, and so does
closing the file (sqlite.org/howtocorrupt.html, sections 2.2 and 2.2.1). So this reader takes no locks, and is closed
after the last Chroma client that this package opened on the folder. A read counts only if nobody wrote during it: there
was no journal, and the file's change counter stayed the same.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from mrl_rag.index.config import PREFIX
from mrl_rag.index.key_order import KeyOrders, key_orders
from mrl_rag.lifetime import leave_to_parent

T = TypeVar("T")
Document: TypeAlias = tuple[str | None, dict[str, Any]]

# `migrations_digest` of Chroma 1.5. A test compares it with the installed Chroma.
KNOWN_MIGRATIONS = frozenset({"9c5714562583773064d7e3b93f7a1b45"})
_DOCUMENT_KEY = "chroma:document"
_MAX_ATTEMPTS = 3
_IDS_PER_STATEMENT = 500
# Whether the write-ahead queue has entries of the collection that the tables read here don't have yet.
_UNAPPLIED = """
    SELECT EXISTS(SELECT 1 FROM embeddings_queue WHERE topic LIKE '%/' || ? AND seq_id > coalesce(
        (SELECT seq_id FROM max_seq_id WHERE segment_id = ?), -1))
"""
_KEY_ORDERS = f"SELECT str_value FROM collection_metadata WHERE collection_id = ? AND key = '{PREFIX}key_orders'"
# One row per value or list item. A record without any has one row, with key NULL.
_VALUES = """
    WITH chosen AS (SELECT id, embedding_id FROM embeddings WHERE segment_id = ? AND embedding_id IN ({marks}))
    SELECT embedding_id, key, string_value, int_value, float_value, bool_value, 0 AS list_item
    FROM chosen LEFT JOIN embedding_metadata AS single ON single.id = chosen.id
    UNION ALL
    SELECT embedding_id, key, string_value, int_value, float_value, bool_value, 1
    FROM chosen JOIN embedding_metadata_array AS list ON list.id = chosen.id
"""


class DocumentReader:
    """Reads documents and metadata of one collection.

    Args:
        folder: the folder with Chroma's files.
        collection: the collection's id.
    """

    def __init__(self, folder: Path, collection: str) -> None:
        self._file = _ChromaFile.open(folder / "chroma.sqlite3")
        self._collection = collection
        self._segment = ""
        # Version of the file that was last found to have an empty queue, and the collection's key orders in it.
        self._known: tuple[bytes, KeyOrders] | None = None

    @property
    def version(self) -> bytes | None:
        """The file's change counter, which grows with each write by any process; None if it can't be read."""
        return None if self._file is None else self._file.version

    def read(self, ids: Sequence[str]) -> dict[str, Document] | None:
        """Return document and metadata of each of `ids`; None if Chroma must be asked."""

        def work(connection: sqlite3.Connection, version: bytes) -> dict[str, Document] | None:
            known = self._known
            if known is None or known[0] != version:
                known = self._known = self._check_queue(connection, version)
            records = None if known is None else _records(connection, self._segment, ids)
            if known is None or records is None:
                return None
            return {id_: (document, known[1].sort(metadata)) for id_, (document, metadata) in records.items()}

        return None if self._file is None else self._file.consistent(work)

    def _check_queue(self, connection: sqlite3.Connection, version: bytes) -> tuple[bytes, KeyOrders] | None:
        """Return the version and the collection's key orders; None if the queue has something unapplied."""
        if not self._segment:
            sql = "SELECT id FROM segments WHERE collection = ? AND scope = 'METADATA'"
            (self._segment,) = connection.execute(sql, (self._collection,)).fetchone() or ("",)
        if connection.execute(_UNAPPLIED, (self._collection, self._segment)).fetchone()[0]:
            return None
        (stored,) = connection.execute(_KEY_ORDERS, (self._collection,)).fetchone() or ("",)
        return version, key_orders(stored)


def vector_segment(folder: Path, collection: str) -> str | None:
    """Return the name of the folder with a collection's HNSW graph; None if it can't be read."""

    def work(connection: sqlite3.Connection, version: bytes) -> str | None:
        sql = "SELECT id FROM segments WHERE collection = ? AND scope = 'VECTOR'"
        found: tuple[str] | None = connection.execute(sql, (collection,)).fetchone()
        return None if found is None else found[0]

    file = _ChromaFile.open(folder / "chroma.sqlite3")
    return None if file is None else file.consistent(work)


def close_reader(folder: Path) -> None:
    """Close the connection to a folder's file, after Chroma's client is closed: an open one would lose its locks."""
    with _ChromaFile._mutex:
        for key in [key for key in _ChromaFile._opened if key[0] == folder / "chroma.sqlite3"]:
            file = _ChromaFile._opened.pop(key)
            if file is not None:
                file.close()


def migrations_digest(connection: sqlite3.Connection) -> str:
    """Return a hash of the migrations that were applied to Chroma's file."""
    rows = connection.execute("SELECT dir, version, hash FROM migrations ORDER BY dir, version").fetchall()
    return blake2b(repr(rows).encode(), digest_size=16).hexdigest()


def leave_readers() -> None:
    """Leave the connections to the parent process; called in a forked child."""
    leave_to_parent(_ChromaFile._opened)
    _ChromaFile._opened, _ChromaFile._mutex = {}, threading.Lock()


class _ChromaFile:
    """A read-only connection to Chroma's file, one per file and process."""

    _opened: dict[tuple[Path, int], _ChromaFile | None] = {}  # noqa: RUF012
    _mutex = threading.Lock()

    def __init__(self, path: Path) -> None:
        name = f"{path.as_uri()}?mode=ro&vfs=unix-none"
        self._connection = sqlite3.connect(name, uri=True, check_same_thread=False, isolation_level=None)
        self._descriptor = os.open(path, os.O_RDONLY)
        self._journal = f"{path}-journal"
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, path: Path) -> _ChromaFile | None:
        """Return the connection to a file; None if this module can't read that file."""
        if os.name == "nt":
            # SQLite has no "unix-none" there, the VFS without locks.
            return None
        try:
            path = path.resolve()
            key = path, path.stat().st_ino
        except OSError:
            return None
        with cls._mutex:
            if key not in cls._opened:
                file = cls(path)
                known = file.consistent(
                    lambda connection, version: (
                        migrations_digest(connection) in KNOWN_MIGRATIONS
                        and connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
                    )
                )
                if known is None:
                    # Another process is writing it, so this was not found out.
                    return None
                cls._opened[key] = file if known else None
            return cls._opened[key]

    def close(self) -> None:
        """Close both descriptors; later reads return None."""
        with self._lock:
            self._closed = True
            self._connection.close()
            os.close(self._descriptor)

    def consistent(self, work: Callable[[sqlite3.Connection, bytes], T | None]) -> T | None:
        """Return what `work` reads from one version of the file; None if it returns None, or someone is writing."""
        for _ in range(_MAX_ATTEMPTS):
            if os.path.exists(self._journal):
                return None
            with self._lock, suppress(sqlite3.Error):
                if self._closed:
                    return None
                before = self._version()
                found = work(self._connection, before)
                if self._version() == before and not os.path.exists(self._journal):
                    return found
        return None

    @property
    def version(self) -> bytes | None:
        """The file change counter; None once the file is closed."""
        with self._lock:
            return None if self._closed else self._version()

    def _version(self) -> bytes:
        """Return the file change counter; sqlite.org/fileformat.html, section 1.3.7."""
        return os.pread(self._descriptor, 4, 24)


def _records(connection: sqlite3.Connection, segment: str, ids: Sequence[str]) -> dict[str, Document] | None:
    """Return document and metadata of `ids`; None if a record is missing or a value has an unknown type."""
    metadata_of: dict[str, dict[str, Any]] = {}
    for start in range(0, len(ids), _IDS_PER_STATEMENT):
        part = ids[start : start + _IDS_PER_STATEMENT]
        sql = _VALUES.format(marks=",".join("?" * len(part)))
        for id_, key, text, integer, number, boolean, list_item in connection.execute(sql, (segment, *part)).fetchall():
            metadata = metadata_of.setdefault(id_, {})
            if key is None:
                continue
            given = [value for value in (text, integer, number) if value is not None]
            if boolean is not None:
                given.append(bool(boolean))
            if len(given) != 1:
                return None
            if list_item:
                metadata.setdefault(key, []).append(given[0])
            else:
                metadata[key] = given[0]
    if any(id_ not in metadata_of for id_ in ids):
        return None
    return {id_: (metadata_of[id_].pop(_DOCUMENT_KEY, None), metadata_of[id_]) for id_ in ids}
