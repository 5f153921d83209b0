"""Where full vectors are kept, apart from what Chroma searches.

A local index keeps them in an LMDB file: one writer, any number of readers in any process, and a commit that is on the
disk or didn't happen. Reading 50 of 100,000 vectors of 768 float16 takes 0.1 ms. A memory-mapped file of rows would
make a search 5% faster and a batch 12% (`benchmarks/README.md`), and need a journal, a list of free rows and locks of
its own. Beside a server the vectors are in a second Chroma collection, which its clients share.

A vector that replaces another is staged until Chroma has the new record: a crash in between leaves the old record
whole, with its own vector.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import lmdb
import numpy as np
import numpy.typing as npt

from mrl_rag.errors import ArchiveError, IndexClosed, IndexNotWritable
from mrl_rag.index.config import ArchivePrecision
from mrl_rag.index.gate import SharedGate
from mrl_rag.lifetime import Dropped
from mrl_rag.quantization import Bytes, Precision, pack_rows, row_bytes, sign_bits, unpack_rows
from mrl_rag.truncation import Float32Array

# `lmdb.Transaction` without its `buffers=True`, which returns memoryviews.
Transaction: TypeAlias = Any
Keys: TypeAlias = Sequence[bytes]
Slots: TypeAlias = npt.NDArray[np.int64]

# Bytes of the file that are mapped at first; more than that and twice the file are when it is full.
_MAP_BYTES = 64 << 20
_MAX_READERS = 1024
_SLACK = 2 << 16
_CHECKSUM = 8
# Odd, so that a change of any one word of a row changes its checksum: 2**64 divided by the golden ratio.
_ODD = np.uint64(0x9E3779B97F4A7C15)
_SLOT = 8
# Transactions of which it is kept what they changed: so many a reader may miss and still not read everything again.
_CHANGES_KEPT = 256
_HASH = 16
_CRC = 4


def document_hash(document: str | None) -> bytes | None:
    """Return 16 bytes that change with the document, None where there is none."""
    if document is None:
        return None
    return blake2b(document.encode(), digest_size=_HASH).digest()


class Archive(Protocol):
    """Full vectors by id. Every call is atomic."""

    def __len__(self) -> int:
        """Return how many vectors there are."""

    @property
    def version(self) -> int | None:
        """A number that grows with each write by any process; None where that can't be told."""

    def write(
        self,
        ids: Sequence[str],
        vectors: Float32Array,
        documents: Sequence[str | None],
        staged: Container[str] = (),
    ) -> None:
        """Store unit rows, float32 [n, full_dim], each with the hash of its document.

        Those of `ids` that are in `staged` don't replace the rows that are there yet: `commit_staged` does that.
        """

    def staged(self) -> tuple[list[str], Float32Array]:
        """Return the ids that wait to be committed, and their new vectors, float32 [n, full_dim]."""

    def commit_staged(self, ids: Sequence[str], accepted: Container[str]) -> None:
        """Replace the rows of `accepted` by the staged ones, and forget what is staged of `ids`."""

    def read(self, ids: Sequence[str], slots: Slots | None = None) -> tuple[list[str], Float32Array]:
        """Return the ids found, in the order asked, and their vectors, float32 [found, full_dim].

        Args:
            ids: n ids.
            slots: int64 [n], what `slots` said of them, however long ago; None asks again.
        """

    def slots(self, ids: Sequence[str]) -> Slots:
        """Return where the rows of n ids are, int64 [n]; -1 of an id without one."""

    def changes(self, since: int) -> tuple[list[str], bool]:
        """Return the ids that were written or deleted after a `version`, and whether that is known of all of them."""

    def read_bits(self, ids: Sequence[str]) -> tuple[list[str], Bytes] | None:
        """Return the ids found and their sign bits, uint8 [found, ceil(full_dim / 8)]; None where none are kept."""

    def damaged(self, ids: Sequence[str]) -> set[str]:
        """Return those of `ids` whose row is not what was written."""

    def document_hashes(self, ids: Sequence[str]) -> dict[str, bytes | None]:
        """Return the document hash of those of `ids` that have a row."""

    def unchanged(self, ids: Sequence[str], vectors: Float32Array) -> set[str]:
        """Return those of `ids` whose row is what `write` would make of their vectors, float32 [n, full_dim].

        One that a staged row waits to replace is not among them.
        """

    def as_stored(self, vectors: Float32Array) -> Float32Array:
        """Return vectors as `read` will after `write`, float32 [n, full_dim]."""

    def ids(self) -> Iterator[list[str]]:
        """Yield the ids of all rows, some thousands at a time."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove rows; unknown ids are passed over."""

    def save_rotation(self, name: str, rotation: Float32Array) -> None:
        """Keep a rotation, float32 [full_dim, full_dim]."""

    def load_axes(self, name: str, count: int) -> Float32Array:
        """Return the first `count` columns of a rotation, float32 [full_dim, count]."""

    def drop_rotations(self, but: str) -> None:
        """Remove every rotation but one."""

    def close(self) -> None:
        """Let go of files; nothing is lost."""


