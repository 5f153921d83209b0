"""Keeps an index in step with folders of files."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from mrl_rag.files.chunks import Chunk, chunks_of_file
from mrl_rag.files.finding import Finder, Problem, absolute, reason_of
from mrl_rag.files.languages import LanguageCheck
from mrl_rag.files.reading import NoDocument, NotText
from mrl_rag.files.splitting import Splitter
from mrl_rag.index import TwoStageIndex
from mrl_rag.progress import progress_bar
from mrl_rag.retriever import TwoStageRetriever

# Chunks that are encoded and stored together, unless one file has more: an interruption loses no more than these.
_BATCH = 512
# Part of each file's hash: another number has every file read again.
_VERSION = 1
_PAGE = 5000


@dataclass(frozen=True)
class FilesReport:
    """What `index_files` did.

    Attributes:
        files: files that are in the index now, of those it was asked to read.
        unchanged: of these, files that it had stored before, and didn't read into chunks again.
        chunks: chunks of these files in the index.
        encoded: chunks whose vectors were computed.
        removed: chunks that were removed, of files that have changed or are gone.
        unreadable: files that can't be read, and why; the index keeps what it had of them.
        ignored: what else was left out of folders: binary files and links to what was read already.
    """

    files: int = 0
    unchanged: int = 0
    chunks: int = 0
    encoded: int = 0
    removed: int = 0
    unreadable: tuple[Problem, ...] = ()
    ignored: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every file could be read."""
        return not self.unreadable


def index_files(
    paths: Sequence[str | os.PathLike[str]],
    retriever: TwoStageRetriever,
    *,
    glob: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep_removed: bool = False,
    chunk_tokens: int | None = None,
    progress: bool = False,
) -> FilesReport:
    """Store the chunks of files in an index, and bring it up to date when called again.

        with TwoStageRetriever(MatryoshkaEncoder(), "./db") as retriever:
            report = index_files(["./notes"], retriever, exclude=["drafts"], progress=True)

    Files that haven't changed are not split again; of a file that has, only new chunks are encoded. Records of files
    that are gone from a folder, or are excluded now, are removed. After an interruption, call again: at most the last
    512 chunks are encoded twice. A record's metadata are those of `Chunk`, and `chunks` and `file_hash` of its file,
    by which this function finds what has changed; records without a `file_hash` are left alone.

    Args:
        paths: files and folders.
        retriever: the encoder and the index.
        glob: patterns of the files to take from folders, such as "*.md"; empty for every file. Records of files that
            don't match stay.
        exclude: patterns of files and folders to leave out of folders.
        keep_removed: keep the records of files that are gone or excluded.
        chunk_tokens: longest chunk in tokens; None for 256, or the encoder's `max_length` if that is less. Another
            number splits every file again.
        progress: show a bar when standard error is a terminal.

    Returns:
        What was done. Files that can't be read are listed there, and stop nothing.

    Raises:
        InvalidInput: `paths` is a string or empty, or `chunk_tokens` is out of range.
        MissingExtra: a package that reads files is not installed.
        MrlRagError: as `TwoStageIndex.upsert` does.

    Warns:
        UserWarning: once, where an English model is given text that is mostly not English.
    """
    work = _Indexing(retriever, Splitter(retriever.encoder, chunk_tokens))
    finder = Finder(absolute(paths), tuple(glob), tuple(exclude), work.unreadable.append, work.ignored.append)
    return work.run(finder, keep_removed, progress)


@dataclass
class _Stored:
    """What the index has of a file: the hashes of its content, one per record, and how many records it should have."""

    hashes: Counter[str] = field(default_factory=Counter)
    chunks: int = 0

    def is_complete(self, file_hash: str) -> bool:
        return self.hashes == {file_hash: self.chunks}


@dataclass(frozen=True)
class _File:
    """A file with its chunks, on its way into the index."""

    path: str
    chunks: list[Chunk]
    file_hash: str


@dataclass
class _Batch:
    """Files that are stored together: enough chunks to be worth a call of the encoder.

    Attributes:
        read: how many files were read for it.
        unchanged: how many of these haven't changed.
        chunks: how many chunks the index has of those.
        files: the others.
    """

    read: int = 0
    unchanged: int = 0
    chunks: int = 0
    files: list[_File] = field(default_factory=list)


