"""Both halves of an index at work: Chroma and the archive."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mrl_rag.errors import ArchiveError, TwoStageIndexError
from mrl_rag.index.archive import Archive, document_hash
from mrl_rag.index.coarse import NEW, Coarse, Facts, Metadata, Where
from mrl_rag.index.plan import Plan
from mrl_rag.index.rerank import Ranked, Stage, rerank
from mrl_rag.index.rotation import SAMPLE, first_axes, fit, kept_energy
from mrl_rag.quantization import score_bits
from mrl_rag.truncation import Float32Array, check_dim, normalize, truncate

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

# Records that meet a condition and are all scored exactly, where there are no more: that takes about as long as a
# search in Chroma under a condition.
EXACT = 1000
# One in this many candidates, the best by sign bits, is read whole where the archive keeps such; 4 * k at least.
# benchmarks/README.md has the agreement with an exact scan at this share.
_BITS_KEEP = 2
# Queries whose full vectors are read and scored together: these fit a processor's cache.
_TOGETHER = 8
# Records that are all scored exactly where Chroma's search doesn't find as many as it should; more than one batch of a
# writer, so that what is written meanwhile isn't taken for a fault.
_SCANNED = 10_000


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


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One stored record.

    Attributes:
        id: as it was upserted.
        document: its text, None where it has none.
        metadata: what was stored with it; empty where there was none.
        vector: float32 [full_dim], unit length, as exact as the archive keeps it.
    """

    id: str
    document: str | None
    metadata: dict[str, Any]
    vector: Float32Array