class LmdbArchive:
    """An archive in a folder, or in memory.

    Databases of the file: `places` has an id's slot and its document hash, `vectors` and `bits` a slot's row, `staged`
    the row that is to replace an id's, `rotations` a rotation's axes, `changes` the ids that each of the last
    transactions changed, `long_ids` the ids that are too long for a key. Slots grow, so that vectors fill the file's
    pages one after another; ids as they come would leave half of each empty.
    A row carries a checksum of its id and its bytes.

    Args:
        path: the file.
        full_dim: length of a vector.
        precision: "float16"; "int8", with a scale per row; or "binary": as int8, and sign bits beside it.
        create: make the file, which must not exist yet; otherwise it must.
        durable: whether a write that has returned is on the disk.

    Raises:
        ArchiveError: the file is missing or damaged.
        IndexNotWritable: the file can't be written.
    """

    def __init__(
        self, path: Path, full_dim: int, precision: ArchivePrecision, create: bool, durable: bool = True
    ) -> None:
        if path.is_file() == create:
            raise ArchiveError(
                f"the archive of full vectors {path} {'exists already' if create else 'is missing'}. Bring it back "
                "from a backup, or fill a new collection."
            )
        self._name = f"the archive {path}"
        self._full_dim = full_dim
        self._precision: Precision = "float16" if precision == "float16" else "int8"
        self._row_bytes = row_bytes(self._precision, full_dim)
        self._has_bits = precision == "binary"
        names = ("places", "vectors", "bits", "staged", "rotations", "long_ids", "changes")
        with self._named_errors():
            self._file = _LmdbFile.open(path, durable)
            self._dropped = Dropped(self, self._file.close)
            try:
                databases = [self._file.database(name, create) for name in names]
            except BaseException:
                self.close()
                raise
        self._places, self._vectors, self._bits, self._staged, self._rotations, self._long_ids, self._changes = (
            databases
        )

    def close(self) -> None:
        """See `Archive.close`."""
        self._dropped.release_now()

    def __len__(self) -> int:
        """See `Archive.__len__`."""
        with self._reading() as txn:
            return int(txn.stat(self._places)["entries"])

    @property
    def version(self) -> int:
        """See `Archive.version`."""
        return self._file.version

    def write(
        self,
        ids: Sequence[str],
        vectors: Float32Array,
        documents: Sequence[str | None],
        staged: Container[str] = (),
    ) -> None:
        """See `Archive.write`."""
        keys = _keys(ids)
        rows = _with_checksums(pack_rows(vectors, self._precision), keys)
        bits = _with_checksums(sign_bits(vectors), keys) if self._has_bits else None
        hashes = [document_hash(document) or b"" for document in documents]

        def work(txn: Transaction) -> None:
            slot = self._next_slot(txn)
            for position, (id_, key) in enumerate(zip(ids, keys, strict=True)):
                bit_row = b"" if bits is None else bits[position].tobytes()
                if key.startswith(_LONG):
                    txn.put(key, id_.encode(), db=self._long_ids)
                if id_ in staged:
                    # The length of the hash first: rows and bits have fixed lengths.
                    row = bytes([len(hashes[position])]) + hashes[position] + rows[position].tobytes() + bit_row
                    txn.put(key, row, db=self._staged)
                else:
                    slot += self._put(txn, key, hashes[position], rows[position].tobytes(), bit_row, slot)

        self._write(work, ids)

    def staged(self) -> tuple[list[str], Float32Array]:
        """See `Archive.staged`."""
        with self._reading() as txn:
            entries = [(key, *self._split(value)) for key, value in txn.cursor(self._staged)]
            ids = [self._id(txn, key) for key, *_ in entries]
        joined = _joined([row for _, _, row, _ in entries], self._row_bytes)
        rows, wrong = _checked(joined, [key for key, *_ in entries], self._row_bytes)
        # A damaged row was never acknowledged: it is as good as not written.
        sound = sorted(set(range(len(ids))) - set(wrong))
        return [ids[position] for position in sound], unpack_rows(rows[sound], self._precision)

    def commit_staged(self, ids: Sequence[str], accepted: Container[str]) -> None:
        """See `Archive.commit_staged`."""

        def work(txn: Transaction) -> None:
            slot = self._next_slot(txn)
            for id_ in ids:
                key = _key(id_)
                value = txn.pop(key, db=self._staged)
                if value is not None and id_ in accepted:
                    hash_, row, bit_row = self._split(value)
                    slot += self._put(txn, key, hash_, row, bit_row, slot)

        self._write(work, ids)

    def read(self, ids: Sequence[str], slots: Slots | None = None) -> tuple[list[str], Float32Array]:
        """See `Archive.read`.

        Raises:
            ArchiveError: a row is not what was written.
        """
        if slots is not None:
            numbers = slots.astype(">i8").tobytes()
            with self._reading(buffers=True) as txn:
                stored = txn.cursor(self._vectors).getmulti(
                    [numbers[at : at + _SLOT] for at in range(0, len(numbers), _SLOT)]
                )
                joined = _joined([row for _, row in stored], self._row_bytes)
            if len(stored) == len(ids):
                rows, wrong = _checked(joined, _keys(ids), self._row_bytes)
                if not wrong:
                    return list(ids), unpack_rows(rows, self._precision)
        # None known, or rows were moved, deleted or damaged since.
        found, rows = self._read(self._vectors, ids, self._row_bytes)
        return found, unpack_rows(rows, self._precision)

    def slots(self, ids: Sequence[str]) -> Slots:
        """See `Archive.slots`."""
        keys = _keys(ids)
        with self._reading(buffers=True) as txn:
            places = {bytes(key): bytes(place[:_SLOT]) for key, place in txn.cursor(self._places).getmulti(keys)}
        joined = b"".join(places.get(key, b"\xff" * _SLOT) for key in keys)
        return np.frombuffer(joined, dtype=">i8").astype(np.int64)

    def changes(self, since: int) -> tuple[list[str], bool]:
        """See `Archive.changes`."""
        with self._reading() as txn:
            last = int(txn.id())
            first = max(since, last - _CHANGES_KEPT, 0) + 1
            stored = [txn.get(_number(at), db=self._changes) for at in range(first, last + 1)]
        known = [_ids_in(value) for value in stored if value is not None and _is_sound(value)]
        return list(dict.fromkeys(id_ for ids in known for id_ in ids)), len(known) == last - since

    def read_bits(self, ids: Sequence[str]) -> tuple[list[str], Bytes] | None:
        """See `Archive.read_bits`.

        Raises:
            ArchiveError: a row is not what was written.
        """
        return self._read(self._bits, ids, -(-self._full_dim // 8)) if self._has_bits else None

    def damaged(self, ids: Sequence[str]) -> set[str]:
        """See `Archive.damaged`."""
        wrong: set[str] = set()
        databases = [(self._vectors, self._row_bytes)]
        if self._has_bits:
            databases.append((self._bits, -(-self._full_dim // 8)))
        for database, length in databases:
            found, _, bad = self._rows(database, ids, length)
            wrong.update(found[position] for position in bad)
        return wrong

    def document_hashes(self, ids: Sequence[str]) -> dict[str, bytes | None]:
        """See `Archive.document_hashes`."""
        with self._reading(buffers=True) as txn:
            found = txn.cursor(self._places).getmulti(_keys(ids))
            hashes = {bytes(key): bytes(place[_SLOT : _SLOT + _HASH]) for key, place in found}
        return {id_: hashes[key] or None for id_ in ids if (key := _key(id_)) in hashes}

    def unchanged(self, ids: Sequence[str], vectors: Float32Array) -> set[str]:
        """See `Archive.unchanged`."""
        found, rows, wrong = self._rows(self._vectors, ids, self._row_bytes)
        given = dict(zip(ids, pack_rows(vectors, self._precision), strict=True))
        with self._reading() as txn:
            staged = {key for key, _ in txn.cursor(self._staged).getmulti(_keys(ids))}
        return {
            id_
            for position, id_ in enumerate(found)
            if position not in wrong and _key(id_) not in staged and np.array_equal(rows[position], given[id_])
        }

    def as_stored(self, vectors: Float32Array) -> Float32Array:
        """See `Archive.as_stored`."""
        return unpack_rows(pack_rows(vectors, self._precision), self._precision)

    def ids(self) -> Iterator[list[str]]:
        """See `Archive.ids`."""
        last: bytes | None = b""
        while last is not None:
            with self._reading() as txn:
                cursor = txn.cursor(self._places)
                page: list[bytes] = []
                if cursor.set_range(last + b"\0") if last else cursor.first():
                    page = [key for key, _ in zip(cursor.iternext(values=False), range(5000), strict=False)]
                ids = [self._id(txn, key) for key in page]
            if ids:
                yield ids
            last = page[-1] if page else None

    def delete(self, ids: Sequence[str]) -> None:
        """See `Archive.delete`."""

        def work(txn: Transaction) -> None:
            for key in map(_key, ids):
                place = txn.pop(key, db=self._places)
                for database in (self._vectors, self._bits):
                    if place is not None:
                        txn.delete(place[:_SLOT], db=database)
                if key.startswith(_LONG):
                    txn.delete(key, db=self._long_ids)

        self._write(work, ids)

    def save_rotation(self, name: str, rotation: Float32Array) -> None:
        """See `Archive.save_rotation`."""
        keys = [f"{name}:{axis:06}".encode() for axis in range(self._full_dim)]
        rows = _with_checksums(np.ascontiguousarray(rotation.T, dtype="<f4").view(np.uint8), keys)

        def work(txn: Transaction) -> None:
            for key, row in zip(keys, rows, strict=True):
                txn.put(key, row.tobytes(), db=self._rotations)

        self._write(work)

    def load_axes(self, name: str, count: int) -> Float32Array:
        """See `Archive.load_axes`.

        Raises:
            ArchiveError: they are missing or damaged.
        """
        keys = [f"{name}:{axis:06}".encode() for axis in range(count)]
        with self._reading() as txn:
            found = txn.cursor(self._rotations).getmulti(keys)
        length = 4 * self._full_dim
        rows, wrong = _checked(_joined([row for _, row in found], length), [key for key, _ in found], length)
        if wrong or len(found) < count:
            raise ArchiveError(
                f"the rotation in {self._name} is {'damaged' if wrong else 'missing'}. Call repair(), which fits "
                "a new one from the archive."
            )
        return np.ascontiguousarray(rows.view("<f4").T, dtype=np.float32)

    def drop_rotations(self, but: str) -> None:
        """See `Archive.drop_rotations`."""

        def work(txn: Transaction) -> None:
            for key in [key for key, _ in txn.cursor(self._rotations) if not key.startswith(but.encode() + b":")]:
                txn.delete(key, db=self._rotations)

        self._write(work)

    def _next_slot(self, txn: Transaction) -> int:
        cursor = txn.cursor(self._vectors)
        return 1 + int.from_bytes(cursor.key(), "big") if cursor.last() else 0

    def _put(self, txn: Transaction, key: bytes, hash_: bytes, row: bytes, bits: bytes, slot: int) -> bool:
        """Store a row at its id's slot, or at a new one; return whether that was taken."""
        place = txn.get(key, db=self._places)
        at = slot.to_bytes(_SLOT, "big") if place is None else place[:_SLOT]
        txn.put(key, at + hash_, db=self._places)
        # Appending fills pages; LMDB would otherwise split them in halves.
        txn.put(at, row, db=self._vectors, append=place is None)
        if bits:
            txn.put(at, bits, db=self._bits, append=place is None)
        return place is None

    def _split(self, staged: bytes) -> tuple[bytes, bytes, bytes]:
        """Return document hash, row and bits of a staged value."""
        start = 1 + staged[0]
        end = start + _CHECKSUM + _padded(self._row_bytes)
        return staged[1:start], staged[start:end], staged[end:]

    def _read(self, database: Any, ids: Sequence[str], length: int) -> tuple[list[str], Bytes]:
        found, rows, wrong = self._rows(database, ids, length)
        if wrong:
            raise ArchiveError(
                f"the vector of {found[wrong[0]]!r} in {self._name} is damaged. Call repair(), and upsert the record "
                "again."
            )
        return found, rows

    def _rows(self, database: Any, ids: Sequence[str], length: int) -> tuple[list[str], Bytes, list[int]]:
        """Return the ids found, their rows (uint8 [found, length]), and the positions of damaged ones."""
        keys = _keys(ids)
        with self._reading(buffers=True) as txn:
            places = [(bytes(key), bytes(place[:_SLOT])) for key, place in txn.cursor(self._places).getmulti(keys)]
            slots = [slot for _, slot in places]
            stored = txn.cursor(database).getmulti(slots)
            if len(stored) < len(slots):
                # Damage: an id without a row.
                row_of = {bytes(slot): row for slot, row in stored}
                stored = [(slot, row_of.get(slot, b"")) for slot in slots]
            joined = _joined([row for _, row in stored], length)
        if len(places) < len(ids):
            known = {key for key, _ in places}
            ids = [id_ for id_, key in zip(ids, keys, strict=True) if key in known]
        rows, wrong = _checked(joined, [key for key, _ in places], length)
        return list(ids), rows, wrong

    def _id(self, txn: Transaction, key: bytes) -> str:
        stored = txn.get(key, db=self._long_ids) if key.startswith(_LONG) else key
        # In a damaged file a key may be anything; it is then nobody's.
        return (stored or key).decode(errors="backslashreplace")

    def _write(self, work: Callable[[Transaction], None], changed: Sequence[str] = ()) -> None:
        def noted(txn: Transaction) -> None:
            work(txn)
            ids = json.dumps(list(changed)).encode()
            txn.put(_number(txn.id()), zlib.crc32(ids).to_bytes(_CRC, "big") + ids, db=self._changes)
            txn.delete(_number(txn.id() - _CHANGES_KEPT), db=self._changes)

        with self._named_errors():
            self._file.write(noted)

    @contextmanager
    def _reading(self, buffers: bool = False) -> Iterator[Transaction]:
        with self._named_errors(), self._file.reading(buffers) as txn:
            yield txn

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (lmdb.Error, OSError) as error:
            said = str(error)
            if isinstance(error, OSError | lmdb.DiskError | lmdb.ReadonlyError | lmdb.LockError) or any(
                words in said for words in ("No space", "too large", "ermission", "Read-only", "Input/output")
            ):
                raise IndexNotWritable(
                    f"{self._name} can't be used: {error}. Check the folder's permissions and the free disk space."
                ) from error
            raise ArchiveError(
                f"{self._name} is damaged: {error}. Bring it back from a backup, or fill a new collection."
            ) from error


class _LmdbFile:
    """One LMDB environment per file and process, which LMDB asks for, shared by all archives on it."""

    _open: ClassVar[dict[Path, _LmdbFile]] = {}
    # What the process had open that this one was forked from.
    _left: ClassVar[dict[Path, _LmdbFile]] = {}
    _mutex = threading.Lock()

    def __init__(self, path: Path, durable: bool) -> None:
        self._path = path
        size = path.stat().st_size if path.is_file() else 0
        self._env = lmdb.open(
            str(path),
            subdir=False,
            map_size=max(_MAP_BYTES, 2 * size),
            max_dbs=8,
            max_readers=_MAX_READERS,
            max_spare_txns=8,
            readahead=False,
            sync=durable,
        )
        self._env.reader_check()
        self._gate = SharedGate()
        self._users = 0
        info, page = self._env.info(), self._env.stat()["psize"]
        if size and (info["last_pgno"] + 1) * page > size:
            # LMDB would read past the file's end, and that ends the process.
            self._env.close()
            raise lmdb.CorruptedError("the file is shorter than it was")
        if size and hasattr(os, "posix_fallocate"):
            # A damaged page can point so far past itself, and past the file's end that would end the process. Not
            # `truncate`, which could cut off what another process is just writing.
            with suppress(OSError), path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), (info["last_pgno"] + 1) * page, _SLACK)

    @classmethod
    def open(cls, path: Path, durable: bool) -> _LmdbFile:
        """Return the environment of a file, opened once."""
        path = path.resolve()
        with cls._mutex:
            if path in cls._left:
                raise IndexClosed(
                    f"the archive {path} was open in the process that this one was forked from, and can't be opened in "
                    "both. Open the index only after the fork, or start processes by multiprocessing's 'spawn' or "
                    "'forkserver'."
                )
            file = cls._open.get(path)
            if file is None:
                file = cls._open[path] = cls(path, durable)
            file._users += 1
        return file

    def close(self) -> None:
        """Close the environment when nobody of this process uses it any more."""
        with self._mutex:
            self._users -= 1
            if self._users or self._open.get(self._path) is not self:
                # Still in use, or of the process that this one was forked from.
                return
            del self._open[self._path]
        with self._gate.exclusive():
            self._env.close()

    @property
    def version(self) -> int:
        """The number of the last transaction, by any process, that a reader sees."""
        # Not the file's own last number: for a moment that is ahead of what readers see.
        with self.reading() as txn:
            return int(txn.id())

    def database(self, name: str, create: bool) -> Any:
        """Open a database of the file."""
        return self._env.open_db(name.encode(), create=create)

    @contextmanager
    def reading(self, buffers: bool = False) -> Iterator[Transaction]:
        """Read what was committed.

        Args:
            buffers: whether values are memoryviews, of use within the transaction, of which nothing is copied: in a
                damaged file they may be longer than it.
        """
        with self._gate.shared():
            try:
                txn = self._begin(buffers)
            except lmdb.MapResizedError:
                txn = None
            if txn is not None:
                with txn:
                    yield txn
                return
        # Another process has made the file larger than what is mapped here.
        self._map(0)
        with self._gate.shared(), self._begin(buffers) as again:
            yield again

    def _begin(self, buffers: bool) -> Transaction:
        return self._env.begin(buffers=True) if buffers else self._env.begin()

    def write(self, work: Callable[[Transaction], None]) -> None:
        """Do something in one transaction; a map that is full grows, and it is done again."""
        while True:
            try:
                with self._gate.shared(), self._env.begin(write=True) as txn:
                    work(txn)
                return
            except lmdb.MapResizedError:
                self._map(0)
            except lmdb.MapFullError:
                self._map(2 * self._env.info()["map_size"])

    def _map(self, size: int) -> None:
        with self._gate.exclusive():
            self._env.set_mapsize(size)


def leave_files() -> None:
    """Forget every open file, in a process that was forked."""
    _LmdbFile._left.update(_LmdbFile._open)
    _LmdbFile._open, _LmdbFile._mutex = {}, threading.Lock()


# No UTF-8 begins with this byte.
_LONG = b"\xff"
# LMDB's limit as it is built for Python, less the prefix.
_MAX_KEY = 500


def _key(id_: str) -> bytes:
    """Return the key of an id: its UTF-8, or a hash of it where that is longer than LMDB takes."""
    key = id_.encode()
    return key if len(key) <= _MAX_KEY else _LONG + blake2b(key, digest_size=32).digest()


def _keys(ids: Sequence[str]) -> list[bytes]:
    keys = [id_.encode() for id_ in ids]
    return keys if not keys or max(map(len, keys)) <= _MAX_KEY else list(map(_key, ids))


def _is_sound(changes: bytes) -> bool:
    return zlib.crc32(changes[_CRC:]).to_bytes(_CRC, "big") == changes[:_CRC]


def _ids_in(changes: bytes) -> list[str]:
    ids: list[str] = json.loads(changes[_CRC:])
    return ids


def _number(transaction: int) -> bytes:
    return max(transaction, 0).to_bytes(8, "big")


def _joined(stored: Sequence[bytes | memoryview], length: int) -> bytes:
    """Return stored rows one after another, zeros for one of another length than rows of `length` bytes have."""
    width = _CHECKSUM + _padded(length)
    return b"".join([row if len(row) == width else bytes(width) for row in stored])


def _checked(joined: bytes, keys: Keys, length: int) -> tuple[Bytes, list[int]]:
    """Return rows without their checksums, uint8 [n, length], and the positions of those that don't fit them."""
    words = np.frombuffer(joined, dtype="<u8").reshape(-1, (_CHECKSUM + _padded(length)) // 8)
    wrong = np.flatnonzero(words[:, 0] != _checksums(words[:, 1:], keys)).tolist()
    return np.ascontiguousarray(words.view(np.uint8)[:, _CHECKSUM : _CHECKSUM + length]), wrong


def _padded(length: int) -> int:
    return -(-length // 8) * 8


def _checksums(words: npt.NDArray[np.uint64], keys: Keys) -> npt.NDArray[np.uint64]:
    """Return a checksum of each row, uint64 [n, words], and its key: uint64 [n]."""
    weights = (2 * np.arange(words.shape[1], dtype=np.uint64) + np.uint64(1)) * _ODD
    names = np.fromiter(map(zlib.crc32, keys), dtype=np.uint64, count=len(keys))
    sums: npt.NDArray[np.uint64] = np.einsum("nw,w->n", words, weights) + (names + np.uint64(1)) * _ODD
    return sums


def _with_checksums(rows: Bytes, keys: Keys) -> Bytes:
    """Return rows, uint8 [n, length], as they are stored: uint8 [n, 8 + length, padded]."""
    block = np.zeros((len(rows), _CHECKSUM + _padded(rows.shape[1])), dtype=np.uint8)
    block[:, _CHECKSUM : _CHECKSUM + rows.shape[1]] = rows
    sums = _checksums(block.view("<u8")[:, 1:], keys)
    block[:, :_CHECKSUM] = sums.astype("<u8")[:, None].view(np.uint8)
    return block
