"""Several devices, one process each."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from queue import SimpleQueue
from typing import Any

import torch

from mrl_rag.encoder.batching import TokenSequence
from mrl_rag.encoder.network import Network
from mrl_rag.errors import EncoderClosed
from mrl_rag.truncation import Float32Array


class Workers:
    """One process per device, each of which loads the weights and runs a `Network`.

    A batch goes to a device that is free. A worker process ends when its parent does.

    Args:
        devices: one per process; a device may be named twice.
        settings: the arguments of `Network`, without the device.

    Attributes:
        packs: as `Network.packs`.
        full_dim: as `Network.full_dim`.
        positions: as `Network.positions`.

    Raises:
        MrlRagError: as `Network`.
    """

    def __init__(self, devices: Sequence[torch.device], settings: dict[str, Any]) -> None:
        context = get_context("spawn")
        on_cpu = sum(device.type == "cpu" for device in devices)
        threads = max((os.cpu_count() or 1) // max(on_cpu, 1), 1)
        self._pools = {
            position: ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(threads,))
            for position in range(len(devices))
        }
        self._devices = list(devices)
        self._closed = False
        self._free: SimpleQueue[int] = SimpleQueue()
        try:
            opened = [self._pools[i].submit(_open, settings | {"device": device}) for i, device in enumerate(devices)]
            facts = [future.result() for future in opened]
        except BaseException:
            self.close()
            raise
        # The same network everywhere, but a GPU may pack where a CPU does not.
        self.packs = all(packs for packs, _, _ in facts)
        _, self.full_dim, self.positions = facts[0]
        for position in self._pools:
            self._free.put(position)

    def run(self, sequences: Sequence[TokenSequence]) -> Float32Array:
        """Return the vectors of sequences, float32 [n, full_dim]; any number of threads may call.

        Raises:
            EncoderClosed: a worker died, or `close` was called.
            EncoderOutOfMemory: one sequence alone does not fit.
        """
        position = self._free.get()
        try:
            return self._pools[position].submit(_run, list(sequences)).result()
        except (CancelledError, RuntimeError) as error:
            if self._closed:
                raise EncoderClosed("this encoder was closed while it was encoding; make a new one.") from error
            if not isinstance(error, BrokenProcessPool):
                raise
            raise EncoderClosed(
                f"the process of device {position}, {self._devices[position]}, died. The system may have "
                "ended it for lack of memory. Make a new encoder."
            ) from error
        finally:
            self._free.put(position)

    def close(self) -> None:
        """End the processes; each finishes its current batch."""
        self._closed = True
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)


_network: Network | None = None


def _start(threads: int) -> None:
    # Ctrl-C reaches every process of a terminal; the parent ends the work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _open(settings: dict[str, Any]) -> tuple[bool, int, int]:
    global _network
    _network = Network(**settings)
    return _network.packs, _network.full_dim, _network.positions


def _run(sequences: Sequence[TokenSequence]) -> Float32Array:
    assert _network is not None
    return _network.run(sequences)
