"""Storage of the full vectors, beside the Chroma collection that is searched.

A local index keeps them in an LMDB file: one writing process, any number of readers, and atomic, durable transactions.
Reading 50 of 100,000 vectors of 768 float16 takes 0.1 ms. A memory-mapped array would make a search 5% faster and a
batch 12% (`benchmarks/README.md`), but needs its own journal, free list and locks. On a server the vectors are in a
second Chroma collection, which all clients share.

A vector that replaces another is staged until Chroma has the new record. After a crash in between, the old record still
has its own vector.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeAlias

import lmdb
import numpy as np
import numpy.typing as npt

from mrl_rag.errors import ArchiveError, IndexClosed, IndexNotWritable
from mrl_rag.index.checks import Metadata
from mrl_rag.index.config import ArchivePrecision
from mrl_rag.index.gate import SharedGate
from mrl_rag.lifetime import Dropped
from mrl_rag.quantization import Bytes, Precision, pack_rows, row_bytes, sign_bits, unpack_rows
from mrl_rag.truncation import Float32Array

# The stubs of `lmdb.Transaction` don't cover `buffers=True`, which returns memoryviews.
Transaction: TypeAlias = Any
Keys: TypeAlias = Sequence[bytes]
Slots: TypeAlias = npt.NDArray[np.int64]

# Initial size of the memory map. It is doubled when the file fills it.
_MAP_BYTES = 64 << 20
_MAX_READERS = 1024
# File space allocated past LMDB's last page; see `_LmdbFile`.
_PREALLOCATED_BYTES = 2 << 16
_CHECKSUM_BYTES = 8
# 2**64 divided by the golden ratio. It is odd, so that a change of any single word of a row changes the checksum.
_CHECKSUM_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SLOT_BYTES = 8
# Transactions whose changed ids are logged. A reader that is further behind reads everything again.
_MAX_LOGGED_TRANSACTIONS = 256
_HASH_BYTES = 16
_CRC_BYTES = 4
_IDS_PER_PAGE = 5000


def document_hash(document: str | None) -> bytes | None:
    """Return a 16-byte hash of a document; None where there is no document."""
    if document is None:
        return None
    return blake2b(document.encode(), digest_size=_HASH_BYTES).digest()


class Archive(Protocol):
    """Full vectors by id.

    Attributes:
        created: whether this object has made the archive.
    """

    created: bool

    def __len__(self) -> int:
        """Return the number of vectors, without staged ones."""

    @property
    def version(self) -> int | None:
        """A number that grows with each write by any process; None where there is no such number."""

    def write(
        self,
        ids: Sequence[str],
        vectors: Float32Array,
        documents: Sequence[str | None],
        staged: Container[str] = (),
        removed_for_now: Mapping[str, Metadata] = MappingProxyType({}),
    ) -> None:
        """Store vectors, and the hashes of their documents.

        Args:
            ids: n ids.
            vectors: float32 unit rows [n, full_dim].
            documents: n documents.
            staged: ids whose new vectors are only staged; `commit_staged` puts them in place of the old ones.
            removed_for_now: the new metadata of those of `staged` that Chroma is going to remove and to store again.
        """

    def staged_metadata(self) -> dict[str, Metadata]:
        """Return what `removed_for_now` was for the ids that are still staged."""

    def staged(self) -> tuple[list[str], Float32Array]:
        """Return the ids with staged vectors, and these vectors, float32 [n, full_dim]."""

    def commit_staged(self, ids: Sequence[str], accepted: Container[str]) -> None:
        """Put the staged vectors of `accepted` in place of the old ones, and discard those of the other `ids`."""

    def read(self, ids: Sequence[str], slots: Slots | None = None) -> tuple[list[str], Float32Array]:
        """Return the ids found, in the order of `ids`, and their vectors, float32 [found, full_dim].

        Args:
            ids: n ids.
            slots: int64 [n], what `slots` returned for them earlier, which saves looking them up. They may be outdated.
        """

    def slots(self, ids: Sequence[str]) -> Slots:
        """Return the slot of each id's vector, int64 [n]; -1 for an id without one."""

    def changes(self, since: int) -> tuple[list[str], bool]:
        """Return the ids that were written or deleted after version `since`, and whether the list is complete."""

    def read_bits(self, ids: Sequence[str]) -> tuple[list[str], Bytes] | None:
        """Return the ids found and their sign bits, uint8 [found, ceil(full_dim / 8)]; None where none are stored."""

    def damaged(self, ids: Sequence[str]) -> set[str]:
        """Return those of `ids` whose stored vector fails its checksum."""

    def document_hashes(self, ids: Sequence[str]) -> dict[str, bytes | None]:
        """Return the document hash per id, None for a record without a document; unknown ids are left out."""

    def unchanged(self, ids: Sequence[str], vectors: Float32Array) -> set[str]:
        """Return those of `ids` whose stored vector is what `write` would store for `vectors`, float32 [n, full_dim].

        Ids with a staged vector are left out.
        """

    def as_stored(self, vectors: Float32Array) -> Float32Array:
        """Return vectors in the archive's precision, as `read` returns them after `write`: float32 [n, full_dim]."""

    def ids(self) -> Iterator[list[str]]:
        """Yield all ids, in pages."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors; unknown ids are ignored."""

    def save_rotation(self, name: str, rotation: Float32Array) -> None:
        """Store a rotation, float32 [full_dim, full_dim]."""

    def load_axes(self, name: str, count: int) -> Float32Array:
        """Return the first `count` columns of a rotation, float32 [full_dim, count]."""

    def drop_rotations(self, but: Sequence[str]) -> None:
        """Remove every rotation except those with these names."""

    def close(self) -> None:
        """Close the files."""


