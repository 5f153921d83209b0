"""mteb's retrieval tasks as datasets, and an encoder as a model of mteb. Needs mteb 2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt

from mrl_rag.binding import model_of
from mrl_rag.encoder import Encoder
from mrl_rag.errors import InvalidInput
from mrl_rag.evaluation.datasets import Dataset
from mrl_rag.extras import require
from mrl_rag.models import find_row
from mrl_rag.tasks import Task
from mrl_rag.truncation import Float32Array, check_dim


class MtebModel:
    """An encoder, cut to a dimension, as a model for `mteb.evaluate`.

        mteb.evaluate(MtebModel(MatryoshkaEncoder(), dim=128), mteb.get_tasks(tasks=["NFCorpus"]))

    Queries and documents get the encoder's prompts of these names; texts of other tasks that of "clustering" or
    "classification", as nomic's own model in mteb does it. Results are kept by mteb under the model's name, the
    encoder's fingerprint and the dimension.

    Args:
        encoder: any encoder.
        dim: numbers per vector; None for the encoder's own.

    Raises:
        InvalidDimension: `dim` is not an integer from 1 to the encoder's full dimension.
        MissingExtra: mteb is not installed.
    """

    def __init__(self, encoder: Encoder, dim: int | None = None) -> None:
        self.encoder = encoder
        self.dim = check_dim(encoder.dim if dim is None else dim, encoder.full_dim)
        # Read by mteb, which declares it as a property.
        self.mteb_model_meta = _meta(encoder, self.dim)

    def __repr__(self) -> str:
        return f"MtebModel({self.encoder!r}, dim={self.dim})"

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, prompt_type: Any = None, **settings: Any
    ) -> Float32Array:
        """Return the vectors of mteb's batches of texts.

        Args:
            inputs: batches with a list of strings under "text".
            task_metadata: mteb's, of the task.
            prompt_type: mteb's "query" or "document"; None for a task that knows neither.
            settings: what else mteb passes; the encoder makes its own batches.

        Returns:
            float32 [n, dim], unit rows, in the order of the batches.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        return self.encoder.encode(texts, _task(task_metadata.type, prompt_type), self.dim)

    def similarity(self, embeddings1: npt.ArrayLike, embeddings2: npt.ArrayLike) -> Any:
        """Return the cosines of all with all: a torch tensor [n, m] from arrays [n, dim] and [m, dim]."""
        return require("mteb.similarity_functions", extra="mteb").cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: npt.ArrayLike, embeddings2: npt.ArrayLike) -> Any:
        """Return the cosines of each with its like: a torch tensor [n] from two arrays [n, dim]."""
        return require("mteb.similarity_functions", extra="mteb").pairwise_cos_sim(embeddings1, embeddings2)


def read_mteb(task: Any, split: str = "test", subset: str = "default") -> Dataset:
    """Read a retrieval task of mteb, for `evaluate`.

        evaluate(read_mteb(mteb.get_task("NFCorpus")), MatryoshkaEncoder())

    Args:
        task: from `mteb.get_task`. Its data is loaded if it isn't yet.
        split: of the task's data.
        subset: a language or part; "default" where there is only one.

    Returns:
        Its passages (title first), queries and judgments.

    Raises:
        InvalidInput: it is no retrieval task of plain text, has no such part, reranks given passages, or ignores
            passages with their query's id; `mteb.evaluate` with a `MtebModel` runs those.
        MissingExtra: mteb is not installed.
    """
    if not isinstance(task, require("mteb.abstasks", extra="mteb").AbsTaskRetrieval):
        raise InvalidInput(f"task is {task!r}; it must be a retrieval task, such as mteb.get_task('NFCorpus').")
    name = task.metadata.name
    task.load_data()
    task.convert_v1_dataset_format_to_v2(num_proc=None)
    try:
        data = task.dataset[subset][split]
    except KeyError:
        parts = ", ".join(f"{part} ({', '.join(splits)})" for part, splits in task.dataset.items())
        raise InvalidInput(f"{name} has no split {split!r} of {subset!r}. It has {parts}.") from None
    texts = [row.get("text") for row in data["queries"]]
    plain = all(isinstance(text, str) for text in texts) and "instruction" not in data["queries"].column_names
    if not plain or data.get("top_ranked") or task.ignore_identical_ids:
        raise InvalidInput(
            f"{name} is not a search for plain questions among all passages. Run it by mteb itself: "
            "mteb.evaluate(MtebModel(encoder), task)."
        )
    corpus = {row["id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in data["corpus"]}
    judged = {query: dict(documents) for query, documents in data["relevant_docs"].items()}
    queries = dict(zip(data["queries"]["id"], texts, strict=True))
    return Dataset(corpus, {id_: text for id_, text in queries.items() if id_ in judged}, judged, name)


def _task(kind: str, prompt_type: Any) -> Task:
    if prompt_type is not None:
        return "query" if str(getattr(prompt_type, "value", prompt_type)) == "query" else "document"
    return "clustering" if "Clustering" in kind else "classification"


def _meta(encoder: Encoder, dim: int) -> Any:
    """Return mteb's description of the model; what isn't known stays empty."""
    name = model_of(encoder)
    row = find_row(name)
    known = row.hub_id if row is not None else name
    return require("mteb.models.model_meta", extra="mteb").ModelMeta.create_empty(
        {
            "name": known if known.count("/") == 1 else f"mrl-rag/{known.strip('./').replace('/', '-')}",
            "revision": encoder.fingerprint,
            "embed_dim": dim,
            "max_tokens": encoder.max_length,
            "experiment_kwargs": None if dim == encoder.full_dim else {"dim": dim},
        }
    )
