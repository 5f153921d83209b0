"""This index against what people use today: one run, the same vectors and queries for all.

    python benchmarks/index.py                                  # 100,000 x 768 and 40,000 x 3072
    python benchmarks/index.py --sizes 1000000x768 --keep kept  # a million, kept for the next run
    python benchmarks/index.py --ef-search 400 1600             # Chroma also where its graph is searched longer
    python benchmarks/index.py --sizes --data DATASET ...       # real text alone: folders in the BEIR layout
    python benchmarks/index.py --only mrl-rag --profile         # where the time of a query goes

mrl-rag runs at its default settings: it chooses the shortlist dimension. Every record has a document of some 200
characters and a metadata dict; every answer is the 10 nearest records with score, document and metadata. Each
contestant is filled in one process and measured in others, which fill and ask a small index of the same kind before
anything is timed, so that imports and threads are there. Numbers are medians of the rounds:

- open and first query: from calling the constructor to the first answer, in three processes. The operating system has
  the files in memory by then, unless the index was kept from an earlier day.
- memory: growth of the resident set from before the opening to after 200 queries. In brackets, how much of it are pages
  of mapped files, which the system takes back when it needs the room. Read from /proc: Linux only.
- one query, batches of 100, 8 threads: five rounds each. "Beyond Chroma" is the part of one query's time that passes
  outside of Chroma's own methods.
- one record upserted, new or in the place of another: ten rounds of five, after everything else. Each round puts back
  what was there.

mrl-rag and single-stage Chroma are alive together and take their rounds in turn, so that a busy moment of the machine
meets both. The closing table has the medians of the rounds' ratios. Other contestants follow one after another.

The synthetic vectors are unit rows whose coordinate i has a standard deviation in proportion to (i + 1) ** -0.55,
turned by a random orthogonal matrix, so that the spectrum decays and no cut of the coordinates as they come finds it.
A share of each is its cluster's centre; clusters differ in size and hold 100 records in the mean. Queries are 1000 new
draws. After the best rotation 64 of 768 coordinates keep 7/10 of the squared length, as 64 of 384 do for MiniLM on npl.
Real text is encoded by the default encoder. A dataset folder with `train.jsonl` and `test.jsonl` (a "text" a line)
is taken, too: the texts of the second are the queries.

With --keep, FOLDER/<count>x<dim>, or FOLDER/<name of the dataset>, has the vectors and each contestant's index. Beside
it NAME-fill.json says how long its filling took; remove that file to fill it anew, as after a change of mrl-rag.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pickle
import platform
import pstats
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import numpy as np

from mrl_rag.truncation import Float32Array, normalize, truncate

K = 10
QUERIES, DECAY, CLUSTER, CENTRE_SHARE = 1000, 0.55, 100, 0.6
SENTENCE = "a chain of calls reads the index and ranks what it finds by cosine before any model answers the question"
BLOCK = 20_000
# Of usearch with a rerank by hand; and Chroma's defaults, for every graph here.
SHORTLIST_DIM, SHORTLIST = 64, 100
NEIGHBOURS, EF, USEARCH = 16, 100, {"metric": "ip", "dtype": "f32"}

OPENS = 3
ROUNDS = {"alone": 5, "batched": 5, "threaded": 5, "upsert": 10}
WARM, SINGLES = 20, 200
# A round of queries asked alone: at most so many, and no more after so many seconds.
MOST_SINGLES, SECONDS = 400, 2.0
BATCH = 100
THREADS, THREADED_SECONDS = 8, 2.0
UPSERTS = 5
PROFILED, PROFILE_LINES = 500, 12

# Of one query's time, and times the throughput in batches, against single-stage Chroma.
WANTED = {(100_000, 768): (0.8, 2.0), (40_000, 3072): (0.5, 4.0), (1_000_000, 768): (0.7, 2.0)}
SIZES = list(WANTED)[:2]
WANTED_BEYOND_MS = {(100_000, 768): 0.35}
# Headers, and what of a contestant's measurements is under them.
COLUMNS = {
    "shortlist_dim": "{shortlist_dim:.0f}",
    "fill, s": "{fill:,.1f}",
    "open and first query, ms": "{opened:.1f}",
    "memory, MB": "{memory:,.0f} ({mapped:,.0f})",
    "disk, MB": "{disk:,.0f}",
    "ms, one query, p50": "{alone:.2f}",
    "p95": "{p95:.2f}",
    "ms beyond Chroma": "{beyond:.2f}",
    f"queries/s, batches of {BATCH}": "{batched:,.0f}",
    f"queries/s, {THREADS} threads": "{threaded:,.0f}",
    "ms, a new record": "{added:.2f}",
    "ms, a replaced record": "{replaced:.2f}",
    f"recall@{K}": "{recall:.4f}",
}

Answer = tuple[str, float, str, dict[str, Any]]
# What was measured of a contestant, a number per round, in the units of the table.
Result = dict[str, list[float]]


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


class Contestant:
    """One way to search, on a folder: the constructor opens what is there."""

    package: ClassVar[str] = "chromadb"
    upserts: ClassVar[bool] = True  # whether `fill` takes more records later, and `delete` works
    shortlist_dim: int | None = None

    def __init__(self, folder: Path) -> None: ...

    def fill(self, vectors: Float32Array, records: Records) -> None:
        """Take records and keep them in the folder; many vectors are a memory-mapped file of unit rows."""

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        """Return the nearest records of each query, with the contestant's own way of asking many at once."""
        raise NotImplementedError

    def delete(self, ids: list[str]) -> None: ...

    def close(self) -> None: ...


