import pytest

from mrl_rag import TwoStageIndex, TwoStageRetriever
from mrl_rag.errors import InvalidIds, InvalidInput, InvalidTexts

TEXTS = ["numpy.pad adds zeros around an array", "a thread pool runs functions", "json reads and writes text"]


class Counting:
    """An encoder that remembers what it was given."""

    def __init__(self, encoder):
        self.encoder, self.given = encoder, []
        self.fingerprint, self.encode_queries = encoder.fingerprint, encoder.encode_queries

    def encode_documents(self, texts):
        self.given += texts
        return self.encoder.encode_documents(texts)


@pytest.fixture
def retriever(minilm):
    return TwoStageRetriever(Counting(minilm), TwoStageIndex(fingerprint=minilm.fingerprint))


def test_a_question_finds_its_text(retriever):
    retriever.index_texts(TEXTS, metadatas=[{"page": page} for page in range(3)])
    hit = retriever.search("how do I pad an array with zeros?", k=1)[0]
    assert (hit.document, hit.metadata) == (TEXTS[0], {"page": 0})
    assert retriever.search_many(["threads", "parse json"], k=1)[1][0].document == TEXTS[2]


def test_only_what_changed_is_encoded(retriever):
    ids = retriever.index_texts(TEXTS)
    assert retriever.index_texts(TEXTS) == ids
    assert retriever.encoder.given == TEXTS
    retriever.index_texts(["changed", TEXTS[1]], ids=ids[:2], metadatas=[None, {"new": 1}])
    assert retriever.encoder.given == [*TEXTS, "changed", TEXTS[1]]
    assert [record.document for record in retriever.index.get(ids)] == ["changed", *TEXTS[1:]]


def test_an_interrupted_call_goes_on_from_where_it_stopped(retriever, monkeypatch):
    monkeypatch.setattr("mrl_rag.retriever._BATCH", 1)
    encode = retriever.encoder.encode_documents

    def interrupted(texts):
        if len(retriever.encoder.given) == 2:
            raise KeyboardInterrupt
        return encode(texts)

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
