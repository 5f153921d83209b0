"""`TwoStageIndex`: search at a low dimension, rerank at full dimension."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
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
    ArchiveError,
    DimensionMismatch,
    HeadMismatch,
    IndexMismatch,
    InvalidIds,
    InvalidInput,
    InvalidVectors,
    MrlRagError,
    TwoStageIndexError,
)
from mrl_rag.heads import MatryoshkaHead
from mrl_rag.heads.head import AnyHead
from mrl_rag.index import writer
from mrl_rag.index.archive import document_hash
from mrl_rag.index.calibration import (
    MIN_MEASURED,
    Fit,
    Questions,
    calibrate,
    fit_shortlist,
    measure_again,
    own_questions,
    warn_of_drift,
)
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
from mrl_rag.index.compact import compact_archive, compact_folder, folder_bytes
from mrl_rag.index.config import ArchivePrecision, IndexConfig, Wanted
from mrl_rag.index.export import (
    BATCH,
    Batch,
    Header,
    almost_unit,
    open_to_write,
    read_records,
    read_whole,
)
from mrl_rag.index.filters import check_where
from mrl_rag.index.info import IndexInfo, info_of
from mrl_rag.index.plan import Plan, check_is_plan, check_k, check_plan
from mrl_rag.index.rebuild import rebuild
from mrl_rag.index.reencode import ArchivedVectors, Documents, catch_up, goes_on, next_name
from mrl_rag.index.search import Hit, Request, Searcher, max_exact, mmr
from mrl_rag.index.server import AsyncConnections, RetryPolicy, check_retries
from mrl_rag.index.server_search import ServerSearcher, searcher_of
from mrl_rag.index.session import REPAIR_SECONDS, VERIFY_SECONDS, Session
from mrl_rag.index.shards import ShardFolder, place_of
from mrl_rag.index.shortlist import (
    ShortlistCollection,
    begun,
    empty_collection,
    index_names,
    is_ours,
    kept,
    leftovers,
    pages,
)
from mrl_rag.index.storage import Storage, Stores
from mrl_rag.index.tuning import Tuning, measure_applied, tune
from mrl_rag.index.verify import Report, verify
from mrl_rag.lifetime import release_dropped
from mrl_rag.progress import progress_bar
from mrl_rag.rotation import SAMPLE
from mrl_rag.tasks import check_texts
from mrl_rag.truncation import Float32Array, as_rows, check_dim, unit_rows

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

Rotation: TypeAlias = Literal["auto", "none"]
Answer = TypeVar("Answer")
Empty = TypeVar("Empty")

_LOG = logging.getLogger("mrl_rag")
# With fewer new vectors the share of their length that the shortlist keeps is too uncertain.
_DRIFT_SAMPLE = 256
# Least number of vectors per dimension to fit a rotation on; with fewer, the fit overfits.
_MIN_VECTORS_PER_DIM = 4
# The recall is measured again when there are so many times the records.
_GROWTH = 10
# No model's vectors are longer.
_MAX_DIM = 65536
# Vectors that a head is fitted on.
_MAX_FITTED = 100_000
# Name of the head in the archive, beside the rotation.
_HEAD = "head"


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One stored record.

    Attributes:
        id: as it was upserted.
        document: its text; None where it has none.
        metadata: as it was upserted; empty where there was none.
        vector: float32 [full_dim], unit length, in the archive's precision; None where it wasn't asked for, or is
            missing, as `verify` says.
    """

    id: str
    document: str | None
    metadata: dict[str, Any]
    vector: Float32Array | None


