"""`TwoStageIndex`: search at a low dimension, rerank at full dimension."""

from __future__ import annotations

import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from mrl_rag.arguments import check_integer
from mrl_rag.compat.chroma import settings_of
from mrl_rag.errors import (
    IndexClosed,
    IndexMismatch,
    IndexNotWritable,
    InvalidIds,
    InvalidInput,
    InvalidVectors,
    MrlRagError,
    TwoStageIndexError,
)
from mrl_rag.index import writer
from mrl_rag.index.calibration import EF_SEARCH, SIZES, Questions, ask_own_records, fit_shortlist, measure
from mrl_rag.index.checks import (
    Metadata,
    Where,
    as_queries,
    check_choice,
    check_documents,
    check_ids,
    check_metadatas,
    check_name,
    check_recall,
    check_threshold,
    explain_other_names,
)
from mrl_rag.index.chroma_errors import chroma_errors
from mrl_rag.index.config import ArchivePrecision, IndexConfig
from mrl_rag.index.filters import check_where
from mrl_rag.index.plan import Plan, check_is_plan, check_k, check_plan
from mrl_rag.index.rebuild import rebuild
from mrl_rag.index.rotation import explained_energy
from mrl_rag.index.search import GraphOutdated, Hit, Request, Searcher, is_scanned, max_exact, mmr
from mrl_rag.index.shortlist import (
    ShortlistCollection,
    empty_collection,
    index_names,
    is_ours,
    leftovers,
    pages,
)
from mrl_rag.index.storage import Storage, Stores
from mrl_rag.index.verify import Report, verify
from mrl_rag.lifetime import leave_to_parent, release_dropped, renew_after_fork
from mrl_rag.progress import progress_bar
from mrl_rag.tasks import check_texts
from mrl_rag.truncation import Float32Array, as_rows, check_dim, unit_rows

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

Rotation: TypeAlias = Literal["auto", "none"]
Answer = TypeVar("Answer")
Empty = TypeVar("Empty")

