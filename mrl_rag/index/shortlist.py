"""The Chroma collection of an index: vectors at the shortlist dimension, documents and metadata."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from mrl_rag.compat.chroma import settings_of
from mrl_rag.errors import PlainCollection
from mrl_rag.index.checks import KEPT, NEXT, Metadata, Where
from mrl_rag.index.chroma_errors import chroma_condition, chroma_errors, chroma_input
from mrl_rag.index.config import PREFIX, IndexConfig
from mrl_rag.index.filters import fits, halves
from mrl_rag.index.folder import CHROMA_THREADS
from mrl_rag.index.key_order import key_orders
from mrl_rag.lifetime import NATIVE_CODE
from mrl_rag.truncation import Float32Array

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.collection_configuration import CreateCollectionConfiguration, CreateHNSWConfiguration
    from chromadb.api.models.Collection import Collection
    from chromadb.api.types import EmbeddingFunction
    from chromadb.config import Settings

T = TypeVar("T")
P = ParamSpec("P")
Answer = TypeVar("Answer")
Stored = tuple[str | None, dict[str, Any]]

_REPLACES = f"{PREFIX}replaces"
# Records per write and results per query or get: docs.trychroma.com/cloud/quotas-limits. The client's own
# `get_max_batch_size` says more than the service takes (chroma-core/chroma#5453).
_CLOUD_HOST = "trychroma.com"
_CLOUD_LIMIT = 300
# Chroma's limits and offsets are 32-bit integers.
_MAX_LIMIT = 2**32 - 1
# Bytes of a value in a collection's metadata: the quota on the same page, and elsewhere what is quick to write again.
_CLOUD_VALUE, _VALUE = 256, 16_384
# A record is reached when it is among this many nearest to its own vector, or those are all at most this far from it.
_NEAREST, _MAX_DISTANCE = 50, 1e-5
# Records per call, when a collection is copied.
_PAGE = 2000
# Collections per call, when they are listed.
_LIST_PAGE = 100
_COSINE: CreateHNSWConfiguration = {"space": "cosine"}
_OLD = "-mrl_rag-old-"
NEW = "-mrl_rag-new-"


@dataclass(frozen=True)
class Limits:
    """What a client takes in one request, at most.

    Attributes:
        batch: records that are written, or asked for by id.
        results: records that a query or a condition returns.
        value: bytes of a value in a collection's metadata.
    """

    batch: int
    results: int
    value: int = _VALUE

    @classmethod
    def of(cls, client: ClientAPI) -> Limits:
        """Return the limits of a client."""
        batch = client.get_max_batch_size() or 1000
        if _is_cloud(client.get_settings()):
            return cls(min(batch, _CLOUD_LIMIT), _CLOUD_LIMIT, _CLOUD_VALUE)
        return cls(batch, _MAX_LIMIT)

    def batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """Split a sequence into parts that the client takes in one request."""
        for start in range(0, len(items), self.batch):
            yield items[start : start + self.batch]

    def page(self, wanted: int | None, there: int) -> int:
        """Return how many to ask for next: of `wanted` in all, None for as many as there are, after `there`."""
        return min(self.results, _MAX_LIMIT if wanted is None else wanted - there)

    def matching(
        self,
        collection: Collection,
        where: Where | None,
        where_document: Where | None = None,
        wanted: int | None = None,
        offset: int = 0,
    ) -> list[str]:
        """Return the ids of the records that match: up to `wanted` (None for all), after the first `offset`."""
        if not fits(where, where_document):
            every, first, second = halves(where, where_document)
            one, other = self.matching(collection, *first), self.matching(collection, *second)
            both = set(other)
            met = [id_ for id_ in one if id_ in both] if every else list(dict.fromkeys([*one, *other]))
            return met[offset : None if wanted is None else offset + wanted]
        found: list[str] = []
        while wanted is None or len(found) < wanted:
            size = self.page(wanted, len(found))
            with chroma_condition(where, where_document):
                answer = collection.get(
                    where=where,  # type: ignore[arg-type]
                    where_document=where_document,  # type: ignore[arg-type]
                    limit=size,
                    offset=min(offset + len(found), _MAX_LIMIT),
                    include=[],
                )
            found += answer["ids"]
            if len(answer["ids"]) < size:
                break
        return found


def _is_cloud(settings: Settings) -> bool:
    return str(settings.chroma_server_host or "").endswith(_CLOUD_HOST)


def in_chroma(starts_threads: bool) -> Callable[[Callable[P, Answer]], Callable[P, Answer]]:
    """Keep the process from ending during a call to Chroma, and note whether the call starts threads of Chroma's."""

    def wrap(method: Callable[P, Answer]) -> Callable[P, Answer]:
        @wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> Answer:
            CHROMA_THREADS.started |= starts_threads
            with NATIVE_CODE:
                return method(*args, **kwargs)

        return call

    return wrap


