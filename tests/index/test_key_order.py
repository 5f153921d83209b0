"""Metadata keys come back in the order in which they were added, which Chroma itself does not store."""

import numpy as np
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.index.shortlist import Limits

KEYS = ("z", "source", "a", "page", "m", "b")
WIDE = {key: number for number, key in enumerate(KEYS)}
OTHER = {"title": "t", "z": 1, "author": "x", "k": 1.5, "a": True}
RECORDS = {"a": WIDE, "b": OTHER, "c": {"a": 1, "source": None, "z": 2}, "d": {}, "e": {"one": ["x", "y"]}}


def orders(records):
    return {record.id: list(record.metadata) for record in records}


AS_ADDED = {id_: [key for key, value in metadata.items() if value is not None] for id_, metadata in RECORDS.items()}


def test_keys_come_back_as_they_were_added(open_index, vectors):
    index = open_index(full_dim=32)
    index.upsert(list(RECORDS), vectors[:5], list("abcde"), list(RECORDS.values()))
    for opened in (index, open_index()):
        for _ in range(3):
            assert orders(opened.search(vectors[:1], k=5)[0]) == AS_ADDED
            assert orders(opened.get()) == AS_ADDED
            assert {id_: list(metadata) for id_, metadata in opened.metadatas().items()} == AS_ADDED
    index.reindex(shortlist_dim=4)
    assert orders(open_index().get()) == AS_ADDED


def test_an_open_index_learns_of_key_orders_that_another_one_adds(open_index, vectors):
    index = open_index(full_dim=32)
    index.upsert(["a"], vectors[:1], metadatas=[WIDE])
    other = open_index()
    assert orders(other.get()) == {"a": list(KEYS)}
    index.upsert(["b"], vectors[1:2], metadatas=[OTHER])
    assert orders(other.get(["b"])) == orders(other.search(vectors[1:2], k=1)[0]) == {"b": list(OTHER)}


def test_a_set_of_keys_keeps_its_first_order(tmp_path, vectors):
    index = TwoStageIndex(tmp_path)
    index.upsert(["a", "b"], vectors[:2], metadatas=[{"y": 1, "x": 2}, {"x": 1, "y": 2}])
    assert orders(index.get()) == {"a": ["y", "x"], "b": ["y", "x"]}


@pytest.mark.parametrize("room", [256, 16_384])
def test_more_orders_than_are_remembered_are_still_the_same_at_each_read(tmp_path, vectors, monkeypatch, room):
    monkeypatch.setattr(Limits, "of", lambda client: Limits(1000, 10_000, room))
    draw = np.random.default_rng(0)
    metadatas = [{f"é{k}": 1 for k in draw.permutation(40)[:6]} for _ in range(300)]
    index = TwoStageIndex(tmp_path)
    index.upsert([str(i) for i in range(300)], vectors, metadatas=metadatas)
    assert len(index.client.get_collection("docs").metadata["mrl_rag:key_orders"].encode()) <= room
    first = orders(index.get())
    assert first["0"] == list(metadatas[0])
    assert orders(index.search(vectors[:1], k=300)[0]) == first
    index.close()
    assert orders(TwoStageIndex(tmp_path).get()) == first
