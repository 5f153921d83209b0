import sys
from concurrent.futures import ThreadPoolExecutor

import chromadb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrl_rag import Hit, Plan, TwoStageIndex, truncate
from mrl_rag.errors import (
    ArchiveError,
    DimensionMismatch,
    IndexMismatch,
    IndexNotWritable,
    InvalidDimension,
    InvalidIds,
    InvalidInput,
    InvalidPlan,
    InvalidTexts,
    InvalidVectors,
    PlainCollection,
    TwoStageIndexError,
    UnknownArgument,
)
from mrl_rag.index.shortlist import Limits


def exact_scan(vectors, query, k):
    scores = truncate(vectors, vectors.shape[1]) @ truncate(query[None], len(query))[0]
    return [f"id-{i}" for i in np.argsort(-scores, kind="stable")[:k]], np.sort(scores)[::-1][:k]


ALL = Plan(dims=(8, 32), sizes=(300,))


def test_a_shortlist_of_everything_gives_the_exact_scan(filled, vectors):
    for query in np.random.default_rng(1).normal(size=(5, 32)):
        expected, scores = exact_scan(vectors, query, 10)
        hits = filled.search([query], k=10, plan=ALL)[0]
        assert [hit.id for hit in hits] == expected
        np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-3)  # float16 rows


def test_a_hit_carries_the_record_as_it_was_written(filled, vectors):
    assert filled.search(vectors[7:8], k=1)[0] == [
        Hit("id-7", pytest.approx(1, abs=1e-3), "text 7", {"page": 7, "even": False})
    ]


def test_a_query_gets_the_same_hits_alone_and_in_a_batch(filled):
    queries = np.random.default_rng(2).normal(size=(20, 32))
    assert filled.search(queries, k=5) == [filled.search([query], k=5)[0] for query in queries]


def test_a_single_vector_gets_a_single_list(filled, vectors):
    for search in (filled.search, filled.search_mmr):
        assert search(vectors[3], k=5) == search(vectors[3].tolist(), k=5) == search(vectors[3:4], k=5)[0]
    with TwoStageIndex() as empty:
        assert empty.search(vectors[3]) == []
    with pytest.raises(InvalidVectors, match="31 numbers"):
        filled.search(vectors[3][:31])


@pytest.mark.parametrize(
    ("call", "name", "here"),
    [
        ("search", "filter", "where"),
        ("search", "n_results", "k"),
        ("search_mmr", "similarity_top_k", "k"),
        ("get", "filter", "where"),
        ("delete", "filter", "where"),
    ],
)
def test_another_librarys_name_of_an_argument_is_answered_with_ours(one_record, call, name, here):
    with pytest.raises(UnknownArgument, match=rf"{call} has no argument {name}=; it is {here}= here"):
        getattr(one_record, call)(**{name: 1})


def test_filters_hold_for_every_hit(filled, vectors):
    hits = filled.search(vectors[:3], k=10, where={"even": False})
    assert all(len(answer) == 10 and all(hit.metadata["page"] % 2 for hit in answer) for answer in hits)
    containing = filled.search(vectors[:1], k=20, where_document={"$contains": "text 29"})[0]
    assert {hit.id for hit in containing} == {"id-29", *(f"id-{i}" for i in range(290, 300))}
    both = filled.search(vectors[:1], k=20, where={"page": {"$lt": 20}}, where_document={"$contains": "text 1"})[0]
    assert {hit.id for hit in both} == {"id-1", *(f"id-{i}" for i in range(10, 20))}


def test_equal_scores_come_in_the_order_of_their_ids(open_index):
    index = open_index()
    index.upsert(["c", "a", "d", "b"], np.ones((4, 16)))
    assert [hit.id for hit in index.search(np.ones((1, 16)), k=3)[0]] == ["a", "b", "c"]


def test_fewer_records_than_k_are_all_returned(open_index):
    index = open_index()
    index.upsert(["a", "b"], np.eye(2, 16))
    assert [hit.id for hit in index.search(np.eye(1, 16), k=10)[0]] == ["a", "b"]


def test_a_funnel_of_three_stages_agrees_with_two_when_nothing_is_dropped(filled, vectors):
    funnel = Plan(dims=(8, 16, 32), sizes=(300, 300))
    assert filled.search(vectors[:5], plan=funnel) == filled.search(vectors[:5], plan=ALL)


def test_get_returns_records_in_the_order_asked_and_leaves_unknown_ids_out(filled, vectors):
    records = filled.get(["id-5", "nobody", "id-2"])
    assert [(r.id, r.document, r.metadata["page"]) for r in records] == [("id-5", "text 5", 5), ("id-2", "text 2", 2)]
    np.testing.assert_allclose(records[0].vector, truncate(vectors[5:6], 32)[0], atol=1e-3)


