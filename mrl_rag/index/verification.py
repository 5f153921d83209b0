"""What is wrong with an index: Chroma against its archive."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mrl_rag.errors import ArchiveError, TwoStageIndexError
from mrl_rag.index.archive import document_hash
from mrl_rag.index.coarse import chroma_errors
from mrl_rag.index.halves import Halves
from mrl_rag.truncation import Float32Array

# Cosine of what Chroma searches with what the archive's vector says it should be: float16 leaves about 1e-6.
_SAME = 1 - 1e-4
# Records whose own vector is searched for, all or so many of them: each must find itself.
_TRIED = 10_000


@dataclass
class Report:
    """The differences that `verify` found; lists of ids.

    Attributes:
        records: how many were looked at.
        missing: Chroma has the record, the archive has no full vector. Upsert them again.
        damaged: the full vector is not what was written. Upsert them again.
        stale: the full vector is of another document, one changed past this index. Upsert them again.
        misplaced: what Chroma searches doesn't fit the full vector. `repair` fills Chroma anew.
        interrupted: a writer stopped between both halves. `repair` finishes or undoes it.
        orphaned: the archive has a full vector, Chroma no record. `repair` removes them.
        unreachable: a search with the record's own vector doesn't find it: a graph may lose its way to a record when
            many are replaced. `repair` fills Chroma anew. Of more than 10,000 records a sample is tried. Vectors that
            lie like noise can lose some in every graph; `reindex(hnsw={"max_neighbors": 32})` makes a denser one.
        search_broken: Chroma's search raises, or doesn't find half of the records by their own vectors; or the rotation
            is lost. `repair` fills Chroma anew.
        chroma_damaged: what SQLite finds wrong with Chroma's own file of ids, documents and metadata, "" where nothing
            is. `repair` can't mend it: bring the folder back from a backup, or fill a new one.
        new_rotation: "fit" where `repair` has to fit another rotation.
    """

    records: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    misplaced: list[str] = field(default_factory=list)
    interrupted: list[str] = field(default_factory=list)
    orphaned: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    search_broken: bool = False
    chroma_damaged: str = ""
    new_rotation: Literal["fit"] | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        lists = self.missing, self.damaged, self.stale, self.misplaced, self.interrupted, self.orphaned
        return not any(lists) and not self.unreachable and not self.search_broken and not self.chroma_damaged


def verify(halves: Halves) -> Report:
    """Compare both halves record by record, and try the search."""
    report = _compare(halves)
    if report.search_broken and not halves.graph_fault:
        # Chroma says that the collection isn't there where it was dropped meanwhile: then nothing is broken.
        with suppress(TwoStageIndexError), chroma_errors():
            halves.coarse.count()
    return report


def _compare(halves: Halves) -> Report:
    coarse, archive, report = halves.coarse, halves.archive, Report()
    if halves.graph_fault:
        # To let Chroma read it could end the process.
        return Report(search_broken=True)
    try:
        with chroma_errors():
            ids = coarse.ids(None, None)
    except TwoStageIndexError:
        return Report(search_broken=True)
    try:
        turnable = halves.rotation is None or bool(len(halves.rotation))
    except ArchiveError:
        turnable = False
        report.search_broken, report.new_rotation = True, "fit"
    report.interrupted = archive.held()[0]
    report.records = len(ids)
    tried = set(ids[:: max(len(ids) // _TRIED, 1)])
    for batch in coarse.batches(ids):
        known, bad = archive.known(batch), archive.damaged(batch)
        report.missing += [id_ for id_ in batch if id_ not in known]
        report.damaged += [id_ for id_ in batch if id_ in bad]
        sound = [id_ for id_ in batch if id_ in known and id_ not in bad]
        stored = _stored(halves, batch)
        report.search_broken |= stored is None
        report.stale += [id_ for id_, document, _ in coarse.get(sound) if document_hash(document) != known[id_]]
        if turnable and sound:
            # Without those deleted since.
            sound, vectors = archive.read(sound)
            expected = halves.shortlist(vectors)
            if stored is None:
                continue
            placed = [_same(stored.get(id_), row) for id_, row in zip(sound, expected, strict=True)]
            report.misplaced += [id_ for id_, fits in zip(sound, placed, strict=True) if not fits]
            chosen = [row for row, id_ in enumerate(sound) if id_ in tried and placed[row] and expected[row].any()]
            lost = _unreached(halves, [sound[row] for row in chosen], expected[chosen])
            if lost is None or 2 * len(lost) > len(chosen):
                report.search_broken = True
            else:
                report.unreachable += lost
    here = set(ids)
    report.orphaned = [id_ for page in archive.ids() for id_ in page if id_ not in here]
    return report


def _stored(halves: Halves, ids: Sequence[str]) -> dict[str, Float32Array] | None:
    """Return what Chroma searches, None where it can't say."""
    try:
        return halves.coarse.shortlist_vectors(ids)
    except TwoStageIndexError:
        return None


def _same(stored: Float32Array | None, expected: Float32Array) -> bool:
    if stored is None or len(stored) != len(expected):
        return False
    length = float(np.linalg.norm(stored) * np.linalg.norm(expected))
    # A zero vector has no direction to differ in.
    return length == 0 or float(stored @ expected) / length >= _SAME


def _unreached(halves: Halves, ids: list[str], vectors: Float32Array) -> list[str] | None:
    """Return the ids that a search with their own vectors doesn't find, None where it can't be done."""
    try:
        with chroma_errors():
            return halves.coarse.unreached(ids, vectors)
    except TwoStageIndexError:
        return None
