"""Pooled predictions against mixtures that are written out: densities, moments, quantiles, entropies. All float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

from bayes_kfac.errors import ArgumentError, TargetError, UsageError
from bayes_kfac.likelihoods import GammaNoise, Gaussian
from bayes_kfac.prediction import (
    BernoulliPrediction,
    CategoricalPrediction,
    DirichletPrediction,
    GaussianOutput,
    GaussianPrediction,
    HeteroscedasticMixturePrediction,
    HeteroscedasticPrediction,
    MeanBernoulliPrediction,
    MeanCategoricalPrediction,
    MixturePrediction,
    PoissonMixturePrediction,
    PoissonPrediction,
    PooledCategorical,
    PooledCounts,
    PooledRegression,
    Prediction,
    Source,
    pool,
)
from bayes_kfac.provenance import Provenance
from tests.helpers import TIGHT, randn, random_spd

PROVENANCE = Provenance("a test", "kron", "factored", "mc", "expand", temperature=1.0, num_data=20)
SOURCE = Source("linearized", None, PROVENANCE)
STUDENT = Gaussian(GammaNoise(5.0, 2.0, (2,))).double().requires_grad_(False)


def output(seed: int, n: int = 5, size: int = 2, *, diagonal: bool = False, scale: float = 1.0) -> GaussianOutput:
    covariance = scale * random_spd(n, size, seed=seed + 100)
    spread = covariance.diagonal(dim1=1, dim2=2) if diagonal else covariance
    return GaussianOutput(randn(n, size, seed=seed), spread)


def noise(seed: int) -> Tensor:
    return torch.tensor([0.3, 0.8], dtype=torch.float64) * (1 + seed)


#: A member of each kind, another one for each seed.
REGRESSION: dict[str, Callable[[int], Prediction]] = {
    "gaussian": lambda seed: GaussianPrediction(output(seed), noise(seed), SOURCE),
    "gaussian-single": lambda seed: GaussianPrediction(output(seed, size=1), noise(seed)[:1], SOURCE),
    "gaussian-diagonal": lambda seed: GaussianPrediction(output(seed, diagonal=True), noise(seed), SOURCE),
    "mixture": lambda seed: MixturePrediction(randn(6, 5, 2, seed=seed), Gaussian(0.5 + seed).double(), SOURCE),
    "student": lambda seed: MixturePrediction(randn(6, 5, 2, seed=seed), STUDENT, SOURCE),
    "heteroscedastic": lambda seed: HeteroscedasticPrediction(output(seed, size=4, scale=0.3), SOURCE),
    "heteroscedastic-single": lambda seed: HeteroscedasticPrediction(output(seed, scale=0.3), SOURCE),
    "heteroscedastic-mixture": lambda seed: HeteroscedasticMixturePrediction(randn(6, 5, 4, seed=seed), SOURCE),
}
COUNTS: dict[str, Callable[[int], Prediction]] = {
    "poisson": lambda seed: PoissonPrediction(output(seed, scale=0.3), SOURCE),
    "poisson-diagonal": lambda seed: PoissonPrediction(output(seed, diagonal=True, scale=0.3), SOURCE),
    "poisson-mixture": lambda seed: PoissonMixturePrediction(randn(6, 5, 2, seed=seed), SOURCE),
}
CLASSES: dict[str, Callable[[int], Prediction]] = {
    "categorical": lambda seed: CategoricalPrediction(randn(6, 5, 3, seed=seed), SOURCE),
    "categorical-positions": lambda seed: CategoricalPrediction(randn(6, 5, 2, 3, seed=seed), SOURCE),
    "bernoulli": lambda seed: BernoulliPrediction(randn(6, 5, 2, seed=seed), SOURCE),
    "mean-categorical": lambda seed: MeanCategoricalPrediction(randn(5, 3, seed=seed), SOURCE),
    "mean-bernoulli": lambda seed: MeanBernoulliPrediction(randn(5, 2, seed=seed), SOURCE),
    "dirichlet": lambda seed: DirichletPrediction(randn(5, 3, seed=seed).exp(), SOURCE),
}
KINDS = REGRESSION | COUNTS | CLASSES
BY_MEANS = {"mean-categorical", "mean-bernoulli"}


def members(name: str, count: int = 3) -> list[Prediction]:
    return [KINDS[name](seed) for seed in range(count)]


def target(name: str, prediction: Prediction) -> Tensor:
    shape = prediction.mean.shape
    if "categorical" in name or name == "dirichlet":
        return torch.arange(shape[:-1].numel()).reshape(shape[:-1]) % 3
    if name in COUNTS:
        return (torch.arange(shape.numel()) % 4).double().reshape(shape)
    return randn(*shape, seed=50) if name in REGRESSION else (torch.arange(shape.numel()) % 2).double().reshape(shape)


# What every kind shares


@pytest.mark.parametrize("name", KINDS)
def test_moments_are_those_of_the_mixture(name: str) -> None:
    """By raw second moments: ``E[y²] − E[y]²``, with the members' own ``E[y²]``."""
    own = members(name)
    pooled = pool(own)
    mean = sum(each.mean for each in own) / 3
    second = sum(each.variance + each.mean**2 for each in own) / 3
    assert_close(pooled.mean, mean, **TIGHT)
    assert_close(pooled.variance, second - mean**2, **TIGHT)
    if name in BY_MEANS:
        assert_close(pooled.variance, mean * (1 - mean), **TIGHT)
        with pytest.raises(UsageError, match="epistemic_variance is unknown"):
            pooled.epistemic_variance  # noqa: B018
        return
    epistemic = sum(each.epistemic_variance + each.mean**2 for each in own) / 3 - mean**2
    assert_close(pooled.epistemic_variance, epistemic, **TIGHT)
    assert_close(pooled.variance, pooled.aleatoric_variance + pooled.epistemic_variance, **TIGHT)


