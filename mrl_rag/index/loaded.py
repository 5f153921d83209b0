"""An archive's vectors in memory, which each search brings up to date with what any process wrote since."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import zipfile
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import simsimd

from mrl_rag.index.archive import Slots
from mrl_rag.index.storage import Stores
from mrl_rag.quantization import Codes, quantize, rounding_errors
from mrl_rag.truncation import Float32Array, unit_rows

Number = TypeVar("Number", np.int8, np.float32)

# Vectors read at a time.
_PAGE = 5000
# Where more than one row in this many is of a record that was replaced or deleted, all are read again.
_MOST_REMOVED = 4
# Once one record in this many has changed, what is in memory is saved again.
_MOST_UNSAVED = 10
# By how much sums of float32 may be off.
_ARITHMETIC = 1e-5
# Scores of which only the highest is looked at first.
_BLOCK = 128


class Candidates(NamedTuple):
    """What stage one hands on for a query.

    Attributes:
        ids: n ids, best first.
        slots: int64 [n], where the archive had their rows; None where that isn't known.
    """

    ids: Sequence[str]
    slots: Slots | None = None


@dataclass(frozen=True, eq=False)
class LoadedVectors:
    """The records of one moment.

    Attributes:
        version: of the archive.
        ids: of the n rows, and after them perhaps of rows that later moments have.
        codes: the vectors in eight bits per number, int8 [n, d].
        scales: float32 [n], by which the codes are multiplied.
        full: the vectors themselves, float32 unit rows [n, full_dim]; None where the codes are of the shortlist's.
        error: the largest distance of one of these from its codes.
        slots: int64 [n], where the archive has the full vectors; empty where nobody asks for that.
        removed: int [m], rows of records that were replaced or deleted.
    """

    version: int
    ids: list[str]
    codes: Codes
    scales: Float32Array
    full: Float32Array | None
    error: float = 0.0
    slots: Slots = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    removed: npt.NDArray[np.intp] = field(default_factory=lambda: np.empty(0, dtype=np.intp))

    def __len__(self) -> int:
        """Return how many records there are."""
        return len(self.codes) - len(self.removed)

    def scores(self, query: Float32Array) -> Float32Array:
        """Return about the cosine of a unit query, float32 [d], with each row, float32 [n]; -inf where removed."""
        return self._scores(*quantize(query[None]))

    def _scores(self, codes: Codes, scales: Float32Array) -> Float32Array:
        if not len(self.codes):
            return np.empty(0, dtype=np.float32)
        # Not a product by NumPy: OpenBLAS shares it out to all cores and waits for the last one. That is quick where
        # they are idle, and took 9 ms instead of 0.4 where other programs kept them busy.
        found: Float32Array = np.asarray(simsimd.cdist(codes, self.codes, metric="dot", out_dtype="float32"))[0]
        found *= self.scales
        found *= scales
        if len(self.removed):
            found[self.removed] = -np.inf
        return found

    def among_best(self, query: Float32Array, k: int) -> npt.NDArray[np.intp]:
        """Return rows, int [m], among which are the k nearest to a unit query, float32 [full_dim]."""
        codes, scales = quantize(query[None])
        scores = self._scores(codes, scales)
        # By so much at most does a score differ from the cosine: by Cauchy and Schwarz, for the rounding of both sides.
        ours = float(rounding_errors(query[None], codes, scales)[0])
        margin = self.error + ours * (1 + self.error) + _ARITHMETIC
        return np.flatnonzero(scores >= np.partition(scores, -k)[-k] - 2 * margin)

    def best(self, scores: Float32Array, size: int) -> Candidates:
        """Return the `size` best by their scores, float32 [n], best first; all where there are fewer."""
        size = min(size, len(self))
        if not size:
            return Candidates([])
        rows = _highest(scores, size)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        return Candidates([self.ids[row] for row in rows.tolist()], self.slots[rows])

    def without(self, ids: Container[str]) -> LoadedVectors:
        """Return the same without some records."""
        rows = [row for row in range(len(self.codes)) if self.ids[row] in ids]
        return replace(self, removed=np.union1d(self.removed, rows).astype(np.intp))


class Loader:
    """Loads the vectors of an index, at full length or as its shortlist has them.

    What the shortlist has is also saved in the folder: reading and projecting every full vector takes 1 s for 100,000.

    Args:
        stores: of the index; their archive has a `version`.
    """

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._lock = threading.Lock()
        self._loaded: LoadedVectors | None = None
        self._row_of: dict[str, int] | None = None
        # What was handed out of it is never written again: another thread may be reading it.
        self._codes: Codes = np.empty((0, 0), dtype=np.int8)
        self._full: Float32Array | None = None
        self._unsaved = 0

    def load(self, full: bool) -> LoadedVectors:
        """Return every record's vector, at full length or projected to the shortlist's.

        Raises:
            ArchiveError: a record has a damaged vector.
        """
        archive = self._stores.archive
        with self._lock:
            before, version = self._loaded, archive.version
            assert version is not None
            usable = before is not None and (before.full is not None) == full
            if before is not None and usable and before.version == version:
                return before
            if not usable:
                before, self._row_of = None if full else self._saved(), None
            # Nothing, if what follows is interrupted half way.
            self._loaded = None
            if before is None or before.version != version:
                caught_up = None if before is None else self._caught_up(before)
                before = caught_up or self._load_all(full)
            self._loaded = replace(before, version=version)
            if not full and _MOST_UNSAVED * self._unsaved > len(self._loaded):
                self._save(self._loaded)
            return self._loaded

    def load_some(self, ids: Sequence[str]) -> LoadedVectors:
        """Return the full vectors of those of `ids` that are there."""
        found, vectors = self._stores.archive.read(ids)
        rows = unit_rows(vectors)
        codes, scales = quantize(rows)
        error = float(rounding_errors(rows, codes, scales).max(initial=0.0))
        return LoadedVectors(0, found, codes, scales, rows, error)

    def _caught_up(self, before: LoadedVectors) -> LoadedVectors | None:
        """Put in what was written since; None where that isn't known, or little of `before` is left."""
        changed, complete = self._stores.archive.changes(before.version)
        if not complete or len(before.removed) > len(before.codes) // _MOST_REMOVED:
            return None
        loaded = before
        for start in range(0, len(changed), _PAGE):
            part = changed[start : start + _PAGE]
            loaded = self._append(loaded, *self._stores.archive.read(part), gone=part)
        return loaded

    def _load_all(self, full: bool) -> LoadedVectors:
        # Chroma's ids, so that a record whose vector is lost is missed, and those that may be on their way to Chroma.
        ids = list(dict.fromkeys([*self._stores.shortlist.ids(None, None), *self._stores.archive.changes(0)[0]]))
        config = self._stores.config
        self._codes = np.empty((len(ids), config.full_dim if full else config.shortlist_dim), dtype=np.int8)
        self._full = np.empty((len(ids), config.full_dim), dtype=np.float32) if full else None
        self._row_of = {}
        none = np.empty(0, dtype=np.float32)
        loaded = LoadedVectors(0, [], self._codes[:0], none, None if self._full is None else self._full[:0])
        for start in range(0, len(ids), _PAGE):
            loaded = self._append(loaded, *self._stores.full_vectors(ids[start : start + _PAGE]))
        return loaded

    def _append(
        self, before: LoadedVectors, ids: Sequence[str], vectors: Float32Array, gone: Sequence[str] = ()
    ) -> LoadedVectors:
        """Return the records with `ids` put in, and those of `gone` that are not among them left out.

        Args:
            before: the latest records.
            ids: n ids.
            vectors: float32 [n, full_dim].
            gone: any ids.
        """
        if self._row_of is None:
            self._row_of = {id_: row for row, id_ in enumerate(before.ids)}
        removed = [self._row_of.pop(id_) for id_ in {*ids, *gone} if id_ in self._row_of]
        count, end = len(before.codes), len(before.codes) + len(ids)
        self._codes = _with_room(self._codes, count, end)
        if self._full is not None:
            self._full = _with_room(self._full, count, end)
        scales, error = before.scales, before.error
        if len(ids):
            rows = unit_rows(vectors) if self._full is not None else self._stores.project(vectors)
            codes, new_scales = quantize(rows)
            self._codes[count:end], scales = codes, np.append(scales, new_scales)
            if self._full is not None:
                self._full[count:end] = rows
                error = max(error, float(rounding_errors(rows, codes, new_scales).max()))
        before.ids.extend(ids)
        self._row_of.update(zip(ids, range(count, end), strict=True))
        self._unsaved += len(ids) + len(gone)
        return replace(
            before,
            codes=self._codes[:end],
            scales=scales,
            slots=np.append(before.slots, self._stores.archive.slots(ids)),
            removed=np.union1d(before.removed, removed).astype(np.intp),
            full=None if self._full is None else self._full[:end],
            error=error,
        )

    def _saved(self) -> LoadedVectors | None:
        """Return what was saved for this rotation and dimension, None where there is none or it is damaged."""
        if self._stores.saved is None:
            return None
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(self._stores.saved) as file:
            about, ids = (json.loads(file[name].tobytes()) for name in ("about", "ids"))
            if (about["rotation"], about["dim"]) == (self._stores.config.rotation, self._stores.config.shortlist_dim):
                self._codes, self._full = file["codes"], None
                return LoadedVectors(about["version"], ids, self._codes, file["scales"], None, slots=file["slots"])
        return None

    def _save(self, loaded: LoadedVectors) -> None:
        path, config = self._stores.saved, self._stores.config
        if path is None:
            return
        self._unsaved = 0
        rows = np.delete(np.arange(len(loaded.codes)), loaded.removed)
        about = _as_bytes({"version": loaded.version, "rotation": config.rotation, "dim": config.shortlist_dim})
        ids = _as_bytes([loaded.ids[row] for row in rows.tolist()])
        # Whoever may not write here reads everything again when it opens the index.
        with suppress(OSError), tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                np.savez(
                    file,
                    about=about,
                    ids=ids,
                    codes=loaded.codes[rows],
                    scales=loaded.scales[rows],
                    slots=loaded.slots[rows],
                )
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def _with_room(buffer: npt.NDArray[Number], used: int, wanted: int) -> npt.NDArray[Number]:
    """Return a buffer of at least `wanted` rows that begins with the first `used` of this one, [n, d]."""
    if wanted <= len(buffer):
        return buffer
    larger = np.empty((wanted + wanted // 2, buffer.shape[1]), dtype=buffer.dtype)
    larger[:used] = buffer[:used]
    return larger


def _as_bytes(value: object) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def _highest(scores: Float32Array, size: int) -> npt.NDArray[np.intp]:
    """Return where the `size` highest scores are, in any order."""
    blocks = len(scores) // _BLOCK
    if blocks <= size:
        return np.argpartition(scores, -size)[-size:]
    # Each of the highest is in one of the `size` blocks with the highest maxima, or in the rest at the end.
    maxima = scores[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
    chosen = np.argpartition(maxima, -size)[-size:]
    rows = np.append(
        (chosen[:, None] * _BLOCK + np.arange(_BLOCK)).ravel(), np.arange(blocks * _BLOCK, len(scores), dtype=np.intp)
    )
    return rows[np.argpartition(scores[rows], -size)[-size:]]
