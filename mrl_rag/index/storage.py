"""Opens the two stores of an index, in a folder, in memory or on a server."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mrl_rag.compat.chroma import is_remote
from mrl_rag.index.archive import Archive, LmdbArchive, Slots
from mrl_rag.index.chroma_archive import ChromaArchive
from mrl_rag.index.config import IndexConfig
from mrl_rag.index.documents import DocumentReader, vector_segment
from mrl_rag.index.folder import Folder, Graph
from mrl_rag.index.gate import SharedGate
from mrl_rag.index.server import AsyncConnections, RetryPolicy, with_retries
from mrl_rag.index.shortlist import ShortlistCollection, Stored
from mrl_rag.lifetime import Dropped
from mrl_rag.truncation import Float32Array, truncate, unit_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chromadb.api import ClientAPI

# Up to so many vectors are projected by einsum instead of OpenBLAS, which spreads the work over all cores and waits for
# the last one. For 50 x 768 x 96 that saves 0.3 ms on idle cores, and costs 25 ms if other programs use one of two.
_MAX_EINSUM_VECTORS = 100
# Before any version of an archive.
_OUTDATED = -2
# Runs in a separate process: closing the file in this one would release Chroma's locks on it. Not `quick_check`, which
# overlooks a damaged SQLite index that hides records: `repair` would remove their vectors as orphaned.
_INTEGRITY_CHECK = """
import sqlite3, sys, time
end = time.monotonic() + float(sys.argv[2])
connection = sqlite3.connect(sys.argv[1], uri=True, timeout=60)
connection.set_progress_handler(lambda: time.monotonic() > end, 10_000)
try:
    for row in connection.execute("PRAGMA integrity_check(3)"):
        print(row[0])
except sqlite3.OperationalError:
    sys.exit(2)
except sqlite3.DatabaseError as error:
    print(error)
"""


@dataclass(eq=False)
class Stores:
    """The two stores of an open index: a Chroma collection and an archive.

    Attributes:
        shortlist: the collection.
        archive: the full vectors.
        reader: reads documents without calling Chroma; None where the collection isn't in a folder.
        saved: the file that caches the shortlist's vectors between sessions; None for no cache.
        graph: how far Chroma's graph in this process is up to date; None where that isn't known.
        generation: `Storage.generation` when the stores were opened.
    """

    shortlist: ShortlistCollection
    archive: Archive
    reader: DocumentReader | None = None
    saved: Path | None = None
    graph: Graph | None = None
    generation: int = 0

    @property
    def stamp(self) -> object:
        """A value that changes when any process writes to Chroma's file; each second where there is no such value."""
        found = None if self.reader is None else self.reader.version
        return int(time.monotonic()) if found is None else found

    def note_written(self) -> None:
        """Note that Chroma's graph is up to date: this process has just written."""
        if self.graph is not None and self.archive.version is not None:
            self.graph.version = self.archive.version

    @property
    def config(self) -> IndexConfig:
        """The settings that are stored with the collection."""
        return self.shortlist.config

    @cached_property
    def rotation(self) -> Float32Array | None:
        """The fitted rotation, float32 [full_dim, full_dim]; None without one."""
        return self.archive.load_axes(self.config.rotation, self.config.full_dim) if self.config.fitted else None

    @cached_property
    def axes(self) -> Float32Array | None:
        """The rotation's axes of the shortlist, float32 [full_dim, shortlist_dim]; None without a rotation."""
        if not self.config.fitted:
            return None
        return self.archive.load_axes(self.config.rotation, self.config.shortlist_dim)

    def project(self, vectors: Float32Array) -> Float32Array:
        """Reduce full vectors or queries, float32 [n, full_dim], to unit rows, float32 [n, shortlist_dim]."""
        if self.axes is None:
            return truncate(vectors, self.config.shortlist_dim)
        if len(vectors) <= _MAX_EINSUM_VECTORS:
            return unit_rows(np.einsum("nf,fd->nd", vectors, self.axes))
        return unit_rows(vectors @ self.axes)

    def full_vectors(self, ids: Sequence[str], slots: Slots | None = None) -> tuple[list[str], Float32Array]:
        """Return the ids found, in the order of `ids`, and their vectors, float32 [found, full_dim].

        A record without a full vector gets Chroma's vector, with zeros for the dimensions that Chroma lacks.

        Args:
            ids: n ids.
            slots: int64 [n], their slots in the archive; None if unknown.

        Raises:
            ArchiveError: a row is damaged.

        Warns:
            UserWarning: records have no full vector.
        """
        found, vectors = self.archive.read(ids, slots)
        if len(found) == len(ids):
            return found, vectors
        # The others were deleted meanwhile, were added through Chroma itself, or have lost their vectors.
        short = self.shortlist.shortlist_vectors(sorted(set(ids) - set(found)))
        if not short:
            return found, vectors
        vector_of = dict(zip(found, vectors, strict=True)) | self.lifted(short)
        there = [id_ for id_ in ids if id_ in vector_of]
        return there, np.stack([vector_of[id_] for id_ in there])

    def lifted(self, short: Mapping[str, Float32Array]) -> dict[str, Float32Array]:
        """Return vectors, float32 [full_dim] each, for records that have Chroma's alone, float32 [shortlist_dim] each.

        Warns:
            UserWarning: always; the records have no full vector.
        """
        warnings.warn(
            f"{len(short)} records of index {self.shortlist.name!r} have no full vector, {next(iter(short))!r} among "
            "them: they were added through Chroma itself, or their vectors were lost. They are scored at "
            f"{self.config.shortlist_dim} of their dimensions. Call repair(encode=encoder.encode_documents), or run "
            "`mrl-rag repair --encode`.",
            stacklevel=2,
        )
        return dict(zip(short, self._lifted(np.stack(list(short.values()))), strict=True))

    def _lifted(self, short: Float32Array) -> Float32Array:
        """Return vectors, float32 [n, full_dim], whose projection is `short`, float32 [n, shortlist_dim]."""
        if self.axes is not None:
            return short @ self.axes.T
        lifted = np.zeros((len(short), self.config.full_dim), dtype=np.float32)
        lifted[:, : short.shape[1]] = short
        return lifted

    def count(self) -> int:
        """Return the number of records, from the store that answers faster."""
        return self.shortlist.count() if self.archive.version is None else len(self.archive)

    def records(self, ids: Sequence[str]) -> dict[str, Stored]:
        """Return document and metadata by id; unknown ids are left out."""
        if not ids:
            return {}
        found = None if self.reader is None else self.reader.read(ids)
        return self.shortlist.get(ids) if found is None else found