class ShortlistCollection:
    """A collection with an `IndexConfig` in its metadata. Its records hold nothing but what the user wrote."""

    def __init__(self, client: ClientAPI, collection: Collection, config: IndexConfig) -> None:
        self.config = config
        self._client = client
        self._collection = collection
        self._limits = Limits.of(client)
        self._key_orders = key_orders(config.key_orders)
        # Sets of metadata keys whose order isn't stored; there may be more than the collection's metadata takes.
        self._unordered: set[frozenset[str]] = set()

    @classmethod
    def open(cls, client: ClientAPI, name: str) -> ShortlistCollection | None:
        """Return the collection of that name; None where there is none, or an empty one that `create` can take over.

        Raises:
            InvalidInput: Chroma doesn't take the name.
            PlainCollection: the collection has records that mrl-rag didn't write.
            IndexMismatch: the collection has another format.
        """
        from chromadb.errors import NotFoundError

        with chroma_input(collection=name):
            try:
                collection = client.get_collection(name, embedding_function=None)
            except NotFoundError:
                found = _renamed(client, name)
                if found is None:
                    return None
                collection = found
        if not is_ours(collection):
            records = collection.count()
            if not records:
                return None
            raise PlainCollection(
                f"collection {name!r} is a plain Chroma collection of {records} records, without the archive of full "
                "vectors that a two-stage index has. TwoStageIndex.from_chroma(collection, ...) makes an index of it, "
                "with in_place=True under the same name; or use another collection name."
            )
        return cls(client, collection, IndexConfig.from_metadata(name, collection.metadata or {}))

    @classmethod
    def create(
        cls, client: ClientAPI, name: str, config: IndexConfig, hnsw: Mapping[str, Any] | None = None
    ) -> ShortlistCollection:
        """Make a collection that stores `config`, or take over an empty one of that name.

        An empty one may have any metric: all of Chroma's order unit vectors alike.

        Args:
            client: any chromadb client.
            name: the collection's name.
            config: the settings it stores.
            hnsw: settings of Chroma's graph, over its defaults.

        Raises:
            InvalidInput: Chroma doesn't take the name or the settings.
        """
        with chroma_input(collection=name, hnsw=dict(hnsw or {})):
            collection = _with_room(client, name, config.shortlist_dim)
            if collection is None:
                collection = client.create_collection(
                    name,
                    metadata=config.as_metadata(),
                    configuration={"hnsw": {**(hnsw or {}), **_COSINE}},  # type: ignore[arg-type]
                    embedding_function=_embedding_function(client, config),
                )
            else:
                collection.modify(metadata=config.as_metadata())
                _store_embedding_function(client, collection, config)
        return cls(client, collection, config)

    @property
    def name(self) -> str:
        """The collection's name."""
        return self._collection.name

    @property
    def id(self) -> str:
        """Chroma's id of the collection; it stays when the name changes."""
        return str(self._collection.id)

    def replace(self, old: ShortlistCollection) -> None:
        """Take the name of another collection, and delete it."""
        self.take_name_of(old._collection, f"{old.name}{_OLD}{self.config.archive}")
        self._client.delete_collection(old.name)

    def replace_and_keep(self, old: ShortlistCollection) -> None:
        """Take the name of another collection, and keep that one under a name that `kept` finds."""
        self.take_name_of(old._collection, f"{old.name}{KEPT}{old.config.archive[:8]}")

    def take_name_of(self, other: Collection, new_name: str) -> None:
        """Take the name of another collection, and give it a new one.

        After a crash the name belongs to the other collection, or to none. `open` then finds this one by its metadata.
        """
        name = other.name
        self._collection.modify(metadata={**self.config.as_metadata(), _REPLACES: name})
        with chroma_input(collection=new_name):
            other.modify(name=new_name)
        self._collection.modify(name=name)
        self._collection.modify(metadata=self.config.as_metadata())

    def remember(self, config: IndexConfig) -> None:
        """Store other settings; `key_orders` stay as they are."""
        config = replace(config, key_orders=self._key_orders.text)
        self._collection.modify(metadata=config.as_metadata())
        of_function = ("model", "fingerprint", "archive")
        if any(getattr(config, key) != getattr(self.config, key) for key in of_function):
            _store_embedding_function(self._client, self._collection, config)
        self.config = config

    @in_chroma(starts_threads=False)
    def exists(self) -> bool:
        """Say whether the collection is still there, with its archive; another process may have put new ones there."""
        from chromadb.errors import NotFoundError

        try:
            return self.note(self.settings())
        except NotFoundError:
            return False

    async def aexists(self, server: Any) -> bool:
        """Say the same by an async connection of chromadb's."""
        from chromadb.errors import NotFoundError

        try:
            return self.note(await self.asettings(server))
        except NotFoundError:
            return False

    def settings(self) -> Collection:
        """Return the collection that has the name now, with its metadata.

        Raises:
            NotFoundError: there is none.
        """
        return self._client.get_collection(self.name, embedding_function=None)

    async def asettings(self, server: Any) -> Any:
        """Return the same by an async connection of chromadb's, as its model of a collection."""
        place = {"tenant": self._collection.tenant, "database": self._collection.database}
        return await server.get_collection(name=self.name, **place)

    def note(self, found: Any, unordered: Iterable[frozenset[str]] = ()) -> bool:
        """Take what other clients and processes have stored with the collection.

        Args:
            found: what `settings` returned.
            unordered: sets of metadata keys that were looked for.

        Returns:
            Whether it is this collection, with its archive.
        """
        stored = found.metadata or {}
        if found.id != self._collection.id or stored.get(f"{PREFIX}archive") != self.config.archive:
            return False
        # What another client has chosen must not be overwritten by `remember`.
        self.config = IndexConfig.from_metadata(self.name, stored)
        self._key_orders = key_orders(self.config.key_orders)
        self._unordered.update(keys for keys in unordered if not self._key_orders.know(dict.fromkeys(keys)))
        return True

    @property
    def collection(self) -> Collection:
        """The collection itself."""
        return self._collection

    @property
    def limits(self) -> Limits:
        """What its client takes in one request."""
        return self._limits

    @property
    def key_orders(self) -> str:
        """The orders of metadata keys, as `KeyOrders.text`."""
        self.note(self.settings())
        return self._key_orders.text

    @property
    def hnsw(self) -> dict[str, Any]:
        """Settings of Chroma's graph that may differ from its defaults."""
        settings = self._collection.configuration_json.get("hnsw") or {}
        return {key: settings[key] for key in ("ef_construction", "ef_search", "max_neighbors") if key in settings}

    @in_chroma(starts_threads=False)
    def count(self) -> int:
        """Return how many records there are."""
        return self._collection.count()

    def batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """Split a sequence into parts that the client takes in one request."""
        yield from self._limits.batches(items)

    @in_chroma(starts_threads=True)
    def upsert(
        self,
        ids: Sequence[str],
        vectors: Float32Array,
        documents: Sequence[str | None],
        metadatas: Sequence[Metadata],
        old: Mapping[str, Stored],
    ) -> None:
        """Store one batch, replacing what was there.

        Args:
            ids: n ids.
            vectors: float32 [n, shortlist_dim].
            documents: n documents.
            metadatas: n mappings, empty where there is none.
            old: document and metadata of those of `ids` that are stored already.
        """
        self._remember_key_orders(metadatas)
        # Chroma's upsert merges: it keeps metadata keys and a document that the new record lacks.
        loses_document = [
            id_
            for id_, document in zip(ids, documents, strict=True)
            if document is None and old.get(id_, (None,))[0] is not None
        ]
        # The archive has these records' metadata, so that `writer.recover` can store them after a crash.
        self.delete(loses_document)
        merged = [
            dict.fromkeys(old[id_][1]) | dict(metadata) if id_ in old else dict(metadata)
            for id_, metadata in zip(ids, metadatas, strict=True)
        ]
        self._collection.upsert(
            ids=list(ids),
            embeddings=vectors,
            documents=list(documents) if any(d is not None for d in documents) else None,  # type: ignore[arg-type]
            metadatas=[m or None for m in merged] if any(merged) else None,  # type: ignore[misc]
        )

    @in_chroma(starts_threads=True)
    def delete(self, ids: Sequence[str]) -> None:
        """Remove one batch of records; unknown ids are ignored."""
        if ids:
            self._collection.delete(ids=_unique(ids))

    @in_chroma(starts_threads=False)
    def get(self, ids: Sequence[str]) -> dict[str, Stored]:
        """Return document and metadata by id, in the order of `ids`; unknown ids are left out."""
        records: dict[str, Stored] = {}
        for part in self.batches(ids):
            answer = self._collection.get(ids=_unique(part), include=["documents", "metadatas"])
            records |= stored_records(answer["ids"], answer["documents"] or [], answer["metadatas"] or [])
        if unordered := self.unordered(metadata for _, metadata in records.values()):
            self.note(self.settings(), unordered)
        return {id_: (records[id_][0], self.in_order(records[id_][1])) for id_ in ids if id_ in records}

    def unordered(self, metadatas: Iterable[Mapping[str, Any]]) -> list[frozenset[str]]:
        """Return the sets of keys whose order isn't known and may have been stored by another client or process."""
        unknown = {frozenset(metadata) for metadata in metadatas if not self._key_orders.know(metadata)}
        return list(unknown - self._unordered)

    def in_order(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return a metadata with its keys in the order in which they were given, as far as it is known."""
        return self._key_orders.sort(metadata)

    def _remember_key_orders(self, metadatas: Sequence[Metadata]) -> None:
        # Chroma stores no key with None.
        stored = [{key: value for key, value in m.items() if value is not None} for m in metadatas]
        if all(map(self._key_orders.know, stored)):
            return
        self.note(self.settings())
        orders = self._key_orders.adding(stored, self._limits.value)
        if orders.text != self._key_orders.text:
            self._key_orders = orders
            self.remember(self.config)

    @in_chroma(starts_threads=False)
    def shortlist_vectors(self, ids: Sequence[str]) -> dict[str, Float32Array]:
        """Return Chroma's vectors by id, float32 [shortlist_dim] each; unknown ids are left out."""
        found: dict[str, Float32Array] = {}
        for part in self.batches(ids):
            with chroma_errors():
                answer = self._collection.get(ids=_unique(part), include=["embeddings"])
            embeddings = answer["embeddings"] if answer["embeddings"] is not None else []
            found |= {id_: np.asarray(e, dtype=np.float32) for id_, e in zip(answer["ids"], embeddings, strict=True)}
        return found

    @in_chroma(starts_threads=False)
    def ids(
        self, where: Where | None, where_document: Where | None, limit: int | None = None, offset: int = 0
    ) -> list[str]:
        """Return the ids of the records that match, in Chroma's order: up to `limit`, after the first `offset`."""
        return self._limits.matching(self._collection, where, where_document, limit, offset)

    @in_chroma(starts_threads=True)
    def search(
        self, queries: Float32Array, size: int, where: Where | None, where_document: Where | None
    ) -> list[list[str]]:
        """Return up to `size` ids per query, nearest first.

        Args:
            queries: float32 [n, shortlist_dim].
            size: how many ids at most.
            where: condition on metadata.
            where_document: condition on documents.
        """
        found: list[list[str]] = []
        for positions in self.batches(range(len(queries))):
            with chroma_condition(where, where_document):
                answer = self._collection.query(
                    query_embeddings=queries[positions[0] : positions[-1] + 1],
                    n_results=min(size, self._limits.results),
                    where=where,  # type: ignore[arg-type]
                    where_document=where_document,  # type: ignore[arg-type]
                    include=[],
                )
            found += answer["ids"]
        return found

    @in_chroma(starts_threads=False)
    def matching(self, ids: Sequence[str], where: Where | None, where_document: Where | None) -> set[str]:
        """Return those of `ids` whose records meet the conditions."""
        # Not by one `get` with ids and a condition: for each id Chroma looks at all records that meet the condition.
        return set(ids).intersection(self.ids(where, where_document))

    @in_chroma(starts_threads=True)
    def unreached(self, ids: Sequence[str], vectors: Float32Array) -> list[str]:
        """Return those of n ids that a search by their own vectors, float32 [n, shortlist_dim], doesn't find.

        A record with many equal vectors counts as found: others came in its place.
        """
        lost: list[str] = []
        for part in self.batches(range(len(ids))):
            answer = self._collection.query(
                query_embeddings=vectors[part[0] : part[-1] + 1], n_results=_NEAREST, include=["distances"]
            )
            for row, found, distances in zip(part, answer["ids"], answer["distances"] or [], strict=True):
                if ids[row] not in found and (not distances or distances[-1] > _MAX_DISTANCE):
                    lost.append(ids[row])
        return lost


def _unique(ids: Sequence[str]) -> list[str]:
    """Return each id once: Chroma refuses repeated ones."""
    return list(dict.fromkeys(ids))


def stored_records(
    ids: Iterable[str], documents: Iterable[str | None], metadatas: Iterable[Mapping[str, Any] | None]
) -> dict[str, Stored]:
    """Return document and metadata by id, from the columns of Chroma's answer."""
    rows = zip(ids, documents, metadatas, strict=True)
    return {id_: (document, dict(metadata or {})) for id_, document, metadata in rows}


def empty_collection(
    client: ClientAPI, name: str, dim: int | None = None, hnsw: Mapping[str, Any] | None = None
) -> Collection:
    """Return the collection of that name; where there is none, make an empty one for `ShortlistCollection.create`.

    Clients that call this at once get the same one.

    Args:
        client: any chromadb client.
        name: the collection's name.
        dim: length of the vectors that it will take. An empty one that had vectors of another length is deleted first.
        hnsw: settings of Chroma's graph, over its defaults, for a new one.

    Raises:
        InvalidInput: Chroma doesn't take the name or the settings.
    """
    with chroma_input(collection=name, hnsw=dict(hnsw or {})):
        if dim is not None:
            _with_room(client, name, dim)
        configuration: CreateCollectionConfiguration = {"hnsw": {**(hnsw or {}), **_COSINE}}  # type: ignore[typeddict-item]
        return client.get_or_create_collection(name, configuration=configuration, embedding_function=None)


def _embedding_function(client: ClientAPI, config: IndexConfig) -> EmbeddingFunction[Any]:
    """Return the function that embeds texts when the collection is used through Chroma itself."""
    # It needs Chroma, which takes a second to import.
    from mrl_rag.index.embedding_function import TwoStageEmbeddingFunction

    settings = client.get_settings()
    return TwoStageEmbeddingFunction(
        config, os.path.abspath(settings.persist_directory) if settings.is_persistent else ""
    )


def _store_embedding_function(client: ClientAPI, collection: Collection, config: IndexConfig) -> None:
    """Store that function with a collection, unless it has the user's own."""
    function = _embedding_function(client, config)
    stored = collection.configuration_json.get("embedding_function") or {}
    if stored.get("name") in (None, function.name()):
        with warnings.catch_warnings():
            # Chroma warns of collections without an embedding function.
            warnings.simplefilter("ignore", DeprecationWarning)
            collection.modify(configuration={"embedding_function": function})


def _with_room(client: ClientAPI, name: str, dim: int) -> Collection | None:
    """Return the empty collection of that name; None where there is none.

    One that had vectors of another length is deleted: Chroma takes no others.
    """
    from chromadb.errors import NotFoundError

    try:
        collection = client.get_collection(name, embedding_function=None)
    except NotFoundError:
        return None
    if is_ours(collection) or collection.get_model().dimension in (None, dim):
        return collection
    client.delete_collection(name)
    return None


def _renamed(client: ClientAPI, name: str) -> Collection | None:
    """Finish a renaming that a crash has interrupted; None where there was none."""
    for collection in _collections(client):
        if (collection.metadata or {}).get(_REPLACES) == name:
            kept = {key: value for key, value in collection.metadata.items() if key != _REPLACES}
            collection.modify(name=name, metadata=kept)
            return client.get_collection(name, embedding_function=None)
    return None


def _collections(client: ClientAPI) -> Iterator[Collection]:
    for offset in itertools.count(0, _LIST_PAGE):
        part = client.list_collections(limit=_LIST_PAGE, offset=offset)
        yield from part
        if len(part) < _LIST_PAGE:
            return


def is_ours(collection: Collection) -> bool:
    """Say whether a collection belongs to a two-stage index."""
    return f"{PREFIX}format" in (collection.metadata or {})


def pages(collection: Collection) -> Iterator[tuple[list[str], Float32Array, list[str | None], list[dict[str, Any]]]]:
    """Yield ids, vectors (float32 [n, d]), documents and metadatas of a collection, up to 2000 records at a time."""
    settings = settings_of(collection)
    size = _CLOUD_LIMIT if settings is None or _is_cloud(settings) else _PAGE
    for start in range(0, collection.count(), size):
        answer = collection.get(limit=size, offset=start, include=["embeddings", "documents", "metadatas"])
        if answer["ids"]:
            documents: list[str | None] = list(answer["documents"] or [])
            # Chroma returns keys in another order each time.
            metadatas = [dict(sorted((metadata or {}).items())) for metadata in answer["metadatas"] or []]
            yield answer["ids"], np.asarray(answer["embeddings"], dtype=np.float32), documents, metadatas


def index_names(client: ClientAPI) -> list[str]:
    """Return the names of the two-stage indexes that a client has, in alphabetical order."""
    ours = [collection for collection in _collections(client) if is_ours(collection)]
    # After a crash between two renamings the new collection alone knows the name that it is about to take.
    names = {collection.name for collection in ours} | {(c.metadata or {}).get(_REPLACES) or c.name for c in ours}
    return sorted(name for name in names if not any(mark in name for mark in (_OLD, NEW, KEPT, NEXT)))


def kept(client: ClientAPI, name: str) -> list[str]:
    """Return the names of the old collections of an index that `reencode` has kept."""
    return sorted(c.name for c in _collections(client) if c.name.startswith(f"{name}{KEPT}"))


def begun(client: ClientAPI, name: str) -> list[str]:
    """Return the names of the collections that an interrupted `reencode` has begun to fill."""
    # Its own rebuild, when it fits its rotation, may have been interrupted and have left longer names.
    length = len(name) + len(NEXT) + 8
    return sorted({c.name[:length] for c in _collections(client) if c.name.startswith(f"{name}{NEXT}")})


def leftovers(client: ClientAPI, name: str) -> list[str]:
    """Return the names of collections that interrupted reindexings of `name` have left behind."""
    return [c.name for c in _collections(client) if c.name.startswith((f"{name}{_OLD}", f"{name}{NEW}"))]
