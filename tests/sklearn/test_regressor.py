"""The regressor: scikit-learn's contract, the closed form where there is one, units, weights, more data, bad input."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError
from bayes_kfac.sklearn import BayesianMLPRegressor
from bayes_kfac.sklearn.base import Scaling

METHODS = ["laplace", "noisy"]


def data(count=60, seed=0):
    random = np.random.RandomState(seed)
    x = random.randn(count, 3) * [1.0, 10.0, 0.1] + [0.0, 5.0, 100.0]
    return x, 200 + 30 * np.sin(x[:, 0]) + 3 * x[:, 1] + 5 * random.randn(count)


X, Y = data()
NEW = data(10, seed=1)[0]


def quick(**options):
    return BayesianMLPRegressor(**{"hidden_layer_sizes": (8,), "max_iter": 5, "random_state": 0, **options})


@pytest.fixture(scope="module")
def fitted():
    return quick().fit(X, Y)


# A network without hidden layers is Bayesian linear regression


def linear_posterior(x, y, noise, precision):
    """Mean and covariance of weights and bias in closed form."""
    a = np.column_stack([x, np.ones(len(x))])
    covariance = np.linalg.inv(a.T @ a / noise**2 + precision * np.eye(a.shape[1]))
    return covariance @ a.T @ y / noise**2, covariance


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("structure", ["dense", "kron"])
def test_without_hidden_layers_it_is_bayesian_linear_regression(structure, temperature):
    """Mean, epistemic variance and noise are those in closed form, whatever the units; one output: kron is exact.

    Below temperature 1 the prior is by as much weaker, the covariance by as much smaller, and the noise what it would
    be at temperature 1 with that prior.
    """
    options = {"prior_precision": 2.0, "temperature": temperature, "max_iter": 250, "learning_rate_init": 0.1}
    model = quick(hidden_layer_sizes=(), structure=structure, **options)
    model.fit(X, Y)
    sx, sy = model.input_scaling_, model.target_scaling_
    a = np.column_stack([sx(X), np.ones(len(X))])
    noise = float(model.posterior_.likelihood.noise_scale)
    mean, covariance = linear_posterior(sx(X), sy(Y[:, None])[:, 0], noise, 2.0 * temperature)
    new = np.column_stack([sx(NEW), np.ones(len(NEW))])
    found, joint = model.predict(NEW, return_cov=True)
    np.testing.assert_allclose(found, new @ mean * sy.scale + sy.location, rtol=1e-4)
    expected = (temperature * new @ covariance @ new.T + noise**2 * np.eye(len(NEW))) * sy.scale**2
    np.testing.assert_allclose(joint, expected, rtol=1e-6, atol=1e-6 * expected.max())
    # the noise's fixed point: residuals over the degrees of freedom that are left
    squares = ((sy(Y[:, None])[:, 0] - a @ mean) ** 2).sum()
    determined = np.trace(a @ covariance @ a.T) / noise**2
    assert noise**2 == pytest.approx(squares / (len(X) - determined), rel=1e-3)


def test_a_tuned_prior_is_where_the_evidence_is_greatest():
    model = quick(hidden_layer_sizes=(), structure="dense", max_iter=250, learning_rate_init=0.1).fit(X, Y)
    inputs, targets = model.input_scaling_(X), model.target_scaling_(Y[:, None])[:, 0]
    a, noise = np.column_stack([inputs, np.ones(len(X))]), float(model.posterior_.likelihood.noise_scale)

    def evidence(precision):
        covariance = a @ a.T / precision + noise**2 * np.eye(len(X))
        return -0.5 * (np.linalg.slogdet(covariance)[1] + targets @ np.linalg.solve(covariance, targets))

    (found,) = model.posterior_.prior_precision.values()
    assert evidence(found) > max(evidence(0.9 * found), evidence(1.1 * found))


def test_more_data_by_partial_fit_is_the_posterior_of_all_data():
    """For a linear model with given noise in proportion, precisions add: the update loses nothing."""
    options = {"hidden_layer_sizes": (), "structure": "dense", "prior_precision": 1.0, "max_iter": 250}
    model = quick(**options, learning_rate_init=0.1)
    model.partial_fit(X[:30], Y[:30])
    first, before = float(model.posterior_.likelihood.noise_scale), model.predict(NEW, return_std=True)[1]
    inputs, targets = model.input_scaling_(X), model.target_scaling_(Y[:, None])[:, 0]
    model.partial_fit(X[30:], Y[30:])
    second = float(model.posterior_.likelihood.noise_scale)
    assert model.total_weight_ == 60
    # rows over the noise they were seen with: the old posterior keeps its precision
    scale = np.repeat([first, second], 30)
    a = np.column_stack([inputs, np.ones(len(X))]) / scale[:, None]
    covariance = np.linalg.inv(a.T @ a + np.eye(4))
    new = np.column_stack([model.input_scaling_(NEW), np.ones(len(NEW))])
    mean = new @ covariance @ a.T @ (targets / scale)
    target = model.target_scaling_
    prediction = model.predict_distribution(NEW)
    np.testing.assert_allclose(prediction.mean[:, 0], mean * target.scale + target.location, rtol=1e-3)
    variance = np.diag(new @ covariance @ new.T) * target.scale**2
    np.testing.assert_allclose(prediction.epistemic_variance[:, 0], variance, rtol=1e-6)
    assert (prediction.epistemic_variance[:, 0].sqrt().numpy() < before).all()


# Units, parts of the variance, draws


@pytest.mark.parametrize("method", METHODS)
def test_units_do_not_matter(method):
    scale, shift = np.array([1e-3, 7.0, 1e5]), np.array([3.0, -1e3, 0.0])
    mean, std = quick(method=method).fit(X, Y).predict(NEW, return_std=True)
    other = quick(method=method).fit(X * scale + shift, 1e4 * Y - 7).predict(NEW * scale + shift, return_std=True)
    np.testing.assert_allclose(other[0], 1e4 * mean - 7, rtol=1e-4)
    np.testing.assert_allclose(other[1], 1e4 * std, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-24, 1e25])
@pytest.mark.parametrize("n_members", [1, 2])
def test_units_are_no_matter_of_the_precision_that_it_computes_in(n_members, scale):
    """Variances of these targets are not in float32's range."""
    model = quick(n_members=n_members, dtype="float32")
    mean, std = model.fit(X, Y).predict(NEW, return_std=True)
    other = model.fit(X, scale * Y)
    np.testing.assert_allclose(other.predict(NEW, return_std=True), (scale * mean, scale * std), rtol=1e-4)
    prediction = other.predict_distribution(NEW)
    np.testing.assert_allclose(prediction.stddev[:, 0], scale * std, rtol=1e-4)
    assert prediction.log_prob(prediction.mean).isfinite().all()


