"""The archive on a server: a second Chroma collection, which all clients share."""

from __future__ import annotations

import uuid
from collections.abc import Container, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mrl_rag.errors import ArchiveError
from mrl_rag.index.archive import Slots, document_hash
from mrl_rag.index.checks import Metadata
from mrl_rag.index.shortlist import Limits
from mrl_rag.truncation import Float32Array

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection


class ChromaArchive:
    """An archive in a second Chroma collection, for servers and clients in memory. Vectors are float32.

    Ids of its records are "vector:<id>", "staged:<id>" and "rotation:<name>:<axis>". A call may take several requests,
    so it is not atomic.

    Args:
        client: any chromadb client.
        name: the collection's name.
        full_dim: length of a vector.
        create: whether to make the collection, unless another client has; otherwise it must exist.

    Attributes:
        created: whether this object made the collection.

    Raises:
        ArchiveError: the collection is missing.
    """

    def __init__(self, client: ClientAPI, name: str, full_dim: int, create: bool) -> None:
        from chromadb.errors import NotFoundError

        self._full_dim = full_dim
        self._limits = Limits.of(client)
        creator = uuid.uuid4().hex
        try:
            self._collection: Collection = (
                client.get_or_create_collection(
                    name,
                    configuration={"hnsw": {"space": "cosine"}},
                    metadata={"creator": creator},
                    embedding_function=None,
                )
                if create
                else client.get_collection(name, embedding_function=None)
            )
            self.created = (self._collection.metadata or {}).get("creator") == creator
        except NotFoundError as error:
            raise ArchiveError(
                f"the archive of full vectors, collection {name!r}, is missing. "
                "Restore it from a backup, or fill a new collection."
            ) from error

    def __len__(self) -> int:
        """See `Archive.__len__`."""
        return len(self._keys("vector"))

    @property
    def version(self) -> None:
        """See `Archive.version`."""

    def write(
        self,
        ids: Sequence[str],
        vectors: Float32Array,
        documents: Sequence[str | None],
        staged: Container[str] = (),
        removed_for_now: Mapping[str, Metadata] = MappingProxyType({}),
    ) -> None:
        """See `Archive.write`; `removed_for_now` isn't kept."""
        for kind, is_staged in (("vector", False), ("staged", True)):
            rows = [row for row, id_ in enumerate(ids) if (id_ in staged) == is_staged]
            hashes = [document_hash(documents[row]) for row in rows]
            self._upsert(kind, [ids[row] for row in rows], vectors[rows], hashes)

    def staged_metadata(self) -> dict[str, Metadata]:
        """See `Archive.staged_metadata`: none is kept."""
        return {}

    def staged(self) -> tuple[list[str], Float32Array]:
        """See `Archive.staged`."""
        ids, vectors, _ = self._staged()
        return ids, vectors

    def commit_staged(self, ids: Sequence[str], accepted: Container[str]) -> None:
        """See `Archive.commit_staged`."""
        staged, vectors, hashes = self._staged()
        rows = [row for row, id_ in enumerate(staged) if id_ in accepted]
        self._upsert("vector", [staged[row] for row in rows], vectors[rows], [hashes[row] for row in rows])
        self._delete("staged", ids)

    def slots(self, ids: Sequence[str]) -> Slots:
        """See `Archive.slots`: a Chroma collection has no slots."""
        return np.full(len(ids), -1, dtype=np.int64)

    def read(self, ids: Sequence[str], slots: Slots | None = None) -> tuple[list[str], Float32Array]:
        """See `Archive.read`.

        Raises:
            ArchiveError: the vectors have another length.
        """
        rows = self._embeddings("vector", ids)
        found = [id_ for id_ in ids if id_ in rows]
        return found, np.stack([rows[id_] for id_ in found]) if found else np.empty((0, self._full_dim), np.float32)

    def changes(self, since: int) -> tuple[list[str], bool]:
        """See `Archive.changes`: changes are not logged."""
        return [], False

    def read_bits(self, ids: Sequence[str]) -> None:
        """See `Archive.read_bits`: none are stored."""

    def damaged(self, ids: Sequence[str]) -> set[str]:
        """See `Archive.damaged`: there are no checksums."""
        return set()

    def document_hashes(self, ids: Sequence[str]) -> dict[str, bytes | None]:
        """See `Archive.document_hashes`."""
        known: dict[str, bytes | None] = {}
        for part in self._limits.batches(list(dict.fromkeys(ids))):
            answer = self._collection.get(ids=[f"vector:{id_}" for id_ in part], include=["metadatas"])
            for key, metadata in zip(answer["ids"], answer["metadatas"] or [], strict=True):
                known[key.removeprefix("vector:")] = _hash_in(metadata)
        return known

    def unchanged(self, ids: Sequence[str], vectors: Float32Array) -> set[str]:
        """See `Archive.unchanged`."""
        given = dict(zip(ids, vectors, strict=True))
        staged: set[str] = set()
        for part in self._limits.batches(ids):
            found = self._collection.get(ids=[f"staged:{id_}" for id_ in part], include=[])["ids"]
            staged.update(key.removeprefix("staged:") for key in found)
        # Chroma normalizes vectors again, which may change the last digit.
        same = (
            id_ for id_, row in zip(*self.read(ids), strict=True) if np.allclose(row, given[id_], rtol=0, atol=1e-6)
        )
        return set(same) - staged

    def as_stored(self, vectors: Float32Array) -> Float32Array:
        """See `Archive.as_stored`."""
        return vectors

    def ids(self) -> Iterator[list[str]]:
        """See `Archive.ids`."""
        found = self._keys("vector")
        if found:
            yield sorted(found)

    def delete(self, ids: Sequence[str]) -> None:
        """See `Archive.delete`."""
        self._delete("vector", ids)

    def save_rotation(self, name: str, rotation: Float32Array) -> None:
        """See `Archive.save_rotation`: a record per axis."""
        axes = [f"{name}:{axis}" for axis in range(len(rotation))]
        self._upsert("rotation", axes, np.ascontiguousarray(rotation.T), [None] * len(axes))

    def load_axes(self, name: str, count: int) -> Float32Array:
        """See `Archive.load_axes`.

        Raises:
            ArchiveError: axes are missing.
        """
        names = [f"{name}:{axis}" for axis in range(count)]
        axes = self._embeddings("rotation", names)
        if len(axes) != count:
            raise ArchiveError(
                f"the rotation in {self._collection.name!r} has {len(axes)} of {count} axes. Call repair(), "
                "which fits a new one from the archive."
            )
        return np.ascontiguousarray(np.stack([axes[name] for name in names]).T)

    def drop_rotations(self, but: Sequence[str]) -> None:
        """See `Archive.drop_rotations`."""
        kept = tuple(f"{name}:" for name in but)
        self._delete("rotation", [key for key in self._keys("rotation") if not key.startswith(kept)])

    def close(self) -> None:
        """See `Archive.close`."""

    def _upsert(self, kind: str, ids: Sequence[str], vectors: Float32Array, hashes: Sequence[bytes | None]) -> None:
        for part in self._limits.batches(range(len(ids))):
            self._collection.upsert(
                ids=[f"{kind}:{ids[row]}" for row in part],
                embeddings=vectors[part[0] : part[-1] + 1],
                metadatas=[{"kind": kind, "document_hash": (hashes[row] or b"").hex()} for row in part],
            )

    def _embeddings(self, kind: str, ids: Sequence[str]) -> dict[str, Float32Array]:
        """Return the vectors of the records of one kind by id, float32 [full_dim] each; unknown ids are left out."""
        found: dict[str, Float32Array] = {}
        for part in self._limits.batches(list(dict.fromkeys(ids))):
            answer = self._collection.get(ids=[f"{kind}:{id_}" for id_ in part], include=["embeddings"])
            found |= {key.removeprefix(f"{kind}:"): vector for key, vector, _ in self.parsed(answer)}
        return found

    def parsed(self, answer: Any) -> Iterator[tuple[str, Float32Array, bytes | None]]:
        """Yield id, vector (float32 [full_dim]) and document hash of an answer's records, as the collection has them.

        Raises:
            ArchiveError: the vectors have another length.
        """
        if not answer["ids"]:
            return
        vectors = np.asarray(answer["embeddings"], dtype=np.float32)
        if vectors.shape[1] != self._full_dim:
            raise ArchiveError(
                f"the archive {self._collection.name!r} holds {vectors.shape[1]}-number vectors, not {self._full_dim}. "
                "Restore it from a backup, or fill a new collection."
            )
        metadatas = answer["metadatas"] or [None] * len(vectors)
        yield from zip(answer["ids"], vectors, map(_hash_in, metadatas), strict=True)

    @property
    def collection(self) -> Collection:
        """The collection itself."""
        return self._collection

    def _staged(self) -> tuple[list[str], Float32Array, list[bytes | None]]:
        ids: list[str] = []
        vectors = [np.empty((0, self._full_dim), dtype=np.float32)]
        hashes: list[bytes | None] = []
        for part in self._limits.batches(self._keys("staged")):
            answer = self._collection.get(ids=[f"staged:{id_}" for id_ in part], include=["embeddings", "metadatas"])
            ids += (key.removeprefix("staged:") for key in answer["ids"])
            vectors.append(np.asarray(answer["embeddings"], dtype=np.float32).reshape(-1, self._full_dim))
            hashes += map(_hash_in, answer["metadatas"] or [])
        return ids, np.concatenate(vectors), hashes

    def _keys(self, kind: str) -> list[str]:
        return [key.removeprefix(f"{kind}:") for key in self._limits.matching(self._collection, {"kind": kind})]

    def _delete(self, kind: str, ids: Sequence[str]) -> None:
        for part in self._limits.batches(ids):
            self._collection.delete(ids=[f"{kind}:{id_}" for id_ in part])


def _hash_in(metadata: Any) -> bytes | None:
    return bytes.fromhex(str((metadata or {}).get("document_hash") or "")) or None
