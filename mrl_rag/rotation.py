"""An orthogonal map that is fitted on vectors and puts what matters most into their first numbers: uncentred PCA."""

from __future__ import annotations

import numpy as np

from mrl_rag.truncation import Float32Array, normalize

# Vectors that it is fitted on at most: with more the map hardly changes.
SAMPLE = 20_000


def fit(vectors: Float32Array) -> Float32Array:
    """Fit an uncentred PCA.

    Of all orthogonal maps, its first k coordinates keep the largest share of the vectors' squared length, for every k.

    Args:
        vectors: float array [n, full_dim].

    Returns:
        float32 array [full_dim, full_dim] with orthonormal columns. `vectors @ rotation` has the most important
        coordinates first.
    """
    rows = normalize(vectors).astype(np.float64)
    _, columns = np.linalg.eigh(rows.T @ rows)
    descending = columns[:, ::-1]
    # An eigenvector's sign is arbitrary. It is fixed here, so that the same vectors give the same map.
    peaks = descending[np.abs(descending).argmax(axis=0), np.arange(descending.shape[1])]
    rotation: Float32Array = np.ascontiguousarray(descending * np.sign(peaks), dtype=np.float32)
    return rotation


def explained_energy(vectors: Float32Array, rotation: Float32Array, dim: int) -> float:
    """Return the mean share of a vector's squared length that the first `dim` rotated coordinates keep, 0 to 1.

    Args:
        vectors: float32 [n, full_dim].
        rotation: float32 [full_dim, full_dim].
        dim: 1 <= dim <= full_dim.
    """
    rotated = normalize(vectors) @ rotation
    return float(np.mean(np.sum(rotated**2 * (np.arange(rotated.shape[1]) < dim), axis=1)))