def test_a_mean_far_from_zero_is_the_same_with_standard_deviations_and_without():
    model = quick(dtype="float32").fit(X, 1e9 + Y)
    mean, std = model.predict(NEW, return_std=True)
    np.testing.assert_allclose(mean, model.predict(NEW), rtol=0, atol=1e-3 * std.min())


@pytest.mark.parametrize("columns", [None, 2])
def test_std_covariance_distribution_and_samples_are_of_one_posterior(columns):
    y = Y if columns is None else np.column_stack([Y, X[:, 1] * 50])
    model = quick(max_iter=30).fit(X, y)
    mean, std = model.predict(NEW, return_std=True)
    same, covariance = model.predict(NEW, return_cov=True)
    prediction = model.predict_distribution(NEW)
    trailing = () if columns is None else (columns,)
    assert mean.shape == std.shape == (10, *trailing)
    assert covariance.shape == (10, 10, *trailing)
    np.testing.assert_allclose(mean, same)
    np.testing.assert_allclose(mean, model.predict(NEW))
    diagonal = covariance[np.arange(10), np.arange(10)]
    np.testing.assert_allclose(diagonal, std**2)
    np.testing.assert_allclose(prediction.mean.reshape(mean.shape), mean)
    parts = prediction.epistemic_variance + prediction.aleatoric_variance
    np.testing.assert_allclose(parts.reshape(mean.shape), std**2)
    noise = model.posterior_.likelihood.noise_scale.numpy() * model.target_scaling_.scale
    np.testing.assert_allclose(prediction.aleatoric_variance[0], noise**2)
    draws = model.sample_y(NEW, 20_000, random_state=3)
    assert draws.shape == (10, *trailing, 20_000)
    np.testing.assert_allclose(draws.mean(-1), mean, atol=5 * std.max() / 20_000**0.5)
    for output in range(columns or 1):
        own, joint = (draws, covariance) if columns is None else (draws[:, output], covariance[..., output])
        np.testing.assert_allclose(np.cov(own), joint, atol=0.06 * joint.max())


