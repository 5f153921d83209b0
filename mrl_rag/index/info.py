"""What an index is, and how many bytes its parts take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IndexInfo:
    """What `TwoStageIndex.info` returns. Bytes are None where the index isn't in a folder.

    Attributes:
        name: the collection's name.
        model: name of the model that filled it; None where that isn't known.
        fingerprint: of the encoder that filled it; None where that isn't known.
        records: number of records.
        full_dim: length of the full vectors; None until it is known.
        shortlist_dim: dimension of stage one; None until it is known.
        rotation: "fit", "auto" or "none", as `TwoStageIndex.rotation`.
        recall: share of the true top 10 that was measured; None until it is.
        precision: of the full vectors: "float16", "int8", "binary", or "float32" on a server.
        kept: names of the old collections that `reencode` has kept.
        unfinished: names of the collections that an interrupted `reencode` has begun to fill.
        chroma_bytes: size of chroma.sqlite3: ids, documents and metadata of all collections in the folder.
        graph_bytes: size of Chroma's graph of this collection.
        vectors_bytes: size of the file of full vectors.
        cache_bytes: size of the saved shortlist, which is made again when it is lost.
    """

    name: str
    model: str | None
    fingerprint: str | None
    records: int
    full_dim: int | None
    shortlist_dim: int | None
    rotation: str
    recall: float | None
    precision: str | None
    kept: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    chroma_bytes: int | None = None
    graph_bytes: int | None = None
    vectors_bytes: int | None = None
    cache_bytes: int | None = None
