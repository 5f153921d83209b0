"""Keeping an index to the model that filled it, where embeddings of other libraries are known by name alone."""

from __future__ import annotations

from pathlib import Path

from mrl_rag.encoder import CachedEncoder, Encoder
from mrl_rag.errors import IndexMismatch
from mrl_rag.index import TwoStageIndex
from mrl_rag.models import find_row


def model_of(encoder: Encoder) -> str:
    """Return the name of an encoder's model, or of its class where it has none."""
    while isinstance(encoder, CachedEncoder):
        encoder = encoder.encoder
    return str(getattr(encoder, "model", type(encoder).__name__))


def bind_model(index: TwoStageIndex, model: str | None, fingerprint: str | None, argument: str) -> None:
    """Refuse an index that another model filled; otherwise have the next upsert store which model fills it.

    Fingerprints are compared where both sides have one. Otherwise the names are, so that one model may be used through
    two libraries; a name that is not known, or is that of a folder, is taken for any model.

    Args:
        index: the one to search and fill.
        model: the model's name; None where it is not known.
        fingerprint: of an encoder of this package; None for embeddings of another library.
        argument: what the adapter's store calls `model`, for the message.

    Raises:
        IndexMismatch: another model filled the index.
    """
    stored = index.model
    if not (fingerprint and index.fingerprint) and not may_be_one_model(stored, model):
        raise IndexMismatch(
            f"collection {index.name!r} was filled with the model {stored!r}; these embeddings are of {model!r}. Open "
            "it with the model that filled it, or fill a new collection. If both are names of one model, pass "
            f"{argument}={stored!r} to the store."
        )
    if fingerprint or (model and not index.fingerprint):
        index.bind(model or "", fingerprint or "")


def may_be_one_model(first: str | None, second: str | None) -> bool:
    """Say whether two names may mean one model, whoever publishes it and whichever library names it.

    may_be_one_model("minilm", "sentence-transformers/all-MiniLM-L6-v2")    # True
    may_be_one_model("text-embedding-3-small", "text-embedding-3-large")    # False
    may_be_one_model("./my-model", "minilm")                                # True: a folder may hold any model
    """
    names = {_plain_name(first), _plain_name(second)}
    return "" in names or len(names) == 1


def _plain_name(name: str | None) -> str:
    """Return a name without its publisher and without ":latest", in lower case; "" where it says nothing."""
    if not name or "://" in name or "\\" in name or name.startswith(("/", ".", "~")) or Path(name).is_dir():
        return ""
    row = find_row(name)
    return (row.hub_id if row else name).split("/")[-1].casefold().removesuffix(":latest")
