"""Where an index lives: in a folder, in memory, or on a server."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
import warnings
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mrl_rag.index.archive import Archive, LmdbArchive, Slots
from mrl_rag.index.chroma_archive import ChromaArchive
from mrl_rag.index.config import IndexConfig
from mrl_rag.index.documents import DocumentReader, vector_segment
from mrl_rag.index.folder import Folder, Graph
from mrl_rag.index.gate import SharedGate
from mrl_rag.index.shortlist import ShortlistCollection, Stored
from mrl_rag.lifetime import Dropped
from mrl_rag.truncation import Float32Array, truncate, unit_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chromadb.api import ClientAPI

# Vectors whose product with a matrix is not left to OpenBLAS. It shares it out to all cores and waits for the last one:
# for 50 x 768 x 96 that saves 0.3 ms where they are idle, and costs 25 ms where others keep one of two busy.
_FEW = 100
# In a process of its own: closing the file here would undo the locks that Chroma has on it. Not `quick_check`: that
# doesn't see an index that hides records, whose vectors `repair` would take for orphans.
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


class Stores:
    """What an open index reads and writes: a Chroma collection and an archive.

    Args:
        shortlist: the collection.
        archive: the full vectors.
        reader: reads documents without a call to Chroma; None where the collection isn't in a folder.
        saved: where the shortlist's vectors may be saved, to be read at once when the index is opened; None for not.
        graph: what Chroma's graph is known to hold; None where that can't be told.
        generation: of the client that all this is on.
    """

    def __init__(
        self,
        shortlist: ShortlistCollection,
        archive: Archive,
        reader: DocumentReader | None = None,
        saved: Path | None = None,
        graph: Graph | None = None,
        generation: int = 0,
    ) -> None:
        self.shortlist = shortlist
        self.archive = archive
        self.reader = reader
        self.saved = saved
        self.graph = graph
        self.generation = generation

    def note_written(self) -> None:
        """Remember that Chroma's graph holds all that there is: this process has written the last of it."""
        if self.graph is not None and self.archive.version is not None:
            self.graph.version = self.archive.version

    @property
    def config(self) -> IndexConfig:
        """What the index remembers."""
        return self.shortlist.config

    @cached_property
    def rotation(self) -> Float32Array | None:
        """float32 [full_dim, full_dim]; None where the shortlist keeps the vectors' own coordinates."""
        return self.archive.load_axes(self.config.rotation, self.config.full_dim) if self.config.fitted else None

    @cached_property
    def _axes(self) -> Float32Array | None:
        if not self.config.fitted:
            return None
        return self.archive.load_axes(self.config.rotation, self.config.shortlist_dim)

    def project(self, vectors: Float32Array) -> Float32Array:
        """Return what Chroma stores or searches: float32 [n, shortlist_dim] of float32 [n, full_dim]."""
        if self._axes is None:
            return truncate(vectors, self.config.shortlist_dim)
        if len(vectors) <= _FEW:
            return unit_rows(np.einsum("nf,fd->nd", vectors, self._axes))
        return unit_rows(vectors @ self._axes)

    def full_vectors(self, ids: Sequence[str], slots: Slots | None = None) -> tuple[list[str], Float32Array]:
        """Return the ids that still exist, in the order given, and their vectors, float32 [found, full_dim].

        A record without a full vector gets the one that Chroma has, with zeros for what the shortlist leaves out.

        Args:
            ids: n ids.
            slots: int64 [n], where the archive had their rows; None where that isn't known.

        Raises:
            ArchiveError: a row is damaged.

        Warns:
            UserWarning: records have no full vector.
        """
        found, vectors = self.archive.read(ids, slots)
        if len(found) == len(ids):
            return found, vectors
        # Deleted since, added by Chroma alone, or lost.
        short = self.shortlist.shortlist_vectors(sorted(set(ids) - set(found)))
        if not short:
            return found, vectors
        warnings.warn(
            f"{len(short)} records of index {self.shortlist.name!r} have no full vector, {next(iter(short))!r} among "
            f"them: Chroma has added them by itself, or they were lost. They are scored at {self.config.shortlist_dim} "
            "of their dimensions. Call repair(encode=encoder.encode_documents), or run `mrl-rag repair --encode`.",
            stacklevel=2,
        )
        vector_of = dict(zip([*found, *short], [*vectors, *self._lifted(np.stack(list(short.values())))], strict=True))
        there = [id_ for id_ in ids if id_ in vector_of]
        return there, np.stack([vector_of[id_] for id_ in there])

    def _lifted(self, short: Float32Array) -> Float32Array:
        """Return the full vectors, float32 [n, full_dim], that `project` takes to these, float32 [n, shortlist_dim]."""
        if self._axes is not None:
            return short @ self._axes.T
        lifted = np.zeros((len(short), self.config.full_dim), dtype=np.float32)
        lifted[:, : short.shape[1]] = short
        return lifted

    def count(self) -> int:
        """Return how many records there are, by the store that is quicker to ask."""
        return self.shortlist.count() if self.archive.version is None else len(self.archive)

    def records(self, ids: Sequence[str]) -> dict[str, Stored]:
        """Return document and metadata of those of `ids` that are there."""
        if not ids:
            return {}
        found = None if self.reader is None else self.reader.read(ids)
        return self.shortlist.get(ids) if found is None else found