class MrlRag(Contestant):
    """`TwoStageIndex` with its default settings, filled in one upsert."""

    def __init__(self, folder: Path) -> None:
        from mrl_rag import TwoStageIndex

        self.index = TwoStageIndex(folder, "docs")

    @property
    def shortlist_dim(self) -> int | None:  # type: ignore[override]
        return self.index.shortlist_dim

    def fill(self, vectors: Float32Array, records: Records) -> None:
        self.index.upsert(records.ids, vectors, records.documents, records.metadatas)

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        found = self.index.search(queries, K)
        return [[(hit.id, hit.score, hit.document or "", hit.metadata) for hit in hits] for hits in found]

    def delete(self, ids: list[str]) -> None:
        self.index.delete(ids)

    def close(self) -> None:
        self.index.close()


class Chroma(Contestant):
    """Full vectors in Chroma, in batches of the size it takes."""

    def __init__(self, folder: Path) -> None:
        import chromadb

        self.client = chromadb.PersistentClient(folder)
        self.collection = self.client.get_or_create_collection(
            "docs", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
        )

    def fill(self, vectors: Float32Array, records: Records) -> None:
        for rows in slices(len(vectors), self.client.get_max_batch_size()):
            self.collection.upsert(records.ids[rows], vectors[rows], records.metadatas[rows], records.documents[rows])

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        found = self.collection.query(
            query_embeddings=queries, n_results=K, include=["documents", "metadatas", "distances"]
        )
        columns = (found["ids"], found["distances"], found["documents"], found["metadatas"])
        return [
            [(id_, 1 - distance, text, dict(metadata)) for id_, distance, text, metadata in zip(*row, strict=True)]
            for row in zip(*columns, strict=True)
        ]

    def delete(self, ids: list[str]) -> None:
        self.collection.delete(ids)

    def close(self) -> None:
        self.client.close()


class LangChainChroma(Chroma):
    """The same searched through `langchain_chroma`, which asks Chroma one query per call."""

    package: ClassVar = "langchain_chroma"

    def __init__(self, folder: Path) -> None:
        from langchain_chroma import Chroma as Store

        super().__init__(folder)
        self.store = Store("docs", client=self.client)

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        ask = self.store.similarity_search_by_vector_with_relevance_scores
        return [
            [(document.id, 1 - distance, document.page_content, document.metadata) for document, distance in ask(q, K)]
            for q in queries.tolist()
        ]


