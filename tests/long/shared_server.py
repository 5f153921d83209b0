"""A process that writes to an index on a server, or reads it and checks what it finds; for `test_shared_server.py`.

    python shared_server.py write|read PORT COLLECTION FOLDER NUMBER SECONDS

A writer notes in FOLDER/NUMBER.log when it begins and ends what it does. Readers follow these notes.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from zlib import crc32

import chromadb
import numpy as np

from mrl_rag import TwoStageIndex

DIM, WRITERS = 32, 2
# Full vectors go to the server and back as 32-bit numbers.
TOLERANCE = 1e-4


def text_of(id_, version):
    return f"{id_} version {version}"


def vector_of(text):
    """Return the vector of a text, float32 [DIM]: the same in all processes."""
    vector = np.random.default_rng(crc32(text.encode())).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def opened(port, collection):
    client = chromadb.HttpClient("127.0.0.1", port)
    return TwoStageIndex(client=client, collection=collection, full_dim=DIM, shortlist_dim=16, rotation="none")


def write(port, collection, folder, number, seconds):
    """Add, replace and delete records, the writer's own, and print how many."""
    random, index = np.random.default_rng(number), opened(port, collection)
    versions, added, done = {}, 0, Counter()
    end = time.monotonic() + seconds
    with (folder / f"{number}.log").open("w") as log:

        def note(event, changes):
            log.write(json.dumps([event, time.monotonic(), changes]) + "\n")
            log.flush()

        while time.monotonic() < end:
            kind = random.choice(["add", "replace", "delete"], p=[0.5, 0.35, 0.15])
            size = int(random.integers(1, 20))
            chosen = [str(id_) for id_ in random.permutation(list(versions))[:size]]
            if kind == "add" or len(versions) < 200:
                chosen = [f"{number}-{added + row}" for row in range(size)]
                added += size
            deleted = kind == "delete" and chosen[0] in versions
            before = set(versions)
            changes = {id_: None if deleted else versions.get(id_, 0) + 1 for id_ in chosen}
            note("begin", changes)
            if deleted:
                index.delete(chosen)
            else:
                texts = [text_of(*change) for change in changes.items()]
                rows = np.stack([vector_of(text) for text in texts])
                index.upsert(chosen, rows, texts, [{"writer": number, "version": v} for v in changes.values()])
            note("end", changes)
            versions |= changes
            versions = {id_: version for id_, version in versions.items() if version is not None}
            done["deleted" if deleted else "replaced" if chosen[0] in before else "added"] += len(chosen)
            time.sleep(0.02)
    sys.stdout.write(json.dumps(done))


class Notes:
    """What the writers have noted.

    Attributes:
        state: version of each record; None for a deleted one.
        changing: records that are being changed.
        changed: when the last change of each began.
    """

    def __init__(self, folder):
        self._files = [(folder / f"{number}.log").open() for number in range(WRITERS)]
        self._rests = [""] * WRITERS
        self.state, self.changing, self.changed = {}, set(), {}

    def follow(self):
        for number, file in enumerate(self._files):
            *lines, self._rests[number] = (self._rests[number] + file.read()).split("\n")
            for event, moment, changes in map(json.loads, lines):
                if event == "begin":
                    self.changing |= changes.keys()
                    self.changed |= dict.fromkeys(changes, moment)
                else:
                    self.changing -= changes.keys()
                    self.state |= changes


def read(port, collection, folder, number, seconds):
    """Search for records that must be there or must not, check every hit, and print how many were checked."""
    while not all((folder / f"{writer}.log").exists() for writer in range(WRITERS)):
        time.sleep(0.1)
    random, index, notes = np.random.default_rng(100 + number), opened(port, collection), Notes(folder)
    end, counts, times = time.monotonic() + seconds, Counter(), []
    while time.monotonic() < end:
        notes.follow()
        steady = [id_ for id_ in notes.state if id_ not in notes.changing]
        if not steady:
            time.sleep(0.1)
            continue
        id_ = steady[int(random.integers(len(steady)))]
        version, gone = notes.state[id_], {each for each in steady if notes.state[each] is None}
        query = vector_of(text_of(id_, version or 1))
        where = {"writer": int(id_.partition("-")[0])} if random.random() < 0.3 else None
        start = time.monotonic()
        hits = index.search(query, 5, where=where)
        times.append(time.monotonic() - start)
        notes.follow()
        gone -= {each for each in gone if notes.changed[each] > start}
        for hit in hits:
            assert hit.document == text_of(hit.id, hit.metadata["version"]), (hit, "a document with other metadata")
            assert abs(hit.score - vector_of(hit.document) @ query) < TOLERANCE, (hit, "a score of another vector")
            assert hit.id not in gone, (hit, "it was deleted")
        counts["hits"] += len(hits)
        if notes.changed[id_] < start and version is not None:
            assert hits, (id_, version, "nothing was found")
            assert (hits[0].id, hits[0].document) == (id_, text_of(id_, version)), (id_, version, hits)
            counts["found"] += 1
    counts["searches"] = len(times)
    milliseconds = {f"p{q}": round(1e3 * float(np.percentile(times, q))) for q in (50, 95, 100)}
    sys.stdout.write(json.dumps(counts | milliseconds))


if __name__ == "__main__":
    role, port, collection, folder, number, seconds = sys.argv[1:]
    work = {"write": write, "read": read}[role]
    work(int(port), collection, Path(folder), int(number), float(seconds))
