"""`UnloadableNetwork`: a network that is on its device only while it is used."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, TypeAlias

from mrl_rag.encoder.batching import TokenSequence
from mrl_rag.errors import EncoderClosed
from mrl_rag.lifetime import NATIVE_CODE
from mrl_rag.truncation import Float32Array

if TYPE_CHECKING:
    from mrl_rag.encoder.network import Network
    from mrl_rag.encoder.workers import Workers

    AnyNetwork: TypeAlias = Network | Workers


class UnloadableNetwork:
    """Unloads a network after some time without use, and loads it again for the next.

    Any number of threads may call. While a network is loaded that will be unloaded, a daemon thread waits for that;
    where `keep_alive` is None there is no thread.

    Args:
        load: returns the network. It must not refer to the owner of this object, which would then live on.
        keep_alive: seconds without use after which the network is unloaded; None for never.

    Attributes:
        network: the network; None while it isn't loaded.
        packs: as `Network.packs`, known while it isn't loaded, too.
        full_dim: as `Network.full_dim`.
        positions: as `Network.positions`.

    Raises:
        MrlRagError: as `load` does.
    """

    def __init__(self, load: Callable[[], AnyNetwork], keep_alive: float | None) -> None:
        self._load = load
        self._keep_alive = keep_alive
        self._closed = False
        network = load()
        self.packs, self.full_dim, self.positions = network.packs, network.full_dim, network.positions
        self.network: AnyNetwork | None = network
        self.after_fork()
        self._watch()

    def after_fork(self) -> None:
        """Forget the parent's threads."""
        self._lock = threading.Lock()
        self._users: Counter[AnyNetwork] = Counter()
        self._last_used = monotonic()
        self._watched = False
        # Ends the thread once this object is gone. A `SimpleQueue` may be put into while memory is being collected.
        self._stop: SimpleQueue[None] = SimpleQueue()
        weakref.finalize(self, self._stop.put, None).atexit = False

    def run(self, sequences: Sequence[TokenSequence]) -> Float32Array:
        """Return the vectors of sequences, float32 [n, full_dim], and load the network first where it isn't.

        Raises:
            EncoderClosed: `close` was called.
            MrlRagError: as `load` and the network's `run` do.
        """
        with self._used() as network:
            return network.run(sequences)

    def replace(self, load: Callable[[], AnyNetwork]) -> None:
        """Load another network instead, from now on by `load`. The old one finishes what it runs."""
        with NATIVE_CODE:
            network = load()
        with self._lock:
            if self._closed:
                network.close()
            self._check_open()
            self._load = load
            self._drop()
            self.network, self.packs, self._last_used = network, network.packs, monotonic()
            self._watch()

    def close(self) -> None:
        """Free the network, once no thread uses it, for good."""
        with self._lock:
            self._closed = True
            self._drop()
            self._stop.put(None)

    def _check_open(self) -> None:
        if self._closed:
            raise EncoderClosed("this encoder was closed while it was encoding; make a new one.")

    @contextmanager
    def _used(self) -> Iterator[AnyNetwork]:
        with self._lock:
            self._check_open()
            if self.network is None:
                self.network = self._load()
            network = self.network
            self._users[network] += 1
            self._watch()
        try:
            yield network
        finally:
            with self._lock:
                self._last_used = monotonic()
                self._users[network] -= 1
                if not self._users[network]:
                    del self._users[network]
                    if network is not self.network:
                        network.close()

    def _drop(self) -> None:
        """Close the network, now or when its last user is done; the lock is held."""
        network, self.network = self.network, None
        if network is not None and network not in self._users:
            network.close()

    def _watch(self) -> None:
        """Start the thread that unloads, where it isn't running already."""
        if self._keep_alive is None or self._watched:
            return
        self._watched = True
        arguments = weakref.ref(self), self._stop, self._keep_alive
        threading.Thread(target=_unload_when_idle, args=arguments, name="mrl_rag-keep-alive", daemon=True).start()

    def _unload_if_idle(self) -> float | None:
        """Unload the network if it wasn't used for long enough.

        Returns:
            Seconds after which to call again; None where nothing is loaded any more.
        """
        assert self._keep_alive is not None
        with NATIVE_CODE, self._lock:
            left = self._keep_alive if self._users else self._last_used + self._keep_alive - monotonic()
            if left > 0 and not self._closed:
                return left
            self._drop()
            self._watched = False
            return None


def _unload_when_idle(held: weakref.ref[UnloadableNetwork], stop: SimpleQueue[None], seconds: float) -> None:
    left: float | None = seconds
    while left is not None:
        try:
            stop.get(timeout=min(left, threading.TIMEOUT_MAX))
            return
        except Empty:
            unloadable = held()
        # Not kept in a variable while waiting: the network would live on with it.
        left = None if unloadable is None else unloadable._unload_if_idle()
        del unloadable
