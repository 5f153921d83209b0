"""Compares an index's collection with its archive, and tries its search."""

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

# Least cosine between Chroma's vector and the projected full vector. Rounding to float16 costs about 1e-6.
_MIN_COSINE = 1 - 1e-4
# At most so many records are searched for by their own vectors.
_MAX_TRIED = 10_000
# Number and share of them that a sound graph may miss. HNSW is approximate: it misses one record in 100,000 of text and
# one in 300 of nearly equal passages, and Chroma's threads can lose a few of a small graph. The share is what an index
# with a recall of 99% misses. The number counts below 1,000 records: so few are compared without the graph.
_MAX_UNREACHABLE, _MAX_UNREACHABLE_SHARE = 10, 0.01


@dataclass
class Report:
    """What `verify` found. Lists are of ids.

    Attributes:
        records: number of records in Chroma.
        missing: records without a full vector: added through Chroma itself, or the vector was lost.
        damaged: the full vector fails its checksum.
        stale: the document was changed through Chroma itself, so that the full vector is of another text.
        misplaced: Chroma's vector doesn't match the full vector. `repair` rebuilds the collection.
        interrupted: a writer stopped between the two stores. `repair` finishes or undoes the replacement.
        orphaned: full vectors without a record in Chroma. `repair` removes them.
        unreachable: a search by the record's own vector doesn't find it. Chroma's graph is approximate, and can lose
            records when many are replaced. Of more than 10,000 records a sample is tried. `ok` allows ten, or one
            in a hundred; if there are more, `repair` rebuilds the collection. With random vectors every graph loses
            some; `reindex(hnsw={"max_neighbors": 32})` makes a denser graph.
        tried: number of records that were searched for.
        search_broken: Chroma's search raises an error, or misses more than half of the records that were tried, or the
            rotation is lost. `repair` rebuilds the collection.
        chroma_damaged: faults that SQLite finds in Chroma's own file of ids, documents and metadata; "" for none.
            `repair` can't mend it: restore the folder from a backup, or fill a new one.
        new_rotation: "fit" if the rotation is lost, so that `repair` fits another one; otherwise None.
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
        return len(self.unreachable) > max(_MAX_UNREACHABLE, _MAX_UNREACHABLE_SHARE * self.tried)

    @property
    def to_encode(self) -> int:
        """Number of records whose full vector is missing, damaged or stale; `repair(encode=...)` encodes them."""
        return len({*self.missing, *self.damaged, *self.stale})

    @property
    def ok(self) -> bool:
        """Whether there is nothing to repair."""
        lists = self.missing, self.damaged, self.stale, self.misplaced, self.interrupted, self.orphaned
        return not any(lists) and not self.too_many_unreachable and not self.search_broken and not self.chroma_damaged


def verify(stores: Stores) -> Report:
    """Compare both stores record by record, and try the search.

    Raises:
        NotFoundError: the collection was dropped meanwhile.
    """
    report = _compare(stores)
    if not report.ok:
        # While a collection is dropped, Chroma gives fewer records of it, or none.
        with suppress(TwoStageIndexError), chroma_errors():
            stores.shortlist.count()
    return report


def _compare(stores: Stores) -> Report:
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
            # Some may have been deleted meanwhile.
            sound, vectors = archive.read(sound)
            placed = zip(sound, stores.project(vectors), strict=True)
            report.misplaced += [id_ for id_, row in placed if not _same(stored.get(id_), row)]
    known = set(ids)
    if projects and not report.search_broken:
        _try_search(stores, known - set(report.misplaced), report)
    report.orphaned = [id_ for page in archive.ids() for id_ in page if id_ not in known]
    return report


def _projects(stores: Stores) -> bool:
    """Return whether vectors can be projected: the rotation may be lost."""
    try:
        stores.project(np.zeros((1, stores.config.full_dim), dtype=np.float32))
    except ArchiveError:
        return False
    return True


def _try_search(stores: Stores, ids: set[str], report: Report) -> None:
    """Search for some of `ids` by their own vectors."""
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
    """Return Chroma's vectors by id; None if they can't be read."""
    try:
        return stores.shortlist.shortlist_vectors(ids)
    except TwoStageIndexError:
        return None


def _same(stored: Float32Array | None, expected: Float32Array) -> bool:
    if stored is None or len(stored) != len(expected):
        return False
    length = float(np.linalg.norm(stored) * np.linalg.norm(expected))
    # A zero vector has no direction, so it can't be compared.
    return length == 0 or float(stored @ expected) / length >= _MIN_COSINE
