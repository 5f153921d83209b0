"""Whatever the text: unit vectors, and cutting before or after is the same."""

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mrl_rag import MatryoshkaEncoder, truncate
from mrl_rag.errors import InvalidTexts

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def tiny(tiny_bert, default_dtype):
    return MatryoshkaEncoder(tiny_bert, device="cpu")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_text)
@example("")
@example("   \n\t ")
@example("🙂👩‍👩‍👧 family")
@example("\x00\x01\x1f\x7f")
@example("مرحبا بالعالم שלום")
@example("x" * 20_000)
@example("a b " * 5_000)
def test_cutting_commutes_with_encoding_at_every_dimension(tiny, text):
    full = tiny.encode([text])
    for dim in range(1, tiny.full_dim + 1):
        cut = tiny.encode([text], dim=dim)
        np.testing.assert_allclose(cut, truncate(full, dim), atol=1e-6)
        assert np.linalg.norm(cut[0]) == pytest.approx(1, abs=1e-5)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(any_text, min_size=1, max_size=4), st.integers(1, 384))
def test_and_with_real_weights(minilm, texts, dim):
    np.testing.assert_allclose(minilm.encode(texts, dim=dim), truncate(minilm.encode(texts), dim), atol=1e-5)


@given(any_text, st.characters(categories=["Cs"]), any_text)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lone_surrogates_are_refused(tiny, before, surrogate, after):
    with pytest.raises(InvalidTexts, match=r"texts\[1\].*surrogate"):
        tiny.encode(["a", before + surrogate + after])
