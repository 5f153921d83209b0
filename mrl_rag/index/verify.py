"""Verification of an index: its collection is compared with its archive, and its search is tried."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mrl_rag.errors import ArchiveError, TwoStageIndexError
from mrl_rag.index.archive import document_hash
from mrl_rag.index.chroma_errors import chroma_errors
from mrl_rag.index.storage import Stores
from mrl_rag.index.writer import sampled_vectors
from mrl_rag.truncation import Float32Array

# Least cosine of Chroma's vector with the one that the archive's projects to. float16 costs about 1e-6.
_MIN_COSINE = 1 - 1e-4
# Records that are searched for by their own vectors, at most: each must find itself.
_MAX_TRIED = 10_000
# Share of them that a sound graph may miss. HNSW is approximate: it missed about one record in 100,000. An index aims
# at 99% recall, and this is a tenth of the rest.
_MAX_UNREACHABLE = 0.001


@dataclass
class Report:
    """What `verify` found, as lists of ids.

    Attributes:
        records: how many records there are.
        missing: Chroma has the record, the archive has no full vector: Chroma has added it by itself, or it was lost.
        damaged: the full vector is not what was written.
        stale: the full vector is of another document: Chroma has changed it by itself.
        misplaced: Chroma's vector doesn't fit the full vector. `repair` rebuilds the collection.
        interrupted: a writer stopped between the two stores. `repair` finishes its work or undoes it.
        orphaned: the archive has a full vector, Chroma has no record. `repair` removes them.
        unreachable: a search with the record's own vector doesn't find it. Chroma's graph is approximate, and can lose
            records when many are replaced. Of more than 10,000 records a sample is tried. `ok` allows one, or one in a
            thousand; with more, `repair` rebuilds the collection. With vectors like noise every graph loses some;
            `reindex(hnsw={"max_neighbors": 32})` makes a denser graph.
        tried: how many records were searched for.
        search_broken: Chroma's search raises, or misses half of the records that are tried; or the rotation is lost.
            `repair` rebuilds the collection.
        chroma_damaged: what SQLite finds wrong with Chroma's own file of ids, documents and metadata; "" for nothing.
            `repair` can't mend it: restore the folder from a backup, or fill a new one.
        new_rotation: "fit" where the rotation is lost and `repair` fits another one.
    """

    records: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    misplaced: list[str] = field(default_factory=list)
    interrupted: list[str] = field(default_factory=list)
    orphaned: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    tried: int = 0
    search_broken: bool = False
    chroma_damaged: str = ""
    new_rotation: Literal["fit"] | None = None

    @property
    def too_many_unreachable(self) -> bool:
        """Whether more records are unreachable than a sound graph may miss."""
        return len(self.unreachable) > max(1.0, _MAX_UNREACHABLE * self.tried)

    @property
    def to_encode(self) -> int:
        """How many records have no sound full vector: `repair(encode=...)` encodes them, or upsert them again."""
        return len({*self.missing, *self.damaged, *self.stale})

    @property
    def ok(self) -> bool:
        """Whether there is nothing to mend."""
        lists = self.missing, self.damaged, self.stale, self.misplaced, self.interrupted, self.orphaned
        return not any(lists) and not self.too_many_unreachable and not self.search_broken and not self.chroma_damaged


def verify(stores: Stores) -> Report:
    """Compare both stores record by record, and try the search."""
    shortlist, archive, report = stores.shortlist, stores.archive, Report()
    try:
        with chroma_errors():
            ids = shortlist.ids(None, None)
    except TwoStageIndexError:
        return Report(search_broken=True)
    projects = _projects(stores)
    if not projects:
        report.search_broken, report.new_rotation = True, "fit"
    report.interrupted = archive.staged()[0]
    report.records = len(ids)
    for batch in shortlist.batches(ids):
        hashes, bad = archive.document_hashes(batch), archive.damaged(batch)
        report.missing += [id_ for id_ in batch if id_ not in hashes]
        report.damaged += [id_ for id_ in batch if id_ in bad]
        sound = [id_ for id_ in batch if id_ in hashes and id_ not in bad]
        records = shortlist.get(sound)
        report.stale += [id_ for id_, (text, _) in records.items() if document_hash(text) != hashes[id_]]
        stored = _shortlist_vectors(stores, batch)
        report.search_broken |= stored is None
        if projects and stored is not None and sound:
            # Some may have been deleted since.
            sound, vectors = archive.read(sound)
            placed = zip(sound, stores.project(vectors), strict=True)
            report.misplaced += [id_ for id_, row in placed if not _same(stored.get(id_), row)]
    if projects and not report.search_broken:
        _try_search(stores, set(ids) - set(report.misplaced), report)
    here = set(ids)
    report.orphaned = [id_ for page in archive.ids() for id_ in page if id_ not in here]
    if report.search_broken:
        # If the collection was dropped meanwhile, this raises NotFoundError: then nothing is broken.
        with suppress(TwoStageIndexError), chroma_errors():
            shortlist.count()
    return report


def _projects(stores: Stores) -> bool:
    """Say whether vectors can be projected: the rotation may be lost."""
    try:
        stores.project(np.zeros((1, stores.config.full_dim), dtype=np.float32))
    except ArchiveError:
        return False
    return True


def _try_search(stores: Stores, ids: set[str], report: Report) -> None:
    """Search for records by their own vectors."""
    found, vectors = sampled_vectors(stores, _MAX_TRIED)
    rows = [row for row, id_ in enumerate(found) if id_ in ids and vectors[row].any()]
    report.tried = len(rows)
    if not rows:
        return
    try:
        with chroma_errors():
            lost = stores.shortlist.unreached([found[row] for row in rows], stores.project(vectors[rows]))
    except TwoStageIndexError:
        report.search_broken = True
        return
    if 2 * len(lost) > len(rows):
        report.search_broken = True
    else:
        report.unreachable = lost


def _shortlist_vectors(stores: Stores, ids: Sequence[str]) -> dict[str, Float32Array] | None:
    """Return Chroma's vectors by id; None where they can't be read."""
    try:
        return stores.shortlist.shortlist_vectors(ids)
    except TwoStageIndexError:
        return None


def _same(stored: Float32Array | None, expected: Float32Array) -> bool:
    if stored is None or len(stored) != len(expected):
        return False
    length = float(np.linalg.norm(stored) * np.linalg.norm(expected))
    # A zero vector has no direction to differ in.
    return length == 0 or float(stored @ expected) / length >= _MIN_COSINE