def test_log_prob_of_the_distribution_is_a_density_in_the_targets_units(fitted):
    prediction = fitted.predict_distribution(NEW)
    mean, std = fitted.predict(NEW, return_std=True)
    target = torch.as_tensor(mean + std)[:, None]
    expected = -0.5 - np.log(std * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(prediction.log_prob(target), expected)


def test_samples_are_those_of_a_seed(fitted):
    np.testing.assert_array_equal(fitted.sample_y(NEW, 3), fitted.sample_y(NEW, 3, random_state=0))
    assert not np.array_equal(fitted.sample_y(NEW, 3), fitted.sample_y(NEW, 3, random_state=1))


def test_constant_columns_and_targets_are_no_division_by_zero():
    x = np.column_stack([X, np.full(len(X), 0.1), np.full(len(X), 1e30)])
    assert np.isfinite(quick().fit(x, Y).predict(x)).all()
    np.testing.assert_allclose(quick().fit(X, np.full(len(X), 7.5)).predict(X), 7.5, atol=0.5)


def test_scaling_is_of_weighted_rows():
    random = np.random.RandomState(0)
    values, weights = random.randn(20, 2), random.randint(1, 5, 20)
    own, repeated = Scaling.of(values, weights), np.repeat(values, weights, axis=0)
    np.testing.assert_allclose(own.location, repeated.mean(0))
    np.testing.assert_allclose(own.scale, repeated.std(0))


# Weights


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("early_stopping", [False, True])
def test_whole_weights_are_repeated_examples_to_the_last_bit(method, early_stopping):
    weights = np.random.RandomState(0).randint(0, 4, len(X))
    options = {"method": method, "early_stopping": early_stopping, "batch_size": 16}
    weighted = quick(**options).fit(X, Y, sample_weight=weights)
    repeated = quick(**options).fit(np.repeat(X, weights, axis=0)[::-1], np.repeat(Y, weights)[::-1])
    for one, other in zip(weighted.predict(NEW, return_std=True), repeated.predict(NEW, return_std=True), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weight", [0.01, 0.5, 3.0])
def test_the_posterior_is_from_as_many_data_as_weights_sum_to(method, weight):
    made = quick(method=method, temperature=0.5).fit(X, Y, np.full(len(X), weight)).posterior_.provenance
    assert made.num_data / made.temperature == pytest.approx(weight * len(X) / 0.5)


def test_weights_that_are_no_whole_numbers_weigh_in_the_curvature():
    """Of a linear model the precision is known: ``Σ w a aᵀ / σ² + δ``."""
    weights = np.random.RandomState(0).uniform(0.1, 2, len(X))
    model = quick(hidden_layer_sizes=(), structure="dense", prior_precision=1.0, max_iter=200).fit(X, Y, weights)
    a = np.column_stack([model.input_scaling_(X), np.ones(len(X))]) * weights[:, None] ** 0.5
    precision = a.T @ a / float(model.posterior_.likelihood.noise_scale) ** 2 + np.eye(4)
    (block,) = model.posterior_.blocks.values()
    np.testing.assert_allclose(block.to_dense(), precision, atol=0.03 * precision.max())


# Early stopping


@pytest.mark.parametrize("method", METHODS)
def test_early_stopping_ends_early_and_goes_back_to_the_best_epoch(method):
    options = {"method": method, "early_stopping": True, "n_iter_no_change": 3, "learning_rate_init": 0.3}
    long = quick(**options, max_iter=60).fit(X, Y)
    scores = long.validation_scores_
    assert len(scores) == long.n_iter_ < 60
    assert scores.index(max(scores)) == long.n_iter_ - 1 - 3
    assert not quick().fit(X, Y).validation_scores_


def test_the_best_epochs_weights_are_restored(monkeypatch):
    from bayes_kfac.sklearn import training

    seen = []

    def score(network, likelihood, held):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return {1: 5.0}.get(len(seen) - 1, 0.0)  # the second epoch is the best

    monkeypatch.setattr(training, "mean_log_likelihood", score)
    for method in METHODS:
        seen.clear()
        model = quick(method=method, early_stopping=True, n_iter_no_change=4, max_iter=10).fit(X, Y)
        assert model.n_iter_ == 6
        for name, value in seen[1].items():
            assert torch.equal(model.posterior_.mean[name], value)


# scikit-learn's tools


def test_a_pickle_predicts_the_same_to_the_last_bit(fitted):
    again = pickle.loads(pickle.dumps(fitted))
    for one, other in zip(again.predict(NEW, return_cov=True), fitted.predict(NEW, return_cov=True), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_random_state_is_all_the_randomness_and_torchs_own_is_left_alone(method):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = quick(method=method).fit(X, Y).predict(NEW)
    torch.manual_seed(1)
    again = quick(method=method).fit(X, Y).predict(NEW)
    np.testing.assert_array_equal(first, again)
    torch.manual_seed(0)
    quick(method=method).fit(X, Y)
    assert torch.equal(torch.get_rng_state(), state)
    assert not np.array_equal(first, quick(method=method, random_state=1).fit(X, Y).predict(NEW))
    clone(quick(structure=bk.structures.get("kron", damping="exact", sharing="expand"))).fit(X, Y)


def test_works_in_pipelines_searches_and_cross_validation():
    pipeline = make_pipeline(StandardScaler(), quick())
    search = GridSearchCV(pipeline, {"bayesianmlpregressor__hidden_layer_sizes": [(), (4, 4)]}, cv=2)
    assert search.fit(X, Y).predict(NEW).shape == (10,)
    assert cross_val_score(quick(max_iter=60, learning_rate_init=0.05), X, Y, cv=2).mean() > 0.5


def test_frames_of_pandas_go_in_and_their_names_are_kept():
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    model = quick().fit(frame, pd.Series(Y))
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(model.predict(frame), quick().fit(X, Y).predict(X))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["c", "b", "a"]])


@pytest.mark.parametrize("structure", ["diagonal", "ekfac", "dense"])
@pytest.mark.parametrize("method", METHODS)
def test_structures_of_the_registry(structure, method):
    assert np.isfinite(quick(structure=structure, method=method, max_iter=3).fit(X, Y).predict(NEW, True)[1]).all()


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "adam"}, "method='adam' is unknown. Allowed: 'laplace', 'noisy'"),
        ({"activation": "swish"}, "activation='swish' is unknown"),
        ({"prior_precision": "tuned"}, "prior_precision='tuned' is unknown. Allowed: 'marginal_likelihood', or"),
        ({"prior_precision": 0.0}, "prior_precision=0.0 is out of range"),
        ({"hidden_layer_sizes": (5, 0)}, "hidden_layer_sizes=0 is not allowed"),
        ({"max_iter": 2.5}, "max_iter=2.5 is not allowed"),
        ({"learning_rate_init": -1}, "learning_rate_init=-1 is out of range"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 is out of range"),
        ({"dtype": "float16"}, "dtype='float16' is unknown"),
        ({"device": "gpu"}, "device='gpu' cannot be used (Expected one of cpu, cuda"),
        ({"device": 3.5}, "device=3.5 cannot be used"),
        ({"structure": "krone"}, "structure='krone' is unknown"),
    ],
)
def test_parameters_that_cannot_be_are_named(options, words):
    with pytest.raises(ArgumentError) as error:
        quick(**options).fit(X, Y)
    assert words in str(error.value)


