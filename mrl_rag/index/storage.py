"""Where an index lives: in a folder, in memory, or on a server."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mrl_rag.errors import ArchiveError, IndexNotWritable, TwoStageIndexError
from mrl_rag.index.archive import Archive, LmdbArchive, Slots
from mrl_rag.index.chroma_archive import ChromaArchive
from mrl_rag.index.chroma_errors import is_panic
from mrl_rag.index.config import IndexConfig
from mrl_rag.index.documents import DocumentReader, vector_segment
from mrl_rag.index.shortlist import ShortlistCollection, Stored
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
    """

    def __init__(
        self,
        shortlist: ShortlistCollection,
        archive: Archive,
        reader: DocumentReader | None = None,
        saved: Path | None = None,
    ) -> None:
        self.shortlist = shortlist
        self.archive = archive
        self.reader = reader
        self.saved = saved

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
        """Return the ids that still exist and their vectors, float32 [found, full_dim].

        Args:
            ids: n ids.
            slots: int64 [n], where the archive had their rows; None where that isn't known.

        Raises:
            ArchiveError: a record has no row, or a damaged one.
        """
        found, vectors = self.archive.read(ids, slots)
        if len(found) < len(ids):
            # Either another thread deleted them since, or the archive has lost them.
            lost = list(self.shortlist.get(sorted(set(ids) - set(found))))
            if lost:
                raise ArchiveError(
                    f"the archive has no full vector of {len(lost)} records, {lost[0]!r} among them. Upsert them "
                    "again, or bring the archive back from a backup."
                )
        return found, vectors

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
        path: a folder, made when it isn't there; None for memory, or where `client` is given.
        client: a chromadb client to use instead.

    Attributes:
        client: the one given, or one of its own.
        folder: None in memory and on a server.
        shared: whether others may write, too: a client was given that has no folder.

    Raises:
        IndexNotWritable: the folder can't be made or written.
        TwoStageIndexError: Chroma can't open the folder.
    """

    def __init__(self, path: str | os.PathLike[str] | None, client: ClientAPI | None) -> None:
        self._path = path
        self._owns_client = client is None
        self.client = client or _open_client(path)
        settings = self.client.get_settings()
        self.folder = Path(settings.persist_directory).absolute() if settings.is_persistent else None
        self.shared = self.folder is None and not self._owns_client

    @property
    def reopens(self) -> bool:
        """Whether `reopen` does anything."""
        return self._owns_client and self.folder is not None

    def reopen(self) -> None:
        """Have Chroma read the folder anew. Nobody may be using the client."""
        self.client.close()  # type: ignore[attr-defined]
        self.client = _open_client(self._path)

    def close(self) -> None:
        """Close the client, unless it was passed in."""
        if self._owns_client:
            self.client.close()  # type: ignore[attr-defined]

    def has_archives(self) -> bool:
        """Say whether there is an archive in the folder, whichever collection's."""
        return self.folder is not None and any(self.folder.glob("archive-*.lmdb"))

    def stores(self, shortlist: ShortlistCollection, archive: Archive) -> Stores:
        """Put a collection and its archive together."""
        if self.folder is None:
            return Stores(shortlist, archive)
        saved = self.folder / f"archive-{shortlist.config.archive}.shortlist.npz"
        return Stores(shortlist, archive, DocumentReader(self.folder, shortlist.id), saved)

    def open_archive(self, config: IndexConfig, create: bool) -> Archive:
        """Open the archive that `config` names, or make it.

        Raises:
            ArchiveError: it is missing or damaged.
            IndexNotWritable: a file can't be written.
        """
        if config.precision == "float32":
            return ChromaArchive(self.client, _collection_name(config), config.full_dim, create)
        path = None if self.folder is None else self.folder / f"archive-{config.archive}.lmdb"
        return LmdbArchive(path, config.full_dim, config.precision, create)

    def remove_archive(self, stores: Stores) -> None:
        """Remove the archive's files or its collection; others may be reading it."""
        if os.name == "nt":
            # Windows removes no open file. Elsewhere whoever still reads goes on, and the last one closes it.
            stores.archive.close()
        if self.folder is not None:
            for file in self.folder.glob(f"archive-{stores.config.archive}.*"):
                file.unlink(missing_ok=True)
        elif self.shared:
            self.client.delete_collection(_collection_name(stores.config))

    def set_graph_aside(self, collection: str) -> bool:
        """Rename the folder of a collection's graph, so that Chroma doesn't find it; return whether there was one.

        Nothing is removed: `repair` makes another graph from the archive, and the user may remove this one.
        """
        segment = None if self.folder is None or not self._owns_client else vector_segment(self.folder, collection)
        if segment is None or self.folder is None or not (self.folder / segment).is_dir():
            return False
        (self.folder / segment).rename(self.folder / f"{segment}.damaged-{uuid.uuid4().hex[:8]}")
        return True

    def sqlite_fault(self, seconds: float) -> str:
        """Say what SQLite finds wrong with Chroma's file, "" where nothing is, it takes longer, or there is no folder.

        Args:
            seconds: how long it may look; meanwhile Chroma can't write.
        """
        if self.folder is None or not sys.executable:
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


def _open_client(path: str | os.PathLike[str] | None) -> ClientAPI:
    import chromadb
    from chromadb.config import Settings

    if path is None:
        # Every in-memory client of a process shares one store; a database of its own keeps an index apart.
        database = f"mrl_rag-{uuid.uuid4().hex}"
        settings = Settings()
        chromadb.AdminClient(settings).create_database(database)
        return chromadb.EphemeralClient(settings, database=database)
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IndexNotWritable(
            f"{folder} can't be made: {error}. Pass a folder, new or one that an index is in."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise IndexNotWritable(f"{folder} can't be written. Check its permissions, or pass another folder.")
    try:
        return chromadb.PersistentClient(folder)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        _forget_unstarted(folder)
        raise TwoStageIndexError(
            f"Chroma can't open {folder}: {error}. Check that it is a folder of Chroma's, that its files can be "
            "written, and that nobody else opened it with other settings; where chroma.sqlite3 is damaged, bring the "
            "folder back from a backup."
        ) from error


def _forget_unstarted(folder: Path) -> None:
    """Let a folder be opened again: Chroma keeps what failed to start, and would hand it out."""
    from chromadb.api.shared_system_client import SharedSystemClient

    if str(folder) not in SharedSystemClient._identifier_to_refcount:
        SharedSystemClient._identifier_to_system.pop(str(folder), None)
