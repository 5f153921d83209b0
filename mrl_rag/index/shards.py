"""A folder of records in Parquet files, its shards, with a manifest that names them and their checksums.

`export` writes it, and so does `mrl_rag.scale.encode_dataset`. A shard is made in memory, and has the columns of
`export.py`. The manifest is written last and replaced in one step, so that a reader finds the whole folder or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mrl_rag.errors import InvalidIds, InvalidInput, ShardError
from mrl_rag.extras import require
from mrl_rag.index.checks import check_ids
from mrl_rag.index.export import (
    BATCH,
    FORMAT,
    Batch,
    Header,
    ParquetWriter,
    Writer,
    check_batch,
    check_format,
    check_schema,
    parquet_batches,
    vectors_of,
)
from mrl_rag.index.location import Location
from mrl_rag.truncation import Float32Array

# Readers of whole folders, such as pyarrow and Spark, ignore names that begin with an underscore.
MANIFEST = "_manifest.json"
# Records per shard: 8 MB of vectors of 384 numbers.
SHARD_RECORDS = 10_000
# Bytes of a shard and of a manifest that are read into memory at most. A shard of 10,000 vectors of 4096 numbers has
# 82 MB, and a manifest of 100,000 shards 20.
_MAX_SHARD, _MAX_MANIFEST = 2 << 30, 256 << 20
_SHARD_NAME = re.compile(r"shard-\d{5,12}-[0-9a-f]{16}\.parquet")
# Files of which the footers and ids are read at the same time: in an object store a read waits for its answer.
_READERS = 8
# Shards that a sample is taken from, at most about.
_SAMPLED = 200

Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Shard:
    """What a manifest says about a shard.

    Attributes:
        file: its name.
        records: how many it has.
        bytes: its size.
        sha256: of its bytes, in hexadecimal.
    """

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder says about its shards.

    Attributes:
        header: what all the records have in common.
        shards: in the order of their numbers; None as long as they are being written.
    """

    header: Header
    shards: tuple[Shard, ...] | None

    @property
    def records(self) -> int:
        """How many records the shards have together."""
        return sum(shard.records for shard in self.shards or ())

    def as_json(self) -> str:
        """Return the text of the file."""
        shards = None if self.shards is None else [asdict(shard) for shard in self.shards]
        about = {"format": FORMAT, **asdict(self.header), "records": self.records, "shards": shards}
        return json.dumps(about, indent=1)

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Read the text of the file.

        Raises:
            ValueError: it is no manifest, or says what can't be.
        """
        about = json.loads(text)
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"it is no manifest of format {FORMAT}")
        known = {"model": str, "fingerprint": str, "full_dim": int, "precision": str, "records": int}
        for key, type_ in known.items():
            if type(about.get(key)) is not type_:
                raise ValueError(f"{key} is {about.get(key)!r}")
        if about["precision"] not in ("float16", "float32") or about["full_dim"] < 1:
            raise ValueError(f"its vectors are {about['precision']} of {about['full_dim']} numbers")
        header = Header(about["model"], about["fingerprint"], about["full_dim"], about["precision"])
        if about.get("shards") is None:
            return cls(header, None)
        found = cls(header, tuple(_shard(entry) for entry in _as_list(about["shards"])))
        files = {shard.file for shard in found.shards or ()}
        if found.records != about["records"] or len(files) != len(about["shards"]):
            raise ValueError(f"it names {about['records']} records; its shards are {found.records}, or one is repeated")
        return found


def _as_list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"shards is {str(value)[:80]!r}")
    return value


def _shard(entry: object) -> Shard:
    fields = {"file": str, "records": int, "bytes": int, "sha256": str}
    if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != fields:
        raise ValueError(f"a shard is {str(entry)[:200]}")
    shard = Shard(**entry)
    # The name may lead to no other folder.
    if not _SHARD_NAME.fullmatch(shard.file) or shard.records < 1 or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"a shard is {str(entry)[:200]}")
    if not 0 < shard.bytes <= _MAX_SHARD:
        raise ValueError(f"{shard.file} has {shard.bytes} bytes; at most {_MAX_SHARD} are read")
    return shard


class ShardFolder:
    """A folder or URL with shards and their manifest.

    Args:
        place: a path or a URL, as for `Location`.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.location = Location(place)

    def manifest(self) -> Manifest | None:
        """Return the manifest; None where there is none.

        Raises:
            ShardError: it can't be read.
        """
        size = self.location.size(MANIFEST)
        if size is None:
            return None
        if size > _MAX_MANIFEST:
            raise self._damaged(MANIFEST, f"it has {size} bytes")
        with self.location.open(MANIFEST) as file, self.location.errors(MANIFEST):
            text = file.read()
        try:
            return Manifest.from_json(text)
        except (ValueError, KeyError, RecursionError) as error:
            raise self._damaged(MANIFEST, str(error)) from error

    def complete(self) -> Manifest:
        """Return the manifest of a folder that was written to the end.

        Raises:
            ShardError: there is none, it can't be read, or the folder is being written, or that was interrupted.
        """
        found = self.manifest()
        if found is None:
            raise ShardError(f"{self.location.name} has no {MANIFEST}; pass a folder that encode or export wrote.")
        if found.shards is None:
            raise ShardError(f"{self.location.name} isn't complete yet; run the command that writes it again.")
        return found

    def begin(self, header: Header) -> None:
        """Say what is being written, in a folder without a manifest."""
        self.location.write(MANIFEST, Manifest(header, None).as_json().encode())

    def finish(self, header: Header, shards: Sequence[Shard]) -> Manifest:
        """Write the manifest, and remove the shards that it doesn't name."""
        found = Manifest(header, tuple(sorted(shards, key=lambda shard: shard.file)))
        self.location.write(MANIFEST, found.as_json().encode())
        named = {shard.file for shard in shards}
        for name in self.location.files():
            if name not in named and _SHARD_NAME.fullmatch(name):
                self.location.delete(name)
        return found

    def write(self, number: int, name: str | None, header: Header, batches: Iterable[Batch]) -> Shard:
        """Write a shard.

        Args:
            number: its place among the others.
            name: 16 hexadecimal digits that no other content has; None for those of its checksum.
            header: what all the records have in common.
            batches: the records.
        """
        sink = require("pyarrow", "parquet").BufferOutputStream()
        writer, records = ParquetWriter(sink, header), 0
        for batch in batches:
            writer.write(batch)
            records += len(batch.ids)
        writer.close()
        data = sink.getvalue()
        checksum = hashlib.sha256(data).hexdigest()
        shard = Shard(shard_name(number, name or checksum[:16]), records, data.size, checksum)
        self.location.write(shard.file, data)
        return shard

    @contextmanager
    def writing(self, header: Header) -> Iterator[Writer]:
        """Open the folder to write all its shards; they count once everything is written.

        Raises:
            InvalidInput: a file can't be written.
        """
        writer = _ShardsWriter(self, header)
        yield writer
        writer.close()
        self.finish(header, writer.shards)

    def read_ahead(self, manifest: Manifest) -> Iterator[Batch]:
        """Yield the records of each shard, all checked. The next shard is read while one is used.

        Raises:
            ShardError: a shard is not as the manifest says.
        """
        shards = manifest.shards or ()
        with ThreadPoolExecutor(1, thread_name_prefix="mrl_rag-shards") as thread:
            upcoming = [thread.submit(self.read, shard, manifest.header) for shard in shards[:1]]
            for following in (*shards[1:], None):
                batch = upcoming.pop().result()
                if following is not None:
                    upcoming.append(thread.submit(self.read, following, manifest.header))
                yield batch

    def find(self, number: int, name: str, header: Header) -> tuple[Shard, Batch] | None:
        """Return a shard that is there already, with its records; None where there is none that can be read.

        Vectors have checksums in the file; the caller compares the rest.
        """
        file = shard_name(number, name)
        try:
            with self.location.open(file) as opened:
                data = opened.read()
            batch = joined(list(self._parsed(file, data, header)))
        except (InvalidInput, ShardError):
            return None
        return Shard(file, len(batch.ids), len(data), hashlib.sha256(data).hexdigest()), batch

    def check(self, manifest: Manifest) -> None:
        """Compare the shards with the manifest, without reading their texts and vectors.

        Sizes, types and headers are compared, and the ids are read: each may occur once. That takes 8 bytes per record.

        Raises:
            ShardError: a shard is missing, or is not as the manifest says.
            InvalidIds: an id occurs twice.
        """
        sizes = self.location.files()
        for shard in manifest.shards or ():
            if sizes.get(shard.file) != shard.bytes:
                said = f"it should have {shard.bytes} bytes"
                raise self._damaged(shard.file, f"{said}, and has {sizes[shard.file]}" if shard.file in sizes else said)

        def digests(shard: Shard) -> Digests:
            return digests_of(self._ids(shard, manifest.header))

        with ThreadPoolExecutor(_READERS) as threads:
            found = list(threads.map(digests, manifest.shards or ()))
        shards = manifest.shards or ()
        refuse_repeated(found, lambda row: (shards[row].file, self._ids(shards[row], manifest.header)))

    def read(self, shard: Shard, header: Header) -> Batch:
        """Return the records of a shard, all checked.

        Raises:
            ShardError: it is not as the manifest says.
        """
        with self.location.open(shard.file) as file, self.location.errors(shard.file):
            data = file.read(shard.bytes + 1)
        if len(data) != shard.bytes or hashlib.sha256(data).hexdigest() != shard.sha256:
            raise self._damaged(shard.file, "its checksum is another than in the manifest")
        batches = list(self._parsed(shard.file, data, header))
        records = sum(len(batch.ids) for batch in batches)
        if records != shard.records:
            raise self._damaged(shard.file, f"it has {records} records; the manifest says {shard.records}")
        return joined(batches)

    def sample(self, manifest: Manifest, size: int) -> Float32Array:
        """Return up to about `size` vectors from all over the shards, float32 [n, full_dim]."""
        shards = manifest.shards or ()
        chosen = shards[:: max(1, len(shards) // _SAMPLED)]
        wanted = -(-size // len(chosen))
        random = np.random.default_rng(0)

        def some(shard: Shard) -> Float32Array:
            with self._opened(shard, manifest.header) as file:
                # Twice as many as are taken: neighbours in a shard are often of one text.
                groups = random.permutation(file.num_row_groups)[: max(1, 2 * wanted // BATCH)]
                rows = vectors_of(file.read_row_groups(groups.tolist(), ["vector"]).column("vector"), manifest.header)
                return rows[random.permutation(len(rows))[:wanted]]

        return np.concatenate([some(shard) for shard in chosen])

    @contextmanager
    def _opened(self, shard: Shard, header: Header) -> Iterator[Any]:
        """Open a shard, having compared its footer with the manifest."""
        parquet = require("pyarrow.parquet", "parquet")
        with (
            self._damage(shard.file),
            self.location.open(shard.file) as opened,
            parquet.ParquetFile(opened, page_checksum_verification=True) as file,
        ):
            _check_header(file, header)
            if file.metadata.num_rows != shard.records:
                raise ValueError(f"it has {file.metadata.num_rows} records; the manifest says {shard.records}")
            yield file

    def _ids(self, shard: Shard, header: Header) -> Iterator[str]:
        with self._opened(shard, header) as file:
            for part in file.iter_batches(columns=["id"]):
                yield from check_ids(part.column("id").to_pylist(), unique=False)

    def _parsed(self, name: str, data: bytes, header: Header) -> Iterator[Batch]:
        arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
        seen: set[str] = set()
        with self._damage(name), parquet.ParquetFile(arrow.BufferReader(data), page_checksum_verification=True) as file:
            _check_header(file, header)
            for batch, _ in parquet_batches(file, header):
                check_batch(batch, seen)
                yield batch

    @contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, MemoryError, RecursionError) as error:
            if isinstance(error, ShardError):
                raise
            raise self._damaged(name, str(error)) from error

    def _damaged(self, name: str, said: str) -> ShardError:
        return ShardError(
            f"{self.location.name}/{name} is damaged, or not what the manifest says: {said}. Restore it, or remove the "
            "folder and write it again."
        )


class _ShardsWriter:
    """Writes records to as many shards as they need."""

    def __init__(self, folder: ShardFolder, header: Header) -> None:
        self._folder, self._header = folder, header
        self._waiting: list[Batch] = []
        self.shards: list[Shard] = []

    def write(self, batch: Batch) -> None:
        self._waiting.append(batch)
        if sum(len(waiting.ids) for waiting in self._waiting) >= SHARD_RECORDS:
            self.close()

    def close(self) -> None:
        batches = [batch for batch in self._waiting if batch.ids]
        if batches:
            self.shards.append(self._folder.write(len(self.shards), None, self._header, batches))
        self._waiting = []


def _check_header(file: Any, header: Header) -> None:
    found = check_schema(file.schema_arrow)
    if found != header:
        raise ValueError(f"it is of {found}, and the manifest of {header}")


def place_of(file: str | os.PathLike[str], there: bool = False) -> Path | ShardFolder:
    """Return the single file, or the folder of shards, that a path or URL means.

    Args:
        file: the path or URL.
        there: whether to refuse a file that doesn't exist, and a folder that isn't complete.

    Raises:
        InvalidInput: it is neither, or isn't there.
        ShardError: the folder isn't complete.
        MissingExtra: it needs pyarrow, which is not installed.
    """
    name = os.fspath(file)
    if "://" not in name and not name.endswith(("/", os.sep)):
        path = Path(name).expanduser()
        if path.is_file() or (path.suffix and not path.is_dir()):
            if there and not path.is_file():
                raise InvalidInput(f"{path} does not exist; pass a file that `export` wrote.")
            return check_format(path)
    folder = ShardFolder(name)
    if there:
        folder.complete()
    return folder


def shard_name(number: int, name: str) -> str:
    """Return a shard's file name."""
    return f"shard-{number:05}-{name}.parquet"


def joined(batches: Sequence[Batch]) -> Batch:
    """Return the records of several batches as one."""
    return Batch(
        [id_ for batch in batches for id_ in batch.ids],
        [document for batch in batches for document in batch.documents],
        [metadata for batch in batches for metadata in batch.metadatas],
        np.concatenate([batch.vectors for batch in batches]),
    )


def digests_of(ids: Iterable[str]) -> Digests:
    """Return an 8-byte hash of each id, uint64 [n]."""
    return np.frombuffer(b"".join(hashlib.blake2b(id_.encode(), digest_size=8).digest() for id_ in ids), np.uint64)


def refuse_repeated(digests: Sequence[Digests], ids_of: Callable[[int], tuple[str, Iterable[str]]]) -> None:
    """Refuse an id that occurs twice.

    Args:
        digests: of the ids of each part.
        ids_of: the name of a part, by its position, and its ids; asked only for parts with equal digests.

    Raises:
        InvalidIds: an id occurs twice.
    """
    every = np.sort(np.concatenate(digests)) if digests else np.empty(0, np.uint64)
    repeated = every[1:][every[1:] == every[:-1]]
    if not len(repeated):
        return
    first_in: dict[str, str] = {}
    for row, part in enumerate(digests):
        suspects = np.isin(part, repeated)
        if suspects.any():
            name, ids = ids_of(row)
            for id_, suspect in zip(ids, suspects, strict=True):
                if suspect and id_ in first_in:
                    raise InvalidIds(
                        f"id {id_!r} occurs in {first_in[id_]} and in {name}, or twice there; each record needs one of "
                        "its own."
                    )
                if suspect:
                    first_in[id_] = name
