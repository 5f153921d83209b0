"""A search of two Chroma collections, which other clients may write: one query and one get.

The search is a generator that yields its calls and is sent their answers. So the same code is called by a thread, or
awaited on an event loop.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from mrl_rag.errors import TwoStageIndexError
from mrl_rag.index.archive import document_hash
from mrl_rag.index.chroma_archive import ChromaArchive
from mrl_rag.index.chroma_errors import chroma_condition
from mrl_rag.index.filters import fits
from mrl_rag.index.plan import first_size
from mrl_rag.index.search import MAX_EXACT_MATCHES, Hit, Ranked, Request, Searcher, Stage
from mrl_rag.index.server import AsyncConnections
from mrl_rag.index.shortlist import Stored, in_chroma, stored_records
from mrl_rag.index.storage import Stores
from mrl_rag.truncation import Float32Array, unit_rows

T = TypeVar("T")

# The shortlist without a plan, as a multiple of what `first_size` says: there is no second round.
# benchmarks/README.md has the recall.
_SIZE_FACTOR = 2
# Documents and metadata of up to so many candidates of all queries come with their ids. For more, those of the hits
# alone are fetched.
_MAX_WHOLE = 1000
# Full vectors per request: at 768 numbers about 12 MB of JSON.
_MAX_VECTORS = 1000
# If Chroma's graph finds too few of at most so many records, all are scored; of more, it is an error. A first batch may
# be in the collection and not yet in the graph, which is no error, so this is more than a batch.
_MAX_SCANNED = 10_000
# How often a record is read again that is being replaced meanwhile.
_MAX_READS = 3


@dataclass(frozen=True)
class Call:
    """A call of one of the two collections.

    Attributes:
        store: "shortlist" or "archive".
        method: of chromadb's `Collection` and `AsyncCollection`; "settings" for what `ShortlistCollection.note` takes.
        arguments: the method's, by name.
    """

    store: Literal["shortlist", "archive"]
    method: Literal["query", "get", "count", "settings"]
    arguments: dict[str, Any] = field(default_factory=dict)


Steps: TypeAlias = Generator[Call, Any, T]


@dataclass(frozen=True)
class _Full:
    """A full vector of a record.

    Attributes:
        vector: float32 [full_dim].
        hash: of the document that the vector is of; None if there is none, or it isn't known.
        known: whether `hash` is known.
    """

    vector: Float32Array
    hash: bytes | None = None
    known: bool = True

    def is_of(self, record: Stored) -> bool:
        """Return whether the vector is of this record's document."""
        return not self.known or self.hash == document_hash(record[0])


@dataclass
class _Candidates:
    """What stage one has found.

    Attributes:
        ids: per query, nearest first.
        records: document and metadata of those of them that are known.
        stage: of `explain`, for the first of each query; None where there was no stage one.
    """

    ids: list[list[str]]
    records: dict[str, Stored]
    stage: Stage | None = None

    def stage_of(self, ranked: Ranked) -> tuple[Stage, ...]:
        """Return how stage one ranked a candidate."""
        return () if self.stage is None else (replace(self.stage, rank=ranked.position + 1),)