class Storage:
    """A chromadb client, and the folder with its files and the archives.

    Args:
        path: a folder, made if it doesn't exist. None where `client` is given; otherwise None makes a temporary folder,
            which is removed in the end.
        client: a chromadb client to use instead.
        retries: how often and how long requests to its server are sent; None for the default.

    Attributes:
        given: `client`, as it was passed in.
        retries: as passed in, or the default.
        connections: async ones to the server of `client`; None where it has none.
        folder: absolute path; None where `client` is a server's, or in memory.
        temporary: whether the folder is removed in the end.
        shared: whether other clients may write at the same time: `client` has no folder.
        lock: held by the thread that writes.
        gate: held by threads that use the client, exclusively by one that replaces it.

    Raises:
        IndexNotWritable: the folder can't be made or written.
        TwoStageIndexError: Chroma can't open the folder.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, client: ClientAPI | None, retries: RetryPolicy | None = None
    ) -> None:
        self.retries = policy = retries or RetryPolicy()
        self.given = client
        self._client = None if client is None else with_retries(client, policy)
        remote = client is not None and is_remote(client.get_settings())
        self.connections = AsyncConnections(client, policy) if client is not None and remote else None
        self._token = object()
        self.temporary = client is None and path is None
        self.shared = client is not None and not client.get_settings().is_persistent
        self._folder: Folder | None = None
        self._path_for_chroma = ""
        self._own_lock, self._own_gate = threading.RLock(), SharedGate()
        if client is None:
            self._folder = Folder.at(Path(tempfile.mkdtemp(prefix="mrl_rag-") if path is None else path))
            self._path_for_chroma = str(self._folder.path)
        elif not self.shared:
            self._path_for_chroma = client.get_settings().persist_directory
            self._folder = Folder.at(Path(self._path_for_chroma))
        self._dropped = Dropped(self, partial(_leave, self._folder, self._token, self.temporary))
        if self._folder is not None:
            if self.temporary:
                _TEMPORARY_FOLDERS[self._folder.path] = os.getpid()
            self._folder.join(self._token)
        self.folder = None if self._folder is None else self._folder.path

    def close(self) -> None:
        """Leave the folder. The last index of this process on it closes the client."""
        if self.connections is not None:
            self.connections.close()
        self._dropped.release_now()

    @property
    def client(self) -> ClientAPI:
        """The client given, with retries, or the one that all indexes of this process on the folder share."""
        if self._client is not None:
            return self._client
        assert self._folder is not None
        return self._folder.client

    @property
    def lock(self) -> threading.RLock:
        """See the class. A fork replaces it."""
        return self._own_lock if self._folder is None else self._folder.lock

    @property
    def gate(self) -> SharedGate:
        """See the class. A fork replaces it."""
        return self._own_gate if self._folder is None else self._folder.gate

    @property
    def generation(self) -> int:
        """The number of clients on this folder before the current one; 0 for a client that was passed in."""
        return 0 if self._folder is None or self._client is not None else self._folder.generation

    @property
    def reopens(self) -> bool:
        """Whether `reopen` makes a new client; one that was passed in is kept."""
        return self._client is None

    def reopen(self) -> None:
        """Make a new client, which reads the folder again, once no thread uses the old one."""
        if self.reopens and self._folder is not None:
            self._folder.reopen()

    def acquire(self) -> bool:
        """Take the lock of the one writing process; return whether this process didn't hold it before.

        Raises:
            IndexNotWritable: another process holds it, or the folder can't be written.
        """
        return self._folder is not None and self._folder.acquire(self._token)

    def has_archives(self) -> bool:
        """Return whether the folder has an archive of any collection."""
        return self.folder is not None and any(self.folder.glob("archive-*.lmdb"))

    def stores(self, shortlist: ShortlistCollection, archive: Archive) -> Stores:
        """Combine a collection and its archive."""
        version = archive.version
        if self._folder is None or version is None:
            return Stores(shortlist, archive)
        folder, name = self._folder.path, shortlist.config.archive
        # The archive is written before Chroma, so Chroma may have read its graph without the last transaction. And it
        # may have read it long before `compact` made this archive.
        first = self._folder.archives.setdefault((self._path_for_chroma, shortlist.id), name)
        known = Graph(_OUTDATED if first != name else version - 1 if self.reopens else version)
        graph = self._folder.graphs.setdefault((self._path_for_chroma, name), known)
        saved = folder / f"archive-{name}.shortlist.npz"
        return Stores(shortlist, archive, DocumentReader(folder, shortlist.id), saved, graph, self.generation)

    def open_archive(self, config: IndexConfig, create: bool) -> Archive:
        """Open the archive that `config` names; with `create`, make it.

        Raises:
            ArchiveError: it is missing or damaged.
            IndexNotWritable: a file can't be written.
        """
        if config.precision == "float32":
            return ChromaArchive(self.client, _collection_name(config), config.full_dim, create)
        assert self.folder is not None
        path = self.folder / f"archive-{config.archive}.lmdb"
        return LmdbArchive(path, config.full_dim, config.precision, create, durable=not self.temporary)

    def remove_archive(self, config: IndexConfig, opened: Archive | None = None) -> None:
        """Remove an archive's files or its collection; other threads and processes may be reading it.

        Args:
            config: names the archive.
            opened: the archive where this index has it open.
        """
        if opened is not None and os.name == "nt":
            # Windows can't remove an open file. Elsewhere readers keep the removed file until they close it.
            opened.close()
        if self.folder is not None:
            for file in self.folder.glob(f"archive-{config.archive}.*"):
                file.unlink(missing_ok=True)
        else:
            self.client.delete_collection(_collection_name(config))

    def set_graph_aside(self, collection: str) -> bool:
        """Rename the folder of a collection's graph, so that Chroma ignores it; return whether there was one.

        `repair` makes another graph from the archive. The user may remove the old one.
        """
        segment = None if self.folder is None or not self.reopens else vector_segment(self.folder, collection)
        if segment is None or self.folder is None or not (self.folder / segment).is_dir():
            return False
        (self.folder / segment).rename(self.folder / f"{segment}.damaged-{uuid.uuid4().hex[:8]}")
        return True

    def sqlite_fault(self, seconds: float) -> str:
        """Return the faults that SQLite finds in Chroma's file.

        Args:
            seconds: time limit. Chroma can't write during the check.

        Returns:
            The faults; "" for none, for a check that isn't finished in time, or without a folder.
        """
        if self.folder is None or self.temporary or not sys.executable:
            return ""
        file = f"{(self.folder / 'chroma.sqlite3').as_uri()}?mode=ro"
        try:
            answer = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _INTEGRITY_CHECK, file, str(seconds)],
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                timeout=seconds + 90,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        found = answer.stdout.splitlines()
        return "" if found == ["ok"] else "; ".join(found)


def _collection_name(config: IndexConfig) -> str:
    return f"mrl_rag-archive-{config.archive}"


# Temporary folders, and the process that made each.
_TEMPORARY_FOLDERS: dict[Path, int] = {}


def _leave(folder: Folder | None, token: object, temporary: bool) -> None:
    if folder is None:
        return
    folder.leave(token)
    # A forked child has a copy of its parent's index, whose folder it must not remove.
    if temporary and _TEMPORARY_FOLDERS.get(folder.path) == os.getpid():
        del _TEMPORARY_FOLDERS[folder.path]
        shutil.rmtree(folder.path, ignore_errors=True)


def _remove_temporary() -> None:
    for folder, process in list(_TEMPORARY_FOLDERS.items()):
        if process == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)


atexit.register(_remove_temporary)