class LmdbArchive:
    """An archive in an LMDB file.

    A vector's row is stored under a slot number. Slots ascend, so that LMDB appends rows and fills its pages; with ids
    as keys half of each page would stay empty. Each row starts with a checksum of its id and its bytes.

    LMDB databases in the file:
        places: id -> slot and document hash.
        vectors: slot -> row.
        bits: slot -> sign bits.
        staged: id -> document hash, row and sign bits.
        rotations: rotation's name and axis -> row.
        changes: transaction number -> ids that it changed, for the latest transactions.
        long_ids: hash -> id, for ids that are too long for a key.

    Args:
        path: the file.
        full_dim: length of a vector.
        precision: "float16"; "int8", with a scale per row; or "binary": int8 rows, and sign bits besides.
        create: whether to make the file, which must not exist; otherwise it must exist.
        durable: whether each write is synced to the disk before it returns.

    Raises:
        ArchiveError: the file is missing or damaged.
        IndexNotWritable: the file can't be written.
    """

    def __init__(
        self, path: Path, full_dim: int, precision: ArchivePrecision, create: bool, durable: bool = True
    ) -> None:
        if path.is_file() == create:
            raise ArchiveError(
                f"the archive of full vectors {path} {'exists already' if create else 'is missing'}. Restore it "
                "from a backup, or fill a new collection."
            )
        self.created = create
        self._name = f"the archive {path}"
        self._full_dim = full_dim
        self._precision: Precision = "float16" if precision == "float16" else "int8"
        self._row_bytes = row_bytes(self._precision, full_dim)
        self._has_bits = precision == "binary"
        self._bits_bytes = -(-full_dim // 8)
        names = ("places", "vectors", "bits", "staged", "rotations", "long_ids", "changes")
        with self._translated_errors():
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
        removed_for_now: Mapping[str, Metadata] = MappingProxyType({}),
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
                if key.startswith(_HASHED_KEY_PREFIX):
                    txn.put(key, id_.encode(), db=self._long_ids)
                if id_ in staged:
                    # The hash may be empty, so its length comes first. Rows and bits have fixed lengths.
                    row = bytes([len(hashes[position])]) + hashes[position] + rows[position].tobytes() + bit_row
                    extra = json.dumps(dict(removed_for_now[id_])).encode() if id_ in removed_for_now else b""
                    txn.put(key, row + extra, db=self._staged)
                else:
                    slot += self._put(txn, key, hashes[position], rows[position].tobytes(), bit_row, slot)

        self._write(work, ids)

    def staged(self) -> tuple[list[str], Float32Array]:
        """See `Archive.staged`."""
        with self._reading() as txn:
            entries = [(key, self._split(value)[1]) for key, value in txn.cursor(self._staged)]
            ids = [self._id(txn, key) for key, _ in entries]
        joined = _joined([row for _, row in entries], self._row_bytes)
        rows, wrong = _verified(joined, [key for key, *_ in entries], self._row_bytes)
        # A staged row belongs to an upsert that never returned, so a damaged one can be left out.
        sound = sorted(set(range(len(ids))) - set(wrong))
        return [ids[position] for position in sound], unpack_rows(rows[sound], self._precision)

    def staged_metadata(self) -> dict[str, Metadata]:
        """See `Archive.staged_metadata`."""
        with self._reading() as txn:
            entries = [(self._id(txn, key), self._split(value)[3]) for key, value in txn.cursor(self._staged)]
        return {id_: json.loads(extra) for id_, extra in entries if extra}

    def commit_staged(self, ids: Sequence[str], accepted: Container[str]) -> None:
        """See `Archive.commit_staged`."""

        def work(txn: Transaction) -> None:
            slot = self._next_slot(txn)
            for id_ in ids:
                key = _key(id_)
                value = txn.pop(key, db=self._staged)
                if value is not None and id_ in accepted:
                    hash_, row, bit_row, _ = self._split(value)
                    slot += self._put(txn, key, hash_, row, bit_row, slot)

        self._write(work, ids)

    def read(self, ids: Sequence[str], slots: Slots | None = None) -> tuple[list[str], Float32Array]:
        """See `Archive.read`.

        Raises:
            ArchiveError: a row fails its checksum.
        """
        if slots is not None:
            numbers = slots.astype(">i8").tobytes()
            with self._reading(buffers=True) as txn:
                stored = txn.cursor(self._vectors).getmulti(
                    [numbers[at : at + _SLOT_BYTES] for at in range(0, len(numbers), _SLOT_BYTES)]
                )
                joined = _joined([row for _, row in stored], self._row_bytes)
            if len(stored) == len(ids):
                rows, wrong = _verified(joined, _keys(ids), self._row_bytes)
                if not wrong:
                    return list(ids), unpack_rows(rows, self._precision)
        # No slots were given, or they are outdated, or a row is damaged.
        found, rows = self._read(self._vectors, ids, self._row_bytes)
        return found, unpack_rows(rows, self._precision)

    def slots(self, ids: Sequence[str]) -> Slots:
        """See `Archive.slots`."""
        keys = _keys(ids)
        with self._reading(buffers=True) as txn:
            places = {bytes(key): bytes(place[:_SLOT_BYTES]) for key, place in txn.cursor(self._places).getmulti(keys)}
        joined = b"".join(places.get(key, b"\xff" * _SLOT_BYTES) for key in keys)
        return np.frombuffer(joined, dtype=">i8").astype(np.int64)

    def changes(self, since: int) -> tuple[list[str], bool]:
        """See `Archive.changes`."""
        with self._reading() as txn:
            last = int(txn.id())
            first = max(since, last - _MAX_LOGGED_TRANSACTIONS, 0) + 1
            stored = [txn.get(_transaction_key(at), db=self._changes) for at in range(first, last + 1)]
        known = [ids for ids in map(_logged_ids, stored) if ids is not None]
        return list(dict.fromkeys(chain.from_iterable(known))), len(known) == last - since

    def read_bits(self, ids: Sequence[str]) -> tuple[list[str], Bytes] | None:
        """See `Archive.read_bits`.

        Raises:
            ArchiveError: a row fails its checksum.
        """
        return self._read(self._bits, ids, self._bits_bytes) if self._has_bits else None

    def damaged(self, ids: Sequence[str]) -> set[str]:
        """See `Archive.damaged`."""
        wrong: set[str] = set()
        databases = [(self._vectors, self._row_bytes)]
        if self._has_bits:
            databases.append((self._bits, self._bits_bytes))
        for database, length in databases:
            found, _, bad = self._rows(database, ids, length)
            wrong.update(found[position] for position in bad)
        return wrong

    def document_hashes(self, ids: Sequence[str]) -> dict[str, bytes | None]:
        """See `Archive.document_hashes`."""
        with self._reading(buffers=True) as txn:
            found = txn.cursor(self._places).getmulti(_keys(ids))
            hashes = {bytes(key): bytes(place[_SLOT_BYTES : _SLOT_BYTES + _HASH_BYTES]) for key, place in found}
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
        start = b""
        while True:
            with self._reading() as txn:
                cursor = txn.cursor(self._places)
                found = cursor.set_range(start)
                page = list(islice(cursor.iternext(values=False), _IDS_PER_PAGE)) if found else []
                ids = [self._id(txn, key) for key in page]
            if not ids:
                return
            yield ids
            start = page[-1] + b"\0"

    def delete(self, ids: Sequence[str]) -> None:
        """See `Archive.delete`."""

        def work(txn: Transaction) -> None:
            for key in map(_key, ids):
                place = txn.pop(key, db=self._places)
                for database in (self._vectors, self._bits):
                    if place is not None:
                        txn.delete(place[:_SLOT_BYTES], db=database)
                if key.startswith(_HASHED_KEY_PREFIX):
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
        rows, wrong = _verified(_joined([row for _, row in found], length), [key for key, _ in found], length)
        if wrong or len(found) < count:
            raise ArchiveError(
                f"the rotation in {self._name} is {'damaged' if wrong else 'missing'}. Call repair(), which fits "
                "a new one from the archive."
            )
        return np.ascontiguousarray(rows.view("<f4").T, dtype=np.float32)

    @property
    def unused_share(self) -> float:
        """Share of the file's pages that hold nothing, 0 to 1."""
        names = self._places, self._vectors, self._bits, self._staged, self._rotations, self._long_ids, self._changes
        with self._reading() as txn:
            used = sum(_pages(txn.stat(database)) for database in names)
        return max(0.0, 1 - used / self._file.pages)

    def copy_to(self, path: Path) -> None:
        """Write a copy without unused pages to a new file, and have it written to the disk."""
        with self._translated_errors():
            self._file.copy_to(path)

    def forget_changes(self) -> None:
        """Forget which ids earlier transactions have changed: a copy begins to count them anew."""
        with self._translated_errors():
            self._file.write(lambda txn: txn.drop(self._changes, delete=False))

    def drop_rotations(self, but: Sequence[str]) -> None:
        """See `Archive.drop_rotations`."""
        kept = tuple(f"{name}:".encode() for name in but)

        def work(txn: Transaction) -> None:
            for key in [key for key, _ in txn.cursor(self._rotations) if not key.startswith(kept)]:
                txn.delete(key, db=self._rotations)

        self._write(work)

    def _next_slot(self, txn: Transaction) -> int:
        cursor = txn.cursor(self._vectors)
        return 1 + int.from_bytes(cursor.key(), "big") if cursor.last() else 0

    def _put(self, txn: Transaction, key: bytes, hash_: bytes, row: bytes, bits: bytes, slot: int) -> bool:
        """Store a row in its id's slot, or in `slot` if it has none; return whether `slot` was used."""
        place = txn.get(key, db=self._places)
        at = slot.to_bytes(_SLOT_BYTES, "big") if place is None else place[:_SLOT_BYTES]
        txn.put(key, at + hash_, db=self._places)
        # When appending, LMDB fills its pages; otherwise it splits a full page in halves.
        txn.put(at, row, db=self._vectors, append=place is None)
        if bits:
            txn.put(at, bits, db=self._bits, append=place is None)
        return place is None

    def _split(self, staged: bytes) -> tuple[bytes, bytes, bytes, bytes]:
        """Return document hash, row, sign bits and JSON of metadata of a value of the database `staged`."""
        start = 1 + staged[0]
        end = start + _CHECKSUM_BYTES + _padded(self._row_bytes)
        last = end + (_CHECKSUM_BYTES + _padded(-(-self._full_dim // 8)) if self._has_bits else 0)
        return staged[1:start], staged[start:end], staged[end:last], staged[last:]

    def _read(self, database: Any, ids: Sequence[str], length: int) -> tuple[list[str], Bytes]:
        found, rows, wrong = self._rows(database, ids, length)
        if wrong:
            raise ArchiveError(
                f"the vector of {found[wrong[0]]!r} in {self._name} is damaged. Call repair(encode=...), or "
                "upsert the record again."
            )
        return found, rows

    def _rows(self, database: Any, ids: Sequence[str], length: int) -> tuple[list[str], Bytes, list[int]]:
        """Return the ids found, their rows (uint8 [found, length]), and the positions of damaged ones."""
        keys = _keys(ids)
        with self._reading(buffers=True) as txn:
            places = [
                (bytes(key), bytes(place[:_SLOT_BYTES])) for key, place in txn.cursor(self._places).getmulti(keys)
            ]
            slots = [slot for _, slot in places]
            stored = txn.cursor(database).getmulti(slots)
            if len(stored) < len(slots):
                # The file is damaged: an id has no row.
                row_of = {bytes(slot): row for slot, row in stored}
                stored = [(slot, row_of.get(slot, b"")) for slot in slots]
            joined = _joined([row for _, row in stored], length)
        if len(places) < len(ids):
            known = {key for key, _ in places}
            ids = [id_ for id_, key in zip(ids, keys, strict=True) if key in known]
        rows, wrong = _verified(joined, [key for key, _ in places], length)
        return list(ids), rows, wrong

    def _id(self, txn: Transaction, key: bytes) -> str:
        stored = txn.get(key, db=self._long_ids) if key.startswith(_HASHED_KEY_PREFIX) else key
        # In a damaged file a key may not be UTF-8.
        return (stored or key).decode(errors="backslashreplace")

    def _write(self, work: Callable[[Transaction], None], changed: Sequence[str] = ()) -> None:
        def logged(txn: Transaction) -> None:
            work(txn)
            ids = json.dumps(list(changed)).encode()
            txn.put(_transaction_key(txn.id()), zlib.crc32(ids).to_bytes(_CRC_BYTES, "big") + ids, db=self._changes)
            txn.delete(_transaction_key(txn.id() - _MAX_LOGGED_TRANSACTIONS), db=self._changes)

        with self._translated_errors():
            self._file.write(logged)

    @contextmanager
    def _reading(self, buffers: bool = False) -> Iterator[Transaction]:
        with self._translated_errors(), self._file.reading(buffers) as txn:
            yield txn

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
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
                f"{self._name} is damaged: {error}. Restore it from a backup, or fill a new collection."
            ) from error


class _LmdbFile:
    """An LMDB environment, shared by all archives on its file: LMDB allows one per file and process."""

    _open: ClassVar[dict[Path, _LmdbFile]] = {}
    # Environments of the parent process, after a fork.
    _inherited: ClassVar[dict[Path, _LmdbFile]] = {}
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
            # LMDB would read past the end of the file, which kills the process.
            self._env.close()
            raise lmdb.CorruptedError("the file is shorter than it was")
        if size and hasattr(os, "posix_fallocate"):
            # A pointer in a damaged page can reach this far past the page. Beyond the end of the file, following it
            # would kill the process. Not `truncate`, which could cut off what another process is writing.
            with suppress(OSError), path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), (info["last_pgno"] + 1) * page, _PREALLOCATED_BYTES)

    @classmethod
    def open(cls, path: Path, durable: bool) -> _LmdbFile:
        """Return the environment of a file; it is opened if this process has not done so yet."""
        path = path.resolve()
        with cls._mutex:
            if path in cls._inherited:
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
        """Close the environment when its last archive in this process is closed."""
        with self._mutex:
            self._users -= 1
            if self._users or self._open.get(self._path) is not self:
                # Still in use, or inherited from the parent process.
                return
            del self._open[self._path]
        with self._gate.exclusive():
            self._env.close()

    @property
    def version(self) -> int:
        """The number of the last committed transaction of any process."""
        # Not `last_txnid` of the environment, which is ahead of what readers see for a moment.
        with self.reading() as txn:
            return int(txn.id())

    @property
    def pages(self) -> int:
        """The number of pages in the file, used or not."""
        return int(self._env.info()["last_pgno"]) + 1

    def copy_to(self, path: Path) -> None:
        """Write a copy without unused pages to a new file, and have it written to the disk."""
        with self._gate.shared():
            self._env.copy(str(path), compact=True)
        for part in (path, path.parent):
            sync(part)

    def database(self, name: str, create: bool) -> Any:
        """Open a named database in the file."""
        return self._env.open_db(name.encode(), create=create)

    @contextmanager
    def reading(self, buffers: bool = False) -> Iterator[Transaction]:
        """Open a read transaction.

        Args:
            buffers: whether to return memoryviews, which are valid within the transaction, instead of copies. In a
                damaged file a value may claim to be longer than the file: don't copy it before checking its length.
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
        # Another process has made the file larger than the map of this one. 0 takes the file's size.
        self._map(0)
        with self._gate.shared(), self._begin(buffers) as again:
            yield again

    def _begin(self, buffers: bool) -> Transaction:
        return self._env.begin(buffers=True) if buffers else self._env.begin()

    def write(self, work: Callable[[Transaction], None]) -> None:
        """Call `work` in one write transaction. If the map is full, enlarge it and start again."""
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
    """Leave the open files to the parent process; called in a forked child."""
    _LmdbFile._inherited.update(_LmdbFile._open)
    _LmdbFile._open, _LmdbFile._mutex = {}, threading.Lock()


# UTF-8 never begins with this byte.
_HASHED_KEY_PREFIX = b"\xff"
# py-lmdb is built with a limit of 511.
_MAX_KEY_BYTES = 500


def _key(id_: str) -> bytes:
    """Return the LMDB key of an id: its UTF-8, or a hash of it if that is too long."""
    key = id_.encode()
    return key if len(key) <= _MAX_KEY_BYTES else _HASHED_KEY_PREFIX + blake2b(key, digest_size=32).digest()


def _keys(ids: Sequence[str]) -> list[bytes]:
    keys = [id_.encode() for id_ in ids]
    return keys if not keys or max(map(len, keys)) <= _MAX_KEY_BYTES else list(map(_key, ids))


def _logged_ids(value: bytes | None) -> list[str] | None:
    """Return the ids in a value of the database `changes`; None where there is no value, or a damaged one."""
    if value is None or zlib.crc32(value[_CRC_BYTES:]).to_bytes(_CRC_BYTES, "big") != value[:_CRC_BYTES]:
        return None
    ids: list[str] = json.loads(value[_CRC_BYTES:])
    return ids


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    if os.name == "nt" and path.is_dir():
        # Windows can't open a folder.
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pages(stat: Mapping[str, int]) -> int:
    return stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]


def _transaction_key(transaction: int) -> bytes:
    return max(transaction, 0).to_bytes(8, "big")


def _joined(stored: Sequence[bytes | memoryview], length: int) -> bytes:
    """Join stored rows, each of `length` bytes and a checksum; a row of another size becomes zeros."""
    width = _CHECKSUM_BYTES + _padded(length)
    return b"".join([row if len(row) == width else bytes(width) for row in stored])


def _verified(joined: bytes, keys: Keys, length: int) -> tuple[Bytes, list[int]]:
    """Return rows without their checksums, uint8 [n, length], and the positions of rows with a wrong checksum."""
    words = np.frombuffer(joined, dtype="<u8").reshape(-1, (_CHECKSUM_BYTES + _padded(length)) // 8)
    wrong = np.flatnonzero(words[:, 0] != _checksums(words[:, 1:], keys)).tolist()
    return np.ascontiguousarray(words.view(np.uint8)[:, _CHECKSUM_BYTES : _CHECKSUM_BYTES + length]), wrong


def _padded(length: int) -> int:
    return -(-length // 8) * 8


def _checksums(words: npt.NDArray[np.uint64], keys: Keys) -> npt.NDArray[np.uint64]:
    """Return a checksum per row, uint64 [n], of its words, uint64 [n, words], and its key."""
    weights = (2 * np.arange(words.shape[1], dtype=np.uint64) + np.uint64(1)) * _CHECKSUM_FACTOR
    names = np.fromiter(map(zlib.crc32, keys), dtype=np.uint64, count=len(keys))
    sums: npt.NDArray[np.uint64] = np.einsum("nw,w->n", words, weights) + (names + np.uint64(1)) * _CHECKSUM_FACTOR
    return sums


def _with_checksums(rows: Bytes, keys: Keys) -> Bytes:
    """Return rows, uint8 [n, length], with checksums and padded to whole words: uint8 [n, 8 + padded length]."""
    block = np.zeros((len(rows), _CHECKSUM_BYTES + _padded(rows.shape[1])), dtype=np.uint8)
    block[:, _CHECKSUM_BYTES : _CHECKSUM_BYTES + rows.shape[1]] = rows
    sums = _checksums(block.view("<u8")[:, 1:], keys)
    block[:, :_CHECKSUM_BYTES] = sums.astype("<u8")[:, None].view(np.uint8)
    return block
