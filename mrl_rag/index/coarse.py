"""Stage one: a Chroma collection at the shortlist dimension, which also owns documents and metadata."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np

from mrl_rag.errors import DimensionMismatch, IndexMismatch, IndexNotWritable, InvalidInput, TwoStageIndexError
from mrl_rag.tasks import SURROGATE_ADVICE, is_unicode
from mrl_rag.truncation import Float32Array

if TYPE_CHECKING:
    from chromadb.api import ClientAPI, ServerAPI
    from chromadb.api.models.Collection import Collection

Metadata: TypeAlias = Mapping[str, Any]
Where: TypeAlias = Mapping[str, Any]
T = TypeVar("T")

_FORMAT = 2
_PREFIX = "mrl_rag:"
_REPLACES = f"{_PREFIX}replaces"
# docs.trychroma.com/cloud/quotas-limits: records a write, results a query; a "get" has the same limit. The client's own
# `get_max_batch_size` says more than the service takes (chroma-core/chroma#5453).
_CLOUD_HOST = "trychroma.com"
_CLOUD_LIMIT = 300
# Among how many of the nearest a record must find itself, and at what distance another is as near.
_NEAREST, _EQUAL = 50, 1e-5
# Records read at a time, to copy a collection.
_PAGE = 2000
# Collections listed at a time.
_LISTED = 100
_OLD = "-mrl_rag-old-"
NEW = "-mrl_rag-new-"
# What SQLite says within an error of Chroma's.
_NOT_WRITABLE = ("readonly database", "database or disk is full", "disk I/O error", "unable to open database file")


@dataclass(frozen=True)
class Facts:
    """What an index must remember about itself; it stands in the collection's own metadata.

    Attributes:
        full_dim: length of the vectors in the archive.
        shortlist_dim: length of the vectors in Chroma.
        fingerprint: of the encoder that filled it, "" where it wasn't told.
        archive: name of the archive.
        rotation: "auto" as long as none is fitted, "none" where none is wanted, or the fitted one's name.
        energy: share of the vectors' squared length that the shortlist kept when the rotation was fitted, 0 to 1.
        precision: of the archive; a second Chroma collection keeps float32.
    """

    full_dim: int
    shortlist_dim: int
    fingerprint: str
    archive: str
    rotation: str = "auto"
    energy: float = 0.0
    precision: Literal["float16", "int8", "binary", "float32"] = "float16"


@dataclass(frozen=True)
class Limits:
    """What a client takes in one request.

    Attributes:
        batch: how many records at most are written, or asked for by id.
        results: how many at most a query or a condition may return.
    """

    batch: int
    results: int

    @classmethod
    def of(cls, client: ClientAPI | ServerAPI) -> Limits:
        """Return the limits of a client."""
        batch = client.get_max_batch_size() or 1000
        if str(client.get_settings().chroma_server_host or "").endswith(_CLOUD_HOST):
            return cls(min(batch, _CLOUD_LIMIT), _CLOUD_LIMIT)
        return cls(batch, sys.maxsize)

    def batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """Cut a sequence into parts that the client takes in one request."""
        for start in range(0, len(items), self.batch):
            yield items[start : start + self.batch]

    def matching(
        self,
        collection: Collection,
        where: Where | None,
        where_document: Where | None = None,
        wanted: int | None = None,
    ) -> list[str]:
        """Return the ids of up to `wanted` records that match, in Chroma's order; None for all."""
        found: list[str] = []
        while wanted is None or len(found) < wanted:
            size = self.results if wanted is None else min(self.results, wanted - len(found))
            answer = collection.get(
                where=where,  # type: ignore[arg-type]
                where_document=where_document,  # type: ignore[arg-type]
                limit=None if size == sys.maxsize else size,
                offset=len(found) or None,
                include=[],
            )
            found += answer["ids"]
            if len(answer["ids"]) < size:
                break
        return found


