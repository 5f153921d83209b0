"""The process of encoders and indexes: its cores and memory, how it forks, and how it ends."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """Holds what a forked child can't use: locks, threads, connections."""

    def after_fork(self) -> None:
        """Replace them; called in the child before anything else runs there."""


class NativeCode:
    """Counts the threads that are inside compiled code of torch, of a tokenizer or of Chroma.

        with NATIVE_CODE:
            network.run(sequences)

    A daemon thread that returns from such code while the interpreter shuts down aborts the process. So the shutdown
    waits for the threads inside, and lets no other daemon thread in.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False
        self._own = threading.local()

    def __enter__(self) -> None:
        self._own.depth = getattr(self._own, "depth", 0) + 1
        if self._own.depth > 1:
            return
        with self._changed:
            while self._shut and threading.current_thread() is not threading.main_thread():
                self._changed.wait()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        self._own.depth -= 1
        if self._own.depth:
            return
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def shut(self) -> None:
        """Wait until no thread is inside, and let none in from then on."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: self._inside <= 0)


class Dropped:
    """Releases what an object held after the object was garbage-collected.

    The garbage collector may run while the thread holds locks that a release needs. So it only queues the release, and
    `release_dropped` does it where no lock is held.

    Args:
        owner: the object.
        release: called without arguments, once, in the process that created this.
    """

    def __init__(self, owner: object, release: Callable[[], None]) -> None:
        self._release = release
        self._note = weakref.finalize(owner, _DROPPED.append, (os.getpid(), release))
        self._note.atexit = False

    def release_now(self) -> None:
        """Release it now, unless that was done already."""
        if self._note.detach():
            self._release()


_DROPPED: deque[tuple[int, Callable[[], None]]] = deque()


def release_dropped() -> None:
    """Release what collected objects held; the calling thread must hold none of their locks."""
    while _DROPPED:
        try:
            process, release = _DROPPED.popleft()
        except IndexError:  # another thread took it
            return
        if process == os.getpid():
            release()


NATIVE_CODE = NativeCode()
_FORKABLE: WeakSet[Forkable] = WeakSet()
_LEFT: list[object] = []


def renew_after_fork(held: Forkable) -> None:
    """Call `held.after_fork` in every child that this process forks, as long as `held` exists."""
    _FORKABLE.add(held)


def leave_to_parent(held: object) -> None:
    """Keep an object of the parent process alive, so that dropping it doesn't close it in this child."""
    _LEFT.append(held)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def return_freed_memory() -> None:
    """Have glibc give memory that was freed back to the system; other C libraries do that by themselves."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _in_child() -> None:
    NATIVE_CODE.__init__()  # type: ignore[misc]
    if torch := sys.modules.get("torch"):
        # GNU OpenMP would wait forever for the parent's threads. torch's DataLoader sets this in its workers, too.
        torch.set_num_threads(1)
    for held in list(_FORKABLE):
        held.after_fork()


atexit.register(NATIVE_CODE.shut)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
