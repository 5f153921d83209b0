"""The Chroma client for a store, from the arguments that `langchain_chroma` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrl_rag.compat.chroma import reaching
from mrl_rag.errors import InvalidInput

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.config import Settings


@dataclass(frozen=True)
class Place:
    """Where a store's collection is; the fields are arguments of `MatryoshkaVectorStore`.

    Raises:
        InvalidInput: more than one place is given, or Chroma Cloud without `tenant` or `database`.
    """

    client: ClientAPI | None
    persist_directory: str | None
    host: str | None
    port: int | None
    ssl: bool
    headers: dict[str, str] | None
    chroma_cloud_api_key: str | None
    tenant: str | None
    database: str | None
    client_settings: Settings | None

    def __post_init__(self) -> None:
        places = ("client", "persist_directory", "host", "chroma_cloud_api_key")
        named = [name for name in places if getattr(self, name) is not None]
        if len(named) > 1:
            raise InvalidInput(
                f"{' and '.join(named)} are given together; a collection is in one place, so pass one of them."
            )
        if self.chroma_cloud_api_key is not None and not (self.tenant and self.database):
            raise InvalidInput(f"tenant is {self.tenant!r} and database {self.database!r}; Chroma Cloud needs both.")

    def connect(self) -> ClientAPI | None:
        """Return the client that was given, or a new one; None for a plain folder, or memory.

        Raises:
            ServerUnavailable: the server can't be reached.
        """
        import chromadb
        from chromadb.config import DEFAULT_DATABASE, DEFAULT_TENANT, Settings

        if self.client is not None:
            return self.client
        # A copy, because chromadb changes the settings it is given.
        settings = self.client_settings.model_copy() if self.client_settings else Settings()
        if self.chroma_cloud_api_key is not None:
            with reaching("Chroma Cloud"):
                return chromadb.CloudClient(self.tenant, self.database, self.chroma_cloud_api_key, settings)
        place = {"tenant": self.tenant or DEFAULT_TENANT, "database": self.database or DEFAULT_DATABASE}
        if self.host is not None:
            with reaching(f"{self.host}:{self.port or 8000}"):
                return chromadb.HttpClient(self.host, self.port or 8000, self.ssl, self.headers, settings, **place)
        if self.client_settings is None and self.tenant is None and self.database is None:
            return None
        if self.persist_directory is not None:
            # Absolute, because Chroma would resolve the path again after a change of the working directory.
            folder = Path(self.persist_directory).expanduser().resolve()
            return chromadb.PersistentClient(folder, settings, **place)
        return chromadb.Client(settings, **place)

    def arguments(self) -> dict[str, Any] | None:
        """Return the arguments that open the place again in another process; None where there are none."""
        if not (self.persist_directory or self.host or self.chroma_cloud_api_key):
            return None
        return {field.name: getattr(self, field.name) for field in fields(self)}


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
