"""What is to be encoded: Parquet files, JSON lines and indexes, split into parts that workers read by themselves."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mrl_rag.errors import InvalidIds, InvalidInput, MrlRagError
from mrl_rag.extras import require
from mrl_rag.index import TwoStageIndex
from mrl_rag.index.checks import check_ids, check_metadatas
from mrl_rag.index.location import Location
from mrl_rag.index.shards import Digests, digests_of
from mrl_rag.tasks import SURROGATE_ADVICE, check_texts, is_unicode

# Bytes of text in a shard, about, where records are long; and rows that are decoded together.
_MAX_BYTES, _ROWS = 256 << 20, 1000
_ENDINGS = (".parquet", ".jsonl", ".ndjson")
# Fields that `export` writes beside those that are read.
_EXPORTED = ("vector", "model", "fingerprint")


@dataclass(frozen=True)
class Records:
    """Records to be encoded.

    Attributes:
        ids: n ids.
        texts: n texts.
        metadatas: n mappings.
    """

    ids: list[str]
    texts: list[str]
    metadatas: list[dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """Successive records of an input.

    Attributes:
        source: the file, or the index's folder.
        start: where they begin: the first row of a Parquet file, or the first byte of JSON lines.
        stop: where they end, exclusive.
        records: how many there are.
        first: number of the first one in the file, from 0, for messages.
        collection: of an index; "" for a file.
        ids: of an index; empty for a file.
    """

    source: str
    start: int
    stop: int
    records: int
    first: int
    collection: str = ""
    ids: tuple[str, ...] = ()

    def read(self) -> Records:
        """Return the records, checked.

        Raises:
            InvalidInput: one can't be stored, or the input has changed since it was split.
        """
        if not self.collection:
            location = Location(self.source)
            rows = _parquet_rows if _path(self.source).endswith(".parquet") else _json_rows
        with _named(f"{self.source}, from record {self.first}"):
            found = _of_index(self) if self.collection else _records(rows(location, self))
            if len(found.ids) != self.records:
                raise InvalidInput(f"{len(found.ids)} records are there, and {self.records} were; run it again.")
            check_ids(found.ids, unique=False, first=self.first)
            check_texts(found.texts, self.first)
            check_metadatas(found.metadatas, self.first)
        return found


def find_inputs(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], collection: str | None
) -> list[tuple[str, str]]:
    """Return the files, and the folders of indexes with their collections, in a fixed order.

    Raises:
        InvalidInput: there are none, or one can't be read.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    found = [source for place in given for source in _sources(Location(place), collection)]
    if not found:
        raise InvalidInput("there is no input; pass Parquet files, JSON lines, folders of these, or an index's folder.")
    return found


def _sources(location: Location, collection: str | None) -> Iterator[tuple[str, str]]:
    name = location.url
    kind = location.kind()
    if kind == "folder" and location.local is not None and (location.local / "chroma.sqlite3").is_file():
        yield name, _collection(location.local, collection)
    elif kind == "folder":
        files = [file for file in location.files(recursive=True) if file.endswith(_ENDINGS) and "/." not in f"/{file}"]
        if not files:
            raise InvalidInput(f"{location.name} has no files that end in {', '.join(_ENDINGS)}, and no index.")
        path, mark, query = name.partition("?") if location.local is None else (name, "", "")
        yield from ((f"{path.rstrip('/')}/{file}{mark}{query}", "") for file in files)
    elif kind == "file" and _path(name).endswith(_ENDINGS):
        yield name, ""
    else:
        found = (
            f"{location.name} is no file that can be read" if kind else f"there is nothing that can be read at {name}"
        )
        raise InvalidInput(f"{found}; pass {', '.join(_ENDINGS)}, or a folder.")


def _path(name: str) -> str:
    return name.partition("?")[0] if "://" in name else name


def _collection(folder: Path, wanted: str | None) -> str:
    names = TwoStageIndex.names(folder)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        raise InvalidInput(f"{folder} has the indexes {names}, and collection is {wanted!r}; name one of them.")
    return wanted


def scan(source: str, collection: str, shard_records: int) -> tuple[list[Part], Digests]:
    """Read the ids of an input, and cut it into parts of at most so many records.

    Returns:
        The parts, and a hash of each id, uint64 [n].

    Raises:
        InvalidInput: the input is damaged, or a record has no id.
    """
    with _named(source):
        if collection:
            return _scan_index(source, collection, shard_records)
        location = Location(source)
        cut = _scan_parquet if _path(source).endswith(".parquet") else _scan_json
        return cut(location, source, shard_records)


def group(parts: Iterable[Part], shard_records: int) -> list[list[Part]]:
    """Put small parts together into shards of at most so many records."""
    shards: list[list[Part]] = []
    room = 0
    for part in parts:
        if part.records > room:
            shards.append([])
            room = shard_records
        shards[-1].append(part)
        room -= part.records
    return shards


def _scan_index(folder: str, collection: str, size: int) -> tuple[list[Part], Digests]:
    with TwoStageIndex(folder, collection) as index:
        ids = sorted(index.ids())
    chunks = [tuple(ids[start : start + size]) for start in range(0, len(ids), size)]
    parts = [Part(folder, 0, 0, len(chunk), row * size, collection, chunk) for row, chunk in enumerate(chunks)]
    return parts, digests_of(ids)


