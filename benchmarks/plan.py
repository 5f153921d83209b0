"""What so many passages take: bytes, machines, money and time. It prints the tables of docs/scale.md.

    python benchmarks/plan.py
    python benchmarks/plan.py --tokens 300 --gpu-price 2.00 --machine-price 0.60

Sizes come from the formats, rates from benchmarks/README.md. Prices and the speed of a GPU are assumptions: pass yours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from math import ceil

from mrl_rag.quantization import row_bytes

PASSAGES = (10**6, 10**8, 10**10)
DIMS = (384, 768, 1024, 1536, 3072)
PRECISIONS = ("float32", "float16", "int8", "binary")
SHORTLIST_DIMS = (96, 128, 224)
HOURS_PER_MONTH = 730

# Measured (benchmarks/README.md). Tokens per second of `minilm` on 2 cores without AMX, in float32: "The encoder".
CPU_TOKENS_PER_SECOND = 4_284
# Passages per second that one process writes to an index of a million, 768 numbers each: "The index".
STORED_PER_SECOND = 773
# Bytes per record on disk and in memory at a million (4,753 and 480 MB, `shortlist_dim` 224; Chroma alone 3,552 MB),
# less what the formats below account for: Chroma's tables with a document of 200 characters, and ids in memory. 297 MB
# of the archive's mapped pages came on top, which the system takes back when it needs the room.
TABLE_BYTES = 1_405
MEMORY_BYTES = 160
CHROMA_MEMORY_BYTES = 480
# From so many numbers on, the first of them are held a second time: docs/search.md.
LEADING_FROM, LEADING_BYTES = 192, 96
# Links of Chroma's graph per record, and the checksum of a full vector: docs/storage.md.
GRAPH_LINK_BYTES, CHECKSUM_BYTES = 150, 8
# LMDB's page, and what it adds to each row; a row of more than half a page has pages of its own.
_PAGE, _PAGE_HEADER, _ROW_HEADER = 4096, 16, 24


@dataclass(frozen=True)
class Assumptions:
    """What nobody measured here; prices in dollars, of November 2026.

    Attributes:
        tokens: tokens per passage.
        gpu_flops: what one GPU's matrix products reach in bfloat16, FLOP/s.
        gpu_share: share of that which encoding reaches.
        flops_per_token: of the model; 236e6 is NomicBERT base with 256 tokens per passage.
        gpu_price: per GPU and hour.
        machine_price: per machine and hour.
        machine_cores: cores per machine.
        machine_memory: bytes of memory per machine that vectors may fill.
        machine_disk: bytes of disk per machine.
    """

    tokens: float = 117
    gpu_flops: float = 600e12
    gpu_share: float = 0.25
    flops_per_token: float = 236e6
    gpu_price: float = 2.50
    machine_price: float = 0.50
    machine_cores: float = 8
    machine_memory: float = 48e9
    machine_disk: float = 2e12


def vector_bytes(precision: str, dim: int) -> int:
    """Return the bytes of one vector; "binary" is int8 with sign bits beside it."""
    if precision == "float32":
        return 4 * dim
    bits = -(-dim // 8) if precision == "binary" else 0
    return row_bytes("float16" if precision == "float16" else "int8", dim) + bits


def archived_bytes(precision: str, dim: int) -> float:
    """Return the bytes that one vector takes in the archive's file, in which pages are not filled to the end."""
    row = vector_bytes(precision, dim) + CHECKSUM_BYTES + _ROW_HEADER
    per_page = (_PAGE - _PAGE_HEADER) // row
    return _PAGE / per_page if per_page > 1 else _PAGE * ceil((row + _PAGE_HEADER) / _PAGE)


def disk_bytes(dim: int, shortlist_dim: int, precision: str = "float16") -> float:
    """Return the bytes per record of an index in a folder: archive, graph, saved shortlist vectors, Chroma's tables."""
    graph = 4 * shortlist_dim + GRAPH_LINK_BYTES
    return archived_bytes(precision, dim) + graph + shortlist_dim + 30 + TABLE_BYTES


def memory_bytes(shortlist_dim: int) -> int:
    """Return the bytes of memory per record that a search in a folder reads."""
    return shortlist_dim + (LEADING_BYTES if shortlist_dim >= LEADING_FROM else 0) + MEMORY_BYTES


def chroma_memory_bytes(dim: int) -> int:
    """Return the bytes of memory per record of Chroma's graph at `dim` numbers, ids and links included."""
    return 4 * dim + CHROMA_MEMORY_BYTES


