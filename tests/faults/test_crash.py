"""A writer killed at any moment: what it was told is stored is there, whole, and every search answers.

Five kills in `make test`, two hundred in `make test-faults`.
"""

import inspect
import json
import os
import random
import time

import numpy as np
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.testing import DeterministicEncoder

KILLS = int(os.environ.get("MRL_RAG_KILLS", "5"))
DIM = 24
WRITER = """
import json, os, random, warnings
from mrl_rag import TwoStageIndex
import numpy as np

warnings.simplefilter("ignore")
exec(vector)
random.seed(kill)
index = TwoStageIndex(db, shortlist_dim=8)
journal = open(journal, "a")

def note(*entry):
    journal.write(json.dumps(entry) + "\\n")
    journal.flush()
    os.fsync(journal.fileno())

number = kill * 1000000
while True:
    number += 1
    ids = random.sample([f"r{i}" for i in range(300)], random.choice([1, 5, 60]))
    action = random.choices(["upsert", "delete", "reindex", "compact"], [20, 3, 1, 1])[0]
    note("begin", action, ids, number)
    if action == "upsert":
        vectors = np.stack([vector(i, number) for i in ids])
        index.upsert(ids, vectors, [f"{i} {number}" for i in ids], [{"n": number}] * len(ids))
    elif action == "delete":
        index.delete(ids[:5])
    elif action == "compact":
        index.compact()
    else:
        index.reindex(rotation=random.choice(["fit", "none"]))
    note("done")
"""


def vector(id_, number):
    row = np.random.default_rng([number, int(id_[1:])]).normal(size=DIM)
    return (row / np.linalg.norm(row)).astype(np.float32)


def read(journal):
    """Return what must be there, and what may be there instead for ids of a write that was cut short."""
    must, may = {}, {}
    pending = None
    for line in journal.read_text().splitlines():
        kind, *entry = json.loads(line)
        if kind == "begin":
            if pending is not None:
                apply_maybe(pending, must, may)
            pending = entry
        else:
            action, ids, number = pending
            for id_ in ids if action == "upsert" else ids[:5] if action == "delete" else []:
                must[id_], pending = (number if action == "upsert" else None), None
                may.pop(id_, None)
            pending = None
    if pending is not None:
        apply_maybe(pending, must, may)
    return must, may


def apply_maybe(pending, must, may):
    action, ids, number = pending
    for id_ in ids if action == "upsert" else ids[:5] if action == "delete" else []:
        may.setdefault(id_, {must.get(id_)}).add(number if action == "upsert" else None)


def check(index, journal):
    must, may = read(journal)
    found = {record.id: record for record in index.get()}
    for id_ in {*must, *may, *found}:
        allowed = may.get(id_, {must.get(id_)})
        record = found.get(id_)
        number = None if record is None else record.metadata["n"]
        assert number in allowed, f"{id_} is {number}, not one of {allowed}"
        if record is not None:
            assert record.document == f"{id_} {number}"
            np.testing.assert_allclose(record.vector, vector(id_, number), atol=2e-3)
    for record in list(found.values())[:10]:
        hit = index.search([record.vector], k=1)[0][0]
        assert (hit.id, hit.score) == (record.id, pytest.approx(1, abs=1e-3))
    # What was open is settled now.
    return {id_: record.metadata["n"] for id_, record in found.items()}


def settle(journal, state):
    """Begin a new journal with what is there."""
    lines = []
    for id_, number in state.items():
        lines += [json.dumps(["begin", "upsert", [id_], number]), json.dumps(["done"])]
    journal.write_text("".join(f"{line}\n" for line in lines))


def test_nothing_acknowledged_is_lost_whenever_the_writer_is_killed(tmp_path, start_process):
    db, journal = tmp_path / "db", tmp_path / "journal"
    journal.touch()
    moments = random.Random(0)
    for kill in range(1, KILLS + 1):
        writer = start_process(WRITER, db=db, journal=journal, kill=kill, vector=inspect.getsource(vector), DIM=DIM)
        size = journal.stat().st_size
        while journal.stat().st_size == size and writer.is_alive():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.0))
        assert writer.is_alive(), "the writer ended by itself"
        writer.kill()
        writer.join()
        index = TwoStageIndex(db)
        report = index.repair()
        assert report.ok, report
        assert len(index.client.list_collections()) <= 1
        settle(journal, check(index, journal))
        index.close()


TEXTS = [f"text {number} of chapter {number % 9}" for number in range(300)]
REENCODER = """
import time, warnings
from mrl_rag import TwoStageIndex
from mrl_rag.testing import DeterministicEncoder
import mrl_rag.index.reencode as reencode

warnings.simplefilter("ignore")
reencode._BATCH = 20
encoder = DeterministicEncoder(wanted)
journal = open(journal, "a")

def encode(texts):
    journal.write("encoded\\n" * len(texts))
    journal.flush()
    time.sleep(0.02)
    return encoder.encode_documents(texts)

with TwoStageIndex(db) as index:
    index.reencode(encode, str(encoder.full_dim), encoder.fingerprint, drop_old=True)
"""


def test_a_change_of_the_model_that_is_killed_loses_nothing_and_goes_on(tmp_path, start_process):
    """One model after the other, killed at any moment: the index is whole, of the one or of the other."""
    db, journal, moments = tmp_path / "db", tmp_path / "journal", random.Random(0)
    encoders = {str(dim): DeterministicEncoder(dim) for dim in (DIM, 2 * DIM)}
    with TwoStageIndex(db, model=str(DIM), fingerprint=encoders[str(DIM)].fingerprint) as index:
        index.upsert([str(n) for n in range(300)], encoders[str(DIM)].encode_documents(TEXTS), TEXTS)
    wanted, kills, switches = str(2 * DIM), 0, 0
    # The last one is left to end, however slow the machine.
    for patience in (*(moments.uniform(0, 0.6) for _ in range(KILLS // 2)), None):
        journal.touch()
        size = journal.stat().st_size
        process = start_process(REENCODER, db=db, journal=journal, wanted=int(wanted))
        while journal.stat().st_size == size and process.is_alive():
            time.sleep(0.01)
        process.join(patience)
        if process.is_alive():
            process.kill()
            kills += 1
            process.join()
        with TwoStageIndex(db) as index:
            encoder = encoders[index.model]
            assert (len(index), index.full_dim) == (300, encoder.full_dim)
            hits = index.search(encoder.encode_documents(TEXTS[::50]), k=1)
            assert [hit[0].document for hit in hits] == TEXTS[::50]
            assert index.repair().ok
            if index.model == wanted:
                # Nothing was encoded again but the batch in flight, once per kill.
                assert journal.read_text().count("encoded") <= 300 + 20 * kills
                journal.unlink()
                wanted, kills, switches = next(name for name in encoders if name != wanted), 0, switches + 1
    assert switches