@pytest.mark.parametrize("name", KINDS)
def test_log_prob_is_of_the_mean_density(name: str) -> None:
    own = members(name)
    y = target(name, own[0])
    density = sum(each.log_prob(y).exp() for each in own) / 3
    assert_close(pool(own).log_prob(y), density.log(), **TIGHT)


@pytest.mark.parametrize("name", KINDS)
def test_the_order_of_members_does_not_matter(name: str) -> None:
    own = members(name)
    y, pooled = target(name, own[0]), pool(own)
    for order in itertools.permutations(own):
        other = pool(order)
        assert_close(other.mean, pooled.mean, **TIGHT)
        assert_close(other.variance, pooled.variance, **TIGHT)
        assert_close(other.log_prob(y), pooled.log_prob(y), **TIGHT)


@pytest.mark.parametrize("name", KINDS)
def test_one_member_is_itself(name: str) -> None:
    """The pooled prediction is the member's; so are the formulas, for two that are alike."""
    one = KINDS[name](0)
    assert pool([one]) is one
    twice, y = pool([one, one]), target(name, one)
    assert_close(twice.mean, one.mean, **TIGHT)
    assert_close(twice.variance, one.variance, **TIGHT)
    assert_close(twice.log_prob(y), one.log_prob(y), **TIGHT)
    if name in REGRESSION | COUNTS:
        assert_close(twice.quantile(0.3), one.quantile(0.3), rtol=1e-9, atol=1e-9)
        assert_close(twice.cdf(y), one.cdf(y), **TIGHT)
    if name in REGRESSION:
        assert_close(twice.covariance, one.covariance, **TIGHT)
    if name not in COUNTS and name not in BY_MEANS:
        for quantity in ("entropy", "expected_entropy", "mutual_information"):
            assert_close(getattr(twice, quantity), getattr(one, quantity), **TIGHT)


def test_where_it_came_from() -> None:
    """One method for all, and the provenance of each; of mixtures of mixtures those of all members."""
    other = dataclasses.replace(PROVENANCE, damping="exact")
    one, two = REGRESSION["gaussian"](0), REGRESSION["gaussian"](1)
    two = dataclasses.replace(two, source=dataclasses.replace(SOURCE, posterior=other))
    pooled = pool([one, two])
    assert pooled.source == Source("linearized", None, (PROVENANCE, other))
    assert pool([pooled, pooled]).source.posterior == (PROVENANCE, other) * 2
    assert repr(pooled).startswith("PooledRegression(mean of shape (5, 2), Source(")


