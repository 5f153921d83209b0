"""How much disk space `compact` gives back, after reindexing and after a change of the model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from index import machine

from mrl_rag import TwoStageIndex
from mrl_rag.testing import DeterministicEncoder

TEXT = "a chain of calls reads the index and ranks what it finds by cosine before any model answers the question"


def main() -> None:
    """Print a table."""
    print(f"{machine()}\n")
    print("| records | what was done | before, MB | after, MB | compact, s | again, s |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    show(5000, "reindexed three times, half deleted", reindex_and_delete)
    show(5000, "another model of twice the length, the old one dropped", change_model)


def show(count: int, done: str, change: Callable[[TwoStageIndex], object]) -> None:
    """Print the row of one change."""
    with tempfile.TemporaryDirectory() as folder, TwoStageIndex(folder, shortlist_dim=96) as index:
        vectors = np.random.default_rng(0).normal(size=(count, 384)).astype(np.float32)
        index.upsert([str(number) for number in range(count)], vectors, [f"{TEXT} {number}" for number in range(count)])
        change(index)
        before, seconds = size(Path(folder)), []
        for _ in range(2):
            started = time.perf_counter()
            index.compact()
            seconds.append(time.perf_counter() - started)
        after = size(Path(folder))
    print(f"| {count:,} | {done} | {before:.1f} | {after:.1f} | {seconds[0]:.2f} | {seconds[1]:.2f} |")


def reindex_and_delete(index: TwoStageIndex) -> None:
    """Rebuild the graph three times, and delete every second record."""
    for dim in (64, 128, 96):
        index.reindex(dim)
    index.delete(index.ids()[::2])


def change_model(index: TwoStageIndex) -> None:
    """Encode all records by another model, and drop what the old one made."""
    index.reencode(DeterministicEncoder(768).encode_documents, "another", "1", drop_old=True)


def size(folder: Path) -> float:
    """Return the size of a folder in MB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


if __name__ == "__main__":
    main()