@dataclass(frozen=True)
class _Asked:
    """The checked arguments of a search.

    Attributes:
        queries: float32 [n, full_dim].
        single: whether they were given as one vector.
        floor: least score of a hit; None for any.
        request: the others.
    """

    queries: Float32Array
    single: bool
    floor: float | None
    request: Request

    @property
    def nothing(self) -> list[list[Hit]]:
        """The answers where nothing is found."""
        return [[] for _ in self.queries]

    def finished(self, answers: list[list[Hit]]) -> list[list[Hit]]:
        """Return the answers as `search` does."""
        if self.floor is not None:
            answers = [[hit for hit in answer if hit.score >= self.floor] for answer in answers]
        return answers[0] if self.single and answers else answers  # type: ignore[return-value]


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
            2 * k if that is more. It doubles the shortlist, up to three times, while a hit is in its last third. Stage
            one searches inverted lists in memory; on a server, and with a condition, Chroma's graph. On a server the
            shortlist is twice as long from the beginning, and isn't doubled.
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
            size and share of the inverted lists. A stored index keeps what it has.
        model: name of the encoder's model. It is stored with the fingerprint and shown in messages, and
            `TwoStageRetriever(None, path)` makes the encoder from it.
        retries: how often and how long requests to a server are sent; None for `RetryPolicy()`. Without a server
            nothing is sent.

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
        ServerUnavailable: the server didn't answer as often or as long as `retries` says; so do all methods.
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
        retries: RetryPolicy | None = None,
    ) -> None:
        release_dropped()
        if path is not None and client is not None:
            raise InvalidInput(f"path={os.fspath(path)!r} and client are both given; pass one of them.")
        self._wanted = Wanted(
            full_dim=None if full_dim is None else check_dim(full_dim, _MAX_DIM),
            shortlist_dim=None if shortlist_dim is None else check_dim(shortlist_dim, full_dim or _MAX_DIM),
            precision=check_choice("precision", precision, *get_args(ArchivePrecision), None),
            model=model,
            fingerprint=fingerprint,
            rotation=check_choice("rotation", rotation, *get_args(Rotation)),
            recall=check_recall(recall),
        )
        self.plan = check_is_plan(plan)
        name, storage = check_name(collection), Storage(path, client, check_retries(retries))
        if storage.shared and precision is not None:
            raise InvalidInput(f"precision is {precision!r}; with this client the archive is float32 in Chroma.")
        self._session = Session(storage, name, self._wanted)
        # With these the recall of a newly filled collection is measured.
        self._questions: tuple[Questions, list[str]] | None = None
        self._warned = ""
        try:
            if self._session.open() is None:
                self._session.check_not_hidden()
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
        if in_place and index._session.opened is not None:
            with index._session.writing():
                shortlist = index._session.opened.stores.shortlist
                shortlist.take_name_of(collection, f"{collection.name}-single-stage")
                index._session.name = shortlist.name
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
        place = repr(str(self.path)) if self.path else "in memory" if self._session.storage.temporary else "on a client"
        try:
            records = len(self)
        except MrlRagError:
            return f"TwoStageIndex({place}, {self.name!r}, closed or not readable)"
        dims = f", {self.shortlist_dim} of {self.full_dim}" if self.full_dim else ""
        fitted = ", fitted" if self.rotation == "fit" else ""
        return f"TwoStageIndex({place}, {self.name!r}, {records} records{dims}{fitted})"

    @property
    def full_dim(self) -> int | None:
        """Length of the vectors; None until it is known."""
        opened = self._session.opened
        return self._wanted.full_dim if opened is None else opened.stores.config.full_dim

    @property
    def shortlist_dim(self) -> int | None:
        """Dimension of stage one; None until `full_dim` is known."""
        opened = self._session.opened
        if opened is not None:
            return opened.stores.config.shortlist_dim
        return (
            None
            if self._wanted.full_dim is None
            else self._wanted.shortlist_dim or _default_shortlist(self._wanted.full_dim)
        )

    @property
    def rotation(self) -> str:
        """The shortlist's rotation: "fit" once fitted, "auto" while there are too few vectors for that, or "none"."""
        opened = self._session.open()
        stored = self._wanted.rotation if opened is None else opened.stores.config.rotation
        return stored if stored in ("auto", "none") else "fit"

    @property
    def recall(self) -> float | None:
        """Share of the true top 10 found with records left out of the fit; None until it is measured."""
        opened = self._session.open()
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
        opened = self._session.open()
        config = None if opened is None else opened.stores.config
        if config is None:
            return self._wanted.model, self._wanted.fingerprint
        return config.model or self._wanted.model, config.fingerprint or self._wanted.fingerprint

    @property
    def head(self) -> MatryoshkaHead | None:
        """The head that `apply_head` has put on the vectors, without its card; None without one.

        Raises:
            ArchiveError: it is missing or damaged, or the index is on a server, which doesn't keep it.
        """

        def work(searcher: Searcher) -> MatryoshkaHead | None:
            stores = searcher.stores
            if not stores.config.head:
                return None
            try:
                return MatryoshkaHead(stores.archive.load_axes(stores.config.head, stores.config.full_dim))
            except ArchiveError as error:
                raise ArchiveError(
                    f"the head of index {self.name!r} is missing or damaged, or was never kept, as on a server. "
                    "Searches don't need it: pass the encoder, MatryoshkaEncoder(..., head=FILE)."
                ) from error

        return self._session.current(work, None)

    @property
    def name(self) -> str:
        """The collection's name."""
        return self._session.name

    @property
    def path(self) -> Path | None:
        """The folder it is in, absolute; None in memory and on a server."""
        return None if self._session.storage.temporary else self._session.storage.folder

    @property
    def client(self) -> ClientAPI:
        """The chromadb client this index is on."""
        client = self._session.client  # raises if the index was closed
        return self._session.storage.given or client

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
            if self._session.open() is None and create:
                return empty_collection(self._session.client, self._session.name)
            try:
                return self._session.client.get_collection(self._session.name, embedding_function=None)
            except NotFoundError:
                raise InvalidInput(f"there is no collection {self.name!r}; store a record, or make it.") from None

    def bind(self, model: str, fingerprint: str) -> None:
        """Take vectors of one encoder alone from here on; the next `upsert` stores which. See `TwoStageRetriever`.

        Args:
            model: name of the encoder's model.
            fingerprint: of the encoder.

        Raises:
            IndexMismatch: the index was filled by another encoder, or opened with another `fingerprint`.
        """
        opened = self._session.open()
        if opened is not None:
            opened.stores.config.check_encoder(self._session.name, model, fingerprint)
        if self._wanted.fingerprint not in (None, "", fingerprint):
            raise IndexMismatch(
                f"index {self.name!r} was opened with fingerprint={self._wanted.fingerprint!r}; {model!r} has "
                f"{fingerprint}. Open it with this encoder's, or without one."
            )
        self._wanted.model, self._wanted.fingerprint = model, fingerprint

    def rebind(self, model: str | None, fingerprint: str | None) -> None:
        """Take vectors of another encoder from here on: another process may have changed the model by `reencode`.

        Args:
            model: name of the encoder's model; None for whichever fills the index now.
            fingerprint: of the encoder; None likewise. Another one than the stored is refused at the next call.
        """
        self._take(model, fingerprint, None)

    def __len__(self) -> int:
        """Return how many records there are."""
        return self._session.current(lambda searcher: searcher.stores.shortlist.count(), 0)

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
        self._store(ids, rows, texts, checked, unit_rows, progress)

    def _store(
        self,
        ids: list[str],
        rows: Float32Array,
        documents: Sequence[str | None],
        metadatas: Sequence[Metadata],
        scaled: Callable[[Float32Array], Float32Array],
        progress: bool = False,
        adapt: bool = True,
    ) -> None:
        """Store checked records; `scaled` makes unit rows of rows, float32 [n, full_dim]."""
        if not ids:
            return
        with self._session.writing():
            stores = (self._session.open() or self._create(ids, rows)).stores
            self._check_length(rows, "vectors", stores.config.full_dim)
            self._remember_encoder(stores)
            with progress_bar(len(ids), "index", "record", progress) as advance:
                for batch in stores.shortlist.batches(range(len(ids))):
                    part = slice(batch[0], batch[-1] + 1)
                    writer.upsert(stores, ids[part], scaled(rows[part]), documents[part], metadatas[part])
                    advance(len(batch))
            if adapt:
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
        with self._session.writing():
            opened = self._session.open()
            if opened is None:
                return
            if where is not None or where_document is not None:
                matching = opened.stores.shortlist.ids(where, where_document)
                wanted = matching if wanted is None else sorted(set(wanted) & set(matching))
            writer.delete(opened.stores, wanted or [])

    def clear(self) -> None:
        """Remove every record, and keep the collection and the settings stored with it; `drop` removes those, too."""
        if self._session.open() is not None:
            self.delete(self.ids())

    def drop(self) -> None:
        """Remove the index itself: records, full vectors and settings. The next upsert makes a new one.

        What `reencode` has kept or left unfinished is removed as well. Readers in other threads and processes get the
        records as they were, or none.

        Where metadata has lists, call `clear` first: Chroma leaves the lists of a dropped collection behind, and gives
        them to records that it stores next (chroma-core/chroma#7594).
        """
        from chromadb.errors import NotFoundError

        with self._session.writing():
            opened = self._session.open()
            if opened is None:
                with suppress(NotFoundError):
                    self._session.client.delete_collection(self._session.name)
            else:
                self._remove(opened.stores)
            self.drop_old(unfinished=True)

    def _remove(self, stores: Stores) -> None:
        # Chroma first: a crash in between leaves an archive that no collection uses.
        self._session.client.delete_collection(stores.shortlist.name)
        self._session.opened = None
        self._session.storage.remove_archive(stores.config, stores.archive)

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
            there, rows = stores.archive.read(list(records))
            vector_of = dict(zip(there, unit_rows(rows), strict=True))
            return [Record(id_, *stored, vector_of.get(id_)) for id_, stored in records.items()]

        return self._session.current(work, [])

    def ids(self) -> list[str]:
        """Return the ids of all records, in Chroma's order; see `get`."""
        return self._session.current(lambda searcher: searcher.stores.shortlist.ids(None, None), [])

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

        return self._session.current(work, {})

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

        return self._session.current(work, list(range(len(ids))))

    def vectors_of(self, ids: Sequence[str], documents: Sequence[str]) -> dict[str, Float32Array]:
        """Return the full vectors that needn't be computed again: those of records that have the same document.

        Args:
            ids: n ids.
            documents: n texts.

        Returns:
            float32 [full_dim] by id. Left out are records that aren't stored, have another document, or whose vector is
            missing or of a document that was changed through Chroma.

        Raises:
            InvalidIds: an id is not a non-empty string, or the lengths differ.
        """
        ids = check_ids(ids, unique=False)
        if len(ids) != len(documents):
            raise InvalidIds(f"there are {len(ids)} ids and {len(documents)} documents; give one of each per record.")
        wanted = dict(zip(ids, map(document_hash, documents), strict=True))

        def work(searcher: Searcher) -> dict[str, Float32Array]:
            archive = searcher.stores.archive
            hashes = archive.document_hashes(list(wanted))
            same = [id_ for id_, hash_ in wanted.items() if hashes.get(id_) == hash_]
            try:
                found, vectors = archive.read(same)
            except ArchiveError:
                found, vectors = archive.read(sorted(set(same) - archive.damaged(same)))
            return dict(zip(found, unit_rows(vectors), strict=True))

        return self._session.current(work, {})

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
        of these; where more meet it, the shortlist grows until it holds k. With `ids`, all of these are scored. On a
        server a shortlist of records that meet the condition is scored, or all of them if they are fewer.

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
        asked = self._asked(query_vectors, k, plan, where, where_document, ids, score_threshold, explain)

        def nearest(searcher: Searcher) -> list[list[Hit]]:
            request = self._request(asked, searcher.stores.config)
            return asked.nothing if request is None else searcher.search(asked.queries, request)

        return asked.finished(self._session.current(nearest, asked.nothing) if len(asked.queries) else [])

    @explain_other_names
    async def asearch(
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
        """Search without blocking the event loop; see `search`.

        On a server the requests are awaited, over connections of this loop's own, which are closed when the loop or
        the index is. A thread only opens the index, and carries out conditions that are too large for one request. In
        a folder and in memory, a thread searches.
        """
        settings: dict[str, Any] = {"ids": ids, "score_threshold": score_threshold, "explain": explain}
        if self._session.storage.connections is None:
            return await asyncio.to_thread(self.search, query_vectors, k, plan, where, where_document, **settings)
        asked = self._asked(query_vectors, k, plan, where, where_document, **settings)

        async def nearest(searcher: ServerSearcher, connections: AsyncConnections) -> list[list[Hit]]:
            request = self._request(asked, searcher.stores.config)
            if request is None:
                return asked.nothing
            if searcher.needs_thread(request):
                return await asyncio.to_thread(searcher.search, asked.queries, request)
            return await searcher.asearch(asked.queries, request, connections)

        return asked.finished(await self._session.acurrent(nearest, asked.nothing) if len(asked.queries) else [])

    def _asked(
        self,
        query_vectors: npt.ArrayLike,
        k: int,
        plan: Plan | None,
        where: Where | None,
        where_document: Where | None,
        ids: Sequence[str] | None,
        score_threshold: float | None,
        explain: bool,
    ) -> _Asked:
        """Check the arguments of a search."""
        queries, single = as_queries(query_vectors)
        k = check_k(k)
        check_is_plan(plan)
        where, where_document = check_where(where, where_document)
        floor = check_threshold(score_threshold)
        among = None if ids is None else list(dict.fromkeys(check_ids(ids, unique=False)))
        if len(queries) and self._wanted.full_dim is not None:
            self._check_length(queries, "query_vectors", self._wanted.full_dim)
        request = Request(k, self.plan if plan is None else plan, where, where_document, among, explain)
        return _Asked(queries, single, floor, request)

    def _request(self, asked: _Asked, config: IndexConfig) -> Request | None:
        """Return what to search for in an index with these settings; None for nothing."""
        self._check_length(asked.queries, "query_vectors", config.full_dim)
        request = asked.request
        if request.among == []:
            return None
        if request.plan is not None:
            check_plan(request.plan, config.shortlist_dim, config.full_dim, request.k)
        return request

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
            there, vectors = self._full_vectors(list(hit_of))
            scores = np.array([hit_of[id_].score for id_ in there])
            answers.append([hit_of[there[row]] for row in mmr(scores, vectors, k, lambda_mult)])
        return answers[0] if single else answers

    def _full_vectors(self, ids: list[str]) -> tuple[list[str], Float32Array]:
        """See `Stores.full_vectors`; no ids where the index was dropped meanwhile."""
        nothing: tuple[list[str], Float32Array] = [], np.empty((0, 0), dtype=np.float32)
        return self._session.current(lambda searcher: searcher.stores.full_vectors(ids), nothing)

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
                None keeps them. Searches under a condition go through it.
            progress: show a bar when standard error is a terminal.

        Raises:
            InvalidDimension: `shortlist_dim` is not an integer from 1 to full_dim.
            InvalidInput: `rotation` is neither, or Chroma doesn't take the settings.
            ArchiveError: a full vector is missing or damaged.
            TwoStageIndexError: Chroma's own file is damaged. Records that the damage hides would be lost.
        """
        check_choice("rotation", rotation, "fit", "none", None)
        with self._session.writing():
            opened = self._session.open()
            if opened is not None:
                self._session.check_file()
                self._rebuild(opened.stores, shortlist_dim, rotation, hnsw, progress)
            elif shortlist_dim is not None:
                self._wanted.shortlist_dim = check_dim(shortlist_dim, self._wanted.full_dim or _MAX_DIM)

    def tune(
        self,
        target_recall: float = 0.99,
        *,
        queries: npt.ArrayLike | None = None,
        dims: Sequence[int] | None = None,
        apply: bool = False,
        progress: bool = False,
    ) -> Tuning:
        """Find the cheapest dimension and plan with which searches reach a target recall.

            index.tune(0.99).plan                           # Plan(dims=(96, 384), sizes=(30,))
            index.tune(0.99, queries=vectors, apply=True)   # of questions that were really asked

        One half of the questions chooses; the recalls that are returned are measured on the other half. The exact top
        10 at full dimension is the truth. Nothing is encoded, and nothing is changed without `apply`.

        Args:
            target_recall: share of the exact top 10 to find, 0 < target_recall <= 1.
            queries: float array [n, full_dim] of real questions, n >= 10. None takes up to 500 records, at most a tenth
                of them, which are left out of the rotation's fit and of their own answers.
            dims: dimensions to try; None for multiples of 32 up to half of the full dimension, and the index's own.
            apply: reindex at the dimension that was chosen, with a new rotation unless the index has "none", and aim
                at this recall from now on.
            progress: show a bar when standard error is a terminal.

        Returns:
            What was found. With fewer than 100 records nothing is measured.

        Raises:
            InvalidInput: `target_recall` is out of range, there are fewer than 10 queries, or the index is empty.
            InvalidDimension: a dimension is not an integer from 1 to full_dim.
            InvalidVectors: `queries` are of another length, or hold NaN or infinity.
            TwoStageIndexError: with `apply`, as `reindex` does.
        """
        target = check_recall(target_recall)
        found = self._session.current(lambda searcher: tune(searcher.stores, target, queries, dims), None)
        if found is None:
            raise InvalidInput(f"nothing is stored in index {self.name!r}, so there is nothing to tune.")
        tuning, held_out, records = found
        if not apply or tuning.chosen is None or held_out is None:
            return tuning
        with self._session.writing():
            opened = self._session.open()
            if opened is None:
                raise InvalidInput(f"index {self.name!r} was dropped meanwhile; there is nothing to tune.")
            self._session.check_file()
            stores, plan = opened.stores, tuning.chosen.plan
            stores.shortlist.remember(replace(stores.config, target_recall=target))
            stores = self._rebuild(stores, plan.dims[0], None if self.rotation == "none" else "fit", progress=progress)
            # The index has chosen a size for its own records, and questions may need more.
            size = max(plan.sizes[0], stores.config.shortlist_size)
            stores.shortlist.remember(replace(stores.config, shortlist_size=size))
            assert self._session.opened is not None
            return measure_applied(tuning, self._session.opened, held_out, records)

    def verify(self) -> Report:
        """Compare Chroma and the archive, record by record, and try the search.

        Returns:
            The differences; `report.ok` when there are none.
        """
        found = self._session.current(lambda searcher: verify(searcher.stores), None)
        return (
            Report()
            if found is None
            else replace(found, chroma_damaged=self._session.storage.sqlite_fault(VERIFY_SECONDS))
        )

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
        with self._session.writing(recover=False):
            opened = self._session.open()
            if opened is None:
                return Report()
            damaged = self._session.storage.sqlite_fault(REPAIR_SECONDS)
            if damaged:
                return replace(verify(opened.stores), chroma_damaged=damaged)
            stores = self._session.readable(opened.stores)
            writer.recover(stores)
            found = verify(stores)
            stores.archive.delete(found.orphaned)
            for name in leftovers(self._session.client, self._session.name):
                self._session.client.delete_collection(name)
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

    def reencode(
        self,
        encode: Callable[[list[str]], npt.ArrayLike],
        model: str | None = None,
        fingerprint: str | None = None,
        *,
        shortlist_dim: int | None = None,
        text_of: Callable[[Record], str] | None = None,
        progress: bool = False,
        drop_old: bool = False,
    ) -> str | None:
        """Change the model without downtime: encode every document again, and switch in one step.

            index.reencode(encoder.encode_documents, "nomic-v1.5", encoder.fingerprint)

        A new collection, with its own full vectors, is filled beside the old one, which answers searches meanwhile, in
        this and other processes. Threads of this process may go on writing: what they change is encoded before the
        switch, and while the last of it is, their writes wait. Vectors that they pass after the switch must be the new
        model's. After an interruption, call again with the same encoder: what was encoded is not encoded again.

        After the switch this index takes vectors of the new model. Other indexes that had the old one open get an
        `IndexMismatch`, if models or fingerprints are known; without these they search the new collection.

        Ids, documents, metadata and the order of both stay; a record that is deleted and stored again meanwhile may
        keep its old place. The new collection chooses its dimension and rotation, as one that is filled for the first
        time. Precision, target recall and the graph's settings are the old one's.

        On a server other clients may search, and follow within a second after the switch. What they write during the
        switch can be missing in the new collection; it is in the old one.

        Args:
            encode: makes float [n, full_dim] of n texts, up to 512 at a time.
            model: name of the new model.
            fingerprint: of the new encoder. An index that has this fingerprint already is left as it is. Without one,
                an interrupted call is gone on with if a document that it has encoded gets the same vector again.
            shortlist_dim: as for a new `TwoStageIndex`.
            text_of: makes the text to encode of a record; None for its document.
            progress: show a bar when standard error is a terminal.
            drop_old: remove the old collection after the switch. Otherwise it is kept, under another name, until
                `drop_old` is called; `TwoStageIndex(path, kept_name)` opens it.

        Returns:
            The name under which an old collection is kept; None where none is.

        Raises:
            InvalidTexts: records have no document; nothing was done.
            InvalidVectors: `encode` gives vectors of another number or length, or NaN or infinity.
            InvalidDimension: `shortlist_dim` is not an integer from 1 to the new full dimension.
            IndexNotWritable: another process writes to the folder.
        """
        return self._reencode(
            Documents(encode, text_of),
            model,
            fingerprint,
            shortlist_dim,
            progress,
            drop_old,
            nullcontext(),
            lambda: None,
        )

    def fit_head(self, *, seed: int = 0, progress: bool = False) -> MatryoshkaHead:
        """Fit a head on the full vectors, without labels, for other collections of the model; see `MatryoshkaHead.fit`.

        For this collection alone, `reindex(rotation="fit")` serves better: it changes no full vector.

        Args:
            seed: as there.
            progress: show a bar when standard error is a terminal.

        Returns:
            The head, fitted on up to 100,000 of the vectors; its card has the index's name, model and fingerprint.

        Raises:
            HeadMismatch: the index has a head already.
            InvalidVectors: there are fewer than 100 vectors.
        """

        def sample(searcher: Searcher) -> Float32Array:
            if searcher.stores.config.head:
                raise HeadMismatch(f"index {self.name!r} has a head already; fit one on a collection without.")
            return writer.sampled_vectors(searcher.stores, _MAX_FITTED)[1]

        vectors = self._session.current(sample, np.empty((0, 0), dtype=np.float32))
        data = f"{len(vectors)} records of index {self.name!r}"
        return MatryoshkaHead.fit(
            vectors, seed=seed, data=data, model=self.model or "", fingerprint=self.fingerprint or "", progress=progress
        )

    def apply_head(
        self,
        head: AnyHead,
        *,
        shortlist_dim: int | None = None,
        progress: bool = False,
        drop_old: bool = False,
    ) -> str | None:
        """Put a head on the full vectors, without downtime; nothing is encoded.

            index.apply_head("head.safetensors")
            TwoStageRetriever(MatryoshkaEncoder("minilm", head="head.safetensors"), index)

        Each full vector becomes `vector @ matrix` at unit length, and the index's fingerprint that of its encoder with
        this head. The head is stored in a folder's index, so that `TwoStageRetriever(None, path)` finds it. The new
        collection is filled beside the old one as in `reencode`, with what is said there of readers, writers and
        interruptions.
        An index takes one head: to change it, fit and apply another on the old collection, which is kept.

        Args:
            head: a `MatryoshkaHead`, the file of one, or a float array [full_dim, full_dim].
            shortlist_dim: as for a new `TwoStageIndex`.
            progress: show a bar when standard error is a terminal.
            drop_old: remove the old collection after the switch; see `reencode`.

        Returns:
            The name under which the old collection is kept; None where none is.

        Raises:
            HeadMismatch: it was fitted on vectors of another encoder, or the index has a head already.
            DimensionMismatch: it takes vectors of another length.
            ModelFilesError: the file can't be read.
            InvalidInput: nothing is stored in the index.
            ArchiveError: a full vector is missing or damaged.
            IndexNotWritable: another process writes to the folder.
        """
        head = MatryoshkaHead.of(head)
        opened = self._session.open()
        if opened is None:
            raise InvalidInput(f"nothing is stored in index {self.name!r}; fill it by an encoder with this head.")
        if opened.stores.config.head:
            raise HeadMismatch(
                f"index {self.name!r} has a head already. Apply another one to the collection that was kept (`kept`), "
                "or encode the documents again (`reencode`)."
            )
        head.check_encoder(self.model, self.fingerprint)
        if head.full_dim != self.full_dim:
            raise DimensionMismatch(
                f"the head takes vectors of {head.full_dim} numbers, and index {self.name!r} has {self.full_dim}. Fit "
                "one on vectors of the model that filled it."
            )
        fingerprint = head.fingerprint_with(self.fingerprint) if self.fingerprint else None
        vectors = ArchivedVectors(self, head)
        return self._reencode(
            *(vectors, self.model, fingerprint, shortlist_dim, progress, drop_old), nullcontext(), lambda: None
        )

    def _reencode(
        self,
        documents: Documents,
        model: str | None,
        fingerprint: str | None,
        shortlist_dim: int | None,
        progress: bool,
        drop_old: bool,
        held: AbstractContextManager[object],
        switched: Callable[[], object],
    ) -> str | None:
        """See `reencode`.

        Args:
            documents: makes the vectors.
            model: as there.
            fingerprint: as there.
            shortlist_dim: as there.
            progress: as there.
            drop_old: as there.
            held: entered while the last documents are encoded and the collections switched.
            switched: called after the switch, before any search or write can reach the new collection.
        """
        if shortlist_dim is not None:
            check_dim(shortlist_dim, _MAX_DIM)
        with self._session.writing():
            # From here on other processes can't write.
            opened = self._session.open()
        if opened is None or (fingerprint and opened.stores.config.fingerprint == fingerprint):
            self._take(model, fingerprint, shortlist_dim if opened is None else None)
            switched()
        else:
            documents.check(self)
            with self._beside(opened.stores, documents, model, fingerprint, shortlist_dim) as target:
                catch_up(self, target, documents, progress)
                if shortlist_dim not in (None, target.shortlist_dim):
                    # The interrupted call was given another one.
                    target.reindex(shortlist_dim)
                with held, self._session.writing():
                    # What was changed meanwhile.
                    catch_up(self, target, documents)
                    self._switch(target)
                    self._take(model, fingerprint, None)
                    self._session.open()
                    switched()
        if drop_old:
            self.drop_old()
        return next(iter(self.kept()), None)

    def _take(self, model: str | None, fingerprint: str | None, shortlist_dim: int | None) -> None:
        """Take vectors of another encoder from here on."""
        self._wanted = replace(
            self._wanted, full_dim=None, shortlist_dim=shortlist_dim, model=model, fingerprint=fingerprint, head=None
        )
        self._session.take(self._wanted)

    def _beside(
        self,
        stores: Stores,
        documents: Documents,
        model: str | None,
        fingerprint: str | None,
        shortlist_dim: int | None,
    ) -> TwoStageIndex:
        """Return the index that is filled for another encoder; it is empty, or an interrupted call has begun it."""
        storage, config = self._session.storage, stores.config
        name = next_name(self.name, model, fingerprint)
        target = TwoStageIndex(
            storage.folder if storage.reopens else None,
            name,
            shortlist_dim=None,
            client=storage.given,
            model=model,
            fingerprint=fingerprint,
            rotation="none" if config.rotation == "none" else "auto",
            recall=config.target_recall,
            precision=None if config.precision == "float32" else config.precision,
            retries=storage.retries,
        )
        try:
            # Not before the target is open: it finishes a renaming that a crash has interrupted.
            for left in leftovers(self._session.client, name):
                self._session.client.delete_collection(left)
            if not fingerprint and not goes_on(target, documents):
                target.drop()
            target._wanted.shortlist_dim, target._wanted.head = shortlist_dim, documents.head
            target._wanted.key_orders, target._wanted.hnsw = stores.shortlist.key_orders, stores.shortlist.hnsw
        except BaseException:
            target.close()
            raise
        return target

    def _switch(self, target: TwoStageIndex) -> None:
        old, new = self._session.open(), target._session.open()
        # Wherever this ends, the index is opened as it is then: a write to the old collection would be lost.
        self._session.opened = None
        if old is not None and new is not None:
            new.stores.shortlist.replace_and_keep(old.stores.shortlist)
        elif old is not None:
            # It has no records, so there is nothing to keep.
            self._remove(old.stores)

    def kept(self) -> list[str]:
        """Return the names of the old collections that `reencode` has kept; each can be opened by its name."""
        with chroma_errors():
            return kept(self._session.client, self.name)

    def drop_old(self, unfinished: bool = False) -> list[str]:
        """Remove the old collections that `reencode` has kept, and their full vectors.

        Args:
            unfinished: also remove what an interrupted `reencode` has encoded.

        Returns:
            The names of the removed collections.
        """
        storage = self._session.storage
        with self._session.writing():
            client = self._session.client
            names = kept(client, self.name) + (begun(client, self.name) if unfinished else [])
            for name in names:
                shortlist = ShortlistCollection.open(client, name)
                for left in [*leftovers(client, name), *([] if shortlist is None else [name])]:
                    client.delete_collection(left)
                if shortlist is not None:
                    storage.remove_archive(shortlist.config)
        return names

    def compact(self) -> int:
        """Give back the disk space that deletions, `reindex`, `reencode` and crashes have left unused.

        Chroma's file is rewritten without what was deleted (`chroma vacuum`), and the file of full vectors, if a tenth
        of it is unused. Graphs and files of full vectors that no collection uses are removed. `reindex` before this
        also rebuilds Chroma's graph without what was deleted. `repair` doesn't call this.

        Nothing is lost when it is interrupted. Other processes can't write meanwhile. They may search: they wait while
        Chroma's file is rewritten, and their next search opens the new files, which frees the old ones. It needs as
        much free space as the folder takes.

        Returns:
            How many bytes smaller the files of mrl-rag and Chroma are; 0 in memory.

        Raises:
            InvalidInput: the index is on a server.
            IndexNotWritable: another process writes to the folder, or the disk is full.
            TwoStageIndexError: Chroma's own file is damaged.
        """
        storage = self._session.storage
        if storage.folder is None:
            raise InvalidInput(f"index {self.name!r} is on a server; run `chroma vacuum` where that keeps its files.")
        with self._session.writing():
            opened = self._session.open()
            if opened is None or storage.temporary:
                return 0
            self._session.check_file()
            before = folder_bytes(storage.folder)
            # Wherever this ends, the stores are opened as they are then: a write to the old archive would be lost.
            self._session.opened = None
            compact_archive(storage, opened.stores, storage.folder)
            # Threads of this process may search while Chroma's file is rewritten.
            self._session.open()
            compact_folder(storage.folder)
            return before - folder_bytes(storage.folder)

    def export(self, file: str | os.PathLike[str], progress: bool = False) -> int:
        """Write all records to files that any tool can read: the backup of an index.

            index.export("docs.parquet")                  # columns id, document, metadata (JSON), vector
            index.export("docs.jsonl")                    # an object per line, with "model" and "fingerprint" in each
            index.export("backup")                        # a folder of such Parquet files, 10,000 records in each
            index.export("s3://bucket/backup")            # likewise, in an object store

        Others may read and write meanwhile. The file has every record that is there from the beginning to the end, as
        it was at some moment in between, with the vector of its document; no record that is added after the beginning;
        and none that is deleted before it is read. The model and its fingerprint are in the file, in Parquet in the
        schema's metadata as JSON under "mrl_rag".

        The file appears, or replaces another, once it is complete and on the disk; of a folder, its manifest does, and
        the shards of an earlier one are removed then. Memory holds 500 records, or those of a shard, and all ids.

        Args:
            file: ends in `.parquet`, in `.jsonl`, or is a folder or URL; all but `.jsonl` need the extra `parquet`.
            progress: show a bar when standard error is a terminal.

        Returns:
            The number of records in the file.

        Raises:
            InvalidInput: the name ends otherwise, the file can't be written, or nothing was ever stored in the index.
            MissingExtra: it is Parquet, and pyarrow is not installed; or the URL needs another package.
            ArchiveError: a full vector is missing, damaged or of another text; `repair(encode=...)` mends that.
            TwoStageIndexError: the index was dropped meanwhile, or its model changed.
        """
        place, opened = place_of(file), self._session.open()
        if opened is None:
            raise InvalidInput(f"nothing is stored in index {self.name!r}, so there is nothing to export.")
        header, ids, count = Header.of(opened.stores), self.ids(), 0

        def work(searcher: Searcher) -> Batch | None:
            return read_whole(searcher.stores, part) if Header.of(searcher.stores) == header else None

        opening = place.writing(header) if isinstance(place, ShardFolder) else open_to_write(place, header)
        with opening as writer, progress_bar(len(ids), "export", "record", progress) as advance:
            for start in range(0, len(ids), BATCH):
                part = ids[start : start + BATCH]
                batch = self._session.current(work, None)
                if batch is None:
                    raise TwoStageIndexError(
                        f"index {self.name!r} was dropped meanwhile, or another model fills it. Export it again."
                    )
                writer.write(batch)
                count += len(batch.ids)
                advance(len(part))
        return count

    def import_records(self, file: str | os.PathLike[str], progress: bool = False) -> int:
        """Store the records that `export` or `encode_dataset` wrote; a record whose id exists is replaced, others stay.

            TwoStageIndex("./db", "docs").import_records("docs.parquet")
            TwoStageIndex("./db", "docs", shortlist_dim=96).import_records("s3://bucket/shards")

        Vectors come back bit for bit in a float16 archive. After an interruption, call again: what is stored already,
        unchanged, is left alone. An index that doesn't know its model takes the file's.

        A single file is checked as a whole before anything is stored. Of a folder, the manifest, each shard's size,
        types, model and ids are, and the rest of a shard before its first record is stored. Memory holds two shards,
        and 8 bytes per record. A new index fits its rotation once, on a sample from all the shards.

        Args:
            file: ends in `.parquet` or `.jsonl`, or is a folder or URL with a manifest.
            progress: show a bar when standard error is a terminal.

        Returns:
            The number of records in the file.

        Raises:
            InvalidInput: the file is missing or damaged, has other columns or types, or has an id twice. JSON lines
                that end early, after a whole line, can't be told from a shorter file.
            ShardError: a folder is not complete, or one of its files is damaged or not what the manifest says.
            InvalidIds: an id is in two shards.
            MissingExtra: it is Parquet, and pyarrow is not installed; or the URL needs another package.
            IndexMismatch: the index was filled by another model.
            DimensionMismatch: the index has vectors of another length.
            IndexNotWritable: another process writes to the folder.
        """
        place, count = place_of(file), 0
        if isinstance(place, ShardFolder):
            return self._load(place, progress)
        for header, batch in read_records(place):
            if not count:
                self._check_header(header)
            count += len(batch.ids)
        with progress_bar(count, "import", "record", progress) as advance:
            for header, batch in read_records(place):
                self._take_unknown(header)
                self._store(batch.ids, batch.vectors, batch.documents, batch.metadatas, almost_unit)
                advance(len(batch.ids))
        return count

    def _load(self, folder: ShardFolder, progress: bool) -> int:
        """Store the records of all shards, and choose how they are searched once, for all of them."""
        manifest = folder.complete()
        self._check_header(manifest.header)
        folder.check(manifest)
        if not manifest.records:
            return 0
        self._take_unknown(manifest.header)
        sample = folder.sample(manifest, SAMPLE)
        with self._session.writing():
            if self._session.open() is None and manifest.records >= self._enough(manifest.header.full_dim):
                self._create([], sample, fit=True)
        with progress_bar(manifest.records, "load", "record", progress) as advance:
            for batch in folder.read_ahead(manifest):
                self._store(batch.ids, batch.vectors, batch.documents, batch.metadatas, almost_unit, adapt=False)
                advance(len(batch.ids))
        with self._session.writing():
            opened = self._session.open()
            if opened is not None:
                self._adapt(opened.stores, sample)
        return manifest.records

    def _take_unknown(self, header: Header) -> None:
        """Take the file's encoder, where the index doesn't know which fills it."""
        self._wanted.model = self._wanted.model or header.model
        self._wanted.fingerprint = self._wanted.fingerprint or header.fingerprint

    def _check_header(self, header: Header) -> None:
        """Refuse the records of another encoder."""
        ours, theirs = (self.model, self.fingerprint), (header.model, header.fingerprint)
        if self.full_dim not in (None, header.full_dim):
            raise DimensionMismatch(
                f"the file has vectors of {header.full_dim} numbers, and index {self.name!r} of {self.full_dim}. "
                "Import it into a new collection."
            )
        both = [(our, their) for our, their in zip(reversed(ours), reversed(theirs), strict=True) if our and their]
        if both and both[0][0] != both[0][1]:
            raise IndexMismatch(
                f"the file is of the model {header.model!r} (fingerprint {header.fingerprint!r}), and index "
                f"{self.name!r} of {self.model!r} ({self.fingerprint!r}). Import it into a new collection."
            )

    def info(self) -> IndexInfo:
        """Return what the index is, and how many bytes its parts take; no record is read."""
        return self._session.current(
            lambda searcher: info_of(
                searcher.stores, self._session.storage.folder, self.kept(), begun(self._session.client, self.name)
            ),
            IndexInfo(self.name, self.model, self.fingerprint, 0, self.full_dim, self.shortlist_dim, self.rotation),
        )

    def close(self) -> None:
        """Close the files. A client that was passed in stays open; an index in memory is lost."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _enough(self, full_dim: int) -> int:
        """Return how many vectors a rotation is fitted on as soon as they are there."""
        # On a server no index ranks every record, so it fits as soon as it may.
        return _MIN_VECTORS_PER_DIM * full_dim if self._session.storage.shared else max_exact(full_dim) + 1

    def _create(self, ids: list[str], rows: Float32Array, fit: bool = False) -> Searcher:
        """Make the stores for vectors like `rows`, float32 [n, full_dim].

        Args:
            ids: of the rows.
            rows: the first ones, or with `fit` a sample of all that will be stored, without ids.
            fit: whether to fit the rotation however few rows there are.
        """
        storage, name = self._session.storage, self._session.name
        config, fitted = self._new_config(rows, fit)
        if storage.shared:
            room = empty_collection(self._session.client, name, config.shortlist_dim, self._wanted.hnsw)
            # All clients that make this index at once take the same archive, which only one of them creates.
            config = replace(config, archive=room.id.hex)
        # The archive first: a collection without one would be damaged.
        archive = storage.open_archive(config, create=True)
        if not archive.created:
            made = self._session.opened_once_made()
            if made is not None:
                return made
        if self._wanted.head is not None and not storage.shared:
            # Chroma rounds vectors that aren't of unit length, and the fingerprint is of the exact matrix.
            archive.save_rotation(_HEAD, self._wanted.head.matrix)
        if fitted is not None:
            archive.save_rotation(config.rotation, fitted.rotation)
            self._questions = None if fitted.questions is None or fit else (fitted.questions, ids)
        shortlist = ShortlistCollection.create(self._session.client, name, config, self._wanted.hnsw)
        self._session.opened = searcher_of(storage.stores(shortlist, archive))
        return self._session.opened

    def _new_config(self, rows: Float32Array, fit: bool) -> tuple[IndexConfig, Fit | None]:
        """Return the settings of a new index, and the rotation if the first vectors are enough, or with `fit`."""
        full_dim = self._wanted.full_dim or rows.shape[1]
        self._check_length(rows, "vectors", full_dim)
        shared = self._session.storage.shared
        config = IndexConfig(
            full_dim,
            check_dim(self._wanted.shortlist_dim or _default_shortlist(full_dim), full_dim),
            self._wanted.fingerprint or "",
            uuid.uuid4().hex,
            self._wanted.rotation,
            precision="float32" if shared else self._wanted.precision or "float16",
            dim_fixed=self._wanted.shortlist_dim is not None,
            target_recall=self._wanted.recall,
            model=self._wanted.model or "",
            key_orders=self._wanted.key_orders,
            head=_HEAD if self._wanted.head else "",
        )
        wanted = config.rotation == "auto" and config.shortlist_dim < full_dim
        if not wanted or not (fit or len(rows) >= self._enough(full_dim)):
            return config, None
        _LOG.info("index %r fits its rotation on the first %d vectors", self._session.name, len(rows))
        fitted = fit_shortlist(
            lambda chosen: rows[chosen], len(rows), config.shortlist_dim, config.dim_fixed, config.target_recall
        )
        return fitted.applied_to(config), fitted

    def _remember_encoder(self, stores: Stores) -> None:
        """Store which encoder fills the index, where that wasn't known when it was made."""
        config = stores.config
        known = replace(
            config,
            fingerprint=config.fingerprint or self._wanted.fingerprint or "",
            model=config.model or self._wanted.model or "",
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
        try:
            rebuilt = rebuild(self._session.storage, stores, shortlist_dim, rotation, settings, progress, lost)
        except BaseException:
            # If the old collection has lost its name already, a write to it would be lost.
            self._session.opened = None
            raise
        self._session.opened = searcher_of(rebuilt.stores)
        if rebuilt.questions is not None:
            self._calibrate(rebuilt.questions, rebuilt.ids)
        elif self._is_unmeasured(rebuilt.stores) and not lost:
            self._calibrate(*own_questions(rebuilt.stores))
        return self._session.opened.stores

    def _adapt(self, stores: Stores, rows: Float32Array) -> None:
        """Fit and choose once there is enough to do so; say when what was chosen no longer fits."""
        if self._questions is not None:
            questions, self._questions = self._questions, None
            self._calibrate(*questions)
        config = stores.config
        if self._session.storage.shared:
            # On a server others may be writing: to fill Chroma anew behind their backs could lose what they write.
            return
        if config.rotation == "auto" and config.shortlist_dim < config.full_dim:
            if len(stores.archive) > max_exact(config.full_dim):
                _LOG.info("index %r fits its rotation on the vectors it has", self._session.name)
                self._session.check_file()
                self._rebuild(stores, rotation="fit")
        elif self._is_unmeasured(stores):
            # The upsert that fitted the rotation was interrupted.
            self._calibrate(*own_questions(stores))
        elif config.measured_records and len(stores.archive) >= _GROWTH * config.measured_records:
            measure_again(searcher_of(stores))
        elif config.fitted and len(rows) >= _DRIFT_SAMPLE and self._warned != config.rotation:
            # Once per rotation is enough.
            self._warned = config.rotation if warn_of_drift(stores, rows) else self._warned

    def _is_unmeasured(self, stores: Stores) -> bool:
        config = stores.config
        enough = not self._session.storage.shared and len(stores.archive) >= MIN_MEASURED
        return enough and config.fitted and not config.measured_records

    def _calibrate(self, questions: Questions, ids: Sequence[str]) -> None:
        assert self._session.opened is not None
        self._session.opened.stores.note_written()
        calibrate(self._session.opened, questions, ids)

    def _check_length(self, rows: Float32Array, name: str, full_dim: int) -> None:
        if rows.shape[1] != full_dim:
            raise InvalidVectors(
                f"{name} have {rows.shape[1]} numbers; index {self.name!r} has {full_dim}. "
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
