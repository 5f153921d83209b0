"""Where full vectors are kept, apart from what is searched.

A local index keeps them in a file of rows, and in SQLite which row is whose. Reading a shortlist of 100 out of 100,000
rows of 768 float16 takes 0.2 ms. SQLite blobs take 0.5, or 0.3 memory-mapped, and LMDB takes 0.15 and twice the disk;
both of these keep the pages they touched in the process. Beside a server the vectors are in a second Chroma
collection, so that any number of clients share them.

A vector that replaces another waits in the archive until Chroma has the new record: a crash in between leaves the old
record whole, with its own vector.
"""

from __future__ import annotations

import sqlite3
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from mrl_rag.errors import ArchiveError, IndexNotWritable
from mrl_rag.index.rows import RowFile, SlotTable
from mrl_rag.quantization import Bytes, Precision, pack_rows, row_bytes, sign_bits, unpack_rows
from mrl_rag.truncation import Float32Array

ArchivePrecision: TypeAlias = Literal["float16", "int8", "binary"]

# SQLite before 3.32 takes 999 parameters a statement.
_IDS_PER_STATEMENT = 999
# Times a row is looked up anew when it isn't where it was said to be.
_PATIENCE = 3
# Whatever else SQLite says is damage.
_NOT_WRITABLE = (
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
)
# In a damaged table a slot may be anything; -1 is nowhere.
_SLOT = "CASE WHEN typeof(slot) = 'integer' AND slot BETWEEN 0 AND (1 << 40) THEN slot ELSE -1 END"
_CREATE = [
    f"""
    CREATE TABLE {table} (
        id TEXT PRIMARY KEY,
        slot INTEGER NOT NULL,       -- of the row files
        document_hash BLOB           -- NULL: the record has no document
    ) WITHOUT ROWID
    """
    for table in ("places", "waiting")
] + [
    "CREATE TABLE free (slot INTEGER PRIMARY KEY)",  # nobody's
    "CREATE TABLE end (slot INTEGER NOT NULL)",  # the first that was never anybody's
    "INSERT INTO end VALUES (0)",
    "CREATE TABLE rotations (name TEXT PRIMARY KEY, checksum INTEGER NOT NULL, matrix BLOB NOT NULL)",
]


def document_hash(document: str | None) -> bytes | None:
    """Return 16 bytes that change with the document, None where there is none."""
    if document is None:
        return None
    return blake2b(document.encode(), digest_size=16).digest()


class Archive(Protocol):
    """Full vectors by id. Every call is atomic."""

    def write(self, ids: Sequence[str], vectors: Float32Array, documents: Sequence[str | None]) -> None:
        """Store or replace unit rows, float32 [n, full_dim], each with the hash of its document."""

    def hold(self, ids: Sequence[str], vectors: Float32Array, documents: Sequence[str | None]) -> None:
        """Store rows that are to replace others, without replacing them yet."""

    def held(self) -> tuple[list[str], Float32Array]:
        """Return the ids that `hold` stored and nobody settled, and their new vectors, float32 [n, full_dim]."""

    def settle(self, ids: Sequence[str], accepted: Sequence[str]) -> None:
        """Replace the rows of `accepted` by those held, and forget what is held of `ids`."""

    def read(self, ids: Sequence[str]) -> tuple[list[str], Float32Array]:
        """Return the ids found, in the order asked, and their vectors, float32 [found, full_dim]."""

    def read_bits(self, ids: Sequence[str]) -> tuple[list[str], Bytes] | None:
        """Return the ids found and their sign bits, uint8 [found, ceil(full_dim / 8)]; None where none are kept."""

    def damaged(self, ids: Sequence[str]) -> set[str]:
        """Return those of `ids` whose row can't be read, or is not what was written."""

    def known(self, ids: Sequence[str]) -> dict[str, bytes | None]:
        """Return the document hash of those of `ids` that have a row."""

    def unchanged(self, ids: Sequence[str], vectors: Float32Array) -> set[str]:
        """Return those of `ids` whose row is what `write` would make of their vectors, float32 [n, full_dim].

        One that a held row waits to replace is not among them.
        """

    def rounded(self, vectors: Float32Array) -> Float32Array:
        """Return vectors as `read` will after `write`, float32 [n, full_dim]."""

    def ids(self) -> Iterator[list[str]]:
        """Yield the ids of all rows, some thousands at a time."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove rows; unknown ids are passed over."""

    def tidy(self) -> None:
        """Do what a writer that was killed left undone; whoever writes next calls it."""

    def save_rotation(self, name: str, rotation: Float32Array) -> None:
        """Keep a rotation, float32 [full_dim, full_dim]."""

    def load_rotation(self, name: str) -> Float32Array:
        """Return a rotation, float32 [full_dim, full_dim]."""

    def drop_rotations(self, but: str) -> None:
        """Remove every rotation but one."""

    def close(self) -> None:
        """Let go of files; nothing is lost."""


