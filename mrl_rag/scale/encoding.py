"""Encodes a corpus into shards, in one process or on Ray."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from mrl_rag.arguments import check_integer
from mrl_rag.binding import model_of
from mrl_rag.encoder import Encoder, MatryoshkaEncoder
from mrl_rag.errors import IndexMismatch, InvalidInput
from mrl_rag.index.checks import check_choice
from mrl_rag.index.export import BATCH, Batch, Header
from mrl_rag.index.shards import SHARD_RECORDS, Shard, ShardFolder, refuse_repeated
from mrl_rag.progress import progress_bar
from mrl_rag.scale.inputs import Part, Records, find_inputs, group, scan

Engine = Literal["local", "ray"]

# Inputs whose ids are read at the same time.
_READERS = 8


@dataclass(frozen=True)
class Encoded:
    """What `encode_dataset` did.

    Attributes:
        records: in the shards.
        shards: how many there are.
        reused: how many of these were there already, from an interrupted call or an earlier one.
        truncated: texts that were longer than the encoder's `max_length`, in the other shards.
        seconds: from the beginning to the end.
        encoding: seconds that the encoders took, of all workers together.
    """

    records: int
    shards: int
    reused: int
    truncated: int
    seconds: float
    encoding: float


@dataclass(frozen=True)
class Job:
    """A shard to be made.

    Attributes:
        number: its place among the others.
        parts: where its records are.
    """

    number: int
    parts: Sequence[Part]


@dataclass(frozen=True)
class Done:
    """A shard that was made.

    Attributes:
        shard: what the manifest says about it.
        reused: whether it was there already.
        truncated: texts that were longer than the encoder's `max_length`.
        encoding: seconds that the encoder took.
    """

    shard: Shard
    reused: bool = False
    truncated: int = 0
    encoding: float = 0.0


class ShardEncoder:
    """Makes shards, in any process.

    Args:
        encoder: makes the vectors; or the name of its model, which is loaded when the first shard needs it.
        output: the folder or URL of the shards.
        header: what all their records have in common.
    """

    def __init__(self, encoder: Encoder | str, output: str, header: Header) -> None:
        self._encoder = encoder
        self._folder = ShardFolder(output)
        self._header = header
        self._checked = False

    def make(self, job: Job) -> Done:
        """Make a shard, unless it is there.

        Raises:
            IndexMismatch: this machine's model is another than the one that the job was begun with.
            InvalidInput: the input has changed, or a file can't be read or written.
        """
        records = _merged([part.read() for part in job.parts])
        name = _name(records, self._header)
        found = self._folder.find(job.number, name, self._header)
        if found is not None and _same(found[1], records):
            return Done(found[0], reused=True)
        encoder, began = self._open(), time.perf_counter()
        with warnings.catch_warnings():
            # Reported once, for all shards.
            warnings.filterwarnings("ignore", message=".*longer than max_length")
            vectors = encoder.encode_documents(records.texts, encoder.full_dim)
        encoding = time.perf_counter() - began
        truncation = getattr(encoder, "last_truncation", None)
        batch = Batch(records.ids, list(records.texts), records.metadatas, vectors)
        shard = self._folder.write(job.number, name, self._header, _slices(batch))
        return Done(shard, truncated=0 if truncation is None else truncation.texts, encoding=encoding)

    def _open(self) -> Encoder:
        if isinstance(self._encoder, str):
            self._encoder = MatryoshkaEncoder(self._encoder)
        if not self._checked and self._encoder.fingerprint != self._header.fingerprint:
            raise IndexMismatch(
                f"the model {self._header.model!r} has the fingerprint {self._encoder.fingerprint} on this machine, "
                f"and {self._header.fingerprint} where the job was started. Put the same files on all machines."
            )
        self._checked = True
        return self._encoder


def encode_dataset(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    encoder: Encoder | str = "minilm",
    *,
    engine: Engine = "local",
    collection: str | None = None,
    shard_records: int = SHARD_RECORDS,
    workers: int | None = None,
    cpus_per_worker: int = 1,
    progress: bool = False,
) -> Encoded:
    """Encode the records of files into shards: Parquet files with full vectors, and a manifest of their checksums.

        encode_dataset("corpus.parquet", "./shards", "nomic-v1.5")
        encode_dataset("s3://bucket/corpus", "s3://bucket/shards", "nomic-v1.5", engine="ray")
        encode_dataset("./db", "./shards", "nomic-v1.5")            # the records of an index, by another model

    First the ids are read, and the input is split into shards. Then each worker reads, encodes and writes one shard
    after the other, so memory holds one shard per worker, and 8 bytes per record. A shard's name has a hash of its
    records and of the encoder: after an interruption, call again, and shards that are there and whole are kept.

    On Ray, a worker is a Ray Data actor, with a GPU each if the cluster has any. One that dies is started again, and
    its shard given to another. Ray is started on this machine unless it runs or RAY_ADDRESS names a cluster, whose
    machines need this package, the model, and access to `inputs` and `output`.

    Args:
        inputs: Parquet files, JSON lines (`.jsonl`), folders of these, or folders of indexes; paths or URLs. A record
            has an `id` (a string or an integer), a `document` or `text`, and may have `metadata`: an object, in
            Parquet also as JSON. Other fields are added to the metadata, those without a value are left out.
        output: a folder or URL.
        encoder: makes the vectors, or is the name of its model. On Ray, each worker makes it anew: from the name, or
            from a pickle, which carries the arguments of the encoders of this package.
        engine: "local", in this process; or "ray", which needs the extra `ray`.
        collection: of indexes among the inputs; None where they have only one.
        shard_records: records per shard, fewer where texts are long. Another number makes all shards anew.
        workers: how many workers Ray has; None for one per GPU, or as many as there are cores for.
        cpus_per_worker: cores of a worker without a GPU.
        progress: show a bar when standard error is a terminal.

    Returns:
        What was done.

    Raises:
        InvalidIds: an id is missing or occurs twice; nothing was encoded.
        InvalidInput: an input can't be read, a record can't be stored, or an argument is out of range.
        InvalidTexts: a record has no text.
        IndexMismatch: the output has shards of another model, or a worker has other files of the model.
        MissingExtra: a package that is needed is not installed.
        ShardError: the output's manifest is damaged.
        WorkerError: Ray can't be reached, failed, or finished nothing for 30 minutes.

    Warns:
        UserWarning: texts were truncated.
    """
    began = time.perf_counter()
    check_choice("engine", engine, "local", "ray")
    shard_records = check_integer("shard_records", shard_records, 1)
    folder = ShardFolder(output)
    if isinstance(encoder, str) and engine == "local":
        encoder = MatryoshkaEncoder(encoder)
    header = _header(encoder)
    _check_output(folder, header)
    jobs = _jobs(inputs, collection, shard_records)
    records = sum(part.records for job in jobs for part in job.parts)
    made: list[Done] = []
    with progress_bar(records, "encode", "record", progress) as advance:
        for done in _run(engine, ShardEncoder(encoder, folder.location.url, header), jobs, workers, cpus_per_worker):
            made.append(done)
            advance(done.shard.records)
    manifest = folder.finish(header, [done.shard for done in made])
    truncated = sum(done.truncated for done in made)
    if truncated:
        warnings.warn(
            f"{truncated} of {manifest.records} texts were longer than max_length, and were truncated.", stacklevel=2
        )
    seconds = time.perf_counter() - began
    reused = sum(done.reused for done in made)
    return Encoded(manifest.records, len(made), reused, truncated, seconds, sum(done.encoding for done in made))


def _header(encoder: Encoder | str) -> Header:
    if isinstance(encoder, str):
        # Not on a GPU, which on Ray a worker of this machine needs.
        with MatryoshkaEncoder(encoder, device="cpu") as opened:
            return _header(opened)
    return Header(model_of(encoder), encoder.fingerprint, encoder.full_dim, "float16")


def _check_output(folder: ShardFolder, header: Header) -> None:
    """Refuse to replace shards of another model, and say what is being written where there are none."""
    found = folder.manifest()
    if found is None:
        folder.begin(header)
    elif found.header != header:
        raise IndexMismatch(
            f"{folder.location.name} has shards of {found.header}, and these would be of {header}. Pass another folder."
        )


def _jobs(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], collection: str | None, shard_records: int
) -> list[Job]:
    sources = find_inputs(inputs, collection)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="mrl_rag-inputs") as threads:
        scanned = list(threads.map(lambda source: scan(source[0], source[1], shard_records), sources))

    def ids_of(row: int) -> tuple[str, Iterator[str]]:
        return sources[row][0], (id_ for part in scanned[row][0] for id_ in part.read().ids)

    refuse_repeated([digests for _, digests in scanned], ids_of)
    shards = group((part for parts, _ in scanned for part in parts), shard_records)
    if not shards:
        raise InvalidInput(f"there are no records in {', '.join(source for source, _ in sources)[:300]}.")
    return [Job(number, parts) for number, parts in enumerate(shards)]


def _run(
    engine: Engine, worker: ShardEncoder, jobs: Sequence[Job], workers: int | None, cpus_per_worker: int
) -> Iterable[Done]:
    if engine == "local":
        return map(worker.make, jobs)
    from mrl_rag.scale.on_ray import make_on_ray

    return make_on_ray(worker, jobs, workers, cpus_per_worker)


def _same(batch: Batch, records: Records) -> bool:
    """Say whether a shard has these records, whatever its vectors are."""
    return (batch.ids, batch.documents, batch.metadatas) == (records.ids, records.texts, records.metadatas)


def _merged(parts: Sequence[Records]) -> Records:
    return Records(
        [id_ for part in parts for id_ in part.ids],
        [text for part in parts for text in part.texts],
        [metadata for part in parts for metadata in part.metadatas],
    )


def _name(records: Records, header: Header) -> str:
    """Return a hash of all that a shard is made of."""
    digest = blake2b(repr(header).encode(), digest_size=8)
    for record in zip(records.ids, records.texts, records.metadatas, strict=True):
        digest.update(json.dumps(record).encode())
    return digest.hexdigest()


def _slices(batch: Batch) -> Iterator[Batch]:
    for start in range(0, len(batch.ids), BATCH):
        part = slice(start, start + BATCH)
        yield Batch(batch.ids[part], batch.documents[part], batch.metadatas[part], batch.vectors[part])
