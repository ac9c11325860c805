"""Estimators with several members: each is what it would be alone, and together they are their equal mixture."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError
from bayes_kfac.sklearn import BayesianMLPClassifier, BayesianMLPRegressor

RANDOM = np.random.RandomState(0)
X = RANDOM.randn(40, 2)
Y = np.column_stack([5 + 3 * np.sin(X[:, 0]), X[:, 1]]) + 0.1 * RANDOM.randn(40, 2)
NEW = RANDOM.randn(6, 2)
OPTIONS = {"hidden_layer_sizes": (6,), "max_iter": 6, "random_state": 0}


def regressor(**options):
    return BayesianMLPRegressor(**OPTIONS, **options)


@pytest.fixture(scope="module")
def fitted():
    return regressor(n_members=3).fit(X, Y)


def alone(model, index):
    """The estimator of one of its members."""
    one = clone(model).set_params(n_members=1).fit(X, Y)
    one.posteriors_ = [model.posteriors_[index]]
    return one


@pytest.mark.parametrize("method", ["laplace", "noisy"])
def test_the_first_member_is_the_posterior_of_an_estimator_of_one_and_others_differ(method):
    model, one = (regressor(method=method, n_members=count).fit(X, Y) for count in (2, 1))
    first, second = model.posteriors_
    for name, value in one.posterior_.mean.items():
        assert torch.equal(first.mean[name], value)
        assert not torch.equal(second.mean[name], value)
    assert isinstance(model.posterior_, bk.Mixture)
    assert isinstance(one.posterior_, bk.Posterior)


def test_moments_are_those_of_the_mixture_of_the_members(fitted):
    members = [alone(fitted, index) for index in range(3)]
    means, stds = map(np.stack, zip(*(one.predict(NEW, return_std=True) for one in members), strict=True))
    mean, std = fitted.predict(NEW, return_std=True)
    np.testing.assert_allclose(mean, means.mean(0))
    np.testing.assert_allclose(fitted.predict(NEW), mean)
    np.testing.assert_allclose(std**2, (stds**2).mean(0) + means.var(0))
    covariances = np.stack([one.predict(NEW, return_cov=True)[1] for one in members])
    covariance = fitted.predict(NEW, return_cov=True)[1]
    for output in range(2):
        between = np.cov(means[..., output].T, bias=True)
        np.testing.assert_allclose(covariance[..., output], covariances[..., output].mean(0) + between)
        np.testing.assert_allclose(covariance[..., output].diagonal(), std[:, output] ** 2)


def test_densities_are_averaged(fitted):
    target = torch.as_tensor(fitted.predict(NEW))
    own = torch.stack([alone(fitted, index).predict_distribution(NEW).log_prob(target) for index in range(3)])
    found = fitted.predict_distribution(NEW).log_prob(target)
    torch.testing.assert_close(found, own.exp().mean(0).log())


def test_draws_are_of_all_members_in_any_order(fitted):
    drawn = fitted.sample_y(NEW, 6000, random_state=0)
    assert drawn.shape == (6, 2, 6000)
    mean, covariance = fitted.predict(NEW, return_cov=True)
    for output in range(2):
        scale = np.sqrt(covariance[..., output].diagonal())
        assert np.abs(drawn[:, output].mean(-1) - mean[:, output]).max() < 0.06 * scale.max()
        apart = np.cov(drawn[:, output]) - covariance[..., output]
        assert np.abs(apart / np.outer(scale, scale)).max() < 0.08
    halves = [drawn[..., :3000].mean(-1), drawn[..., 3000:].mean(-1)]  # not one member after another
    assert np.abs(halves[0] - halves[1]).max() < 0.1 * np.sqrt(covariance.max())


def test_fewer_draws_than_members_are_draws_too(fitted):
    drawn = np.concatenate([fitted.sample_y(NEW, random_state=seed) for seed in range(8)], -1)
    assert drawn.shape == (6, 2, 8)
    assert np.isfinite(drawn).all()


def test_more_data_update_every_member():
    pair, one = (regressor(n_members=count).partial_fit(X[:20], Y[:20]) for count in (2, 1))
    before = [posterior.mean["0.weight"] for posterior in pair.posteriors_]
    pair.partial_fit(X[20:], Y[20:])
    one.partial_fit(X[20:], Y[20:])
    assert torch.equal(pair.posteriors_[0].mean["0.weight"], one.posterior_.mean["0.weight"])
    assert all(not torch.equal(old, new.mean["0.weight"]) for old, new in zip(before, pair.posteriors_, strict=True))
    assert pair.total_weight_ == one.total_weight_ == 40


def test_probabilities_are_averaged_and_survive_a_file():
    x, y = load_iris(return_X_y=True)
    model = BayesianMLPClassifier(**OPTIONS, n_members=2, early_stopping=True).fit(x, y)
    members = []
    for posterior in model.posteriors_:
        one = clone(model).set_params(n_members=1).fit(x, y)
        one.posteriors_ = [posterior]
        members.append(one.predict_proba(x))
    np.testing.assert_allclose(model.predict_proba(x), np.mean(members, axis=0), rtol=1e-6)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(x), model.predict_proba(x))
    assert (model.predict_distribution(x).mutual_information > 0).all()


@pytest.mark.parametrize("count", [0, -1, 1.5, "two"])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(ArgumentError, match="n_members="):
        regressor(n_members=count).fit(X, Y)
