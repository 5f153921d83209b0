"""Conditions and metadata that Chroma's core refuses are named before anything is written. Large ones are split."""

import re

import numpy as np
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.errors import InvalidInput, InvalidTexts

RECORDS = 40


@pytest.fixture(scope="module")
def index():
    index = TwoStageIndex(full_dim=4)
    index.upsert(
        [f"id-{i}" for i in range(RECORDS)],
        np.random.default_rng(0).normal(size=(RECORDS, 4)),
        documents=[f"text {i}" for i in range(RECORDS)],
        metadatas=[{"n": i, "name": str(i), "share": i + 0.5, "even": i % 2 == 0} for i in range(RECORDS)],
    )
    return index


def nested(depth, leaf):
    condition = leaf
    for _ in range(depth):
        condition = {"$and": [condition, leaf]}
    return condition


BAD = [
    ({"n": float("nan")}, "'n' '\\$eq' with nan"),
    ({"n": {"$gt": float("inf")}}, "'n' '\\$gt' with inf"),
    ({"n": 2**70}, "'n' '\\$eq' with 1180591620717411303424"),
    ({"n": {"$ne": -(2**63) - 1}}, "'n' '\\$ne' with -9223372036854775809"),
    ({"n": {"$in": [1, 2**63]}}, "'n' '\\$in' with 9223372036854775808"),
    ({"$or": [{"n": 1}, {"name": {"$nin": ["a", "\ud800"]}}]}, "'name' '\\$nin' with '\\\\ud800'.*surrogate"),
    ({"n\ud800": 1}, "the key 'n\\\\ud800'"),
    ({"$schema": "x"}, r"the key '\$schema'"),
    ({"$in": [1, 2]}, r"the key '\$in'"),
    ({"n": {"$gt": True}}, "'n' '\\$gt' with True; it takes a number"),
    ({"n": {"$eq": [1, 2]}}, "'n' '\\$eq' with a list; it takes one value"),
    ({"n": {"$in": [1, True]}}, "'n' '\\$in' with \\[1, True\\]"),
    ({"n": {"$in": [np.int64(1)]}}, "'n' '\\$in' with"),
    ({"n": {"$in": [[1]]}}, "'n' '\\$in' with"),
    ({"n": {"$in": []}}, "'n' '\\$in' with"),
    (nested(200, {"n": 1}), "where nests .* more than 60 levels deep"),
    ({"#document": {"$eq": "text 1"}}, "#document"),
]
BAD_OF_DOCUMENTS = [
    ({"$regex": "("}, "unclosed group"),
    ({"$or": [{"$contains": "x"}, {"$not_regex": "["}]}, "unclosed character class"),
    ({"$regex": r"\pL{1000}"}, "regular expression in it is too long"),
    ({"$contains": "x" * 60_000}, "string .* is too long"),
    ({"$contains": "x\ud800"}, "'\\$contains' with 'x\\\\ud800'.*surrogate"),
    (nested(200, {"$contains": "x"}), "where_document nests .* more than 60 levels deep"),
]


@pytest.mark.parametrize(("where", "words"), BAD)
def test_a_condition_that_chroma_cannot_answer_is_refused_by_name(index, where, words):
    asked = np.ones((1, 4))
    for ask in (
        lambda: index.search(asked, where=where),
        lambda: index.search(asked, where=where, ids=["id-1"]),
        lambda: index.search_mmr(asked, where=where),
        lambda: index.get(where=where),
        lambda: index.metadatas(where),
        lambda: index.delete(where=where),
    ):
        with pytest.raises(InvalidInput, match=words) as refused:
            ask()
        assert len(str(refused.value)) < 800
    assert len(index) == RECORDS


@pytest.mark.parametrize(("where_document", "words"), BAD_OF_DOCUMENTS)
def test_a_condition_on_documents_that_chroma_cannot_answer_is_refused_by_name(index, where_document, words):
    for ask in (
        lambda: index.search(np.ones((1, 4)), where_document=where_document),
        lambda: index.get(where_document=where_document),
    ):
        with pytest.raises(InvalidInput, match=words) as refused:
            ask()
        assert len(str(refused.value)) < 800


@pytest.mark.parametrize(
    "where",
    [{"n": 2**63 - 1}, {"n": {"$gt": 1e300}}, {"name": {"$in": ["\x00"]}}, nested(59, {"n": 1})],
)
def test_what_chroma_can_answer_is_asked(index, where):
    expected = ["id-1"] if "$and" in where else []
    assert [record.id for record in index.get(where=where)] == expected


def among(name, values, operator="$in"):
    return {name: {operator: values}}


