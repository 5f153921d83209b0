import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mrl_rag import CachedEncoder, TwoStageIndex, TwoStageRetriever
from mrl_rag.errors import (
    DimensionMismatch,
    IndexClosed,
    IndexMismatch,
    InvalidIds,
    InvalidInput,
    InvalidTexts,
    UnknownArgument,
)
from mrl_rag.testing import DeterministicEncoder

TEXTS = ["numpy.pad adds zeros around an array", "a thread pool runs functions", "json reads and writes text"]


class Counting(DeterministicEncoder):
    """An encoder that remembers which documents it was given."""

    def __init__(self, full_dim=384):
        super().__init__(full_dim)
        self.given = []

    def encode_documents(self, texts, dim=None):
        self.given += texts
        return super().encode_documents(texts, dim)


@pytest.fixture
def retriever():
    with TwoStageRetriever(Counting()) as made:
        yield made


def test_a_question_finds_its_text(minilm):
    retriever = TwoStageRetriever(minilm)
    retriever.index_texts(TEXTS, metadatas=[{"page": page} for page in range(3)])
    hit = retriever.search("how do I pad an array with zeros?", k=1)[0]
    assert (hit.document, hit.metadata) == (TEXTS[0], {"page": 0})
    assert retriever.search_many(["threads", "parse json"], k=1)[1][0].document == TEXTS[2]


def test_only_what_changed_is_encoded(retriever):
    ids = retriever.index_texts(TEXTS)
    assert retriever.index_texts(TEXTS) == ids
    assert retriever.encoder.given == TEXTS
    retriever.index_texts(["changed", TEXTS[1]], ids=ids[:2], metadatas=[None, {"new": 1}])
    assert retriever.encoder.given == [*TEXTS, "changed"]
    assert retriever.index.get([ids[1]])[0].metadata == {"new": 1}
    assert [record.document for record in retriever.index.get(ids)] == ["changed", *TEXTS[1:]]


def test_an_interrupted_call_goes_on_from_where_it_stopped(retriever, monkeypatch):
    monkeypatch.setattr("mrl_rag.retriever._BATCH", 1)
    encode = retriever.encoder.encode_documents

    def interrupted(texts, dim):
        if len(retriever.encoder.given) == 2:
            raise KeyboardInterrupt
        return encode(texts, dim)

    retriever.encoder.encode_documents = interrupted
    with pytest.raises(KeyboardInterrupt):
        retriever.index_texts(TEXTS)
    assert len(retriever.index) == 2
    retriever.encoder.encode_documents = encode
    retriever.index_texts(TEXTS)
    assert retriever.encoder.given == TEXTS


def test_the_same_text_without_ids_is_one_record(retriever):
    assert len(set(retriever.index_texts(["a", "a", "b"]))) == 2
    assert len(retriever.index) == 2


def test_nothing_in_nothing_out(retriever):
    assert retriever.index_texts([]) == []
    assert retriever.search("anything") == []
    assert retriever.search_many([]) == []


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (InvalidTexts, {"texts": "one string"}),
        (InvalidTexts, {"texts": ["a", None]}),
        (InvalidIds, {"texts": ["a", "b"], "ids": ["1"]}),
        (InvalidIds, {"texts": ["a", "b"], "ids": ["1", "1"]}),
        (InvalidIds, {"texts": ["a", "b"], "metadatas": [None]}),
    ],
)
def test_bad_input_is_refused_before_anything_is_encoded(retriever, error, arguments):
    with pytest.raises(error):
        retriever.index_texts(**arguments)
    assert retriever.encoder.given == []


def test_a_bad_metadata_is_named_by_its_place_in_the_whole(retriever, monkeypatch):
    monkeypatch.setattr("mrl_rag.retriever._BATCH", 1)
    with pytest.raises(InvalidInput, match=r"metadatas\[2\].*\$schema"):
        retriever.index_texts(TEXTS, metadatas=[None, None, {"$schema": 1}])
    assert retriever.encoder.given == []