def gpu_passages_per_second(given: Assumptions) -> float:
    """Return the passages per second of one GPU."""
    return given.gpu_flops * given.gpu_share / given.flops_per_token / given.tokens


def machines(count: int, memory: float, disk: float, given: Assumptions) -> int:
    """Return how many machines hold so many records, by memory and by disk."""
    return ceil(max(count * memory / given.machine_memory, count * disk / given.machine_disk))


def vectors_table(given: Assumptions) -> Iterator[Sequence[str]]:
    """Yield the bytes of full vectors alone."""
    yield ("full dimension", "precision", "bytes per vector", *(f"{count:,}" for count in PASSAGES))
    for dim in DIMS:
        for precision in PRECISIONS:
            each = vector_bytes(precision, dim)
            yield (str(dim), precision, f"{each:,}", *(_size(count * each) for count in PASSAGES))


def index_table(given: Assumptions) -> Iterator[Sequence[str]]:
    """Yield disk, memory, machines and money of an index, and of Chroma with full vectors."""
    of = "full dimension", "searched at", "what", "disk per record", "memory per record"
    yield (*of, *(f"{count:,}: disk, memory, machines, per month" for count in PASSAGES))
    for dim in (384, 768, 1536, 3072):
        for shortlist_dim in SHORTLIST_DIMS:
            yield _index_row(dim, shortlist_dim, disk_bytes(dim, shortlist_dim), memory_bytes(shortlist_dim), given)
        whole = 4 * dim + GRAPH_LINK_BYTES + TABLE_BYTES
        yield _index_row(dim, None, whole, chroma_memory_bytes(dim), given)


def _index_row(dim: int, shortlist_dim: int | None, disk: float, memory: float, given: Assumptions) -> Sequence[str]:
    cells = []
    for count in PASSAGES:
        needed = machines(count, memory, disk, given)
        price = needed * given.machine_price * HOURS_PER_MONTH
        cells.append(f"{_size(count * disk)}, {_size(count * memory)}, {needed:,}, ${price:,.0f}")
    what = "Chroma's graph of full vectors" if shortlist_dim is None else "two stages, float16"
    return str(dim), str(shortlist_dim or dim), what, f"{disk:,.0f}", f"{memory:,.0f}", *cells


def time_table(given: Assumptions) -> Iterator[Sequence[str]]:
    """Yield the time and the money of encoding and of storing."""
    yield ("step", "passages/s", *(f"{count:,}: time, money" for count in PASSAGES))
    core = CPU_TOKENS_PER_SECOND / 2 / given.tokens
    gpu = gpu_passages_per_second(given)
    machine = given.machine_price
    for step, rate, price in (
        ("encode, `minilm`, 2 cores (measured)", 2 * core, machine * 2 / given.machine_cores),
        ("encode, `minilm`, a machine (its cores times the measured rate)", given.machine_cores * core, machine),
        ("encode, a base model, one GPU (assumed)", gpu, given.gpu_price),
        ("encode, a base model, 100 GPUs (assumed)", 100 * gpu, 100 * given.gpu_price),
        ("store, one process (measured at a million)", STORED_PER_SECOND, machine * 2 / given.machine_cores),
        ("store, 100 processes, an index for each", 100 * STORED_PER_SECOND, 100 * machine * 2 / given.machine_cores),
    ):
        hours = [count / rate / 3600 for count in PASSAGES]
        yield (step, f"{rate:,.0f}", *(f"{_duration(each)}, ${max(each * price, 0.01):,.2f}" for each in hours))


TABLES: dict[str, Callable[[Assumptions], Iterator[Sequence[str]]]] = {
    "vectors": vectors_table,
    "index": index_table,
    "time": time_table,
}


def as_markdown(rows: Iterator[Sequence[str]], words: int) -> str:
    """Return rows as a table in Markdown, the first `words` columns to the left."""
    head, *body = rows
    aligned = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, aligned, *body))


def tables(given: Assumptions) -> dict[str, str]:
    """Return every table in Markdown, by its name."""
    words = {"vectors": 2, "index": 3, "time": 1}
    return {name: as_markdown(rows(given), words[name]) for name, rows in TABLES.items()}


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.2g} min"
    return (
        f"{hours:.3g} h"
        if hours < 72
        else f"{hours / 24:,.0f} days"
        if hours < 24 * 730
        else f"{hours / 8766:,.3g} years"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in fields(Assumptions):
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=float, default=each.default)
    for name, table in tables(Assumptions(**vars(parser.parse_args()))).items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
