"""What an evaluation found: `Evaluation`, which is kept as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from mrl_rag.errors import InvalidInput
from mrl_rag.intervals import Estimate


@dataclass(frozen=True)
class Result:
    """One way to search, measured.

    Attributes:
        method: "plain cut", "fitted projection", "head" or "two stages" (the index's own search, or a `Plan`).
        dim: numbers per vector that are searched first; the full dimension for the reference.
        shortlist_size: candidates that are reranked at full dimension; None for one stage.
        precision: of what is searched first: "float32", "float16", "int8" or "binary".
        bytes_per_record: of what is searched first; with two stages the full vectors are added.
        milliseconds: per query, measured.
        scores: measure -> mean and interval: "nDCG@10", "MRR@10", "recall@10"; without labels "recall@10" alone,
            against the exact answer at full dimension.
        per_question: measure -> value per question, in the order of `Evaluation.questions`.
    """

    method: str
    dim: int
    shortlist_size: int | None
    precision: str
    bytes_per_record: int
    milliseconds: float
    scores: dict[str, Estimate]
    per_question: dict[str, list[float]]


@dataclass(frozen=True)
class LostQuestion:
    """A question whose score fell from the reference to a cheaper result.

    Attributes:
        question: its text.
        before: its score by the reference.
        after: its score by the cheaper result.
        lost: id and text (at most 300 characters) of the right passages that are in the reference's top 10 and not
            in the cheaper result's.
    """

    question: str
    before: float
    after: float
    lost: list[tuple[str, str]]


@dataclass(frozen=True)
class Evaluation:
    """Several ways to search one collection, measured.

    Attributes:
        name: of the collection.
        model: that made the vectors.
        records: how many were searched.
        questions: their texts.
        labels: how truth was made: "judgments", "pairs" or "none (...)".
        full_dim: numbers per vector.
        reference: exact search at full dimension in float32.
        results: the other ways.
        encode_rate: passages per second; NaN if nothing was encoded.
        lost: at most 10 questions that lost most by the cheapest result at a quarter of the full dimension or less.
    """

    name: str
    model: str
    records: int
    questions: list[str]
    labels: str
    full_dim: int
    reference: Result
    results: list[Result]
    encode_rate: float
    lost: list[LostQuestion]

    def to_json(self) -> str:
        """Return the evaluation as JSON in ASCII; NaN becomes null."""
        return json.dumps(_without_nan(dataclasses.asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read what `to_json` wrote.

        Raises:
            InvalidInput: it is not an evaluation.
        """
        try:
            fields = json.loads(text)
            rate = fields.pop("encode_rate")
            return cls(
                reference=_result(fields.pop("reference")),
                results=[_result(result) for result in fields.pop("results")],
                encode_rate=math.nan if rate is None else rate,
                lost=[LostQuestion(**{**q, "lost": [(i, t) for i, t in q["lost"]]}) for q in fields.pop("lost")],
                **fields,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"this is not an evaluation ({error!r}): {text[:80]!r}. Pass what Evaluation.to_json or "
                "`mrl-rag evaluate --save` wrote."
            ) from error


def _result(fields: dict[str, Any]) -> Result:
    milliseconds = math.nan if fields["milliseconds"] is None else fields["milliseconds"]
    scores = {
        name: Estimate(**{end: math.nan if value is None else value for end, value in score.items()})
        for name, score in fields["scores"].items()
    }
    return Result(**{**fields, "milliseconds": milliseconds, "scores": scores})


def _without_nan(value: Any) -> Any:
    """Return a JSON value with None for each NaN, which JSON doesn't have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
