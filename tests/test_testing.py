import pickle

import numpy as np
import pytest

from mrl_rag import TwoStageIndex, TwoStageRetriever, truncate
from mrl_rag.errors import InvalidDimension
from mrl_rag.testing import DeterministicEncoder


def test_prefixes_nest():
    encoder = DeterministicEncoder(64)
    full = encoder.encode_documents(["a cat", "a dog", ""])
    np.testing.assert_allclose(encoder.encode_documents(["a cat", "a dog", ""], dim=16), truncate(full, 16), atol=1e-6)
    assert full.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(full, axis=1), 1, rtol=1e-6)


def test_it_is_the_same_in_every_process():
    encoder = DeterministicEncoder(4)
    again = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(encoder.encode(["a cat"]), again.encode(["a cat"]))
    np.testing.assert_allclose(encoder.encode(["a cat"])[0], [-0.859795, -0.505025, 0.005690, -0.075301], atol=1e-6)


def test_shared_words_are_near_and_tasks_differ():
    encoder = DeterministicEncoder()
    cat, cats, sea = encoder.encode(["a cat sleeps", "the cat sleeps now", "waves of an ocean"])
    assert cat @ cats > cat @ sea + 0.2
    assert 0.9 < encoder.encode_queries(["a cat sleeps"])[0] @ cat < 0.9999
    retriever = TwoStageRetriever(encoder, TwoStageIndex(fingerprint=encoder.fingerprint))
    retriever.index_texts(["a cat sleeps", "waves of an ocean"])
    assert retriever.search("ocean waves", k=1)[0].document == "waves of an ocean"


def test_no_texts_and_bad_dimensions():
    assert DeterministicEncoder(8).encode([], dim=4).shape == (0, 4)
    with pytest.raises(InvalidDimension):
        DeterministicEncoder(8).encode(["a"], dim=9)
    with pytest.raises(InvalidDimension):
        DeterministicEncoder(0)