class Coarse:
    """A collection that carries `Facts`. Records hold what their user wrote and nothing of ours."""

    def __init__(self, client: ClientAPI, collection: Collection, facts: Facts) -> None:
        self.facts = facts
        self._collection = collection
        self._limits = Limits.of(client)

    @classmethod
    def open(cls, client: ClientAPI, name: str) -> Coarse | None:
        """Return the collection of that name, None where there is none.

        Raises:
            InvalidInput: Chroma doesn't take the name.
            IndexMismatch: the collection wasn't made by mrl-rag, or by a newer format, or with another metric.
        """
        from chromadb.errors import NotFoundError

        with chroma_input(f"collection={name!r}"):
            try:
                collection = client.get_collection(name, embedding_function=None)
            except NotFoundError:
                found = _renamed(client, name)
                if found is None:
                    return None
                collection = found
        stored = collection.metadata or {}
        # Not `collection.configuration`: it warns of a missing embedding function.
        settings = collection.configuration_json.get("hnsw") or collection.configuration_json.get("spann") or {}
        space = settings.get("space", "cosine")
        if f"{_PREFIX}format" not in stored:
            raise IndexMismatch(
                f"collection {name!r} is a plain Chroma collection (metric {space!r}), without the archive of full "
                "vectors that a two-stage index needs. TwoStageIndex.from_chroma(collection, ...) makes one of it; "
                "or use another collection name."
            )
        if stored[f"{_PREFIX}format"] != _FORMAT:
            raise IndexMismatch(
                f"collection {name!r} has format {stored[f'{_PREFIX}format']}; this version of mrl-rag reads "
                f"format {_FORMAT}. Use the version that filled it."
            )
        if space != "cosine":
            raise IndexMismatch(
                f"collection {name!r} has metric {space!r}; a two-stage index has 'cosine'. Fill a new collection."
            )
        return cls(client, collection, _facts(name, stored))

    @classmethod
    def create(cls, client: ClientAPI, name: str, facts: Facts, hnsw: Mapping[str, Any] | None = None) -> Coarse:
        """Make a collection that remembers `facts`.

        Args:
            client: any chromadb client.
            name: the collection's name.
            facts: what it remembers.
            hnsw: Chroma's settings of the graph, over its defaults.

        Raises:
            InvalidInput: Chroma doesn't take the name or the settings.
        """
        with chroma_input(f"collection={name!r}, hnsw={dict(hnsw or {})!r}"):
            collection = client.create_collection(
                name,
                metadata=_as_metadata(facts),
                configuration={"hnsw": {**(hnsw or {}), "space": "cosine"}},  # type: ignore[arg-type]
                embedding_function=None,
            )
        return cls(client, collection, facts)

    @property
    def name(self) -> str:
        """The collection's name."""
        return self._collection.name

    @property
    def id(self) -> str:
        """What Chroma calls the collection, whatever its name."""
        return str(self._collection.id)

    def replace(self, client: ClientAPI, old: Coarse) -> None:
        """Take the name of another collection, and delete that one."""
        self.take_name_of(old._collection, f"{old.name}{_OLD}{self.facts.archive}")
        client.delete_collection(old.name)

    def take_name_of(self, other: Collection, new_name: str) -> None:
        """Take the name of another collection, which gets a new one.

        A crash leaves either the other under the name, or none: `open` then finds this one by what it says it replaces.
        """
        name = other.name
        self._collection.modify(metadata={**_as_metadata(self.facts), _REPLACES: name})
        with chroma_input(f"collection={new_name!r}"):
            other.modify(name=new_name)
        self._collection.modify(name=name)
        self._collection.modify(metadata=_as_metadata(self.facts))

    def check(
        self, full_dim: int | None, shortlist_dim: int | None, fingerprint: str | None, precision: str | None
    ) -> None:
        """Refuse to be used with another model, dimension or precision; None stands for whatever is stored.

        Raises:
            DimensionMismatch: a dimension differs.
            IndexMismatch: the fingerprint or the precision differs.
        """
        facts, name = self.facts, self._collection.name
        if full_dim is not None and full_dim != facts.full_dim:
            raise DimensionMismatch(
                f"collection {name!r} holds vectors of {facts.full_dim} numbers; {full_dim} were asked for. "
                "Open it with the model that filled it, or fill a new collection."
            )
        if shortlist_dim is not None and shortlist_dim != facts.shortlist_dim:
            raise DimensionMismatch(
                f"collection {name!r} is searched at {facts.shortlist_dim} dimensions; {shortlist_dim} were asked "
                "for. Leave shortlist_dim out to open it as it is, or fill a new collection."
            )
        if fingerprint and facts.fingerprint and fingerprint != facts.fingerprint:
            raise IndexMismatch(
                f"collection {name!r} was filled by an encoder with fingerprint {facts.fingerprint}; this one has "
                f"{fingerprint}: another model, prompt or maximum length. Open it with the encoder that filled it, "
                "or fill a new collection."
            )

        if precision is not None and precision != facts.precision:
            raise IndexMismatch(
                f"the archive of collection {name!r} is {facts.precision}; {precision} was asked for. Leave precision "
                "out to open it as it is, or fill a new collection."
            )

    def exists(self) -> bool:
        """Say whether the collection is still there: another process may have filled a new one in its place."""
        from chromadb.errors import NotFoundError

        try:
            self._collection.count()
        except NotFoundError:
            return False
        return True

    def count(self) -> int:
        """Return how many records there are."""
        return self._collection.count()

    def batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """Cut a sequence into parts that the client takes in one call."""
        yield from self._limits.batches(items)

    def upsert(
        self,
        ids: Sequence[str],
        vectors: Float32Array,
        documents: Sequence[str | None],
        metadatas: Sequence[Metadata],
        replaced: Sequence[str],
    ) -> None:
        """Store one batch, replacing what was there.

        Args:
            ids: n ids.
            vectors: float32 [n, shortlist_dim].
            documents: n documents.
            metadatas: n mappings, empty where there is none.
            replaced: those of `ids` that may be there already.
        """
        # Chroma's own upsert merges: it keeps a metadata key or a document that the new record doesn't have.
        old = {record[0]: record[1:] for record in self.get(replaced)}
        row = {id_: i for i, id_ in enumerate(ids)}
        self.delete([i for i, (document, _) in old.items() if document is not None and documents[row[i]] is None])
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

    def delete(self, ids: Sequence[str]) -> None:
        """Remove one batch of records; unknown ids are passed over."""
        if ids:
            self._collection.delete(ids=list(ids))

    def get(self, ids: Sequence[str]) -> list[tuple[str, str | None, dict[str, Any]]]:
        """Return (id, document, metadata) of those ids that are there, in the order asked."""
        records: dict[str, tuple[str, str | None, dict[str, Any]]] = {}
        for part in self.batches(ids):
            answer = self._collection.get(ids=list(part), include=["documents", "metadatas"])
            documents, metadatas = answer["documents"] or [], answer["metadatas"] or []
            for id_, document, metadata in zip(answer["ids"], documents, metadatas, strict=True):
                records[id_] = (id_, document, dict(metadata or {}))
        return [records[id_] for id_ in ids if id_ in records]

    def shortlist_vectors(self, ids: Sequence[str]) -> dict[str, Float32Array]:
        """Return what Chroma searches, float32 [shortlist_dim] an id; ids that are not there are left out."""
        found: dict[str, Float32Array] = {}
        for part in self.batches(ids):
            with chroma_errors():
                answer = self._collection.get(ids=list(part), include=["embeddings"])
            embeddings = answer["embeddings"] if answer["embeddings"] is not None else []
            found |= {id_: np.asarray(e, dtype=np.float32) for id_, e in zip(answer["ids"], embeddings, strict=True)}
        return found

    def ids(self, where: Where | None, where_document: Where | None, limit: int | None = None) -> list[str]:
        """Return the ids of the records that match, in Chroma's order."""
        return self._limits.matching(self._collection, where, where_document, limit)

    def search(
        self, queries: Float32Array, size: int, where: Where | None, where_document: Where | None
    ) -> list[list[str]]:
        """Return up to `size` ids a query, nearest first.

        Args:
            queries: float32 [n, shortlist_dim].
            size: how many ids at most.
            where: condition on metadata.
            where_document: condition on the document.
        """
        found: list[list[str]] = []
        for positions in self.batches(range(len(queries))):
            answer = self._collection.query(
                query_embeddings=queries[positions[0] : positions[-1] + 1],
                n_results=min(size, self._limits.results),
                where=where,  # type: ignore[arg-type]
                where_document=where_document,  # type: ignore[arg-type]
                include=[],
            )
            found += answer["ids"]
        return found

    def unreached(self, ids: Sequence[str], vectors: Float32Array) -> list[str]:
        """Return the ids that a search doesn't find by their own vectors, float32 [n, shortlist_dim].

        One with many equals is not among them: another came in its place.
        """
        lost: list[str] = []
        for part in self.batches(range(len(ids))):
            answer = self._collection.query(
                query_embeddings=vectors[part[0] : part[-1] + 1], n_results=_NEAREST, include=["distances"]
            )
            for row, found, distances in zip(part, answer["ids"], answer["distances"] or [], strict=True):
                if ids[row] not in found and (not distances or distances[-1] > _EQUAL):
                    lost.append(ids[row])
        return lost