class NumpyScan(Contestant):
    """A product of matrices and a partial sort. What has no place for records keeps them in memory."""

    package: ClassVar = "numpy"
    upserts: ClassVar = False
    index: Any = None

    def __init__(self, folder: Path) -> None:
        self.file = folder / "index.pickle"
        if self.file.exists():
            with self.file.open("rb") as file:
                count, self.index = pickle.load(file)
            self.records = Records.make(count)

    def fill(self, vectors: Float32Array, records: Records) -> None:
        self.file.parent.mkdir(parents=True)
        with self.file.open("wb") as file:
            pickle.dump((len(vectors), self.build(vectors)), file, protocol=5)

    def search(self, queries: Float32Array) -> list[list[Answer]]:
        ids, documents, metadatas = self.records
        return [
            [(ids[row], score, documents[row], metadatas[row]) for row, score in zip(rows, scores, strict=True)]
            for rows, scores in self.nearest(queries)
        ]

    def build(self, vectors: Float32Array) -> Any:
        """Return what is searched."""
        return np.array(vectors)

    def nearest(self, queries: Float32Array) -> Iterable[tuple[list[int], list[float]]]:
        """Return rows and scores of each query, best first."""
        return map(best, queries @ self.index.T)


class FaissFlat(NumpyScan):
    """FAISS's exact scan."""

    package: ClassVar = "faiss"
    recipe: ClassVar[str] = "Flat"

    def build(self, vectors: Float32Array) -> Any:
        import faiss

        index = faiss.index_factory(vectors.shape[1], self.recipe, faiss.METRIC_INNER_PRODUCT)
        if self.recipe != "Flat":
            index.hnsw.efConstruction = index.hnsw.efSearch = EF
        for rows in slices(len(vectors), BLOCK):
            index.add(vectors[rows])
        return index

    def nearest(self, queries: Float32Array) -> Iterable[tuple[list[int], list[float]]]:
        scores, rows = self.index.search(queries, K)
        return zip(rows.tolist(), scores.tolist(), strict=True)


class FaissHnsw(FaissFlat):
    """FAISS's graph, with Chroma's settings."""

    recipe: ClassVar = f"HNSW{NEIGHBOURS},Flat"


