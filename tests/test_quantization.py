import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mrl_rag.quantization import pack_rows, row_bytes, score_bits, sign_bits, unpack_rows
from mrl_rag.truncation import normalize

rows = arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 40)), elements=st.floats(-1, 1, width=32))


@given(rows)
def test_float16_is_numpys_own_conversion(vectors):
    packed = pack_rows(vectors, "float16")
    assert packed.shape == (len(vectors), row_bytes("float16", vectors.shape[1]))
    np.testing.assert_array_equal(unpack_rows(packed, "float16"), vectors.astype(np.float16).astype(np.float32))


@given(rows)
def test_int8_is_off_by_half_a_step_at_most(vectors):
    packed = pack_rows(vectors, "int8")
    assert packed.shape == (len(vectors), row_bytes("int8", vectors.shape[1]))
    step = np.abs(vectors).max(axis=1, keepdims=True, initial=0) / 127
    assert (np.abs(unpack_rows(packed, "int8") - vectors) <= step * 0.501 + 1e-7).all()


@pytest.mark.parametrize("dim", [1, 8, 20, 384])
def test_bits_score_as_plus_and_minus_one_would(dim):
    rng = np.random.default_rng(0)
    vectors, query = normalize(rng.normal(size=(50, dim))), normalize(rng.normal(size=(1, dim)))[0]
    signs = np.where(vectors > 0, 1, -1) / np.sqrt(dim)
    np.testing.assert_allclose(score_bits(query, sign_bits(vectors)), signs @ query, atol=1e-5)
    assert sign_bits(vectors).shape == (50, -(-dim // 8))
