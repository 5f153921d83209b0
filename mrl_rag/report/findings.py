"""What an evaluation says in short: the best results for their cost, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from mrl_rag.errors import InvalidInput
from mrl_rag.evaluation import Evaluation, Result
from mrl_rag.intervals import estimate

Cost: TypeAlias = Literal["bytes", "milliseconds"]
# "Enough" keeps this share of the reference's score.
KEPT = 0.99


def main_measure(evaluation: Evaluation, measure: str | None = None) -> str:
    """Return `measure`, or the first one of the evaluation.

    Raises:
        InvalidInput: the evaluation doesn't have it.
    """
    there = list(evaluation.reference.scores)
    if measure is None and there:
        return there[0]
    if measure not in there:
        raise InvalidInput(f"measure is {measure!r}; this evaluation has {', '.join(there) or 'none'}. Pass one of it.")
    return measure


def cost_of(result: Result, cost: Cost) -> float:
    """Return a result's bytes per record, or milliseconds per query."""
    return float(result.bytes_per_record) if cost == "bytes" else result.milliseconds


def frontier(results: Sequence[Result], cost: Cost, measure: str) -> list[Result]:
    """Return the results that no result beats at the same or a lower cost, the cheapest first.

    Args:
        results: results without the measure, or whose cost is unknown, are left out.
        cost: "bytes" or "milliseconds".
        measure: a key of `Result.scores`.
    """
    known = [r for r in results if measure in r.scores and math.isfinite(cost_of(r, cost))]
    best: list[Result] = []
    for result in sorted(known, key=lambda r: (cost_of(r, cost), -r.scores[measure].mean)):
        if not best or result.scores[measure].mean > best[-1].scores[measure].mean:
            best.append(result)
    return best


def details(result: Result) -> str:
    """Return what a result searches in words, such as "64 numbers, int8, 50 candidates"."""
    size = "" if result.shortlist_size is None else f", {result.shortlist_size:,} candidates"
    return f"{result.dim:,} numbers, {result.precision}{size}"


def summary(evaluation: Evaluation, measure: str) -> str:
    """Return in one sentence what the cheapest good result costs and keeps."""
    whole = evaluation.reference
    best = frontier([whole, *evaluation.results], "bytes", measure)
    cheaper = [result for result in best if result.bytes_per_record < whole.bytes_per_record]
    before = whole.scores[measure].mean
    if not cheaper:
        return f"Exact search of all {whole.dim:,} numbers reaches {measure} {before:.3f}; nothing cheaper was tried."
    enough = next((result for result in cheaper if result.scores[measure].mean >= KEPT * before), None)
    chosen = enough or cheaper[-1]
    after = chosen.scores[measure].mean
    share = f"{after / before:.1%} of {measure}" if before else measure
    lead = f"{share} is kept" if enough else f"Nothing cheaper keeps {KEPT:.0%} of {measure}; the best keeps {share}"
    return (
        f"{lead} ({after:.3f} of {before:.3f}{_difference(whole, chosen, measure)}) with {chosen.bytes_per_record:,} "
        f"instead of {whole.bytes_per_record:,} bytes per record: {chosen.method}, {details(chosen)}."
    )


def _difference(before: Result, after: Result, measure: str) -> str:
    """Return the interval of the difference, question by question: narrower than those of both means."""
    pairs = zip(after.per_question.get(measure, ()), before.per_question.get(measure, ()), strict=False)
    differences = [a - b for a, b in pairs]
    if not differences:
        return ""
    found = estimate(differences)
    return f"; the difference is {found.low:+.3f} to {found.high:+.3f} with 95% confidence"
