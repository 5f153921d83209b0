"""How a search goes from many candidates to few: `Plan`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from mrl_rag.arguments import is_integer
from mrl_rag.errors import InvalidPlan

# Candidates that a search without a plan asks for at first when none were chosen for the index, how many times k they
# are at least, and how often it asks, each time for twice as many. benchmarks/README.md has the recall at these.
_SHORTLIST_SIZE = 50
_SHORTLIST_PER_HIT = 3
MAX_ROUNDS = 4


@dataclass(frozen=True)
class Plan:
    """The dimensions and shortlist sizes of a search.

        Plan(dims=(64, 384), sizes=(50,))             # search at 64, rerank 50 at 384
        Plan(dims=(64, 384), sizes=(200,))            # a longer shortlist: more recall, more time
        Plan(dims=(64, 128, 384), sizes=(200, 50))    # a funnel: 200 at 64, 50 of them at 128, those at 384
        Plan.funnel(64, 384, size=200)                # 64, 128, 256, 384 with shortlists of 200, 100, 50

    Attributes:
        dims: the dimension of each stage, in ascending order; the first stage searches all records.
        sizes: how many candidates each stage but the last passes on, in descending order.

    Raises:
        InvalidPlan: fewer than two dims, not one size fewer than dims, a number that is not a positive integer, or
            another order.
    """

    dims: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("dims", "sizes"):
            object.__setattr__(self, name, _positive_integers(name, getattr(self, name)))
        if len(self.dims) < 2 or len(self.sizes) != len(self.dims) - 1:
            raise InvalidPlan(
                f"dims={self.dims} and sizes={self.sizes} don't make a plan; it needs two dims or more, and a size for "
                "each but the last, as in Plan(dims=(64, 384), sizes=(50,))."
            )
        if any(low > high for low, high in pairwise(self.dims)):
            raise InvalidPlan(f"dims={self.dims} fall; no stage may have a lower dimension than the one before it.")
        if any(low < high for low, high in pairwise(self.sizes)):
            raise InvalidPlan(f"sizes={self.sizes} rise; no stage may pass on more candidates than the one before it.")

    @classmethod
    def funnel(cls, shortlist_dim: int, full_dim: int, size: int) -> Plan:
        """Return the plan in which each stage doubles the dimension and halves the candidates.

        Funnel retrieval of Kusupati et al., "Matryoshka Representation Learning" (2022), section 4.3.1.

        Args:
            shortlist_dim: the first stage's dimension.
            full_dim: the last stage's dimension.
            size: how many candidates the first stage passes on.

        Raises:
            InvalidPlan: a number is not a positive integer, or the first dimension is above the last.
        """
        first, last, most = (_positive_integers("a funnel's number", (n,))[0] for n in (shortlist_dim, full_dim, size))
        dims = [first]
        while dims[-1] * 2 < last:
            dims.append(dims[-1] * 2)
        return cls((*dims, last), tuple(max(most >> stage, 1) for stage in range(len(dims))))


def first_size(chosen: int, k: int) -> int:
    """Return how many candidates a search without a plan asks for at first.

    Args:
        chosen: the number chosen for the index; 0 for none.
        k: how many hits are wanted.
    """
    return max(chosen or _SHORTLIST_SIZE, _SHORTLIST_PER_HIT * k)


def check_k(k: object) -> int:
    """Return `k` as an int when it is an integer of at least 1.

    Raises:
        InvalidPlan: it is not.
    """
    return _positive_integers("k", (k,))[0]


def check_is_plan(plan: object) -> Plan | None:
    """Return a plan, or None for none.

    Raises:
        InvalidPlan: it is something else.
    """
    if not isinstance(plan, Plan | None):
        raise InvalidPlan(f"plan is {plan!r}; it must be a Plan, as in plan=Plan(dims=(64, 384), sizes=(100,)).")
    return plan


def check_plan(plan: Plan, shortlist_dim: int, full_dim: int, k: int) -> Plan:
    """Return `plan` when this index can carry it out for k hits.

    Raises:
        InvalidPlan: its ends are not the index's dimensions, or its last shortlist holds fewer than k.
    """
    if (plan.dims[0], plan.dims[-1]) != (shortlist_dim, full_dim):
        raise InvalidPlan(
            f"the plan goes from {plan.dims[0]} to {plan.dims[-1]} dimensions; this index is searched at "
            f"{shortlist_dim} and reranked at {full_dim}. Begin and end the plan's dims with these."
        )
    if plan.sizes[-1] < k:
        raise InvalidPlan(
            f"the plan's last shortlist holds {plan.sizes[-1]} candidates, fewer than k={k}. "
            "Ask for fewer hits or a longer shortlist."
        )
    return plan


def _positive_integers(name: str, values: object) -> tuple[int, ...]:
    checked = tuple(values) if isinstance(values, Iterable) else (None,)
    if not all(is_integer(value, 1) for value in checked):
        shown = values[0] if isinstance(values, tuple) and len(values) == 1 else values
        raise InvalidPlan(f"{name} is {shown!r}; it must be made of integers of at least 1.")
    return tuple(map(int, checked))
