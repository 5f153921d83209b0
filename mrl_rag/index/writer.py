"""The order in which the two stores are written, and what a crash in between leaves.

Archive first, Chroma second: a crash leaves a vector without a record, which no search returns. A vector that replaces
another is staged, and committed when Chroma has the new record: a crash leaves the old record with its own vector, and
`recover` finishes or undoes the replacement. Deletions go the other way: Chroma first.
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
    """Say whether a record is not there, or there with another document or other metadata."""
    return stored is None or stored != (document, dict(metadata or {}))


def upsert(
    stores: Stores,
    ids: list[str],
    vectors: Float32Array,
    documents: Sequence[str | None],
    metadatas: Sequence[Metadata],
) -> None:
    """Store one batch of records, leaving those that are stored as they are.

    Args:
        stores: where.
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
    stores.archive.write(ids, vectors, documents, staged)
    # What Chroma gets is made of what the archive has: filled from it again, Chroma comes out the same.
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
    """Return the rows that aren't stored already as they are: writing the others again would change nothing."""
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
    """Remove records; unknown ids are passed over."""
    for batch in stores.shortlist.batches(list(dict.fromkeys(ids))):
        stores.shortlist.delete(batch)
        stores.archive.delete(batch)
        stores.note_written()


def recover(stores: Stores) -> None:
    """Commit or forget the vectors that an interrupted writer left staged, by which record Chroma has."""
    ids, vectors = stores.archive.staged()
    if not ids:
        return
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
    """Return what Chroma searches, float32 [shortlist_dim] per id; ids of which it can't be read are left out."""
    try:
        return stores.shortlist.shortlist_vectors(ids)
    except TwoStageIndexError:
        if len(ids) == 1:
            return {}
        half = len(ids) // 2
        return readable_vectors(stores, ids[:half]) | readable_vectors(stores, ids[half:])


def sampled_vectors(stores: Stores, size: int) -> tuple[list[str], Float32Array]:
    """Return up to `size` ids of the archive, spread over all of them, and their vectors, float32 [n, full_dim]."""
    ids = [id_ for page in stores.archive.ids() for id_ in page]
    chosen = np.random.default_rng(0).permutation(len(ids))[:size]
    names = sorted(ids[row] for row in chosen)
    return stores.archive.read(sorted(set(names) - stores.archive.damaged(names)))