class _Indexing:
    """One call of `index_files`."""

    def __init__(self, retriever: TwoStageRetriever, splitter: Splitter) -> None:
        self._retriever = retriever
        self._index: TwoStageIndex = retriever.index
        self._splitter = splitter
        self._languages = LanguageCheck(retriever.index.model)
        self._stored = _stored_files(retriever.index)
        self._settings = f"{_VERSION} {splitter.chunk_tokens} ".encode()
        self.unreadable: list[Problem] = []
        self.ignored: list[Problem] = []
        self._done = Counter[str]()

    def run(self, finder: Finder, keep_removed: bool, progress: bool) -> FilesReport:
        paths = list(finder.find())
        # An index fits its rotation on its first records: they should be like the others.
        random.Random(0).shuffle(paths)
        started = time.monotonic()
        with (
            progress_bar(len(paths), "index", "file", progress) as advance,
            ThreadPoolExecutor(1, thread_name_prefix="mrl_rag-files") as thread,
        ):
            batches = self._batches(paths, set(finder.paths))
            # The next files are read and split while these are encoded.
            upcoming = thread.submit(next, batches, None)
            while batch := upcoming.result():
                upcoming = thread.submit(next, batches, None)
                self._done.update(files=batch.unchanged, unchanged=batch.unchanged, chunks=batch.chunks)
                for _ in self._store(batch.files):
                    speed = self._done["encoded"] / (time.monotonic() - started)
                    advance(0, f"{self._done['chunks']:,} chunks, {speed:,.0f} chunks/s")
                advance(batch.read)
        self._languages.warn()
        if not keep_removed:
            self._remove_gone(finder)
        return FilesReport(**self._done, unreadable=tuple(self.unreadable), ignored=tuple(self.ignored))

    def _batches(self, paths: list[Path], asked: set[Path]) -> Iterator[_Batch]:
        batch = _Batch()
        for path in paths:
            self._read(path, path in asked, batch)
            if sum(len(file.chunks) for file in batch.files) >= _BATCH:
                yield batch
                batch = _Batch()
        if batch.read:
            yield batch

    def _read(self, path: Path, asked: bool, batch: _Batch) -> None:
        """Read a file into a batch.

        Args:
            path: the file.
            asked: whether the caller named this file, and not only a folder above it.
            batch: the batch.
        """
        batch.read += 1
        try:
            content = path.read_bytes()
            file_hash = blake2b(self._settings + content, digest_size=16).hexdigest()
            stored = self._stored.get(str(path))
            if stored is not None and stored.is_complete(file_hash):
                batch.unchanged += 1
                batch.chunks += stored.chunks
                return
            chunks, prose = chunks_of_file(path, content, self._splitter)
        except NotText as error:
            no_document = isinstance(error, NoDocument) and not asked
            (self.ignored if no_document else self.unreadable).append(Problem(str(path), str(error)))
            return
        except OSError as error:
            self.unreadable.append(Problem(str(path), reason_of(path, error)))
            return
        if prose:
            self._languages.look_at([chunk.text for chunk in chunks])
        batch.files.append(_File(str(path), chunks, file_hash))

    def _store(self, files: list[_File]) -> Iterator[None]:
        """Store the chunks of files, and yield now and then. Those whose text is stored already keep their vectors."""
        records = {}
        for file in files:
            seen = Counter[str]()
            for chunk in file.chunks:
                # Not of the chunk's place: what comes before it may change.
                id_ = _id_of(file.path, chunk.text, seen[chunk.text])
                seen[chunk.text] += 1
                metadata = {**chunk.metadata, "chunks": len(file.chunks), "file_hash": file.file_hash}
                records[id_] = chunk.text, metadata
        ids = list(records)
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            texts, metadatas = zip(*(records[id_] for id_ in part), strict=True)
            encoded = self._retriever.index_batch(texts, part, metadatas)
            self._done.update(encoded=encoded, chunks=len(part))
            yield
        for file in files:
            if file.path in self._stored:
                self._delete(self._ids_of(file.path) - records.keys())
        self._done.update(files=len(files))

    def _remove_gone(self, finder: Finder) -> None:
        """Remove the records of files below the folders that are gone or excluded."""
        roots = [path for path in finder.paths if path.is_dir()]
        for name in self._stored:
            path = Path(name)
            if any(path.is_relative_to(root) for root in roots) and (not path.exists() or finder.excludes(path)):
                self._delete(self._ids_of(name))

    def _ids_of(self, path: str) -> set[str]:
        """Return the ids of a file's records that this function has stored."""
        return {id_ for id_, metadata in self._index.metadatas({"path": path}).items() if "file_hash" in metadata}

    def _delete(self, ids: set[str]) -> None:
        if ids:
            self._index.delete(sorted(ids))
            self._done.update(removed=len(ids))


def _stored_files(index: TwoStageIndex) -> dict[str, _Stored]:
    """Return what the index has of each file."""
    files: dict[str, _Stored] = {}
    offset = 0
    while page := index.get(limit=_PAGE, offset=offset, vectors=False):
        offset += len(page)
        for record in page:
            path, chunks, file_hash = (record.metadata.get(key) for key in ("path", "chunks", "file_hash"))
            if isinstance(path, str) and isinstance(chunks, int) and isinstance(file_hash, str):
                stored = files.setdefault(path, _Stored())
                stored.hashes[file_hash] += 1
                stored.chunks = chunks
    return files


def _id_of(path: str, text: str, occurrence: int) -> str:
    return blake2b(f"{path}\0{text}\0{occurrence}".encode(), digest_size=16).hexdigest()