class UsearchRescored(NumpyScan):
    """Two stages by hand: usearch on the first coordinates after a rotation, then float16 full vectors."""

    package: ClassVar = "usearch"
    shortlist_dim = SHORTLIST_DIM

    def __init__(self, folder: Path) -> None:
        from usearch.index import Index

        super().__init__(folder)
        if self.index is not None:
            self.axes, saved, self.full = self.index
            self.index = Index.restore(saved)

    def build(self, vectors: Float32Array) -> Any:
        from usearch.index import Index

        sample = vectors[:: -(-len(vectors) // BLOCK)]
        axes = np.linalg.eigh(sample.T @ sample)[1][:, : -SHORTLIST_DIM - 1 : -1]
        graph = Index(ndim=SHORTLIST_DIM, connectivity=NEIGHBOURS, expansion_add=EF, expansion_search=EF, **USEARCH)
        for rows in slices(len(vectors), BLOCK):
            graph.add(np.arange(rows.start, rows.stop), truncate(vectors[rows] @ axes, SHORTLIST_DIM))
        return axes, bytes(graph.save()), vectors.astype(np.float16)

    def nearest(self, queries: Float32Array) -> Iterable[tuple[list[int], list[float]]]:
        keys = self.index.search(truncate(queries @ self.axes, SHORTLIST_DIM), SHORTLIST).keys
        for query, found in zip(queries, keys.reshape(len(queries), -1).astype(np.int64), strict=True):
            places, scores = best(self.full[found].astype(np.float32) @ query)
            yield found[places].tolist(), scores


OURS, SINGLE, SCAN = "mrl-rag", "chroma", "numpy"
CONTESTANTS: dict[str, tuple[str, type[Contestant]]] = {
    OURS: ("mrl-rag", MrlRag),
    SINGLE: ("single-stage Chroma", Chroma),
    SCAN: ("exact scan, numpy", NumpyScan),
    "langchain-chroma": ("single-stage through langchain_chroma", LangChainChroma),
    "faiss-flat": ("exact scan, FAISS IndexFlatIP", FaissFlat),
    "faiss-hnsw": ("FAISS IndexHNSWFlat", FaissHnsw),
    "usearch": (f"usearch at {SHORTLIST_DIM}, {SHORTLIST} rescored", UsearchRescored),
}


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=size, default=SIZES, metavar="COUNTxDIM", help="of synthetic sets")
    parser.add_argument("--data", nargs="+", type=Path, default=[], metavar="DATASET", help="folders with real text")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=[OURS, SINGLE, SCAN])
    parser.add_argument("--skip", nargs="+", choices=CONTESTANTS, default=[])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep vectors and indexes, and use those kept")
    parser.add_argument("--ef-search", nargs="+", type=int, default=[], metavar="N", help="ask Chroma with these, too")
    parser.add_argument("--profile", action="store_true", help="say where mrl-rag's own time of a query goes")
    arguments = parser.parse_args()
    names = [name for name in CONTESTANTS if name in arguments.only and name not in arguments.skip]
    for package in {CONTESTANTS[name][1].package for name in names}:
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed: pip install -e '.[dev,benchmarks]', or --skip what needs it")

    print(f"    python {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}\n\n{machine()}", flush=True)
    closing: list[str] = []
    pair = [name for name in names if name in (OURS, SINGLE)]
    for count, dim in arguments.sizes:
        print(f"\n{count:,} vectors of {dim} numbers, {QUERIES} queries; synthetic, decay {DECAY:g}.\n")
        print(f"| index | {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * len(COLUMNS)}", flush=True)
        results: dict[str, Result] = {}
        with place(arguments.keep, f"{count}x{dim}") as shared:
            prepare(shared, synthesize, count, dim, QUERIES, DECAY)
            for group in filter(None, [pair, *([name] for name in names if name not in pair)]):
                results |= measure(group, shared, ROUNDS)
                for name in group:
                    print(row(CONTESTANTS[name][0], results[name], COLUMNS.values()), flush=True)
            for ef_search in arguments.ef_search if SINGLE in names else ():
                label = f"{CONTESTANTS[SINGLE][0]}, ef_search {ef_search}"
                print(row(label, measure_longer(ef_search, shared), COLUMNS.values()), flush=True)
            if arguments.profile and OURS in names:
                print_profile(shared)
        closing += targets((count, dim), results)
    if arguments.data:
        print("\n| collection | records | queries | shortlist_dim | recall | ms, one query | single-stage Chroma |")
        print(f"| --- |{' ---: |' * 6}", flush=True)
    for folder in arguments.data:
        with place(arguments.keep, folder.resolve().name) as shared:
            prepare(shared, encode, folder.resolve())
            both = measure([OURS, SINGLE], shared, ["alone", "batched"])
            records, queries = ([len(rows)] for rows in load(shared))
            ours = both[OURS] | {"records": records, "queries": queries, "chroma": both[SINGLE]["alone"]}
            cells = "{records:,} | {queries:,} | {shortlist_dim:.0f} | {recall:.4f} | {alone:.2f} | {chroma:.2f}"
            print(row(shared.name, ours, [cells]), flush=True)
            closing.append(target(shared.name, f"recall@{K}", ">=", 0.99, ours["recall"][0]))
    print("\n| on | mrl-rag against single-stage Chroma | wanted | measured | met |\n| --- | --- | ---: | ---: | --- |")
    print("\n".join(closing))


