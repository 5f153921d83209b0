"""Fills a new collection with other vectors, beside the old one; see `TwoStageIndex.reencode` and `apply_head`.

The new collection's name is made of the old one's and the new encoder, so that a later call finds what an interrupted
one has encoded. Until it takes the old one's name nothing else has changed, and `ShortlistCollection.open` finds it if
the process ends between the two renamings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from mrl_rag.errors import ArchiveError, InvalidTexts, InvalidVectors
from mrl_rag.index.checks import NEXT
from mrl_rag.progress import progress_bar
from mrl_rag.truncation import Float32Array, as_rows, unit_rows

if TYPE_CHECKING:
    from mrl_rag.heads import MatryoshkaHead
    from mrl_rag.index.index import Record, TwoStageIndex

Encode: TypeAlias = Callable[[list[str]], npt.ArrayLike]
TextOf: TypeAlias = "Callable[[Record], str]"

# Documents encoded and committed together: an interruption loses no more than these.
_BATCH = 512
# Ids that a message names.
_MAX_NAMED = 5
# Least cosine of the vectors that one encoder gives for a text at different times, and float16 for one of them.
_SAME = 0.99


def next_name(name: str, model: str | None, fingerprint: str | None) -> str:
    """Return the name of the collection that is filled for an index and a new encoder."""
    return f"{name}{NEXT}{blake2b(repr((name, model, fingerprint)).encode(), digest_size=4).hexdigest()}"


def check_documents_there(source: TwoStageIndex, ids: Sequence[str]) -> None:
    """Raise an error if records have no document.

    Raises:
        InvalidTexts: they have none.
    """
    bare: list[str] = []
    for start in range(0, len(ids), _BATCH):
        records = source.get(ids[start : start + _BATCH], vectors=False)
        bare += [record.id for record in records if record.document is None]
    _refuse_bare(source.name, bare)


def _refuse_bare(name: str, bare: Sequence[str]) -> None:
    if bare:
        shown = ", ".join(map(repr, bare[:_MAX_NAMED])) + (", ..." if len(bare) > _MAX_NAMED else "")
        raise InvalidTexts(
            f"{len(bare)} records of index {name!r} have no document to encode: {shown}. Store them with one, delete "
            "them, or fill a new collection with their vectors of the new model."
        )


class Documents:
    """Makes vectors of records.

    Args:
        encode: makes float [n, full_dim] of n texts.
        text_of: makes the text of a record that has a document; None for the document.

    Attributes:
        head: what the vectors have been through, stored with the new collection; None where it isn't known.
    """

    head: MatryoshkaHead | None = None

    def __init__(self, encode: Encode, text_of: TextOf | None) -> None:
        self._encode = encode
        self._text_of = text_of

    def check(self, source: TwoStageIndex) -> None:
        """Raise an error if vectors can't be made of all records."""
        check_documents_there(source, source.ids())

    def copy(self, source: TwoStageIndex, ids: Sequence[str], target: TwoStageIndex) -> None:
        """Make the target's records with these ids those of the source; encode only texts that it doesn't have."""
        _copy(source.get(ids, vectors=False), target, self)

    def text(self, record: Record) -> str:
        """Return the text to encode."""
        return (record.document or "") if self._text_of is None else self._text_of(record)

    def vectors(self, records: Sequence[Record]) -> Float32Array:
        """Return float32 [n, full_dim].

        Raises:
            InvalidVectors: `encode` gives another number of vectors, or no numbers.
        """
        rows = as_rows(self._encode([self.text(record) for record in records]), "the vectors that `encode` gives")
        if len(rows) != len(records):
            raise InvalidVectors(f"`encode` gives {len(rows)} vectors for {len(records)} texts; give one of each.")
        return rows


class ArchivedVectors(Documents):
    """Makes vectors of those that an index has, by a head. Nothing is encoded, and records need no document.

    Args:
        source: the index.
        head: for its vectors.
    """

    def __init__(self, source: TwoStageIndex, head: MatryoshkaHead) -> None:
        self._source = source
        self.head: MatryoshkaHead = head

    def check(self, source: TwoStageIndex) -> None:
        """Raise no error yet: `copy` finds full vectors that are missing."""

    def vectors(self, records: Sequence[Record]) -> Float32Array:
        """Return float32 [n, full_dim]."""
        return self._mapped(self._source.get([record.id for record in records]))

    def copy(self, source: TwoStageIndex, ids: Sequence[str], target: TwoStageIndex) -> None:
        """Make the target's records with these ids those of the source; `upsert` leaves equal ones alone."""
        records = source.get(ids)
        if records:
            documents, metadatas = [r.document for r in records], [r.metadata for r in records]
            target.upsert([r.id for r in records], self._mapped(records), documents, metadatas)

    def _mapped(self, records: Sequence[Record]) -> Float32Array:
        bare = [record.id for record in records if record.vector is None]
        if bare:
            raise ArchiveError(
                f"{len(bare)} records of index {self._source.name!r} have no full vector, {bare[0]!r} among them. Call "
                "repair(encode=encoder.encode_documents), then apply the head again."
            )
        return self.head.apply(np.array([record.vector for record in records]).reshape(-1, self.head.full_dim))


def goes_on(target: TwoStageIndex, documents: Documents) -> bool:
    """Say whether what an interrupted call has stored is of this encoder, by encoding one record again."""
    for record in target.get(limit=1):
        if record.vector is None:
            return False
        rows = documents.vectors([record])
        return (
            len(rows) > 0 and rows.shape[1] == len(record.vector) and float(unit_rows(rows)[0] @ record.vector) >= _SAME
        )
    return True


def catch_up(source: TwoStageIndex, target: TwoStageIndex, documents: Documents, progress: bool = False) -> None:
    """Make the target's records those of the source; encode only texts that it doesn't have.

    Args:
        source: the index as it is.
        target: the one to fill.
        documents: makes the vectors, and copies records with them.
        progress: whether to show a bar when standard error is a terminal.

    Raises:
        InvalidTexts: a record has no document.
        InvalidVectors: the encoder gives vectors of another number or length.
    """
    ids = source.ids()
    gone = set(target.ids()) - set(ids)
    if gone:
        target.delete(sorted(gone))
    with progress_bar(len(ids), "reencode", "record", progress) as advance:
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            documents.copy(source, batch, target)
            advance(len(batch))


def _copy(records: list[Record], target: TwoStageIndex, documents: Documents) -> None:
    new = target.changed([r.id for r in records], [r.document for r in records], [r.metadata for r in records])
    if not new:
        return
    changed = [records[row] for row in new]
    _refuse_bare(target.name.partition(NEXT)[0], [record.id for record in changed if record.document is None])
    # Those of which only the metadata has changed keep their vectors, if these don't depend on it.
    stored = {record.id: record for record in target.get([record.id for record in changed])}
    vector_of = {
        r.id: before.vector
        for r in changed
        if (before := stored.get(r.id)) is not None
        and before.vector is not None
        and (before.document, documents.text(before)) == (r.document, documents.text(r))
    }
    to_encode = [record for record in changed if record.id not in vector_of]
    if to_encode:
        vector_of |= dict(zip([r.id for r in to_encode], documents.vectors(to_encode), strict=True))
    target.upsert(
        [record.id for record in changed],
        np.stack([vector_of[record.id] for record in changed]),
        [record.document for record in changed],
        [record.metadata for record in changed],
    )