def test_get_by_condition(filled):
    assert [r.id for r in filled.get(where={"page": {"$lt": 3}})] == ["id-0", "id-1", "id-2"]
    assert [r.id for r in filled.get(where={"page": {"$lt": 3}}, limit=2)] == ["id-0", "id-1"]
    assert [r.id for r in filled.get(["id-9", "id-1"], where={"page": {"$lt": 3}})] == ["id-1"]


@pytest.fixture
def small(open_index, vectors):
    index = open_index(full_dim=32)
    names, texts = [f"id-{i}" for i in range(20)], [f"text {i}" for i in range(20)]
    index.upsert(names, vectors[:20], texts, [{"page": i, "even": i % 2 == 0} for i in range(20)])
    return index


def test_pages_hold_every_record_once_in_the_order_it_was_stored(small, vectors):
    small.upsert(["id-3"], vectors[:1], documents=["replaced"])
    pages = [small.get(limit=7, offset=start) for start in range(0, 20, 7)]
    assert [record.id for page in pages for record in page] == [f"id-{i}" for i in range(20)]
    assert [r.id for r in small.get(where={"even": True}, limit=3, offset=2)] == ["id-4", "id-6", "id-8"]
    assert [r.id for r in small.get(["nobody", "id-9", "id-8", "id-7"], limit=2, offset=1)] == ["id-8", "id-7"]
    large = {"page": {"$in": list(range(20_000))}}
    assert [r.id for r in small.get(where=large, limit=2, offset=10)] == ["id-11", "id-12"]
    assert small.get(limit=0) == small.get(offset=20) == small.get(limit=2**40, offset=2**40) == []
    assert len(small.get(limit=2**40)) == 20


def test_vectors_are_read_where_they_are_asked_for(small, monkeypatch):
    assert [record.vector is None for record in small.get(limit=2)] == [False, False]
    monkeypatch.setattr(small._session.opened.stores.archive, "read", lambda ids: pytest.fail("read vectors"))
    records = [*small.get(limit=1, vectors=False), *small.get(["id-5"], vectors=False)]
    assert [(record.document, record.vector) for record in records] == [("text 0", None), ("text 5", None)]


def test_a_bad_limit_or_offset_is_refused():
    for name in ("limit", "offset"):
        for wrong in (-1, 2.5, "3", True):
            with pytest.raises(InvalidInput, match=f"{name} is {wrong!r}"):
                TwoStageIndex().get(**{name: wrong})


def test_an_id_given_twice_is_one_record(small, vectors):
    twice = ["id-1", "id-2", "id-1"]
    assert [record.id for record in small.get(twice)] == ["id-1", "id-2"]
    assert [record.id for record in small.get(twice, where={"even": True})] == ["id-2"]
    assert {hit.id for hit in small.search(vectors[:1], ids=twice)[0]} == {"id-1", "id-2"}
    small.delete(twice)
    assert len(small) == 18
    assert small.verify().ok


def test_an_upsert_replaces_the_whole_record(writable, vectors):
    writable.upsert(["id-0", "id-1"], vectors[[1, 0]], documents=[None, "new"], metadatas=[{"other": 1}, None])
    first, second = writable.get(["id-0", "id-1"])
    assert (first.document, first.metadata) == (None, {"other": 1})
    assert (second.document, second.metadata) == ("new", {})
    assert writable.search(vectors[:1], k=1)[0][0].id == "id-1"
    assert len(writable) == 120


def test_delete_by_id_condition_and_both(writable):
    writable.delete(["id-0", "nobody"])
    writable.delete(where={"page": {"$lt": 10}})
    writable.delete(["id-10", "id-11"], where={"even": True})
    writable.delete(["id-12", "id-13"], where_document={"$contains": "text 13"})
    writable.delete(where={"even": True}, where_document={"$contains": "text 11"})
    assert len(writable) == 103
    assert [r.id for r in writable.get([f"id-{i}" for i in range(109, 120)])] == [
        *("id-109", "id-111", "id-113", "id-115", "id-117", "id-119")
    ]
    assert [r.id for r in writable.get(["id-0", "id-9", "id-10", "id-11"])] == ["id-11"]
    writable.clear()
    assert len(writable) == 0


def test_a_deleted_record_is_gone_from_the_archive_too(small):
    small.delete(["id-3"])
    assert set(small._session.opened.stores.archive.document_hashes(["id-3", "id-4"])) == {"id-4"}


def test_records_and_order_survive_opening_again(filled, open_filled, vectors):
    before = filled.search(vectors[:4], k=5, plan=ALL)
    again = open_filled()
    assert (again.full_dim, again.shortlist_dim, len(again)) == (32, 8, 300)
    assert again.search(vectors[:4], k=5, plan=ALL) == before