def _facts(name: str, stored: Mapping[str, Any]) -> Facts:
    known = {key: stored[f"{_PREFIX}{key}"] for key in Facts.__dataclass_fields__ if f"{_PREFIX}{key}" in stored}
    dims = known.get("full_dim"), known.get("shortlist_dim")
    texts = known.get("fingerprint"), known.get("archive"), known.get("rotation", "auto")
    if not all(isinstance(dim, int) for dim in dims) or not all(isinstance(text, str) for text in texts):
        raise IndexMismatch(
            f"collection {name!r} is damaged: its metadata {dict(stored)!r} says no more how long its vectors are, or "
            "where. Bring it back from a backup, or fill a new collection."
        )
    return Facts(**known)


def _as_metadata(facts: Facts) -> dict[str, Any]:
    return {f"{_PREFIX}format": _FORMAT} | {f"{_PREFIX}{key}": value for key, value in asdict(facts).items()}


def _renamed(client: ClientAPI, name: str) -> Collection | None:
    """Finish the renaming that a crash cut short, if there was one."""
    for collection in _collections(client):
        if (collection.metadata or {}).get(_REPLACES) == name:
            kept = {key: value for key, value in collection.metadata.items() if key != _REPLACES}
            collection.modify(name=name, metadata=kept)
            return client.get_collection(name, embedding_function=None)
    return None


