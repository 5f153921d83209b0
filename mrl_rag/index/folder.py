"""What all indexes of this process share in a folder: the Chroma client, and the lock of the one writing process."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mrl_rag.compat.chroma import forget_folder, is_open, is_panic
from mrl_rag.errors import IndexClosed, IndexNotWritable, TwoStageIndexError
from mrl_rag.index.archive import leave_files
from mrl_rag.index.documents import close_reader, leave_readers
from mrl_rag.index.gate import SharedGate
from mrl_rag.lifetime import leave_to_parent, renew_after_fork

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from filelock import FileLock


@dataclass(eq=False)
class Graph:
    """How far Chroma's HNSW graph of a collection, in this process's memory, is up to date.

    Chroma reads a graph from the disk once, and doesn't see what other processes write later.

    Attributes:
        version: version of the archive up to which the graph has everything.
    """

    version: int


class Folder:
    """A folder that indexes of this process have open. Each index is represented by a token, any unique object.

    Attributes:
        path: absolute, without symbolic links.
        lock: held by a thread that writes, or replaces the client.
        gate: held by threads that use the client.
        generation: number of clients before the current one.
        graphs: by (path as it was passed to Chroma, name of the archive). For each spelling of the path, Chroma has
            another graph in memory.
        archives: by (path as it was passed to Chroma, id of the collection), the name of the archive that the
            collection had when the client was new.
    """

    _all: ClassVar[dict[Path, Folder]] = {}
    _mutex: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        self._start()
        renew_after_fork(self)

    def _start(self) -> None:
        self.lock = threading.RLock()
        self.gate = SharedGate()
        self.graphs: dict[tuple[str, str], Graph] = {}
        self.archives: dict[tuple[str, str], str] = {}
        self._client: ClientAPI | None = None
        self._file: tuple[int, int] | None = None
        self._users: set[object] = set()
        self._writers: set[object] = set()
        self._file_lock: FileLock | None = None

    @classmethod
    def at(cls, path: Path) -> Folder:
        """Return this process's object for a folder."""
        path = path.expanduser().resolve()
        with cls._mutex:
            if path not in cls._all:
                cls._all[path] = cls(path)
            return cls._all[path]

    @property
    def client(self) -> ClientAPI:
        """The client that the indexes share, opened at first use."""
        with self.lock:
            if self._client is not None and self._file != _identity(self.path):
                # The folder was removed, and may have been made again.
                self._forget_client()
            if self._client is None:
                _check_threads()
                self._client = open_client(self.path)
                self._file = _identity(self.path)
            return self._client

    def join(self, user: object) -> None:
        """Register an index, so that the client stays open."""
        with self.lock:
            self._users.add(user)

    def leave(self, user: object) -> None:
        """Unregister an index. The last one closes the client."""
        with self.lock:
            self._users.discard(user)
            self.release(user)
            if not self._users:
                self._forget_client()
                with self._mutex:
                    self._all.pop(self.path, None)

    def reopen(self) -> None:
        """Replace the client, once no thread uses it, by a new one, which reads the folder again."""
        with self.lock, self.gate.exclusive():
            self._forget_client()
            _ = self.client

    def _forget_client(self) -> None:
        if self._client is not None:
            self._client.close()  # type: ignore[attr-defined]
            self._client = None
            self.generation += 1
            self.graphs.clear()
            self.archives.clear()
            close_reader(self.path)
        if self._file_lock is not None and self._file not in (None, _identity(self.path)):
            # The locked file was removed with the folder.
            self._file_lock.release()
            self._file_lock = None
            self._writers.clear()

    def acquire(self, writer: object) -> bool:
        """Take the lock of the one writing process. Its indexes share it.

        Returns:
            Whether this process didn't hold it before: another process may have written.

        Raises:
            IndexNotWritable: another process holds it, or the folder can't be written.
        """
        from filelock import FileLock, Timeout

        if self._file_lock is None:
            lock = FileLock(self.path / "mrl_rag.lock", timeout=0, thread_local=False)
            try:
                lock.acquire()
            except Timeout as error:
                raise IndexNotWritable(
                    f"another process writes to the index in {self.path}. Wait until it closes the index or ends; for "
                    "several writers, run a server (`chroma run`) and pass client=chromadb.HttpClient()."
                ) from error
            except OSError as error:
                raise IndexNotWritable(f"{self.path} can't be written: {error}. Check its permissions.") from error
            self._file_lock = lock
            self._writers = {writer}
            return True
        self._writers.add(writer)
        return False

    def release(self, writer: object) -> None:
        """Release the lock, unless another index of this process needs it."""
        self._writers.discard(writer)
        if self._file_lock is not None and not self._writers:
            self._file_lock.release()
            self._file_lock = None

    def after_fork(self) -> None:
        """Leave the client and the lock to the parent process."""
        leave_to_parent((self._client, self._file_lock, self.graphs))
        if self._client is not None:
            leave_to_parent(forget_folder(str(self.path)))
        Folder._mutex = threading.Lock()
        self.generation += 1
        users = self._users
        self._start()
        self._users = users


class _ChromaThreads:
    """Notes whether Chroma has started threads. A fork doesn't copy them, so in the child Chroma would wait forever.

    Attributes:
        started: whether Chroma has started threads in this process, or in a parent before the fork.
        lost: whether a parent had done so.
    """

    started = False
    lost = False

    def after_fork(self) -> None:
        self.lost = self.started
        leave_readers()
        leave_files()


CHROMA_THREADS = _ChromaThreads()
renew_after_fork(CHROMA_THREADS)


def _check_threads() -> None:
    if CHROMA_THREADS.lost:
        raise IndexClosed(
            "this process was forked from one that had searched or written in Chroma, and lacks Chroma's threads. "
            "Open the index only after the fork, or start processes by multiprocessing's 'spawn' or 'forkserver'."
        )


def open_client(folder: Path) -> ClientAPI:
    """Open Chroma in a folder, which is made if it doesn't exist.

    Raises:
        IndexNotWritable: the folder can't be made or written.
        TwoStageIndexError: Chroma can't open it.
    """
    import chromadb

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IndexNotWritable(
            f"{folder} can't be made: {error}. Pass another path: of a new folder, or one with an index."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise IndexNotWritable(f"{folder} can't be written. Check its permissions, or pass another folder.")
    try:
        return chromadb.PersistentClient(folder)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if not is_open(str(folder)):
            forget_folder(str(folder))
        raise TwoStageIndexError(
            f"Chroma can't open {folder}: {error}. Check that it holds Chroma's files, that they can be "
            "written, and that no other client has it open with other settings; if chroma.sqlite3 is damaged, restore "
            "the folder from a backup."
        ) from error


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return device and inode of Chroma's file, which change when it is replaced; None without a file."""
    try:
        found = (folder / "chroma.sqlite3").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