def test_batches_are_cut_to_what_the_client_takes(small, monkeypatch, vectors):
    monkeypatch.setattr(small._session.opened.stores.shortlist, "_limits", Limits(batch=7, results=sys.maxsize))
    small.upsert([f"more-{i}" for i in range(50)], vectors[:50])
    assert len(small) == 70
    assert len(small.get([f"more-{i}" for i in range(50)])) == 50
    assert len(small.search(vectors[:30])) == 30
    small.delete([f"more-{i}" for i in range(50)])
    assert len(small) == 20


def test_more_records_than_the_clients_maximum(tmp_path):
    index = TwoStageIndex(tmp_path)
    count = chromadb.EphemeralClient().get_max_batch_size() + 100
    index.upsert([str(i) for i in range(count)], np.random.default_rng(0).normal(size=(count, 4)))
    assert len(index) == count
    assert len(index.get([str(i) for i in range(count)])) == count
    index.delete([str(i) for i in range(count)])
    assert len(index) == 0


def test_empty_inputs_give_empty_outputs(filled):
    filled.upsert([], [])
    filled.delete([])
    assert filled.get([]) == []
    assert filled.search([]) == []


def test_an_index_that_was_never_written_answers_with_nothing():
    index = TwoStageIndex()
    assert (len(index), index.full_dim, index.get(["a"]), index.search([[1.0, 2.0]])) == (0, None, [], [[]])
    index.delete(["a"])
    index.clear()


def test_two_indexes_in_memory_share_nothing():
    one, two = TwoStageIndex(), TwoStageIndex()
    one.upsert(["a"], [[1.0, 0.0]])
    assert (len(one), len(two)) == (1, 0)


def test_plain_chroma_sees_the_collection_as_its_user_wrote_it(tmp_path):
    with_index = TwoStageIndex(tmp_path, collection="docs")
    with_index.upsert(["a", "b"], np.eye(2, 32), documents=["text", "other"], metadatas=[{"page": 1}, None])
    record = chromadb.PersistentClient(tmp_path).get_collection("docs").get(include=["documents", "metadatas"])
    assert (record["ids"], record["documents"]) == (["a", "b"], ["text", "other"])
    assert record["metadatas"] == [{"page": 1}, None]


@pytest.mark.parametrize(
    ("full_dim", "shortlist_dim"), [(6, 6), (64, 64), (384, 96), (768, 192), (1024, 256), (3072, 768)]
)
def test_the_default_shortlist_is_a_quarter_or_less_where_that_leaves_64(full_dim, shortlist_dim):
    assert TwoStageIndex(full_dim=full_dim).shortlist_dim == shortlist_dim


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["upsert", "delete"]), st.sampled_from("abcdef"), st.integers(0, 99))))
def test_after_any_writes_the_index_holds_what_a_dict_would(steps):
    index, expected = TwoStageIndex(), {}
    for action, id_, number in steps:
        if action == "upsert":
            index.upsert([id_], [[1.0, number]], documents=[f"text {number}"], metadatas=[{str(number % 3): number}])
            expected[id_] = number
        else:
            index.delete([id_])
            expected.pop(id_, None)
    records = index.get(sorted(expected))
    assert {r.id: r.document for r in records} == {i: f"text {n}" for i, n in expected.items()}
    assert [r.metadata for r in records] == [{str(expected[r.id] % 3): expected[r.id]} for r in records]
    assert {hit.id for hit in index.search([[1.0, 1.0]])[0]} == set(expected)


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (InvalidIds, {"ids": ["a", "a"]}),
        (InvalidIds, {"ids": ["a", ""]}),
        (InvalidIds, {"ids": ["a", 1]}),
        (InvalidIds, {"ids": ["a"]}),
        (InvalidIds, {"ids": "ab"}),
        (InvalidIds, {"ids": None}),
        (InvalidIds, {"documents": ["one"]}),
        (InvalidIds, {"metadatas": [{"a": 1}] * 3}),
        (InvalidVectors, {"vectors": np.ones((2, 31))}),
        (InvalidVectors, {"vectors": np.full((2, 32), np.nan)}),
        (InvalidVectors, {"vectors": np.full((2, 32), np.inf)}),
        (InvalidVectors, {"vectors": np.ones(32)}),
        (InvalidTexts, {"documents": ["one", 2]}),
        (InvalidIds, {"ids": ["a", "\ud800"]}),
        (InvalidTexts, {"documents": ["one", "\ud800"]}),
        (InvalidInput, {"metadatas": [{"a": 1}, {"a": "\ud800"}]}),
        (InvalidInput, {"metadatas": [{"a": 1}, {"a": ["x", "\ud800"]}]}),
        (InvalidInput, {"metadatas": [{"a": 1}, {"a": {"b": 1}}]}),
        (InvalidInput, {"metadatas": [{"a": 1}, {1: 1}]}),
        (InvalidInput, {"metadatas": [{"a": 1}, {"a": float("nan")}]}),
        (InvalidInput, {"metadatas": [{"a": 1}, {"a": [1.0, float("inf")]}]}),
        (InvalidInput, {"metadatas": [{"a": 1}, {"a": 2**63}]}),
    ],
)
def test_a_bad_upsert_is_refused_and_writes_nothing(vectors, error, change):
    index = TwoStageIndex()
    index.upsert(["a"], vectors[:1], documents=["kept"], metadatas=[{"kept": True}])
    good = {"ids": ["a", "b"], "vectors": vectors[1:3], "documents": ["x", "y"], "metadatas": [None, None]}
    with pytest.raises(error):
        index.upsert(**(good | change))
    assert len(index) == 1
    assert (index.get(["a"])[0].document, index.get(["a"])[0].metadata) == ("kept", {"kept": True})
    assert index.search(vectors[:1])[0][0].score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("k", [0, -1, 2.5, "3", True, None])
