"""What an index is, and how many bytes its parts take."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mrl_rag.index.documents import vector_segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mrl_rag.index.storage import Stores


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
    recall: float | None = None
    precision: str | None = None
    kept: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    chroma_bytes: int | None = None
    graph_bytes: int | None = None
    vectors_bytes: int | None = None
    cache_bytes: int | None = None


def info_of(stores: Stores, folder: Path | None, kept: Sequence[str], unfinished: Sequence[str]) -> IndexInfo:
    """Return what an index is.

    Args:
        stores: of the index.
        folder: where they are; None on a server.
        kept: as in `IndexInfo`.
        unfinished: as in `IndexInfo`.
    """
    config, sizes = stores.config, {}
    if folder is not None:
        graph = vector_segment(folder, stores.shortlist.id)
        sizes = {
            "chroma_bytes": disk_bytes(folder / "chroma.sqlite3"),
            "graph_bytes": None if graph is None else disk_bytes(folder / graph),
            "vectors_bytes": disk_bytes(folder / f"archive-{config.archive}.lmdb"),
            "cache_bytes": disk_bytes(folder / f"archive-{config.archive}.shortlist.npz"),
        }
    return IndexInfo(
        stores.shortlist.name,
        config.model or None,
        config.fingerprint or None,
        stores.count(),
        config.full_dim,
        config.shortlist_dim,
        "fit" if config.fitted else config.rotation,
        config.recall or None,
        config.precision,
        tuple(kept),
        tuple(unfinished),
        **sizes,
    )


def disk_bytes(path: Path) -> int:
    """Return the size of a file, or of the files in a folder; 0 where there is none."""
    size = 0
    for file in (path, *path.rglob("*")):
        # Another process may have removed it since it was listed.
        with suppress(OSError):
            size += file.stat().st_size if file.is_file() else 0
    return size
