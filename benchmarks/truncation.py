"""What plain truncation costs: nDCG@10 of an exact search by vectors cut to each dimension.

python benchmarks/truncation.py DATASET ... [--model minilm] [--dims 384 256 128 64]
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from mrl_rag import MatryoshkaEncoder, truncate
from mrl_rag.evaluation import exact_scan, ndcg, read_beir


def main() -> None:
    """Print a row per collection."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+", help="folders with corpus.jsonl, queries.jsonl, qrels.tsv")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 256, 192, 128, 96, 64, 32])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    encoder = MatryoshkaEncoder(arguments.model)
    print(f"| collection | {' | '.join(map(str, arguments.dims))} |")
    print(f"| --- |{' ---: |' * len(arguments.dims)}")
    for folder in arguments.datasets:
        data = read_beir(folder)
        corpus = encoder.encode_documents(list(data.corpus.values()), encoder.full_dim)
        queries = encoder.encode_queries(list(data.queries.values()), encoder.full_dim)
        ids, scores = list(data.corpus), []
        for dim in arguments.dims:
            cut, asked = truncate(corpus, dim), truncate(queries, dim)
            run = {
                query: {ids[i]: float(vector @ cut[i]) for i in rows}
                for query, vector, rows in zip(data.queries, asked, exact_scan(cut, asked, 10), strict=True)
            }
            scores.append(ndcg(run, data.qrels))
        print(f"| {folder.name} | {' | '.join(f'{score:.3f}' for score in scores)} |", flush=True)


if __name__ == "__main__":
    main()