class Halves:
    """A collection and its archive, opened.

    Args:
        coarse: Chroma's half.
        archive: the full vectors.
        rotation: float32 [full_dim, full_dim] where it is at hand; otherwise it is read when it is needed.
        graph_fault: what is wrong with the files of Chroma's graph; "" where nothing is.
    """

    def __init__(
        self, coarse: Coarse, archive: Archive, rotation: Float32Array | None = None, graph_fault: str = ""
    ) -> None:
        self.coarse = coarse
        self.archive = archive
        self.facts = coarse.facts
        self.graph_fault = graph_fault
        if rotation is not None:
            self.rotation = rotation

    @cached_property
    def rotation(self) -> Float32Array | None:
        """float32 [full_dim, full_dim]; None where the shortlist keeps the vectors' own coordinates."""
        if self.facts.rotation in ("auto", "none"):
            return None
        return self.archive.load_rotation(self.facts.rotation)

    @cached_property
    def _first_axes(self) -> Float32Array | None:
        return None if self.rotation is None else first_axes(self.rotation, self.facts.shortlist_dim)

    def shortlist(self, vectors: Float32Array) -> Float32Array:
        """Return what Chroma stores or searches: float32 [n, shortlist_dim] of float32 [n, full_dim]."""
        if self._first_axes is None:
            return truncate(vectors, self.facts.shortlist_dim)
        return normalize(vectors @ self._first_axes)

    def upsert(
        self,
        ids: list[str],
        vectors: Float32Array,
        documents: Sequence[str | None],
        metadatas: Sequence[Metadata],
    ) -> None:
        """Store one batch of records; vectors are float32 unit rows [n, full_dim]."""
        # The archive first: a crash in between leaves a row that no search can return. A row that replaces another
        # waits: the crash must not take the old record's vector.
        known = self.archive.known(ids)
        changed = self._changed(known, ids, vectors, documents, metadatas)
        if len(changed) < len(ids):
            ids, vectors = [ids[row] for row in changed], vectors[changed]
            documents, metadatas = [documents[row] for row in changed], [metadatas[row] for row in changed]
        if not ids:
            return
        old = [row for row, id_ in enumerate(ids) if id_ in known]
        new = [row for row, id_ in enumerate(ids) if id_ not in known]
        if new:
            self.archive.write([ids[row] for row in new], vectors[new], [documents[row] for row in new])
        replaced = [ids[row] for row in old]
        if old:
            self.archive.hold(replaced, vectors[old], [documents[row] for row in old])
        # Of what the archive has: Chroma can be filled from it again, and come out the same.
        self.coarse.upsert(ids, self.shortlist(self.archive.rounded(vectors)), documents, metadatas, replaced)
        if old:
            self.archive.settle(replaced, accepted=replaced)

    def _changed(
        self,
        known: Mapping[str, bytes | None],
        ids: list[str],
        vectors: Float32Array,
        documents: Sequence[str | None],
        metadatas: Sequence[Metadata],
    ) -> list[int]:
        """Return the rows that aren't stored already as they are: to write the others again would change nothing."""
        maybe = [
            row
            for row, (id_, document) in enumerate(zip(ids, documents, strict=True))
            if id_ in known and known[id_] == document_hash(document)
        ]
        if not maybe:
            return list(range(len(ids)))
        same = self.archive.unchanged([ids[row] for row in maybe], vectors[maybe])
        stored = {record[0]: record[1:] for record in self.coarse.get([ids[row] for row in maybe if ids[row] in same])}
        return [
            row
            for row, (id_, document, metadata) in enumerate(zip(ids, documents, metadatas, strict=True))
            if stored.get(id_) != (document, dict(metadata))
        ]

    def finish_interrupted(self) -> None:
        """Settle the rows that an interrupted writer left waiting, by which record Chroma has."""
        self.archive.tidy()
        ids, vectors = self.archive.held()
        if not ids:
            return
        stored = self._readable(ids)
        new = dict(zip(ids, self.shortlist(vectors), strict=True))
        damaged = self.archive.damaged(ids)
        found, before = self.archive.read([id_ for id_ in ids if id_ not in damaged])
        old = dict(zip(found, self.shortlist(before), strict=True))
        accepted = [
            id_ for id_ in ids if id_ in stored and (id_ not in old or stored[id_] @ new[id_] >= stored[id_] @ old[id_])
        ]
        self.archive.settle(ids, accepted)

    def full_vectors(self, ids: list[str]) -> tuple[list[str], Float32Array]:
        """Return the ids that still exist and their vectors, float32 [found, full_dim].

        Raises:
            ArchiveError: a record has no row, or a damaged one.
        """
        found, vectors = self.archive.read(ids)
        if len(found) < len(ids):
            # Either another thread deleted them since, or the archive has lost them.
            lost = [record[0] for record in self.coarse.get(sorted(set(ids) - set(found)))]
            if lost:
                raise ArchiveError(
                    f"the archive has no full vector of {len(lost)} records, {lost[0]!r} among them. Upsert them "
                    "again, or bring the archive back from a backup."
                )
        return found, vectors

    def get(
        self, ids: list[str] | None, where: Where | None, where_document: Where | None, limit: int | None
    ) -> list[Record]:
        """Return records; see `TwoStageIndex.get`."""
        if ids is None:
            ids = sorted(self.coarse.ids(where, where_document))
        elif where is not None or where_document is not None:
            matching = set(self.coarse.ids(where, where_document))
            ids = [id_ for id_ in ids if id_ in matching]
        records = {record[0]: record for record in self.coarse.get(ids[:limit])}
        found, vectors = self.full_vectors(list(records))
        vector_of = dict(zip(found, normalize(vectors), strict=True))
        return [Record(*records[id_], vector_of[id_]) for id_ in ids[:limit] if id_ in vector_of]

    def search(
        self,
        queries: Float32Array,
        k: int,
        plan: Plan,
        where: Where | None,
        where_document: Where | None,
        explain: bool,
        within: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """Return the k nearest records a query; see `TwoStageIndex.search`."""
        queries = normalize(queries)
        start = time.perf_counter()
        shortlists, approximate = self._shortlists(queries, k, plan.sizes[0], where, where_document, within)
        trails = [_trail(plan.dims[0], [(id_, None) for id_ in found], start) for found in shortlists if explain]
        if approximate:
            shortlists = self._cut_by_bits(queries, shortlists, max(plan.sizes[0] // _BITS_KEEP, 4 * k), trails)
        ranked: list[list[Ranked]] = []
        for first in range(0, len(queries), _TOGETHER):
            part = slice(first, first + _TOGETHER)
            ranked += self._rerank(queries[part], shortlists[part], plan, k)
        winners = list(dict.fromkeys(hit.id for answer in ranked for hit in answer))
        records = {record[0]: record for record in self.coarse.get(winners)}
        answers = []
        for position, answer in enumerate(ranked):
            trail = trails[position] if explain else {}
            # A record deleted since stage one is no answer any more.
            answers.append([_hit(hit, records[hit.id], trail) for hit in answer if hit.id in records])
        return answers

    def _rerank(self, queries: Float32Array, shortlists: list[list[str]], plan: Plan, k: int) -> list[list[Ranked]]:
        ids, vectors = self.full_vectors(list(dict.fromkeys(id_ for found in shortlists for id_ in found)))
        row = {id_: i for i, id_ in enumerate(ids)}
        candidates = [[row[id_] for id_ in found if id_ in row] for found in shortlists]
        return rerank(queries, candidates, vectors, ids, plan, k, self.rotation if len(plan.dims) > 2 else None)

    def _cut_by_bits(
        self,
        queries: Float32Array,
        shortlists: list[list[str]],
        keep: int,
        trails: list[dict[str, tuple[Stage, ...]]],
    ) -> list[list[str]]:
        """Where the archive keeps sign bits, leave the `keep` best of each shortlist by these."""
        start = time.perf_counter()
        read = self.archive.read_bits(list(dict.fromkeys(id_ for found in shortlists for id_ in found)))
        if read is None:
            return shortlists
        ids, bits = read
        row = {id_: i for i, id_ in enumerate(ids)}
        kept: list[list[str]] = []
        for position, (query, found) in enumerate(zip(queries, shortlists, strict=True)):
            # What has no bits has no full vector either, and whoever reads that will say so.
            lost = [id_ for id_ in found if id_ not in row]
            there = [id_ for id_ in found if id_ in row]
            scores = score_bits(query, bits[[row[id_] for id_ in there]]).tolist()
            best = sorted(zip(there, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))[:keep]
            kept.append([*lost, *(id_ for id_, _ in best)])
            if trails:
                stages = _trail(self.facts.full_dim, best, start)
                trails[position] = {id_: (*trails[position][id_], *stages.get(id_, ())) for id_ in kept[-1]}
        return kept

    def _shortlists(
        self,
        queries: Float32Array,
        k: int,
        size: int,
        where: Where | None,
        where_document: Where | None,
        within: Sequence[str] | None,
    ) -> tuple[list[list[str]], bool]:
        """Return the candidates a query, and whether there may be nearer records than these."""
        if within is not None:
            unconditional = where is None and where_document is None
            met = set(within if unconditional else self.coarse.ids(where, where_document))
            return [[id_ for id_ in within if id_ in met]] * len(queries), False
        asked = self.shortlist(queries)
        if where is None and where_document is None:
            found = self.coarse.search(asked, size, None, None)
            least = min(map(len, found))
            total = self.coarse.count() if least < size else least
            if total > least and total > _SCANNED:
                raise TwoStageIndexError(
                    f"Chroma finds {least} of the {total} records of collection {self.coarse.name!r}: its graph has "
                    "lost the others. Call repair(), which rebuilds it from the archive."
                )
            # Lost, or written since the search.
            return ([self.coarse.ids(None, None)] * len(found), False) if total > least else (found, True)
        matching = self.coarse.ids(where, where_document, limit=EXACT + 1)
        if len(matching) <= EXACT:
            return [matching] * len(queries), False
        found = self.coarse.search(asked, size, where, where_document)
        # Under a condition Chroma's approximate search can come back with too few.
        total = self.coarse.count() if min(map(len, found)) < k else 0
        while min(map(len, found)) < k and size < total:
            size *= 4
            found = self.coarse.search(asked, min(size, total), where, where_document)
        if min(map(len, found)) < k:
            everything = self.coarse.ids(where, where_document)
            found = [ids if len(ids) >= k else everything for ids in found]
        return found, True

    def reindexed(
        self,
        client: ClientAPI,
        shortlist_dim: int | None,
        rotation: Literal["fit", "none"] | None,
        hnsw: Mapping[str, Any] | None,
        progress: bool,
        without: set[str] | None = None,
    ) -> Halves:
        """Fill a new collection from the archive, and give it the old one's name; see `TwoStageIndex.reindex`.

        Args:
            client: the chromadb client both are on.
            shortlist_dim: None keeps it.
            rotation: "fit", "none", or None keeps it.
            hnsw: Chroma's settings of the graph.
            progress: show a bar when standard error is a terminal.
            without: records whose full vector is lost, which keep what Chroma searches, where it can still be read.
        """
        from tqdm import tqdm

        facts = self.facts
        if shortlist_dim is not None:
            facts = replace(facts, shortlist_dim=check_dim(shortlist_dim, facts.full_dim))
        matrix = self.rotation if rotation is None else None
        if rotation == "none":
            facts = replace(facts, rotation="none", energy=0.0)
        elif rotation == "fit":
            facts, matrix = fitted(facts, self._sample())
            self.archive.save_rotation(facts.rotation, matrix)
        elif matrix is not None and shortlist_dim is not None:
            facts = replace(facts, energy=kept_energy(self._sample(), matrix, facts.shortlist_dim))

        coarse = Coarse.create(client, f"{self.coarse.name}{NEW}{uuid.uuid4().hex}", facts, hnsw)
        halves = Halves(coarse, self.archive, matrix)
        ids = self.coarse.ids(None, None)
        lost = without or set()
        with tqdm(total=len(ids), desc="reindex", unit="record", disable=None if progress else True) as bar:
            for batch in coarse.batches(ids):
                records = {record[0]: record for record in self.coarse.get(batch)}
                hidden = next((id_ for id_ in batch if id_ not in records), None)
                if hidden is not None:
                    raise TwoStageIndexError(
                        f"Chroma lists record {hidden!r} of collection {self.coarse.name!r} and doesn't return it: it "
                        "was deleted meanwhile, or chroma.sqlite3 is damaged. The collection is as it was. Try again, "
                        "and if that doesn't help, bring the folder back from a backup."
                    )
                found, vectors = self.full_vectors([id_ for id_ in batch if id_ not in lost])
                shortlist = dict(zip(found, halves.shortlist(vectors), strict=True)) if found else {}
                # With both vectors lost the record stays, and has none: a search that comes upon it raises.
                shortlist |= {id_: np.zeros(facts.shortlist_dim, np.float32) for id_ in batch if id_ in lost}
                shortlist |= self._readable([id_ for id_ in batch if id_ in lost])
                kept = [id_ for id_ in batch if id_ in shortlist]
                if kept:
                    coarse.upsert(
                        kept,
                        np.stack([shortlist[id_] for id_ in kept]),
                        [records[id_][1] for id_ in kept],
                        [records[id_][2] for id_ in kept],
                        replaced=[],
                    )
                bar.update(len(batch))
        coarse.replace(client, self.coarse)
        self.archive.drop_rotations(but=facts.rotation)
        return halves

    def _readable(self, ids: list[str]) -> dict[str, Float32Array]:
        """Return what Chroma searches, float32 [shortlist_dim] an id; ids of which it can't be read are left out."""
        try:
            return self.coarse.shortlist_vectors(ids)
        except TwoStageIndexError:
            if len(ids) == 1:
                return {}
            half = len(ids) // 2
            return self._readable(ids[:half]) | self._readable(ids[half:])

    def _sample(self) -> Float32Array:
        """Return up to SAMPLE vectors of the archive, float32 [n, full_dim], spread over all of them."""
        ids = [id_ for page in self.archive.ids() for id_ in page]
        chosen = ids[:: -(-len(ids) // SAMPLE) or 1]
        sound = sorted(set(chosen) - self.archive.damaged(chosen))
        return self.archive.read(sound)[1]


def _trail(dim: int, ranking: Sequence[tuple[str, float | None]], start: float) -> dict[str, tuple[Stage, ...]]:
    spent = (time.perf_counter() - start) * 1e3
    return {id_: (Stage(dim, rank, score, spent),) for rank, (id_, score) in enumerate(ranking, start=1)}


def _hit(hit: Ranked, record: tuple[str, str | None, dict[str, Any]], trail: Mapping[str, tuple[Stage, ...]]) -> Hit:
    id_, document, metadata = record
    # A copy: the caller's to change, and another hit of the same call may be the same record.
    return Hit(id_, hit.score, document, dict(metadata), (*trail[id_], *hit.stages) if trail else ())


def fitted(facts: Facts, vectors: Float32Array) -> tuple[Facts, Float32Array]:
    """Fit a rotation on float32 [n, full_dim], and return it with the facts that name it."""
    spread = vectors[:: -(-len(vectors) // SAMPLE) or 1]
    matrix = fit(spread)
    energy = kept_energy(spread, matrix, facts.shortlist_dim)
    return replace(facts, rotation=uuid.uuid4().hex, energy=energy), matrix
