"""What heads gain, and what a projection gains that knows questions.

    python benchmarks/heads.py path/to/data [--cache folder] [--time]

The data is the folder with `cranfield`, `npl`, `covid-faq`, `xquad-zh` (BEIR layout) and `banking77`. Prints three
tables: a head for any collection, fitted on the docstrings of this environment and the questions of banking77 for
training; heads fitted on half of the pairs of a collection and measured by the other half; and, for the shortlist, the
index's own projection beside those of LeanVec (arXiv 2312.16335) and GleanVec (2410.22347), which know questions, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from heads_data import Collection, Vectors, collection, customer_questions, docstrings
from index import machine

from mrl_rag import MatryoshkaEncoder, MatryoshkaHead, truncate
from mrl_rag.evaluation import ndcg
from mrl_rag.rotation import fit as pca
from mrl_rag.truncation import Float32Array, normalize

DIMS = (384, 256, 192, 128, 96, 64, 32)
UNSEEN = ("covid-faq", "cranfield", "npl")
K, SHORTLIST = 10, 50
# Docstring pairs that a head is fitted on, and that it is measured by.
PAIRS, ASKED = 10_000, 1500


def main() -> None:
    """Encode once, fit, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the collections")
    parser.add_argument("--cache", type=Path, help="keep the vectors in this folder for the next run")
    parser.add_argument("--time", action="store_true", help="only fit on 100,000 vectors, and take the time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, MatryoshkaEncoder() as encoder:
        cache = arguments.cache or Path(temporary)
        vectors = Vectors(cache, encoder)
        collections = {name: collection(arguments.data / name, vectors) for name in (*UNSEEN, "xquad-zh")}
        questions = customer_questions(arguments.data / "banking77", vectors)
        texts = docstrings(cache)
        summaries = vectors.of("docstrings-summaries", [summary for summary, _ in texts])
        rows = [row for row, (_, rest) in enumerate(texts) if len(rest) > 80]
        rests = vectors.of("docstrings-rests", [texts[row][1] for row in rows])
    print(f"{encoder.model}, {encoder.dtype}; {machine()}\n")
    if arguments.time:
        timed_fit(np.concatenate([summaries, rests, questions])[:100_000])
        return
    project_shortlists(collections | {"docstrings": documented(summaries[rows], rests)})
    fit_on_halves({name: collections[name] for name in UNSEEN}, summaries[rows], rests)
    fit_for_any(collections, np.concatenate([summaries, questions]), summaries[rows], rests)


def documented(summaries: Float32Array, rests: Float32Array) -> Collection:
    """Return the docstrings that no head is fitted on: which rest belongs to a first paragraph."""
    documents, asked = rests[PAIRS : 2 * PAIRS], summaries[PAIRS : PAIRS + ASKED]
    return Collection(documents, asked, [{row: 1} for row in range(len(asked))])


def quality(data: Collection, matrix: Float32Array | None, dim: int) -> float:
    """Return nDCG@10 of an exact search at `dim`."""
    maps = [rows if matrix is None else rows @ matrix for rows in (data.queries, data.documents)]
    scores = truncate(maps[0], dim) @ truncate(maps[1], dim).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    run = {str(q): {str(d): float(scores[q, d]) for d in found} for q, found in enumerate(best)}
    return ndcg(run, {str(q): {str(d): score for d, score in judged.items()} for q, judged in enumerate(data.qrels)})


# A head for any collection


def fit_for_any(
    collections: dict[str, Collection], texts: Float32Array, summaries: Float32Array, rests: Float32Array
) -> None:
    """Print nDCG@10 of heads that saw none of the collections, and whether one is worth shipping."""
    ways: dict[str, Float32Array | None] = {"plain cut": None, "PCA of other text": pca(texts)}
    ways["head, no labels"] = timed_fit(texts).matrix
    ways["head, docstring pairs"] = MatryoshkaHead.fit(summaries, rests).matrix
    head_of_table("collection")
    scores = {
        (name, way): table_row(name, way, collections[name], matrix) for name in UNSEEN for way, matrix in ways.items()
    }
    print()
    for way in list(ways)[2:]:
        for name in UNSEEN:
            cut, found = scores[name, "plain cut"], scores[name, way]
            lost = 1 - found[384] / cut[384]
            won = (found[64] - cut[64]) / (cut[384] - cut[64])
            print(f"- {way}, {name}: loses {lost:.1%} at 384, wins {won:.0%} of what a plain cut to 64 loses.")
    print()


def timed_fit(vectors: Float32Array) -> MatryoshkaHead:
    """Fit a head without labels, and print how long it takes."""
    start, used = time.perf_counter(), time.process_time()
    head = MatryoshkaHead.fit(vectors)
    print(
        f"Fitted without labels on {len(vectors)} vectors in {time.perf_counter() - start:.0f} s, "
        f"{time.process_time() - used:.0f} s of processor time.",
        flush=True,
    )
    return head


def head_of_table(first: str) -> None:
    """Print the head of a table of nDCG@10."""
    print(f"\n| {first} | vectors | {' | '.join(map(str, DIMS))} |")
    print(f"| --- | --- |{' ---: |' * len(DIMS)}")


def table_row(name: str, way: str, data: Collection, matrix: Float32Array | None) -> dict[int, float]:
    """Print and return nDCG@10 by dimension."""
    scores = {dim: quality(data, matrix, dim) for dim in DIMS}
    print(f"| {name} | {way} | {' | '.join(f'{score:.3f}' for score in scores.values())} |", flush=True)
    return scores


# Heads from half of the pairs


def fit_on_halves(collections: dict[str, Collection], summaries: Float32Array, rests: Float32Array) -> None:
    """Print nDCG@10 of the half of the questions that no head was fitted on."""
    print("Heads fitted on half of the questions, measured by the other half.")
    head_of_table("collection")
    tasks = {"docstrings": (summaries[:PAIRS], rests[:PAIRS], documented(summaries, rests))}
    for name, data in collections.items():
        order = np.random.default_rng(1).permutation(len(data.queries))
        seen, asked = np.array_split(order, 2)
        tasks[name] = (*data.half(seen).pairs(), data.half(asked))
    for name, (queries, documents, asked) in tasks.items():
        table_row(name, "plain cut", asked, None)
        table_row(name, "PCA of the documents", asked, pca(asked.documents))
        table_row(name, f"head, {len(queries)} pairs", asked, MatryoshkaHead.fit(queries, documents).matrix)
    print()


# Projections for the shortlist that know questions


class Projection(NamedTuple):
    """Maps for queries and for documents, float32 [full_dim, full_dim], and whether results are cut to unit length."""

    queries: Float32Array
    documents: Float32Array
    unit: bool = True


def project_shortlists(collections: dict[str, Collection]) -> None:
    """Print how much of the true top 10 is in a shortlist of 50, for questions that no projection was fitted on."""
    print(f"Share of the true top {K} in the first {SHORTLIST}; fitted on all documents and half of the questions.\n")
    print("| collection | questions to fit on | dimension | PCA, as the index | LeanVec-ES | GleanVec |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, data in collections.items():
        order = np.random.default_rng(1).permutation(len(data.queries))
        seen, asked = np.array_split(order, 2)
        documents, questions = normalize(data.documents), normalize(data.queries[seen])
        ways = (uninformed(documents), mixed(documents, questions), sphered(documents, questions))
        true = np.argsort(-(data.queries[asked] @ documents.T), axis=1, kind="stable")[:, :K]
        for dim in (32, 64, 96):
            found = [in_shortlist(way, data.queries[asked], documents, true, dim) for way in ways]
            print(f"| {name} | {len(seen)} | {dim} | {' | '.join(f'{share:.4f}' for share in found)} |", flush=True)
    print()


def uninformed(documents: Float32Array) -> Projection:
    """Return the index's own: uncentred PCA of the documents."""
    axes = pca(documents)
    return Projection(axes, axes)


def mixed(documents: Float32Array, questions: Float32Array) -> Projection:
    """Return LeanVec-ES: the axes of a mean of both second moments, by the weight that loses least inner product."""
    moments = moment(documents), moment(questions)
    found = []
    for weight in np.linspace(0, 1, 11):
        axes = longest_axes((1 - weight) * moments[0] + weight * moments[1])[:, :64]
        both = axes @ axes.T
        # The mean squared error of inner products, from the moments alone.
        gap = both @ moments[0] @ both - 2 * both @ moments[0] + moments[0]
        found.append((float(np.trace(gap @ moments[1])), weight))
    weight = min(found)[1]
    axes = longest_axes((1 - weight) * moments[0] + weight * moments[1]).astype(np.float32)
    return Projection(axes, axes)


def sphered(documents: Float32Array, questions: Float32Array) -> Projection:
    """Return GleanVec's closed form of LeanVec's loss: PCA where questions look alike in each direction."""
    # Few questions leave most directions without any: there the documents stand in.
    values, axes = np.linalg.eigh(0.5 * moment(questions) + 0.5 * moment(documents))
    root = axes * np.sqrt(np.maximum(values, 1e-9)) @ axes.T
    longest = longest_axes(root @ moment(documents) @ root)
    inverse = axes / np.sqrt(np.maximum(values, 1e-9)) @ axes.T
    return Projection((inverse @ longest).astype(np.float32), (root @ longest).astype(np.float32), unit=False)


def moment(rows: Float32Array) -> np.ndarray:
    """Return the second moment, float64 [full_dim, full_dim]."""
    doubles = rows.astype(np.float64)
    return doubles.T @ doubles / len(rows)


def longest_axes(matrix: np.ndarray) -> np.ndarray:
    """Return eigenvectors as columns, that of the largest eigenvalue first."""
    return np.linalg.eigh(matrix)[1][:, ::-1]


def in_shortlist(way: Projection, queries: Float32Array, documents: Float32Array, true: np.ndarray, dim: int) -> float:
    """Return the share of the true top 10 among the first 50 at `dim`."""
    asked, rows = queries @ way.queries, documents @ way.documents
    scores = truncate(asked, dim) @ truncate(rows, dim).T if way.unit else asked[:, :dim] @ rows[:, :dim].T
    first = np.argpartition(-scores, SHORTLIST, axis=1)[:, :SHORTLIST]
    return float(np.mean([len(set(one) & set(other)) / K for one, other in zip(first, true, strict=True)]))


if __name__ == "__main__":
    main()
