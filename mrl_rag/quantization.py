"""Full vectors in fewer bytes: float16, int8 with a scale per row, sign bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mrl_rag.truncation import Float32Array

if TYPE_CHECKING:
    from numkong import PackedMatrix

Codes: TypeAlias = npt.NDArray[np.int8]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Packed: TypeAlias = "PackedMatrix"
Precision: TypeAlias = Literal["float16", "int8"]


# From float16 to float32: widened to 32 bits and shifted by 13, the exponent is too low by 112; times 2 ** 112 corrects
# that, also for subnormal numbers. This takes a third of the time of NumPy's own conversion.
_SHIFT, _MASK, _SCALE = 13, np.int32(-0x7000_2000), np.float32(2.0**112)


def row_bytes(precision: Precision, dim: int) -> int:
    """Return the bytes per vector of `dim` numbers."""
    return 2 * dim if precision == "float16" else 4 + dim


def pack_rows(vectors: Float32Array, precision: Precision) -> Bytes:
    """Return uint8 [n, row_bytes] of float32 [n, dim].

    int8: the row's scale, little-endian float32, then round(value / scale); the largest value becomes 127 or -127.
    """
    if precision == "float16":
        return np.ascontiguousarray(vectors, dtype="<f2").view(np.uint8)
    codes, scales = quantize(vectors)
    return np.concatenate([scales.astype("<f4")[:, None].view(np.uint8), codes.view(np.uint8)], axis=1)


def quantize(vectors: Float32Array) -> tuple[Codes, Float32Array]:
    """Return int8 codes [n, dim] and float32 scales [n] whose product approximates float32 [n, dim].

    The largest value of a row becomes 127 or -127; a row of zeros has scale 0.
    """
    scales: Float32Array = np.abs(vectors).max(axis=1, initial=0.0).astype(np.float32) / np.float32(127)
    codes = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    return codes, scales


def unit_codes(vectors: Float32Array) -> Codes:
    """Return unit rows, float32 [n, dim], in eight bits per number: 1.0 becomes 127.

    All vectors have the same scale, so their inner products with a query compare as integers. At 192 dimensions this is
    as good as a scale per row (`benchmarks/README.md`).
    """
    codes: Codes = np.rint(vectors * np.float32(127)).astype(np.int8)
    return codes


def pack(queries: Codes) -> Packed:
    """Return queries, int8 [q, dim], in the order that `inner_products` reads."""
    # It takes a tenth of a second to import.
    import numkong

    return numkong.dots_pack(queries)


def inner_products(codes: Codes, queries: Packed) -> npt.NDArray[np.int32]:
    """Return the exact inner products of vectors, int8 [n, dim], and q packed queries: int32 [n, q].

    NumPy has none for int8. Its product of floats, OpenBLAS's, is shared out to all cores and waits for the last one:
    9 ms instead of 0.4 for 100,000 x 96 where other programs kept the cores busy.
    """
    import numkong

    return np.asarray(numkong.dots_packed(codes, queries))


def rounding_errors(vectors: Float32Array, codes: Codes, scales: Float32Array) -> Float32Array:
    """Return the distance of each vector, float32 [n, dim], from its quantized form: float32 [n]."""
    errors: Float32Array = np.linalg.norm(vectors - codes * scales[:, None], axis=1)
    return errors


def unpack_rows(rows: Bytes, precision: Precision) -> Float32Array:
    """Return float32 [n, dim] from the output of `pack_rows`, uint8 [n, row_bytes], without infinities."""
    if precision == "float16":
        wide = rows.view("<i2").astype(np.int32)
        wide <<= _SHIFT
        wide &= _MASK
        vectors: Float32Array = wide.view(np.float32)
        vectors *= _SCALE
        return vectors
    scales = np.ascontiguousarray(rows[:, :4]).view("<f4")
    vectors = rows[:, 4:].view(np.int8) * scales
    return vectors


def sign_bits(vectors: Float32Array) -> Bytes:
    """Return one bit per number, set where it is positive: uint8 [n, ceil(dim / 8)] from float32 [n, dim]."""
    return np.packbits(vectors > 0, axis=1)


def score_bits(query: Float32Array, bits: Bytes) -> Float32Array:
    """Estimate cosines from sign bits: the query's numbers times +1 or -1.

    Args:
        query: float32 [dim], unit length.
        bits: uint8 [n, ceil(dim / 8)].

    Returns:
        float32 [n].
    """
    signs = np.unpackbits(bits, axis=1, count=len(query)).astype(np.float32)
    # The sum with signs is twice the sum over the positive ones, minus the sum over all.
    estimate: Float32Array = (2 * np.einsum("nd,d->n", signs, query) - query.sum()) / np.float32(len(query) ** 0.5)
    return estimate
