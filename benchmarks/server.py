"""A two-stage index on a Chroma server against single-stage Chroma there: recall, time, requests and bytes per search.

    python benchmarks/server.py path/to/dataset [--model minilm] [--cache vectors.sqlite3] [--delay 0]

The dataset is a folder in the BEIR layout. The script starts a `chroma run` on loopback in a temporary folder, and
fills it three times: plain Chroma; an index whose first upsert is enough to fit a rotation; one without a rotation.
Then all contestants answer each query in turn, several rounds, so that a busy moment of the machine meets all. Ten hits
with documents are asked for. Times are medians. `--delay` sleeps so many milliseconds before each request, in place of
a network.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb
import httpx

from mrl_rag import CachedEncoder, MatryoshkaEncoder, Plan, TwoStageIndex
from mrl_rag.evaluation import exact_scan, read_beir, recall_at_k
from mrl_rag.truncation import Float32Array

K, ROUNDS, TOGETHER = 10, 3, 32
SIZES = (20, 50, 100, 200)


def main() -> None:
    """Fill the server, then search in each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder with corpus.jsonl, queries.jsonl, qrels.tsv")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--cache", type=Path, help="keep the vectors in this file for the next run")
    parser.add_argument("--delay", type=float, default=0.0, help="milliseconds before each request")
    arguments = parser.parse_args()

    data = read_beir(arguments.dataset)
    model = MatryoshkaEncoder(arguments.model)
    encoder = CachedEncoder(model, arguments.cache) if arguments.cache else model
    ids, texts = list(data.corpus), list(data.corpus.values())
    vectors, queries = encoder.encode(texts, progress=True), encoder.encode_queries(list(data.queries.values()))
    expected = [[ids[row] for row in rows] for rows in exact_scan(vectors, queries, K)]
    machine = platform.processor() or platform.machine()
    print(
        f"{arguments.dataset.name}: {len(vectors)} documents, {len(queries)} queries; {model.model}, {model.full_dim}"
    )
    print(f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}, Chroma {chromadb.__version__}\n")
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as port:
        client = chromadb.HttpClient("127.0.0.1", port)
        traffic = Traffic(client, arguments.delay / 1e3)
        plain = client.create_collection("plain", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)
        step = client.get_max_batch_size()
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            plain.upsert(ids[part], vectors[part], documents=texts[part])  # type: ignore[arg-type]
        fitted, cut = (TwoStageIndex(client=client, collection=name, rotation=name) for name in ("auto", "none"))
        for index in (fitted, cut):
            index.upsert(ids, vectors, texts)

        def single_stage(query: Float32Array) -> list[str]:
            return plain.query(query_embeddings=query[None], n_results=K, include=["documents", "distances"])["ids"][0]

        ways: dict[str, Callable[[Float32Array], list[str]]] = {f"single-stage Chroma, {model.full_dim}": single_stage}
        for name, index in (("fitted", fitted), ("cut", cut)):
            dims = index.shortlist_dim or 0, index.full_dim or 0
            ways[f"two stages, {dims[0]} {name}, default"] = searched(index, None)
            for size in SIZES:
                ways[f"two stages, {size} at {dims[0]}, {name}"] = searched(index, Plan(dims=dims, sizes=(size,)))
        compare(ways, queries, expected, traffic)
        together(fitted, plain, queries)


def searched(index: TwoStageIndex, plan: Plan | None) -> Callable[[Float32Array], list[str]]:
    """Return a search of an index."""
    return lambda query: [hit.id for hit in index.search(query[None], K, plan)[0]]


class Traffic:
    """Counts what a client sends and gets.

    Attributes:
        requests: since the last `reset`.
        bytes: of the answers, uncompressed.
    """

    def __init__(self, client: Any, delay: float) -> None:
        self.delay = delay
        self.reset()
        client._server._session.event_hooks = {"request": [self._sent], "response": [self._got]}

    def reset(self) -> None:
        self.requests, self.bytes = 0, 0

    def _sent(self, request: httpx.Request) -> None:
        time.sleep(self.delay)
        self.requests += 1

    def _got(self, response: httpx.Response) -> None:
        self.bytes += len(response.read())


def compare(
    ways: dict[str, Callable[[Float32Array], list[str]]],
    queries: Float32Array,
    expected: list[list[str]],
    traffic: Traffic,
) -> None:
    """Search in each way in turn, and print a line of each."""
    found, seconds = defaultdict(list), defaultdict(list)
    sent: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for search in ways.values():
        search(queries[0])
    for turn in range(ROUNDS):
        for query in queries:
            for name, search in ways.items():
                traffic.reset()
                start = time.perf_counter()
                answer = search(query)
                seconds[name].append(time.perf_counter() - start)
                sent[name].append((traffic.requests, traffic.bytes))
                if not turn:
                    found[name].append(answer)
    print("| search | recall@10 | ms, one query | requests | kB |\n| --- | ---: | ---: | ---: | ---: |")
    for name in ways:
        requests, bytes_ = (statistics.mean(each) for each in zip(*sent[name], strict=True))
        recall, median = recall_at_k(found[name], expected), statistics.median(seconds[name])
        print(f"| {name} | {recall:.1%} | {median * 1e3:.1f} | {requests:.2f} | {bytes_ / 1e3:.0f} |")


def together(index: TwoStageIndex, plain: chromadb.Collection, queries: Float32Array) -> None:
    """Print the queries per second of several at once."""

    async def awaited() -> None:
        limit = asyncio.Semaphore(TOGETHER)

        async def one(query: Float32Array) -> None:
            async with limit:
                await index.asearch(query, K)

        await asyncio.gather(*map(one, queries))

    def threaded(search: Callable[[Float32Array], Any]) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(search, queries))

    def asked(query: Float32Array) -> object:
        return plain.query(query_embeddings=query[None], n_results=K, include=["documents", "distances"])

    ways: dict[str, Callable[[], None]] = {
        "single-stage Chroma, 8 threads": lambda: threaded(asked),
        "two stages, 8 threads": lambda: threaded(lambda query: index.search(query, K)),
        f"two stages, {TOGETHER} awaited at once": lambda: asyncio.run(awaited()),
    }
    seconds = defaultdict(list)
    for _ in range(ROUNDS):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print("\n| several at once | queries per second |\n| --- | ---: |")
    for name in ways:
        print(f"| {name} | {len(queries) / statistics.median(seconds[name]):.0f} |")


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """Run a Chroma server in a folder; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "chroma"), "run", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen([*command, "--path", str(folder)], stdout=subprocess.DEVNULL) as process:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        try:
            yield port
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
