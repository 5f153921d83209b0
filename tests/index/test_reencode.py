"""The model of an index changes while it answers: nothing is encoded twice, nothing is lost, and readers notice."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import chromadb
import numpy as np
import pytest

from mrl_rag import TwoStageIndex
from mrl_rag.errors import IndexMismatch, IndexNotWritable, InvalidDimension, InvalidTexts, InvalidVectors
from mrl_rag.testing import DeterministicEncoder

OLD, NEW = DeterministicEncoder(32), DeterministicEncoder(48)
IDS = [f"id-{number}" for number in range(280)]
TEXTS = [f"text {number} of chapter {number % 9}" for number in range(280)]
ELSEWHERE = """
from mrl_rag import TwoStageIndex
from mrl_rag.testing import DeterministicEncoder
OLD, NEW = DeterministicEncoder(32), DeterministicEncoder(48)
"""


class Counting:
    """Encodes, and remembers what; fails after so many texts."""

    def __init__(self, encoder=NEW, limit=None):
        self.encoder = encoder
        self.limit = limit
        self.given = []

    def __call__(self, texts):
        if self.limit is not None and len(self.given) + len(texts) > self.limit:
            raise KeyboardInterrupt
        self.given += texts
        return self.encoder.encode_documents(texts)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr("mrl_rag.index.reencode._BATCH", 40)


@pytest.fixture
def elsewhere(other_process):
    """Run code in another process, and return its `answer`, or the name of its error."""

    def run(code):
        answer, error = other_process(code)
        return answer if error is None else error[0]

    assert run(ELSEWHERE) is None
    return run


def fill(index, count=280):
    metadatas = [{"z": number, "a": "x", "list": [1, 2]} for number in range(count)]
    index.upsert(IDS[:count], OLD.encode_documents(TEXTS[:count]), TEXTS[:count], metadatas)
    return index


def everything(index):
    return [(record.id, record.document, list(record.metadata.items())) for record in index.get(vectors=False)]


def nearest(index, text, encoder=NEW):
    return index.search(encoder.encode_queries([text]), k=1)[0][0].document


def test_every_record_is_there_with_a_vector_of_the_new_model(open_index):
    index = fill(open_index(model="old", fingerprint="1"))
    before = everything(index)
    kept = index.reencode(Counting(), "new", "2")
    assert everything(index) == before
    assert (index.full_dim, index.model, index.fingerprint) == (48, "new", "2")
    vectors = np.stack([record.vector for record in index.get(IDS)])
    np.testing.assert_allclose(vectors, NEW.encode_documents(TEXTS), atol=1e-3)
    assert nearest(index, TEXTS[5]) == TEXTS[5]
    assert index.verify().ok
    again = open_index(fingerprint="2")
    assert (again.model, nearest(again, TEXTS[7])) == ("new", TEXTS[7])
    with pytest.raises(IndexMismatch):
        open_index(fingerprint="1")
    index.upsert(["more"], NEW.encode_documents(["more"]), ["more"])
    assert nearest(again, "more") == "more"
    assert index.kept() == [kept]


def test_the_old_collection_is_kept_until_it_is_dropped(tmp_path):
    index = fill(TwoStageIndex(tmp_path, model="old", fingerprint="1"), 200)
    before = everything(index)
    kept = index.reencode(Counting(), "new", "2")
    assert TwoStageIndex.names(tmp_path) == ["docs"]
    assert index.info().kept == (kept,)
    with TwoStageIndex(tmp_path, kept) as old:
        assert (old.model, everything(old), nearest(old, TEXTS[5], OLD)) == ("old", before, TEXTS[5])
    assert index.repair().ok
    assert index.kept() == [kept]
    assert index.drop_old() == [kept]
    assert (index.kept(), index.drop_old()) == ([], [])
    assert everything(index) == before
    assert len(list(tmp_path.glob("archive-*.lmdb"))) == 1
    assert index.reencode(Counting(OLD), "old", "1", drop_old=True) is None
    assert (nearest(index, TEXTS[5], OLD), index.kept()) == (TEXTS[5], [])
    index.close()


def test_an_interrupted_call_goes_on_and_encodes_nothing_twice(open_index):
    index = fill(open_index(model="old", fingerprint="1"))
    first = Counting(limit=130)
    with pytest.raises(KeyboardInterrupt):
        index.reencode(first, "new", "2")
    assert (len(first.given), index.model, nearest(index, TEXTS[5], OLD)) == (120, "old", TEXTS[5])
    # It is no leftover, and can be seen.
    assert index.repair().ok
    assert len(index.info().unfinished) == 1
    # Meanwhile a record is changed, one only in its metadata, one added and one deleted.
    index.upsert([IDS[3], "new"], OLD.encode_documents(["changed", "added"]), ["changed", "added"])
    index.upsert([IDS[5]], OLD.encode_documents([TEXTS[5]]), [TEXTS[5]], [{"only": "this"}])
    index.delete([IDS[4]])
    before = everything(index)
    second = Counting()
    index.reencode(second, "new", "2")
    assert sorted(second.given) == sorted([*TEXTS[120:], "changed", "added"])
    assert everything(index) == before
    assert index.info().unfinished == ()
    assert index.verify().ok


@pytest.mark.parametrize("same", [True, False])
def test_without_a_fingerprint_an_interrupted_call_goes_on_only_with_the_same_model(tmp_path, same):
    index = fill(TwoStageIndex(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        index.reencode(Counting(limit=130))
    second = Counting(NEW if same else DeterministicEncoder(40))
    index.reencode(second)
    # One text is encoded again to see whether the model is the same.
    assert len(second.given) == (161 if same else 281)
    assert nearest(index, TEXTS[5], second.encoder) == TEXTS[5]
    assert index.verify().ok
    index.close()


def test_threads_search_and_write_meanwhile(tmp_path):
    index = fill(TwoStageIndex(tmp_path, model="old", fingerprint="1"))
    asked = []

    def encode(texts):
        assert nearest(index, TEXTS[240], OLD) == TEXTS[240]
        with ThreadPoolExecutor(1) as pool:
            number = len(asked)
            written = f"while it runs {number}"
            pool.submit(index.upsert, [f"new {number}"], OLD.encode_documents([written]), [written]).result()
            pool.submit(index.delete, [IDS[number]]).result()
        asked.append(texts)
        return NEW.encode_documents(texts)

    def once(texts):
        # Only while the bulk is encoded: what is changed at the end is encoded under the lock.
        return encode(texts) if len(asked) < 5 else NEW.encode_documents(texts)

    index.reencode(once, "new", "2")
    assert len(asked) == 5
    texts = {record.document for record in index.get(vectors=False)}
    assert texts == {*TEXTS[5:], *(f"while it runs {number}" for number in range(5))}
    assert nearest(index, "while it runs 3") == "while it runs 3"
    assert index.verify().ok
    index.close()


def test_other_processes_search_the_old_model_until_the_switch_and_then_refuse(tmp_path, elsewhere):
    fill(TwoStageIndex(tmp_path, model="old", fingerprint="1")).close()
    # A reader that is bound to the old model, one that has only read its name, and one that opens what is there.
    elsewhere(f"bound = TwoStageIndex({str(tmp_path)!r}, fingerprint='1')")
    elsewhere(f"other = TwoStageIndex({str(tmp_path)!r})")
    ask = "answer = {}.search({}.encode_queries(['text 5']), k=1)[0][0].id"
    there = []

    def encode(texts):
        there.append([elsewhere(ask.format(reader, "OLD")) for reader in ("bound", "other")])
        there.append(elsewhere("other.upsert(['x'], OLD.encode_documents(['x']))"))
        return NEW.encode_documents(texts)

    with TwoStageIndex(tmp_path) as index:
        index.reencode(encode, "new", "2")
        assert there[::2] == [["id-5", "id-5"]] * 7
        assert set(there[1::2]) == {IndexNotWritable.__name__}
        for reader in ("bound", "other"):
            assert elsewhere(ask.format(reader, "OLD")) == "IndexMismatch"
            assert elsewhere(ask.format(reader, "OLD")) == "IndexMismatch"
            assert elsewhere(f"answer = len({reader})") == "IndexMismatch"
        elsewhere(f"again = TwoStageIndex({str(tmp_path)!r})")
        assert elsewhere(ask.format("again", "NEW")) == "id-5"


def test_a_server_s_other_clients_follow_within_a_second(chroma_server, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("mrl_rag.index.storage.time.monotonic", lambda: clock[0])
    name = f"docs-{np.random.default_rng().integers(2**60)}"
    index, other = (
        TwoStageIndex(collection=name, client=chromadb.HttpClient(port=chroma_server), fingerprint="1")
        for _ in range(2)
    )
    fill(index, 100)
    assert nearest(other, TEXTS[5], OLD) == TEXTS[5]
    index.reencode(Counting(), "new", "2")
    clock[0] += 1
    with pytest.raises(IndexMismatch, match="filled by 'new'"):
        nearest(other, TEXTS[5], OLD)


def test_records_without_a_document_are_named_before_anything_is_encoded(tmp_path):
    index = fill(TwoStageIndex(tmp_path, fingerprint="1"), 200)
    index.upsert([f"bare {n}" for n in range(7)], np.random.default_rng(0).normal(size=(7, 32)))
    encode = Counting()
    with pytest.raises(InvalidTexts, match=r"7 records .*'bare 0', .*'bare 4', \.\.\.\..* delete them"):
        index.reencode(encode, "new", "2")
    assert (encode.given, index.info().unfinished, index.model) == ([], (), None)
    index.close()


@pytest.mark.parametrize(
    ("error", "encode", "shortlist_dim"),
    [
        (InvalidVectors, lambda texts: NEW.encode_documents(texts)[1:], None),
        (InvalidVectors, lambda texts: np.full((len(texts), 8), np.nan), None),
        (InvalidDimension, NEW.encode_documents, 49),
        (InvalidDimension, NEW.encode_documents, 0),
    ],
)
def test_what_the_encoder_gives_wrongly_leaves_the_index_as_it_was(error, encode, shortlist_dim):
    with TwoStageIndex(fingerprint="1") as index:
        fill(index, 200)
        with pytest.raises(error):
            index.reencode(encode, "new", "2", shortlist_dim=shortlist_dim)
        assert (nearest(index, TEXTS[5], OLD), index.fingerprint) == (TEXTS[5], "1")
        index.reencode(Counting(), "new", "2", shortlist_dim=24)
        assert (nearest(index, TEXTS[5]), index.shortlist_dim) == (TEXTS[5], 24)


def test_an_index_of_that_fingerprint_is_left_as_it_is(tmp_path):
    with TwoStageIndex(tmp_path) as index:
        encode = Counting()
        # Nothing is stored: it takes the model of what will be.
        assert index.reencode(encode, "new", "2") is None
        index.upsert(["a"], NEW.encode_documents(["a"]), ["a"])
        assert index.reencode(encode, "new", "2") is None
        assert (encode.given, index.fingerprint, len(index)) == ([], "2", 1)


def test_an_emptied_index_takes_the_new_model_and_keeps_what_is_kept(tmp_path):
    with TwoStageIndex(tmp_path) as index:
        kept = fill(index, 100).reencode(Counting(), "new", "2")
        index.clear()
        assert index.reencode(Counting(OLD), "old", "1") == kept
        index.upsert(["a"], OLD.encode_documents(["a"]), ["a"])
        assert (index.fingerprint, len(index), nearest(index, "a", OLD)) == ("1", 1, "a")


def test_an_interrupted_call_may_be_given_another_dimension(tmp_path):
    with TwoStageIndex(tmp_path) as index:
        fill(index, 200)
        with pytest.raises(KeyboardInterrupt):
            index.reencode(Counting(limit=120), "new", "2", shortlist_dim=16)
        index.reencode(Counting(), "new", "2", shortlist_dim=24)
        assert (index.shortlist_dim, nearest(index, TEXTS[5]), index.verify().ok) == (24, TEXTS[5], True)


def test_precision_rotation_and_the_graph_s_settings_are_kept(tmp_path):
    with TwoStageIndex(tmp_path, precision="int8", rotation="none", recall=0.9) as index:
        fill(index, 200).reindex(hnsw={"max_neighbors": 24})
        index.reencode(Counting(), "new", "2")
        config = index._session.open().stores.config
        assert (config.precision, config.rotation, config.target_recall) == ("int8", "none", 0.9)
        assert index._session.open().stores.shortlist.hnsw["max_neighbors"] == 24


def test_a_large_index_fits_its_rotation_on_the_new_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr("mrl_rag.index.search._EXACT_RECORDS", 150)
    with TwoStageIndex(tmp_path) as index:
        index.upsert(IDS, DeterministicEncoder(80).encode_documents(TEXTS), TEXTS)
        assert index.rotation == "fit"
        index.reencode(Counting(DeterministicEncoder(96)), "new", "2")
        assert (index.rotation, index.recall is not None) == ("fit", True)
        assert index.verify().ok


def test_dropping_an_index_drops_what_a_reencoding_left(tmp_path):
    with TwoStageIndex(tmp_path) as index:
        fill(index, 200).reencode(Counting(), "new", "2")
        with pytest.raises(KeyboardInterrupt):
            index.reencode(Counting(OLD, limit=120), "old", "3")
        index.drop()
        assert index.client.list_collections() == []
        assert not list(tmp_path.glob("archive-*"))


@pytest.mark.parametrize(("step", "dropped"), [(2, False), (3, False), (3, True)])
def test_a_crash_while_the_new_collection_fits_its_rotation(tmp_path, monkeypatch, step, dropped):
    monkeypatch.setattr("mrl_rag.index.search._EXACT_RECORDS", 150)
    new = DeterministicEncoder(80)
    index = fill(TwoStageIndex(tmp_path, model="old", fingerprint="1"))
    shortlist = type(index._session.open().stores.shortlist)
    replace, modify, calls = shortlist.replace, chromadb.Collection.modify, []

    def interrupted(self, *given, **named):
        if calls:
            calls.append(1)
            if len(calls) == step + 1:
                raise KeyboardInterrupt
        return modify(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(shortlist, "replace", lambda *given: (calls.append(1), replace(*given)))
        patch.setattr(chromadb.Collection, "modify", interrupted)
        first = Counting(new)
        with pytest.raises(KeyboardInterrupt):
            index.reencode(first, "new", "2")
    index.close()
    with TwoStageIndex(tmp_path) as again:
        assert (again.model, nearest(again, TEXTS[5], OLD), again.repair().ok) == ("old", TEXTS[5], True)
        assert len(again.info().unfinished) == 1
        if dropped:
            assert len(again.drop_old(unfinished=True)) == 1
            assert [c.name for c in again.client.list_collections()] == ["docs"]
            return
        second = Counting(new)
        again.reencode(second, "new", "2")
        assert len(first.given) + len(second.given) == 280
        assert (again.rotation, nearest(again, TEXTS[5], new), again.verify().ok) == ("fit", TEXTS[5], True)
        assert sorted(c.name for c in again.client.list_collections()) == ["docs", *again.kept()]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_crash_between_the_renamings_leaves_one_of_the_two(tmp_path, monkeypatch, step):
    index = fill(TwoStageIndex(tmp_path, model="old", fingerprint="1"), 200)
    modify, calls = chromadb.Collection.modify, []
    switching = []

    def interrupted(self, *given, **named):
        if switching:
            calls.append(named)
            if len(calls) == step:
                raise KeyboardInterrupt
        return modify(self, *given, **named)

    shortlist = type(index._session.open().stores.shortlist)
    take = shortlist.take_name_of
    monkeypatch.setattr(shortlist, "take_name_of", lambda *given: (switching.append(1), take(*given)))
    with monkeypatch.context() as patch:
        patch.setattr(chromadb.Collection, "modify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.reencode(Counting(), "new", "2")
    assert TwoStageIndex.names(tmp_path) == ["docs"]
    # The index that was interrupted writes to the one that is found, or not at all.
    with nullcontext() if step <= 2 else pytest.raises(IndexMismatch):
        index.upsert([IDS[0]], OLD.encode_documents(["written"]), ["written"])
    index.close()
    with TwoStageIndex(tmp_path) as again:
        encoder, model = (OLD, "old") if step <= 2 else (NEW, "new")
        assert (again.model, nearest(again, TEXTS[5], encoder), again.repair().ok) == (model, TEXTS[5], True)
        encode = Counting()
        again.reencode(encode, "new", "2")
        assert encode.given == (["written"] if step <= 2 else [])
        assert (nearest(again, TEXTS[5]), len(again.kept())) == (TEXTS[5], 1)
        assert again.get([IDS[0]])[0].document == ("written" if step <= 2 else TEXTS[0])
        assert again.verify().ok
