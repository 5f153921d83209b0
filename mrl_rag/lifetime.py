"""What becomes of encoders and indexes when their process forks, and when it ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """Holds what a child that was forked can't use: locks, threads, connections."""

    def after_fork(self) -> None:
        """Make them anew; called in the child, before anything else runs there."""


class NativeCode:
    """Counts the threads that run code of torch's, of a tokenizer's or of Chroma's.

        with NATIVE_CODE:
            network.run(rows)

    A daemon thread that comes back from there while the interpreter is torn down aborts the process. So its end waits
    for those who are in, and lets no other daemon thread in.
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
        """Wait until nobody is inside, and keep it so."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: self._inside <= 0)


class Dropped:
    """Releases what an object held once nobody refers to it any more.

    The garbage collector runs in the middle of anything, also of code that holds the locks that a release needs. So it
    only notes what there is to release, and `release_dropped` does it where no lock is held.

    Args:
        owner: the object.
        release: called with no argument, once, in the process that made this.
    """

    def __init__(self, owner: object, release: Callable[[], None]) -> None:
        self._release = release
        self._note = weakref.finalize(owner, _DROPPED.append, (os.getpid(), release))
        self._note.atexit = False

    def release_now(self) -> None:
        """Release it, unless that was done."""
        if self._note.detach():
            self._release()


_DROPPED: deque[tuple[int, Callable[[], None]]] = deque()


def release_dropped() -> None:
    """Release what objects held that are gone; the calling thread must hold no lock of theirs."""
    while _DROPPED:
        try:
            process, release = _DROPPED.popleft()
        except IndexError:  # another thread was quicker
            return
        if process == os.getpid():
            release()


NATIVE_CODE = NativeCode()
_FORKABLE: WeakSet[Forkable] = WeakSet()
_LEFT: list[object] = []


def renew_after_fork(held: Forkable) -> None:
    """Have `held.after_fork` called in every child that this process forks, as long as it is in use."""
    _FORKABLE.add(held)


def leave_to_parent(held: object) -> None:
    """Keep what belongs to the parent process from being closed here, with the last reference to it."""
    _LEFT.append(held)


def _in_child() -> None:
    NATIVE_CODE.__init__()  # type: ignore[misc]
    if torch := sys.modules.get("torch"):
        # GNU OpenMP would wait for ever for the parent's threads. torch's own DataLoader does the same in its workers.
        torch.set_num_threads(1)
    for held in list(_FORKABLE):
        held.after_fork()


atexit.register(NATIVE_CODE.shut)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
