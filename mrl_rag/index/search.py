"""The stages of a search: choosing candidates, and reranking them at full dimension."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrl_rag.errors import InvalidVectors
from mrl_rag.index.checks import Where
from mrl_rag.index.filters import fits
from mrl_rag.index.lists import Rows
from mrl_rag.index.loaded import Candidates, LoadedVectors, Loader
from mrl_rag.index.plan import LATE, MAX_ROUNDS, Plan, check_k, first_size
from mrl_rag.index.query_batcher import QueryBatcher
from mrl_rag.index.storage import Stores
from mrl_rag.quantization import score_bits
from mrl_rag.truncation import Float32Array, normalize, truncate, unit_rows

# An index is searched exhaustively up to so many numbers in all its vectors, and so many records. That is exact, and as
# fast as a call to Chroma. benchmarks/README.md has the times.
_EXACT_NUMBERS, _EXACT_RECORDS = 8_000_000, 20_000
# Share of the inverted lists that is scanned (nprobe / lists) until one is chosen for the index.
_DEFAULT_LISTS_SHARE = 0.25
# If at most so many records meet a condition, all of these are scored. That takes about as long as a search in Chroma
# with a condition.
MAX_EXACT_MATCHES = 1000
# In an archive with sign bits: share of the candidates, the best by these bits, whose full vectors are then read, and
# the least number of them per hit. benchmarks/README.md has the recall.
_BITS_KEPT_SHARE, _MIN_BITS_KEPT_PER_HIT = 0.5, 4
# At most so many records that other processes have written since Chroma read its graph are scored in addition; if there
# are more, Chroma reads its graph again. It is more than a batch of a writer.
_MAX_RECENT = 10_000
# Conditions for which it is remembered until the next write which of these meet them.
_MAX_CONDITIONS = 64
# A scan of all records asks for so many times the first shortlist: it is doubled while a hit is late in it.
_SCANNED_ROUNDS = 4
# Queries whose candidates are read and scored together. The vectors of so many fit a processor's cache.
_RERANK_BATCH = 8


@dataclass(frozen=True, slots=True)
class Stage:
    """How one stage of a search ranked a hit.

    Attributes:
        dim: dimension of the stage.
        rank: of the hit among the stage's candidates, 1 for the best.
        score: cosine at `dim`; None for stage one, which returns no scores.
        milliseconds: time of the stage; that of stage one is for all queries that were searched together.
        candidates: number of candidates that were scored; for stage one, the number it was asked for.
        rounds: for stage one, the round that found the hit. Each round asks for twice as many candidates; there is
            another one while a hit is in the last third of the candidates.
    """

    dim: int
    rank: int
    score: float | None
    milliseconds: float
    candidates: int
    rounds: int = 1


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer of a search.

    Attributes:
        id: of the record.
        score: cosine at full dimension, -1 to 1.
        document: its text; None if it has none.
        metadata: its metadata; empty if it has none.
        stages: how each stage ranked it, for a search with `explain=True`; empty otherwise.
    """

    id: str
    score: float
    document: str | None
    metadata: dict[str, Any]
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Request:
    """The arguments of a search without the query vectors.

    Attributes:
        k: hits per query at most.
        plan: dimensions and shortlist sizes; None to enlarge the shortlist as needed.
        where: condition on metadata.
        where_document: condition on the document.
        among: search only these ids; None for all records.
        explain: whether hits get their `stages`.
    """

    k: int
    plan: Plan | None = None
    where: Where | None = None
    where_document: Where | None = None
    among: Sequence[str] | None = None
    explain: bool = False

    @property
    def unconditional(self) -> bool:
        """Whether there is no condition on metadata or document."""
        return self.where is None and self.where_document is None


class Ranked(NamedTuple):
    """A reranked candidate.

    Attributes:
        id: of the record.
        score: cosine at full dimension.
        position: in the shortlist, 0 for the first.
        stages: as in `Hit`.
    """

    id: str
    score: float
    position: int
    stages: tuple[Stage, ...] = ()


