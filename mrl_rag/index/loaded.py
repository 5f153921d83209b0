"""The vectors of an index in memory, as int8 codes. Each search first adds what any process has written since."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import zipfile
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mrl_rag.index.archive import Slots
from mrl_rag.index.lists import (
    MIN_LISTED,
    InvertedLists,
    Rows,
    best,
    blocks,
    group,
    leading,
    on_all_cores,
    preselect,
    product,
)
from mrl_rag.index.storage import Stores
from mrl_rag.quantization import Codes, Packed, inner_products, pack, quantize, rounding_errors, unit_codes
from mrl_rag.truncation import Float32Array, unit_rows

Number = TypeVar("Number", np.int8, np.float32)

# Vectors per read of the archive.
_BATCH = 5000
# Share of rows that may be of replaced or deleted records. Above it all vectors are read again.
_MAX_REMOVED_SHARE = 0.25
# Share of records that may have changed since the file was saved. Above it lists are updated, and the file is saved.
_MAX_UNSAVED_SHARE = 0.1
# Once there are so many times the records that the centroids were fitted on, new ones are fitted.
_MAX_GROWTH = 2
# At least so many queries together are compared with all records: a matrix product by all cores takes less time per
# query than their lists one by one (`benchmarks/README.md`). They are taken in groups of at most so many.
_MIN_SCAN, _MAX_SCAN = 16, 128
# Rows of the lists that are preselected per candidate.
_ROWS_KEPT = 16
# Records per matrix product with many queries: 8192 times 100 results are 3.3 MB.
_SCAN_BLOCK = 8192
# A scan of many records keeps what is above the score of some rank in a sample of so many: on average more than wanted
# by this many standard deviations, and at least by this many ranks.
_SAMPLE, _DEVIATIONS, _MIN_RANK = 8192, 4, 4
# Bound on the rounding error of a cosine in float32.
_FLOAT32_ERROR = 1e-5


class Candidates(NamedTuple):
    """The shortlist of one query.

    Attributes:
        ids: n ids, best first.
        slots: int64 [n], their slots in the archive; None if unknown. They may be outdated.
    """

    ids: Sequence[str]
    slots: Slots | None = None

    def without(self, seen: Container[str]) -> Candidates:
        """Return the candidates that are not in `seen`."""
        new = [position for position, id_ in enumerate(self.ids) if id_ not in seen]
        if len(new) == len(self.ids):
            return self
        return Candidates([self.ids[position] for position in new], None if self.slots is None else self.slots[new])


@dataclass(frozen=True, eq=False)
class LoadedVectors:
    """The records at one version of the archive. Later versions share its arrays, and append to `ids`.

    Attributes:
        version: of the archive.
        ids: of the n rows; further ids belong to rows of later versions.
        codes: vectors in eight bits per number, int8 [n, d]; those of the shortlist's vectors are `unit_codes`.
        full: float32 unit rows [n, full_dim]; None where `codes` are of the shortlist's vectors.
        scales: float32 [n], factors of the codes of full vectors; otherwise empty.
        lists: of the first rows, which are in the order of their lists; None without lists.
        first: the first numbers of the rows in lists, int8 [m, f], by which they are preselected; None if they aren't.
        error: largest distance of a vector in `full` from its codes.
        slots: int64 [n], slots of the full vectors in the archive; empty where they are not needed.
        removed: int [m], rows of records that were replaced or deleted.
    """

    version: int
    ids: list[str]
    codes: Codes
    full: Float32Array | None = None
    scales: Float32Array = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    lists: InvertedLists | None = None
    first: Codes | None = None
    error: float = 0.0
    slots: Slots = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    removed: Rows = field(default_factory=lambda: np.empty(0, dtype=np.intp))

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.codes) - len(self.removed)

    @cached_property
    def _kept(self) -> npt.NDArray[np.bool_]:
        kept = np.ones(len(self.codes), dtype=np.bool_)
        kept[self.removed] = False
        return kept

    def scans(self, queries: int, share: float, one_by_one: bool) -> bool:
        """Say whether `nearest` compares so many queries with all rows."""
        return self.lists is None or share >= 1 or (queries >= _MIN_SCAN and not one_by_one)

    @cached_property
    def _sample(self) -> Codes:
        return np.ascontiguousarray(self.codes[:: len(self.codes) // _SAMPLE])

    def nearest(
        self, queries: Float32Array, size: int, share: float, least: int, one_by_one: bool = False
    ) -> list[Rows]:
        """Return the rows nearest to each query by their codes, best first: int [n] each.

        Args:
            queries: float32 unit rows [q, d].
            size: candidates per query at most.
            share: share of the inverted lists to scan, 0 to 1. Rows in no list are always scanned. Sixteen queries
                and more are compared with all rows.
            least: all rows are scanned for a query if these lists give fewer candidates.
            one_by_one: whether sixteen queries and more, too, scan these lists alone.
        """
        codes, _ = quantize(queries)
        if self.scans(len(queries), share, one_by_one):
            parts = blocks(len(codes), _MAX_SCAN)
            return [rows for part in parts for rows in self._scan(codes[part], size)]
        if len(codes) == 1 or self.first is None:
            # Threads would take longer than the few rows of short lists.
            return [self._nearest_in_lists(code, size, share, least) for code in codes]
        return on_all_cores(lambda code: self._nearest_in_lists(code, size, share, least), list(codes))

    def _nearest_in_lists(self, query: Codes, size: int, share: float, least: int) -> Rows:
        assert self.lists is not None
        near = preselect(self.first, self.lists.near(query, share), query, _ROWS_KEPT * size)
        rows = self._without_removed(np.append(near, np.arange(self.lists.size, len(self.codes))))
        found = self._best(rows, product(self.codes, rows, query), size)
        return found if len(found) >= min(size, least) else self._scan(query[None], size)[0]

    def _scan(self, queries: Codes, size: int) -> list[Rows]:
        """Return the nearest of all rows to each query, int8 [q, d]."""
        packed, count = pack(queries), len(queries)
        if count == 1 or len(self.codes) <= 2 * _SAMPLE:
            scores = inner_products(self.codes, packed).T
            kept = self._without_removed(np.arange(len(self.codes)))
            return [self._best(kept, one[kept] if len(self.removed) else one, size) for one in scores]
        # As long as the scores of a block: a comparison by broadcasting takes twice as long.
        lowest = np.tile(self._lowest(packed, size), _SCAN_BLOCK)

        def above(part: slice) -> tuple[Rows, npt.NDArray[np.int32]]:
            scores = inner_products(self.codes[part], packed).ravel()
            found = np.flatnonzero(scores >= lowest[: len(scores)])
            return found + part.start * count, scores[found]

        found = on_all_cores(above, blocks(len(self.codes), _SCAN_BLOCK))
        places, scores = map(np.concatenate, zip(*found, strict=True))
        rows, query = np.divmod(places, count)
        there = np.flatnonzero(self._kept[rows])
        order = there[np.argsort(query[there], kind="stable")]
        parts = np.split(order, np.searchsorted(query[order], np.arange(1, count)))
        return [
            # Too few only by chance, or where many rows were removed.
            self._best(rows[part], scores[part], size) if len(part) >= size else self._scan(queries[[place]], size)[0]
            for place, part in enumerate(parts)
        ]

    def _lowest(self, packed: Packed, size: int) -> npt.NDArray[np.int32]:
        """Return a score per query, int32 [q], that by a sample somewhat more than `size` rows reach."""
        sample = np.ascontiguousarray(inner_products(self._sample, packed).T)
        expected = size * sample.shape[1] / len(self.codes)
        rank = min(int(expected + _DEVIATIONS * expected**0.5) + _MIN_RANK, sample.shape[1])
        return np.partition(sample, -rank, axis=1)[:, -rank]

    def _without_removed(self, rows: Rows) -> Rows:
        return rows[self._kept[rows]] if len(self.removed) else rows

    def _best(self, rows: Rows, scores: npt.NDArray[np.int32], size: int) -> Rows:
        """Return the rows with the highest scores, int32 [n], best first."""
        chosen = best(scores, size)
        return rows[chosen[np.argsort(-scores[chosen], kind="stable")]]

    def candidates(self, rows: Rows) -> Candidates:
        """Return some rows, int [n], as a shortlist."""
        return Candidates([self.ids[row] for row in rows.tolist()], self.slots[rows])

    def among_best(self, query: Float32Array, k: int) -> Rows:
        """Return rows, int [m], that include the k nearest to a unit query, float32 [full_dim]."""
        code, scale = quantize(query[None])
        scores = inner_products(self.codes, pack(code))[:, 0] * (self.scales * scale)
        scores[self.removed] = -np.inf
        # Bound on the difference between a score and the cosine, from the rounding errors of both vectors
        # (Cauchy-Schwarz inequality).
        query_error = float(rounding_errors(query[None], code, scale)[0])
        margin = self.error + query_error * (1 + self.error) + _FLOAT32_ERROR
        return np.flatnonzero(scores >= np.partition(scores, -k)[-k] - 2 * margin)

    def without(self, ids: Container[str]) -> LoadedVectors:
        """Return the records without those of `ids`."""
        rows = [row for row in range(len(self.codes)) if self.ids[row] in ids]
        return replace(self, removed=np.union1d(self.removed, rows).astype(np.intp))


class Loader:
    """Loads the vectors of an index, and keeps them up to date. Any number of threads may call it.

    Vectors at the shortlist's dimension are also saved in the index's folder: reading and projecting all full vectors
    takes 1 s per 100,000.

    Args:
        stores: of the index. The archive must have a `version`.
    """

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._lock = threading.Lock()
        self._loaded: LoadedVectors | None = None
        self._row_of: dict[str, int] | None = None
        # Buffers with room for more rows. Rows in use are never overwritten: another thread may be reading them.
        self._codes: Codes = np.empty((0, 0), dtype=np.int8)
        self._full: Float32Array | None = None
        self._unsaved = 0

    def load(self, full: bool) -> LoadedVectors:
        """Return the vectors of all records.

        Args:
            full: whether at full dimension, or at the shortlist's.

        Raises:
            ArchiveError: a record has a damaged vector.
        """
        with self._lock:
            loaded, version = self._loaded, self._stores.archive.version
            assert version is not None
            if loaded is None or (loaded.full is not None) != full:
                loaded, self._row_of = None if full else self._saved(), None
            elif loaded.version == version:
                return loaded
            # If what follows is interrupted, the next call starts again.
            self._loaded = None
            if loaded is not None and loaded.version != version:
                loaded = self._caught_up(loaded)
            loaded = replace(self._load_all(full) if loaded is None else loaded, version=version)
            if not full and self._unsaved > _MAX_UNSAVED_SHARE * len(loaded):
                loaded, self._unsaved = self._grouped(loaded), 0
                self._save(loaded)
            self._loaded = loaded
            return loaded

    def load_some(self, ids: Sequence[str]) -> LoadedVectors:
        """Return full vectors of some records; unknown ids are left out."""
        found, vectors = self._stores.archive.read(ids)
        rows = unit_rows(vectors)
        codes, scales = quantize(rows)
        error = float(rounding_errors(rows, codes, scales).max(initial=0.0))
        return LoadedVectors(0, found, codes, rows, scales, error=error)

    def _caught_up(self, before: LoadedVectors) -> LoadedVectors | None:
        """Return the records with all later changes; None if not all changes are known, or too many rows are unused."""
        changed, complete = self._stores.archive.changes(before.version)
        if not complete or len(before.removed) > _MAX_REMOVED_SHARE * len(before.codes):
            return None
        loaded = before
        for start in range(0, len(changed), _BATCH):
            part = changed[start : start + _BATCH]
            loaded = self._append(loaded, *self._stores.archive.read(part), gone=part)
        return loaded

    def _load_all(self, full: bool) -> LoadedVectors:
        # Chroma's ids, so that records that have lost their vectors are noticed, and ids that the archive has changed
        # lately, whose records Chroma may not have yet.
        ids = list(dict.fromkeys([*self._stores.shortlist.ids(None, None), *self._stores.archive.changes(0)[0]]))
        config = self._stores.config
        self._codes = np.empty((len(ids), config.full_dim if full else config.shortlist_dim), dtype=np.int8)
        self._full = np.empty((len(ids), config.full_dim), dtype=np.float32) if full else None
        self._row_of = {}
        loaded = LoadedVectors(0, [], self._codes[:0], None if self._full is None else self._full[:0])
        for start in range(0, len(ids), _BATCH):
            loaded = self._append(loaded, *self._stores.full_vectors(ids[start : start + _BATCH]))
        return loaded

    def _append(
        self, before: LoadedVectors, ids: Sequence[str], vectors: Float32Array, gone: Sequence[str] = ()
    ) -> LoadedVectors:
        """Return the records after an upsert of `ids` and a deletion of the other ids in `gone`.

        Args:
            before: the latest records.
            ids: n ids.
            vectors: float32 [n, full_dim].
            gone: any ids, among them those that were deleted.
        """
        if self._row_of is None:
            self._row_of = {id_: row for row, id_ in enumerate(before.ids)}
        removed = [self._row_of.pop(id_) for id_ in {*ids, *gone} if id_ in self._row_of]
        count, end = len(before.codes), len(before.codes) + len(ids)
        self._codes = _with_room(self._codes, count, end)
        if self._full is not None:
            self._full = _with_room(self._full, count, end)
        scales, error = before.scales, before.error
        if len(ids) and self._full is None:
            self._codes[count:end] = unit_codes(self._stores.project(vectors))
        elif len(ids) and self._full is not None:
            rows = self._full[count:end] = unit_rows(vectors)
            codes, new_scales = quantize(rows)
            self._codes[count:end], scales = codes, np.append(scales, new_scales)
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

    def _grouped(self, loaded: LoadedVectors) -> LoadedVectors:
        """Return the records without unused rows, in inverted lists if there are enough of them."""
        kept = np.delete(np.arange(len(loaded.codes)), loaded.removed)
        lists = loaded.lists
        if lists is not None and len(kept) < _MAX_GROWTH * lists.fitted_on:
            listed, new = np.split(kept, [np.searchsorted(kept, lists.size)])
            order, lists = lists.extended(lists.list_of(listed), loaded.codes[new])
            kept = kept[order]
        elif len(kept) >= MIN_LISTED:
            order, lists = group(loaded.codes[kept])
            kept = kept[order]
        self._row_of = None
        ids = [loaded.ids[row] for row in kept.tolist()]
        # A new array: other threads may be reading the old one.
        return self._listed(loaded.version, ids, loaded.codes[kept], loaded.slots[kept], lists)

    def _listed(
        self, version: int, ids: list[str], codes: Codes, slots: Slots, lists: InvertedLists | None
    ) -> LoadedVectors:
        """Return records at the shortlist's dimension, in the order of their lists if there are any."""
        self._codes, self._full = codes, None
        first = None if lists is None else leading(codes)
        return LoadedVectors(version, ids, codes, lists=lists, first=first, slots=slots)

    def _saved(self) -> LoadedVectors | None:
        """Return the saved vectors; None if there are none for this rotation and dimension, or the file is damaged."""
        if self._stores.saved is None:
            return None
        damaged = suppress(OSError, ValueError, KeyError, TypeError, MemoryError, zipfile.BadZipFile)
        # Opened here, because NumPy doesn't close a damaged file that it has opened itself.
        with damaged, self._stores.saved.open("rb") as opened, np.load(opened) as file:
            about, ids = (json.loads(file[name].tobytes()) for name in ("about", "ids"))
            if (about["rotation"], about["dim"]) == (self._stores.config.rotation, self._stores.config.shortlist_dim):
                names = [name for name in file if name.startswith("list_")]
                lists = InvertedLists(**{name[len("list_") :]: file[name] for name in names}) if names else None
                return self._listed(about["version"], ids, file["unit_codes"], file["slots"], lists)
        return None

    def _save(self, loaded: LoadedVectors) -> None:
        """Save records, none of them removed, for the next session."""
        path, config = self._stores.saved, self._stores.config
        if path is None:
            return
        lists: dict[str, Any] = {}
        if loaded.lists is not None:
            lists = {f"list_{one.name}": getattr(loaded.lists, one.name) for one in fields(loaded.lists)}
        # A process that may not write to the folder does without the file.
        with suppress(OSError), tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                np.savez(
                    file,
                    about=_as_bytes(
                        {"version": loaded.version, "rotation": config.rotation, "dim": config.shortlist_dim}
                    ),
                    ids=_as_bytes(loaded.ids),
                    unit_codes=loaded.codes,
                    slots=loaded.slots,
                    **lists,
                )
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def _with_room(buffer: npt.NDArray[Number], used: int, wanted: int) -> npt.NDArray[Number]:
    """Return a buffer [n, d] with n >= `wanted`, whose first `used` rows are those of `buffer`."""
    if wanted <= len(buffer):
        return buffer
    larger = np.empty((wanted + wanted // 2, buffer.shape[1]), dtype=buffer.dtype)
    larger[:used] = buffer[:used]
    return larger


def _as_bytes(value: object) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