# Real values


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 5), size=st.integers(1, 4), seed=st.integers(0, 1000))
def test_the_joint_density_by_explicit_sums(count: int, size: int, seed: int) -> None:
    """``1/M Σ exp(−½ rᵀ Σ⁻¹ r) / √det 2πΣ``, by inverse and determinant; and the covariance by raw moments."""
    variance = torch.full((size,), 0.4, dtype=torch.float64)
    own = [GaussianPrediction(output(seed + 7 * m, 3, size), variance, SOURCE) for m in range(count)]
    y, pooled = randn(3, size, seed=seed), pool(own)
    density, second = torch.zeros(3).double(), torch.zeros(3, size, size).double()
    for each in own:
        covariance = each.output.spread + 0.4 * torch.eye(size, dtype=torch.float64)
        away = y - each.mean
        quadratic = torch.einsum("ni,nij,nj->n", away, torch.linalg.inv(covariance), away)
        density += (-0.5 * quadratic).exp() / torch.linalg.det(2 * math.pi * covariance).sqrt() / count
        second += (covariance + each.mean[:, :, None] * each.mean[:, None, :]) / count
    assert isinstance(pooled, PooledRegression)
    assert_close(pooled.log_prob(y), density.log(), rtol=1e-8, atol=1e-8)
    assert_close(pooled.covariance, second - pooled.mean[:, :, None] * pooled.mean[:, None, :], **TIGHT)
    assert_close(pooled.epistemic_covariance.diagonal(dim1=1, dim2=2), pooled.epistemic_variance, **TIGHT)
    # with one noise for all the information is ½ log det(I + R⁻¹ S), as of every regression
    ratio = torch.eye(size, dtype=torch.float64) + pooled.epistemic_covariance / 0.4
    assert_close(pooled.mutual_information, 0.5 * torch.logdet(ratio), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", REGRESSION)
def test_quantiles_invert_the_distribution_function(name: str) -> None:
    """Which is the mean of the members', and that of the distribution, where torch has one."""
    own = members(name)
    pooled = pool(own)
    for probability in (1e-4, 0.05, 0.5, 0.9):
        quantile = pooled.quantile(probability)
        assert_close(pooled.cdf(quantile), torch.full_like(quantile, probability), rtol=1e-7, atol=1e-9)
        assert_close(pooled.cdf(quantile), sum(each.cdf(quantile) for each in own) / 3, **TIGHT)
    lower, upper = pooled.interval(0.8)
    assert torch.equal(lower, pooled.quantile(0.09999999999999998))
    assert bool((lower < upper).all())
    if name == "gaussian-single":
        assert_close(pooled.distribution.cdf(upper), pooled.cdf(upper), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantiles_of_members_far_apart(dtype: torch.dtype) -> None:
    """Modes of width 0.01 at −1000 and 1000, and one member ten thousand times as wide as the other."""

    def member(mean: float, stddev: float) -> GaussianPrediction:
        value = torch.tensor([[mean]], dtype=dtype)
        return GaussianPrediction(GaussianOutput(value, value.new_full((1, 1, 1), stddev**2)), value[0] * 0, SOURCE)

    apart = pool([member(-1000.0, 0.01), member(1000.0, 0.01)])
    expected = Normal(-1000.0, 0.01).icdf(torch.tensor([[0.5]], dtype=dtype))
    assert_close(apart.quantile(0.25), expected, rtol=1e-6, atol=1e-3)
    wide = pool([member(0.0, 0.01), member(0.0, 100.0)])
    assert_close(wide.cdf(wide.quantile(0.6)), torch.tensor([[0.6]], dtype=dtype), rtol=1e-3, atol=0)


def test_scales_of_infinite_variance_still_have_quantiles() -> None:
    wild = GaussianOutput(torch.zeros(1, 2).double(), 400 * torch.eye(2).double()[None])
    pooled = pool([HeteroscedasticPrediction(wild, SOURCE), HeteroscedasticPrediction(output(0, 1), SOURCE)])
    assert bool(pooled.variance.isinf().all())
    assert_close(pooled.cdf(pooled.quantile(0.7)), torch.tensor([[0.7]], dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_the_entropy_is_a_bound() -> None:
    """Of the integral of ``−p log p`` on a grid, and close to it where members agree; the noises' is exact."""
    own = [GaussianPrediction(output(seed, size=1), noise(seed)[:1], SOURCE) for seed in (0, 1)]
    pooled = pool(own)
    grid = torch.linspace(-30, 30, 20_001).double()
    log_density = torch.stack([pooled.log_prob(value.expand(5, 1)) for value in grid[::20]])
    entropy = -(log_density.exp() * log_density).sum(0) * (grid[20] - grid[0])
    assert bool((pooled.entropy > entropy - 1e-9).all())
    assert_close(pooled.entropy, entropy, rtol=0, atol=0.15)
    noises = torch.stack([0.5 * (2 * math.pi * math.e * noise(seed)[0]).log() for seed in (0, 1)])
    assert_close(pooled.expected_entropy, noises.mean().expand(5), **TIGHT)
    assert_close(pooled.entropy, 0.5 * (2 * math.pi * math.e * pooled.variance[:, 0]).log(), **TIGHT)


def test_gradients_reach_the_inputs() -> None:
    """Through the members' own variances ``m²`` and their means ``m``."""
    x = randn(4, 1, seed=0).requires_grad_()

    def members_at(x: Tensor) -> list[Prediction]:
        means = [x.sin(), (x + 1).sin()]
        return [GaussianPrediction(GaussianOutput(m, m.square()[..., None]), noise(0)[:1], SOURCE) for m in means]

    (found,) = torch.autograd.grad(pool(members_at(x)).epistemic_variance.sum(), x)
    first, second = x.sin(), (x + 1).sin()
    by_hand = (first**2 + second**2) / 2 + (first - second) ** 2 / 4
    assert_close(found, *torch.autograd.grad(by_hand.sum(), x), **TIGHT)


def test_targets_of_another_shape_are_refused() -> None:
    pooled = pool(members("gaussian"))
    for method in (pooled.log_prob, pooled.cdf):
        with pytest.raises(TargetError):
            method(torch.zeros(5, 3).double())
    with pytest.raises(ArgumentError, match=r"probability=1\.5 is out of range"):
        pooled.quantile(1.5)


# Counts


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    """Probabilities add up to the distribution function, and its quantile is the least count that reaches it."""
    pooled = pool(members(name))
    assert isinstance(pooled, PooledCounts)
    assert_close(pooled.aleatoric_variance, pooled.mean, **TIGHT)
    for probability in (0.1, 0.5, 0.95):
        quantile = pooled.quantile(probability)
        assert bool((pooled.cdf(quantile) >= probability).all())
        assert bool((pooled.cdf(quantile - 1) < probability).all())
    single = [PoissonPrediction(output(seed, size=1, scale=0.3), SOURCE) for seed in range(3)]
    pooled, total = pool(single), torch.zeros(5, 1).double()
    for count in range(6):
        y = torch.full((5, 1), float(count)).double()
        total += pooled.log_prob(y).exp()[:, None]
        assert_close(pooled.cdf(y), total, rtol=1e-8, atol=1e-8)


# Classes


@pytest.mark.parametrize("name", sorted(set(CLASSES) - BY_MEANS))
def test_entropies_split(name: str) -> None:
    """That of the mean probabilities, written out; what is not noise is between the members and within them."""
    own = members(name)
    pooled = pool(own)
    probs = sum(each.probs for each in own) / 3
    terms = -probs * probs.log()
    entropy = terms - (1 - probs) * (1 - probs).log() if name == "bernoulli" else terms.sum(-1)
    assert_close(pooled.probs, probs, **TIGHT)
    assert_close(pooled.entropy, entropy, **TIGHT)
    assert_close(pooled.expected_entropy, sum(each.expected_entropy for each in own) / 3, **TIGHT)
    assert_close(pooled.mutual_information, entropy - pooled.expected_entropy, **TIGHT)
    between = entropy - sum(each.entropy for each in own) / 3
    within = sum(each.mutual_information for each in own) / 3
    assert_close(pooled.mutual_information, between + within, **TIGHT)
    assert bool((between >= 0).all())


@pytest.mark.parametrize("name", ["categorical", "categorical-positions", "bernoulli"])
def test_draws_of_all_members(name: str) -> None:
    """One member's after another's: the pooled prediction is that of all draws together."""
    own = members(name)
    pooled, y = pool(own), target(name, own[0])
    together = type(own[0])(torch.cat([each.logits for each in own]), SOURCE)
    for quantity in ("sampled_probs", "probs", "epistemic_variance", "aleatoric_variance", "mutual_information"):
        assert_close(getattr(pooled, quantity), getattr(together, quantity), **TIGHT)
    assert_close(pooled.log_prob(y), together.log_prob(y), **TIGHT)


@pytest.mark.parametrize("name", ["mean-categorical", "mean-bernoulli", "dirichlet"])
def test_what_members_do_not_know_is_unknown(name: str) -> None:
    pooled = pool(members(name))
    assert not hasattr(pooled, "sampled_probs")
    assert bool((pooled.entropy > 0).all())
    if name in BY_MEANS:
        for quantity in ("expected_entropy", "mutual_information", "aleatoric_variance"):
            with pytest.raises(UsageError, match=f"{quantity.replace('mutual_information', 'expected_entropy')} is un"):
                getattr(pooled, quantity)


# What is refused


def test_what_cannot_be_pooled() -> None:
    one = CLASSES["categorical"](0)
    assert isinstance(pool(iter([one, one])), PooledCategorical)
    with pytest.raises(ArgumentError, match=r"predictions=\[\] is empty"):
        pool([])
    with pytest.raises(ArgumentError, match=r"predictions\[1\] is a BernoulliPrediction and predictions\[0\] a Cat"):
        pool([one, CLASSES["bernoulli"](0)])
    with pytest.raises(ArgumentError, match=r"predictions\[1\].mean has shape \(4, 3\).*\(5, 3\). Allowed: pred"):
        pool([one, CategoricalPrediction(one.logits[:, :4], SOURCE)])
    for change in ({"method": "sampling"}, {"num_samples": 3}, {"link": "mc"}):
        other = dataclasses.replace(one, source=dataclasses.replace(SOURCE, **change))
        with pytest.raises(ArgumentError, match=r"predictions\[1\]\.source=.* differs from predictions\[0\]\.source"):
            pool([one, other])