def row(label: str, result: Result, cells: Iterable[str]) -> str:
    """Return one line of a table; what wasn't measured is left empty."""
    medians = defaultdict(lambda: float("nan"), {what: statistics.median(rounds) for what, rounds in result.items()})
    filled = (cell.format_map(medians).replace("nan", "") for cell in cells)
    return f"| {label} | {' | '.join(filled)} |"


def targets(on: tuple[int, int], results: dict[str, Result]) -> list[str]:
    """Compare this index with what is wanted of it, and with single-stage Chroma if that was run."""
    if OURS not in results:
        return []
    label, ours, lines = f"{on[0]:,} x {on[1]}", results[OURS], []
    if SINGLE in results:
        alone, batched = WANTED.get(on, (None, None))

        def ratio(what: str) -> float:
            pairs = zip(ours[what], results[SINGLE][what], strict=True)
            return statistics.median(one / other for one, other in pairs)

        for text, what, sign, wanted in (
            ("time of one query, share", "alone", "<=", alone),
            (f"throughput in batches of {BATCH}, times", "batched", ">=", batched),
            (f"throughput of {THREADS} threads, times", "threaded", ">=", 1.2),
            (f"memory at {ours['shortlist_dim'][0]} after reopening, share", "memory", "<=", 0.35),
            ("the same without mapped files", "unmapped", "<=", None),
            ("fill time, share", "fill", "<=", 0.7),
            ("open and first query, share", "opened", "<=", 1.2),
            ("a new record upserted, share", "added", "<=", 1.5),
            ("a replaced record upserted, share", "replaced", "<=", 1.5),
        ):
            lines.append(target(label, text, sign, wanted, ratio(what)))
    beyond = statistics.median(ours["beyond"])
    lines.append(target(label, "ms of one query beyond Chroma", "<=", WANTED_BEYOND_MS.get(on), beyond))
    return [*lines, target(label, f"recall@{K}", ">=", 0.99, ours["recall"][0])]


def target(on: str, what: str, sign: str, wanted: float | None, measured: float) -> str:
    """Return one line of the closing table."""
    if wanted is None:
        return f"| {on} | {what} | | {measured:.2f} | |"
    met = measured <= wanted if sign == "<=" else measured >= wanted
    # Recall: so that what is just below isn't shown as what is wanted.
    shown = f"{measured:.4f}" if wanted == 0.99 else f"{measured:.2f}"
    return f"| {on} | {what} | {sign} {wanted:g} | {shown} | {'yes' if met else 'no'} |"


def measure(names: list[str], shared: Path, phases: Iterable[str]) -> dict[str, Result]:
    """Fill contestants, then measure them in turn, each in processes of its own."""
    results: dict[str, Result] = {name: defaultdict(list, fill=[filled(name, shared)]) for name in names}
    for opening in range(OPENS):
        with ExitStack() as stack:
            processes = {name: stack.enter_context(new_process()) for name in names}
            rounds = [("open", opening)]
            if opening == OPENS - 1:
                rounds += [(phase, turn) for phase in phases for turn in range(ROUNDS[phase])]
            for (phase, turn), (name, process) in itertools.product(rounds, processes.items()):
                say(f"{shared.name}, {name}: {phase}, round {turn + 1}")
                for what, value in process.submit(ask, name, shared, phase, turn).result().items():
                    results[name][what].append(value)
    return results


def measure_longer(ef_search: int, shared: Path) -> Result:
    """Measure single-stage Chroma with more candidates in its search of the graph: slower, and a higher recall."""
    in_process(set_ef_search, shared / SINGLE, ef_search)
    try:
        return measure([SINGLE], shared, ["alone", "batched"])[SINGLE]
    finally:
        in_process(set_ef_search, shared / SINGLE, EF)


def set_ef_search(folder: Path, ef_search: int) -> None:
    """Store it with the collection; a process that opens it later goes by it."""
    contestant = Chroma(folder)
    contestant.collection.modify(configuration={"hnsw": {"ef_search": ef_search}})
    contestant.close()


