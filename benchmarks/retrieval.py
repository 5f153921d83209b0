"""Two-stage search against single-stage Chroma and an exact scan, on a BEIR folder, with the same vectors.

    python benchmarks/retrieval.py path/to/dataset [--model minilm] [--cache vectors.sqlite3]

Prints two tables. Ways to search: top-10 agreement with the exact scan, nDCG@10 (of ir-measures, over trec_eval),
milliseconds a query asked alone and in one call for all, time to fill, and bytes of Chroma's vector index. Ways to keep
full vectors: the same agreement and nDCG@10 of the default search, and the archive's bytes a vector, checksum included.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import chromadb
import numpy as np

from mrl_rag import CachedEncoder, MatryoshkaEncoder, Plan, TwoStageIndex
from mrl_rag.evaluation import Dataset, exact_scan, ndcg, read_beir, recall_at_k, timed
from mrl_rag.index.archive import ArchivePrecision
from mrl_rag.truncation import Float32Array

Ranking = list[tuple[str, float]]
K = 10


def main() -> None:
    """Encode once, then search in each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder with corpus.jsonl, queries.jsonl, qrels.tsv")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--cache", type=Path, help="keep the vectors in this file for the next run")
    arguments = parser.parse_args()

    data = read_beir(arguments.dataset)
    model = MatryoshkaEncoder(arguments.model)
    encoder = CachedEncoder(model, arguments.cache) if arguments.cache else model
    vectors = encoder.encode(list(data.corpus.values()), progress=True)
    queries = encoder.encode_queries(list(data.queries.values()))
    full = encoder.full_dim
    print(f"{arguments.dataset.name}: {len(vectors)} documents, {len(queries)} queries; {model.model}, {full} numbers")
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}, Chroma {chromadb.__version__}\n")
    print("| search | agreement | nDCG@10 | ms, one query | ms a query, all in one call | fill, s | index, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")

    ids = list(data.corpus)

    def scan(query: Float32Array) -> list[Ranking]:
        return [
            [(ids[i], float(vectors[i] @ one)) for i in rows]
            for one, rows in zip(query, exact_scan(vectors, query, K), strict=True)
        ]

    expected = [[id_ for id_, _ in ranking] for ranking in scan(queries)]
    row(f"exact scan, {full}", scan, data, queries, expected, 0.0, vectors.nbytes)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        single = single_stage(Path(folder) / "single", data, vectors)
        filled = time.perf_counter() - start

        def one_stage(query: Float32Array) -> list[Ranking]:
            answer = single.query(query_embeddings=query, n_results=K, include=["documents", "metadatas", "distances"])
            return [
                [(id_, 1 - distance) for id_, distance in zip(found, distances, strict=True)]
                for found, distances in zip(answer["ids"], answer["distances"] or [], strict=True)
            ]

        row(f"single-stage Chroma, {full}", one_stage, data, queries, expected, filled, size(Path(folder) / "single"))
        for dim in (full // 6, full // 4):
            start = time.perf_counter()
            path = Path(folder) / f"two-{dim}"
            index = TwoStageIndex(path, full_dim=full, shortlist_dim=dim, rotation="none")
            index.upsert(ids, vectors, list(data.corpus.values()))
            filled = time.perf_counter() - start
            for kind in ("cut", "rotated"):
                if kind == "rotated":
                    start = time.perf_counter()
                    index.reindex(rotation="fit")
                    filled = time.perf_counter() - start
                for shortlist in (50, 100):
                    plan = Plan(dims=(dim, full), sizes=(shortlist,))

                    def two_stage(
                        query: Float32Array, index: TwoStageIndex = index, plan: Plan = plan
                    ) -> list[Ranking]:
                        return [[(hit.id, hit.score) for hit in hits] for hits in index.search(query, K, plan)]

                    row(
                        f"two-stage, {shortlist} at {dim}, {kind}",
                        two_stage,
                        data,
                        queries,
                        expected,
                        filled,
                        size(path),
                    )
        print("\n| archive | bytes a vector | agreement | nDCG@10 |")
        print("| --- | ---: | ---: | ---: |")
        for precision in get_args(ArchivePrecision):
            path = Path(folder) / precision
            index = TwoStageIndex(path, full_dim=full, precision=precision)
            index.upsert(ids, vectors, list(data.corpus.values()))
            if index.rotation != "fit":
                index.reindex(rotation="fit")
            found = [[(hit.id, hit.score) for hit in hits] for hits in index.search(queries, K)]
            kept = sum(file.stat().st_size for part in ("*.rows", "*.bits") for file in path.glob(part))
            archive_row(precision, f"{kept / len(ids):.0f}", found, data, expected)
        signs = np.where(vectors > 0, 1, -1).astype(np.float32)
        by_signs = [[(ids[i], float(-place)) for place, i in enumerate(r)] for r in exact_scan(signs, queries, 100)]
        archive_row("sign bits alone", str(-(-full // 8)), [ranking[:K] for ranking in by_signs], data, expected)
        reached = recall_at_k([[id_ for id_, _ in ranking] for ranking in by_signs], expected)
        print(f"\nThe first 100 by sign bits alone hold {reached:.1%} of the true top {K}.")


def archive_row(name: str, bytes_: str, found: list[Ranking], data: Dataset, expected: list[list[str]]) -> None:
    """Print the line of one way to keep full vectors."""
    run = {query: dict(ranking) for query, ranking in zip(data.queries, found, strict=True)}
    same = recall_at_k([[id_ for id_, _ in ranking] for ranking in found], expected)
    print(f"| {name} | {bytes_} | {same:.1%} | {ndcg(run, data.qrels):.3f} |", flush=True)


def row(
    name: str,
    search: Callable[[Float32Array], list[Ranking]],
    data: Dataset,
    queries: Float32Array,
    expected: list[list[str]],
    filled: float,
    bytes_: int,
) -> None:
    """Measure one way of searching, and print its line."""
    search(queries[:1])
    _, alone = timed(search, [query[None] for query in queries])
    answers, together = timed(search, [queries], rounds=5)
    found = [[id_ for id_, _ in ranking] for ranking in answers[0]]
    run = {query: dict(ranking) for query, ranking in zip(data.queries, answers[0], strict=True)}
    print(
        f"| {name} | {recall_at_k(found, expected):.1%} | {ndcg(run, data.qrels):.3f} | {alone * 1e3:.2f} | "
        f"{together * 1e3 / len(queries):.2f} | {filled:.1f} | {bytes_ / 1e6:.1f} |",
        flush=True,
    )


def single_stage(folder: Path, data: Dataset, vectors: Float32Array) -> chromadb.Collection:
    """Return what a user has today: full vectors in Chroma."""
    client = chromadb.PersistentClient(folder)
    collection = client.create_collection("docs", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)
    ids, texts, step = list(data.corpus), list(data.corpus.values()), client.get_max_batch_size()
    for at in range(0, len(ids), step):
        part = slice(at, at + step)
        collection.upsert(ids[part], np.asarray(vectors[part]), documents=texts[part])
    return collection


def size(folder: Path) -> int:
    """Return the bytes of Chroma's vector index."""
    return sum(file.stat().st_size for file in folder.rglob("*.bin"))


if __name__ == "__main__":
    main()