def _of_index(part: Part) -> Records:
    with TwoStageIndex(part.source, part.collection) as index:
        found = index.get(part.ids, vectors=False)
    return Records([r.id for r in found], [r.document for r in found], [r.metadata for r in found])  # type: ignore[misc]


def _scan_parquet(location: Location, source: str, size: int) -> tuple[list[Part], Digests]:
    digests = []
    with _parquet(location) as file:
        about = file.metadata
        for batch in file.iter_batches(columns=["id"]):
            digests.append(digests_of(_id(value) for value in batch.column("id").to_pylist()))
        total = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
        step = max(1, min(size, _MAX_BYTES * about.num_rows // max(total, 1)))
        starts = range(0, about.num_rows, step)
        parts = [Part(source, s, e, e - s, s) for s in starts for e in [min(s + step, about.num_rows)]]
    return parts, np.concatenate(digests) if digests else digests_of([])


def _parquet_rows(location: Location, part: Part) -> Iterator[Mapping[str, Any]]:
    with _parquet(location) as file:
        names = file.schema_arrow.names
        wanted = [name for name in names if "vector" not in names or name not in _EXPORTED]
        groups, position, first = [], None, 0
        for number in range(file.metadata.num_row_groups):
            after = first + file.metadata.row_group(number).num_rows
            if first < part.stop and after > part.start:
                groups.append(number)
                position = first if position is None else position
            first = after
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=wanted):
            assert position is not None
            start, stop = max(part.start - position, 0), min(part.stop - position, len(batch))
            if start < stop:
                yield from batch.slice(start, stop - start).to_pylist()
            position += len(batch)


@contextmanager
def _parquet(location: Location) -> Iterator[Any]:
    parquet = require("pyarrow.parquet", "parquet")
    with location.errors(), location.open() as opened, parquet.ParquetFile(opened) as file:
        names = file.schema_arrow.names
        if "id" not in names or not {"document", "text"} & set(names):
            raise InvalidInput(f"its columns are {names}; it needs id, and document or text.")
        yield file


def _scan_json(location: Location, source: str, size: int) -> tuple[list[Part], Digests]:
    parts: list[Part] = []
    ids: list[str] = []
    digests = []
    start = position = first = 0

    def cut() -> None:
        if ids:
            parts.append(Part(source, start, position, len(ids), first))
            digests.append(digests_of(ids))

    for line, after in _lines(location, 0, None):
        ids.append(_id(_fields(line, first + len(ids)).get("id")))
        position = after
        if len(ids) == size or position - start >= _MAX_BYTES:
            cut()
            start, first, ids = position, first + len(ids), []
    cut()
    return parts, np.concatenate(digests) if digests else digests_of([])


def _json_rows(location: Location, part: Part) -> Iterator[Mapping[str, Any]]:
    for row, (line, _) in enumerate(_lines(location, part.start, part.stop), part.first):
        fields = _fields(line, row)
        yield {key: fields[key] for key in fields if "vector" not in fields or key not in _EXPORTED}


def _lines(location: Location, start: int, stop: int | None) -> Iterator[tuple[bytes, int]]:
    """Yield the lines of a file that aren't empty, and the place after each."""
    with location.errors(), location.open() as opened:
        opened.seek(start)
        file, position = io.BufferedReader(opened, 1 << 20), start
        while (stop is None or position < stop) and (line := file.readline(_MAX_BYTES + 1)):
            position += len(line)
            if len(line) > _MAX_BYTES:
                raise InvalidInput(f"a line that ends after byte {position} is longer than {_MAX_BYTES} bytes.")
            if line.strip():
                yield line, position


def _fields(line: bytes, row: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"record {row} can't be read: {error}.") from error
    return found


def _id(value: object) -> str:
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value:
        raise InvalidIds(f"an id is {value!r}; it must be a non-empty string, or an integer.")
    if not is_unicode(value):
        raise InvalidIds(f"id {value!r} is no valid Unicode; {SURROGATE_ADVICE}")
    return value


def _records(rows: Iterable[Mapping[str, Any]]) -> Records:
    found = Records([], [], [])
    for fields in rows:
        text = fields.get("document")
        metadata = fields.get("metadata") or {}
        if isinstance(metadata, str):
            metadata = json.loads(metadata)
        if not isinstance(metadata, dict):
            raise InvalidInput(f"the metadata of record {fields.get('id')!r} is {metadata!r}, no object.")
        others = {key: fields[key] for key in fields if key not in {"id", "document", "text", "metadata"}}
        if text is not None and fields.get("text") is not None:
            others["text"] = fields["text"]
        found.ids.append(_id(fields.get("id")))
        found.texts.append(fields.get("text") if text is None else text)  # type: ignore[arg-type]
        found.metadatas.append({key: value for key, value in {**others, **metadata}.items() if value is not None})
    return found


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Put the name of the input before the message of an error."""
    try:
        yield
    except MrlRagError as error:
        raise type(error)(f"{what}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(f"{what} can't be read: {error}.") from error