def test_k_below_one_or_not_an_integer_is_refused(k):
    with TwoStageIndex() as index, pytest.raises(InvalidPlan, match="k is"):
        index.search(np.ones((1, 32)), k=k)


@pytest.fixture(scope="module")
def one_record():
    with TwoStageIndex(full_dim=32, shortlist_dim=8) as index:
        index.upsert(["a"], np.ones((1, 32)))
        yield index


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (InvalidVectors, {"query_vectors": np.ones((1, 31))}),
        (InvalidVectors, {"query_vectors": np.ones(31)}),
        (InvalidVectors, {"query_vectors": np.ones((1, 1, 32))}),
        (InvalidVectors, {"query_vectors": [[1.0], [1.0, 2.0]]}),
        (InvalidPlan, {"plan": 100}),
        (InvalidVectors, {"query_vectors": [[float("nan")] * 32]}),
        (InvalidPlan, {"plan": Plan(dims=(4, 32), sizes=(50,))}),
        (InvalidPlan, {"plan": Plan(dims=(8, 16), sizes=(50,))}),
        (InvalidPlan, {"plan": Plan(dims=(8, 32), sizes=(9,))}),
        (InvalidInput, {"where": {"page": {"$like": 1}}}),
        (InvalidInput, {"where": {"a": 1, "b": 2}}),
        (InvalidInput, {"where_document": {"contains": "x"}}),
    ],
)
def test_a_bad_search_is_refused(one_record, error, arguments):
    with pytest.raises(error):
        one_record.search(**({"query_vectors": np.ones((1, 32))} | arguments))


@pytest.mark.parametrize(
    "arguments", [{"full_dim": 0}, {"full_dim": -1}, {"full_dim": "x"}, {"full_dim": 8, "shortlist_dim": 9}]
)
def test_a_bad_dimension_is_refused(arguments):
    with pytest.raises(InvalidDimension):
        TwoStageIndex(**arguments)


def test_a_shortlist_wider_than_the_first_vectors_is_refused():
    index = TwoStageIndex(shortlist_dim=64)
    with pytest.raises(InvalidDimension, match="1 to 32"):
        index.upsert(["a"], np.ones((1, 32)))
    assert len(index) == 0


def test_delete_without_ids_or_conditions_is_refused(filled):
    for arguments in ({}, {"where": {}}):
        with pytest.raises(InvalidIds, match="clear"):
            filled.delete(**arguments)
    with pytest.raises(InvalidIds):
        filled.delete("id-1")
    assert len(filled) == 300


def test_another_dimension_or_model_is_refused_with_both_sides_named(tmp_path):
    TwoStageIndex(tmp_path, full_dim=32, shortlist_dim=8, fingerprint="abc").upsert(["a"], np.ones((1, 32)))
    with pytest.raises(DimensionMismatch, match=r"32 numbers; 64"):
        TwoStageIndex(tmp_path, full_dim=64)
    with pytest.raises(DimensionMismatch, match=r"8 dimensions; 16"):
        TwoStageIndex(tmp_path, full_dim=32, shortlist_dim=16)
    with pytest.raises(IndexMismatch, match=r"(?s)abc.*xyz"):
        TwoStageIndex(tmp_path, fingerprint="xyz")
    assert len(TwoStageIndex(tmp_path, full_dim=32, fingerprint="abc")) == 1


