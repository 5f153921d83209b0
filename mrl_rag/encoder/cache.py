"""`CachedEncoder`: vectors kept in a file."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np

from mrl_rag.encoder.base import Advance, Encoder
from mrl_rag.errors import EncoderCacheError, EncoderClosed
from mrl_rag.lifetime import leave_to_parent, renew_after_fork
from mrl_rag.tasks import Task
from mrl_rag.truncation import Float32Array, truncate

# Texts encoded and committed at a time: the most that an interruption loses.
_BATCH = 1024
# SQLite before 3.32 takes 999 parameters per statement.
_KEYS_PER_STATEMENT = 999
# How long to wait while another process writes to the file.
_LOCK_TIMEOUT_S = 60.0


class CachedEncoder(Encoder):
    """Keeps the vectors of any encoder in an SQLite file, and computes only those that aren't there.

        encoder = CachedEncoder(MatryoshkaEncoder(), "./vectors.sqlite3")
        encoder.encode_documents(texts)            # computed and stored
        encoder.encode_documents(texts, dim=64)    # read: full vectors are stored, which serve every dimension
        TwoStageRetriever(encoder, index)          # it can be used like any encoder

    The key is the encoder's fingerprint, the task and the text, so one file serves any number of encoders. Vectors are
    float32: what is read equals what was computed. Several threads and processes may use one file on a local disk.
    Vectors are committed every 1024 texts, so a call that fails goes on from there when it is made again.

    Args:
        encoder: any encoder.
        path: the file; created if missing.

    Raises:
        EncoderCacheError: the file can't be created, read or written, or is not such a cache.
    """

    def __init__(self, encoder: Encoder, path: str | os.PathLike[str]) -> None:
        self.encoder = encoder
        self._head = encoder._head
        self._path = Path(path).expanduser().absolute()
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        with self._opened():
            pass
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"CachedEncoder({self.encoder!r}, {str(self._path)!r})"

    def after_fork(self) -> None:
        """Open the file again on the next use: a connection of SQLite can't be shared with the parent."""
        self._lock = threading.Lock()
        leave_to_parent(self._connection)
        self._connection = None

    def __reduce__(self) -> tuple[type[CachedEncoder], tuple[Encoder, Path]]:
        return CachedEncoder, (self.encoder, self._path)

    @property
    def full_dim(self) -> int:
        """Length of the whole vector."""
        return self.encoder.full_dim

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions the model was trained for, widest first."""
        return self.encoder.dims

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens."""
        return self.encoder.max_length

    @property
    def fingerprint(self) -> str:
        """The encoder's: a cache changes no vector."""
        return self.encoder.fingerprint

    @property
    def dim(self) -> int:
        """Length of the vectors where a call names none: the encoder's."""
        return self.encoder.dim

    def count_tokens(self, texts: Sequence[str], task: Task = "document") -> list[int] | None:
        """Return how many tokens each text has; None where the encoder can't count."""
        return self.encoder.count_tokens(texts, task)

    def _encode(self, texts: list[str], task: Task, dim: int, advance: Advance) -> Float32Array:
        prefix = f"{self.fingerprint}\0{task}\0".encode()
        keys = [blake2b(prefix + text.encode(), digest_size=16).digest() for text in texts]
        known = self._read(list(dict.fromkeys(keys)))
        missing = list({key: text for key, text in zip(keys, texts, strict=True) if key not in known}.items())
        advance(len(texts) - len(missing))
        for start in range(0, len(missing), _BATCH):
            part = missing[start : start + _BATCH]
            vectors = self.encoder.encode([text for _, text in part], task, self.full_dim)
            found = dict(zip((key for key, _ in part), vectors, strict=True))
            self._write(found)
            known |= found
            advance(len(part))
        return truncate(np.stack([known[key] for key in keys]), dim)

    def _check_open(self) -> None:
        if self._closed:
            raise EncoderClosed("this encoder was closed; make a new one.")

    def close(self) -> None:
        """Close the file and the encoder."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()
        self.encoder.close()

    def _read(self, keys: list[bytes]) -> dict[bytes, Float32Array]:
        found: dict[bytes, Float32Array] = {}
        with self._opened() as connection:
            for start in range(0, len(keys), _KEYS_PER_STATEMENT):
                part = keys[start : start + _KEYS_PER_STATEMENT]
                marks = ",".join("?" * len(part))
                for key, blob in connection.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", part):
                    # A row of another length was damaged: it is computed and written again.
                    if len(blob) == 4 * self.full_dim:
                        found[key] = np.frombuffer(blob, dtype="<f4")
        return found

    def _write(self, vectors: dict[bytes, Float32Array]) -> None:
        rows = [(key, vector.astype("<f4").tobytes()) for key, vector in vectors.items()]
        with self._opened() as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection, to one thread at a time."""
        try:
            with self._lock:
                self._check_open()
                if self._connection is None:
                    self._connection = self._connect()
                yield self._connection
        except (OSError, sqlite3.Error) as error:
            raise EncoderCacheError(
                f"the cache of vectors {self._path} can't be used: {error}. All it holds can be computed again: "
                "delete the file, or pass another path."
            ) from error

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=_LOCK_TIMEOUT_S, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        with connection:
            connection.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL)")
        return connection
