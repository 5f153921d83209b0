"""Writes to both stores, in an order that survives a crash.

An upsert writes to the archive first, then to Chroma. A crash in between leaves a vector without a record, which no
search returns. A vector that replaces another is staged, and committed when Chroma has the new record. A crash in
between leaves the old record with its own vector, and `recover` finishes or undoes the replacement. A deletion removes
the record from Chroma first, then the vector from the archive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mrl_rag.errors import TwoStageIndexError
from mrl_rag.index.archive import document_hash
from mrl_rag.index.checks import Metadata
from mrl_rag.index.shortlist import Stored
from mrl_rag.index.storage import Stores
from mrl_rag.truncation import Float32Array


def differs(stored: Stored | None, document: str | None, metadata: Metadata | None) -> bool:
    """Return whether a record is missing, or stored with another document or other metadata."""
    return stored is None or stored != (document, dict(metadata or {}))


def upsert(
    stores: Stores,
    ids: list[str],
    vectors: Float32Array,
    documents: Sequence[str | None],
    metadatas: Sequence[Metadata],
) -> None:
    """Store one batch of records. Those that are stored already are not written again.

    Args:
        stores: where to write.
        ids: n ids.
        vectors: float32 unit rows [n, full_dim].
        documents: n documents.
        metadatas: n mappings, empty where there is none.
    """
    hashes = stores.archive.document_hashes(ids)
    old = stores.records([id_ for id_ in ids if id_ in hashes]) if hashes else {}
    changed = _changed_rows(stores, ids, vectors, documents, metadatas, hashes, old)
    if not changed:
        return
    ids, vectors = [ids[row] for row in changed], vectors[changed]
    documents, metadatas = [documents[row] for row in changed], [metadatas[row] for row in changed]
    staged = {id_ for id_ in ids if id_ in hashes}
    # Chroma can't drop a document alone: such a record is removed and stored again.
    removed_for_now = {
        id_: metadata
        for id_, document, metadata in zip(ids, documents, metadatas, strict=True)
        if id_ in staged and document is None and old.get(id_, (None,))[0] is not None
    }
    stores.archive.write(ids, vectors, documents, staged, removed_for_now)
    # Project the vectors in the archive's precision, so that a rebuild from the archive gives Chroma the same vectors.
    stores.shortlist.upsert(ids, stores.project(stores.archive.as_stored(vectors)), documents, metadatas, old)
    if staged:
        stores.archive.commit_staged(sorted(staged), staged)
    stores.note_written()


def _changed_rows(
    stores: Stores,
    ids: list[str],
    vectors: Float32Array,
    documents: Sequence[str | None],
    metadatas: Sequence[Metadata],
    hashes: Mapping[str, bytes | None],
    old: Mapping[str, Stored],
) -> list[int]:
    """Return the positions of the records that differ from what is stored."""
    same = {
        id_
        for id_, document, metadata in zip(ids, documents, metadatas, strict=True)
        if id_ in hashes and hashes[id_] == document_hash(document) and not differs(old.get(id_), document, metadata)
    }
    if same:
        rows = [row for row, id_ in enumerate(ids) if id_ in same]
        same = stores.archive.unchanged([ids[row] for row in rows], vectors[rows])
    return [row for row, id_ in enumerate(ids) if id_ not in same]


def delete(stores: Stores, ids: Sequence[str]) -> None:
    """Remove records; unknown ids are ignored."""
    for batch in stores.shortlist.batches(list(dict.fromkeys(ids))):
        stores.shortlist.delete(batch)
        stores.archive.delete(batch)
        stores.note_written()


def recover(stores: Stores) -> None:
    """Finish or undo the replacements that an interrupted upsert left staged.

    A staged vector is committed if Chroma's vector is nearer to it than to the archive's old one: then Chroma has the
    new record. A record that Chroma had removed, to store it again without its document, is stored.
    """
    ids, vectors = stores.archive.staged()
    if not ids:
        return
    removed = stores.archive.staged_metadata()
    missing = [row for row, id_ in enumerate(ids) if id_ in removed.keys() - stores.shortlist.get(list(removed)).keys()]
    if missing:
        names = [ids[row] for row in missing]
        rows = stores.project(vectors[missing])
        stores.shortlist.upsert(names, rows, [None] * len(names), [removed[name] for name in names], {})
    stored = readable_vectors(stores, ids)
    new = dict(zip(ids, stores.project(vectors), strict=True))
    damaged = stores.archive.damaged(ids)
    found, before = stores.archive.read([id_ for id_ in ids if id_ not in damaged])
    old = dict(zip(found, stores.project(before), strict=True)) if found else {}
    accepted = {
        id_ for id_ in ids if id_ in stored and (id_ not in old or stored[id_] @ new[id_] >= stored[id_] @ old[id_])
    }
    stores.archive.commit_staged(ids, accepted)


def readable_vectors(stores: Stores, ids: list[str]) -> dict[str, Float32Array]:
    """Return Chroma's vectors by id, float32 [shortlist_dim] each; unreadable ones are left out."""
    try:
        return stores.shortlist.shortlist_vectors(ids)
    except TwoStageIndexError:
        if len(ids) == 1:
            return {}
        half = len(ids) // 2
        return readable_vectors(stores, ids[:half]) | readable_vectors(stores, ids[half:])


def sampled_vectors(stores: Stores, size: int) -> tuple[list[str], Float32Array]:
    """Return a random sample of up to `size` ids of the archive, and their vectors, float32 [n, full_dim]."""
    ids = [id_ for page in stores.archive.ids() for id_ in page]
    chosen = np.random.default_rng(0).permutation(len(ids))[:size]
    sample = [ids[row] for row in chosen]
    return stores.archive.read(sorted(set(sample) - stores.archive.damaged(sample)))
