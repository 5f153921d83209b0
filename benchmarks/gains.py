"""What two-stage search gains at each dimension: recall, memory and time beside single-stage Chroma, as a picture.

    python benchmarks/gains.py path/to/dataset [--cache vectors.sqlite3] [--svg docs/gains.svg]

The dataset is a folder in the BEIR layout. Prints the table that the picture shows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import chromadb
import matplotlib as mpl
import matplotlib.pyplot as plt
from index import machine

from mrl_rag import CachedEncoder, MatryoshkaEncoder, Plan, TwoStageIndex, truncate
from mrl_rag.evaluation import exact_scan, read_beir, recall_at_k, timed
from mrl_rag.truncation import Float32Array

DIMS = (64, 96, 128, 192, 256, 384)
K = 10
SHORTLIST = 50
GRAY = "#7d8590"  # readable on GitHub's white and on its black


class Row(NamedTuple):
    """What one way to search gives: recall@10, megabytes of vectors searched, milliseconds per query."""

    recall: float
    megabytes: float
    milliseconds: float


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder with corpus.jsonl, queries.jsonl, qrels.tsv")
    parser.add_argument("--cache", type=Path, help="keep the vectors in this file for the next run")
    parser.add_argument("--svg", type=Path, help="draw the picture into this file")
    arguments = parser.parse_args()

    data = read_beir(arguments.dataset)
    with MatryoshkaEncoder() as model:
        encoder = CachedEncoder(model, arguments.cache) if arguments.cache else model
        vectors = encoder.encode(list(data.corpus.values()), progress=True)
        queries = encoder.encode_queries(list(data.queries.values()))
    ids = list(data.corpus)
    exact = [[ids[i] for i in rows] for rows in exact_scan(vectors, queries, K)]
    print(f"{arguments.dataset.name}: {len(ids)} documents, {len(queries)} queries, {model.model}; {machine()}\n")
    print("| numbers searched | recall@10, two stages | first numbers alone | MB | Chroma's | ms | Chroma's |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    two_stage, alone = {}, {}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        TwoStageIndex(Path(folder) / "two-stage", full_dim=model.full_dim) as index,
    ):
        index.upsert(ids, vectors)
        for dim in DIMS:
            two_stage[dim] = ours = search_in_two_stages(index, dim, queries, exact)
            alone[dim] = theirs = search_in_chroma(Path(folder) / f"chroma-{dim}", ids, vectors, dim, queries, exact)
            print(
                f"| {dim} | {ours.recall:.3f} | {theirs.recall:.3f} | {ours.megabytes:.1f} | "
                f"{theirs.megabytes:.1f} | {ours.milliseconds:.2f} | {theirs.milliseconds:.2f} |"
            )
    if arguments.svg:
        draw(two_stage, alone, arguments.svg)


def search_in_two_stages(index: TwoStageIndex, dim: int, queries: Float32Array, exact: list[list[str]]) -> Row:
    """Search `dim` numbers and rank the best by all."""
    index.reindex(shortlist_dim=dim, rotation="fit")
    plan = Plan(dims=(dim, index.full_dim), sizes=(SHORTLIST,)) if dim < index.full_dim else None
    index.search(queries[:1], k=K, plan=plan)
    found, seconds = timed(lambda q: [h.id for h in index.search(q[None], k=K, plan=plan)[0]], list(queries))
    # In memory: a byte per number.
    return Row(recall_at_k(found, exact), len(index) * dim / 1e6, seconds * 1e3)


def search_in_chroma(
    folder: Path, ids: list[str], vectors: Float32Array, dim: int, queries: Float32Array, exact: list[list[str]]
) -> Row:
    """Search the first `dim` numbers in one stage, as Chroma does by itself."""
    collection = chromadb.PersistentClient(folder).create_collection(
        "docs", configuration={"hnsw": {"space": "cosine", "sync_threshold": 1000}}, embedding_function=None
    )
    for at in range(0, len(ids), 5000):
        collection.add(ids[at : at + 5000], truncate(vectors[at : at + 5000], dim))
    asked = truncate(queries, dim)
    found, seconds = timed(lambda q: collection.query(q[None], n_results=K)["ids"][0], list(asked))
    size = sum(file.stat().st_size for file in folder.rglob("*.bin"))
    return Row(recall_at_k(found, exact), size / 1e6, seconds * 1e3)


def draw(two_stage: dict[int, Row], alone: dict[int, Row], svg: Path) -> None:
    """Draw recall, memory and time by dimension."""
    mpl.rcParams.update({name: GRAY for name in ("text.color", "axes.edgecolor", "axes.labelcolor")})
    mpl.rcParams.update({"xtick.color": GRAY, "ytick.color": GRAY, "svg.fonttype": "none", "svg.hashsalt": "gains"})
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    titles = ("recall@10", "MB of vectors searched", "ms per query")
    for panel, title, field in zip(panels, titles, Row._fields, strict=True):
        for rows, style, label in (
            (two_stage, {"color": "#2f81f7", "marker": "o"}, "mrl-rag, two stages"),
            (alone, {"color": "#db6d28", "marker": "s", "linestyle": "--"}, "Chroma, first numbers alone"),
        ):
            panel.plot(list(rows), [getattr(row, field) for row in rows.values()], label=label, **style)
        panel.set(title=title, xlabel="numbers searched per vector", xticks=[64, 128, 192, 256, 384])
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(svg, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
