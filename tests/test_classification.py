"""Adaptive classification: the answer of full dimension, by fewer numbers where these are sure."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from mrl_rag import truncate
from mrl_rag.classification import AdaptiveClassifier
from mrl_rag.errors import InvalidDimension, InvalidInput

CLASSES = 40


def blobs(seed, per_class, noise=0.7):
    """Unit vectors of 96 numbers around 40 centres, of which no number means more than another."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, 96))
    labels = np.repeat(np.arange(CLASSES), per_class)
    vectors = centres[labels] + noise * 4 * np.random.default_rng(seed).normal(size=(len(labels), 96))
    return truncate(vectors, 96), labels


@pytest.fixture(scope="module")
def fitted():
    return AdaptiveClassifier().fit(*blobs(1, 20))


# The checks' vectors have few numbers: with the default dimensions there would be one stage.
@parametrize_with_checks([AdaptiveClassifier(dims=[1])])
def test_it_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def test_it_is_as_accurate_as_all_numbers_by_a_fraction_of_them(fitted):
    vectors, labels = blobs(2, 20)
    full = LogisticRegression(C=10, max_iter=1000).fit(*blobs(1, 20))
    assert fitted.score(vectors, labels) > full.score(vectors, labels) - 0.02
    used = fitted.dims_used(vectors)
    assert used.mean() < 0.4 * 96
    assert used.mean() == pytest.approx(fitted.expected_dim_, rel=0.2)
    assert set(used) <= set(fitted.dims_) == {16, 32, 39}


def test_the_last_dimension_gives_the_answer_of_full_dimension(fitted):
    """Of 40 classes, 39 rotated numbers hold all that the classifier of 96 looks at."""
    vectors, _ = blobs(2, 2)
    full = fitted.classifiers_[-1]
    kept = fitted.rotation_[:, :39]
    np.testing.assert_allclose(
        full.predict_proba(vectors @ kept @ kept.T), full.predict_proba(vectors), atol=1e-4, rtol=0
    )
    always = AdaptiveClassifier(max_loss=0.0).fit(*blobs(1, 4))
    always.threshold_ = np.inf
    np.testing.assert_array_equal(always.predict_proba(vectors), always.classifiers_[-1].predict_proba(vectors))


def test_the_rotation_keeps_every_cosine(fitted):
    np.testing.assert_allclose(fitted.rotation_.T @ fitted.rotation_, np.eye(96), atol=1e-5)


def test_rotated_vectors_cut_short_are_classified_better_than_plain_ones(fitted):
    vectors, labels = blobs(2, 20)
    plain = AdaptiveClassifier(rotation="none", dims=[16]).fit(*blobs(1, 20))
    assert plain.rotation_ is None
    assert plain.dims_ == (16, 96)
    rotated = fitted.classifiers_[0].score(truncate(vectors @ fitted.rotation_, 16), labels)
    assert rotated > plain.classifiers_[0].score(truncate(vectors, 16), labels) + 0.1


def test_the_curve_ends_at_full_dimension_and_holds_what_predict_does(fitted):
    vectors, labels = blobs(2, 10)
    curve = fitted.curve(vectors, labels)
    dims, accuracies, thresholds = map(list, zip(*curve, strict=True))
    assert dims == sorted(dims)
    assert (dims[0], dims[-1]) == (16, 39)
    assert accuracies[-1] == pytest.approx(fitted.classifiers_[-1].score(vectors, labels))
    place = thresholds.index(fitted.threshold_)
    assert dims[place] == pytest.approx(fitted.dims_used(vectors).mean())
    assert accuracies[place] == pytest.approx(fitted.score(vectors, labels))


def test_five_vectors_per_class_are_enough_to_learn_when_to_stop():
    few = AdaptiveClassifier().fit(*blobs(1, 5))
    vectors, labels = blobs(2, 20)
    assert few.dims_used(vectors).mean() < 0.5 * 96
    assert few.score(vectors, labels) > few.classifiers_[-1].score(vectors, labels) - 0.05


def test_a_class_with_a_single_vector_leaves_every_answer_to_full_dimension():
    vectors, labels = blobs(1, 3)
    alone = AdaptiveClassifier().fit(vectors[2:], labels[2:])
    assert alone.threshold_ == np.inf
    assert set(alone.dims_used(vectors)) == {39}


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(30)))
def test_a_vector_gets_the_same_answer_whatever_its_neighbours(fitted, order):
    vectors = blobs(3, 1)[0][:30]
    np.testing.assert_array_equal(fitted.predict(vectors[order]), fitted.predict(vectors)[order])


def test_the_same_seed_gives_the_same_classifier():
    one, other = (AdaptiveClassifier(random_state=3).fit(*blobs(1, 4)) for _ in range(2))
    assert one.threshold_ == other.threshold_
    np.testing.assert_array_equal(one.rotation_, other.rotation_)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dims": [0]}, InvalidDimension, "dim is 0"),
        ({"dims": [97]}, InvalidDimension, "from 1 to 96"),
        ({"rotation": "pca"}, InvalidInput, "'pca'"),
        ({"max_loss": -0.1}, InvalidInput, "max_loss is -0.1"),
        ({"cv": 1}, InvalidInput, "cv is 1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        AdaptiveClassifier(**arguments).fit(*blobs(1, 2))


def test_one_class_is_refused():
    with pytest.raises(InvalidInput, match="one class"):
        AdaptiveClassifier().fit(np.eye(4), [1, 1, 1, 1])


def test_real_texts_are_classified(minilm):
    texts = {
        "card": ["my card is lost", "where is my card", "the card has not arrived", "block my card please"],
        "rate": ["what is the exchange rate", "which rate do you use", "the rate is wrong", "today's exchange rate"],
        "cash": ["the machine gave me no cash", "cash withdrawal failed", "less cash than asked", "my cash is missing"],
    }
    labels = [label for label, said in texts.items() for _ in said]
    vectors = minilm.encode([text for said in texts.values() for text in said], "classification")
    classifier = AdaptiveClassifier(dims=[1]).fit(vectors, labels)
    asked = minilm.encode(["I can't find my card", "is this the right exchange rate?"], "classification")
    assert classifier.predict(asked).tolist() == ["card", "rate"]