class Storage:
    """A chromadb client, and the folder that its files and the archives are in.

    Args:
        path: a folder, made when it isn't there; None for one in the system's temporary folder that is removed in the
            end, or where `client` is given.
        client: a chromadb client to use instead.

    Attributes:
        folder: absolute; None on a server and where the client given is in memory.
        temporary: whether the folder is removed in the end.
        shared: whether others may write, too: a client was given that has no folder.
        lock: is held by whoever writes.
        gate: is held by whoever uses the client.

    Raises:
        IndexNotWritable: the folder can't be made or written.
        TwoStageIndexError: Chroma can't open the folder.
    """

    def __init__(self, path: str | os.PathLike[str] | None, client: ClientAPI | None) -> None:
        self._client = client
        self._token = object()
        self.temporary = client is None and path is None
        self._place: Folder | None = None
        self._spelling = ""
        if client is None:
            self._place = Folder.at(Path(tempfile.mkdtemp(prefix="mrl_rag-") if path is None else path))
        elif client.get_settings().is_persistent:
            self._spelling = client.get_settings().persist_directory
            self._place = Folder.at(Path(self._spelling))
        self.folder = None if self._place is None else self._place.path
        self.shared = self._place is None
        self._dropped = Dropped(self, partial(_leave, self._place, self._token, self.temporary))
        if self.temporary and self._place is not None:
            _TEMPORARY[self._place.path] = os.getpid()
        if self._place is not None:
            self._place.join(self._token)
            self._spelling = self._spelling or str(self._place.path)
        self._alone = threading.RLock(), SharedGate()

    def close(self) -> None:
        """Let go of the folder; the last index on it closes its client."""
        self._dropped.release_now()

    @property
    def client(self) -> ClientAPI:
        """The client given, or the one that all indexes of this process on the folder share."""
        if self._client is not None or self._place is None:
            assert self._client is not None
            return self._client
        return self._place.client

    @property
    def lock(self) -> threading.RLock:
        """See the class."""
        return self._alone[0] if self._place is None else self._place.lock

    @property
    def gate(self) -> SharedGate:
        """See the class."""
        return self._alone[1] if self._place is None else self._place.gate

    @property
    def generation(self) -> int:
        """How many clients there were before this one."""
        return 0 if self._place is None or self._client is not None else self._place.generation

    @property
    def reopens(self) -> bool:
        """Whether `reopen` does anything."""
        return self._client is None

    def reopen(self) -> None:
        """Have Chroma read the folder anew, once nobody uses the client."""
        if self.reopens and self._place is not None:
            self._place.reopen()

    def acquire(self) -> bool:
        """Be the one process that writes to the folder; return whether it wasn't before.

        Raises:
            IndexNotWritable: another process is, or the folder can't be written.
        """
        return self._place is not None and self._place.acquire(self._token)

    def has_archives(self) -> bool:
        """Say whether there is an archive in the folder, whichever collection's."""
        return self.folder is not None and any(self.folder.glob("archive-*.lmdb"))

    def stores(self, shortlist: ShortlistCollection, archive: Archive) -> Stores:
        """Put a collection and its archive together."""
        version = archive.version
        if self._place is None or version is None:
            return Stores(shortlist, archive)
        folder, name = self._place.path, shortlist.config.archive
        # The last transaction's record may have been on its way to Chroma when that read its graph.
        known = Graph(version - 1 if self.reopens else version)
        graph = self._place.graphs.setdefault((self._spelling, name), known)
        saved = folder / f"archive-{name}.shortlist.npz"
        return Stores(shortlist, archive, DocumentReader(folder, shortlist.id), saved, graph, self.generation)

    def open_archive(self, config: IndexConfig, create: bool) -> Archive:
        """Open the archive that `config` names, or make it.

        Raises:
            ArchiveError: it is missing or damaged.
            IndexNotWritable: a file can't be written.
        """
        if config.precision == "float32":
            return ChromaArchive(self.client, _collection_name(config), config.full_dim, create)
        assert self.folder is not None
        path = self.folder / f"archive-{config.archive}.lmdb"
        return LmdbArchive(path, config.full_dim, config.precision, create, durable=not self.temporary)

    def remove_archive(self, stores: Stores) -> None:
        """Remove the archive's files or its collection; others may be reading it."""
        if os.name == "nt":
            # Windows removes no open file. Elsewhere whoever still reads goes on, and the last one closes it.
            stores.archive.close()
        if self.folder is not None:
            for file in self.folder.glob(f"archive-{stores.config.archive}.*"):
                file.unlink(missing_ok=True)
        else:
            self.client.delete_collection(_collection_name(stores.config))

    def set_graph_aside(self, collection: str) -> bool:
        """Rename the folder of a collection's graph, so that Chroma doesn't find it; return whether there was one.

        Nothing is removed: `repair` makes another graph from the archive, and the user may remove this one.
        """
        segment = None if self.folder is None or not self.reopens else vector_segment(self.folder, collection)
        if segment is None or self.folder is None or not (self.folder / segment).is_dir():
            return False
        (self.folder / segment).rename(self.folder / f"{segment}.damaged-{uuid.uuid4().hex[:8]}")
        return True

    def sqlite_fault(self, seconds: float) -> str:
        """Say what SQLite finds wrong with Chroma's file, "" where nothing is, it takes longer, or there is no folder.

        Args:
            seconds: how long it may look; meanwhile Chroma can't write.
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


# Folders to be removed, and the process that made each.
_TEMPORARY: dict[Path, int] = {}


def _leave(place: Folder | None, token: object, temporary: bool) -> None:
    if place is None:
        return
    place.leave(token)
    # A child that was forked has its parent's index, and must leave it the folder.
    if temporary and _TEMPORARY.get(place.path) == os.getpid():
        del _TEMPORARY[place.path]
        shutil.rmtree(place.path, ignore_errors=True)


def _remove_temporary() -> None:
    for folder, process in list(_TEMPORARY.items()):
        if process == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)


atexit.register(_remove_temporary)