def test_a_plain_collection_is_refused(tmp_path):
    collection = chromadb.PersistentClient(tmp_path).create_collection("docs", embedding_function=None)
    collection.add(["a"], [[1.0, 0.0]])
    with pytest.raises(PlainCollection, match=r"of 1 records.*from_chroma"):
        TwoStageIndex(tmp_path)


@pytest.mark.parametrize(
    ("space", "place"), [("l2", "memory"), ("ip", "memory"), ("cosine", "memory"), ("l2", "folder"), ("l2", "server")]
)
def test_an_empty_plain_collection_is_taken_over_and_stays_the_one_it_was(place, space, tmp_path, vectors, request):
    client = {
        "memory": chromadb.EphemeralClient,
        "folder": lambda: chromadb.PersistentClient(tmp_path),
        "server": lambda: chromadb.HttpClient(port=request.getfixturevalue("chroma_server")),
    }[place]()
    name = f"mine-{space}-{np.random.default_rng().integers(2**60)}"
    mine = client.create_collection(name, configuration={"hnsw": {"space": space}}, embedding_function=None)
    index = TwoStageIndex(collection=name, client=client, shortlist_dim=16)
    assert (len(index), index.search(vectors[:1])) == (0, [[]])
    index.upsert([str(i) for i in range(150)], vectors[:150] * np.arange(1, 151)[:, None])
    assert (mine.count(), index.collection().id) == (150, mine.id)
    plan = Plan(dims=(16, 32), sizes=(50,))
    for opened in (index, TwoStageIndex(collection=name, client=client)):
        found = [hits[0].id for hits in opened.search(vectors[:150], 1, plan)]
        assert found == [str(i) for i in range(150)]
        assert opened.verify().ok
    index.drop()
    assert name not in [collection.name for collection in client.list_collections()]


def test_an_emptied_collection_of_another_length_is_replaced(tmp_path, vectors):
    mine = chromadb.PersistentClient(tmp_path).create_collection("docs", embedding_function=None)
    mine.add(["a"], [[1.0, 0.0]])
    mine.delete(["a"])
    index = TwoStageIndex(tmp_path)
    index.upsert(["a"], vectors[:1])
    assert index.collection().count() == 1


def test_the_collection_is_there_on_demand(tmp_path):
    index = TwoStageIndex(tmp_path)
    with pytest.raises(InvalidInput, match="no collection 'docs'"):
        index.collection()
    assert index.collection(create=True).count() == 0
    assert index.collection().id == chromadb.PersistentClient(tmp_path).get_collection("docs").id
    index.drop()
    assert chromadb.PersistentClient(tmp_path).list_collections() == []


@pytest.mark.parametrize("number", [2, 99])
def test_another_format_is_refused_with_the_way_out(tmp_path, number):
    chromadb.PersistentClient(tmp_path).create_collection("docs", metadata={"mrl_rag:format": number})
    with pytest.raises(IndexMismatch, match=f"format {number}.*Fill a new collection"):
        TwoStageIndex(tmp_path)


def test_what_is_stored_already_is_not_written_again(small, vectors, monkeypatch):
    written = []
    upsert = type(small._session.opened.stores.shortlist).upsert
    monkeypatch.setattr(
        type(small._session.opened.stores.shortlist),
        "upsert",
        lambda self, ids, *rest, **more: written.append(ids) or upsert(self, ids, *rest, **more),
    )
    ids = [f"id-{i}" for i in range(5)]
    texts = [f"text {i}" for i in range(5)]
    notes = [{"page": i, "even": i % 2 == 0} for i in range(5)]
    small.upsert(ids, vectors[:5], texts, notes)
    assert written == []
    small.upsert(
        ids, [vectors[9], *vectors[1:5]], [*texts[:1], "new", *texts[2:]], [*notes[:2], {"page": 2}, *notes[3:]]
    )
    assert written == [["id-0", "id-1", "id-2"]]
    assert [record.document for record in small.get(ids)] == ["text 0", "new", "text 2", "text 3", "text 4"]
    assert small.get(["id-2"])[0].metadata == {"page": 2}
    assert small.verify().ok


def test_a_dropped_index_leaves_nothing_and_may_have_another_length(open_index, vectors):
    index = open_index()
    index.upsert(["a"], vectors[:1])
    index.drop()
    index.drop()
    assert (len(index), index.search([[1.0, 2.0]])) == (0, [[]])
    index.upsert(["b"], [[1.0, 2.0]])
    assert [hit.id for hit in index.search([[1.0, 2.0]])[0]] == ["b"]


def test_a_dropped_index_leaves_no_files(folder):
    index = TwoStageIndex(folder)
    index.drop()
    assert not list(folder.glob("archive-*"))
    assert len(TwoStageIndex(folder)) == 0