class LocalArchive:
    """An archive in a folder, or in memory: SQLite says which row is whose, the rows stand in files of their own.

    Rows are written and synced before the transaction that names them. A row whose id got another one, or was removed,
    is made nobody's and used again.

    Args:
        path: the SQLite file; the rows are in ".rows" and ".bits" beside it. None for memory.
        full_dim: length of a vector.
        precision: "float16"; "int8", with a scale a row; or "binary": as int8, and sign bits in a file of their own.
        create: make the files, which must not exist yet; otherwise they must.

    Raises:
        ArchiveError: a file is missing or damaged.
        IndexNotWritable: a file can't be written.
    """

    def __init__(self, path: Path | None, full_dim: int, precision: ArchivePrecision, create: bool) -> None:
        self._path = path
        self._full_dim = full_dim
        self._rows_as: Precision = "float16" if precision == "float16" else "int8"
        self._lock = threading.Lock()
        lengths = {".rows": row_bytes(self._rows_as, full_dim)}
        if precision == "binary":
            lengths[".bits"] = -(-full_dim // 8)
        if path is not None:
            for file in (path, *map(path.with_suffix, lengths)):
                if file.is_file() == create:
                    raise ArchiveError(
                        f"the archive of full vectors {file} {'exists already' if create else 'is missing'}. Bring it "
                        "back from a backup, or fill a new collection."
                    )
        with self._named_errors():
            # Rows first: with a crash in between, nothing names these files yet.
            self._rows, *bits = (_row_file(path, suffix, length, create) for suffix, length in lengths.items())
            self._bits: RowFile | None = bits[0] if bits else None
            # "rw": one that another process drops at this moment must not come back empty.
            name = ":memory:" if path is None else f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
            # Another process may be writing: its transactions are short.
            self._connection = sqlite3.connect(
                name, timeout=60, check_same_thread=False, isolation_level=None, uri=True
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            # FULL: a power cut after a write has returned must not undo it.
            self._connection.execute("PRAGMA synchronous = FULL")
            if create:
                for statement in _CREATE:
                    self._connection.execute(statement)
            for table in ("places", "waiting"):
                self._connection.execute(f"SELECT id, slot, document_hash FROM {table} LIMIT 1").fetchone()
            self._connection.execute("SELECT slot FROM free LIMIT 1").fetchone()
        # Also for those who never call `close`.
        self._disconnect = weakref.finalize(self, self._connection.close)
        self._table: SlotTable | None = None

    def write(self, ids: Sequence[str], vectors: Float32Array, documents: Sequence[str | None]) -> None:
        """See `Archive.write`."""
        with self._transaction() as dropped:
            dropped += self._slots("places", ids).items()
            new = self._store("places", ids, vectors, documents)
        self._learn(new)

    def hold(self, ids: Sequence[str], vectors: Float32Array, documents: Sequence[str | None]) -> None:
        """See `Archive.hold`."""
        with self._transaction() as dropped:
            dropped += self._slots("waiting", ids).items()
            self._store("waiting", ids, vectors, documents)

    def held(self) -> tuple[list[str], Float32Array]:
        """See `Archive.held`."""
        with self._lock, self._named_errors():
            waiting = self._connection.execute(f"SELECT id, {_SLOT} FROM waiting ORDER BY id").fetchall()
            ids = [id_ for id_, _ in waiting]
            rows, wrong = self._rows.read(np.array([slot for _, slot in waiting], dtype=np.int64), ids)
        # A damaged row was never acknowledged: it is as good as not written.
        sound = sorted(set(range(len(ids))) - set(wrong))
        return [ids[position] for position in sound], unpack_rows(rows[sound], self._rows_as)

    def settle(self, ids: Sequence[str], accepted: Sequence[str]) -> None:
        """See `Archive.settle`."""
        taken = set(accepted)
        with self._transaction() as dropped:
            waiting = self._slots("waiting", ids)
            new = {id_: slot for id_, slot in waiting.items() if id_ in taken}
            dropped += self._slots("places", list(new)).items()
            dropped += ((id_, slot) for id_, slot in waiting.items() if id_ not in taken)
            self._connection.executemany(
                "INSERT OR REPLACE INTO places SELECT * FROM waiting WHERE id = ?", [(id_,) for id_ in new]
            )
            self._connection.executemany("DELETE FROM waiting WHERE id = ?", [(id_,) for id_ in ids])
        self._learn(new)

    def read(self, ids: Sequence[str]) -> tuple[list[str], Float32Array]:
        """See `Archive.read`.

        Raises:
            ArchiveError: a row is not what was written.
        """
        found, rows = self._read(self._rows, ids)
        return found, unpack_rows(rows, self._rows_as)

    def read_bits(self, ids: Sequence[str]) -> tuple[list[str], Bytes] | None:
        """See `Archive.read_bits`.

        Raises:
            ArchiveError: a row is not what was written.
        """
        return None if self._bits is None else self._read(self._bits, ids)

    def damaged(self, ids: Sequence[str]) -> set[str]:
        """See `Archive.damaged`."""
        with self._lock, self._named_errors():
            known = self._slots("places", ids)
            slots = np.fromiter(known.values(), dtype=np.int64, count=len(known))
            names = list(known)
            wrong = {position for file in self._files() for position in file.read(slots, names)[1]}
        return {names[position] for position in wrong}

    def known(self, ids: Sequence[str]) -> dict[str, bytes | None]:
        """See `Archive.known`."""
        with self._lock, self._named_errors():
            return dict(self._select("id, document_hash", "places", ids))

    def unchanged(self, ids: Sequence[str], vectors: Float32Array) -> set[str]:
        """See `Archive.unchanged`."""
        with self._lock, self._named_errors():
            known = self._slots("places", ids)
            slots = np.array([known.get(id_, -1) for id_ in ids], dtype=np.int64)
            rows, wrong = self._rows.read(slots, ids)
            held = set(self._slots("waiting", ids))
        same = (rows == pack_rows(vectors, self._rows_as)).all(axis=1)
        same[wrong] = False
        return {id_ for id_, equal in zip(ids, same, strict=True) if equal} - held

    def rounded(self, vectors: Float32Array) -> Float32Array:
        """See `Archive.rounded`."""
        return unpack_rows(pack_rows(vectors, self._rows_as), self._rows_as)

    def ids(self) -> Iterator[list[str]]:
        """See `Archive.ids`."""
        last = ""
        while True:
            with self._lock, self._named_errors():
                sql = "SELECT id FROM places WHERE id > ? ORDER BY id LIMIT 5000"
                page = [id_ for (id_,) in self._connection.execute(sql, (last,))]
            if not page:
                return
            yield page
            last = page[-1]

    def delete(self, ids: Sequence[str]) -> None:
        """See `Archive.delete`."""
        with self._transaction() as dropped:
            dropped += self._slots("places", ids).items()
            self._connection.executemany("DELETE FROM places WHERE id = ?", [(id_,) for id_ in ids])

    def tidy(self) -> None:
        """See `Archive.tidy`."""
        used = "SELECT slot FROM places UNION ALL SELECT slot FROM waiting"
        with self._transaction():
            # Where damage makes somebody's row look free, it must not be written over.
            if self._connection.execute("SELECT slot FROM free LIMIT 1").fetchone():
                self._connection.execute(f"DELETE FROM free WHERE slot IN ({used})")
            last = f"(SELECT max(slot) FROM ({used}))"
            self._connection.execute(f"UPDATE end SET slot = 1 + {last} WHERE slot <= {last}")
        with self._lock, self._named_errors():
            self._forget([slot for (slot,) in self._connection.execute("SELECT slot FROM free")])

    def save_rotation(self, name: str, rotation: Float32Array) -> None:
        """See `Archive.save_rotation`."""
        blob = rotation.astype("<f4").tobytes()
        with self._transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO rotations VALUES (?, ?, ?)", (name, zlib.crc32(blob), blob)
            )

    def load_rotation(self, name: str) -> Float32Array:
        """See `Archive.load_rotation`.

        Raises:
            ArchiveError: it is missing or damaged.
        """
        with self._lock, self._named_errors():
            sql = "SELECT checksum, matrix FROM rotations WHERE name = ?"
            row = self._connection.execute(sql, (name,)).fetchone()
        if row is None or len(row[1]) != 4 * self._full_dim**2 or zlib.crc32(row[1]) != row[0]:
            raise ArchiveError(
                f"the rotation in {self._name} is {'missing' if row is None else 'damaged'}. Call repair(), which fits "
                "a new one from the archive."
            )
        return np.frombuffer(row[1], dtype="<f4").astype(np.float32).reshape(self._full_dim, self._full_dim)

    def drop_rotations(self, but: str) -> None:
        """See `Archive.drop_rotations`."""
        with self._transaction():
            self._connection.execute("DELETE FROM rotations WHERE name != ?", (but,))

    def close(self) -> None:
        """See `Archive.close`."""
        with self._lock:
            self._disconnect()
            for file in self._files():
                file.close()

    def _files(self) -> list[RowFile]:
        return [self._rows] if self._bits is None else [self._rows, self._bits]

    def _read(self, file: RowFile, ids: Sequence[str]) -> tuple[list[str], Bytes]:
        if self._table is None or self._table.stale:
            with self._lock, self._named_errors():
                self._table = SlotTable(self._connection.execute(f"SELECT id, {_SLOT} FROM places"))
        table = self._table
        with self._named_errors():
            rows, wrong = file.read(table.slots(ids), ids)
        for _ in range(_PATIENCE):
            if not wrong:
                return list(ids), rows
            # Not where it was: replaced or removed since, by this process or another one. Or damaged.
            asked = [ids[position] for position in wrong]
            with self._lock, self._named_errors():
                known = self._slots("places", asked)
                table.learn(known.items())
                again, still = file.read(np.array([known.get(id_, -1) for id_ in asked]), asked)
            rows[wrong] = again
            missing = {id_ for id_ in asked if id_ not in known}
            wrong = [wrong[position] for position in still if asked[position] in known]
            if missing:
                kept = [position for position, id_ in enumerate(ids) if id_ not in missing]
                wrong = [kept.index(position) for position in wrong]
                ids, rows = [ids[position] for position in kept], rows[kept]
        if not wrong:
            return list(ids), rows
        raise ArchiveError(
            f"the vector of {ids[wrong[0]]!r} in {self._name} is damaged. Call repair(), and upsert the record again."
        )

    def _store(
        self, table: str, ids: Sequence[str], vectors: Float32Array, documents: Sequence[str | None]
    ) -> dict[str, int]:
        """Write rows to slots of their own, and name them; inside a transaction."""
        if not ids:
            return {}
        free = [
            slot for (slot,) in self._connection.execute("SELECT slot FROM free ORDER BY slot LIMIT ?", (len(ids),))
        ]
        self._connection.executemany("DELETE FROM free WHERE slot = ?", [(slot,) for slot in free])
        (end,) = self._connection.execute("SELECT slot FROM end").fetchone()
        more = len(ids) - len(free)
        self._connection.execute("UPDATE end SET slot = ?", (end + more,))
        slots = [*free, *range(end, end + more)]
        places = np.array(slots, dtype=np.int64)
        self._rows.write(places, ids, pack_rows(vectors, self._rows_as))
        if self._bits is not None:
            self._bits.write(places, ids, sign_bits(vectors))
        hashes = map(document_hash, documents)
        self._connection.executemany(
            f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", list(zip(ids, slots, hashes, strict=True))
        )
        return dict(zip(ids, slots, strict=True))

    def _learn(self, new: dict[str, int]) -> None:
        if self._table is not None:
            self._table.learn(new.items())

    def _forget(self, slots: list[int]) -> None:
        for file in self._files():
            file.forget(slots)

    def _slots(self, table: str, ids: Sequence[str]) -> dict[str, int]:
        return dict(self._select(f"id, {_SLOT}", table, ids))

    def _select(self, columns: str, table: str, ids: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(ids), _IDS_PER_STATEMENT):
            part = ids[start : start + _IDS_PER_STATEMENT]
            marks = ",".join("?" * len(part))
            yield from self._connection.execute(f"SELECT {columns} FROM {table} WHERE id IN ({marks})", part)

    @contextmanager
    def _transaction(self) -> Iterator[list[tuple[str, int]]]:
        """Yield a list for the ids and slots of rows that are nobody's when it is committed."""
        dropped: list[tuple[str, int]] = []
        with self._lock, self._named_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield dropped
                free = self._owned(dropped)
                self._connection.executemany("INSERT INTO free VALUES (?)", [(slot,) for slot in free])
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            # A reader that hasn't heard of it is told by the row itself.
            self._forget(free)

    def _owned(self, rows: list[tuple[str, int]]) -> list[int]:
        """Return the slots that do hold their ids' rows: a damaged entry may point at somebody else's."""
        ids = [id_ for id_, _ in rows]
        slots = np.array([slot for _, slot in rows], dtype=np.int64)
        return np.delete(slots, self._rows.read(slots, ids)[1]).tolist()

    @property
    def _name(self) -> str:
        return f"the archive {self._path}" if self._path else "the archive in memory"

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as error:
            # Python's own, such as text that is no UTF-8, have no code.
            if isinstance(error, OSError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_WRITABLE:
                raise IndexNotWritable(
                    f"{self._name} can't be used: {error}. Check the folder's permissions and the free disk space."
                ) from error
            raise ArchiveError(
                f"{self._name} is damaged: {error}. Bring it back from a backup, or fill a new collection."
            ) from error


def _row_file(path: Path | None, suffix: str, length: int, create: bool) -> RowFile:
    if path is None:
        return RowFile(None, length)
    file = path.with_suffix(suffix)
    if create:
        file.touch(exist_ok=False)
    return RowFile(file, length)
