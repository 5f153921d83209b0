"""Warnings about dimensions and languages that a model was not trained for."""

from __future__ import annotations

from collections.abc import Sequence

from mrl_rag.models import MODELS, ModelSpec

# The sample of a call's texts that is looked at, small enough to cost microseconds: characters per text, and texts.
_CHARACTERS = 200
_TEXTS = 32
# What a plain cut costs a model that wasn't trained for it: nDCG@10 of minilm by dimension, the mean of covid-faq,
# cranfield and npl (`benchmarks/heads.md`).
_FULL_QUALITY = 0.504
_QUALITY = {256: 0.495, 192: 0.490, 128: 0.468, 96: 0.442, 64: 0.399, 32: 0.299}


def dim_warning(spec: ModelSpec, dim: int) -> str:
    """Return what truncation to `dim` costs; "" where the model was trained for that dimension or a lower one."""
    if dim >= min(spec.dims):
        return ""
    trained = ", ".join(map(str, spec.dims))
    measured = min((tried for tried in _QUALITY if tried >= dim), default=max(_QUALITY))
    return (
        f"{spec.name} was trained for dimension {trained}, and its vectors are truncated to {dim}. That costs "
        f"accuracy: nDCG@10 of minilm falls from {_FULL_QUALITY:.2f} to {_QUALITY[measured]:.2f} at {measured} "
        "(benchmarks/heads.md). Search full vectors with a TwoStageIndex, which fits shorter ones to them, fit a "
        f"head on pairs of your own (fit_head), or use a Matryoshka model: {_matryoshka_models(dim)}."
    )


def language_warning(spec: ModelSpec, texts: Sequence[str]) -> str:
    """Return a warning where an English model is given text in another script, else "".

    Only scripts are looked at, so languages in Latin script, such as French, pass for English.
    """
    if spec.languages != "en" or share_outside_latin(texts) <= 0.5:
        return ""
    return not_english(spec, "these texts are mostly in another script")


def not_english(spec: ModelSpec, texts: str) -> str:
    """Return the warning that an English model was given other texts; `texts` says which and how many."""
    names = ", ".join(repr(row.name) for row in MODELS.values() if row.languages == "multilingual")
    return (
        f"{spec.name} was trained on English, and {texts}: it will find little in them. Use a multilingual model: "
        f"{names}."
    )


def share_outside_latin(texts: Sequence[str]) -> float:
    """Return the share of letters beyond Latin-1, 0 to 1, in the beginnings of some of the texts."""
    step = -(-len(texts) // _TEXTS) or 1
    sample = "".join([text[:_CHARACTERS] for text in texts[::step]])
    if sample.isascii():
        return 0.0
    letters = [character for character in sample if character.isalpha()]
    return sum(letter > "\xff" for letter in letters) / max(len(letters), 1)


def _matryoshka_models(dim: int) -> str:
    return ", ".join(repr(row.name) for row in MODELS.values() if row.matryoshka and min(row.dims) <= dim) or "none"
