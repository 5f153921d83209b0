"""An index is dropped while others read it: they get the records as they were, or none."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mrl_rag import TwoStageIndex

IDS = [f"id-{i}" for i in range(100)]
VECTORS = np.random.default_rng(0).normal(size=(100, 32)).astype(np.float32)
# Each with its answer for an empty index.
READS = {
    "len": (len, 0),
    "search": (lambda index: [[hit.id for hit in hits] for hits in index.search(VECTORS[:2], k=5)], [[], []]),
    "search_mmr": (lambda index: [[hit.id for hit in hits] for hits in index.search_mmr(VECTORS[:1], k=3)], [[]]),
    "get": (lambda index: [record.document for record in index.get(IDS[:3])], []),
    "get where": (lambda index: [record.id for record in index.get(where={"page": {"$lt": 9}})], []),
    "metadatas": (lambda index: index.metadatas(), {}),
    "changed": (lambda index: index.changed(IDS[:2], IDS[:2], [{"page": 0}, {"page": 1}]), [0, 1]),
    "verify": (lambda index: seen(index.verify()), (0, True)),
}


def seen(report):
    return report.records, report.ok


def fill(index):
    index.upsert(IDS, VECTORS, documents=IDS, metadatas=[{"page": page} for page in range(100)])
    return index


def test_an_index_that_another_one_dropped_is_empty(open_index):
    one, others = fill(open_index()), {name: open_index() for name in READS}
    for name, (ask, nothing) in READS.items():
        assert ask(others[name]) != nothing, name
    one.drop()
    for name, (ask, nothing) in READS.items():
        assert ask(others[name]) == nothing, name
        assert ask(others[name]) == nothing, name


def test_an_index_that_another_one_refilled_with_another_length_is_found(open_index):
    one, other = fill(open_index()), open_index()
    one.drop()
    one.upsert(["a"], [[1.0, 2.0]])
    assert [hit.id for hit in other.search([[1.0, 2.0]])[0]] == ["a"]
    assert (other.full_dim, other.shortlist_dim) == (2, 2)


def test_threads_that_read_while_it_is_dropped_get_the_records_or_nothing(open_index):
    def ask_until_empty(index, name):
        ask, nothing = READS[name]
        answers = [ask(index)]
        while answers[-1] != nothing:
            answers.append(ask(index))
        return answers

    one, other = open_index(), open_index()
    for _ in range(2):
        fill(one)
        full = {name: ask(one) for name, (ask, _) in READS.items()}
        with ThreadPoolExecutor(2 * len(READS)) as pool:
            reading = {
                (name, index): pool.submit(ask_until_empty, index, name) for name in READS for index in (one, other)
            }
            time.sleep(0.1)
            one.drop()
        for (name, _), done in reading.items():
            *before, _ = done.result()
            assert all(answer == full[name] for answer in before), name


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_the_files_of_a_dropped_index_are_closed(tmp_path):
    def held():
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return [
            file
            for file in (os.readlink(link) for link in links if os.path.lexists(link))
            if f"{tmp_path}/archive-" in file
        ]

    one, other = fill(TwoStageIndex(tmp_path, precision="binary")), TwoStageIndex(tmp_path)
    assert len(other) == 100
    assert held()
    with ThreadPoolExecutor(4) as pool:
        reading = [pool.submit(index.search, VECTORS[:50]) for index in (one, other) for _ in range(4)]
        one.drop()
    assert all(len(done.result()) == 50 for done in reading)
    assert len(other) == 0
    # A dropped object is released when the next index is made.
    TwoStageIndex().close()
    assert not held()
    assert not list(tmp_path.glob("archive-*"))
