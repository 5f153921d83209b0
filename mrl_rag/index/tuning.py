"""The cheapest dimension and plan with which searches reach a target recall, checked on questions held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mrl_rag.errors import InvalidDimension, InvalidInput, InvalidVectors
from mrl_rag.index.calibration import (
    MIN_MEASURED,
    RECALL_MARGIN,
    SHORTLIST_SIZES,
    Questions,
    Ranks,
    ReadRows,
    choose_questions,
    dims_to_try,
    expected_milliseconds,
    find_nearest,
    measure,
    ranks_at,
)
from mrl_rag.index.plan import Plan
from mrl_rag.index.search import Searcher
from mrl_rag.index.storage import Stores
from mrl_rag.intervals import Estimate, estimate
from mrl_rag.rotation import SAMPLE, fit
from mrl_rag.truncation import Float32Array, as_rows, check_dim, unit_rows

# Shortlists that are tried, beside those that an index chooses from by itself.
_LONGER = (200, 400)
# Half of the questions choose, the other half are held out; an interval needs some of them.
_MIN_QUESTIONS = 10


@dataclass(frozen=True)
class Candidate:
    """A way to search an index in two stages.

    Attributes:
        plan: its dimensions and shortlist size.
        recall: of the exact top 10 at full dimension, over the held-out questions: the share in the shortlist by an
            exact scan at the first dimension.
        milliseconds: estimated per query, from times measured at 100,000 records (`benchmarks/README.md`).
    """

    plan: Plan
    recall: Estimate
    milliseconds: float


@dataclass(frozen=True)
class Tuning:
    """What `TwoStageIndex.tune` found.

    Attributes:
        target_recall: that was asked for, 0 to 1.
        candidates: per dimension, ascending, the shortest shortlist that reached the target on the questions that
            choose, or the longest tried.
        chosen: the cheapest of those that reached it; None if none did, or there are too few records to measure.
        held_out: number of questions that the recalls are measured on; they chose nothing.
        asked: "records" of the index, or "queries" that were given.
        measured: recall of the index's own searches for the held-out questions once the choice is applied; None before.
    """

    target_recall: float
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    held_out: int
    asked: str
    measured: Estimate | None = None

    @property
    def plan(self) -> Plan | None:
        """The cheapest plan; None if none was chosen."""
        return None if self.chosen is None else self.chosen.plan

    @property
    def reached(self) -> bool:
        """Whether the mean recall of the choice over the held-out questions is the target or more."""
        return self.chosen is not None and self.chosen.recall.mean >= self.target_recall


@dataclass(frozen=True)
class Records:
    """The records of an index that can be measured.

    Attributes:
        ids: by row number, and "" at the end, for questions that are no records (row -1).
        read: returns float32 [n, full_dim] by ascending row numbers.
    """

    ids: tuple[str, ...]
    read: ReadRows

    @classmethod
    def of(cls, stores: Stores) -> Records:
        """Return the records with a sound full vector."""
        ids = [id_ for page in stores.archive.ids() for id_ in page]
        damaged = set(stores.archive.damaged(ids))
        ids = [id_ for id_ in ids if id_ not in damaged]
        return cls((*ids, ""), lambda rows: stores.archive.read([ids[row] for row in rows])[1])

    def __len__(self) -> int:
        return len(self.ids) - 1


def tune(
    stores: Stores, target_recall: float, queries: object = None, dims: Sequence[int] | None = None
) -> tuple[Tuning, Questions | None, Records]:
    """Choose on one half of the questions, and measure on the other; see `TwoStageIndex.tune`.

    Returns:
        What was found, the held-out questions (None if there are too few records), and the records.
    """
    full_dim, records = stores.config.full_dim, Records.of(stores)
    tried = _checked_dims(dims, stores.config.shortlist_dim, full_dim)
    vectors = None if queries is None else _checked_queries(queries, full_dim)
    asked = "records" if vectors is None else "queries"
    if len(records) < MIN_MEASURED:
        return Tuning(target_recall, (), None, 0, asked), None, records
    if vectors is None:
        questions = choose_questions(records.read, len(records))
    else:
        questions = find_nearest(vectors, records.read, len(records))
    rotation = _rotation(stores, records, questions)
    ranks = ranks_at(records.read, len(records), rotation, questions, tried)
    order = np.random.default_rng(0).permutation(len(questions.rows))
    choosing, held_out = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    candidates, enough = [], []
    for dim, by_question in ranks.items():
        size, reached = _shortest(by_question[choosing], target_recall)
        recall = estimate((by_question[held_out] < size).mean(axis=1))
        milliseconds = expected_milliseconds(dim, size, len(records))
        candidates.append(Candidate(Plan(dims=(dim, full_dim), sizes=(size,)), recall, milliseconds))
        enough += [candidates[-1]] if reached else []
    chosen = min(enough, key=lambda candidate: candidate.milliseconds, default=None)
    return Tuning(target_recall, tuple(candidates), chosen, len(held_out), asked), _part(questions, held_out), records


def measure_applied(tuning: Tuning, searcher: Searcher, held_out: Questions, records: Records) -> Tuning:
    """Return the tuning with the recall of the index's own searches, one question at a time."""
    shares = [measure(searcher, _part(held_out, [row]), records.ids)[0] for row in range(len(held_out.rows))]
    return replace(tuning, measured=estimate(shares))


def _rotation(stores: Stores, records: Records, questions: Questions) -> Float32Array:
    """Return the rotation that `reindex` would fit, without the questions; the identity where there is to be none."""
    if stores.config.rotation == "none":
        return np.eye(stores.config.full_dim, dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(records))
    rest = order[~np.isin(order, questions.rows)]
    return fit(records.read(np.sort(rest[:SAMPLE])))


def _shortest(ranks: Ranks, target_recall: float) -> tuple[int, bool]:
    """Return the shortest shortlist with enough of the true top 10, and whether it has; else the longest."""
    sizes = (*SHORTLIST_SIZES, *_LONGER)
    wanted = min(target_recall + RECALL_MARGIN, 1.0)
    found = next((size for size in sizes if (ranks < size).mean() >= wanted), None)
    return (sizes[-1], False) if found is None else (found, True)


def _part(questions: Questions, rows: object) -> Questions:
    return Questions(*(getattr(questions, name)[rows] for name in ("rows", "vectors", "nearest", "least")))


def _checked_dims(dims: Sequence[int] | None, shortlist_dim: int, full_dim: int) -> list[int]:
    if dims is None:
        return sorted({*dims_to_try(full_dim), shortlist_dim})
    if not dims:
        raise InvalidDimension(f"dims is {dims!r}; name at least one dimension, or leave it out.")
    return sorted({check_dim(dim, full_dim) for dim in dims})


def _checked_queries(queries: object, full_dim: int) -> Float32Array:
    rows = as_rows(queries, "queries")  # type: ignore[arg-type]
    if len(rows) < _MIN_QUESTIONS:
        raise InvalidInput(
            f"there are {len(rows)} queries; pass at least {_MIN_QUESTIONS}, half of which are held out."
        )
    if rows.shape[1] != full_dim:
        raise InvalidVectors(f"queries have {rows.shape[1]} numbers and this index {full_dim}; they must be equal.")
    return unit_rows(rows)