@pytest.fixture
def folder(tmp_path, vectors):
    index = TwoStageIndex(tmp_path, full_dim=32, shortlist_dim=8)
    index.upsert(["a", "b", "c"], vectors[:3])
    index.close()
    return tmp_path


def test_a_missing_archive_is_refused(folder, archive_of):
    archive_of(folder).path.unlink()
    with pytest.raises(ArchiveError, match="is missing"):
        TwoStageIndex(folder)
    assert not list(folder.glob("archive-*.lmdb"))


def test_an_archive_that_is_no_database_is_refused(folder, archive_of):
    archive_of(folder).path.write_bytes(b"not a database, whatever its name says" * 100)
    with pytest.raises(ArchiveError, match="damaged"):
        TwoStageIndex(folder)


def test_a_damaged_row_is_named(folder, vectors, archive_of):
    archive_of(folder).damage("c")
    with pytest.raises(ArchiveError, match="'c'"):
        TwoStageIndex(folder).search(vectors[:1])


def test_an_archive_that_was_cut_short_is_refused(folder, archive_of):
    file = archive_of(folder).path
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(ArchiveError, match="shorter than it was"):
        TwoStageIndex(folder)


def test_a_lost_row_is_named_and_an_upsert_restores_it(folder, vectors, archive_of):
    archive_of(folder).lose("b")
    index = TwoStageIndex(folder)
    with pytest.warns(UserWarning, match="'b' among them"):
        index.search(vectors[:1])
    index.upsert(["b"], vectors[1:2])
    assert len(index.search(vectors[:1])[0]) == 3


def test_a_missing_archive_of_a_client_in_memory_is_refused(vectors):
    client = chromadb.EphemeralClient()
    TwoStageIndex(client=client, collection="without_archive").upsert(["a"], vectors[:1])
    archive = client.get_collection("without_archive").metadata["mrl_rag:archive"]
    client.delete_collection(f"mrl_rag-archive-{archive}")
    with pytest.raises(ArchiveError, match="is missing"):
        TwoStageIndex(client=client, collection="without_archive")


def test_what_chroma_refuses_in_between_is_an_error_of_ours(vectors):
    client = chromadb.EphemeralClient()
    index = TwoStageIndex(client=client, collection="loses_its_archive")
    index.upsert(["a"], vectors[:1])
    client.delete_collection(f"mrl_rag-archive-{client.get_collection(index.name).metadata['mrl_rag:archive']}")
    for ask in (lambda: index.search(vectors[:1]), lambda: index.upsert(["b"], vectors[:1])):
        with pytest.raises(TwoStageIndexError, match="NotFoundError"):
            ask()


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(IndexNotWritable, match="can't be made"):
            TwoStageIndex(path)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    # root may write anywhere, so `os.access` is replaced.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(IndexNotWritable, match="can't be written"):
        TwoStageIndex(tmp_path / "db")


@pytest.mark.parametrize(
    "name", ["a!", "ab", "", "-ab", "ab-", "a..b", "10.0.0.1", "größe", "abc\n", "x" * 461, None, 7]
)
def test_a_name_chroma_does_not_take_is_refused_before_anything_is_made(tmp_path, name):
    with pytest.raises(InvalidInput, match="collection is"):
        TwoStageIndex(tmp_path / "db", collection=name)
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("name", ["abc", "A.b-c_9", "1.2.3", "x" * 440])
def test_a_name_chroma_takes_is_taken_also_when_chroma_is_filled_anew(tmp_path, name):
    index = TwoStageIndex(tmp_path, collection=name)
    index.upsert(["a"], np.ones((1, 4)))
    index.reindex(shortlist_dim=2)
    assert TwoStageIndex(tmp_path, collection=name).get(["a"])[0].id == "a"


def test_a_path_together_with_a_client_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="both given"):
        TwoStageIndex(tmp_path, client=chromadb.EphemeralClient())