def _collections(client: ClientAPI) -> Iterator[Collection]:
    for offset in itertools.count(0, _LISTED):
        part = client.list_collections(limit=_LISTED, offset=offset)
        yield from part
        if len(part) < _LISTED:
            return


def is_ours(collection: Collection) -> bool:
    """Say whether a collection is one half of a two-stage index."""
    return f"{_PREFIX}format" in (collection.metadata or {})


def pages(collection: Collection) -> Iterator[tuple[list[str], Float32Array, list[str | None], list[dict[str, Any]]]]:
    """Yield ids, vectors (float32 [n, d]), documents and metadatas of a collection, some 2000 records at a time."""
    size = min(_PAGE, Limits.of(collection._client).results)
    for start in range(0, collection.count(), size):
        answer = collection.get(limit=size, offset=start, include=["embeddings", "documents", "metadatas"])
        if answer["ids"]:
            documents: list[str | None] = list(answer["documents"] or [])
            metadatas: list[dict[str, Any]] = [dict(metadata or {}) for metadata in answer["metadatas"] or []]
            yield answer["ids"], np.asarray(answer["embeddings"], dtype=np.float32), documents, metadatas


def leftovers(client: ClientAPI, name: str) -> list[str]:
    """Return the collections that a reindexing of `name` left behind when it was cut short."""
    return [c.name for c in _collections(client) if c.name.startswith((f"{name}{_OLD}", f"{name}{NEW}"))]


def is_panic(error: BaseException) -> bool:
    """Say whether Chroma's Rust core gave up, which is no `Exception`."""
    return type(error).__name__ == "PanicException"


@contextmanager
def chroma_errors() -> Iterator[None]:
    """Give what fails within Chroma a name from this package's errors."""
    from chromadb.errors import InternalError, InvalidArgumentError

    try:
        yield
    except BaseException as error:
        if not isinstance(error, InternalError | InvalidArgumentError) and not is_panic(error):
            raise
        said = str(error)
        if any(words in said for words in _NOT_WRITABLE):
            raise IndexNotWritable(
                f"Chroma can't write: {said}. Check the folder's permissions and the free disk space, then write again."
            ) from error
        raise TwoStageIndexError(
            f"Chroma failed: {said}. If the disk was full, make room and write again; if files were damaged, call "
            "repair(), and where that fails bring the folder back from a backup."
        ) from error


@contextmanager
def chroma_input(what: str) -> Iterator[None]:
    """Give what Chroma refuses a name from this package's errors."""
    from chromadb.errors import ChromaError, InvalidArgumentError

    try:
        yield
    except (ValueError, TypeError, ChromaError) as error:
        # A server that can't read the request answers with the plain class; the others have troubles of their own.
        if isinstance(error, ChromaError) and type(error) not in (ChromaError, InvalidArgumentError):
            raise
        raise InvalidInput(f"Chroma doesn't take {what}: {error}") from error


def check_where(where: Where | None, where_document: Where | None) -> tuple[Where | None, Where | None]:
    """Return both conditions, None for an empty one.

    Raises:
        InvalidInput: a condition isn't in Chroma's language.
    """
    from chromadb.api.types import validate_where, validate_where_document

    if where:
        with chroma_input(f"where={where!r}"):
            validate_where(where)  # type: ignore[arg-type]
    if where_document:
        with chroma_input(f"where_document={where_document!r}"):
            validate_where_document(where_document)  # type: ignore[arg-type]
    return where or None, where_document or None


def check_metadatas(metadatas: Sequence[Metadata | None]) -> list[Metadata]:
    """Return the metadatas, an empty one for None.

    Raises:
        InvalidInput: Chroma can't store one of them.
    """
    from chromadb.api.types import validate_metadata

    checked: list[Metadata] = []
    for position, metadata in enumerate(metadatas):
        if metadata:
            with chroma_input(f"metadatas[{position}]={metadata!r}"):
                validate_metadata(dict(metadata))
                for key, value in metadata.items():
                    texts = value if isinstance(value, list) else [value]
                    if not all(is_unicode(text) for text in (key, *texts) if isinstance(text, str)):
                        raise ValueError(f"{key!r} is no valid Unicode; {SURROGATE_ADVICE}")
                    # Chroma itself would store nothing for such a float, or another number, and say nothing.
                    for number in texts:
                        if isinstance(number, float) and not math.isfinite(number):
                            raise ValueError(f"{key!r} is {number}; leave the key out")
                        if isinstance(number, int) and not -(2**63) <= number < 2**63:
                            raise ValueError(f"{key!r} is {number}, no 64-bit integer; store it as a string")
        checked.append(metadata or {})
    return checked
