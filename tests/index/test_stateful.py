"""After any sequence of operations an index answers like a dict with an exact scan.

MRL_RAG_STEPS (default 450) is about how many steps are taken in all; `make test-faults` takes 5000.
"""

import os
import shutil
import tempfile

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from mrl_rag import Plan, TwoStageIndex, truncate
from mrl_rag.evaluation import exact_scan

STEPS = int(os.environ.get("MRL_RAG_STEPS", "450"))
DIM = 16
ids = st.lists(st.sampled_from([f"r{number}" for number in range(10)]), min_size=1, max_size=6, unique=True)


def vector(id_, number):
    return np.random.default_rng([int(id_[1:]), number]).normal(size=DIM).astype(np.float32)


class IndexMachine(RuleBasedStateMachine):
    written = Bundle("written")

    @initialize()
    def begin(self):
        self.folder = tempfile.mkdtemp()
        self.index = TwoStageIndex(self.folder, shortlist_dim=8)
        self.expected = {}
        self.number = 0

    def teardown(self):
        if hasattr(self, "index"):
            self.index.close()
            shutil.rmtree(self.folder)

    @rule(target=written, chosen=ids, documents=st.booleans())
    def upsert(self, chosen, documents):
        self.number += 1
        texts = [f"text {id_} {self.number}" if documents else None for id_ in chosen]
        key = f"key {self.number % 3}"
        metadatas = [{"n": self.number, "odd": bool(int(id_[1:]) % 2), key: self.number} for id_ in chosen]
        self.index.upsert(chosen, [vector(id_, self.number) for id_ in chosen], texts, metadatas)
        self.expected |= {
            id_: (text, metadata, vector(id_, self.number))
            for id_, text, metadata in zip(chosen, texts, metadatas, strict=True)
        }
        return multiple(*chosen)

    @rule(chosen=ids)
    def delete(self, chosen):
        self.index.delete(chosen)
        for id_ in chosen:
            self.expected.pop(id_, None)

    @rule(odd=st.booleans())
    def delete_where(self, odd):
        self.index.delete(where={"$and": [{"odd": odd}, {"n": {"$lt": self.number}}]})
        self.expected = {
            id_: record
            for id_, record in self.expected.items()
            if record[1]["odd"] != odd or record[1]["n"] >= self.number
        }

    @rule()
    def reopen(self):
        self.index.close()
        self.index = TwoStageIndex(self.folder)

    @rule(dim=st.sampled_from([4, 8, 16]), rotation=st.sampled_from(["fit", "none", None]))
    def reindex(self, dim, rotation):
        if self.expected:
            self.index.reindex(shortlist_dim=dim, rotation=rotation)

    @rule(seed=st.integers(0, 99), k=st.integers(1, 8), odd=st.sampled_from([None, True, False]))
    def search(self, seed, k, odd):
        query = np.random.default_rng(seed).normal(size=DIM)
        meant = {id_: r for id_, r in self.expected.items() if odd is None or r[1]["odd"] == odd}
        plan = Plan(dims=(self.index.shortlist_dim, DIM), sizes=(100,)) if self.index.shortlist_dim else None
        hits = self.index.search([query], k=k, plan=plan, where=None if odd is None else {"odd": odd})[0]
        if not meant:
            assert hits == []
            return
        rows = np.stack([record[2] for record in meant.values()])
        scores = truncate(rows, DIM) @ truncate(query[None], DIM)[0]
        best = np.sort(scores)[::-1][:k]
        assert len(exact_scan(rows, [query], k)[0]) == len(hits)
        # Compared by scores: rows that are equal in float16 come in the order of their ids.
        np.testing.assert_allclose([hit.score for hit in hits], best, atol=2e-3)
        for hit in hits:
            assert (hit.document, hit.metadata) == meant[hit.id][:2]

    @rule(id_=written)
    def get(self, id_):
        found = self.index.get([id_])
        assert [record.id for record in found] == ([id_] if id_ in self.expected else [])
        for record in found:
            text, metadata, row = self.expected[id_]
            assert (record.document, record.metadata) == (text, metadata)
            np.testing.assert_allclose(record.vector, truncate(row[None], DIM)[0], atol=2e-3)

    @rule()
    def verify(self):
        assert self.index.verify().ok

    @invariant()
    def counts(self):
        if hasattr(self, "index"):
            assert len(self.index) == len(self.expected)


def test_an_index_answers_as_a_dict_with_an_exact_scan_would():
    run_state_machine_as_test(
        IndexMachine,
        settings=settings(
            max_examples=max(STEPS // 45, 1),
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