def max_exact(full_dim: int) -> int:
    """Return the largest number of records at which an index is searched exhaustively."""
    return min(_EXACT_RECORDS, _EXACT_NUMBERS // full_dim)


def rank(query: npt.ArrayLike, vectors: npt.ArrayLike, k: int | None = None) -> list[tuple[int, float]]:
    """Order vectors by their cosine with a query: the rerank alone, for candidates from another search.

    Args:
        query: float array [d].
        vectors: float array [n, d].
        k: pairs to return at most; None for all.

    Returns:
        (row, cosine) pairs, best first; equal cosines in the order of their rows.

    Raises:
        InvalidVectors: not numbers of these shapes, or NaN or infinity.
        InvalidPlan: k < 1.
    """
    rows, asked = normalize(vectors), normalize(np.asarray(query, dtype=np.float32)[None])
    if len(rows) and rows.shape[1] != asked.shape[1]:
        raise InvalidVectors(
            f"vectors have {rows.shape[1]} numbers and the query {asked.shape[1]}; they must be equal."
        )
    scores = np.einsum("nd,d->n", rows, asked[0]) if len(rows) else np.zeros(0, dtype=np.float32)
    best = np.argsort(-scores, kind="stable")[: None if k is None else check_k(k)]
    return [(int(row), float(scores[row])) for row in best]


def mmr(scores: npt.NDArray[np.float64], vectors: Float32Array, k: int, lambda_mult: float) -> list[int]:
    """Choose rows that are near a query and different from each other, by maximal marginal relevance.

    Args:
        scores: float64 [n], cosines with the query.
        vectors: float32 [n, d], unit rows.
        k: rows to choose at most.
        lambda_mult: 0 to 1; 1 considers only nearness, 0 only difference.

    Returns:
        Rows in the order in which they were chosen: each has the highest lambda_mult * score - (1 - lambda_mult) *
        (highest cosine with a row chosen before). Of equal ones the first is chosen.
    """
    highest = np.full(len(scores), -np.inf)
    chosen: list[int] = []
    for _ in range(min(k, len(scores))):
        value = lambda_mult * scores - (1 - lambda_mult) * np.where(np.isinf(highest), 0.0, highest)
        value[chosen] = -np.inf
        chosen.append(int(np.argmax(value)))
        highest = np.maximum(highest, vectors @ vectors[chosen[-1]])
    return chosen


def cosines(query: Float32Array, vectors: Float32Array) -> Float32Array:
    """Return the cosine of a unit query, float32 [d], with each row, float32 [n, d]."""
    # einsum sums each row separately. With BLAS, a row's last digit may depend on the other rows, so that equal vectors
    # would not tie.
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    scores: Float32Array = np.einsum("nd,d->n", vectors, query) / np.where(lengths > 0, lengths, 1)
    return scores


def rank_candidates(
    query: Float32Array,
    vectors: Float32Array,
    ids: Sequence[str],
    k: int,
    funnel: Sequence[tuple[int, int]] = (),
    rotation: Float32Array | None = None,
    explain: bool = False,
) -> list[Ranked]:
    """Rank a query's candidates in all stages after the first.

    Args:
        query: float32 [full_dim], unit length.
        vectors: float32 [n, full_dim].
        ids: n ids; equal scores are ordered by id.
        k: candidates to return at most.
        funnel: (dimension, number of candidates to keep) of each stage between the first and the last.
        rotation: float32 [full_dim, full_dim], applied before truncation; None for none.
        explain: whether to fill `stages`.

    Returns:
        Up to k candidates, best first.
    """
    rows = list(range(len(ids)))
    stages: dict[int, tuple[Stage, ...]] = {}
    kept = vectors
    for dim, size in (*funnel, (vectors.shape[1], k)):
        start = time.perf_counter()
        low_query, low_vectors = query, kept
        if dim < vectors.shape[1]:
            rotated = (query[None], kept) if rotation is None else (query[None] @ rotation, kept @ rotation)
            low_query, low_vectors = truncate(rotated[0], dim)[0], truncate(rotated[1], dim)
        best = _best(cosines(low_query, low_vectors), rows, ids, size)
        if explain:
            milliseconds = (time.perf_counter() - start) * 1e3
            for place, (score, _, row) in enumerate(best, start=1):
                stages[row] = (*stages.get(row, ()), Stage(dim, place, -score, milliseconds, len(rows)))
        rows = [row for _, _, row in best]
        if funnel:
            kept = vectors[rows]
    return [Ranked(id_, -score, row, stages.get(row, ())) for score, id_, row in best]


def _best(scores: Float32Array, rows: Sequence[int], ids: Sequence[str], size: int) -> list[tuple[float, str, int]]:
    """Return (-score, id, row) of the `size` best, best first."""
    # Only those that score at least as the last of the best are sorted, with all ties.
    least = np.partition(scores, -size)[-size] if size < len(scores) else -np.inf
    near = np.flatnonzero(scores >= least).tolist()
    return sorted((-float(scores[place]), ids[rows[place]], rows[place]) for place in near)[:size]


class GraphOutdated(Exception):
    """Other processes have written too much since Chroma read its graph: it must be read again."""


def _merged(found: Sequence[Ranked], more: Sequence[Ranked], k: int) -> list[Ranked]:
    """Return the k best of both, best first. For an id in both, the one in `more` counts."""
    by_id = {r.id: r for r in (*found, *more)}
    return sorted(by_id.values(), key=lambda r: (-r.score, r.id))[:k]


class Searcher:
    """Searches the stores of an index in a folder or in memory.

    Stage one scans vectors in memory. Under a condition that more than a few records meet, it asks Chroma's graph.

    Args:
        stores: what is searched.

    Attributes:
        has_lists: whether stage one can scan a share of inverted lists.
    """

    has_lists = True

    def __init__(self, stores: Stores) -> None:
        self.stores = stores
        self._loader = Loader(stores)
        # Records that were written between two versions of the archive, for `_written_since`; and those of them that
        # meet a condition, by the condition.
        self._recent: tuple[tuple[int, int], LoadedVectors, dict[str, LoadedVectors]] | None = None
        self._batcher: QueryBatcher[Request, list[Hit]] = QueryBatcher()

    def search(self, queries: Float32Array, request: Request) -> list[list[Hit]]:
        """Return up to k hits per query, float32 [n, full_dim], best first."""
        queries = unit_rows(queries)
        if request.unconditional and request.among is None and not request.explain:
            return self._batcher.search(queries, request, self._search)
        return self._search(queries, request)

    def _search(self, queries: Float32Array, request: Request) -> list[list[Hit]]:
        candidates = self._preselected(request)
        loaded = None if candidates is not None else self._in_memory(request)
        while True:
            if candidates is not None:
                ranked = self._rank_preselected(queries, candidates, request)
            else:
                ranked = self._rank_searched(queries, request, loaded)
            winners = list(dict.fromkeys(hit.id for answer in ranked for hit in answer))
            records = self.stores.records(winners)
            lost = set(winners) - set(records)
            # The archive has vectors whose records are being written or deleted. Without them others may be hits.
            if not lost or loaded is None or len(fewer := loaded.without(lost)) == len(loaded):
                break
            loaded = fewer
        # Records that were deleted since stage one are left out. Metadata is copied, so that the caller may change it.
        return [
            [Hit(r.id, r.score, records[r.id][0], dict(records[r.id][1]), r.stages) for r in answer if r.id in records]
            for answer in ranked
        ]

    def nearest(
        self, queries: Float32Array, k: int, size: int = 0, share: float = 0.0
    ) -> list[list[tuple[str, float]]]:
        """Return ids and scores of what a search in two stages finds per query, best first.

        It is never exhaustive, and the lists are scanned as for queries that are asked one by one.

        Args:
            queries: float32 unit rows [n, full_dim].
            k: ids per query at most.
            size: shortlist size of the first round; 0 for the index's own.
            share: share of the inverted lists to scan in the first round, 0 to 1; 0 for the index's own.
        """
        loaded = self._loader.load(full=False)
        ranked = self._shortlist_and_rank(queries, Request(k), loaded, size, share, one_by_one=True)
        return [[(hit.id, hit.score) for hit in answer] for answer in ranked]

    def _in_memory(self, request: Request) -> LoadedVectors | None:
        """Return what is searched in memory: everything, or under a condition what Chroma's graph may lack."""
        if not request.unconditional:
            return self._written_since(request)
        archive, full_dim = self.stores.archive, self.stores.config.full_dim
        return self._loader.load(full=request.plan is None and len(archive) <= max_exact(full_dim))

    def _rank_searched(
        self, queries: Float32Array, request: Request, loaded: LoadedVectors | None
    ) -> list[list[Ranked]]:
        if request.unconditional:
            assert loaded is not None
            if loaded.full is None:
                return self._shortlist_and_rank(queries, request, loaded)
            return [self._rank_all(query, loaded, request) for query in queries]
        ranked = self._shortlist_and_rank(queries, request)
        if loaded is None:
            return ranked
        return [
            _merged(found, self._rank_all(query, loaded, request), request.k)
            for query, found in zip(queries, ranked, strict=True)
        ]

    def _rank_all(self, query: Float32Array, loaded: LoadedVectors, request: Request) -> list[Ranked]:
        """Rank all records that are loaded at full dimension."""
        assert loaded.full is not None
        k = min(request.k, len(loaded))
        if not k:
            return []
        near = loaded.among_best(query, k)
        return rank_candidates(query, loaded.full[near], [loaded.ids[row] for row in near], k, explain=request.explain)

    def _missed_transactions(self) -> int:
        """Return how many transactions of other processes Chroma's graph may lack."""
        graph, version = self.stores.graph, self.stores.archive.version
        return 0 if graph is None or version is None else version - graph.version

    def _written_since(self, request: Request) -> LoadedVectors | None:
        """Return matching records that other processes have written since Chroma read its graph; None for none.

        Raises:
            GraphOutdated: they are too many, or no longer known.
        """
        graph, archive = self.stores.graph, self.stores.archive
        version = archive.version
        if graph is None or version is None or graph.version == version:
            return None
        if self._recent is None or self._recent[0] != (graph.version, version):
            ids, complete = archive.changes(graph.version)
            # The archive is written before Chroma, so even a graph that was just read may lack the last transaction.
            if version - graph.version > 1 and (not complete or len(ids) > _MAX_RECENT):
                raise GraphOutdated
            self._recent = (graph.version, version), self._loader.load_some(ids), {}
        _, recent, matching = self._recent
        condition = repr((request.where, request.where_document))
        if condition not in matching:
            if len(matching) >= _MAX_CONDITIONS:
                return self._matching(recent, request)
            matching[condition] = self._matching(recent, request)
        return matching[condition]

    def _matching(self, recent: LoadedVectors, request: Request) -> LoadedVectors:
        met = self.stores.shortlist.matching(recent.ids, request.where, request.where_document)
        return recent.without(set(recent.ids) - met)

    def _preselected(self, request: Request) -> list[str] | None:
        """Return ids that are all scored for every query, if ids or a condition leave few records; otherwise None."""
        shortlist = self.stores.shortlist
        if request.among is not None:
            met = set(request.among if request.unconditional else shortlist.ids(request.where, request.where_document))
            return [id_ for id_ in request.among if id_ in met]
        if request.unconditional:
            return None
        if not fits(request.where, request.where_document):
            return shortlist.ids(request.where, request.where_document)
        matching = shortlist.ids(request.where, request.where_document, limit=MAX_EXACT_MATCHES + 1)
        return matching if len(matching) <= MAX_EXACT_MATCHES else None

    def _rank_preselected(
        self, queries: Float32Array, candidates: Sequence[str], request: Request
    ) -> list[list[Ranked]]:
        ids, vectors = self.stores.full_vectors(candidates)
        return [self._rank(query, vectors, ids, request) for query in queries]

    def _rank(self, query: Float32Array, vectors: Float32Array, ids: Sequence[str], request: Request) -> list[Ranked]:
        plan = request.plan
        funnel = () if plan is None else tuple(zip(plan.dims[1:-1], plan.sizes[1:], strict=True))
        rotation = self.stores.rotation if funnel else None
        return rank_candidates(query, vectors, ids, request.k, funnel, rotation, request.explain)

    def _shortlist_and_rank(
        self,
        queries: Float32Array,
        request: Request,
        loaded: LoadedVectors | None = None,
        chosen_size: int = 0,
        chosen_share: float = 0.0,
        one_by_one: bool = False,
    ) -> list[list[Ranked]]:
        """Shortlist and rerank in rounds, each with twice the candidates, while a hit is late in the shortlist.

        Without `loaded`, Chroma's graph is asked.
        """
        config, plan = self.stores.config, request.plan
        size = plan.sizes[0] if plan is not None else first_size(chosen_size or config.shortlist_size, request.k)
        share = chosen_share or config.lists_share or _DEFAULT_LISTS_SHARE
        start = time.perf_counter()
        projected = self.stores.project(queries)
        answers: list[list[Ranked]] = [[] for _ in queries]
        seen: list[set[str]] = [set() for _ in queries]
        pending = list(range(len(queries)))
        # A scan of all records finds the longer shortlists of later rounds at once.
        scanned: list[Rows] = []
        longest = size if plan is not None else _SCANNED_ROUNDS * size
        if loaded is not None and loaded.scans(len(queries), share, one_by_one):
            scanned = loaded.nearest(projected, longest, 1.0, size)
        for rounds in range(1, MAX_ROUNDS + 1 if plan is None else 2):
            if loaded is None:
                shortlists = [Candidates(ids) for ids in self._search_graph(projected[pending], size, request)]
            elif scanned and size <= longest:
                shortlists = [loaded.candidates(scanned[query][:size]) for query in pending]
            else:
                found = loaded.nearest(projected[pending], size, share, 2 * request.k, one_by_one)
                shortlists = [loaded.candidates(rows) for rows in found]
            milliseconds = (time.perf_counter() - start) * 1e3
            reranked = self._rank_shortlists(queries[pending], shortlists, [seen[query] for query in pending], request)
            unfinished = []
            for query, shortlist, ranked in zip(pending, shortlists, reranked, strict=True):
                if request.explain:
                    stage = Stage(config.shortlist_dim, 0, None, milliseconds, size, rounds)
                    ranked = [r._replace(stages=(replace(stage, rank=r.position + 1), *r.stages)) for r in ranked]
                answers[query] = _merged(answers[query], ranked, request.k)
                # A shortlist that isn't full has all records. In a full one, some may have been deleted.
                late = any(r.position >= LATE * size for r in answers[query])
                if len(shortlist.ids) == size and (late or len(answers[query]) < request.k):
                    seen[query].update(shortlist.ids)
                    unfinished.append(query)
            if not unfinished:
                break
            pending, size, share = unfinished, 2 * size, 2 * share
            start = time.perf_counter()
        return answers

    def _rank_shortlists(
        self, queries: Float32Array, shortlists: Sequence[Candidates], seen: Sequence[Container[str]], request: Request
    ) -> Iterator[list[Ranked]]:
        """Yield each query's reranked candidates without those in `seen`; positions are in the whole shortlist."""
        for start in range(0, len(queries), _RERANK_BATCH):
            part = slice(start, start + _RERANK_BATCH)
            kept = [
                self._cut_by_bits(query, candidates.without(known), request.k)
                for query, candidates, known in zip(queries[part], shortlists[part], seen[part], strict=True)
            ]
            wanted = [id_ for candidates in kept for id_ in candidates.ids]
            slots = [candidates.slots for candidates in kept if candidates.slots is not None]
            found, vectors = self.stores.full_vectors(
                wanted, np.concatenate(slots) if len(slots) == len(kept) else None
            )
            row_of = {} if len(found) == len(wanted) else {id_: row for row, id_ in enumerate(found)}
            end = 0
            for query, shortlist, (ids, _) in zip(queries[part], shortlists[part], kept, strict=True):
                end += len(ids)
                there, rows = ids, vectors[end - len(ids) : end]
                if row_of:
                    there = [id_ for id_ in ids if id_ in row_of]
                    rows = vectors[[row_of[id_] for id_ in there]]
                ranked = self._rank(query, rows, there, request)
                if there is not shortlist.ids:
                    place = {id_: position for position, id_ in enumerate(shortlist.ids)}
                    ranked = [r._replace(position=place[r.id]) for r in ranked]
                yield ranked

    def _cut_by_bits(self, query: Float32Array, candidates: Candidates, k: int) -> Candidates:
        """Keep only the best candidates by sign bits, if the archive has these."""
        ids = candidates.ids
        read = self.stores.archive.read_bits(ids)
        if read is None:
            return candidates
        found, bits = read
        keep = max(int(_BITS_KEPT_SHARE * len(ids)), _MIN_BITS_KEPT_PER_HIT * k)
        scores = score_bits(query, bits)
        best = _best(scores, range(len(found)), found, keep)
        # Records without bits have no full vectors either; `Stores.full_vectors` warns of them.
        return Candidates([*(set(ids) - set(found)), *(id_ for _, id_, _ in best)])

    def _search_graph(self, projected: Float32Array, size: int, request: Request) -> list[list[str]]:
        """Return candidate ids per query from Chroma's graph, nearest first; all matching ids if it finds too few."""
        from chromadb.errors import InternalError

        shortlist, where, where_document = self.stores.shortlist, request.where, request.where_document
        try:
            found = shortlist.search(projected, size, where, where_document)
        except InternalError:
            # Chroma raises it for a record that meets the condition and isn't in its graph.
            missed = self._missed_transactions()
            if missed > 1:
                raise GraphOutdated from None
            if not missed:
                raise
            return [shortlist.ids(where, where_document)] * len(projected)
        # Chroma's approximate search can return too few.
        total = self.stores.count() if min(map(len, found)) < request.k else 0
        while min(map(len, found)) < request.k and size < total:
            size *= 4
            found = shortlist.search(projected, min(size, total), where, where_document)
        if min(map(len, found)) < request.k:
            everything = shortlist.ids(where, where_document)
            found = [ids if len(ids) >= request.k else everything for ids in found]
        return found
