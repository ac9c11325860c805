"""The torch distributions of pooled predictions: mixtures of one family, flat, with the density that is pooled."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Gumbel, Normal
from torch.testing import assert_close

from bayes_kfac.errors import UsageError
from bayes_kfac.prediction import PooledPrediction, Prediction, Source, pool
from bayes_kfac.prediction.mixtures import equal_mixture
from tests.helpers import TIGHT, randn
from tests.prediction.test_pooled import KINDS, REGRESSION, SOURCE, members, target


@pytest.mark.parametrize("name", KINDS)
def test_the_distribution_is_one_of_torch(name: str) -> None:
    """Over what the members' are over: the same log-probability, and the same mean where torch has one."""
    own = members(name)
    pooled, y = pool(own), target(name, own[0])
    found = pooled.distribution
    assert found.batch_shape == own[0].distribution.batch_shape
    assert found.event_shape == own[0].distribution.event_shape
    log_prob = found.log_prob(y.reshape(found.batch_shape + found.event_shape))
    if name in {"categorical-positions", "bernoulli", "mean-bernoulli"}:  # elements by themselves
        expected = torch.stack([each.distribution.log_prob(y).exp() for each in own]).mean(0)
        assert_close(log_prob.exp(), expected, **TIGHT)
        return
    per_example = log_prob.reshape(len(y), -1).sum(1)
    if name != "poisson-diagonal":  # each count is a mixture by itself there
        assert_close(per_example, pooled.log_prob(y), rtol=1e-8, atol=1e-8)
    if name in REGRESSION:  # of correlated scales it is by quasi-Monte Carlo
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if name == "heteroscedastic" else TIGHT
        assert_close(found.mean.reshape(pooled.mean.shape), pooled.mean, **tolerance)


def test_a_mixture_of_mixtures_is_flat() -> None:
    """Three members of six draws: eighteen components of the same weight."""
    found = pool(members("mixture")).distribution
    assert found.mixture_distribution.probs.shape == (5, 18)
    assert_close(found.mixture_distribution.probs, torch.full((5, 18), 1 / 18, dtype=torch.float64), **TIGHT)


def test_different_families_have_no_common_distribution() -> None:
    """But all else."""
    own = [REGRESSION["mixture"](0), REGRESSION["student"](1)]
    pooled, y = pool(own), randn(5, 2, seed=3)
    with pytest.raises(UsageError, match="distributions are Normal and StudentT: no mixture of one family"):
        pooled.distribution  # noqa: B018
    assert_close(pooled.log_prob(y).exp(), sum(each.log_prob(y).exp() for each in own) / 2, **TIGHT)
    assert_close(pooled.cdf(pooled.quantile(0.2)), torch.full((5, 2), 0.2, dtype=torch.float64), **TIGHT)


@dataclasses.dataclass(frozen=True)
class GumbelPrediction(Prediction):
    """A kind that nothing is known of."""

    loc: Tensor
    source: Source

    @property
    def mean(self) -> Tensor:
        return self.distribution.mean

    @property
    def epistemic_variance(self) -> Tensor:
        return torch.zeros_like(self.loc)

    @property
    def aleatoric_variance(self) -> Tensor:
        return self.distribution.variance

    @property
    def distribution(self) -> Distribution:
        return Gumbel(self.loc, torch.ones_like(self.loc))

    def log_prob(self, target: Tensor) -> Tensor:
        return self.distribution.log_prob(target).sum(-1)


def test_a_kind_of_ones_own() -> None:
    """Mean, variances and density; its family is not known."""
    own = [GumbelPrediction(randn(4, 1, seed=seed), SOURCE) for seed in range(3)]
    pooled, y = pool(own), randn(4, 1, seed=9)
    assert type(pooled) is PooledPrediction
    means = torch.stack([each.mean for each in own])
    assert_close(pooled.variance, means.var(0, correction=0) + math.pi**2 / 6, **TIGHT)
    assert_close(pooled.log_prob(y).exp(), sum(each.log_prob(y).exp() for each in own) / 3, **TIGHT)
    with pytest.raises(UsageError, match="distributions are Gumbel, whose mixture is not known"):
        pooled.distribution  # noqa: B018


def test_an_equal_mixture_of_normals() -> None:
    found = equal_mixture([Normal(torch.zeros(3), torch.ones(3)), Normal(torch.ones(3), 2 * torch.ones(3))])
    assert_close(found.mean, torch.full((3,), 0.5))
    assert_close(found.variance, torch.full((3,), (1 + 4) / 2 + 0.25))
