"""Means with 95% bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# With these many resamples the ends of the interval vary by about a fiftieth of its width.
_RESAMPLES = 2_000
_BLOCK = 250


@dataclass(frozen=True)
class Estimate:
    """A mean over questions.

    Attributes:
        mean: of all questions.
        low: lower end of its 95% bootstrap interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float] | npt.NDArray[np.floating], seed: int = 0) -> Estimate:
    """Return the mean with its 95% percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    Args:
        values: one number per question; they are resampled with replacement.
        seed: of the resampling; the same values and seed give the same interval.

    Returns:
        The estimate; all three numbers are NaN for no values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return Estimate(float("nan"), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    means = [
        numbers[generator.integers(len(numbers), size=(_BLOCK, len(numbers)))].mean(axis=1)
        for _ in range(_RESAMPLES // _BLOCK)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(numbers.mean()), float(low), float(high))