def test_calls_that_cannot_be(fitted):
    with pytest.raises(NotFittedError):
        quick().predict(X)
    with pytest.raises(ArgumentError, match="cannot both be"):
        fitted.predict(NEW, return_std=True, return_cov=True)
    with pytest.raises(ArgumentError, match=r"sample_weight holds -1\.0"):
        quick().fit(X, Y, -np.ones(len(X)))
    with pytest.raises(ArgumentError, match="zero for every example"):
        quick().fit(X, Y, np.zeros(len(X)))
    with pytest.raises(ArgumentError, match="partial_fit never sees again"):
        quick(early_stopping=True).partial_fit(X, Y)
    with pytest.raises(ArgumentError, match="two different examples"):
        quick(early_stopping=True).fit(np.ones((3, 2)), np.ones(3))
    with pytest.raises(ArgumentError, match=r"y has 2 outputs.*\[examples\]"):
        quick().fit(X, Y).partial_fit(X, np.column_stack([Y, Y]))


def test_an_update_of_a_noisy_regressor_is_that_of_laplace_in_steps_and_their_size():
    x = np.random.default_rng(0).normal(size=(64, 2))
    model = BayesianMLPRegressor((4,), method="noisy", max_iter=2, random_state=0).partial_fit(x, x[:, 0])
    model.set_params(max_iter=None)
    expected = copy.deepcopy(model).set_params(method="laplace").partial_fit(x, x[:, 0])
    model.partial_fit(x, x[:, 0])
    assert model.n_iter_ == 1000  # of one batch each
    for name, value in expected.posterior_.mean.items():
        assert torch.equal(model.posterior_.mean[name], value)


