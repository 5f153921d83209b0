"""Rebuilds the Chroma collection from the archive: for another dimension or rotation, or if its graph is damaged."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mrl_rag.errors import ArchiveError, TwoStageIndexError
from mrl_rag.index.calibration import Questions, fit_shortlist
from mrl_rag.index.config import IndexConfig
from mrl_rag.index.shortlist import NEW, ShortlistCollection
from mrl_rag.index.storage import Storage, Stores
from mrl_rag.index.writer import readable_vectors, sampled_vectors
from mrl_rag.progress import progress_bar
from mrl_rag.rotation import SAMPLE, explained_energy
from mrl_rag.truncation import Float32Array, check_dim


@dataclass(frozen=True)
class Rebuilt:
    """The result of `rebuild`.

    Attributes:
        stores: the new collection and the archive.
        questions: queries for measuring the recall; None if no rotation was fitted, or there are too few records.
        ids: of the records, by the row numbers in `questions`.
    """

    stores: Stores
    questions: Questions | None = None
    ids: tuple[str, ...] = ()


def rebuild(
    storage: Storage,
    stores: Stores,
    shortlist_dim: int | None = None,
    rotation: Literal["fit", "none"] | None = None,
    hnsw: Mapping[str, Any] | None = None,
    progress: bool = False,
    lost: set[str] | None = None,
) -> Rebuilt:
    """Fill a new collection from the archive, and put it in place of the old one; see `TwoStageIndex.reindex`.

    Args:
        storage: where both are.
        stores: the old collection and the archive.
        shortlist_dim: the new dimension. None keeps it; with a new rotation, None chooses one unless it is fixed.
        rotation: "fit", "none", or None to keep it.
        hnsw: settings of Chroma's graph.
        progress: whether to show a bar when standard error is a terminal.
        lost: ids whose full vectors are missing or damaged. They keep Chroma's vectors, where these can be read.
    """
    config, questions = stores.config, None
    ids: list[str] = []
    if rotation is not None or shortlist_dim not in (None, config.shortlist_dim):
        # Measured for another dimension or rotation.
        config = replace(config, shortlist_size=0, lists_share=0.0, recall=0.0, measured_records=0)
    if shortlist_dim is not None:
        config = replace(config, shortlist_dim=check_dim(shortlist_dim, config.full_dim), dim_fixed=True)
    if rotation == "none":
        config = replace(config, rotation="none", explained_energy=0.0)
    elif rotation == "fit":
        ids, config, questions = _fit(stores, config)
    elif config.fitted and shortlist_dim is not None:
        assert stores.rotation is not None
        sample = sampled_vectors(stores, SAMPLE)[1]
        config = replace(config, explained_energy=explained_energy(sample, stores.rotation, shortlist_dim))

    name = f"{stores.shortlist.name}{NEW}{uuid.uuid4().hex}"
    new = storage.stores(ShortlistCollection.create(storage.client, name, config, hnsw), stores.archive)
    _copy(stores, new, lost or set(), progress)
    new.shortlist.replace(stores.shortlist)
    stores.archive.drop_rotations(but=[config.rotation, config.head])
    return Rebuilt(new, questions, tuple(ids))


def _fit(stores: Stores, config: IndexConfig) -> tuple[list[str], IndexConfig, Questions | None]:
    """Fit a rotation on the archive and store it; return the ids by row number, the new settings, and the queries."""
    ids = [id_ for page in stores.archive.ids() for id_ in page]
    damaged = stores.archive.damaged(ids)
    ids = [id_ for id_ in ids if id_ not in damaged]

    def read(rows: np.ndarray[Any, np.dtype[np.intp]]) -> Float32Array:
        return stores.archive.read([ids[row] for row in rows])[1]

    fitted = fit_shortlist(read, len(ids), config.shortlist_dim, config.dim_fixed, config.target_recall)
    config = fitted.applied_to(config)
    stores.archive.save_rotation(config.rotation, fitted.rotation)
    return ids, config, fitted.questions


def _copy(old: Stores, new: Stores, lost: set[str], progress: bool) -> None:
    """Copy all records into the new collection."""
    ids = old.shortlist.ids(None, None)
    with progress_bar(len(ids), "reindex", "record", progress) as advance:
        for batch in new.shortlist.batches(ids):
            records = old.shortlist.get(batch)
            hidden = next((id_ for id_ in batch if id_ not in records), None)
            if hidden is not None:
                raise TwoStageIndexError(
                    f"Chroma lists record {hidden!r} of collection {old.shortlist.name!r}, but doesn't return it: it "
                    "was deleted meanwhile, or chroma.sqlite3 is damaged. The collection is unchanged. Try again; if "
                    "that doesn't help, restore the folder from a backup."
                )
            vectors = _shortlist_vectors(old, new, batch, lost)
            kept = [id_ for id_ in batch if id_ in vectors]
            if kept:
                rows = np.stack([vectors[id_] for id_ in kept])
                documents, metadatas = zip(*(records[id_] for id_ in kept), strict=True)
                new.shortlist.upsert(kept, rows, documents, metadatas, {})
            advance(len(batch))


def _shortlist_vectors(old: Stores, new: Stores, batch: Sequence[str], lost: set[str]) -> dict[str, Float32Array]:
    """Return the new collection's vectors by id, float32 [shortlist_dim] each."""
    found, vectors = old.archive.read([id_ for id_ in batch if id_ not in lost])
    rows = dict(zip(found, new.project(vectors), strict=True)) if found else {}
    missing = [id_ for id_ in batch if id_ not in rows and id_ not in lost]
    if missing:
        there = list(old.shortlist.get(missing))
        if there:
            raise ArchiveError(
                f"{len(there)} records have no full vector, {there[0]!r} among them. Call repair(encode=...), upsert "
                "them again, or restore the archive from a backup."
            )
    # A record that has lost both vectors is kept, with a zero vector.
    rows |= {id_: np.zeros(new.config.shortlist_dim, np.float32) for id_ in batch if id_ in lost}
    readable = readable_vectors(old, [id_ for id_ in batch if id_ in lost])
    return rows | {id_: row for id_, row in readable.items() if len(row) == new.config.shortlist_dim}