FEW, MANY = list(range(5)), [*range(5), *range(100, 40_000)]
LARGE = [
    (among("n", MANY), None, range(5)),
    (among("n", MANY, "$nin"), None, range(5, RECORDS)),
    (among("name", [str(n) for n in MANY]), None, range(5)),
    (among("share", [n + 0.5 for n in MANY]), None, range(5)),
    ({"$and": [among("n", MANY), {"even": True}]}, None, [0, 2, 4]),
    ({"$or": [among("n", MANY), {"n": 30}]}, None, [*range(5), 30]),
    ({"$or": [{"n": n} for n in MANY[:1000]]}, None, range(5)),
    ({"$and": [{"n": {"$ne": n}} for n in MANY[:1000]]}, None, range(5, RECORDS)),
    ({"$or": [{"$and": [{"n": n}, {"even": True}]} for n in MANY[:1000]]}, None, [0, 2, 4]),
    (among("n", MANY), {"$or": [{"$contains": f"text {n}"} for n in [3, *range(1000, 2000)]]}, [3]),
    (among("n", FEW), {"$or": [{"$contains": f"text {n}"} for n in [3, 7, *range(1000, 2000)]]}, [3]),
]


@pytest.mark.parametrize(("where", "where_document", "expected"), LARGE)
def test_a_condition_too_large_for_one_request_finds_what_meets_it(index, where, where_document, expected):
    wanted = {f"id-{i}" for i in expected}
    hits = index.search(np.ones((1, 4)), k=RECORDS, where=where, where_document=where_document)[0]
    assert {hit.id for hit in hits} == wanted
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    found = [record.id for record in index.get(where=where, where_document=where_document)]
    assert len(found) == len(wanted) and set(found) == wanted
    among_two = index.search(np.ones((1, 4)), where=where, where_document=where_document, ids=["id-3", "id-39"])[0]
    assert {hit.id for hit in among_two} == wanted & {"id-3", "id-39"}


def test_records_are_deleted_by_a_condition_too_large_for_one_request(open_index):
    index = open_index(full_dim=4)
    index.upsert(["a", "b", "c"], np.ones((3, 4)), metadatas=[{"n": 1}, {"n": 2}, None])
    index.delete(where=among("n", list(range(2, 30_000))))
    assert [record.id for record in index.get()] == ["a", "c"]


@pytest.fixture(scope="module")
def one_record(new_place):
    """An index that only refuses what is written to it."""
    with new_place() as open_index, open_index(full_dim=4) as index:
        index.upsert(["kept"], np.ones((1, 4)), documents=["old"], metadatas=[{"n": 1}])
        yield index


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"$schema": "x"}, r"the key '\$schema'"),
        ({"#x": 1}, "the key '#x'"),
        ({"": 1}, "the key ''"),
        ({"chroma:x": 1}, "the key 'chroma:x'"),
        ({"chroma:document": "x"}, "chroma:document"),
        ({"n": list(range(5461))}, "5461 list items"),
        ({"n": list(range(3000)), "m": list(range(3000))}, "6000 list items"),
        ({f"key {i}": i for i in range(5461)}, "5461 keys"),
        ({"n": np.int64(1)}, "int64"),
    ],
)
def test_metadata_that_chromas_core_refuses_is_named_and_nothing_is_written(one_record, metadata, words):
    with pytest.raises(InvalidInput, match=rf"metadatas\[1\].*{words}") as refused:
        one_record.upsert(["new", "kept"], np.eye(4)[:2], documents=["new", "newer"], metadatas=[{"n": 1}, metadata])
    assert len(str(refused.value)) < 800
    assert [(record.id, record.document, record.metadata) for record in one_record.get()] == [("kept", "old", {"n": 1})]
    assert one_record.verify().ok


def test_the_largest_metadata_is_stored_replaced_and_its_collection_goes_on(open_index):
    index = open_index(full_dim=4)
    for start in (0, 10_000):
        metadata = {"list": list(range(start, start + 5460))} | {f"key {start + i}": i for i in range(5459)}
        index.upsert(["a"], np.ones((1, 4)), documents=["x"], metadatas=[metadata])
        assert index.get(["a"])[0].metadata == metadata
    index.upsert(["b"], np.ones((1, 4)))
    assert len(index) == 2


def test_the_advice_on_invalid_text_keeps_what_a_pair_of_surrogates_stands_for():
    text = "x = \ud835\udc65 and \ud800."
    with pytest.raises(InvalidTexts, match="surrogates") as refused:
        TwoStageIndex().upsert(["a"], np.ones((1, 4)), documents=[text])
    advice = re.search(r"text\.encode\(.*'replace'\)", str(refused.value)).group()
    assert eval(advice) == "x = \U0001d465 and \ufffd."
