"""The stages of a search: which records are candidates, and how they are ranked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrl_rag.errors import InvalidVectors, TwoStageIndexError
from mrl_rag.index.checks import Where
from mrl_rag.index.filters import fits
from mrl_rag.index.loaded import Candidates, LoadedVectors, Loader
from mrl_rag.index.plan import MAX_ROUNDS, Plan, check_k, first_size
from mrl_rag.index.storage import Stores
from mrl_rag.quantization import score_bits
from mrl_rag.truncation import Float32Array, normalize, truncate, unit_rows

# Numbers of all vectors together, and records, up to which every record is scored; and numbers of all the shortlist's
# vectors together up to which stage one scans them in memory. Neither takes longer than a call to Chroma, and neither
# loses a candidate. benchmarks/README.md has the times.
_EXACT_NUMBERS, _EXACT_RECORDS = 8_000_000, 20_000
_SCANNED_NUMBERS = 25_000_000
# Queries scanned together, and how many at least take threads.
_SCAN_BATCH, _WORTH_THREADS = 50, 8
# Records that meet a condition and are all scored, where there are no more: that takes about as long as a search in
# Chroma under a condition.
_EXACT_MATCHES = 1000
# One in this many candidates, the best by sign bits, is read whole where the archive keeps such; 4 * k at least.
# benchmarks/README.md has the recall at this share.
_BITS_KEEP = 2
# Records that are all scored where Chroma's search doesn't find as many as it should; more than one batch of a writer,
# so that what is written meanwhile isn't taken for a fault.
_MAX_SCANNED = 10_000
# Records that other processes have written since Chroma read its graph, and that are compared one by one; where there
# are more, Chroma reads it anew. More than one batch of a writer.
_MOST_RECENT = 10_000
# Queries whose full vectors are read and scored together: these fit a processor's cache.
_RERANK_BATCH = 8


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage of a search thought of a hit.

    Attributes:
        dim: how many numbers it looked at.
        rank: 1 for its best candidate.
        score: cosine at `dim`; None for stage one, which is asked for ids alone.
        milliseconds: that the stage took; for stage one, for all queries that went through it together.
        candidates: how many candidates it looked at; stage one: how many it was asked for.
        rounds: how often stage one was asked: again for twice as many as long as a hit stood in their later half.
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
        document: its text, None where it has none.
        metadata: what was stored with it; empty where there was none.
        stages: what each stage thought of it, for a search with `explain=True`; empty otherwise.
    """

    id: str
    score: float
    document: str | None
    metadata: dict[str, Any]
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Request:
    """What is asked, apart from the query vectors.

    Attributes:
        k: how many hits.
        plan: None for a shortlist that looks after itself.
        where: condition on metadata.
        where_document: condition on the document.
        among: search among these records alone; None for all.
        explain: whether hits carry their stages.
    """

    k: int
    plan: Plan | None = None
    where: Where | None = None
    where_document: Where | None = None
    among: Sequence[str] | None = None
    explain: bool = False


class Ranked(NamedTuple):
    """One candidate that came through the stages.

    Attributes:
        id: of the record.
        score: cosine at full dimension.
        position: among the candidates, 0 for the first.
        stages: what each stage thought of it.
    """

    id: str
    score: float
    position: int
    stages: tuple[Stage, ...] = ()


