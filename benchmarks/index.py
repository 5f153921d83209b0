"""This index against what people use today: one run, the same vectors and queries for all.

    python benchmarks/index.py [--count 100000] [--dim 768] [--only NAME ...] [--skip NAME ...]
    python benchmarks/index.py --vectors vectors.npy --query-vectors queries.npy

Each contestant runs in processes of its own: one fills it and asks it, and for what is kept on disk a second one opens
it again. Every record has a document of some 200 characters and a metadata dict; every answer is the 10 nearest
records with score, document and metadata. Memory is the growth of the resident set since before the filling (or the
opening), after all searches; what a small index of the same kind needs (imports, threads) is in before. In brackets,
how much of it are pages of mapped files, which the system takes back when it needs the room.

The synthetic vectors are unit rows whose coordinate i has a standard deviation in proportion to (i + 1) ** -DECAY,
turned by a random orthogonal matrix, so that the spectrum decays and no cut of the coordinates as they come finds it.
A share of each is its cluster's centre; clusters differ in size and hold 100 records in the mean. Queries are new
draws. With the defaults 64 of 768 coordinates keep 7/10 of the squared length after the best rotation, as 64 of 384 do
for MiniLM on npl. With `--vectors`, `--count` and its kin say nothing.

Memory is read from /proc: Linux only. 100,000 x 768 takes some 15 minutes on 2 cores; for more, name the contestants.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from mrl_rag.truncation import Float32Array, normalize, truncate

K = 10
SHORTLIST_DIM = 64
SHORTLIST = 100
# Chroma's defaults, for every graph here.
NEIGHBOURS, EF = 16, 100
BATCH = 100
THREADS, THREADED_SECONDS = 8, 3.0
ROUNDS = 3
# One query at a time: at least so many, and up to the second number while there is time.
SINGLES, MOST_SINGLES, SECONDS = 200, 2000, 10.0
BLOCK = 20_000
CLUSTER = 100
CENTRE_SHARE = 0.6
SENTENCE = "a chain of calls reads the index and ranks what it finds by cosine before any model answers the question"

Answer = tuple[str, float, str, dict[str, Any]]


class Records(NamedTuple):
    """What a user has beside the vectors."""

    ids: list[str]
    documents: list[str]
    metadatas: list[dict[str, Any]]

    @classmethod
    def make(cls, count: int) -> Records:
        """Make new ones, the same every time."""
        words = SENTENCE.split()
        texts = [" ".join(words[(row * step) % len(words)] for step in range(1, 37)) for row in range(997)]
        return cls(
            [str(row) for row in range(count)],
            [f"Record {row}: {texts[row % len(texts)]}" for row in range(count)],
            [{"source": f"file-{row % 1000}.md", "page": row % 40} for row in range(count)],
        )

    def part(self, rows: slice) -> Records:
        """Return some of them."""
        return Records(self.ids[rows], self.documents[rows], self.metadatas[rows])

    def answer(self, rows: Sequence[int], scores: Sequence[float]) -> list[Answer]:
        """Return records by row, with their scores."""
        return [
            (self.ids[row], float(score), self.documents[row], self.metadatas[row])
            for row, score in zip(rows, scores, strict=True)
        ]


class Contestant(Protocol):
    """One way to search, on a folder; one that persists finds there what it was filled with."""

    packages: ClassVar[tuple[str, ...]]
    persists: ClassVar[bool]

    def __init__(self, folder: Path) -> None: ...

    def fill(self, vectors: Float32Array, records: Records) -> None:
        """Take everything; vectors are a memory-mapped file of unit rows."""

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        """Return the nearest records a query, with the contestant's own way of asking many at once."""


class MrlRag:
    """`TwoStageIndex`, in one upsert, with its default plan."""

    packages: ClassVar = ("chromadb",)
    persists: ClassVar = True

    def __init__(self, folder: Path) -> None:
        from mrl_rag import TwoStageIndex

        self.index = TwoStageIndex(folder, shortlist_dim=SHORTLIST_DIM)

    def fill(self, vectors: Float32Array, records: Records) -> None:
        self.index.upsert(records.ids, vectors, records.documents, records.metadatas)

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        return [
            [(hit.id, hit.score, hit.document or "", hit.metadata) for hit in hits]
            for hits in self.index.search(queries, K)
        ]


