"""The Chroma client for a store, from the arguments that `langchain_chroma` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrl_rag.errors import InvalidInput

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.config import Settings


def connect(
    client: ClientAPI | None,
    *,
    persist_directory: str | None,
    host: str | None,
    port: int | None,
    ssl: bool,
    headers: dict[str, str] | None,
    chroma_cloud_api_key: str | None,
    tenant: str | None,
    database: str | None,
    client_settings: Settings | None,
) -> ClientAPI | None:
    """Return `client`, or a client made from the other arguments; None for a plain folder, or memory.

    Raises:
        InvalidInput: more than one place is given, or Chroma Cloud without `tenant` or `database`.
    """
    import chromadb
    from chromadb.config import DEFAULT_DATABASE, DEFAULT_TENANT, Settings

    places = {
        "client": client,
        "persist_directory": persist_directory,
        "host": host,
        "chroma_cloud_api_key": chroma_cloud_api_key,
    }
    named = [name for name, value in places.items() if value is not None]
    if len(named) > 1:
        raise InvalidInput(
            f"{' and '.join(named)} are given together; a collection is in one place, so pass one of them."
        )
    if client is not None:
        return client
    place = {"tenant": tenant or DEFAULT_TENANT, "database": database or DEFAULT_DATABASE}
    # A copy, because chromadb changes the settings it is given.
    settings = client_settings.model_copy() if client_settings else Settings()
    if host is not None:
        return chromadb.HttpClient(host, port or 8000, ssl, headers, settings, **place)
    if chroma_cloud_api_key is not None:
        if not tenant or not database:
            raise InvalidInput(f"tenant is {tenant!r} and database {database!r}; Chroma Cloud needs both.")
        return chromadb.CloudClient(tenant, database, chroma_cloud_api_key, settings)
    if client_settings is None and tenant is None and database is None:
        return None
    if persist_directory is not None:
        # Absolute, because Chroma would resolve the path again after a change of the working directory.
        return chromadb.PersistentClient(Path(persist_directory).expanduser().resolve(), settings, **place)
    return chromadb.Client(settings, **place)


def check_metric(collection_metadata: Mapping[str, Any] | None, configuration: Mapping[str, Any] | None) -> None:
    """Accept settings that ask for cosine, which a two-stage index has anyway; refuse all others.

    Args:
        collection_metadata: None or {"hnsw:space": "cosine"}.
        configuration: None or {"hnsw": {"space": "cosine"}}.

    Raises:
        InvalidInput: another metric, or another setting.
    """
    for name, given, cosine in (
        ("collection_metadata", collection_metadata, {"hnsw:space": "cosine"}),
        ("collection_configuration", configuration, {"hnsw": {"space": "cosine"}}),
    ):
        if given and given != cosine:
            raise InvalidInput(
                f"{name} is {given!r}; the metric of a two-stage index is cosine, and its collection's metadata is its "
                "own. Leave it out; `store.index.reindex(hnsw={...})` changes the settings of the graph."
            )
