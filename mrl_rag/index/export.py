"""Writes the records of an index to a file that any tool can read, and reads them again.

Parquet has the columns id, document, metadata (JSON) and vector, and the model in the schema's metadata. JSON lines
have an object per record, with the model in each.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mrl_rag.errors import ArchiveError, InvalidInput
from mrl_rag.extras import require
from mrl_rag.index.archive import document_hash, sync
from mrl_rag.index.checks import check_documents, check_ids, check_metadatas
from mrl_rag.truncation import Float32Array, as_rows, unit_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mrl_rag.index.shortlist import Stored
    from mrl_rag.index.storage import Stores

# Records that are read, written and stored together: memory holds no more.
BATCH = 500
FORMAT = 1
_COLUMNS = ("id", "document", "metadata", "vector")
# How often, and for how many seconds, to wait for a record that another process is replacing.
_ATTEMPTS, _WAIT = 20, 0.05

# Most by which rounding to float16 changes the length of a unit vector.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Header:
    """What a file says about all its records.

    Attributes:
        model: name of the encoder's model; "" where that isn't known.
        fingerprint: of the encoder; "" where that isn't known.
        full_dim: length of the vectors.
        precision: of the archive that they were read from.
    """

    model: str
    fingerprint: str
    full_dim: int
    precision: str

    @classmethod
    def of(cls, stores: Stores) -> Header:
        """Return what an index says about its records."""
        config = stores.config
        return cls(config.model, config.fingerprint, config.full_dim, config.precision)


@dataclass(frozen=True)
class Batch:
    """Some records.

    Attributes:
        ids: n ids.
        documents: n texts; None for a record without.
        metadatas: n mappings, empty for a record without.
        vectors: float32 [n, full_dim], as they are in the archive.
    """

    ids: list[str]
    documents: list[str | None]
    metadatas: list[dict[str, Any]]
    vectors: Float32Array


class Writer(Protocol):
    """Writes batches to an open file."""

    def write(self, batch: Batch) -> None:
        """Write some records."""

    def close(self) -> None:
        """Write what ends the file."""


def read_whole(stores: Stores, ids: Sequence[str]) -> Batch:
    """Return records, each with the vector of its document. Those that were deleted meanwhile are left out.

    Raises:
        ArchiveError: a full vector is missing, damaged, or of another text.
    """
    found: dict[str, tuple[Stored, Float32Array]] = {}
    waiting = list(ids)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_WAIT)
        # The archive before and after: a record that was replaced in between is read again.
        before, records = stores.archive.document_hashes(waiting), stores.records(waiting)
        there, rows = stores.archive.read(list(records))
        after = stores.archive.document_hashes(there)
        for id_, row in zip(there, rows, strict=True):
            if id_ in before and before[id_] == after.get(id_) == document_hash(records[id_][0]):
                found[id_] = records[id_], row
        waiting = [id_ for id_ in records if id_ not in found]
        if not waiting:
            break
    else:
        raise ArchiveError(
            f"{len(waiting)} records of index {stores.shortlist.name!r} have no full vector of their document, "
            f"{waiting[0]!r} among them. Call repair(encode=encoder.encode_documents), then export again."
        )
    kept = [id_ for id_ in ids if id_ in found]
    vectors = np.stack([found[id_][1] for id_ in kept]) if kept else np.empty((0, stores.config.full_dim), np.float32)
    return Batch(kept, [found[id_][0][0] for id_ in kept], [found[id_][0][1] for id_ in kept], vectors)


def almost_unit(rows: Float32Array) -> Float32Array:
    """Scale rows, float32 [n, d], to length 1, but leave those that are rounded unit rows as they are, to the bit."""
    lengths = np.linalg.norm(rows, axis=1)
    return np.where((np.abs(lengths - 1) <= _ROUNDING)[:, None], rows, unit_rows(rows))


def check_format(file: str | os.PathLike[str]) -> Path:
    """Return the path of a file whose name says which of the formats it has.

    Raises:
        InvalidInput: its name ends otherwise.
        MissingExtra: it is Parquet, and pyarrow is not installed.
    """
    path = Path(file).expanduser()
    if path.suffix not in (".parquet", ".jsonl"):
        raise InvalidInput(
            f"file is {os.fspath(file)!r}; its name must end in .parquet, in .jsonl for JSON "
            "lines, or in / for a folder of shards."
        )
    if path.suffix == ".parquet":
        require("pyarrow.parquet", "parquet")
    return path


@contextmanager
def open_to_write(path: Path, header: Header) -> Iterator[Writer]:
    """Open a file to write; it appears under its name, and on the disk, once everything is written.

    Raises:
        InvalidInput: the file can't be written.
    """
    make = ParquetWriter if path.suffix == ".parquet" else _JsonWriter
    # In the same folder, so that it can be renamed.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with closing(make(temporary, header)) as writer:
            yield writer
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise InvalidInput(f"{path} can't be written: {error}. Make room, or pass a file in another folder.") from error
    finally:
        temporary.unlink(missing_ok=True)


class _JsonWriter:
    def __init__(self, path: Path, header: Header) -> None:
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self._model = {"model": header.model or None, "fingerprint": header.fingerprint or None}

    def write(self, batch: Batch) -> None:
        for id_, document, metadata, vector in zip(
            batch.ids, batch.documents, batch.metadatas, batch.vectors, strict=True
        ):
            record = {"id": id_, "document": document, "metadata": metadata, "vector": vector.tolist()}
            self._file.write(json.dumps(record | self._model, ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class ParquetWriter:
    """Writes batches to a Parquet file.

    Args:
        sink: its path, or a pyarrow stream.
        header: what all the records have in common.
    """

    def __init__(self, sink: Any, header: Header) -> None:
        self._pa, self._parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
        number = self._pa.float16() if header.precision == "float16" else self._pa.float32()
        self._dtype = np.float16 if header.precision == "float16" else np.float32
        self._vector = self._pa.list_(number, header.full_dim)
        fields = [
            self._pa.field("id", self._pa.string(), nullable=False),
            self._pa.field("document", self._pa.string()),
            self._pa.field("metadata", self._pa.string(), nullable=False),
            self._pa.field("vector", self._vector, nullable=False),
        ]
        about = {"format": FORMAT, "model": header.model, "fingerprint": header.fingerprint}
        about |= {"full_dim": header.full_dim, "precision": header.precision}
        self._schema = self._pa.schema(fields, metadata={"mrl_rag": json.dumps(about)})
        self._writer = self._parquet.ParquetWriter(
            sink, self._schema, compression="zstd", use_dictionary=False, write_page_checksum=True
        )

    def write(self, batch: Batch) -> None:
        """Write some records, as a row group."""
        numbers = self._pa.array(batch.vectors.astype(self._dtype).ravel())
        metadatas = [json.dumps(metadata, ensure_ascii=False, allow_nan=False) for metadata in batch.metadatas]
        vectors = self._pa.FixedSizeListArray.from_arrays(numbers, type=self._vector)
        columns = [batch.ids, batch.documents, metadatas]
        arrays = [self._pa.array(column, self._pa.string()) for column in columns]
        self._writer.write_table(self._pa.table([*arrays, vectors], schema=self._schema))

    def close(self) -> None:
        """Write what ends the file."""
        self._writer.close()


def read_records(path: Path) -> Iterator[tuple[Header, Batch]]:
    """Yield the records of a file in batches, each checked, with what the file says about them.

    Raises:
        InvalidInput: the file is missing or damaged, or was not written by `export`.
    """
    seen: set[str] = set()
    first: Header | None = None
    try:
        for header, batch, place in _parquet_batches(path) if path.suffix == ".parquet" else _json_batches(path):
            first = first or header
            if header != first:
                raise ValueError(f"{place} is of {header}, and the first record of {first}")
            check_batch(batch, seen)
            yield header, batch
    except OSError as error:
        raise InvalidInput(f"{path} can't be read: {error}. Pass a file that `export` wrote.") from error
    except (ValueError, KeyError, TypeError, RecursionError, NotImplementedError) as error:
        raise InvalidInput(
            f"{path} is no file of records, or is damaged: {error}. Pass a file that `export` wrote."
        ) from error


def check_batch(batch: Batch, seen: set[str]) -> None:
    """Check records as `TwoStageIndex.upsert` does, and add their ids to those that were seen.

    Raises:
        ValueError: a record can't be stored, or an id was seen before.
    """
    check_ids(batch.ids)
    twice = seen.intersection(batch.ids)
    if twice:
        raise ValueError(f"id {min(twice)!r} occurs more than once")
    seen.update(batch.ids)
    check_documents(batch.documents)
    check_metadatas(batch.metadatas)


def _parquet_batches(path: Path) -> Iterator[tuple[Header, Batch, str]]:
    parquet = require("pyarrow.parquet", "parquet")
    with path.open("rb") as opened, parquet.ParquetFile(opened, page_checksum_verification=True) as file:
        header = check_schema(file.schema_arrow)
        for batch, place in parquet_batches(file, header):
            yield header, batch, place


def parquet_batches(file: Any, header: Header) -> Iterator[tuple[Batch, str]]:
    """Yield the records of an open `pyarrow.parquet.ParquetFile`, and where each batch begins.

    Raises:
        ValueError: a record has no id, metadata or vector, or a metadata is no JSON object.
    """
    for number, part in enumerate(file.iter_batches(batch_size=BATCH)):
        columns = {name: part.column(name) for name in _COLUMNS}
        if any(columns[name].null_count for name in ("id", "metadata", "vector")):
            raise ValueError(f"a record among those from {number * BATCH} on has no id, metadata or vector")
        metadatas = [_mapping(text) for text in columns["metadata"].to_pylist()]
        ids, documents = columns["id"].to_pylist(), columns["document"].to_pylist()
        yield Batch(ids, documents, metadatas, vectors_of(columns["vector"], header)), f"record {number * BATCH}"


def vectors_of(column: Any, header: Header) -> Float32Array:
    """Return the vectors in a pyarrow column of fixed-size lists, float32 [n, full_dim].

    Raises:
        ValueError: numbers are missing, NaN or infinite.
    """
    flat = column.combine_chunks().flatten() if hasattr(column, "chunks") else column.flatten()
    if flat.null_count:
        raise ValueError("a vector has missing numbers")
    return as_rows(flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, header.full_dim))


def check_schema(schema: Any) -> Header:
    """Return what a Parquet file says about all its records.

    Raises:
        ValueError: it has other columns or types, or doesn't say which model it is of.
    """
    pa = require("pyarrow", "parquet")
    if tuple(schema.names) != _COLUMNS:
        raise ValueError(f"its columns are {schema.names}, not {list(_COLUMNS)}")
    about = json.loads((schema.metadata or {}).get(b"mrl_rag", b"{}"))
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"its schema has no metadata 'mrl_rag' of format {FORMAT}")
    texts, vector = [schema.field(name).type for name in _COLUMNS[:3]], schema.field("vector").type
    if any(type_ not in (pa.string(), pa.large_string()) for type_ in texts):
        raise ValueError(f"the columns id, document and metadata are {', '.join(map(str, texts))}, not strings")
    numbers = (pa.float16(), pa.float32())
    if not pa.types.is_fixed_size_list(vector) or vector.value_type not in numbers or not vector.list_size:
        raise ValueError(f"the column vector is {vector}, not a fixed-size list of float16 or float32")
    precision = "float16" if vector.value_type == pa.float16() else "float32"
    return Header(str(about["model"]), str(about["fingerprint"]), vector.list_size, precision)


def _json_batches(path: Path) -> Iterator[tuple[Header, Batch, str]]:
    with path.open(encoding="utf-8") as file:
        records = (_json_record(text, line) for line, text in enumerate(file, 1))
        for start in itertools.count(1, BATCH):
            batch = list(itertools.islice(records, BATCH))
            if not batch:
                return
            headers, ids, documents, metadatas, vectors = (list(column) for column in zip(*batch, strict=True))
            for line, header in enumerate(headers, start):
                if header != headers[0]:
                    raise ValueError(f"line {line} is of {header}, and those before of {headers[0]}")
            yield headers[0], Batch(ids, documents, metadatas, as_rows(np.stack(vectors))), f"line {start}"


def _json_record(text: str, line: int) -> tuple[Header, str, str | None, dict[str, Any], npt.NDArray[np.float64]]:
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("it is no JSON object")
        vector = record["vector"]
        if not isinstance(vector, list) or not vector or not all(type(number) in (int, float) for number in vector):
            raise ValueError("vector is no list of numbers")
        header = Header(record["model"] or "", record["fingerprint"] or "", len(vector), "float32")
        if not isinstance(header.model, str) or not isinstance(header.fingerprint, str):
            raise ValueError("model or fingerprint is no string")
        return header, record["id"], record["document"], _mapping(record["metadata"]), np.array(vector, np.float64)
    except KeyError as error:
        raise ValueError(f"line {line} has no {error}") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"line {line}: {error}") from error


def _mapping(metadata: object) -> dict[str, Any]:
    found = json.loads(metadata) if isinstance(metadata, str) else metadata
    if not isinstance(found, dict):
        raise ValueError(f"metadata is {metadata!r}, no JSON object")
    return found
