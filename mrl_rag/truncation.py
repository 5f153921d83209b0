"""Normalisation, layer norm and truncation: the only module that shortens vectors."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mrl_rag.arguments import is_integer
from mrl_rag.errors import InvalidDimension, InvalidVectors

FloatArray: TypeAlias = npt.NDArray[np.floating]
Float32Array: TypeAlias = npt.NDArray[np.float32]


def check_dim(dim: object, full_dim: int) -> int:
    """Return `dim` as an int when it is an integer with 1 <= dim <= full_dim.

    Args:
        dim: the dimension asked for.
        full_dim: length of the full vector.

    Returns:
        `dim` as a plain int.

    Raises:
        InvalidDimension: `dim` is not an integer in range.
    """
    if not is_integer(dim, 1, full_dim):
        raise InvalidDimension(
            f"dim is {dim!r}; it must be an integer from 1 to {full_dim} (the full dimension). "
            f"Pass one in that range, or leave it out for all {full_dim}."
        )
    return int(dim)  # type: ignore[call-overload, no-any-return]


def as_rows(vectors: npt.ArrayLike, name: str = "vectors") -> Float32Array:
    """Return finite float32 rows of shape [n, d].

    Args:
        vectors: array-like of shape [n, d]; an empty list gives shape [0, 0].
        name: name of the argument, for error messages.

    Returns:
        float32 array of shape [n, d], C-contiguous; the input itself where it is such an array.

    Raises:
        InvalidVectors: not numbers, not two-dimensional, or a value is NaN or infinite.
    """
    try:
        rows = np.ascontiguousarray(vectors, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidVectors(f"{name} can't be read as numbers in equal rows: {error}") from error
    if rows.size == 0:
        return rows.reshape(0, rows.shape[-1] if rows.ndim == 2 else 0)
    if rows.ndim != 2:
        raise InvalidVectors(f"{name} has shape {rows.shape}; pass an array of shape [n, d], one vector per row.")
    # The sum of squares is finite only if every number is, and needs no temporary array.
    with np.errstate(all="ignore"):
        squares = np.dot(rows.ravel(), rows.ravel())
    if not np.isfinite(squares):
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            row = int(np.argmin(finite))
            raise InvalidVectors(f"{name}[{row}] holds NaN or infinity; pass finite numbers that fit float32.")
    return rows


def normalize(vectors: npt.ArrayLike) -> Float32Array:
    """Scale each row to length 1.

    Args:
        vectors: float array of shape [n, d], finite.

    Returns:
        float32 array of shape [n, d]; a zero row stays zero.

    Raises:
        InvalidVectors: not two-dimensional, or a value is NaN or infinite.
    """
    return unit_rows(as_rows(vectors))


def unit_rows(rows: Float32Array) -> Float32Array:
    """Scale each row of float32 [n, d], known to be finite, to length 1; a zero row stays zero."""
    if rows.size == 0:
        return rows
    squares = np.einsum("nd,nd->n", rows, rows)
    if squares.min() > 1e-30 and squares.max() < 1e30:
        unit: Float32Array = rows / np.sqrt(squares)[:, None]
        return unit
    # Divided by the largest number first: the squares of very large or small numbers overflow or vanish in float32.
    peak = np.abs(rows).max(axis=1, keepdims=True)
    scaled = (rows / np.where(peak > 0, peak, 1)).astype(np.float64)
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    return (scaled / np.where(length > 0, length, 1)).astype(np.float32)


def layer_norm(vectors: npt.ArrayLike, eps: float = 1e-5) -> Float32Array:
    """Subtract each row's mean and divide by its standard deviation, without learned scale or shift.

    Args:
        vectors: float array of shape [n, d].
        eps: added to the variance; 1e-5 is torch's default.

    Returns:
        float32 array of shape [n, d].

    Raises:
        InvalidVectors: not two-dimensional, or a value is NaN or infinite.
    """
    rows = as_rows(vectors).astype(np.float64)
    if rows.size == 0:
        return rows.astype(np.float32)
    centred = rows - rows.mean(axis=1, keepdims=True)
    variance = np.mean(centred**2, axis=1, keepdims=True)
    normed: Float32Array = (centred / np.sqrt(variance + eps)).astype(np.float32)
    return normed


def truncate(vectors: npt.ArrayLike, dim: int) -> Float32Array:
    """Keep the first `dim` numbers of each row and scale the row to length 1.

    Args:
        vectors: float array of shape [n, full_dim]; rows need not be unit length.
        dim: 1 <= dim <= full_dim.

    Returns:
        float32 array of shape [n, dim] whose rows are unit vectors; a zero row stays zero.

    Raises:
        InvalidDimension: `dim` is not an integer in range.
        InvalidVectors: not two-dimensional, or a value is NaN or infinite.
    """
    rows = as_rows(vectors)
    if rows.shape[0] == 0:
        size = check_dim(dim, rows.shape[1] or np.iinfo(np.int32).max)
        return np.zeros((0, size), dtype=np.float32)
    return unit_rows(rows[:, : check_dim(dim, rows.shape[1])])
