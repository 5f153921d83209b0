"""What an index has open: its stores, and the locks of who reads and who writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from mrl_rag.errors import IndexClosed, IndexNotWritable, MrlRagError, TwoStageIndexError
from mrl_rag.index import writer
from mrl_rag.index.chroma_errors import chroma_errors
from mrl_rag.index.config import Wanted
from mrl_rag.index.search import GraphOutdated, Searcher
from mrl_rag.index.shortlist import ShortlistCollection
from mrl_rag.index.storage import Storage, Stores
from mrl_rag.lifetime import leave_to_parent, release_dropped, renew_after_fork

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

Answer = TypeVar("Answer")
Empty = TypeVar("Empty")

# Time limits for SQLite's check of Chroma's file, during which nobody can write it.
VERIFY_SECONDS = 2
REPAIR_SECONDS = 600


class Session:
    """The stores of one index while it is open. They are opened when they are first needed.

    Args:
        storage: a client, and the folder of its files.
        name: the collection's name.
        wanted: what a stored index must be.

    Attributes:
        opened: searches the stores; None until something is written, and after they were dropped.

    Raises:
        IndexClosed: this process was forked from one that had used Chroma.
    """

    def __init__(self, storage: Storage, name: str, wanted: Wanted) -> None:
        self.storage = storage
        self.name = name
        self.opened: Searcher | None = None
        self._wanted = wanted
        self._refusal = ""
        renew_after_fork(self)

    @property
    def client(self) -> ClientAPI:
        """The chromadb client.

        Raises:
            IndexClosed: the index was closed, or was open when this process was forked.
        """
        if self._refusal:
            raise IndexClosed(self._refusal)
        return self.storage.client

    def close(self) -> None:
        """Close the files. A client that was passed in stays open; an index in memory is lost."""
        with self.storage.lock:
            if self.opened is not None:
                self.opened.stores.archive.close()
            self.opened = None
            self._refusal = f"index {self.name!r} was closed; open it again."
            self.storage.close()
        release_dropped()

    def after_fork(self) -> None:
        """Leave open files to the parent process; called in the child."""
        if self.opened is not None or not self.storage.reopens:
            self._refusal = (
                f"index {self.name!r} was open when this process was forked. Open it only after the fork, or start "
                "processes by multiprocessing's 'spawn' or 'forkserver'."
            )
        leave_to_parent(self.opened)
        self.opened = None

    def open(self) -> Searcher | None:
        """Return the searcher of the stores; None until something is written."""
        _ = self.client  # raises where the index was closed
        # Without the lock once it is open, so that a search doesn't wait for an upsert.
        opened = self.opened
        if opened is not None and opened.stores.generation == self.storage.generation:
            return opened
        with self.storage.lock, chroma_errors():
            client = self.client
            if self.opened is None or self.opened.stores.generation != self.storage.generation:
                self.opened = None
                shortlist = ShortlistCollection.open(client, self.name)
                if shortlist is None:
                    return None
                shortlist.config.check(self.name, self._wanted)
                try:
                    archive = self.storage.open_archive(shortlist.config, create=False)
                except TwoStageIndexError:
                    if shortlist.exists():
                        raise
                    # Another process or client has dropped it meanwhile.
                    return self.open()
                self.opened = Searcher(self.storage.stores(shortlist, archive))
            return self.opened

    def reopen(self) -> Stores | None:
        """Have Chroma read the folder again."""
        with self.storage.lock:
            self.storage.reopen()
            opened = self.open()
            return None if opened is None else opened.stores

    def readable(self, stores: Stores) -> Stores:
        """Return the stores; a graph that Chroma can't read is first renamed, so that Chroma begins without one."""
        try:
            with chroma_errors():
                stores.shortlist.ids(None, None, limit=1)
        except TwoStageIndexError:
            if self.storage.set_graph_aside(stores.shortlist.id):
                return self.reopen() or stores
        return stores

    @contextmanager
    def writing(self, recover: bool = True) -> Iterator[None]:
        """Hold the locks of the one writing thread and, in a folder, the one writing process.

        Args:
            recover: whether to finish what an interrupted writer may have left undone.
        """
        with self.storage.lock, chroma_errors(missing=True):
            _ = self.client  # raises in a forked process, and is a new one where the folder was removed
            fresh = self.storage.acquire()
            # Another index on this folder or server may have rebuilt the collection.
            self._forget_if_replaced()
            opened = self._with_whole_graph(self.open())
            if fresh and recover and opened is not None:
                writer.recover(opened.stores)
            try:
                yield
            finally:
                if self.opened is not None:
                    self.opened.stores.note_written()

    def _with_whole_graph(self, opened: Searcher | None) -> Searcher | None:
        """Have Chroma read its graph again if others have written since; it would save its own over theirs."""
        stores = None if opened is None else opened.stores
        if stores is None or stores.graph is None or stores.graph.version == stores.archive.version:
            return opened
        if not self.storage.reopens:
            raise IndexNotWritable(
                f"another process or client has written to index {self.name!r} since this client was opened, and "
                "Chroma would save its old graph over the new one. Close this client, and open the index on a new one, "
                "or by its path."
            )
        self.reopen()
        return self.opened

    def _forget_if_replaced(self) -> None:
        stores = None if self.opened is None else self.opened.stores
        if stores is not None and (stores.generation != self.storage.generation or not stores.shortlist.exists()):
            # It isn't closed, as another thread may be reading it.
            self.opened = None

    def current(self, work: Callable[[Searcher], Answer], empty: Empty) -> Answer | Empty:
        """Return what `work` makes of the stores; do it again if they were dropped or rebuilt meanwhile."""
        from chromadb.errors import ChromaError

        with chroma_errors(missing=True):
            while self.open() is not None:
                outdated = False
                with self.storage.gate.shared():
                    opened = self.opened
                    if opened is None or opened.stores.generation != self.storage.generation:
                        continue
                    try:
                        return work(opened)
                    except GraphOutdated:
                        outdated = True
                    except (ChromaError, MrlRagError):
                        # A collection that is being dropped or replaced raises many errors; only one that is still
                        # there means it.
                        if opened.stores.shortlist.exists():
                            raise
                with self.storage.lock:
                    if outdated and self.opened is opened:
                        self.reopen()
                    self._forget_if_replaced()
            return empty

    def check_not_hidden(self) -> None:
        """Raise an error where archives and a damaged file say that Chroma has lost sight of collections."""
        damaged = self.storage.has_archives() and self.storage.sqlite_fault(VERIFY_SECONDS)
        if damaged:
            raise TwoStageIndexError(
                f"Chroma finds no collection {self.name!r}, and its file in {self.storage.folder} is damaged: "
                f"{damaged}. Restore the folder from a backup."
            )

    def check_file(self) -> None:
        """Raise an error where Chroma's file is damaged: records that it hides would be lost in a rebuilding."""
        damaged = self.storage.sqlite_fault(REPAIR_SECONDS)
        if damaged:
            raise TwoStageIndexError(
                f"collection {self.name!r} can't be rebuilt: Chroma's own file in {self.storage.folder} is "
                f"damaged, and records that it hides would be lost: {damaged}. Restore the folder from a backup."
            )
