"""Adaptive classification against one dimension for all: accuracy, expected dimension, multiply-adds.

python benchmarks/classification.py FOLDER [--model minilm] [--cache FILE] [--dims 16 32 48 64 96 192]

FOLDER holds train.jsonl and test.jsonl, lines of {"text": ..., "label": ...}. What is fitted or chosen sees the train
part alone.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from mrl_rag import MatryoshkaEncoder, truncate
from mrl_rag.classification import AdaptiveClassifier

SEEDS = range(5)  # of the few-shot draws


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--cache", type=Path, help="an .npz file that keeps the vectors between runs")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 48, 64, 96, 192])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    data = encode(arguments.folder, arguments.model, arguments.cache)
    print("| classifier | numbers a vector, mean | accuracy | multiply-adds | and rotation |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print_all(data, arguments.dims)
    print_few_shot(data)


def encode(folder: Path, model: str, cache: Path | None) -> list[npt.NDArray[Any]]:
    """Return the vectors and labels of the train part, then those of the test part."""
    if cache is not None and cache.is_file():
        with np.load(cache) as kept:
            return [kept[name] for name in kept.files]
    encoder = MatryoshkaEncoder(model)
    found: list[npt.NDArray[Any]] = []
    for part in ("train", "test"):
        lines = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        found.append(encoder.encode([line["text"] for line in lines], "classification"))
        found.append(np.array([line["label"] for line in lines]))
    if cache is not None:
        np.savez(cache, *found)
    return found


def print_all(data: list[npt.NDArray[Any]], dims: list[int]) -> None:
    """Print full dimension, each single dimension, and the adaptive classifiers, on all training data."""
    vectors, labels, asked, truth = data
    full_dim, classes = vectors.shape[1], len(np.unique(labels))
    adaptive = {
        (rotation, loss): AdaptiveClassifier(rotation=rotation, max_loss=loss)
        for rotation in ("fit", "none")
        for loss in ((0.0, 0.001, 0.003) if rotation == "fit" else (0.001,))
    }
    for classifier in adaptive.values():
        classifier.fit(vectors, labels)
    rotation = adaptive["fit", 0.001].rotation_
    row("full dimension", full_dim, linear(vectors, labels).score(asked, truth), full_dim * classes)
    for dim in dims:
        score = linear(truncate(vectors, dim), labels).score(truncate(asked, dim), truth)
        row(f"plain cut, {dim}", dim, score, dim * classes)
    for dim in dims:
        if dim < classes:
            score = linear(truncate(vectors @ rotation, dim), labels).score(truncate(asked @ rotation, dim), truth)
            row(f"rotated, {dim}", dim, score, dim * classes, dim * full_dim)
    for (rotated, loss), classifier in adaptive.items():
        used = classifier.dims_used(asked)
        # A vector is classified at its dimension and at each one before.
        products = np.mean([sum(dim for dim in classifier.dims_ if dim <= last) for last in used]) * classes
        name = f"adaptive, {'rotated' if rotated == 'fit' else 'plain cut'}, `max_loss={loss}`"
        row(name, used.mean(), classifier.score(asked, truth), products, used.mean() * full_dim * (rotated == "fit"))


def print_few_shot(data: list[npt.NDArray[Any]], shots: int = 5) -> None:
    """Print what a few vectors per class give, the mean of several draws."""
    vectors, labels, asked, truth = data
    classes = np.unique(labels)
    means: dict[str, list[tuple[float, float]]] = {}
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        few = np.concatenate([draw.choice(np.flatnonzero(labels == label), shots, replace=False) for label in classes])
        full = linear(vectors[few], labels[few])
        means.setdefault("full dimension", []).append((vectors.shape[1], full.score(asked, truth)))
        for dim in (32, 64):
            cut = linear(truncate(vectors[few], dim), labels[few])
            means.setdefault(f"plain cut, {dim}", []).append((dim, cut.score(truncate(asked, dim), truth)))
        adaptive = AdaptiveClassifier(random_state=seed).fit(vectors[few], labels[few])
        used = adaptive.dims_used(asked).mean()
        means.setdefault("adaptive, rotated", []).append((used, adaptive.score(asked, truth)))
    print(f"\n{shots} vectors per class, mean of {len(SEEDS)} draws:\n")
    print("| classifier | numbers a vector, mean | accuracy | lowest | highest |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, found in means.items():
        used, scores = np.array(found).T
        print(f"| {name} | {used.mean():.1f} | {scores.mean():.4f} | {scores.min():.4f} | {scores.max():.4f} |")


def linear(vectors: npt.NDArray[Any], labels: npt.NDArray[Any]) -> LogisticRegression:
    """Return the classifier that `AdaptiveClassifier` has per dimension."""
    return LogisticRegression(C=10, max_iter=1000).fit(vectors, labels)


def row(name: str, dim: float, accuracy: float, products: float, rotation: float = 0) -> None:
    """Print a row; multiply-adds are of one query, without and with the rotation of its vector."""
    total = f"{products + rotation:,.0f}"
    print(f"| {name} | {dim:.1f} | {accuracy:.4f} | {products:,.0f} | {total} |", flush=True)


if __name__ == "__main__":
    main()
