"""The classifier: labels, probabilities as an expectation, weights, more data, bad input."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from sklearn.model_selection import GridSearchCV

from bayes_kfac.errors import ArgumentError
from bayes_kfac.sklearn import BayesianMLPClassifier

METHODS = ["laplace", "noisy"]
X, CODES = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[CODES]


def quick(**options):
    return BayesianMLPClassifier(
        **{"hidden_layer_sizes": (8,), "max_iter": 8, "learning_rate_init": 0.1, "random_state": 0, **options}
    )


@pytest.fixture(scope="module")
def fitted():
    return quick(max_iter=30).fit(X, NAMES)


@pytest.mark.parametrize("method", METHODS)
def test_string_labels_are_learned_and_given_back(method):
    model = quick(method=method, max_iter=20, batch_size=16).fit(X, NAMES)
    assert model.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    assert model.score(X, NAMES) > 0.9
    assert set(model.predict(X)) <= set(NAMES)
    by_codes = quick(method=method, max_iter=20, batch_size=16).fit(X, CODES)
    np.testing.assert_array_equal(model.predict_proba(X), by_codes.predict_proba(X))


def test_two_classes_are_as_any_number(fitted):
    model = quick(max_iter=30).fit(X[:100], CODES[:100] * 2 - 1)
    assert model.classes_.tolist() == [-1, 1]
    assert model.predict_proba(X[:5]).shape == (5, 2)
    assert model.score(X[:100], CODES[:100] * 2 - 1) == 1


def test_probabilities_are_the_expected_softmax_of_the_linearised_logits(fitted):
    """256 fixed points are as good as very many draws, and those of an input do not depend on the others."""
    probs = fitted.predict_proba(X)
    with torch.no_grad():
        output = fitted.posterior_.output(fitted._inputs(X))
        draws = output.sample(20_000, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(probs, draws.softmax(-1).mean(0), atol=0.01)
    np.testing.assert_allclose(probs.sum(1), 1)
    np.testing.assert_allclose(fitted.predict_log_proba(X), np.log(probs))
    np.testing.assert_array_equal(fitted.predict(X), fitted.classes_[probs.argmax(1)])
    np.testing.assert_allclose(np.concatenate([fitted.predict_proba(X[:1]), fitted.predict_proba(X[1:])]), probs)


def test_the_distribution_tells_noise_from_ignorance(fitted):
    inside, outside = (fitted.predict_distribution(inputs) for inputs in (X, X + 30))
    for prediction in (inside, outside):
        torch.testing.assert_close(prediction.entropy, prediction.expected_entropy + prediction.mutual_information)
    assert outside.mutual_information.mean() > 3 * inside.mutual_information.mean()
    np.testing.assert_allclose(inside.probs, fitted.predict_proba(X))
    indices = torch.as_tensor(np.searchsorted(fitted.classes_, NAMES))
    expected = np.log(fitted.predict_proba(X)[np.arange(len(X)), indices])
    np.testing.assert_allclose(inside.log_prob(indices), expected, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_whole_weights_are_repeated_examples_to_the_last_bit(method):
    weights = np.random.RandomState(0).randint(0, 3, len(X))
    weighted = quick(method=method, early_stopping=True).fit(X, NAMES, weights)
    repeated = quick(method=method, early_stopping=True).fit(np.repeat(X, weights, axis=0), np.repeat(NAMES, weights))
    np.testing.assert_array_equal(weighted.predict_proba(X), repeated.predict_proba(X))


def test_more_data_by_partial_fit_leave_what_was_known():
    """The second call has no example of one class, which is known as before; what both have is known better."""
    model = quick(max_iter=60)
    model.partial_fit(X[::10], NAMES[::10], classes=np.unique(NAMES))
    before = model.predict_distribution(X).mutual_information
    model.partial_fit(X[51::2], NAMES[51::2])
    assert model.total_weight_ == 15 + 50
    assert model.score(X[:50], NAMES[:50]) > 0.95
    assert model.score(X, NAMES) > 0.9
    assert model.predict_distribution(X).mutual_information[50:].mean() < before[50:].mean()


def test_a_pickle_predicts_the_same_to_the_last_bit(fitted):
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(X), fitted.predict_proba(X))


def test_the_tuned_prior_of_a_long_noisy_training_does_not_fade():
    """Without extrinsic damping these 2400 steps end with a precision of 0.13, and 87 % right."""
    images, digits = load_digits(return_X_y=True)
    model = BayesianMLPClassifier(method="noisy", max_iter=200, batch_size=50, random_state=0)
    model.fit(images[:600], digits[:600])
    assert min(model.posterior_.prior_precision.values()) > 1
    assert model.score(images[600:], digits[600:]) > 0.91


def test_searches_and_frames():
    frame = pd.DataFrame(X, columns=list("abcd"))
    search = GridSearchCV(quick(), {"temperature": [1.0, 0.3]}, cv=2, scoring="neg_log_loss").fit(frame, NAMES)
    assert search.best_estimator_.feature_names_in_.tolist() == list("abcd")


def test_calls_that_cannot_be(fitted):
    with pytest.raises(ArgumentError, match="one class only"):
        quick().fit(X[:50], NAMES[:50])
    with pytest.raises(ArgumentError, match=r"one class only.*by classes= of the first call"):
        quick().partial_fit(X[:50], NAMES[:50])
    with pytest.raises(ArgumentError, match="y holds virginica, which classes="):
        quick().partial_fit(X, NAMES, classes=["setosa", "versicolor"])
    with pytest.raises(ArgumentError, match="not those of the first call"):
        pickle.loads(pickle.dumps(fitted)).partial_fit(X, NAMES, classes=["setosa", "versicolor"])
    with pytest.raises(ValueError, match="continuous"):
        quick().fit(X, X[:, 0])


def test_a_fit_that_fails_leaves_the_classes_before():
    x = np.random.RandomState(0).randn(40, 3)
    classifier = BayesianMLPClassifier(hidden_layer_sizes=(4,), max_iter=3, random_state=0)
    classifier.fit(x, np.where(x[:, 0] > 0, "a", "b"))
    before = classifier.predict(x)
    with pytest.raises(ArgumentError):
        classifier.set_params(structure="nonsense").fit(x, np.where(x[:, 1] > 0, "cat", "dog"))
    assert np.array_equal(classifier.predict(x), before)
    assert classifier.classes_.tolist() == ["a", "b"]