def max_exact(full_dim: int) -> int:
    """Return up to how many records a search scores every one."""
    return min(_EXACT_RECORDS, _EXACT_NUMBERS // full_dim)


def is_scanned(records: int, dim: int) -> bool:
    """Say whether stage one scans so many records at a dimension in memory instead of asking Chroma's graph."""
    return records * dim <= _SCANNED_NUMBERS


def rank(query: npt.ArrayLike, vectors: npt.ArrayLike, k: int | None = None) -> list[tuple[int, float]]:
    """Order vectors by their cosine with a query: stage two alone, for candidates found elsewhere.

    Args:
        query: float array [d].
        vectors: float array [n, d].
        k: how many to return; None for all.

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
    """Choose rows that are near a query and unlike each other, by maximal marginal relevance.

    Args:
        scores: float64 [n], cosines with the query.
        vectors: float32 [n, d], unit rows.
        k: how many to choose at most.
        lambda_mult: 0 to 1; 1 for the nearest only, 0 for the most different.

    Returns:
        Rows in the order in which they were chosen: each has the highest lambda_mult * score - (1 - lambda_mult) *
        (highest cosine with a row chosen before), and is the first of those that have it.
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
    # einsum sums each row alone. A product of matrices would give a row another last digit in other company, and equal
    # vectors would not tie.
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
    """Take a query's candidates through the stages after Chroma's.

    Args:
        query: float32 [full_dim], unit length.
        vectors: float32 [n, full_dim].
        ids: the n ids, which order equal scores.
        k: how many to return.
        funnel: (dimension, how many to keep) of each stage between the first and the last.
        rotation: float32 [full_dim, full_dim], applied before a cut; None for none.
        explain: whether to note what each stage thought.

    Returns:
        Up to k candidates, best first.
    """
    rows = list(range(len(ids)))
    stages: dict[int, tuple[Stage, ...]] = {}
    known = vectors
    for dim, size in (*funnel, (vectors.shape[1], k)):
        start = time.perf_counter()
        asked, looked_at = query, known
        if dim < vectors.shape[1]:
            turned = (query[None], known) if rotation is None else (query[None] @ rotation, known @ rotation)
            asked, looked_at = truncate(turned[0], dim)[0], truncate(turned[1], dim)
        best = _best(cosines(asked, looked_at), rows, ids, size)
        if explain:
            spent = (time.perf_counter() - start) * 1e3
            for place, (score, _, row) in enumerate(best, start=1):
                stages[row] = (*stages.get(row, ()), Stage(dim, place, -score, spent, len(rows)))
        rows = [row for _, _, row in best]
        if funnel:
            known = vectors[rows]
    return [Ranked(id_, -score, row, stages.get(row, ())) for score, id_, row in best]


def _best(scores: Float32Array, rows: Sequence[int], ids: Sequence[str], size: int) -> list[tuple[float, str, int]]:
    """Return (-score, id, row) of the `size` best, best first."""
    # All that score as the last of them do, and fewer than all there are: most of the time would go into sorting.
    least = np.partition(scores, -size)[-size] if size < len(scores) else -np.inf
    near = np.flatnonzero(scores >= least).tolist()
    return sorted((-float(scores[place]), ids[rows[place]], rows[place]) for place in near)[:size]


class GraphOutdated(Exception):
    """Other processes have written more since Chroma read its graph than is kept beside it."""


def _scan(loaded: LoadedVectors, asked: Float32Array, size: int) -> tuple[list[Float32Array], list[Candidates]]:
    """Return each query's scores, float32 [n], and its candidates."""

    def work(query: Float32Array) -> tuple[Float32Array, Candidates]:
        scores = loaded.scores(query)
        return scores, loaded.best(scores, size)

    if len(asked) < _WORTH_THREADS:
        done = [work(query) for query in asked]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            done = list(threads.map(work, asked))
    return [scores for scores, _ in done], [candidates for _, candidates in done]


class Searcher:
    """Searches the stores of an index.

    Args:
        stores: what is searched.
    """

    def __init__(self, stores: Stores) -> None:
        self.stores = stores
        self._loader = Loader(stores)
        # What was written between two versions of the archive.
        self._recent: tuple[tuple[int, int], LoadedVectors] | None = None

    def search(self, queries: Float32Array, request: Request) -> list[list[Hit]]:
        """Return up to k hits per query, best first; queries are float32 [n, full_dim]."""
        queries = unit_rows(queries)
        candidates = self._fixed_candidates(request)
        loaded = None if candidates is not None else self._in_memory(request)
        recent = None if candidates is not None or loaded is not None else self._written_since(request)
        while True:
            if candidates is not None:
                ranked = self._rank_fixed(queries, candidates, request)
            else:
                ranked = self._rank_unfixed(queries, request, loaded, recent)
            winners = list(dict.fromkeys(hit.id for answer in ranked for hit in answer))
            records = self.stores.records(winners)
            lost = set(winners) - set(records)
            # The archive has rows of records that are being written or deleted.
            if loaded is not None and lost:
                loaded = loaded.without(lost)
            elif recent is not None and len(fewer := recent.without(lost)) < len(recent):
                recent = fewer
            else:
                break
        # A record deleted since stage one is no answer any more. Its metadata is the caller's to change, so a copy.
        return [
            [Hit(r.id, r.score, records[r.id][0], dict(records[r.id][1]), r.stages) for r in answer if r.id in records]
            for answer in ranked
        ]

    def nearest(self, queries: Float32Array, k: int, size: int | None = None) -> list[list[str]]:
        """Return the ids that two stages find, best first, also where a search would score every record.

        Args:
            queries: float32 unit rows [n, full_dim].
            k: how many.
            size: candidates of stage one at first; None for what was chosen for the index.
        """
        request = Request(k)
        loaded = self._loader.load(full=False) if self.scans else None
        chosen = self.stores.config.shortlist_size if size is None else size
        return [[hit.id for hit in ranked] for ranked in self._shortlist_and_rank(queries, request, loaded, chosen)]

    @property
    def scans(self) -> bool:
        """Whether stage one scans the shortlist's vectors in memory; otherwise it asks Chroma's graph."""
        archive = self.stores.archive
        return archive.version is not None and is_scanned(len(archive), self.stores.config.shortlist_dim)

    def _in_memory(self, request: Request) -> LoadedVectors | None:
        """Return the vectors that are searched in memory, None where Chroma is asked."""
        archive, full_dim = self.stores.archive, self.stores.config.full_dim
        if archive.version is None or request.where is not None or request.where_document is not None:
            return None
        if request.plan is None and len(archive) <= max_exact(full_dim):
            return self._loader.load(full=True)
        return self._loader.load(full=False) if self.scans else None

    def _rank_unfixed(
        self, queries: Float32Array, request: Request, loaded: LoadedVectors | None, recent: LoadedVectors | None
    ) -> list[list[Ranked]]:
        size = self.stores.config.shortlist_size
        if loaded is None:
            ranked = self._shortlist_and_rank(queries, request, None, size)
            return ranked if recent is None else self._with_recent(queries, ranked, recent, request)
        if loaded.full is not None:
            return [self._rank_all(query, loaded, loaded.full, request) for query in queries]
        answers: list[list[Ranked]] = []
        for start in range(0, len(queries), _SCAN_BATCH):
            answers += self._shortlist_and_rank(queries[start : start + _SCAN_BATCH], request, loaded, size)
        return answers

    def _rank_all(
        self, query: Float32Array, loaded: LoadedVectors, vectors: Float32Array, request: Request
    ) -> list[Ranked]:
        """Rank every record."""
        k = min(request.k, len(loaded))
        if not k:
            return []
        near = loaded.among_best(query, k)
        return rank_candidates(query, vectors[near], [loaded.ids[row] for row in near], k, explain=request.explain)

    def _missed_transactions(self) -> int:
        """Return how many transactions of other processes Chroma's graph may not have."""
        graph, version = self.stores.graph, self.stores.archive.version
        return 0 if graph is None or version is None else version - graph.version

    def _written_since(self, request: Request) -> LoadedVectors | None:
        """Return what other processes have written since Chroma read its graph and meets the conditions.

        Raises:
            GraphOutdated: it is too much, or no longer known.
        """
        graph, archive = self.stores.graph, self.stores.archive
        version = archive.version
        if graph is None or version is None or graph.version == version:
            return None
        if self._recent is None or self._recent[0] != (graph.version, version):
            ids, complete = archive.changes(graph.version)
            # The last transaction may have been on its way to Chroma even when that has just read its graph.
            if version - graph.version > 1 and (not complete or len(ids) > _MOST_RECENT):
                raise GraphOutdated
            self._recent = (graph.version, version), self._loader.load_some(ids)
        recent = self._recent[1]
        if request.where is None and request.where_document is None:
            return recent
        met = self.stores.shortlist.matching(recent.ids, request.where, request.where_document)
        return recent.without(set(recent.ids) - met)

    def _with_recent(
        self, queries: Float32Array, ranked: list[list[Ranked]], recent: LoadedVectors, request: Request
    ) -> list[list[Ranked]]:
        """Put what was written since Chroma read its graph among the answers."""
        assert recent.full is not None
        answers = []
        for query, found in zip(queries, ranked, strict=True):
            one_each = {r.id: r for r in (*found, *self._rank_all(query, recent, recent.full, request))}
            answers.append(sorted(one_each.values(), key=lambda r: (-r.score, r.id))[: request.k])
        return answers

    def _fixed_candidates(self, request: Request) -> list[str] | None:
        """Return the candidates of every query, where they don't depend on the query; None where Chroma chooses."""
        shortlist = self.stores.shortlist
        unconditional = request.where is None and request.where_document is None
        if request.among is not None:
            met = set(request.among if unconditional else shortlist.ids(request.where, request.where_document))
            return [id_ for id_ in request.among if id_ in met]
        if unconditional:
            return None
        if not fits(request.where, request.where_document):
            return shortlist.ids(request.where, request.where_document)
        matching = shortlist.ids(request.where, request.where_document, limit=_EXACT_MATCHES + 1)
        return matching if len(matching) <= _EXACT_MATCHES else None

    def _rank_fixed(self, queries: Float32Array, candidates: Sequence[str], request: Request) -> list[list[Ranked]]:
        ids, vectors = self.stores.full_vectors(candidates)
        return [self._rank(query, vectors, ids, request) for query in queries]

    def _rank(self, query: Float32Array, vectors: Float32Array, ids: Sequence[str], request: Request) -> list[Ranked]:
        plan = request.plan
        funnel = () if plan is None else tuple(zip(plan.dims[1:-1], plan.sizes[1:], strict=True))
        rotation = self.stores.rotation if funnel else None
        return rank_candidates(query, vectors, ids, request.k, funnel, rotation, request.explain)

    def _shortlist_and_rank(
        self, queries: Float32Array, request: Request, loaded: LoadedVectors | None, chosen_size: int
    ) -> list[list[Ranked]]:
        """Rank candidates; more of them where a winner stood in their later half."""
        size = first_size(chosen_size, request.k) if request.plan is None else request.plan.sizes[0]
        start = time.perf_counter()
        asked = self.stores.project(queries)
        scores: list[Float32Array] = []
        answers: dict[int, list[Ranked]] = {}
        pending = list(range(len(queries)))
        for rounds in range(1, MAX_ROUNDS + 1):
            if loaded is None:
                found = [Candidates(ids) for ids in self._ask(asked[pending], size, request)]
            elif not scores:
                scores, found = _scan(loaded, asked, size)
            else:
                found = [loaded.best(scores[query], size) for query in pending]
            spent = (time.perf_counter() - start) * 1e3
            again = []
            all_ranked = self._rank_shortlists(queries[pending], found, request)
            for query, candidates, ranked in zip(pending, found, all_ranked, strict=True):
                if request.explain:
                    dim = self.stores.config.shortlist_dim
                    ranked = [
                        r._replace(stages=(Stage(dim, r.position + 1, None, spent, size, rounds), *r.stages))
                        for r in ranked
                    ]
                answers[query] = ranked
                # Fewer than asked for are all there are. Some may have been deleted since Chroma read its graph.
                late = len(ranked) < request.k or any(2 * r.position >= size for r in ranked)
                if len(candidates.ids) == size and late:
                    again.append(query)
            if not again or request.plan is not None:
                break
            pending, size = again, 2 * size
            start = time.perf_counter()
        return [answers[query] for query in range(len(queries))]

    def _rank_shortlists(
        self, queries: Float32Array, shortlists: Sequence[Candidates], request: Request
    ) -> Iterator[list[Ranked]]:
        """Rank each query's candidates; positions are those among all its candidates."""
        for start in range(0, len(queries), _RERANK_BATCH):
            part = slice(start, start + _RERANK_BATCH)
            kept = [self._cut_by_bits(*pair, request.k) for pair in zip(queries[part], shortlists[part], strict=True)]
            asked = [id_ for candidates in kept for id_ in candidates.ids]
            slots = [candidates.slots for candidates in kept if candidates.slots is not None]
            known = np.concatenate(slots) if len(slots) == len(kept) else None
            found, vectors = self.stores.full_vectors(asked, known)
            row_of = {} if len(found) == len(asked) else {id_: row for row, id_ in enumerate(found)}
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
        """Where the archive keeps sign bits, leave the best candidates by these."""
        ids = candidates.ids
        read = self.stores.archive.read_bits(ids)
        if read is None:
            return candidates
        found, bits = read
        keep = max(len(ids) // _BITS_KEEP, 4 * k)
        scores = score_bits(query, bits)
        best = _best(scores, range(len(found)), found, keep)
        # What has no bits has no full vector either: `Stores.full_vectors` warns of it.
        return Candidates([*(set(ids) - set(found)), *(id_ for _, id_, _ in best)])

    def _ask(self, asked: Float32Array, size: int, request: Request) -> list[list[str]]:
        """Return candidate ids per query, nearest first."""
        from chromadb.errors import InternalError

        shortlist, where, where_document = self.stores.shortlist, request.where, request.where_document
        try:
            found = shortlist.search(asked, size, where, where_document)
        except InternalError:
            # Of a record that meets the condition and that its graph doesn't have.
            missed = self._missed_transactions()
            if missed > 1:
                raise GraphOutdated from None
            if not missed:
                raise
            return [shortlist.ids(where, where_document)] * len(asked)
        fewest = min(map(len, found))
        if where is None and where_document is None:
            total = self.stores.count() if fewest < size else fewest
            if total > fewest and total > _MAX_SCANNED:
                raise TwoStageIndexError(
                    f"Chroma finds {fewest} of the {total} records of collection {shortlist.name!r}: its graph has "
                    "lost the others. Call repair(), which rebuilds it from the archive."
                )
            # Lost, or written since the search.
            return [shortlist.ids(None, None)] * len(found) if total > fewest else found
        # Under a condition Chroma's approximate search can come back with too few.
        total = self.stores.count() if fewest < request.k else 0
        while min(map(len, found)) < request.k and size < total:
            size *= 4
            found = shortlist.search(asked, min(size, total), where, where_document)
        if min(map(len, found)) < request.k:
            everything = shortlist.ids(where, where_document)
            found = [ids if len(ids) >= request.k else everything for ids in found]
        return found
