"""`AdaptiveClassifier`: classification by a vector's first numbers, and by more of them only where it is in doubt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mrl_rag.arguments import check_integer
from mrl_rag.errors import InvalidInput
from mrl_rag.extras import require
from mrl_rag.truncation import check_dim, truncate

require("sklearn", extra="classification")

from sklearn.base import BaseEstimator, ClassifierMixin  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import StratifiedKFold  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

# The first dimension tried: fewer numbers left most of banking77's 77 classes to the next one (benchmarks/README.md).
_FIRST_DIM = 16
# Of each linear classifier, at most: scikit-learn's 100 are too few for 77 classes.
_ITERATIONS = 1000
_DTYPES = (np.float64, np.float32)
# What a threshold may be; infinity leaves every answer to the last dimension.
_THRESHOLDS = np.append(np.linspace(0, 1, 101), np.inf)


class AdaptiveClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A linear classifier per dimension, each asked only where the one before it was not sure enough.

    The adaptive classification of the Matryoshka paper (arXiv 2205.13147, section 4.2.1): a vector is classified by its
    first numbers, and by more of them where the highest class probability is under a threshold. Cross-validation on the
    training data finds the threshold that needs the fewest numbers at the accuracy asked for. A scikit-learn estimator.

        AdaptiveClassifier().fit(vectors, labels).predict(queries)
        AdaptiveClassifier(rotation="none")              # plain cuts of Matryoshka vectors
        AdaptiveClassifier(dims=[8, 32, 384])            # these dimensions
        AdaptiveClassifier(max_loss=0.0)                 # as accurate as all numbers, on the validation folds

    The rotation is an orthogonal map whose first columns span what the full-dimension classifier looks at: the right
    singular vectors of its weights. With c classes these are at most c - 1 directions (1 for two classes), so the last
    dimension is c - 1 where vectors are longer than that, and gives the full-dimension classifier's own answer.

    Args:
        dims: the dimensions to try, rising; None for 16, 32, 64, ... The last one is always added.
        rotation: "fit" to rotate vectors first, "none" to cut them as they are.
        max_loss: accuracy that may be lost against full dimension on the validation folds, 0 to 1. On new data the
            loss differs by chance: with n test vectors by some 1 / sqrt(n) of the share of answers that changed.
        C: inverse strength of the linear classifiers' L2 penalty.
        cv: folds of the validation, at most as many as the rarest class has vectors.
        random_state: seed of the folds.

    Attributes:
        classes_: the labels, sorted.
        dims_: the dimensions tried, rising.
        threshold_: the class probability under which the next dimension is asked; infinity, and so always the last one,
            where a class has a single vector and nothing could be validated.
        expected_dim_: mean number of dimensions that the validation folds needed.
        rotation_: float32 [n_features, n_features], orthonormal columns; None without a rotation. `X @ rotation_` are
            Matryoshka vectors for these classes.
        classifiers_: the linear classifiers, one per dimension.
        n_features_in_: length of the vectors.
    """

    def __init__(
        self,
        dims: Sequence[int] | None = None,
        rotation: Literal["fit", "none"] = "fit",
        *,
        max_loss: float = 0.001,
        C: float = 10.0,
        cv: int = 3,
        random_state: int | None = 0,
    ) -> None:
        self.dims = dims
        self.rotation = rotation
        self.max_loss = max_loss
        self.C = C
        self.cv = cv
        self.random_state = random_state

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> AdaptiveClassifier:
        """Fit the classifiers and learn the threshold.

        Args:
            X: float array [n, n_features], vectors of full dimension.
            y: n labels.

        Returns:
            This classifier.

        Raises:
            InvalidInput: an argument of the constructor is wrong (InvalidDimension: a dimension).
            ValueError: `X` or `y` is not what scikit-learn's classifiers take, or there is a single class.
        """
        vectors, answers = validate_data(self, X, y, dtype=_DTYPES, ensure_min_samples=2)
        check_classification_targets(answers)
        self.classes_, labels = np.unique(answers, return_inverse=True)
        if len(self.classes_) == 1:
            raise InvalidInput(f"y has one class, {self.classes_[0]!r}; a classifier needs at least two.")
        self.dims_ = self._choose_dims()
        self._fit_stages(vectors, labels)
        self.threshold_, self.expected_dim_ = self._learn_threshold(vectors, labels)
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the n labels of vectors [n, n_features]."""
        probabilities, _ = self._ask(X)
        labels: npt.NDArray[Any] = self.classes_[probabilities.argmax(axis=1)]
        return labels

    def predict_proba(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return float [n, n_classes], each row by the dimension that was sure enough of it."""
        return self._ask(X)[0]

    def dims_used(self, X: npt.ArrayLike) -> npt.NDArray[np.intp]:
        """Return how many numbers each of n vectors was classified by, int [n]."""
        return np.asarray(self.dims_)[self._ask(X)[1]]

    def curve(self, X: npt.ArrayLike, y: npt.ArrayLike) -> list[tuple[float, float, float]]:
        """Measure every threshold on labelled vectors: what accuracy costs.

        Args:
            X: float array [n, n_features].
            y: n labels.

        Returns:
            (expected dimension, accuracy, threshold) per threshold, rising; the last one, infinity, is full dimension.
        """
        check_is_fitted(self)
        vectors, labels = validate_data(self, X, y, dtype=_DTYPES, reset=False)
        stages = [self._probabilities(stage, vectors) for stage in range(len(self.dims_))]
        confidence = np.stack([found.max(axis=1) for found in stages])
        right = np.stack([self.classes_[found.argmax(axis=1)] == labels for found in stages])
        dims, accuracies = _sweep(self.dims_, confidence, right)
        return list(zip(dims.tolist(), accuracies.tolist(), _THRESHOLDS.tolist(), strict=True))

    def _choose_dims(self) -> tuple[int, ...]:
        if self.rotation not in ("fit", "none"):
            raise InvalidInput(f"rotation is {self.rotation!r}; pass 'fit' or 'none'.")
        if not 0 <= self.max_loss <= 1:
            raise InvalidInput(f"max_loss is {self.max_loss!r}; it must be a share of answers from 0 to 1.")
        check_integer("cv", self.cv, least=2)
        full = int(self.n_features_in_)
        last = min(full, len(self.classes_) - 1) if self.rotation == "fit" else full
        asked = [_FIRST_DIM * 2**power for power in range(full.bit_length())] if self.dims is None else self.dims
        known = [dim if self.dims is None else check_dim(dim, full) for dim in asked]
        return (*sorted({dim for dim in known if dim < last}), last)

    def _fit_stages(self, vectors: npt.NDArray[np.floating], labels: npt.NDArray[np.intp]) -> None:
        """Fit the full-dimension classifier, the rotation from its weights, and the classifiers of cut vectors."""
        full = self._linear().fit(vectors, labels)
        self.rotation_ = _rotation(full.coef_) if self.rotation == "fit" else None
        rotated = vectors if self.rotation_ is None else vectors @ self.rotation_
        cut = [self._linear().fit(truncate(rotated, dim), labels) for dim in self.dims_[:-1]]
        self.classifiers_ = [*cut, full]

    def _linear(self) -> LogisticRegression:
        return LogisticRegression(C=self.C, max_iter=_ITERATIONS)

    def _learn_threshold(self, vectors: npt.NDArray[np.floating], labels: npt.NDArray[np.intp]) -> tuple[float, float]:
        """Return the threshold, and the dimensions it needs, by folds that the classifiers were not fitted on."""
        folds = min(self.cv, int(np.bincount(labels).min()))
        if folds < 2 or len(self.dims_) == 1:
            return np.inf, float(self.dims_[-1])
        confidence = np.zeros((len(self.dims_), len(labels)))
        right = np.zeros(confidence.shape, dtype=bool)
        for train, test in StratifiedKFold(folds, shuffle=True, random_state=self.random_state).split(vectors, labels):
            fold = AdaptiveClassifier(rotation=self.rotation, C=self.C)
            fold.dims_ = self.dims_
            fold._fit_stages(vectors[train], labels[train])
            for stage in range(len(self.dims_)):
                found = fold._probabilities(stage, vectors[test])
                confidence[stage, test] = found.max(axis=1)
                right[stage, test] = found.argmax(axis=1) == labels[test]
        dims, accuracies = _sweep(self.dims_, confidence, right)
        best = int(np.argmin(np.where(accuracies >= accuracies[-1] - self.max_loss, dims, np.inf)))
        return float(_THRESHOLDS[best]), float(dims[best])

    def _probabilities(self, stage: int, vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Return float [n, n_classes] of one stage; the last is the full-dimension classifier, on whole vectors."""
        if stage < len(self.dims_) - 1:
            vectors = truncate(vectors if self.rotation_ is None else vectors @ self.rotation_, self.dims_[stage])
        found: npt.NDArray[np.float64] = self.classifiers_[stage].predict_proba(vectors)
        return found

    def _ask(self, X: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
        """Return the probabilities, [n, n_classes], and the stage that gave them, [n]."""
        check_is_fitted(self)
        vectors = validate_data(self, X, dtype=_DTYPES, reset=False)
        probabilities = np.zeros((len(vectors), len(self.classes_)))
        stages = np.zeros(len(vectors), dtype=np.intp)
        asked = np.arange(len(vectors))
        for stage in range(len(self.dims_)):
            found = self._probabilities(stage, vectors[asked])
            probabilities[asked], stages[asked] = found, stage
            asked = asked[found.max(axis=1) < self.threshold_]
            if not len(asked):
                break
        return probabilities, stages


def _rotation(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return an orthogonal map whose first columns span a linear classifier's weights, the strongest direction first.

    Args:
        weights: float [n_classes, n_features]; [1, n_features] for two classes.

    Returns:
        float32 [n_features, n_features] with orthonormal columns.
    """
    # The classes' mean adds the same to every class, which changes no probability.
    centred = weights - weights.mean(axis=0) if len(weights) > 1 else weights
    _, _, rows = np.linalg.svd(centred, full_matrices=True)
    return np.ascontiguousarray(rows.T, dtype=np.float32)


def _sweep(
    dims: Sequence[int], confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the expected dimension and the accuracy per threshold, given each stage's answers, [stages, n]."""
    used, accuracies = [], []
    for threshold in _THRESHOLDS:
        sure = confidence >= threshold
        sure[-1] = True
        stage = sure.argmax(axis=0)
        used.append(np.asarray(dims)[stage].mean())
        accuracies.append(right[stage, np.arange(right.shape[1])].mean())
    return np.asarray(used), np.asarray(accuracies)
