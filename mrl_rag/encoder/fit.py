"""Whether a model suits what it is used for: a dimension it was trained for, a language it knows."""

from __future__ import annotations

from collections.abc import Sequence

from mrl_rag.models import MODELS, ModelSpec

# Looked at per call, so that the look costs microseconds: characters per text, and texts.
_CHARACTERS = 200
_TEXTS = 32


def misfit_of_dim(spec: ModelSpec, dim: int) -> str:
    """Say what a cut to `dim` costs; "" where the model was trained for that or a lower dimension."""
    if dim >= min(spec.dims):
        return ""
    trained = ", ".join(map(str, spec.dims))
    return (
        f"{spec.name} was trained for dimension {trained}, and its vectors are cut to {dim}. That costs accuracy: "
        "minilm cut to 64 falls from nDCG@10 0.40 to 0.30 on Cranfield (benchmarks/README.md). Search full vectors "
        f"with a TwoStageIndex, which shortens them by a fit, or use a Matryoshka model: {_matryoshka_models(dim)}."
    )


def misfit_of_language(spec: ModelSpec, texts: Sequence[str]) -> str:
    """Say that an English model is given text in another script; "" where it isn't.

    Scripts are told apart, not languages: French or Vietnamese passes for English.
    """
    if spec.languages != "en" or share_outside_latin(texts) <= 0.5:
        return ""
    names = ", ".join(repr(row.name) for row in MODELS.values() if row.languages == "multilingual")
    return (
        f"{spec.name} was trained on English, and these texts are mostly in another script: it will find little in "
        f"them. Use a multilingual model: {names}."
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