def filled(name: str, shared: Path) -> float:
    """Return how long a contestant took to fill; one whose filling never ended is filled again."""
    note = shared / f"{name}-fill.json"
    if not note.exists():
        say(f"{shared.name}, {name}: fill")
        shutil.rmtree(shared / name, ignore_errors=True)
        note.write_text(json.dumps({"fill": in_process(fill, name, shared)}))
    return float(json.loads(note.read_text())["fill"])


def fill(name: str, shared: Path) -> float:
    """Fill a contestant's folder and close it; return the seconds."""
    kind, texts = CONTESTANTS[name][1], shared / "texts.json"
    vectors, queries = load(shared)
    warm_up(kind, vectors, queries)
    records = Records.make(len(vectors))
    if texts.exists():
        records = records._replace(documents=json.loads(texts.read_text()))
    start = time.perf_counter()
    contestant = kind(shared / name)
    contestant.fill(vectors, records)
    contestant.close()
    return time.perf_counter() - start


class Session:
    """A contestant in this process, which was filled by another; the methods return what they measured, by name.

    Args:
        name: of the contestant.
        shared: the folder with the vectors and the contestants' own folders.
    """

    def __init__(self, name: str, shared: Path) -> None:
        self.kind, self.folder = CONTESTANTS[name][1], shared / name
        vectors, self.queries = load(shared)
        self.nearest = np.load(shared / "nearest.npy").tolist()
        warm_up(self.kind, vectors, self.queries)

    def open(self, turn: int) -> dict[str, float]:
        """Measure the opening, and what memory that and some queries take."""
        before = resident()
        start = time.perf_counter()
        self.contestant = self.kind(self.folder)
        self.contestant.search(self.queries[:1])
        opened = time.perf_counter() - start
        for query in self.queries[1:SINGLES]:
            self.contestant.search(query[None])
        memory, mapped = ((now - then) / 1e6 for now, then in zip(resident(), before, strict=True))
        disk = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file()) / 1e6
        found = {"opened": opened * 1e3, "memory": memory, "mapped": mapped, "unmapped": memory - mapped, "disk": disk}
        dim = self.contestant.shortlist_dim
        return found if dim is None else found | {"shortlist_dim": dim}

    @cached_property
    def records(self) -> Records:
        """Those that are there, and as many new ones as a round upserts."""
        return Records.make(len(load(self.folder.parent)[0]) + UPSERTS)

    def alone(self, turn: int) -> dict[str, float]:
        """Ask one query at a time."""
        asked = np.roll(self.queries, -turn * MOST_SINGLES, axis=0)
        # The other contestant has had the processor's caches meanwhile.
        for query in asked[-WARM:]:
            self.contestant.search(query[None])
        alone, beyond = [], []
        with outside_chroma() as clock:
            began = time.perf_counter()
            for query in itertools.islice(itertools.cycle(asked), MOST_SINGLES):
                start, own = time.perf_counter(), clock()
                self.contestant.search(query[None])
                beyond.append((clock() - own) * 1e3)
                alone.append((time.perf_counter() - start) * 1e3)
                if len(alone) >= WARM and time.perf_counter() - began > SECONDS:
                    break
        p95 = statistics.quantiles(alone, n=20)[-1]
        return {"alone": statistics.median(alone), "p95": p95, "beyond": statistics.median(beyond)}

    def batched(self, turn: int) -> dict[str, float]:
        """Ask many queries at once, and see how many of the exact scan's answers are found."""
        answers = []
        start = time.perf_counter()
        for rows in slices(len(self.queries), BATCH):
            answers += self.contestant.search(self.queries[rows])
        rate = len(self.queries) / (time.perf_counter() - start)
        found = [{int(id_) for id_, *_ in answer} for answer in answers]
        recall = statistics.fmean(len(f.intersection(n)) / len(n) for f, n in zip(found, self.nearest, strict=True))
        return {"batched": rate, "recall": recall}

    def threaded(self, turn: int) -> dict[str, float]:
        """Ask from some threads, each of which asks one query at a time, around and around."""
        start = time.perf_counter()

        def keep_asking(first: int) -> int:
            asked = 0
            while time.perf_counter() - start < THREADED_SECONDS:
                self.contestant.search(self.queries[(first + asked * THREADS) % len(self.queries)][None])
                asked += 1
            return asked

        with ThreadPoolExecutor(THREADS) as pool:
            asked = sum(pool.map(keep_asking, range(THREADS)))
        return {"threaded": asked / (time.perf_counter() - start)}

    def upsert(self, turn: int) -> dict[str, float]:
        """Upsert new records, and ones in the place of others, one at a time; then put back what was there."""
        if not self.kind.upserts:
            return {}
        stored, _ = load(self.folder.parent)
        count, records = len(stored), self.records
        new = list(range(count, count + UPSERTS))
        old = [(turn + step * ROUNDS["upsert"]) * count // (ROUNDS["upsert"] * UPSERTS) for step in range(UPSERTS)]
        vectors = np.roll(self.queries, -turn * 2 * UPSERTS, axis=0)
        seconds = []
        try:
            for vector, at in zip(vectors, new + old, strict=False):
                # Not only the vector is another one: so are the document and the metadata.
                record = Records([records.ids[at]], [records.documents[at - 1]], [records.metadatas[at - 1]])
                start = time.perf_counter()
                self.contestant.fill(vector[None], record)
                seconds.append((time.perf_counter() - start) * 1e3)
        finally:
            self.contestant.delete(records.ids[count:])
            self.contestant.fill(stored[old], Records(*([column[at] for at in old] for column in records)))
        return {"added": statistics.median(seconds[:UPSERTS]), "replaced": statistics.median(seconds[UPSERTS:])}

    def profile(self) -> list[tuple[str, float, float]]:
        """Return functions, their calls per query and their own ms per query, for queries asked alone."""
        self.open(0)
        with outside_chroma() as clock:
            # On the clock that stands still inside of Chroma: what happens there takes no time.
            profile = cProfile.Profile(clock)
            for query in itertools.islice(itertools.cycle(self.queries), PROFILED):
                profile.runcall(self.contestant.search, query[None])
        rows = []
        for (file, line, name), (_, calls, own, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
            where = "" if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} "
            rows.append((where + name, calls / PROFILED, own / PROFILED * 1e3))
        return rows


def profile(shared: Path) -> list[tuple[str, float, float]]:
    """Return what `Session.profile` does, of mrl-rag."""
    return Session(OURS, shared).profile()


@cache
def session(name: str, shared: Path) -> Session:
    """Return this process's session with a contestant."""
    return Session(name, shared)


def ask(name: str, shared: Path, phase: str, turn: int) -> Any:
    """Call a method of this process's session."""
    return getattr(session(name, shared), phase)(turn)


def new_process() -> ProcessPoolExecutor:
    """Start one."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a new process."""
    with new_process() as pool:
        return pool.submit(work, *arguments).result()


def warm_up(kind: type[Contestant], vectors: Float32Array, queries: Float32Array) -> None:
    """Fill, open and ask a small index, so that what is loaded once per process is loaded."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        small = kind(Path(folder) / "small")
        small.fill(vectors[:SINGLES], Records.make(SINGLES))
        small.close()
        small = kind(Path(folder) / "small")
        small.search(queries[:BATCH])
        small.search(queries[:1])
        small.close()


def resident() -> tuple[int, int]:
    """Return the bytes of this process that are in memory, and those of them that are pages of mapped files."""
    _, pages, mapped, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return pages * os.sysconf("SC_PAGE_SIZE"), mapped * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def outside_chroma() -> Iterator[Callable[[], float]]:
    """Yield a clock, in seconds, that stands still while this thread is in Chroma's reading methods."""
    inside, entered = 0.0, 0.0

    def clock() -> float:
        return (entered or time.perf_counter()) - inside

    def stopping(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal inside, entered
            if entered:
                return original(*arguments, **options)
            entered = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                inside += time.perf_counter() - entered
                entered = 0.0

        return call

    with ExitStack() as stack:
        # Where it isn't imported it stays so: it takes memory.
        if "chromadb" in sys.modules:
            from chromadb.api.models.Collection import Collection
            from chromadb.api.rust import RustBindingsAPI

            # Those beneath a collection's, too, should a contestant call them directly.
            for owner, name in itertools.product((Collection, RustBindingsAPI), ("query", "get", "count")):
                name = name if owner is Collection else f"_{name}"
                stack.enter_context(patch.object(owner, name, stopping(getattr(owner, name))))
        yield clock


@contextmanager
def place(keep: Path | None, name: str) -> Iterator[Path]:
    """Yield the folder of one set of vectors, which is removed afterwards unless it is to be kept."""
    if keep is not None:
        yield keep / name
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / name


def prepare(shared: Path, make: Callable[..., None], *arguments: Any) -> None:
    """Have vectors and queries made, and find the exact neighbours, unless they are there."""
    if not (shared / "nearest.npy").exists():
        say(f"{shared.name}: vectors and exact neighbours")
        shared.mkdir(parents=True, exist_ok=True)
        in_process(make, shared, *arguments)
        np.save(shared / "nearest.npy", exact(*load(shared)))


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


def encode(shared: Path, folder: Path) -> None:
    """Write the texts and vectors of a dataset and the vectors of its queries."""
    from mrl_rag import MatryoshkaEncoder
    from mrl_rag.evaluation import read_beir

    if (folder / "train.jsonl").exists():
        lines = [(folder / name).read_text(encoding="utf-8").splitlines() for name in ("train.jsonl", "test.jsonl")]
        texts, queries = ([json.loads(line)["text"] for line in part] for part in lines)
    else:
        dataset = read_beir(folder)
        texts, queries = list(dataset.corpus.values()), list(dataset.queries.values())
    encoder = MatryoshkaEncoder()
    (shared / "texts.json").write_text(json.dumps(texts))
    np.save(shared / "vectors.npy", encoder.encode_documents(texts))
    np.save(shared / "queries.npy", encoder.encode_queries(queries))


def load(shared: Path) -> tuple[Float32Array, Float32Array]:
    """Return the vectors, left on the disk, and the queries."""
    return np.load(shared / "vectors.npy", mmap_mode="r"), np.load(shared / "queries.npy")


def exact(vectors: Float32Array, queries: Float32Array) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return the rows of the K nearest vectors of each query, int [q, K]."""
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


def size(text: str) -> tuple[int, int]:
    """Read "100000x768"."""
    count, dim = map(int, text.split("x"))
    if count < SINGLES:
        raise argparse.ArgumentTypeError(f"{text}: there must be at least {SINGLES} records")
    return count, dim


def print_profile(shared: Path) -> None:
    """Print where the time of a query outside of Chroma goes."""
    rows = sorted(in_process(profile, shared), key=lambda row: -row[2])
    total = ("all together", sum(row[1] for row in rows), sum(row[2] for row in rows))
    print("\nWhere mrl-rag's own time goes, queries asked alone; the profiler itself adds to every call.\n")
    print("| function | calls per query | ms per query, its own |\n| --- | ---: | ---: |")
    for name, calls, own in [*rows[:PROFILE_LINES], total]:
        print(f"| `{name}` | {calls:.1f} | {own:.4f} |")


def machine() -> str:
    """Say what this was run on."""
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    wanted = ("numpy", "chromadb", "langchain-chroma", "faiss-cpu", "usearch")
    versions = ", ".join(f"{package} {installed[package]}" for package in wanted if package in installed)
    cores = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{cores}, Python {platform.python_version()}, {versions}"


def say(what: str) -> None:
    """Report progress."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