_LOG = logging.getLogger("mrl_rag")
# New vectors differ from those the rotation was fitted on where the shortlist keeps less of their squared length: less
# than this share of what it kept then. With fewer vectors than _DRIFT_SAMPLE, that share is too uncertain.
_DRIFT = 0.9
_DRIFT_SAMPLE = 256
# Least number of vectors per dimension to fit a rotation on; with fewer, the fit overfits.
_MIN_VECTORS_PER_DIM = 4
# The recall is measured again when there are so many times the records.
_GROWTH = 10
# No model's vectors are longer.
_MAX_DIM = 65536
# How long SQLite may check Chroma's file. Nobody can write it meanwhile.
_VERIFY_SECONDS = 2
_REPAIR_SECONDS = 600


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One stored record.

    Attributes:
        id: as it was upserted.
        document: its text; None where it has none.
        metadata: as it was upserted; empty where there was none.
        vector: float32 [full_dim], unit length, in the archive's precision; None where it wasn't asked for.
    """

    id: str
    document: str | None
    metadata: dict[str, Any]
    vector: Float32Array | None


class TwoStageIndex:
    """Vectors searched in Chroma at a low dimension and reranked at full dimension.

        index = TwoStageIndex("./db", full_dim=384)               # in a folder, which is made if it isn't there
        index = TwoStageIndex(full_dim=384, shortlist_dim=96)     # in memory
        index = TwoStageIndex(client=chromadb.HttpClient())       # beside a server
        index.upsert(["a"], vectors, documents=["a text"], metadatas=[{"page": 1}])
        for hit in index.search(query_vector, k=10, where={"page": 1}):
            hit.score, hit.document                               # cosine at full dimension

    Chroma keeps ids, documents and metadata; an archive beside it keeps the full vectors. Any number of threads may
    call one index. A write that has returned is on the disk. In a folder only one process may write, from its first
    write until it closes the index or ends; any number of others may read.

    Args:
        path: a folder; None for memory, or where `client` is given.
        collection: the collection's name.
        full_dim: length of the vectors; None for that of the stored index, or of the first vectors.
        shortlist_dim: dimension of stage one, 1 <= shortlist_dim <= full_dim; None for that of the stored index. A new
            index begins with a quarter of `full_dim`, but at least 64, and chooses when it fits its rotation.
        fingerprint: of the encoder, so that another one is refused; None to check nothing. `TwoStageRetriever` sets
            this and `model`.
        client: a chromadb client to use instead of `path`.
        plan: for searches without one. None ranks every record of an index of up to 20,000 records and 8 million
            numbers (not on a server). A larger one takes a shortlist of 50 candidates, or as many as it has chosen, or
            3 * k if that is more. It doubles the shortlist, up to three times, while a hit is found in its later half.
            Stage one scans up to 25 million numbers in memory. Beyond that, on a server, and with a condition, it is a
            search of Chroma's graph.
        rotation: "auto": when a new index has more records than it ranks one by one, it fits an orthogonal map on them
            (uncentred PCA), and the shortlist keeps the first coordinates of the rotated vectors. Scores at full
            dimension stay the same, and the shortlist holds more of the true answers. On a server this is only done
            when the first upsert has 4 * full_dim vectors; `reindex(rotation="fit")` does it at any time. "none": the
            shortlist keeps the model's own first coordinates. A stored index keeps what it has.
        precision: of a new index's archive: "float16"; "int8", half as large, with scores off by about 0.001; or
            "binary", int8 and the sign bits, by which candidates are chosen before their int8 rows are read, for an
            archive larger than memory. None for "float16", or for that of the stored index. With a `client` that has
            no folder, the archive is float32 in Chroma.
        recall: share of the true top 10, 0 < recall <= 1, that a new index aims at when it chooses dimension, shortlist
            size and graph settings. A stored index keeps what it has.
        model: name of the encoder's model. It is stored with the fingerprint and shown in messages, and
            `TwoStageRetriever(None, path)` makes the encoder from it.

    Raises:
        InvalidDimension: a dimension is not an integer in range.
        InvalidPlan: `plan` is not a `Plan`.
        InvalidInput: Chroma doesn't take the collection's name, another argument is out of range, or both `path` and
            `client` are given.
        DimensionMismatch: the stored index has other dimensions.
        PlainCollection: the collection has records that a two-stage index didn't write. An empty one is taken over.
        IndexMismatch: the stored index has another fingerprint, precision or format.
        ArchiveError: the archive is missing or damaged.
        IndexNotWritable: the folder can't be made or written.
        IndexClosed: this process was forked from one that had used Chroma.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        collection: str = "docs",
        full_dim: int | None = None,
        shortlist_dim: int | None = None,
        fingerprint: str | None = None,
        client: ClientAPI | None = None,
        plan: Plan | None = None,
        rotation: Rotation = "auto",
        precision: ArchivePrecision | None = None,
        recall: float = 0.99,
        model: str | None = None,
    ) -> None:
        release_dropped()
        if path is not None and client is not None:
            raise InvalidInput(f"path={os.fspath(path)!r} and client are both given; pass one of them.")
        self._full_dim = None if full_dim is None else check_dim(full_dim, _MAX_DIM)
        self._shortlist_dim = None if shortlist_dim is None else check_dim(shortlist_dim, self._full_dim or _MAX_DIM)
        self._rotation_wanted = check_choice("rotation", rotation, *get_args(Rotation))
        self._precision = check_choice("precision", precision, *get_args(ArchivePrecision), None)
        self._target_recall = check_recall(recall)
        self._fingerprint, self._model = fingerprint, model
        self.plan = check_is_plan(plan)
        self._name = check_name(collection)
        self._storage = Storage(path, client)
        if self._storage.shared and precision is not None:
            raise InvalidInput(f"precision is {precision!r}; with this client the archive is float32 in Chroma.")
        self._opened: Searcher | None = None
        self._refusal = ""
        renew_after_fork(self)
        # With these the recall of a newly filled collection is measured.
        self._questions: tuple[Questions, list[str]] | None = None
        self._warned = ""
        try:
            if self._open() is None:
                self._check_not_hidden()
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_chroma(
        cls,
        collection: Collection,
        path: str | os.PathLike[str] | None = None,
        name: str | None = None,
        *,
        client: ClientAPI | None = None,
        in_place: bool = False,
        shortlist_dim: int | None = None,
        fingerprint: str | None = None,
        rotation: Rotation = "auto",
        precision: ArchivePrecision | None = None,
        model: str | None = None,
        progress: bool = False,
    ) -> TwoStageIndex:
        """Copy a Chroma collection that holds full vectors into a two-stage index. Nothing is encoded.

        The collection stays as it is; `in_place` changes its name. After an interruption, call again: records that
        were copied are not copied twice. Scores are cosines, whatever the collection's metric.

            TwoStageIndex.from_chroma(collection, "./db")              # into a folder
            TwoStageIndex.from_chroma(collection, client=client)       # as "<name>-two-stage"
            TwoStageIndex.from_chroma(collection, in_place=True)       # where it is, under its name

        Args:
            collection: the collection to copy, of any chromadb client.
            path: folder of the new index, which may be the collection's; None for memory, or where `client` is given.
            name: of the new collection; None for the old one's, with "-two-stage" added where both may be in one
                place: where `client` is given, or the collection's own folder.
            client: a chromadb client to use instead of `path`.
            in_place: give the new index the collection's name, and add "-single-stage" to the collection's. Leave
                `path` and `client` out, or pass the collection's own.
            shortlist_dim: as for `TwoStageIndex`.
            fingerprint: of the encoder that filled the collection.
            rotation: as for `TwoStageIndex`.
            precision: as for `TwoStageIndex`.
            model: name of that encoder's model.
            progress: show a bar when standard error is a terminal.

        Raises:
            InvalidInput: `in_place` with another folder, or with `name`.
            IndexMismatch: the collection is a two-stage index already.
        """
        if client is None and ((in_place and path is None) or _is_in(collection, path)):
            client, path = _client_of(collection), None
        if in_place and (client is None or name is not None):
            raise InvalidInput(f"in_place=True leaves the collection where it is; path={path!r}, name={name!r}.")
        if is_ours(collection):
            raise IndexMismatch(f"collection {collection.name!r} is a two-stage index; open it as one.")
        target = name or (f"{collection.name}-two-stage" if client is not None else collection.name)
        index = cls(
            *(path, target, None, shortlist_dim, fingerprint, client),
            rotation=rotation,
            precision=precision,
            model=model,
        )
        with progress_bar(collection.count(), "copy", "record", progress) as advance:
            for ids, vectors, documents, metadatas in pages(collection):
                new = index.changed(ids, documents, metadatas)
                if new:
                    index.upsert(
                        [ids[row] for row in new],
                        vectors[new],
                        [documents[row] for row in new],
                        [metadatas[row] for row in new],
                    )
                advance(len(ids))
        if in_place and index._opened is not None:
            with index._writing():
                shortlist = index._opened.stores.shortlist
                shortlist.take_name_of(collection, f"{collection.name}-single-stage")
                index._name = shortlist.name
        return index

    @staticmethod
    def names(path: str | os.PathLike[str]) -> list[str]:
        """Return the names of the two-stage indexes in a folder, in alphabetical order."""
        if not Path(path, "chroma.sqlite3").is_file():
            return []
        storage = Storage(path, None)
        try:
            with chroma_errors():
                return index_names(storage.client)
        finally:
            storage.close()

    def __repr__(self) -> str:
        place = repr(str(self.path)) if self.path else "in memory" if self._storage.temporary else "on a client"
        try:
            records = len(self)
        except MrlRagError:
            return f"TwoStageIndex({place}, {self._name!r}, closed or not readable)"
        dims = f", {self.shortlist_dim} of {self.full_dim}" if self.full_dim else ""
        fitted = ", fitted" if self.rotation == "fit" else ""
        return f"TwoStageIndex({place}, {self._name!r}, {records} records{dims}{fitted})"

    @property
    def full_dim(self) -> int | None:
        """Length of the vectors; None until it is known."""
        opened = self._opened
        return self._full_dim if opened is None else opened.stores.config.full_dim

    @property
    def shortlist_dim(self) -> int | None:
        """Dimension of stage one; None until `full_dim` is known."""
        opened = self._opened
        if opened is not None:
            return opened.stores.config.shortlist_dim
        return None if self._full_dim is None else self._shortlist_dim or _default_shortlist(self._full_dim)

    @property
    def rotation(self) -> str:
        """The shortlist's rotation: "fit" once fitted, "auto" while there are too few vectors for that, or "none"."""
        opened = self._open()
        stored = self._rotation_wanted if opened is None else opened.stores.config.rotation
        return stored if stored in ("auto", "none") else "fit"

    @property
    def recall(self) -> float | None:
        """Share of the true top 10 found with records left out of the fit; None until it is measured."""
        opened = self._open()
        return (opened.stores.config.recall or None) if opened is not None else None

    @property
    def model(self) -> str | None:
        """Name of the model whose vectors are in it; None where that isn't known."""
        return self._encoder()[0]

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the encoder whose vectors are in it; None where that isn't known."""
        return self._encoder()[1]

    def _encoder(self) -> tuple[str | None, str | None]:
        opened = self._open()
        config = None if opened is None else opened.stores.config
        if config is None or not config.fingerprint:
            return self._model, self._fingerprint
        return config.model or self._model, config.fingerprint

    @property
    def name(self) -> str:
        """The collection's name."""
        return self._name

    @property
    def path(self) -> Path | None:
        """The folder it is in, absolute; None in memory and on a server."""
        return None if self._storage.temporary else self._storage.folder

    @property
    def client(self) -> ClientAPI:
        """The chromadb client this index is on."""
        self._check_usable()
        return self._storage.client

    def collection(self, create: bool = False) -> Collection:
        """Return the Chroma collection, to read from. Records that Chroma adds by itself have no full vector.

        Another collection takes its place in `reindex`, and when the index fits its rotation.

        Args:
            create: make it, empty, where nothing was stored yet. The index takes it over.

        Raises:
            InvalidInput: there is none, or Chroma doesn't take the name.
        """
        from chromadb.errors import NotFoundError

        with chroma_errors():
            if self._open() is None and create:
                return empty_collection(self.client, self._name)
            try:
                return self.client.get_collection(self._name, embedding_function=None)
            except NotFoundError:
                raise InvalidInput(f"there is no collection {self._name!r}; store a record, or make it.") from None

    def bind(self, model: str, fingerprint: str) -> None:
        """Take vectors of one encoder alone from here on; the next `upsert` stores which. See `TwoStageRetriever`.

        Args:
            model: name of the encoder's model.
            fingerprint: of the encoder.

        Raises:
            IndexMismatch: the index was filled by another encoder, or opened with another `fingerprint`.
        """
        opened = self._open()
        if opened is not None:
            opened.stores.config.check_encoder(self._name, model, fingerprint)
        if self._fingerprint not in (None, "", fingerprint):
            raise IndexMismatch(
                f"index {self._name!r} was opened with fingerprint={self._fingerprint!r}; {model!r} has "
                f"{fingerprint}. Open it with this encoder's, or without one."
            )
        self._model, self._fingerprint = model, fingerprint

    def __len__(self) -> int:
        """Return how many records there are."""
        return self._current(lambda searcher: searcher.stores.shortlist.count(), 0)

    def upsert(
        self,
        ids: Sequence[str],
        vectors: npt.ArrayLike,
        documents: Sequence[str | None] | None = None,
        metadatas: Sequence[Metadata | None] | None = None,
        progress: bool = False,
    ) -> None:
        """Store records. One whose id exists is replaced as a whole, or left alone if nothing differs.

        Everything is checked before anything is written. Records are committed in batches as large as the client
        takes; an interruption loses at most the batch in flight.

        Args:
            ids: n different non-empty strings.
            vectors: float array [n, full_dim]; stored at unit length.
            documents: n texts, None for a record without; or None for none at all.
            metadatas: n mappings of strings to values that Chroma stores, None for a record without; or None.
            progress: show a bar when standard error is a terminal.

        Raises:
            InvalidIds: ids are empty, repeated, not strings, or not as many as the vectors, documents, metadatas.
            InvalidVectors: another length than `full_dim`, or NaN or infinity.
            InvalidTexts: a document is not a string, or holds a lone surrogate.
            InvalidInput: Chroma can't store a metadata.
            IndexNotWritable: the folder can't be written.
        """
        ids = check_ids(ids)
        rows = as_rows(vectors)
        texts = [None] * len(ids) if documents is None else list(documents)
        for name, sequence in (("vectors", rows), ("documents", texts), ("metadatas", metadatas)):
            if sequence is not None and len(sequence) != len(ids):
                raise InvalidIds(f"there are {len(ids)} ids and {len(sequence)} {name}; give one of each per record.")
        check_documents(texts)
        checked = check_metadatas([None] * len(ids) if metadatas is None else metadatas)
        if not ids:
            return
        with self._writing():
            stores = (self._open() or self._create(ids, rows)).stores
            self._check_length(rows, "vectors", stores.config.full_dim)
            self._remember_encoder(stores)
            with progress_bar(len(ids), "index", "record", progress) as advance:
                for batch in stores.shortlist.batches(range(len(ids))):
                    part = slice(batch[0], batch[-1] + 1)
                    writer.upsert(stores, ids[part], unit_rows(rows[part]), texts[part], checked[part])
                    advance(len(batch))
            self._adapt(stores, rows)

    def check(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        metadatas: Sequence[Metadata | None] | None = None,
        first: int = 0,
    ) -> None:
        """Raise the errors that `upsert` would raise, before texts are encoded. An id may occur twice.

        Args:
            ids: n ids.
            texts: n strings.
            metadatas: n mappings, None for a record without; or None for none at all.
            first: position of the first of each, for messages.

        Raises:
            InvalidIds: an id is not a non-empty string.
            InvalidTexts: a text is not a string, or holds a lone surrogate.
            InvalidInput: Chroma can't store a metadata.
        """
        check_ids(ids, unique=False, first=first)
        check_texts(texts, first)
        check_metadatas(metadatas or [], first)

    @explain_other_names
    def delete(
        self,
        ids: Sequence[str] | None = None,
        where: Where | None = None,
        where_document: Where | None = None,
    ) -> None:
        """Remove the records with these ids that meet all the conditions given.

        Args:
            ids: strings, of which unknown ones are ignored; None for every record that meets the conditions.
            where: condition on metadata, in Chroma's language.
            where_document: condition on the document, in Chroma's language.

        Raises:
            InvalidIds: no ids and no conditions are given (`clear` removes everything), or an id is not a non-empty
                string.
            InvalidInput: a condition isn't in Chroma's language.
        """
        if ids is None and not where and not where_document:
            raise InvalidIds(
                f"ids is None, where is {where!r} and where_document is {where_document!r}; say which records to "
                "remove, or call clear() to remove them all."
            )
        wanted = None if ids is None else check_ids(ids, unique=False)
        where, where_document = check_where(where, where_document)
        with self._writing():
            opened = self._open()
            if opened is None:
                return
            if where is not None or where_document is not None:
                matching = opened.stores.shortlist.ids(where, where_document)
                wanted = matching if wanted is None else sorted(set(wanted) & set(matching))
            writer.delete(opened.stores, wanted or [])

    def clear(self) -> None:
        """Remove every record, and keep the collection and the settings stored with it; `drop` removes those, too."""
        if self._open() is not None:
            self.delete(self._current(lambda searcher: searcher.stores.shortlist.ids(None, None), []))

    def drop(self) -> None:
        """Remove the index itself: records, full vectors and settings. The next upsert makes a new one.

        Readers in other threads and processes get the records as they were, or none.
        """
        from chromadb.errors import NotFoundError

        with self._writing():
            opened = self._open()
            if opened is None:
                with suppress(NotFoundError):
                    self.client.delete_collection(self._name)
                return
            # Chroma first: a crash in between leaves an archive that no collection uses.
            self.client.delete_collection(opened.stores.shortlist.name)
            self._opened = None
            self._storage.remove_archive(opened.stores)

    @explain_other_names
    def get(
        self,
        ids: Sequence[str] | None = None,
        where: Where | None = None,
        where_document: Where | None = None,
        limit: int | None = None,
        offset: int = 0,
        vectors: bool = True,
    ) -> list[Record]:
        """Return records.

        Args:
            ids: strings; None for every record that meets the conditions.
            where: condition on metadata, in Chroma's language.
            where_document: condition on the document, in Chroma's language.
            limit: how many at most; None for all.
            offset: how many to skip first.
            vectors: whether to read the full vectors.

        Returns:
            The records in the order of `ids`, each once, without unknown ids. Without `ids`, in Chroma's order: that
            in which they were first stored; a rebuild may change it.

        Raises:
            InvalidIds: an id is not a non-empty string.
            InvalidInput: a condition isn't in Chroma's language, or `limit` or `offset` is negative.
            ArchiveError: a record's full vector is damaged.

        Warns:
            UserWarning: records have no full vector, and get what Chroma has of it; `repair(encode=...)` mends that.
        """
        wanted = None if ids is None else list(dict.fromkeys(check_ids(ids, unique=False)))
        where, where_document = check_where(where, where_document)
        offset = check_integer("offset", offset, 0)
        limit = None if limit is None else check_integer("limit", limit, 0)
        if wanted == []:
            return []

        def work(searcher: Searcher) -> list[Record]:
            stores = searcher.stores
            if wanted is None:
                records = stores.records(stores.shortlist.ids(where, where_document, limit, offset))
            else:
                met = None if where is where_document is None else set(stores.shortlist.ids(where, where_document))
                found = stores.records([id_ for id_ in wanted if met is None or id_ in met])
                records = dict(islice(found.items(), offset, None if limit is None else offset + limit))
            if not vectors:
                return [Record(id_, *stored, None) for id_, stored in records.items()]
            there, rows = stores.full_vectors(list(records))
            return [Record(id_, *records[id_], row) for id_, row in zip(there, unit_rows(rows), strict=True)]

        return self._current(work, [])

    def metadatas(self, where: Where | None = None) -> dict[str, dict[str, Any]]:
        """Return the metadata of records by id, without reading vectors.

        Args:
            where: condition on metadata, in Chroma's language; None for every record.

        Raises:
            InvalidInput: the condition isn't in Chroma's language.
        """
        where, _ = check_where(where, None)

        def work(searcher: Searcher) -> dict[str, dict[str, Any]]:
            shortlist = searcher.stores.shortlist
            return {id_: metadata for id_, (_, metadata) in shortlist.get(shortlist.ids(where, None)).items()}

        return self._current(work, {})

    def changed(
        self,
        ids: Sequence[str],
        documents: Sequence[str | None],
        metadatas: Sequence[Metadata | None] | None = None,
    ) -> list[int]:
        """Return which records an upsert would change, so that only those are encoded.

        Args:
            ids: n ids.
            documents: n texts, None for a record without.
            metadatas: n mappings, None for a record without; or None for none at all.

        Returns:
            Ascending positions in `ids` of records that are not stored, or stored with another document or other
            metadata.

        Raises:
            InvalidIds: an id is not a non-empty string, or the lengths differ.
        """
        ids = check_ids(ids, unique=False)
        wanted = [None] * len(ids) if metadatas is None else list(metadatas)
        if not len(ids) == len(documents) == len(wanted):
            raise InvalidIds(
                f"there are {len(ids)} ids, {len(documents)} documents and {len(wanted)} metadatas; "
                "give one of each per record."
            )

        def work(searcher: Searcher) -> list[int]:
            stores = searcher.stores
            hashes = stores.archive.document_hashes(ids)
            stored = stores.records([id_ for id_ in dict.fromkeys(ids) if id_ in hashes])
            return [
                position
                for position, (id_, document, metadata) in enumerate(zip(ids, documents, wanted, strict=True))
                if id_ not in hashes or writer.differs(stored.get(id_), document, metadata)
            ]

        return self._current(work, list(range(len(ids))))

    @explain_other_names
    def search(
        self,
        query_vectors: npt.ArrayLike,
        k: int = 10,
        plan: Plan | None = None,
        where: Where | None = None,
        where_document: Where | None = None,
        *,
        ids: Sequence[str] | None = None,
        score_threshold: float | None = None,
        explain: bool = False,
    ) -> list[list[Hit]]:
        """Return the k nearest records per query vector.

        Without a plan, a small index scores every record. With a condition that up to 1000 records meet, it scores all
        of these; where more meet it, the shortlist grows until it holds k. With `ids`, all of these are scored.

        Args:
            query_vectors: float array [n, full_dim], or [full_dim] for a single query.
            k: how many hits at most per query; 10 where it isn't given.
            plan: dimensions and shortlist sizes; None for the index's own.
            where: condition on metadata, in Chroma's language.
            where_document: condition on the document, in Chroma's language.
            ids: search only these records; unknown ids are ignored. None for all records.
            score_threshold: least cosine of a hit; None for any.
            explain: give each hit its rank, score and milliseconds at each stage.

        Returns:
            A list of hits per query, best first; for a single vector of shape [full_dim], that one list. (The type is
            annotated for [n, full_dim]: type checkers don't see shapes.) Equal scores are in the order of their ids. A
            query gets the same hits alone as among others.

        Raises:
            InvalidVectors: another shape or length, or NaN or infinity.
            InvalidPlan: k < 1, or the plan doesn't fit this index or k.
            InvalidIds: an id is not a non-empty string.
            InvalidInput: a condition isn't in Chroma's language, or `score_threshold` is not a number.
            ArchiveError: a candidate's full vector is damaged.

        Warns:
            UserWarning: records have no full vector, and are scored at the shortlist dimension; `repair(encode=...)`
                mends that.
        """
        queries, single = as_queries(query_vectors)
        k = check_k(k)
        check_is_plan(plan)
        where, where_document = check_where(where, where_document)
        floor = check_threshold(score_threshold)
        among = None if ids is None else list(dict.fromkeys(check_ids(ids, unique=False)))
        if not len(queries):
            return []
        if self._full_dim is not None:
            self._check_length(queries, "query_vectors", self._full_dim)
        nothing: list[list[Hit]] = [[] for _ in queries]

        def nearest(searcher: Searcher) -> list[list[Hit]]:
            config = searcher.stores.config
            self._check_length(queries, "query_vectors", config.full_dim)
            if among == []:
                return nothing
            wanted = self.plan if plan is None else plan
            if wanted is not None:
                check_plan(wanted, config.shortlist_dim, config.full_dim, k)
            return searcher.search(queries, Request(k, wanted, where, where_document, among, explain))

        answers = self._current(nearest, nothing)
        if floor is not None:
            answers = [[hit for hit in answer if hit.score >= floor] for answer in answers]
        return answers[0] if single else answers  # type: ignore[return-value]

    @explain_other_names
    def search_mmr(
        self,
        query_vectors: npt.ArrayLike,
        k: int = 10,
        fetch_k: int = 50,
        lambda_mult: float = 0.5,
        plan: Plan | None = None,
        where: Where | None = None,
        where_document: Where | None = None,
        *,
        ids: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """Return k records per query vector that are near it and unlike each other: maximal marginal relevance.

        Carbonell and Goldstein (1998): the next hit is the one with the highest
        lambda_mult * score - (1 - lambda_mult) * (highest cosine with an earlier hit), at full dimension.

        Args:
            query_vectors: float array [n, full_dim], or [full_dim] for a single query.
            k: how many hits at most per query; 10 where it isn't given.
            fetch_k: how many of the nearest to choose from.
            lambda_mult: 0 to 1; at 1 only nearness counts, at 0 only difference.
            plan: dimensions and shortlist sizes; None for the index's own.
            where: condition on metadata, in Chroma's language.
            where_document: condition on the document, in Chroma's language.
            ids: choose only from these records; None for all.

        Returns:
            A list of hits per query, in the order in which they were chosen; for a single vector, that one list.
            Scores are cosines with the query.

        Raises:
            InvalidInput: `lambda_mult` is not a number from 0 to 1.
            MrlRagError: as `search` does.
        """
        if not isinstance(lambda_mult, Real) or not 0 <= lambda_mult <= 1:
            raise InvalidInput(f"lambda_mult is {lambda_mult!r}; it must be a number from 0 to 1.")
        fetch_k = max(check_k(k), check_k(fetch_k))
        queries, single = as_queries(query_vectors)
        answers = []
        for hits in self.search(queries, fetch_k, plan, where, where_document, ids=ids):
            hit_of = {hit.id: hit for hit in hits}
            records = self.get(list(hit_of))
            scores = np.array([hit_of[record.id].score for record in records])
            vectors = np.array([record.vector for record in records])
            answers.append([hit_of[records[row].id] for row in mmr(scores, vectors, k, lambda_mult)])
        return answers[0] if single else answers

    def reindex(
        self,
        shortlist_dim: int | None = None,
        rotation: Literal["fit", "none"] | None = None,
        hnsw: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> None:
        """Rebuild the Chroma collection from the archive; nothing is encoded again.

        The old collection answers until the new one is complete and takes its name. An interruption leaves the old one
        as it was. On a server no other client may write meanwhile: its writes would be lost.

        Args:
            shortlist_dim: the new dimension of stage one. None keeps it; with rotation="fit", None chooses one, unless
                it was fixed before.
            rotation: "fit" fits a rotation on the vectors that are there now, "none" drops it; None keeps it.
            hnsw: Chroma's settings of the graph ("ef_search", "ef_construction", "max_neighbors"), over its defaults;
                None keeps them, or with rotation="fit" has "ef_search" chosen.
            progress: show a bar when standard error is a terminal.

        Raises:
            InvalidDimension: `shortlist_dim` is not an integer from 1 to full_dim.
            InvalidInput: `rotation` is neither, or Chroma doesn't take the settings.
            ArchiveError: a full vector is missing or damaged.
            TwoStageIndexError: Chroma's own file is damaged. Records that the damage hides would be lost.
        """
        check_choice("rotation", rotation, "fit", "none", None)
        with self._writing():
            opened = self._open()
            if opened is not None:
                self._check_file()
                self._rebuild(opened.stores, shortlist_dim, rotation, hnsw, progress)
            elif shortlist_dim is not None:
                self._shortlist_dim = check_dim(shortlist_dim, self._full_dim or _MAX_DIM)

    def verify(self) -> Report:
        """Compare Chroma and the archive, record by record, and try the search.

        Returns:
            The differences; `report.ok` when there are none.
        """
        found = self._current(lambda searcher: verify(searcher.stores), None)
        return Report() if found is None else replace(found, chroma_damaged=self._storage.sqlite_fault(_VERIFY_SECONDS))

    def repair(self, encode: Callable[[list[str]], npt.ArrayLike] | None = None) -> Report:
        """Mend what can be mended, and lose nothing that was acknowledged.

            index.repair(encode=encoder.encode_documents)

        Orphans are removed, and interrupted replacements finished or undone. The Chroma collection is rebuilt if its
        graph or the rotation is lost, or doesn't fit the archive, or if its search misses records. A graph that Chroma
        can't read is renamed, not removed. If Chroma's own file is damaged (`report.chroma_damaged`), nothing is
        changed: the damage may hide records.

        Args:
            encode: makes float [n, full_dim] of n documents, by the encoder that filled the index: for records whose
                full vector is missing, damaged or not their document's. None leaves these records as they are.

        Returns:
            What is left to do: `report.to_encode` records need another full vector. `report.ok` when nothing is.

        Raises:
            InvalidVectors: `encode` gives vectors of another length.
        """
        with self._writing(recover=False):
            opened = self._open()
            if opened is None:
                return Report()
            damaged = self._storage.sqlite_fault(_REPAIR_SECONDS)
            if damaged:
                return replace(verify(opened.stores), chroma_damaged=damaged)
            stores = self._readable(opened.stores)
            writer.recover(stores)
            found = verify(stores)
            stores.archive.delete(found.orphaned)
            for name in leftovers(self.client, self._name):
                self.client.delete_collection(name)
            if found.search_broken or found.misplaced or found.too_many_unreachable:
                lost = {*found.missing, *found.damaged}
                stores = self._rebuild(stores, rotation=found.new_rotation, lost=lost)
            if encode is not None:
                self._encode_again(stores, [*found.missing, *found.damaged, *found.stale], encode)
            return verify(stores)

    def _encode_again(self, stores: Stores, ids: list[str], encode: Callable[[list[str]], npt.ArrayLike]) -> None:
        for batch in stores.shortlist.batches(list(dict.fromkeys(ids))):
            records = {id_: record for id_, record in stores.shortlist.get(batch).items() if record[0] is not None}
            if records:
                documents, metadatas = zip(*records.values(), strict=True)
                rows = as_rows(encode(list(documents)))
                self._check_length(rows, "the vectors that `encode` gives", stores.config.full_dim)
                writer.upsert(stores, list(records), unit_rows(rows), documents, metadatas)

    def close(self) -> None:
        """Close the files. A client that was passed in stays open; an index in memory is lost."""
        with self._storage.lock:
            if self._opened is not None:
                self._opened.stores.archive.close()
            self._opened = None
            self._refusal = f"index {self._name!r} was closed; open it again."
            self._storage.close()
        release_dropped()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def after_fork(self) -> None:
        """Leave open files to the parent process; called in the child."""
        if self._opened is not None or not self._storage.reopens:
            self._refusal = (
                f"index {self._name!r} was open when this process was forked. Open it only after the fork, or start "
                "processes by multiprocessing's 'spawn' or 'forkserver'."
            )
        leave_to_parent(self._opened)
        self._opened = self._questions = None

    def _check_usable(self) -> None:
        if self._refusal:
            raise IndexClosed(self._refusal)

    def _open(self) -> Searcher | None:
        """Return the searcher of the stores; None until something is written."""
        self._check_usable()
        # Without the lock once it is open, so that a search doesn't wait for an upsert.
        opened = self._opened
        if opened is not None and opened.stores.generation == self._storage.generation:
            return opened
        with self._storage.lock, chroma_errors():
            client = self.client
            if self._opened is None or self._opened.stores.generation != self._storage.generation:
                self._opened = None
                shortlist = ShortlistCollection.open(client, self._name)
                if shortlist is None:
                    return None
                shortlist.config.check_encoder(self._name, self._model, self._fingerprint)
                shortlist.config.check(self._name, self._full_dim, self._shortlist_dim, self._precision)
                try:
                    archive = self._storage.open_archive(shortlist.config, create=False)
                except TwoStageIndexError:
                    if shortlist.exists():
                        raise
                    # Another process or client has dropped it meanwhile.
                    return self._open()
                self._opened = Searcher(self._storage.stores(shortlist, archive))
            return self._opened

    def _create(self, ids: list[str], rows: Float32Array) -> Searcher:
        full_dim = self._full_dim or rows.shape[1]
        self._check_length(rows, "vectors", full_dim)
        config = IndexConfig(
            full_dim,
            check_dim(self._shortlist_dim or _default_shortlist(full_dim), full_dim),
            self._fingerprint or "",
            uuid.uuid4().hex,
            self._rotation_wanted,
            precision="float32" if self._storage.shared else self._precision or "float16",
            dim_fixed=self._shortlist_dim is not None,
            target_recall=self._target_recall,
            model=self._model or "",
        )
        # The archive first: a collection without one would be damaged.
        archive = self._storage.open_archive(config, create=True)
        # On a server no index ranks every record, so it fits as soon as it may.
        enough = _MIN_VECTORS_PER_DIM * full_dim if self._storage.shared else max_exact(full_dim) + 1
        if config.rotation == "auto" and config.shortlist_dim < full_dim and len(rows) >= enough:
            _LOG.info("index %r fits its rotation on the first %d vectors", self._name, len(rows))
            fitted = fit_shortlist(
                lambda chosen: rows[chosen], len(rows), config.shortlist_dim, config.dim_fixed, config.target_recall
            )
            config = fitted.applied_to(config)
            archive.save_rotation(config.rotation, fitted.rotation)
            self._questions = None if fitted.questions is None else (fitted.questions, ids)
        shortlist = ShortlistCollection.create(self.client, self._name, config)
        self._opened = Searcher(self._storage.stores(shortlist, archive))
        return self._opened

    def _remember_encoder(self, stores: Stores) -> None:
        """Store which encoder fills the index, where that wasn't known when it was made."""
        config = stores.config
        known = replace(
            config,
            fingerprint=config.fingerprint or self._fingerprint or "",
            model=config.model or self._model or "",
        )
        if known != config:
            stores.shortlist.remember(known)

    def _rebuild(
        self,
        stores: Stores,
        shortlist_dim: int | None = None,
        rotation: Literal["fit", "none"] | None = None,
        hnsw: Mapping[str, Any] | None = None,
        progress: bool = False,
        lost: set[str] | None = None,
    ) -> Stores:
        """Fill Chroma anew, and choose how it is searched."""
        settings = stores.shortlist.hnsw if hnsw is None else dict(hnsw)
        if rotation == "fit" and hnsw is None:
            # Chosen for another dimension.
            settings.pop("ef_search", None)
        rebuilt = rebuild(self._storage, stores, shortlist_dim, rotation, settings, progress, lost)
        self._opened = Searcher(rebuilt.stores)
        if rebuilt.questions is not None:
            self._calibrate(rebuilt.questions, rebuilt.ids, may_change_graph=hnsw is None)
        return self._opened.stores

    def _calibrate(self, questions: Questions, ids: Sequence[str], may_change_graph: bool = True) -> None:
        """Choose the shortlist's size and the graph's `ef_search` by what searches really find."""
        assert self._opened is not None
        best, target = (0.0, 0.0, SIZES[0]), self._opened.stores.config.target_recall
        may_change_graph = may_change_graph and self._storage.reopens and not self._opened.scans
        for ef_search in EF_SEARCH if may_change_graph else EF_SEARCH[:1]:
            if ef_search != EF_SEARCH[0]:
                self._opened.stores.shortlist.set_ef_search(ef_search)
                self._reopen()
            searcher = self._opened
            assert searcher is not None
            searcher.stores.note_written()
            tried = [(*measure(searcher, questions, ids, size), size) for size in SIZES]
            good = [one for one in tried if one[0] >= target]
            best = min(good, key=lambda one: one[1]) if good else max([best, *tried])
            if good:
                break
        shortlist, (recall, seconds, size) = self._opened.stores.shortlist, best
        config = replace(shortlist.config, shortlist_size=size, recall=recall, measured_records=len(ids))
        shortlist.remember(config)
        _LOG.info(
            "index %r is searched at %d of %d dimensions, with %d candidates and %s: %.1f%% of the true top 10 of %d "
            "of its records, %.2f ms per query",
            *(self._name, config.shortlist_dim, config.full_dim, size, shortlist.hnsw),
            *(100 * recall, len(questions.rows), 1e3 * seconds),
        )

    def _reopen(self) -> Stores | None:
        """Have Chroma read the folder again."""
        with self._storage.lock:
            self._storage.reopen()
            opened = self._open()
            return None if opened is None else opened.stores

    def _readable(self, stores: Stores) -> Stores:
        """Return the stores; a graph that Chroma can't read is first renamed, so that Chroma begins without one."""
        try:
            with chroma_errors():
                stores.shortlist.ids(None, None, limit=1)
        except TwoStageIndexError:
            if self._storage.set_graph_aside(stores.shortlist.id):
                return self._reopen() or stores
        return stores

    def _adapt(self, stores: Stores, rows: Float32Array) -> None:
        """Fit and choose once there is enough to do so; say when what was chosen no longer fits."""
        config = stores.config
        if self._questions is not None:
            (questions, ids), self._questions = self._questions, None
            self._calibrate(questions, ids)
        if self._storage.shared:
            # On a server others may be writing: to fill Chroma anew behind their backs could lose what they write.
            return
        if config.rotation == "auto" and config.shortlist_dim < config.full_dim:
            if len(stores.archive) > max_exact(config.full_dim):
                _LOG.info("index %r fits its rotation on the vectors it has", self._name)
                self._check_file()
                self._rebuild(stores, rotation="fit")
        elif config.measured_records and self._is_to_be_measured(config, len(stores.archive)):
            self._measure_again(stores)
        elif config.fitted and len(rows) >= _DRIFT_SAMPLE:
            self._check_drift(stores, rows)

    def _is_to_be_measured(self, config: IndexConfig, count: int) -> bool:
        # Chroma's graph loses candidates that a scan finds.
        was_scanned = is_scanned(config.measured_records, config.shortlist_dim)
        outgrown = was_scanned and not is_scanned(count, config.shortlist_dim)
        return outgrown or count >= _GROWTH * config.measured_records

    def _measure_again(self, stores: Stores) -> None:
        ids = [id_ for page in stores.archive.ids() for id_ in page]
        questions = ask_own_records(lambda rows: stores.archive.read([ids[row] for row in rows])[1], len(ids))
        recall, _ = measure(Searcher(stores), questions, ids)
        config = replace(stores.config, recall=recall, measured_records=len(ids))
        stores.shortlist.remember(config)
        if recall < config.target_recall:
            warnings.warn(
                f"index {self._name!r} has grown to {len(ids)} records, and its searches find {recall:.1%} of the true "
                f'top 10, not {config.target_recall:.1%}. Call reindex(rotation="fit") to have another dimension '
                "chosen, at a quiet time.",
                stacklevel=4,
            )

    def _check_drift(self, stores: Stores, rows: Float32Array) -> None:
        config = stores.config
        assert stores.rotation is not None
        sample = rows[:: max(len(rows) // 2000, 1)]
        energy = explained_energy(sample, stores.rotation, config.shortlist_dim)
        if energy < _DRIFT * config.explained_energy and self._warned != config.rotation:
            self._warned = config.rotation  # once per rotation is enough
            warnings.warn(
                f"the shortlist of index {self._name!r} kept {config.explained_energy:.0%} of the vectors it was "
                f"fitted on and keeps {energy:.0%} of these {len(rows)}: they differ. "
                'Call reindex(rotation="fit") when they are all in.',
                stacklevel=4,
            )

    @contextmanager
    def _writing(self, recover: bool = True) -> Iterator[None]:
        """Hold the locks of the one writing thread and, in a folder, the one writing process.

        Args:
            recover: whether to finish what an interrupted writer may have left undone.
        """
        with self._storage.lock, chroma_errors(missing=True):
            _ = self.client  # raises in a forked process, and is a new one where the folder was removed
            fresh = self._storage.acquire()
            # Another index on this folder or server may have rebuilt the collection.
            self._forget_if_replaced()
            opened = self._with_whole_graph(self._open())
            if fresh and recover and opened is not None:
                writer.recover(opened.stores)
            try:
                yield
            finally:
                if self._opened is not None:
                    self._opened.stores.note_written()

    def _with_whole_graph(self, opened: Searcher | None) -> Searcher | None:
        """Have Chroma read its graph again if others have written since; it would save its own over theirs."""
        stores = None if opened is None else opened.stores
        if stores is None or stores.graph is None or stores.graph.version == stores.archive.version:
            return opened
        if not self._storage.reopens:
            raise IndexNotWritable(
                f"another process or client has written to index {self._name!r} since this client was opened, and "
                "Chroma would save its old graph over the new one. Close this client, and open the index on a new one, "
                "or by its path."
            )
        self._reopen()
        return self._opened

    def _forget_if_replaced(self) -> None:
        stores = None if self._opened is None else self._opened.stores
        if stores is not None and (stores.generation != self._storage.generation or not stores.shortlist.exists()):
            # It isn't closed, as another thread may be reading it.
            self._opened = None

    def _current(self, work: Callable[[Searcher], Answer], empty: Empty) -> Answer | Empty:
        """Return what `work` makes of the stores; do it again if they were dropped or rebuilt meanwhile."""
        from chromadb.errors import ChromaError

        with chroma_errors(missing=True):
            while self._open() is not None:
                outdated = False
                with self._storage.gate.shared():
                    opened = self._opened
                    if opened is None or opened.stores.generation != self._storage.generation:
                        continue
                    try:
                        return work(opened)
                    except GraphOutdated:
                        outdated = True
                    except (ChromaError, MrlRagError):
                        # A collection that is being dropped or replaced raises many errors; only one that is still
                        # there means it.
                        if opened.stores.shortlist.exists():
                            raise
                with self._storage.lock:
                    if outdated and self._opened is opened:
                        self._reopen()
                    self._forget_if_replaced()
            return empty

    def _check_not_hidden(self) -> None:
        """Raise an error where archives and a damaged file say that Chroma has lost sight of collections."""
        damaged = self._storage.has_archives() and self._storage.sqlite_fault(_VERIFY_SECONDS)
        if damaged:
            raise TwoStageIndexError(
                f"Chroma finds no collection {self._name!r}, and its file in {self._storage.folder} is damaged: "
                f"{damaged}. Restore the folder from a backup."
            )

    def _check_file(self) -> None:
        damaged = self._storage.sqlite_fault(_REPAIR_SECONDS)
        if damaged:
            raise TwoStageIndexError(
                f"collection {self._name!r} can't be rebuilt: Chroma's own file in {self._storage.folder} is "
                f"damaged, and records that it hides would be lost: {damaged}. Restore the folder from a backup."
            )

    def _check_length(self, rows: Float32Array, name: str, full_dim: int) -> None:
        if rows.shape[1] != full_dim:
            raise InvalidVectors(
                f"{name} have {rows.shape[1]} numbers; index {self._name!r} has {full_dim}. "
                "Encode with the model that filled it, at its full dimension."
            )


def _client_of(collection: Collection) -> ClientAPI:
    import chromadb

    settings = settings_of(collection)
    if settings is None:
        raise InvalidInput(f"collection {collection.name!r} doesn't tell its client; pass it as client=.")
    return chromadb.Client(settings, collection.tenant, collection.database)


def _is_in(collection: Collection, path: str | os.PathLike[str] | None) -> bool:
    """Say whether a collection is in a folder."""
    settings = settings_of(collection)
    if path is None or settings is None or not settings.is_persistent:
        return False
    return Path(settings.persist_directory).resolve() == Path(path).expanduser().resolve()


def _default_shortlist(full_dim: int) -> int:
    # Matryoshka models are seldom trained at fewer than 64 dimensions.
    return min(full_dim, max(64, full_dim // 4))
