"""Who may write to a folder, and who may use what is about to be replaced."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mrl_rag.errors import IndexNotWritable

_FOLDER_LOCKS: dict[Path, threading.RLock] = {}
_MUTEX = threading.Lock()


def folder_lock(folder: Path | None) -> threading.RLock:
    """Return the lock that lets one thread of this process write at a time, shared by all indexes on the folder."""
    if folder is None:
        return threading.RLock()
    with _MUTEX:
        return _FOLDER_LOCKS.setdefault(folder.resolve(), threading.RLock())


class SharedGate:
    """Lets any number of threads use a resource, until one needs it alone to replace it. Not reentrant."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Use the resource beside others."""
        with self._changed:
            while self._closed:
                self._changed.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if self._closed:
                    self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for all who use the resource, and keep others out."""
        with self._changed:
            while self._closed:
                self._changed.wait()
            self._closed = True
            while self._inside:
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


class WriterLock:
    """Held by the process that writes to an index's folder, from its first write on.

    Chroma keeps its graph in each process's memory: two that write would each save their own over the other's.

    Args:
        folder: the index's; None where there is none to lock, in memory or on a server.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held = folder is None

    def acquire(self) -> bool:
        """Take the lock, unless it is held.

        Returns:
            Whether it was taken now.

        Raises:
            IndexNotWritable: another process has it, or the folder can't be written.
        """
        if self._held or self._folder is None:
            return False
        from filelock import FileLock, Timeout

        # One object per path and process: two indexes of one process share it.
        self._lock = FileLock(self._folder / "mrl_rag.lock", timeout=0, thread_local=False, is_singleton=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise IndexNotWritable(
                f"another process writes to the index in {self._folder}. Wait until it closes the index or ends; for "
                "several writers, run a server (`chroma run`) and pass client=chromadb.HttpClient()."
            ) from error
        except OSError as error:
            raise IndexNotWritable(f"{self._folder} can't be written: {error}. Check its permissions.") from error
        self._held = True
        return True

    def release(self) -> None:
        """Let another process write."""
        if self._held and self._folder is not None:
            self._lock.release()
            self._held = False