class ServerSearcher(Searcher):
    """Searches the stores of an index that are both Chroma collections."""

    has_lists = False

    def search(self, queries: Float32Array, request: Request) -> list[list[Hit]]:
        """See `Searcher.search`."""
        return _called(self._search_steps(unit_rows(queries), request), self._call)

    async def asearch(self, queries: Float32Array, request: Request, connections: AsyncConnections) -> list[list[Hit]]:
        """Search as `search` does, on the running event loop; not if `needs_thread`."""
        server = await connections.server()
        return await _awaited(self._search_steps(unit_rows(queries), request), partial(self._await, server))

    def needs_thread(self, request: Request) -> bool:
        """Return whether the search makes calls that can't be awaited."""
        funnel = request.plan is not None and len(request.plan.dims) > 2
        rotates = funnel and self.stores.config.fitted and "rotation" not in vars(self.stores)
        return rotates or not fits(request.where, request.where_document)

    def nearest(
        self, queries: Float32Array, k: int, size: int = 0, share: float = 0.0
    ) -> list[list[tuple[str, float]]]:
        """See `Searcher.nearest`; `share` is ignored, as there are no lists."""
        return _called(self._nearest_steps(queries, Request(k), size), self._call)

    @in_chroma(starts_threads=True)
    def _call(self, call: Call) -> Any:
        if call.method == "settings":
            return self.stores.shortlist.settings()
        return getattr(self._collection(call), call.method)(**call.arguments)

    async def _await(self, server: Any, call: Call) -> Any:
        # It takes a second to import.
        from chromadb.api.models.AsyncCollection import AsyncCollection

        if call.method == "settings":
            return await self.stores.shortlist.asettings(server)
        model = self._collection(call).get_model()
        return await getattr(AsyncCollection(server, model, embedding_function=None), call.method)(**call.arguments)

    def _collection(self, call: Call) -> Any:
        return self._archive.collection if call.store == "archive" else self.stores.shortlist.collection

    @property
    def _archive(self) -> ChromaArchive:
        assert isinstance(self.stores.archive, ChromaArchive)
        return self.stores.archive

    def _nearest_steps(
        self, queries: Float32Array, request: Request, size: int
    ) -> Steps[list[list[tuple[str, float]]]]:
        found = yield from self._shortlists(queries, request, size, whole=False)
        full = yield from self._full(_unique(found.ids))
        answers = (self._ranked(query, ids, full, request) for query, ids in zip(queries, found.ids, strict=True))
        return [[(r.id, r.score) for r in answer] for answer in answers]

    def _search_steps(self, queries: Float32Array, request: Request) -> Steps[list[list[Hit]]]:
        found = yield from self._candidates(queries, request)
        records, full = found.records, (yield from self._full(_unique(found.ids)))
        for reads in range(_MAX_READS + 1):
            ranked = [self._ranked(query, ids, full, request) for query, ids in zip(queries, found.ids, strict=True)]
            winners = _unique([r.id for r in answer] for answer in ranked)
            unread = [id_ for id_ in winners if id_ not in records]
            records |= yield from self._records(unread)
            torn = [id_ for id_, each in full.items() if id_ in records and not each.is_of(records[id_])]
            deleted = [id_ for id_ in unread if id_ not in records]
            if reads == _MAX_READS or not (deleted or torn):
                break
            for id_ in deleted:
                del full[id_]
            if torn:
                yield from self._read_again(torn, records, full)
        order = yield from self._key_order([records[id_][1] for id_ in winners if id_ in records])
        return [
            [
                Hit(r.id, r.score, records[r.id][0], order(records[r.id][1]), (*found.stage_of(r), *r.stages))
                for r in answer
                if r.id in records
            ]
            for answer in ranked
        ]

    def _ranked(
        self, query: Float32Array, ids: Sequence[str], full: Mapping[str, _Full], request: Request
    ) -> list[Ranked]:
        """Rank a query's candidates at full dimension; positions are in the shortlist."""
        rows = [row for row, id_ in enumerate(ids) if id_ in full]
        if not rows:
            return []
        there = [ids[row] for row in rows]
        ranked = self._rank(query, np.stack([full[id_].vector for id_ in there]), there, request)
        return [r._replace(position=rows[r.position]) for r in ranked]

    def _candidates(self, queries: Float32Array, request: Request) -> Steps[_Candidates]:
        """Return what is scored at full dimension."""
        where, where_document = request.where, request.where_document
        fitting = fits(where, where_document)
        if request.among is None and fitting:
            return (yield from self._shortlists(queries, request))
        ids = request.among
        if not request.unconditional:
            # Not ids and condition in one `get`: for each id Chroma looks at all records that meet the condition.
            matching = (
                (yield from self._met(request, None)) if fitting else self.stores.shortlist.ids(where, where_document)
            )
            met = set(matching)
            ids = matching if ids is None else [id_ for id_ in ids if id_ in met]
        return _Candidates([list(ids or [])] * len(queries), {})

    def _shortlists(
        self, queries: Float32Array, request: Request, chosen_size: int = 0, whole: bool = True
    ) -> Steps[_Candidates]:
        """Return the nearest at the shortlist dimension.

        Args:
            queries: float32 unit rows [n, full_dim].
            request: `among` is None, and the conditions fit into one request.
            chosen_size: how many at least; 0 for the index's own choice.
            whole: whether to ask for documents and metadata, too.
        """
        limits, plan = self.stores.shortlist.limits, request.plan
        size = plan.sizes[0] if plan is not None else self._size(request.k, chosen_size)
        size = min(size, limits.results)
        include = ["documents", "metadatas"] if whole and len(queries) * size <= _MAX_WHOLE else []
        projected = self.stores.project(queries)
        found = _Candidates([], {})
        start = time.perf_counter()
        for part in limits.batches(range(len(queries))):
            arguments: dict[str, Any] = {
                "n_results": size,
                "where": request.where,
                "where_document": request.where_document,
            }
            arguments |= {"query_embeddings": projected[part[0] : part[-1] + 1], "include": include}
            with chroma_condition(request.where, request.where_document):
                answer = yield Call("shortlist", "query", arguments)
            found.ids += answer["ids"]
            for row, ids in enumerate(answer["ids"] if include else []):
                found.records |= stored_records(ids, answer["documents"][row], answer["metadatas"][row])
        if request.explain:
            milliseconds = (time.perf_counter() - start) * 1e3
            found.stage = Stage(self.stores.config.shortlist_dim, 1, None, milliseconds, size)
        if min(map(len, found.ids)) < size:
            found.ids = yield from self._completed(found.ids, request)
        return found

    def _size(self, k: int, chosen: int) -> int:
        """Return the size of a shortlist without a plan."""
        return first_size(chosen, k) if chosen else _SIZE_FACTOR * first_size(self.stores.config.shortlist_size, k)

    def _completed(self, found: list[list[str]], request: Request) -> Steps[list[list[str]]]:
        """Return the candidates of shortlists that aren't full: the graph may have lost records, or there are no more.

        Raises:
            TwoStageIndexError: it has lost more than can be scored instead.
        """
        fewest = min(map(len, found))
        if request.unconditional:
            total = yield Call("shortlist", "count")
            if total <= fewest:
                return found
            if total > _MAX_SCANNED:
                raise TwoStageIndexError(
                    f"Chroma finds {fewest} of the {total} records of collection {self.stores.shortlist.name!r}: its "
                    "graph has lost the others. Call repair(), which rebuilds it from the archive."
                )
            everything = yield from self._met(request, None)
            return [everything] * len(found)
        # Chroma's approximate search may find too few under a condition.
        matching = yield from self._met(request, MAX_EXACT_MATCHES + 1)
        if len(matching) <= fewest:
            return found
        if len(matching) <= MAX_EXACT_MATCHES:
            return [matching] * len(found)
        if fewest >= request.k:
            return found
        everything = yield from self._met(request, None)
        return [ids if len(ids) >= request.k else everything for ids in found]

    def _met(self, request: Request, wanted: int | None) -> Steps[list[str]]:
        """Return the ids of records that meet the conditions: up to `wanted`, None for all."""
        found: list[str] = []
        while wanted is None or len(found) < wanted:
            size = self.stores.shortlist.limits.page(wanted, len(found))
            page: dict[str, Any] = {"limit": size, "offset": len(found), "include": []}
            arguments = page | {"where": request.where, "where_document": request.where_document}
            with chroma_condition(request.where, request.where_document):
                answer = yield Call("shortlist", "get", arguments)
            found += answer["ids"]
            if len(answer["ids"]) < size:
                break
        return found

    def _records(self, ids: Sequence[str]) -> Steps[dict[str, Stored]]:
        """Return document and metadata by id; unknown ids are left out."""
        records: dict[str, Stored] = {}
        for part in self.stores.shortlist.batches(ids):
            answer = yield Call("shortlist", "get", {"ids": list(part), "include": ["documents", "metadatas"]})
            records |= stored_records(answer["ids"], answer["documents"], answer["metadatas"])
        return records

    def _full(self, ids: Sequence[str]) -> Steps[dict[str, _Full]]:
        """Return full vectors by id. A record without one gets Chroma's, as `Stores.full_vectors` says."""
        full: dict[str, _Full] = {}
        limits = self.stores.shortlist.limits
        for start in range(0, len(ids), min(_MAX_VECTORS, limits.batch)):
            part = ids[start : start + min(_MAX_VECTORS, limits.batch)]
            full |= (yield from self._archived(part, "vector"))["vector"]
        missing = [id_ for id_ in ids if id_ not in full]
        for part in self.stores.shortlist.batches(missing):
            answer = yield Call("shortlist", "get", {"ids": list(part), "include": ["embeddings"]})
            if answer["ids"]:
                short = dict(zip(answer["ids"], np.asarray(answer["embeddings"], dtype=np.float32), strict=True))
                full |= {id_: _Full(row, known=False) for id_, row in self.stores.lifted(short).items()}
        return full

    def _archived(self, ids: Sequence[str], *kinds: str) -> Steps[dict[str, dict[str, _Full]]]:
        """Return vectors of the archive by kind, "vector" or "staged", and id."""
        keys = [f"{kind}:{id_}" for kind in kinds for id_ in ids]
        answer = yield Call("archive", "get", {"ids": keys, "include": ["embeddings", "metadatas"]})
        found: dict[str, dict[str, _Full]] = {kind: {} for kind in kinds}
        for key, vector, hash_ in self._archive.parsed(answer):
            kind, _, id_ = key.partition(":")
            found[kind][id_] = _Full(vector, hash_)
        return found

    def _read_again(self, ids: Sequence[str], records: dict[str, Stored], full: dict[str, _Full]) -> Steps[None]:
        """Read records again whose vector is of another document: another client is replacing them.

        It stages the new vector before Chroma gets the new record. So the vector of either document is there, unless
        the document was changed through Chroma itself.
        """
        archived = yield from self._archived(ids, "vector", "staged")
        others = []
        for id_ in ids:
            versions = [archived[kind][id_] for kind in archived if id_ in archived[kind]]
            matching = next((each for each in versions if each.is_of(records[id_])), None)
            if matching is not None:
                full[id_] = matching
            else:
                others.append(id_)
        if others:
            now = yield from self._records(others)
            for id_ in others:
                if now.get(id_) == records.pop(id_):
                    full[id_] = replace(full[id_], known=False)
            records |= now

    def _key_order(self, metadatas: Iterable[dict[str, Any]]) -> Steps[Callable[[dict[str, Any]], dict[str, Any]]]:
        """Return a function that puts the keys of a metadata in the order in which they were given."""
        shortlist = self.stores.shortlist
        unknown = shortlist.unordered(metadatas)
        if unknown:
            shortlist.note((yield Call("shortlist", "settings")), unknown)
        return shortlist.in_order


def searcher_of(stores: Stores) -> Searcher:
    """Return the searcher of open stores."""
    return ServerSearcher(stores) if isinstance(stores.archive, ChromaArchive) else Searcher(stores)


async def _awaited(steps: Steps[T], call: Callable[[Call], Awaitable[Any]]) -> T:
    """Await the calls of a generator, and return what it returns."""
    proceed: Callable[[], Call] = partial(next, steps)
    while True:
        try:
            wanted = proceed()
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            proceed = partial(steps.send, await call(wanted))
        except Exception as error:
            proceed = partial(steps.throw, error)


def _called(steps: Steps[T], call: Callable[[Call], Any]) -> T:
    """Make the calls of a generator, and return what it returns."""

    async def at_once(wanted: Call) -> Any:
        return call(wanted)

    # Without an event loop: nothing is waited for, so the coroutine runs to its end.
    try:
        _awaited(steps, at_once).send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("a call was waited for")


def _unique(lists: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(id_ for ids in lists for id_ in ids))
