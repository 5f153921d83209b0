"""How fast a folder of mixed files is indexed, and where the time goes.

    python benchmarks/files.py                     # 1,000 and 10,000 files
    python benchmarks/files.py --files 2000 --profile

The files are those of the packages installed here, up to 8,000 bytes each, in this mixture: 40% Python, 20% HTML (what
`pydoc` writes of the modules), 20% Markdown, reStructuredText and plain text, 10% C and JavaScript, 10% CSV and JSON
lines. A kind that has too few files here gives some of them again, with another first line. Each number of files is
measured in a process of its own, with the default encoder at its default settings: the first run into an empty folder,
and a second one that finds nothing changed.

The forward pass is the time in the network itself; reading, converting, splitting, tokenizing and storing are outside
of it, as far as they don't happen meanwhile. Peak memory is that of the process, Python and the model included.
"""

from __future__ import annotations

import argparse
import cProfile
import csv
import io
import json
import pkgutil
import pstats
import pydoc
import resource
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

MAX_BYTES = 8_000
SHARES = {"python": 0.4, "html": 0.2, "text": 0.2, "code": 0.1, "rows": 0.1}
SUFFIXES = {
    "python": (".py",),
    "text": (".md", ".rst", ".txt"),
    "code": (".c", ".h", ".hpp", ".js"),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--profile", action="store_true", help="show what takes the time, by cProfile")
    arguments = parser.parse_args()
    print("| files | chunks | files/s | chunks/s | time outside the forward pass | peak memory, MB | again, s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in arguments.files:
        with (
            tempfile.TemporaryDirectory() as place,
            ProcessPoolExecutor(1, get_context("spawn")) as making,
            ProcessPoolExecutor(1, get_context("spawn")) as measuring,
        ):
            making.submit(make, Path(place, "files"), count).result()
            print(measuring.submit(measure, Path(place), arguments.profile).result(), flush=True)


def measure(place: Path, profile: bool) -> str:
    """Return the table's row for the files in `place`."""
    from mrl_rag import MatryoshkaEncoder, TwoStageRetriever
    from mrl_rag.encoder.network import Network
    from mrl_rag.files import index_files

    run, forward = Network.run, [0.0]

    def timed(self: Any, sequences: Sequence[Any]) -> Any:
        started = time.perf_counter()
        try:
            return run(self, sequences)
        finally:
            forward[0] += time.perf_counter() - started

    profiler = cProfile.Profile() if profile else None
    with patch.object(Network, "run", timed), TwoStageRetriever(MatryoshkaEncoder(), place / "db") as retriever:
        started = time.perf_counter()
        if profiler:
            profiler.enable()
        report = index_files([place / "files"], retriever, progress=True)
        if profiler:
            profiler.disable()
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)
        seconds = time.perf_counter() - started
        outside = 1 - forward[0] / seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started = time.perf_counter()
        again = index_files([place / "files"], retriever)
        assert again.unchanged == report.files, again
        return (
            f"| {report.files:,} | {report.chunks:,} | {report.files / seconds:.1f} | {report.encoded / seconds:.0f} | "
            f"{outside:.0%} | {peak:,.0f} | {time.perf_counter() - started:.1f} |"
        )


def make(folder: Path, count: int) -> None:
    """Write so many files into a folder, 100 in each of its folders."""
    for kind, share in SHARES.items():
        rest = islice(endless(kind, int(count * share)), int(count * share))
        for number, (name, content) in enumerate(rest):
            place = folder / kind / f"{number // 100:03}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:05}-{name}").write_text(content, encoding="utf-8")


def endless(kind: str, count: int) -> Iterator[tuple[str, str]]:
    """Yield names and texts of files of one kind without end."""
    found = list(islice({"html": pages, "rows": tables}.get(kind, lambda: texts(SUFFIXES[kind]))(), count))
    for round_, (name, content) in enumerate(cycle(found)):
        yield name, content if round_ < len(found) else f"{round_}\n{content}"


def texts(suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield names and texts of the installed packages' files."""
    for file in sorted(Path(sysconfig.get_path("purelib")).rglob("*")):
        if file.suffix in suffixes and 200 < file.stat().st_size <= MAX_BYTES:
            try:
                yield file.name, file.read_text(encoding="utf-8")
            except ValueError:
                continue


def pages() -> Iterator[tuple[str, str]]:
    """What pydoc writes of the standard library's modules."""
    for module in sorted(sys.stdlib_module_names):
        names = [module]
        path = Path(sysconfig.get_path("stdlib"), module)
        if path.is_dir() and module not in ("idlelib", "test", "lib2to3", "turtledemo"):
            names += [f"{module}.{found.name}" for found in pkgutil.iter_modules([str(path)])]
        for name in names:
            if name.endswith("__main__") or module in ("antigravity", "this", "idlelib"):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    page = pydoc.html.page(name, pydoc.html.document(pydoc.locate(name)))
            except Exception:
                continue
            if len(page) < 10 * MAX_BYTES:
                yield f"{name}.html", page[:MAX_BYTES]


def tables() -> Iterator[tuple[str, str]]:
    """Tables of the installed packages' classes, five to a file, as CSV and as JSON lines in turn."""
    rows = [
        {"name": name, "text": content.strip()[:600], "bytes": len(content)}
        for name, content in islice(texts((".py",)), 4000)
    ]
    for number, start in enumerate(range(0, len(rows) - 5, 5)):
        part = rows[start : start + 5]
        if number % 2:
            yield "rows.jsonl", "\n".join(map(json.dumps, part))
        else:
            lines = io.StringIO(newline="")
            writer = csv.DictWriter(lines, list(part[0]))
            writer.writeheader()
            writer.writerows(part)
            yield "rows.csv", lines.getvalue()


if __name__ == "__main__":
    main()
