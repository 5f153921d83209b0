"""The open stores of an index, and the locks for reading and writing them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from mrl_rag.errors import IndexClosed, IndexNotWritable, MrlRagError, ServerUnavailable, TwoStageIndexError
from mrl_rag.index import writer
from mrl_rag.index.chroma_errors import chroma_errors
from mrl_rag.index.config import IndexConfig, Wanted
from mrl_rag.index.search import GraphOutdated, Searcher
from mrl_rag.index.server import AsyncConnections
from mrl_rag.index.server_search import ServerSearcher, searcher_of
from mrl_rag.index.shortlist import ShortlistCollection
from mrl_rag.index.storage import Storage, Stores
from mrl_rag.lifetime import leave_to_parent, release_dropped, renew_after_fork

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

Answer = TypeVar("Answer")
Empty = TypeVar("Empty")

# Time limits of SQLite's check of Chroma's file, which nobody can write meanwhile.
VERIFY_SECONDS = 2
REPAIR_SECONDS = 600
# Time for another client to make the collections of an index, and between two looks.
_CREATION_SECONDS, _CREATION_POLL = 30.0, 0.1
_NEW_CLIENT = "Close this client, and open the index on a new one, or by its path."


class Session:
    """Opens the stores of one index at first use, and again if another index replaces them.

    Args:
        storage: where the stores are.
        name: the collection's name.
        wanted: what a stored index must match.

    Attributes:
        opened: the searcher of the open stores; None until something is written, and after the index was dropped.

    Raises:
        IndexClosed: this process was forked from one that had used Chroma.
    """

    def __init__(self, storage: Storage, name: str, wanted: Wanted) -> None:
        self.storage = storage
        self.name = name
        self.opened: Searcher | None = None
        self._wanted = wanted
        self._refusal = ""
        # The settings of the stores that were replaced last, and `Stores.stamp` when they were last known not to be.
        self._left: IndexConfig | None = None
        self._seen: object = None
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
        leave_to_parent((self.opened, self.storage.connections))
        self.opened = None

    def open(self) -> Searcher | None:
        """Return the searcher of the stores; None if nothing is stored yet."""
        _ = self.client  # raises if the index was closed
        # First without the lock, so that a search doesn't wait for an upsert.
        opened = self.opened
        if opened is not None and opened.stores.generation == self.storage.generation:
            return opened
        with self.storage.lock, chroma_errors():
            # Registers the function that is stored with the collection; without it Chroma warns at each use.
            import mrl_rag.index.embedding_function  # noqa: F401

            client = self.client
            if self.opened is None or self.opened.stores.generation != self.storage.generation:
                self.opened = None
                shortlist = ShortlistCollection.open(client, self.name)
                if shortlist is None:
                    return None
                shortlist.config.check(self.name, self._wanted)
                if self._left is not None:
                    shortlist.config.check_follows(self.name, self._left)
                try:
                    archive = self.storage.open_archive(shortlist.config, create=False)
                except TwoStageIndexError:
                    if shortlist.exists():
                        raise
                    # The index was dropped meanwhile by another process or client.
                    return self.open()
                opened = searcher_of(self.storage.stores(shortlist, archive))
                if self.storage.shared:
                    # Now, as a search on an event loop must not wait for it.
                    _ = opened.stores.axes
                self.opened = opened
            return self.opened

    def opened_once_made(self) -> Searcher | None:
        """Return the searcher of stores that another client is making; None if that takes it too long: it has ended."""
        end = time.monotonic() + _CREATION_SECONDS
        while (opened := self.open()) is None and time.monotonic() < end:
            time.sleep(_CREATION_POLL)
        return opened

    def reopen(self) -> Stores | None:
        """Replace the client, so that Chroma reads the folder again, and return the stores."""
        with self.storage.lock:
            self.storage.reopen()
            opened = self.open()
            return None if opened is None else opened.stores

    def readable(self, stores: Stores) -> Stores:
        """Return the stores. If Chroma can't read the graph, first rename it, so that Chroma starts a new one."""
        try:
            with chroma_errors():
                stores.shortlist.ids(None, None, limit=1)
        except TwoStageIndexError:
            if self.storage.set_graph_aside(stores.shortlist.id):
                return self.reopen() or stores
        return stores

    @contextmanager
    def writing(self, recover: bool = True) -> Iterator[None]:
        """Hold the write locks: one thread and, in a folder, one process may write.

        Args:
            recover: whether to finish or undo what an interrupted writer has left.
        """
        with self.storage.lock, chroma_errors(missing=True):
            _ = self.client  # raises in a forked process; makes a new client if the folder was removed
            fresh = self.storage.acquire()
            # Another index on this folder or server may have rebuilt the collection.
            self._forget_if_replaced()
            opened = self._with_current_graph(self.open())
            if fresh and recover and opened is not None:
                writer.recover(opened.stores)
            try:
                yield
            finally:
                if self.opened is not None:
                    self.opened.stores.note_written()

    def _with_current_graph(self, opened: Searcher | None) -> Searcher | None:
        """Reopen the stores if other processes have written: Chroma would overwrite their graph with its own."""
        stores = None if opened is None else opened.stores
        if stores is None or stores.graph is None or stores.graph.version == stores.archive.version:
            return opened
        if not self.storage.reopens:
            raise IndexNotWritable(
                f"another process or client has written to index {self.name!r} since this client was opened, and "
                f"Chroma would save its old graph over the new one. {_NEW_CLIENT}"
            )
        self.reopen()
        return self.opened

    def _forget_if_replaced(self) -> None:
        stores = None if self.opened is None else self.opened.stores
        if stores is not None and (stores.generation != self.storage.generation or not stores.shortlist.exists()):
            # Not closed: another thread may be reading it.
            self.opened, self._left = None, stores.config

    def take(self, wanted: Wanted) -> None:
        """Open the stores again at their next use, as other settings want them."""
        with self.storage.lock:
            self._wanted, self.opened, self._left = wanted, None, None

    def _replaced(self, stores: Stores) -> bool:
        """Return whether another process or client has put other stores in place of these."""
        stamp = stores.stamp
        if stamp == self._seen:
            return False
        if not stores.shortlist.exists():
            return True
        self._seen = stamp
        return False

    def current(self, work: Callable[[Searcher], Answer], empty: Empty) -> Answer | Empty:
        """Return `work(searcher)`, or `empty` if nothing is stored.

        It is called again if the stores were dropped or rebuilt meanwhile.
        """
        from chromadb.errors import ChromaError

        with chroma_errors(missing=True):
            while self.open() is not None:
                outdated = False
                with self.storage.gate.shared():
                    opened = self.opened
                    if opened is None or opened.stores.generation != self.storage.generation:
                        continue
                    try:
                        if not self._replaced(opened.stores):
                            return work(opened)
                    except GraphOutdated:
                        if not self.storage.reopens:
                            raise TwoStageIndexError(
                                f"other processes have written to index {self.name!r} since this client was opened, "
                                f"more than a search can add to Chroma's old graph. {_NEW_CLIENT}"
                            ) from None
                        outdated = True
                    except ServerUnavailable:
                        raise
                    except (ChromaError, MrlRagError):
                        # While a collection is dropped or replaced, it raises various errors. Those don't count.
                        if opened.stores.shortlist.exists():
                            raise
                with self.storage.lock:
                    if outdated and self.opened is opened:
                        self.reopen()
                    self._forget_if_replaced()
            return empty

    async def acurrent(
        self, work: Callable[[ServerSearcher, AsyncConnections], Awaitable[Answer]], empty: Empty
    ) -> Answer | Empty:
        """As `current`, awaiting `work(searcher, connections)`; for an index on a server.

        A thread opens the stores, at first and after another client has replaced them.
        """
        from chromadb.errors import ChromaError

        connections = self.storage.connections
        assert connections is not None
        with chroma_errors(missing=True):
            while True:
                _ = self.client  # raises if the index was closed
                opened = self.opened or await asyncio.to_thread(self.open)
                if opened is None:
                    return empty
                assert isinstance(opened, ServerSearcher)
                shortlist = opened.stores.shortlist
                server = await connections.server()
                try:
                    before, self._seen = self._seen, opened.stores.stamp  # one of many searches looks
                    if before == self._seen or await shortlist.aexists(server):
                        return await work(opened, connections)
                except ServerUnavailable:
                    raise
                except (ChromaError, MrlRagError):
                    if await shortlist.aexists(server):
                        raise
                await asyncio.to_thread(self._forget_if_replaced_by_another)

    def _forget_if_replaced_by_another(self) -> None:
        with self.storage.lock:
            self._forget_if_replaced()

    def check_not_hidden(self) -> None:
        """Raise an error if Chroma may have lost the collection: there are archives, and its file is damaged."""
        damaged = self.storage.has_archives() and self.storage.sqlite_fault(VERIFY_SECONDS)
        if damaged:
            raise TwoStageIndexError(
                f"Chroma finds no collection {self.name!r}, and its file in {self.storage.folder} is damaged: "
                f"{damaged}. Restore the folder from a backup."
            )

    def check_file(self) -> None:
        """Raise an error if Chroma's file is damaged: a rebuild would lose the records that the damage hides."""
        damaged = self.storage.sqlite_fault(REPAIR_SECONDS)
        if damaged:
            raise TwoStageIndexError(
                f"collection {self.name!r} can't be rebuilt: Chroma's own file in {self.storage.folder} is "
                f"damaged, and a rebuild would lose the records that the damage hides: {damaged}. Restore the folder "
                "from a backup."
            )