def test_a_write_refused_by_chroma_leaves_an_orphan_that_no_search_returns(tmp_path, vectors, monkeypatch):
    index = TwoStageIndex(tmp_path)
    index.upsert(["a"], vectors[:1])

    def refuse(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(index._session.opened.stores.shortlist._collection, "upsert", refuse)
    with pytest.raises(RuntimeError):
        index.upsert(["b"], vectors[1:2])
    assert [hit.id for hit in index.search(vectors[1:2])[0]] == ["a"]
    assert [record.id for record in index.get(["a", "b"])] == ["a"]


def test_a_delete_that_stops_halfway_leaves_no_record_without_its_vector(tmp_path, vectors, monkeypatch):
    index = TwoStageIndex(tmp_path)
    index.upsert(["a", "b"], vectors[:2])

    def stop(ids):
        raise KeyboardInterrupt

    monkeypatch.setattr(index._session.opened.stores.archive, "delete", stop)
    with pytest.raises(KeyboardInterrupt):
        index.delete(["b"])
    assert [hit.id for hit in index.search(vectors[1:2])[0]] == ["a"]
    assert [record.id for record in index.get(["a", "b"])] == ["a"]


def test_an_upsert_that_stops_between_batches_keeps_what_was_committed(tmp_path, vectors, monkeypatch):
    index = TwoStageIndex(tmp_path, full_dim=32)
    index.upsert(["first"], vectors[:1])
    monkeypatch.setattr(index._session.opened.stores.shortlist, "_limits", Limits(batch=10, results=sys.maxsize))
    write, calls = index._session.opened.stores.archive.write, []

    def stop_at_the_third(*rows):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*rows)

    monkeypatch.setattr(index._session.opened.stores.archive, "write", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        index.upsert([str(i) for i in range(100)], vectors[:100])
    again = TwoStageIndex(tmp_path)
    assert len(again) == 21
    assert len(again.get([str(i) for i in range(100)])) == 20


def test_threads_may_search_and_write_at_once(open_index, vectors):
    index = open_index(full_dim=32, shortlist_dim=8)
    index.upsert([f"id-{i}" for i in range(100)], vectors[:100])

    def work(number):
        if number % 2:
            index.upsert([f"new-{number}"], vectors[number : number + 1])
        return index.search(vectors[number : number + 1], k=1)[0][0].score

    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(work, range(60)))
    assert scores == pytest.approx([1] * 60, abs=1e-3)
    assert len(index) == 130


def test_a_hit_explains_itself_on_request(filled, vectors):
    plan = Plan(dims=(8, 16, 32), sizes=(300, 50))
    hits = filled.search(vectors[:2], k=3, plan=plan, explain=True)
    for answer in hits:
        for rank, hit in enumerate(answer, start=1):
            assert [stage.dim for stage in hit.stages] == [8, 16, 32]
            assert hit.stages[-1].rank == rank
            assert hit.stages[0].score is None
            assert hit.stages[-1].score == hit.score
            assert all(stage.milliseconds >= 0 for stage in hit.stages)
    assert filled.search(vectors[:1], plan=plan)[0][0].stages == ()


def test_a_score_threshold_leaves_the_rest_out(filled, vectors):
    everything = filled.search(vectors[:1], k=300, plan=ALL)[0]
    some = filled.search(vectors[:1], k=300, plan=ALL, score_threshold=0.2)[0]
    assert some == [hit for hit in everything if hit.score >= 0.2]
    assert 0 < len(some) < 300
    for bad in ("0.5", float("nan"), True):
        with pytest.raises(InvalidInput, match="score_threshold"):
            filled.search(vectors[:1], score_threshold=bad)


def test_an_index_can_have_a_plan_of_its_own(vectors):
    index = TwoStageIndex(full_dim=32, shortlist_dim=8, plan=Plan(dims=(8, 32), sizes=(3,)))
    index.upsert([str(i) for i in range(50)], vectors[:50])
    with pytest.raises(InvalidPlan, match="fewer than k=4"):
        index.search(vectors[:1], k=4)
    assert len(index.search(vectors[:1], k=4, plan=Plan(dims=(8, 32), sizes=(4,)))[0]) == 4
    with pytest.raises(InvalidPlan, match="plan is 100; it must be a Plan"):
        TwoStageIndex(plan=100)


def test_mmr_prefers_records_that_differ(open_index):
    index = open_index()
    index.upsert(["a", "b", "c", "d"], [[1, 0, 0], [1, 0.01, 0], [1, 0, 0.01], [0.6, 0.8, 0]])
    query = [[1.0, 0.0, 0.0]]
    assert [hit.id for hit in index.search_mmr(query, k=2, lambda_mult=1)[0]] == ["a", "b"]
    diverse = index.search_mmr(query, k=2, lambda_mult=0.2)[0]
    assert [hit.id for hit in diverse] == ["a", "d"]
    assert diverse[1].score == pytest.approx(0.6, abs=1e-3)
    assert len(index.search_mmr(query, k=10)[0]) == 4
    for bad in (-0.1, 1.1, "0.5"):
        with pytest.raises(InvalidInput, match="lambda_mult"):
            index.search_mmr(query, lambda_mult=bad)