def test_an_index_filled_through_a_retriever_knows_its_model(tmp_path, minilm):
    with TwoStageRetriever(CachedEncoder(minilm, tmp_path / "vectors.sqlite3"), tmp_path / "db") as retriever:
        retriever.index_texts(TEXTS)
    with TwoStageIndex(tmp_path / "db") as index:
        assert (index.model, index.fingerprint) == ("minilm", minilm.fingerprint)
        assert index.collection().metadata["mrl_rag:model"] == "minilm"


def test_an_index_that_was_opened_without_a_name_gets_it_with_its_first_texts(tmp_path):
    with TwoStageIndex(tmp_path) as index:
        index.upsert(["a"], np.ones((1, 32)))
        retriever = TwoStageRetriever(DeterministicEncoder(32), index)
        assert TwoStageIndex(tmp_path).model is None
        retriever.index_texts(TEXTS)
    with TwoStageIndex(tmp_path) as index:
        assert (index.model, index.fingerprint) == ("DeterministicEncoder", "deterministic-32")


class OtherEncoder(DeterministicEncoder):
    """Another model with vectors of the same length."""

    model = "other"

    @property
    def fingerprint(self):
        return "00ff"


def test_another_encoder_than_the_one_that_filled_the_index_is_refused_by_name(tmp_path):
    with TwoStageRetriever(DeterministicEncoder(32), tmp_path, collection="mine") as retriever:
        retriever.index_texts(TEXTS)
    said = r"'mine' was filled by 'DeterministicEncoder' \(fingerprint deterministic-32\); this is 'other' .*00ff"
    for index, collection in ((tmp_path, "mine"), (TwoStageIndex(tmp_path, "mine"), None)):
        with pytest.raises(IndexMismatch, match=said):
            TwoStageRetriever(OtherEncoder(32), index, collection)
    with pytest.raises(IndexMismatch, match="was opened with fingerprint='abc'"):
        TwoStageRetriever(OtherEncoder(32), TwoStageIndex(fingerprint="abc"))
    with pytest.raises(IndexMismatch, match=r"encoder is None.*'DeterministicEncoder', which filled.*Pass the encoder"):
        TwoStageRetriever(None, tmp_path, "mine")
    with pytest.raises(IndexMismatch, match="doesn't know which model filled it"):
        TwoStageRetriever(None)


@pytest.mark.usefixtures("default_dtype")
def test_without_an_encoder_the_model_that_filled_the_index_is_used(tmp_path, minilm):
    with TwoStageRetriever(minilm, tmp_path) as retriever:
        retriever.index_texts(TEXTS)
    with TwoStageRetriever(None, tmp_path) as again:
        assert (again.encoder.model, again.search("threads", k=1)[0].document) == ("minilm", TEXTS[1])


@pytest.mark.usefixtures("default_dtype")
def test_the_same_model_with_other_settings_is_another_encoder(tmp_path, minilm):
    with TwoStageIndex(tmp_path, model="minilm", fingerprint="0123") as index:
        index.upsert(["a"], np.ones((1, 384)))
    with pytest.raises(IndexMismatch, match=f"fingerprint {minilm.fingerprint}.* with other files, prompts"):
        TwoStageRetriever(None, tmp_path)


def test_an_index_gets_full_vectors_or_those_of_its_own_full_dimension():
    class Short(DeterministicEncoder):
        dim = 8

    for full_dim, expected in ((None, 32), (16, 16)):
        with TwoStageRetriever(Short(32), TwoStageIndex(full_dim=full_dim)) as retriever:
            retriever.index_texts(TEXTS)
            assert (retriever.index.full_dim, retriever.search("threads", k=1) != []) == (expected, True)
    with pytest.raises(DimensionMismatch, match="full_dim=64, and 'Short' makes vectors of 32"):
        TwoStageRetriever(Short(32), TwoStageIndex(full_dim=64))


def test_repair_encodes_what_chroma_has_added_by_itself(retriever):
    retriever.index_texts(TEXTS)
    retriever.index.collection().add(["new"], np.ones((1, retriever.index.shortlist_dim)), documents=["a new text"])
    assert retriever.index.repair().missing == ["new"]
    assert retriever.repair().ok
    assert retriever.search("a new text", k=1)[0].id == "new"


