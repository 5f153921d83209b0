"""A Matryoshka text encoder and a two-stage retriever over Chroma.

`MatryoshkaEncoder` turns texts into vectors that can be cut to any length, and `truncate` cuts them; `OpenAIEncoder`
and `NomicEncoder` ask a server for them, and `CachedEncoder` keeps those of any encoder on disk. Subclass `Encoder` for
one of your own. A `MatryoshkaHead` is a learned map after a model, which makes its vectors lose less when cut.
`TwoStageIndex` searches Chroma at a low dimension and reranks the shortlist at full dimension, as a `Plan` says.
`TwoStageRetriever` puts both together: texts in, each `Hit` out.
`rank` orders candidates found elsewhere; `fit_to_context` chooses those that fit a language model's context.
Every error raised on purpose is an `MrlRagError`; the tree is in `mrl_rag.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrl_rag.budget import ContextFit, fit_to_context
    from mrl_rag.encoder import CachedEncoder, Encoder, MatryoshkaEncoder, NomicEncoder, OpenAIEncoder
    from mrl_rag.errors import MrlRagError
    from mrl_rag.heads import HeadCard, MatryoshkaHead
    from mrl_rag.index import Hit, IndexInfo, Plan, Record, Report, RetryPolicy, Stage, Tuning, TwoStageIndex, rank
    from mrl_rag.retriever import TwoStageRetriever
    from mrl_rag.tasks import Task
    from mrl_rag.truncation import truncate

__version__ = "0.1.0"

__all__ = [
    "CachedEncoder",
    "ContextFit",
    "Encoder",
    "HeadCard",
    "Hit",
    "IndexInfo",
    "MatryoshkaEncoder",
    "MatryoshkaHead",
    "MrlRagError",
    "NomicEncoder",
    "OpenAIEncoder",
    "Plan",
    "Record",
    "Report",
    "RetryPolicy",
    "Stage",
    "Task",
    "Tuning",
    "TwoStageIndex",
    "TwoStageRetriever",
    "fit_to_context",
    "rank",
    "truncate",
]

# Imported when first asked for: NumPy alone takes most of the 0.2 seconds that `import mrl_rag` may.
_ROOMS = {
    "budget": ("ContextFit", "fit_to_context"),
    "encoder": ("CachedEncoder", "Encoder", "MatryoshkaEncoder", "NomicEncoder", "OpenAIEncoder"),
    "errors": ("MrlRagError",),
    "heads": ("HeadCard", "MatryoshkaHead"),
    "index": (
        "Hit",
        "IndexInfo",
        "Plan",
        "Record",
        "Report",
        "RetryPolicy",
        "Stage",
        "Tuning",
        "TwoStageIndex",
        "rank",
    ),
    "retriever": ("TwoStageRetriever",),
    "tasks": ("Task",),
    "truncation": ("truncate",),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"mrl_rag.{room}"), name)
    raise AttributeError(f"module 'mrl_rag' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
