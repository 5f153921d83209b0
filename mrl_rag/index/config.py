"""The settings that an index stores with its collection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from mrl_rag.errors import DimensionMismatch, IndexMismatch
from mrl_rag.heads import MatryoshkaHead

ArchivePrecision: TypeAlias = Literal["float16", "int8", "binary"]

FORMAT = 3
PREFIX = "mrl_rag:"


@dataclass
class Wanted:
    """What the user of an index asks for; None for whatever is stored.

    Attributes:
        full_dim: length of the vectors.
        shortlist_dim: dimension of stage one.
        precision: of the archive.
        model: name of the encoder's model.
        fingerprint: of the encoder.
        rotation: of a new index, "auto" or "none".
        recall: share of the true top 10 that a new index aims at.
        key_orders: the orders of metadata keys that a new index begins with, as `KeyOrders.text`.
        hnsw: settings of a new index's graph, over Chroma's defaults.
        head: what the vectors of a new index have been through; None where it isn't known.
    """

    full_dim: int | None
    shortlist_dim: int | None
    precision: ArchivePrecision | None
    model: str | None
    fingerprint: str | None
    rotation: Literal["auto", "none"]
    recall: float
    key_orders: str = ""
    hnsw: Mapping[str, Any] | None = None
    head: MatryoshkaHead | None = None


@dataclass(frozen=True)
class IndexConfig:
    """The settings of an index, stored in its collection's metadata under keys with the prefix "mrl_rag:".

    Attributes:
        full_dim: length of the vectors in the archive.
        shortlist_dim: length of the vectors in Chroma.
        fingerprint: of the encoder that filled it; "" where none was given.
        model: name of that encoder's model; "" where none was given.
        archive: name of the archive.
        rotation: "auto" until one is fitted, "none" for none, or the name of the fitted one.
        explained_energy: share of the vectors' squared length that the shortlist kept when the rotation was fitted,
            0 to 1.
        precision: of the archive; "float32" where that is a second Chroma collection.
        dim_fixed: whether the user chose `shortlist_dim`.
        shortlist_size: candidates that a search without a plan begins with; 0 as long as none is chosen.
        lists_share: share of the inverted lists that a search in memory begins with, 0 to 1; 0 as long as none is
            chosen.
        target_recall: of the exact top 10, that the choice of dimension and size aims at.
        recall: share that was reached on vectors left out of the fit; 0.0 until it is measured.
        measured_records: number of records when it was measured.
        key_orders: the orders of metadata keys, as `KeyOrders.text`.
        head: name of the head in the archive, where `apply_head` has put one on the vectors; else "".
    """

    full_dim: int
    shortlist_dim: int
    fingerprint: str
    archive: str
    rotation: str = "auto"
    explained_energy: float = 0.0
    precision: Literal["float16", "int8", "binary", "float32"] = "float16"
    dim_fixed: bool = False
    shortlist_size: int = 0
    lists_share: float = 0.0
    target_recall: float = 0.99
    recall: float = 0.0
    measured_records: int = 0
    key_orders: str = ""
    model: str = ""
    head: str = ""

    @property
    def fitted(self) -> bool:
        """Whether the shortlist's vectors are rotated."""
        return self.rotation not in ("auto", "none")

    def as_metadata(self) -> dict[str, Any]:
        """Return the collection's metadata."""
        return {f"{PREFIX}format": FORMAT} | {f"{PREFIX}{key}": value for key, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, name: str, stored: Mapping[str, Any]) -> IndexConfig:
        """Read the settings from a collection's metadata.

        Args:
            name: the collection's, for messages.
            stored: its metadata.

        Raises:
            IndexMismatch: the metadata has another format, or is damaged.
        """
        if stored[f"{PREFIX}format"] != FORMAT:
            raise IndexMismatch(
                f"collection {name!r} has format {stored[f'{PREFIX}format']}; this version of mrl-rag reads format "
                f"{FORMAT}. Fill a new collection, or use the version of mrl-rag that filled this one."
            )
        known = {key: stored[f"{PREFIX}{key}"] for key in cls.__dataclass_fields__ if f"{PREFIX}{key}" in stored}
        dims = known.get("full_dim"), known.get("shortlist_dim")
        texts = known.get("fingerprint"), known.get("archive"), known.get("rotation", "auto")
        if not all(isinstance(dim, int) for dim in dims) or not all(isinstance(text, str) for text in texts):
            raise IndexMismatch(
                f"collection {name!r} is damaged: its metadata {dict(stored)!r} lacks the length of its vectors or the "
                "name of their archive. Restore it from a backup, or fill a new collection."
            )
        return cls(**known)

    def check(self, name: str, wanted: Wanted) -> None:
        """Refuse another encoder, dimension or precision than the stored one.

        Raises:
            DimensionMismatch: a dimension differs.
            IndexMismatch: the fingerprint or the precision differs.
        """
        self.check_encoder(name, wanted.model, wanted.fingerprint)
        if wanted.full_dim not in (None, self.full_dim):
            filled = f"'{self.model}', the model" if self.model else "the model"
            raise DimensionMismatch(
                f"collection {name!r} holds vectors of {self.full_dim} numbers; {wanted.full_dim} were asked for. "
                f"Open it with {filled} that filled it, or fill a new collection."
            )
        if wanted.shortlist_dim not in (None, self.shortlist_dim):
            raise DimensionMismatch(
                f"collection {name!r} is searched at {self.shortlist_dim} dimensions; {wanted.shortlist_dim} were "
                "asked for. Leave shortlist_dim out to open it as it is, or fill a new collection."
            )
        if wanted.precision not in (None, self.precision):
            raise IndexMismatch(
                f"the archive of collection {name!r} is {self.precision}; {wanted.precision} was asked for. Leave "
                "precision out to open it as it is, or fill a new collection."
            )

    def check_follows(self, name: str, before: IndexConfig) -> None:
        """Refuse to go on with other stores than before, if these are of another model.

        Raises:
            IndexMismatch: the model or its fingerprint differs, where both are known.
        """
        if self.archive == before.archive:
            return
        self.check_encoder(name, before.model, before.fingerprint)
        if before.model and self.model and not (before.fingerprint and self.fingerprint) and before.model != self.model:
            raise IndexMismatch(
                f"collection {name!r} was filled by {before.model!r} when it was opened, and by {self.model!r} since. "
                "Open it again with that model."
            )

    def check_encoder(self, name: str, model: str | None, fingerprint: str | None) -> None:
        """Refuse another encoder than the one that filled the collection, where both fingerprints are known.

        Raises:
            IndexMismatch: the fingerprints differ.
        """
        if fingerprint and self.fingerprint and fingerprint != self.fingerprint:
            settings = " with other files, prompts, maximum length or head" if model == self.model else ""
            raise IndexMismatch(
                f"collection {name!r} was filled by {_encoder(self.model, self.fingerprint)}; this is "
                f"{_encoder(model, fingerprint)}{settings}. Open it with the encoder that filled it, or fill a new "
                "collection."
            )


def _encoder(model: str | None, fingerprint: str) -> str:
    return f"{model!r} (fingerprint {fingerprint})" if model else f"an encoder with fingerprint {fingerprint}"