class Chroma:
    """Full vectors in Chroma, in batches of the size it takes."""

    packages: ClassVar = ("chromadb",)
    persists: ClassVar = True

    def __init__(self, folder: Path) -> None:
        import chromadb

        self.client = chromadb.PersistentClient(folder)
        self.collection = self.client.get_or_create_collection(
            "docs", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
        )

    def fill(self, vectors: Float32Array, records: Records) -> None:
        for rows in slices(len(vectors), self.client.get_max_batch_size()):
            stored = self.stored(vectors[rows])
            self.collection.upsert(records.ids[rows], stored, records.metadatas[rows], records.documents[rows])

    def stored(self, vectors: Float32Array) -> Float32Array:
        """Return what the collection holds of vectors."""
        return vectors

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        found = self.collection.query(
            query_embeddings=queries, n_results=K, include=["documents", "metadatas", "distances"]
        )
        columns = (found["ids"], found["distances"], found["documents"], found["metadatas"])
        return [
            [(id_, 1 - distance, text, dict(metadata)) for id_, distance, text, metadata in zip(*row, strict=True)]
            for row in zip(*columns, strict=True)
        ]


class ChromaPart(Chroma):
    """What two-stage search asks of Chroma, and nothing else: ids of a shortlist, then K records. The floor for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.file = folder / "rotation.npy"
        self.rotation = np.load(self.file) if self.file.exists() else None

    def fill(self, vectors: Float32Array, records: Records) -> None:
        from mrl_rag.index.rotation import SAMPLE, first_axes, fit

        self.rotation = first_axes(fit(vectors[:: -(-len(vectors) // SAMPLE)]), SHORTLIST_DIM)
        np.save(self.file, self.rotation)
        super().fill(vectors, records)

    def stored(self, vectors: Float32Array) -> Float32Array:
        return normalize(vectors @ self.rotation)

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        found = self.collection.query(query_embeddings=self.stored(queries), n_results=SHORTLIST, include=[])["ids"]
        wanted = list({id_ for ids in found for id_ in ids[:K]})
        kept = self.collection.get(wanted, include=["documents", "metadatas"])
        records = dict(zip(kept["ids"], zip(kept["documents"], kept["metadatas"], strict=True), strict=True))
        return [[(id_, 0.0, records[id_][0], dict(records[id_][1])) for id_ in ids[:K]] for ids in found]


class LangChainChroma:
    """The same through `langchain_chroma`, which asks Chroma one query a call."""

    packages: ClassVar = ("langchain_chroma",)
    persists: ClassVar = True

    def __init__(self, folder: Path) -> None:
        from langchain_chroma import Chroma
        from langchain_core.embeddings import Embeddings

        class Known(Embeddings):
            """Vectors that were made before, as the lists of floats that LangChain passes on."""

            vectors: list[list[float]]

            def embed_documents(self, texts: list[str]) -> list[list[float]]:
                return self.vectors

            def embed_query(self, text: str) -> list[float]:
                raise NotImplementedError

        self.known = Known()
        self.store = Chroma("docs", self.known, str(folder), collection_configuration={"hnsw": {"space": "cosine"}})

    def fill(self, vectors: Float32Array, records: Records) -> None:
        for rows in slices(len(vectors), 5000):
            self.known.vectors = vectors[rows].tolist()
            part = records.part(rows)
            self.store.add_texts(part.documents, part.metadatas, part.ids)
        self.known.vectors = []

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        ask = self.store.similarity_search_by_vector_with_relevance_scores
        return [
            [(document.id, 1 - distance, document.page_content, document.metadata) for document, distance in ask(q, K)]
            for q in queries.tolist()
        ]


class NumpyScan:
    """A product of matrices and a partial sort."""

    packages: ClassVar = ()
    persists: ClassVar = False

    def __init__(self, folder: Path) -> None:
        pass

    def fill(self, vectors: Float32Array, records: Records) -> None:
        self.vectors, self.records = np.array(vectors), records

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        return [self.records.answer(*best(scores)) for scores in queries @ self.vectors.T]


class FaissFlat:
    """FAISS's exact scan."""

    packages: ClassVar = ("faiss",)
    persists: ClassVar = False

    def __init__(self, folder: Path) -> None:
        import faiss

        self.make: Callable[[int], Any] = faiss.IndexFlatIP

    def fill(self, vectors: Float32Array, records: Records) -> None:
        self.index, self.records = self.make(vectors.shape[1]), records
        for rows in slices(len(vectors), BLOCK):
            self.index.add(vectors[rows])

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        scores, rows = self.index.search(queries, K)
        return [self.records.answer(*pair) for pair in zip(rows.tolist(), scores.tolist(), strict=True)]


