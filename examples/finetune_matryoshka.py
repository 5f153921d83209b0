"""Make a model Matryoshka on your own (question, passage) pairs, by sentence-transformers' trainer; minutes on a CPU.

python examples/finetune_matryoshka.py [PAIRS] [--model minilm] [--out ./minilm-matryoshka]

PAIRS is a .jsonl file of {"question": ..., "passage": ...}, a .csv or .tsv with two columns, or a BEIR folder; without
it, docstrings of installed packages: the first paragraph, and the rest. One half of the passages is trained on, the
other measured.
Needs: pip install 'sentence-transformers>=6' datasets accelerate
"""

from __future__ import annotations

import argparse
import inspect
import pydoc
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from docstrings import read_passages
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

from mrl_rag import MatryoshkaEncoder, evaluation, truncate
from mrl_rag.encoder import find_on_disk
from mrl_rag.evaluation import exact_scan

DIMS = (384, 256, 128, 64, 32)
CHARACTERS = 600  # of a docstring's rest: longer ones add time and little meaning


class Pair(NamedTuple):
    """A question and a passage that answers it."""

    question: str
    passage: str


def read_pairs(source: Path | None = None) -> list[Pair]:
    """Return pairs from a file, from a BEIR folder, or, for None, from docstrings."""
    if source is None:
        return docstring_pairs()
    data = evaluation.read_beir(source) if source.is_dir() else evaluation.read_pairs(source)
    return [Pair(*texts) for texts in data.pairs]


def docstring_pairs(packages: set[str] | None = None) -> list[Pair]:
    """Return the first paragraph and the rest of each docstring that has both; `packages` as for `read_passages`."""
    pairs = []
    for passage in read_passages(packages):
        rest = (inspect.getdoc(pydoc.locate(passage.name)) or "").partition("\n\n")[2]
        if len(rest) > 100:
            pairs.append(Pair(passage.summary, " ".join(rest.split())[:CHARACTERS]))
    return pairs


def split(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Return two halves that share no passage."""
    passages = sorted({pair.passage for pair in pairs})
    random.Random(0).shuffle(passages)
    first = set(passages[::2])
    return [pair for pair in pairs if pair.passage in first], [pair for pair in pairs if pair.passage not in first]


def train(model: str, pairs: Sequence[Pair], out: Path, dims: Sequence[int] = DIMS, steps: int = -1) -> None:
    """Train a model on pairs, each question against the other passages of its batch, and save it.

    Args:
        model: as for `MatryoshkaEncoder`.
        pairs: what to train on.
        out: the folder to save in.
        dims: the dimensions to train for, the model's own first.
        steps: batches of 32 pairs; -1 for all pairs once.
    """
    student = SentenceTransformer(str(find_on_disk(model) or model))
    loss = MatryoshkaLoss(student, MultipleNegativesRankingLoss(student), list(dims))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=5e-5,
            warmup_steps=0.1,  # this share of all steps
            batch_sampler=BatchSamplers.NO_DUPLICATES,  # another question's equal passage is no wrong answer
            prompts={"question": student.prompts.get("query", ""), "passage": student.prompts.get("document", "")},
            dataloader_pin_memory=False,  # pinning warns where there is no GPU, and saves little where there is
            save_strategy="no",
            logging_steps=20,
            report_to="none",
            seed=0,
        )
        data = Dataset.from_dict(
            {"question": [pair.question for pair in pairs], "passage": [pair.passage for pair in pairs]}
        )
        SentenceTransformerTrainer(model=student, args=arguments, train_dataset=data, loss=loss).train()
    student.save_pretrained(str(out), create_model_card=False)


def evaluate(model: str | Path, pairs: Sequence[Pair], dims: Sequence[int] = DIMS) -> dict[int, float]:
    """Return per dimension the share of questions whose passage is among the ten nearest of all passages."""
    with MatryoshkaEncoder(model) as encoder:
        passages = list(dict.fromkeys(pair.passage for pair in pairs))
        vectors = encoder.encode_documents(passages)
        questions = encoder.encode_queries([pair.question for pair in pairs])
    place = {passage: row for row, passage in enumerate(passages)}
    right = np.array([[place[pair.passage]] for pair in pairs])
    found = {dim: exact_scan(truncate(vectors, dim), truncate(questions, dim), 10) for dim in dims}
    return {dim: float((rows == right).any(axis=1).mean()) for dim, rows in found.items()}


def main() -> None:
    """Train, and print recall@10 on the held-out half before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="?")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--out", type=Path, default=Path("minilm-matryoshka"))
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    arguments = parser.parse_args()
    trained, held_out = split(read_pairs(arguments.pairs))
    print(f"{len(trained)} pairs to train on, {len(held_out)} held out")
    before = evaluate(arguments.model, held_out, arguments.dims)
    train(arguments.model, trained, arguments.out, arguments.dims)
    after = evaluate(arguments.out, held_out, arguments.dims)
    print("recall@10 on the held-out half\ndimension  before   after")
    for dim in arguments.dims:
        print(f"{dim:9}  {before[dim]:6.3f}  {after[dim]:6.3f}")


if __name__ == "__main__":
    main()
