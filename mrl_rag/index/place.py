"""Where an index lives: in a folder, in memory, or on a server."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from mrl_rag.errors import IndexNotWritable, TwoStageIndexError
from mrl_rag.index.archive import Archive, LocalArchive
from mrl_rag.index.chroma_archive import ChromaArchive
from mrl_rag.index.chroma_files import graph_fault, graph_of, graphs, remove_dead, set_aside, sqlite_fault, was_saved
from mrl_rag.index.coarse import Coarse, Facts, chroma_errors, is_panic
from mrl_rag.index.halves import Halves

if TYPE_CHECKING:
    from chromadb.api import ClientAPI


class Place:
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
        self._owns_client = client is None
        self.client = client or _open_client(path)
        settings = self.client.get_settings()
        self.folder = Path(settings.persist_directory) if settings.is_persistent else None
        self.shared = self.folder is None and not self._owns_client

    def close(self) -> None:
        """Close the client, unless it was passed in."""
        if self._owns_client:
            self.client.close()  # type: ignore[attr-defined]

    def has_archives(self) -> bool:
        """Say whether there is an archive in the folder, whichever collection's."""
        return self.folder is not None and any(self.folder.glob("archive-*.sqlite3"))

    def open_archive(self, facts: Facts, create: bool) -> Archive:
        """Open the archive that `facts` name, or make it.

        Raises:
            ArchiveError: it is missing or damaged.
            IndexNotWritable: a file can't be written.
        """
        if facts.precision == "float32":
            return ChromaArchive(self.client, _collection_name(facts), facts.full_dim, create)
        path = None if self.folder is None else self.folder / f"archive-{facts.archive}.sqlite3"
        return LocalArchive(path, facts.full_dim, facts.precision, create)

    def remove_archive(self, halves: Halves) -> None:
        """Remove the archive's files or its collection; others may be reading it."""
        if os.name == "nt":
            # Windows removes no open file. Elsewhere whoever still reads goes on, and the last one closes it.
            halves.archive.close()
        if self.folder is not None:
            for file in self.folder.glob(f"archive-{halves.facts.archive}.*"):
                # SQLite removes some of them itself when their last reader closes them.
                file.unlink(missing_ok=True)
        elif self.shared:
            self.client.delete_collection(_collection_name(halves.facts))

    def graph_fault(self, coarse: Coarse) -> str:
        """Say what is wrong with the files of Chroma's graph, "" where nothing is or there is no folder."""
        if self.folder is None:
            return ""
        found = graphs(self.folder)
        faults = {graph: fault for graph in found if (fault := graph_fault(graph))}
        for _ in range(3 if faults else 0):
            # Another process may be writing it.
            time.sleep(0.1)
            faults = {graph: fault for graph in faults if (fault := graph_fault(graph))}
        if not faults:
            return "" if found or not was_saved(self.folder, coarse.id) else "it is missing"
        # Other collections' graphs are in the folder, too.
        mine = graph_of(self.folder, coarse.id)
        return next(iter(faults.values())) if mine is None else faults.get(mine, "")

    def set_graph_aside(self, halves: Halves) -> None:
        """Take a graph that Chroma can't read out of its way: it then reads the rest, and can be filled anew."""
        halves.graph_fault = self.graph_fault(halves.coarse)
        try:
            if not halves.graph_fault:
                with chroma_errors():
                    halves.coarse.exists()
                return
        except TwoStageIndexError:
            pass
        graph = None if self.folder is None else graph_of(self.folder, halves.coarse.id)
        if graph is not None:
            set_aside(graph)
            halves.graph_fault = ""

    def remove_dead_graphs(self) -> None:
        """Remove the graphs of collections that are deleted."""
        if self.folder is not None:
            remove_dead(self.folder)

    def sqlite_fault(self, seconds: float) -> str:
        """Say what SQLite finds wrong with Chroma's file, "" where nothing is or there is no folder.

        Args:
            seconds: how long it may look; meanwhile Chroma can't write.
        """
        return "" if self.folder is None else sqlite_fault(self.folder, seconds)


def _collection_name(facts: Facts) -> str:
    return f"mrl_rag-archive-{facts.archive}"


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