def test_records_that_meet_a_condition_are_never_missed():
    """They are few and far from the query, so that an approximate search with a condition may miss them."""
    random = np.random.default_rng(0)
    near = random.normal(size=(3000, 32)) + 4
    index = TwoStageIndex(full_dim=32, shortlist_dim=8)
    index.upsert([f"near-{i}" for i in range(3000)], near, metadatas=[{"kind": "near", "n": i} for i in range(3000)])
    index.upsert([f"far-{i}" for i in range(20)], random.normal(size=(20, 32)) - 4, metadatas=[{"kind": "far"}] * 20)
    found = index.search(np.full((2, 32), 1.0), k=20, where={"kind": "far"})
    assert [len(answer) for answer in found] == [20, 20]
    many = index.search(np.full((1, 32), -1.0), k=150, where={"n": {"$gte": 500}})[0]
    assert len(many) == 150
    assert all(hit.metadata["n"] >= 500 for hit in many)


def test_a_caller_may_change_the_metadata_of_a_hit(filled, vectors):
    one, two = filled.search(vectors[[0, 0]], k=1)
    one[0].metadata["page"] = "changed"
    assert two[0].metadata["page"] == 0


def test_a_search_among_given_ids_is_exact_and_passes_over_unknown_ones(filled, vectors):
    among = [f"id-{i}" for i in range(0, 300, 7)]
    unit = truncate(vectors, 32)
    expected = sorted(among, key=lambda id_: -(unit[int(id_[3:])] @ unit[1]))
    found = filled.search(vectors[1:2], k=5, ids=[*among, "nobody", among[0]])[0]
    assert [hit.id for hit in found] == expected[:5]
    assert len(filled.search(vectors[1:2], k=500, ids=among)[0]) == len(among)
    assert {h.id for h in filled.search(vectors[1:2], k=9, ids=among, where={"page": {"$lt": 20}})[0]} == set(among[:3])
    assert {h.id for h in filled.search_mmr(vectors[1:2], k=3, ids=among[:3])[0]} == set(among[:3])
    assert filled.search(vectors[1:2], ids=[])[0] == []


def test_metadata_is_read_without_vectors(filled):
    assert len(filled.metadatas()) == 300
    assert filled.metadatas({"page": {"$lt": 2}}) == {
        "id-0": {"page": 0, "even": True},
        "id-1": {"page": 1, "even": False},
    }


@pytest.fixture
def calls(monkeypatch):
    """Names of the collection's methods, in the order of the calls."""
    made = []
    collection = chromadb.Collection
    for name in ("query", "get", "count", "upsert", "delete"):
        method = getattr(collection, name)
        monkeypatch.setattr(
            collection, name, lambda *a, name=name, method=method, **more: made.append(name) or method(*a, **more)
        )
    return made


def test_in_a_folder_only_a_condition_asks_chroma_and_small_writes_count_nothing(
    tmp_path, vectors, calls, score_all_up_to, conditions_ask_the_graph
):
    index = TwoStageIndex(tmp_path, shortlist_dim=8, rotation="none")
    index.upsert([f"id-{i}" for i in range(300)], vectors, [f"text {i}" for i in range(300)])
    index.search(vectors[:1])
    calls.clear()
    # So few records are searched exhaustively, and nothing has changed since.
    assert index.search(vectors[:1])[0][0].document == "text 0"
    assert calls == []
    score_all_up_to(0)
    index.search(vectors[:1])
    calls.clear()
    assert index.search(vectors[:1])[0][0].document == "text 0"
    assert calls == []
    # How many records meet the condition, and which of them are near.
    settings = {"plan": Plan(dims=(8, 32), sizes=(50,)), "where_document": {"$contains": "text"}}
    assert index.search(vectors[:1], **settings)[0][0].document == "text 0"
    assert calls == ["get", "query"]
    calls.clear()
    index.upsert(["new"], vectors[:1])
    index.upsert(["id-1"], vectors[:1], ["changed"])
    index.upsert(["id-1"], vectors[:1], ["changed"])
    index.delete(["new"])
    assert calls == ["upsert", "upsert", "delete"]


def test_the_repr_of_an_index_shows_place_name_records_and_dimensions(tmp_path, vectors):
    with TwoStageIndex(tmp_path, "mine", shortlist_dim=8) as index:
        assert repr(index) == f"TwoStageIndex('{tmp_path}', 'mine', 0 records)"
        index.upsert([str(row) for row in range(300)], vectors)
        assert repr(index) == f"TwoStageIndex('{tmp_path}', 'mine', 300 records, 8 of 32)"
        index.reindex(rotation="fit")
        assert repr(index) == f"TwoStageIndex('{tmp_path}', 'mine', 300 records, 8 of 32, fitted)"
    assert repr(index) == f"TwoStageIndex('{tmp_path}', 'mine', closed or not readable)"
    assert repr(TwoStageIndex()).startswith("TwoStageIndex(in memory, 'docs'")