class FaissHnsw(FaissFlat):
    """FAISS's graph, with Chroma's settings."""

    def __init__(self, folder: Path) -> None:
        import faiss

        def make(dim: int) -> Any:
            index = faiss.IndexHNSWFlat(dim, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = index.hnsw.efSearch = EF
            return index

        self.make = make


class UsearchRescored:
    """Two stages by hand: usearch on the first coordinates after the same rotation, float16 full vectors in a file."""

    packages: ClassVar = ("usearch",)
    persists: ClassVar = False

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "full.npy"

    def fill(self, vectors: Float32Array, records: Records) -> None:
        from usearch.index import Index

        from mrl_rag.index.rotation import SAMPLE, fit

        self.records = records
        self.rotation = fit(vectors[:: -(-len(vectors) // SAMPLE)])
        self.index = Index(
            ndim=SHORTLIST_DIM, metric="ip", dtype="f32", connectivity=NEIGHBOURS, expansion_add=EF, expansion_search=EF
        )
        full = np.lib.format.open_memmap(self.file, "w+", np.float16, vectors.shape)
        for rows in slices(len(vectors), BLOCK):
            full[rows] = vectors[rows]
            self.index.add(np.arange(rows.start, rows.stop), truncate(vectors[rows] @ self.rotation, SHORTLIST_DIM))
        full.flush()
        self.full = np.load(self.file, mmap_mode="r")

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        keys = self.index.search(truncate(queries @ self.rotation, SHORTLIST_DIM), SHORTLIST).keys
        answers = []
        for query, found in zip(queries, keys.reshape(len(queries), -1).astype(np.int64), strict=True):
            places, scores = best(self.full[found].astype(np.float32) @ query)
            answers.append(self.records.answer(found[places].tolist(), scores))
        return answers


class Memory(NamedTuple):
    """Bytes of a process that are in memory, and those of them that are pages of mapped files."""

    resident: int
    mapped: int

    @classmethod
    def now(cls) -> Memory:
        """Return this process's."""
        _, pages, mapped, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), mapped * os.sysconf("SC_PAGE_SIZE"))

    def since(self, before: Memory) -> Memory:
        """Return the growth."""
        return Memory(self.resident - before.resident, self.mapped - before.mapped)

    def share(self, other: Memory) -> float:
        """Return how much of the other's growth this is."""
        return self.resident / other.resident

    @property
    def own(self) -> int:
        """What the system can't take back."""
        return self.resident - self.mapped

    def __str__(self) -> str:
        return f"{self.resident / 1e6:,.0f} ({self.mapped / 1e6:,.0f})"


OURS, PART, SINGLE, SCAN = "mrl-rag", "chroma-part", "chroma", "numpy"
CONTESTANTS: dict[str, tuple[str, type[Contestant]]] = {
    OURS: (f"mrl-rag, {SHORTLIST} at {SHORTLIST_DIM}", MrlRag),
    PART: ("Chroma's part of it alone", ChromaPart),
    SINGLE: ("single-stage Chroma", Chroma),
    "langchain-chroma": ("the same through langchain_chroma", LangChainChroma),
    SCAN: ("exact scan, numpy", NumpyScan),
    "faiss-flat": ("exact scan, FAISS IndexFlatIP", FaissFlat),
    "faiss-hnsw": ("FAISS IndexHNSWFlat", FaissHnsw),
    "usearch": (f"usearch at {SHORTLIST_DIM}, {SHORTLIST} rescored", UsearchRescored),
}


@dataclass
class Result:
    """What was measured of one contestant; times in seconds, sizes in bytes.

    Attributes:
        fill: to take everything.
        grown: of the resident set, after filling and searching.
        alone: seconds of each query asked alone.
        batched: queries a second, asked BATCH at a time.
        threaded: queries a second from THREADS threads.
        recall: of the exact scan's first K.
        beyond: seconds a query outside of the collection's own methods, the median.
        disk: what the folder holds.
        reopened: growth of the resident set after opening and searching; None where nothing was kept.
    """

    fill: float
    grown: Memory
    alone: list[float]
    batched: float
    threaded: float
    recall: float
    beyond: float
    disk: int = 0
    reopened: Memory | None = None

    @property
    def p50(self) -> float:
        """Of the queries asked alone."""
        return statistics.median(self.alone)

    @property
    def kept(self) -> Memory:
        """`reopened`, of one that was."""
        assert self.reopened is not None
        return self.reopened


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--decay", type=float, default=0.55)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--skip", nargs="+", choices=CONTESTANTS, default=[])
    parser.add_argument("--vectors", type=Path, help="a .npy file to use instead of synthetic ones")
    parser.add_argument("--query-vectors", type=Path, help="its queries, the same number of columns")
    arguments = parser.parse_args()
    if (arguments.vectors is None) != (arguments.query_vectors is None):
        parser.error("--vectors and --query-vectors go together")
    if arguments.vectors is None and min(arguments.count, arguments.queries) < SINGLES:
        parser.error(f"--count and --queries must be at least {SINGLES}")
    names = [name for name in CONTESTANTS if name in arguments.only and name not in arguments.skip]
    for package in {package for name in names for package in CONTESTANTS[name][1].packages}:
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed: pip install -e '.[dev,benchmarks]', or --skip what needs it")

    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        say("vectors")
        if arguments.vectors is None:
            source = f"synthetic, decay {arguments.decay:g}"
            synthesize(shared, arguments.count, arguments.dim, arguments.queries, arguments.decay)
        else:
            source = f"{arguments.vectors.name} and {arguments.query_vectors.name}"
            copy(arguments.vectors, shared / "vectors.npy")
            copy(arguments.query_vectors, shared / "queries.npy")
        vectors, queries = load(shared)
        say("exact neighbours")
        np.save(shared / "nearest.npy", exact(vectors, queries))
        print(f"    python {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}\n")
        print(f"{len(vectors):,} vectors of {vectors.shape[1]} numbers, {len(queries)} queries; {source}.")
        print(f"{machine()}\n")
        print(
            "| index | fill, s | memory, MB | reopened, MB | disk, MB | ms, one query, p50 | p95 "
            f"| queries/s, batches of {BATCH} | queries/s, {THREADS} threads | recall@{K} |"
        )
        print(f"| --- |{' ---: |' * 9}", flush=True)
        del vectors, queries
        results = {}
        for name in names:
            results[name] = measure(name, shared)
            print(row(CONTESTANTS[name][0], results[name]), flush=True)
    print_ratios(results)


def measure(name: str, shared: Path) -> Result:
    """Run one contestant in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = in_process(fill_and_ask, name, shared, Path(folder) / "index")
        result.disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        if CONTESTANTS[name][1].persists:
            result.reopened = in_process(reopen_and_ask, name, shared, Path(folder) / "index")
    return result


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def fill_and_ask(name: str, shared: Path, folder: Path) -> Result:
    """Measure everything but the reopening."""
    kind = CONTESTANTS[name][1]
    vectors, queries = load(shared)
    nearest = np.load(shared / "nearest.npy")
    warm_up(kind, vectors, queries)
    records = Records.make(len(vectors))
    # Again from the file: the pages of the input that were read must not count, neither before nor after.
    del vectors
    before = Memory.now()

    vectors, _ = load(shared)
    # What lives on disk takes the user's records and lets them go; what has no place for them keeps some of its own.
    given = records if kind.persists else Records.make(len(vectors))
    say(f"{name}: fill")
    start = time.perf_counter()
    contestant = kind(folder)
    contestant.fill(vectors, given)
    fill = time.perf_counter() - start
    del vectors, given

    say(f"{name}: one query at a time")
    for query in queries[:20]:
        contestant.search(query[None])
    alone, beyond = [], []
    with inside_chroma() as inside:
        began = time.perf_counter()
        for query in itertools.islice(itertools.cycle(queries), MOST_SINGLES):
            inside[0] = 0.0
            start = time.perf_counter()
            contestant.search(query[None])
            alone.append(time.perf_counter() - start)
            beyond.append(alone[-1] - inside[0])
            if len(alone) >= SINGLES and time.perf_counter() - began > SECONDS:
                break

    say(f"{name}: batches of {BATCH}")
    seconds = []
    for _ in range(ROUNDS):
        answers = []
        start = time.perf_counter()
        for rows in slices(len(queries), BATCH):
            answers += contestant.search(queries[rows])
        seconds.append(time.perf_counter() - start)
    batched = len(queries) / statistics.median(seconds)
    found = [{int(id_) for id_, *_ in answer} for answer in answers]
    recall = statistics.fmean(len(f.intersection(n)) / len(n) for f, n in zip(found, nearest.tolist(), strict=True))

    say(f"{name}: {THREADS} threads")
    rates = []
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            asked = sum(
                pool.map(lambda first, start=start: keep_asking(contestant, queries, first, start), range(THREADS))
            )
            rates.append(asked / (time.perf_counter() - start))
    threaded = statistics.median(rates)
    return Result(fill, Memory.now().since(before), alone, batched, threaded, recall, statistics.median(beyond))


def keep_asking(contestant: Contestant, queries: Float32Array, first: int, start: float) -> int:
    """Ask every THREADS-th query alone, around and around for a while; return how many."""
    asked = 0
    while time.perf_counter() - start < THREADED_SECONDS:
        contestant.search(queries[(first + asked * THREADS) % len(queries)][None])
        asked += 1
    return asked


def reopen_and_ask(name: str, shared: Path, folder: Path) -> Memory:
    """Return how the resident set grows when an index is opened and answers."""
    say(f"{name}: reopen")
    kind = CONTESTANTS[name][1]
    vectors, queries = load(shared)
    warm_up(kind, vectors, queries)
    del vectors
    before = Memory.now()
    contestant = kind(folder)
    for query in queries[:SINGLES]:
        contestant.search(query[None])
    return Memory.now().since(before)


def warm_up(kind: type[Contestant], vectors: Float32Array, queries: Float32Array) -> None:
    """Fill and ask a small index, so that what is loaded once a process is loaded."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        contestant = kind(Path(folder) / "small")
        rows = vectors[:SINGLES]
        contestant.fill(rows, Records.make(len(rows)))
        contestant.search(queries[:BATCH])


@contextmanager
def inside_chroma() -> Iterator[list[float]]:
    """Add up, in the list's one number, the seconds that this thread spends in a collection's methods."""
    if "chromadb" not in sys.modules:
        # Not imported for those that do without: it takes memory.
        yield [0.0]
        return
    from chromadb.api.models.Collection import Collection

    inside = [0.0]
    originals = {name: getattr(Collection, name) for name in ("query", "get", "count")}

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                inside[0] += time.perf_counter() - start

        return call

    for name, original in originals.items():
        setattr(Collection, name, timed(original))
    try:
        yield inside
    finally:
        for name, original in originals.items():
            setattr(Collection, name, original)


def synthesize(shared: Path, count: int, dim: int, queries: int, decay: float) -> None:
    """Write unit vectors and queries of one distribution; the module's docstring says which."""
    random = np.random.default_rng(0)
    scale = (np.arange(1, dim + 1) ** -decay).astype(np.float32)
    turn = np.linalg.qr(random.standard_normal((dim, dim)))[0].astype(np.float32)
    centres = random.standard_normal((-(-count // CLUSTER), dim), dtype=np.float32)

    def draw(rows: int) -> Float32Array:
        # Squared, so that the first clusters are much larger than the last.
        centre = centres[(len(centres) * random.random(rows) ** 2).astype(np.intp)]
        own = random.standard_normal((rows, dim), dtype=np.float32)
        return normalize(((CENTRE_SHARE**0.5 * centre + (1 - CENTRE_SHARE) ** 0.5 * own) * scale) @ turn)

    vectors = np.lib.format.open_memmap(shared / "vectors.npy", "w+", np.float32, (count, dim))
    for rows in slices(count, BLOCK):
        vectors[rows] = draw(rows.stop - rows.start)
    vectors.flush()
    np.save(shared / "queries.npy", draw(queries))


def copy(source: Path, target: Path) -> None:
    """Write the rows of a file at unit length, float32."""
    given = np.load(source, mmap_mode="r")
    rows_ = np.lib.format.open_memmap(target, "w+", np.float32, given.shape)
    for rows in slices(len(given), BLOCK):
        rows_[rows] = normalize(given[rows])
    rows_.flush()


def load(shared: Path) -> tuple[Float32Array, Float32Array]:
    """Return the vectors, left on the disk, and the queries."""
    return np.load(shared / "vectors.npy", mmap_mode="r"), np.load(shared / "queries.npy")


def exact(vectors: Float32Array, queries: Float32Array) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return the rows of the K nearest vectors a query, int [q, K]."""
    rows_ = np.empty((len(queries), 0), dtype=np.intp)
    scores = np.empty((len(queries), 0), dtype=np.float32)
    for rows in slices(len(vectors), BLOCK):
        block = queries @ vectors[rows].T
        rows_ = np.hstack([rows_, np.broadcast_to(np.arange(rows.start, rows.stop), block.shape)])
        scores = np.hstack([scores, block])
        kept = np.argpartition(scores, -K, axis=1)[:, -K:]
        rows_, scores = np.take_along_axis(rows_, kept, 1), np.take_along_axis(scores, kept, 1)
    return rows_


def best(scores: Float32Array) -> tuple[list[int], list[float]]:
    """Return the places of the K highest scores and these, best first."""
    highest = np.argpartition(scores, -K)[-K:]
    highest = highest[np.argsort(-scores[highest])]
    return highest.tolist(), scores[highest].tolist()


def slices(count: int, size: int) -> Iterator[slice]:
    """Cut `count` rows into parts of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def row(label: str, result: Result) -> str:
    """Return one line of the table."""
    p95 = statistics.quantiles(result.alone, n=20)[-1]
    reopened = "" if result.reopened is None else str(result.reopened)
    disk = f"{result.disk / 1e6:,.0f}" if result.disk else ""
    return (
        f"| {label} | {result.fill:,.1f} | {result.grown} | {reopened} | {disk} | {result.p50 * 1e3:.2f} | "
        f"{p95 * 1e3:.2f} | {result.batched:,.0f} | {result.threaded:,.0f} | {result.recall:.4f} |"
    )


def print_ratios(results: dict[str, Result]) -> None:
    """Print how this index compares, and how Chroma's part of it alone would, as far as the others were run."""
    if OURS not in results:
        return
    ours, part = results[OURS], results.get(PART)
    print("\n| mrl-rag against | | wanted | measured | Chroma's part alone |\n| --- | --- | ---: | ---: | ---: |")

    def line(name: str, what: str, wanted: str, ratio: Callable[[Result, Result], float], digits: int = 2) -> None:
        against = results[name]
        alone = "" if part is None else f"{ratio(part, against):.{digits}f}"
        print(f"| {CONTESTANTS[name][0]} | {what} | {wanted} | {ratio(ours, against):.{digits}f} | {alone} |")

    if SINGLE in results:
        line(SINGLE, "queries/s in batches, times", ">= 2", lambda one, other: one.batched / other.batched)
        line(SINGLE, f"queries/s from {THREADS} threads, times", "", lambda one, other: one.threaded / other.threaded)
        line(SINGLE, "ms of one query, share", "<= 1", lambda one, other: one.p50 / other.p50)
        line(SINGLE, "memory after filling, share", "<= 0.17", lambda one, other: one.grown.share(other.grown))
        line(SINGLE, "memory after reopening, share", "<= 0.17", lambda one, other: one.kept.share(other.kept))
        line(SINGLE, "the same without mapped files", "", lambda one, other: one.kept.own / other.kept.own)
        line(SINGLE, "fill time, share", "<= 0.65", lambda one, other: one.fill / other.fill)
    if SCAN in results:
        line(SCAN, "one query, times faster", ">= 30 at 1M", lambda one, other: other.p50 / one.p50, 1)
        line(SCAN, "in batches, times faster", "", lambda one, other: one.batched / other.batched, 1)
    print(f"| exact neighbours | recall@{K} | >= 0.99 | {ours.recall:.4f} | |")
    print(f"| Chroma's calls | ms a query beyond them, p50 | <= 0.4 | {ours.beyond * 1e3:.2f} | |")


def machine() -> str:
    """Say what this was run on."""
    versions = []
    for package in ("numpy", "chromadb", "langchain-chroma", "faiss-cpu", "usearch"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{cores}, Python {platform.python_version()}, {', '.join(versions)}"


def say(what: str) -> None:
    """Report progress."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
