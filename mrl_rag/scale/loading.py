"""Loads shards into an index in a folder or on a Chroma server."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from mrl_rag.compat.chroma import reaching
from mrl_rag.errors import InvalidInput
from mrl_rag.index import TwoStageIndex
from mrl_rag.index.shards import place_of


def load(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str] | TwoStageIndex,
    collection: str = "docs",
    *,
    shortlist_dim: int | None = None,
    progress: bool = False,
) -> int:
    """Store the records of shards, or of a single file that `export` wrote, in an index.

        load("s3://bucket/shards", "./db")
        load("./shards", "http://localhost:8000", shortlist_dim=96)
        load("./shards", TwoStageIndex(client=chromadb.CloudClient()))

    Call it again after an interruption, or when the shards have changed: records that are stored already are compared
    and left alone. So no note of what is done can be wrong, as after a restored backup. See
    `TwoStageIndex.import_records`.

    Args:
        source: a folder or URL that `encode_dataset` or `export` wrote, or a single `.parquet` or `.jsonl` file.
        to: the folder of the index, the URL of a Chroma server, or an index, which stays open.
        collection: its collection, unless an index is given.
        shortlist_dim: of a new index; None for one that it chooses.
        progress: show a bar when standard error is a terminal.

    Returns:
        The number of records in the source.

    Raises:
        ServerUnavailable: the server can't be reached.
        MrlRagError: as `TwoStageIndex.import_records` does.
    """
    if isinstance(to, TwoStageIndex):
        return to.import_records(source, progress)
    # Before the folder of the index is made.
    place_of(source, there=True)
    with _open(os.fspath(to), collection, shortlist_dim) as index:
        return index.import_records(source, progress)


def _open(place: str, collection: str, shortlist_dim: int | None) -> TwoStageIndex:
    if "://" not in place:
        return TwoStageIndex(place, collection, shortlist_dim=shortlist_dim)
    import chromadb

    url = urlsplit(place)
    try:
        if url.scheme not in ("http", "https") or not url.hostname or url.path.strip("/") or url.query:
            raise ValueError("it has another scheme, or a path")
        port = url.port or (443 if url.scheme == "https" else 8000)
    except ValueError as error:
        raise InvalidInput(f"{place} is no Chroma server: {error}. Pass http://HOST:PORT, or a folder.") from error
    with reaching(f"{url.hostname}:{port}"):
        client = chromadb.HttpClient(url.hostname, port, ssl=url.scheme == "https")
    return TwoStageIndex(None, collection, shortlist_dim=shortlist_dim, client=client)