def test_a_retriever_closes_what_it_opened_and_nothing_else(tmp_path):
    with TwoStageIndex() as index:
        with TwoStageRetriever(DeterministicEncoder(32), index):
            pass
        assert len(index) == 0
    with TwoStageRetriever(DeterministicEncoder(32), tmp_path) as retriever:
        opened = retriever.index
    with pytest.raises(IndexClosed):
        len(opened)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((TwoStageIndex, DeterministicEncoder), "The index is the second argument"),
        ((DeterministicEncoder, DeterministicEncoder), "it must be a TwoStageIndex, a folder, or None"),
        ((DeterministicEncoder, TwoStageIndex, lambda: "docs"), "collection='docs' goes with a folder"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(InvalidInput, match=said):
        TwoStageRetriever(*(make() for make in arguments))


def test_another_librarys_name_of_an_argument_is_answered_with_ours(retriever):
    with pytest.raises(UnknownArgument, match=r"search has no argument filter=; it is where= here"):
        retriever.search("a question", filter={"page": 1})
    with pytest.raises(UnknownArgument, match=r"search_many has no argument top_k=; it is k= here"):
        retriever.search_many(["a question"], top_k=3)


def test_new_metadata_alone_encode_nothing(minilm, monkeypatch):
    with TwoStageRetriever(minilm) as retriever:
        retriever.index_texts(["a thread", "a file"], ids=["a", "b"], metadatas=[{"page": 1}, {"page": 2}])
        before = {record.id: record.vector for record in retriever.index.get()}
        encoded = []
        encode = type(minilm)._encode

        def noting(self, texts, *arguments):
            encoded.extend(texts)
            return encode(self, texts, *arguments)

        monkeypatch.setattr(type(minilm), "_encode", noting)
        retriever.index_texts(["a thread", "a socket"], ids=["a", "b"], metadatas=[{"page": 3}, {"page": 2}])
        assert encoded == ["a socket"]
        after = {record.id: record for record in retriever.index.get()}
        assert after["a"].metadata == {"page": 3}
        np.testing.assert_array_equal(after["a"].vector, before["a"])


class Model(DeterministicEncoder):
    """An encoder with a name, fingerprint and vectors of its own."""

    def __init__(self, model, full_dim):
        super().__init__(full_dim)
        self.model = model
        self.signs = np.random.default_rng([*model.encode()]).choice(np.float32([-1, 1]), full_dim)

    @property
    def fingerprint(self):
        return f"{self.model}-{self.full_dim}"

    def _encode(self, texts, task, dim, advance):
        return super()._encode(texts, task, dim, advance) * self.signs[:dim]


def test_a_changed_model_answers_through_the_same_retriever(tmp_path):
    texts = [f"text {number}" for number in range(60)]
    with TwoStageRetriever(Model("one", 32), tmp_path) as retriever:
        ids = retriever.index_texts(texts, metadatas=[{"n": number} for number in range(60)])
        new = Model("two", 48)
        kept = retriever.reencode(new)
        assert (retriever.encoder, retriever.index.model, retriever.index.kept()) == (new, "two", [kept])
        hit = retriever.search("text 7", k=1)[0]
        assert (hit.document, hit.id, hit.metadata) == ("text 7", ids[7], {"n": 7})
        retriever.index_texts(["more"])
        assert retriever.search("more", k=1)[0].document == "more"
        with pytest.raises(InvalidInput, match="must be an Encoder"):
            retriever.reencode("nomic-v1.5")
    with pytest.raises(IndexMismatch):
        TwoStageRetriever(Model("one", 32), tmp_path)


@pytest.mark.parametrize("full_dim", [32, 48])
def test_threads_get_right_answers_and_store_right_vectors_while_the_model_changes(tmp_path, full_dim):
    texts = [f"text {number}" for number in range(60)]
    with TwoStageRetriever(Model("one", 32), tmp_path) as retriever:
        retriever.index_texts(texts)
        done, asked, stored = threading.Event(), [], []

        def ask():
            while not done.is_set():
                hit = retriever.search("text 7", k=1)[0]
                asked.append((hit.document, round(hit.score, 3)))

        def store():
            while not done.is_set():
                stored.append(f"stored {len(stored)}")
                retriever.index_texts([stored[-1]])

        with ThreadPoolExecutor(3) as pool:
            working = [pool.submit(work) for work in (ask, ask, store)]
            try:
                for turn in range(4):
                    retriever.reencode(Model(f"model {turn}", full_dim if turn % 2 else 32), drop_old=True)
            finally:
                done.set()
            for work in working:
                work.result()
        assert {document for document, _ in asked} == {"text 7"}
        encoder = retriever.encoder
        records = retriever.index.get()
        assert {record.document for record in records} == {*texts, *stored}
        expected = encoder.encode_documents([record.document for record in records])
        np.testing.assert_allclose(np.stack([record.vector for record in records]), expected, atol=1e-3)


@pytest.fixture
def makes_its_encoder(monkeypatch):
    """Let models be made from their names without weights, and remember which were closed."""
    made = []

    def make(name, head=None):
        kind, dim = name.split("-")
        encoder = Model(kind, int(dim))
        encoder.model, encoder.closed = name, []
        encoder.close = lambda: encoder.closed.append(True)
        made.append(encoder)
        return encoder

    monkeypatch.setattr("mrl_rag.retriever.MatryoshkaEncoder", make)
    return make, made


@pytest.mark.parametrize("full_dim", [32, 48])
def test_a_retriever_that_made_its_encoder_follows_another_that_changes_the_model(
    tmp_path, makes_its_encoder, full_dim
):
    make, made = makes_its_encoder
    with TwoStageRetriever(make("one-32"), tmp_path) as retriever, TwoStageRetriever(make("one-32"), tmp_path) as bound:
        retriever.index_texts(TEXTS)
        with TwoStageRetriever(None, tmp_path) as following:
            assert following.search(TEXTS[1], k=1)[0].document == TEXTS[1]
            bound.search(TEXTS[1])
            retriever.reencode(make(f"two-{full_dim}"))
            assert following.search(TEXTS[1], k=1)[0].document == TEXTS[1]
            assert following.encoder.model == f"two-{full_dim}"
            for ask in (bound.search, lambda text: bound.index_texts([text])):
                with pytest.raises(IndexMismatch, match="filled by 'two"):
                    ask(TEXTS[1])
            # Its first one is closed, its second one with it.
            assert [bool(encoder.closed) for encoder in made[2:]] == [True, False, False]
        assert [bool(encoder.closed) for encoder in made[2:]] == [True, False, True]


def test_a_retriever_that_made_its_encoder_stores_vectors_of_the_new_model(tmp_path, makes_its_encoder):
    make, _ = makes_its_encoder
    with TwoStageRetriever(make("one-32"), tmp_path) as retriever:
        retriever.index_texts(TEXTS)
        with TwoStageRetriever(None, tmp_path) as following:
            following.index_texts(["one"])
            retriever.reencode(make("two-32"))
            following.index_texts(["two"])
        expected = make("two-32").encode_documents(["one", "two"])
        stored = {record.document: record.vector for record in retriever.index.get()}
        np.testing.assert_allclose([stored["one"], stored["two"]], expected, atol=1e-3)


@pytest.mark.parametrize("there", [False, True])
def test_without_an_encoder_a_folder_without_an_index_is_named_and_not_made(tmp_path, there):
    folder = tmp_path / "nowhere"
    if there:
        folder.mkdir()
    with pytest.raises(InvalidInput, match=r"nowhere' has no index 'docs'.*nothing is stored there"):
        TwoStageRetriever(None, folder)
    assert folder.exists() == there
    assert not there or not list(folder.iterdir())
    with TwoStageRetriever(DeterministicEncoder(32), tmp_path, "mine") as retriever:
        retriever.index_texts(TEXTS)
    with pytest.raises(InvalidInput, match=r"has no index 'docs'.*it has 'mine'"):
        TwoStageRetriever(None, tmp_path)