def test_noisy_training_below_temperature_one_keeps_the_noise_of_one():
    """Beside a colder posterior a noise would be learned too small, and the intervals would hold nothing."""
    options = {"method": "noisy", "hidden_layer_sizes": (20,), "max_iter": 60}
    warm, cold = (quick(**options, temperature=temperature).fit(X, Y) for temperature in (1.0, 0.1))
    torch.testing.assert_close(cold.posterior_.likelihood.noise_scale, warm.posterior_.likelihood.noise_scale)
    spread = [own.predict_distribution(NEW).epistemic_variance.mean() for own in (warm, cold)]
    assert spread[1] < spread[0]
    assert cold.n_iter_ == 60


# What fails leaves the fit before as it was


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_that_fails_leaves_the_one_before(method):
    regressor = quick(method=method).fit(X, Y)
    before = regressor.predict(NEW)
    for change, inputs, targets in (
        ({"structure": "nonsense"}, X[:, :2], 1e5 * Y),
        ({"fisher": "nonsense"}, X, np.stack([Y, Y], 1)),
    ):
        good = {name: getattr(regressor, name) for name in change}
        with pytest.raises(ArgumentError):
            regressor.set_params(**change).fit(inputs, targets)
        regressor.set_params(**good)
        assert np.array_equal(regressor.predict(NEW), before)


def test_an_interrupted_fit_leaves_the_one_before(fitted, monkeypatch):
    regressor, before = copy.deepcopy(fitted), fitted.predict(NEW)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(BayesianMLPRegressor, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        regressor.fit(10 * X, 7 * Y)
    with pytest.raises(KeyboardInterrupt):
        regressor.partial_fit(X, Y)
    monkeypatch.undo()
    assert np.array_equal(regressor.predict(NEW), before)
    assert regressor.total_weight_ == fitted.total_weight_
