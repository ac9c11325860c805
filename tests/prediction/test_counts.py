"""Predictions of counts, against sums and integrals that are written out, and draws of the output."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, TargetError
from bayes_kfac.likelihoods import Poisson
from bayes_kfac.prediction import (
    GaussianOutput,
    PoissonMixturePrediction,
    PoissonPrediction,
    Source,
    from_gaussian,
    from_outputs,
)
from bayes_kfac.prediction.poisson_lognormal import PoissonLogNormal, marginal_cdf
from bayes_kfac.provenance import Provenance
from tests.helpers import TIGHT, randn, random_spd, rng, seeded

PROVENANCE = Provenance("a test", "kron", "factored", "mc", "expand", temperature=1.0, num_data=20)
CLOSED, SAMPLED = Source("linearized", None, PROVENANCE), Source("sampling", 7, PROVENANCE)
EVENTS = [(), (1,), (3,), (2, 2)]


def double(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def linearized(*event: int, level: float = 1.0, scale: float = 0.3, diagonal: bool = False) -> PoissonPrediction:
    covariance = scale * random_spd(5, math.prod(event), seed=1)
    spread = covariance.diagonal(dim1=-2, dim2=-1).clone() if diagonal else covariance
    return PoissonPrediction(GaussianOutput(level + 0.7 * randn(5, *event, seed=0), spread), CLOSED)


def sampled(*event: int) -> PoissonMixturePrediction:
    return PoissonMixturePrediction(1.0 + randn(7, 5, *event, seed=0), SAMPLED)


def many(prediction: PoissonPrediction, count: int = 200_000) -> PoissonMixturePrediction:
    return PoissonMixturePrediction(prediction.output.sample(count, rng(3)), SAMPLED)


PREDICTIONS: dict[str, Callable[[], PoissonPrediction | PoissonMixturePrediction]] = {
    **{f"linearized-{event}": lambda event=event: linearized(*event) for event in EVENTS},
    **{f"diagonal-{event}": lambda event=event: linearized(*event, diagonal=True) for event in EVENTS},
    **{f"sampled-{event}": lambda event=event: sampled(*event) for event in EVENTS},
}


@pytest.fixture(params=PREDICTIONS.values(), ids=PREDICTIONS.keys())
def prediction(request: pytest.FixtureRequest) -> PoissonPrediction | PoissonMixturePrediction:
    return request.param()


# What holds for both


def test_variance_is_aleatoric_plus_epistemic(prediction) -> None:
    assert torch.equal(prediction.variance, prediction.aleatoric_variance + prediction.epistemic_variance)
    assert torch.equal(prediction.aleatoric_variance, prediction.mean)
    distribution = prediction.distribution
    shape = prediction.mean.shape
    assert_close(distribution.mean.reshape(shape), prediction.mean, **TIGHT)
    assert_close(distribution.variance.reshape(shape), prediction.variance, **TIGHT)


def test_distribution_function_is_the_sum_of_probabilities() -> None:
    """Of one count: what each adds to it, and all to one."""
    for make in (linearized, sampled):
        prediction = make()
        for count in range(0, 60, 3):
            here = torch.full((5,), float(count)).double()
            added = prediction.cdf(here) - prediction.cdf(here - 1)
            assert_close(prediction.log_prob(here).exp(), added, rtol=0.0, atol=1e-9)
        assert_close(prediction.cdf(torch.full((5,), 1e5).double()), torch.ones(5).double(), rtol=0.0, atol=1e-9)
    assert torch.equal(prediction.cdf(double([-0.5] * 5)), torch.zeros(5).double())
    assert torch.equal(prediction.cdf(double([2.9] * 5)), prediction.cdf(double([2.0] * 5)))


def test_quantiles_are_the_least_counts_that_are_enough(prediction) -> None:
    for probability in (0.01, 0.3, 0.5, 0.9, 0.999):
        counts = prediction.quantile(probability)
        assert counts.shape == prediction.mean.shape
        assert torch.equal(counts, counts.round())
        assert (prediction.cdf(counts) >= probability).all()
        assert (prediction.cdf(counts - 1) < probability).all()
    lower, upper = prediction.interval(0.9)
    assert (prediction.cdf(upper) - prediction.cdf(lower - 1) >= 0.9).all()


def test_wrong_input_is_refused(prediction) -> None:
    with pytest.raises(TargetError, match="must hold counts"):
        prediction.log_prob(prediction.mean.round() + 0.5)
    for call in (prediction.log_prob, prediction.cdf):
        with pytest.raises(TargetError, match="must be equal"):
            call(torch.zeros(7, 7).double())
    with pytest.raises(ArgumentError, match=r"level=95"):
        prediction.interval(95)
    with pytest.raises(ArgumentError, match=r"probability=0"):
        prediction.quantile(0)
    with pytest.raises(ArgumentError, match="link='mc' is for class probabilities"):
        from_gaussian(
            Poisson(),
            GaussianOutput(double([[0.0]]), double([[[1.0]]])),
            CLOSED,
            link="mc",
            num_samples=3,
            generator=None,
        )


@pytest.mark.parametrize(("dtype", "log_rate"), [(torch.float32, 20.0), (torch.bfloat16, 8.0), (torch.float64, 40.0)])
@pytest.mark.parametrize("kind", ["linearized", "sampled"])
def test_quantiles_of_rates_whose_counts_the_dtype_cannot_tell_apart(kind, dtype, log_rate) -> None:
    """Neighbouring numbers are further apart than 1 there: the search ends, as near as the dtype goes."""
    mean = torch.full((2, 1), log_rate, dtype=dtype)
    if kind == "sampled":
        prediction = PoissonMixturePrediction(mean.expand(3, 2, 1), SAMPLED)
    else:
        prediction = PoissonPrediction(GaussianOutput(mean, torch.zeros(2, 1, 1, dtype=dtype)), CLOSED)
    lower, upper = prediction.interval(0.9)
    assert lower.dtype == upper.dtype == dtype
    rate, nearly = math.exp(log_rate), max(torch.finfo(dtype).eps, 1e-11)
    for found, level in ((lower, 0.05), (upper, 0.95)):
        expected = rate + stats.norm.ppf(level) * math.sqrt(rate)  # to within a few counts, of thousands or more
        assert_close(found.double(), torch.full((2, 1), expected, dtype=torch.float64), rtol=nearly, atol=0)


# The Poisson-lognormal


def by_hand(mean: float, deviation: float, count: int) -> tuple[float, float]:
    """The log-probability of a count, and of at most so many, by 400 001 nodes."""
    nodes = np.linspace(-12, 12, 400_001)
    log_weights = stats.norm.logpdf(nodes) + math.log(24 / 400_000)
    rates = np.exp(mean + deviation * nodes)
    log_prob = special.logsumexp(stats.poisson.logpmf(count, rates) + log_weights)
    return float(log_prob), float((stats.poisson.cdf(count, rates) * np.exp(log_weights)).sum())


@pytest.mark.parametrize("mean", [-2.0, 1.0, 6.0])
@pytest.mark.parametrize("deviation", [0.0, 1e-4, 0.3, 1.0, 2.0])
def test_probabilities_of_one_count_are_the_integral(mean: float, deviation: float) -> None:
    """From rates of 0.1 to 20 000, certain and uncertain: also where the count says far more than was known."""
    for count in {0, 1, int(math.exp(mean)), int(math.exp(mean + 2 * deviation)) + 3}:
        log_prob, below = by_hand(mean, deviation, count)
        distribution = PoissonLogNormal(double([mean]), double([[deviation]]))
        assert_close(distribution.log_prob(double([float(count)])).item(), log_prob, rtol=1e-10, atol=1e-8)
        found = marginal_cdf(double(mean), double(deviation), double(float(count)))
        assert_close(found.item(), below, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("deviation", [0.1, 3.0, 20.0, 200.0])
def test_nothing_is_as_likely_as_the_distribution_function_says(deviation: float) -> None:
    """However little is known of the rate, and differentiably."""
    mean = torch.linspace(-30, 3, 12, dtype=torch.float64)[:, None].requires_grad_()
    prediction = PoissonPrediction(GaussianOutput(mean, torch.full((12, 1, 1), deviation**2).double()), CLOSED)
    nothing = torch.zeros(12, 1, dtype=torch.float64)
    found = prediction.log_prob(nothing)
    assert_close(found.exp(), prediction.cdf(nothing).squeeze(1), rtol=1e-7, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), mean)
    one = torch.ones(12, 1, dtype=torch.float64)
    # d/dμ of E exp(−exp f) is −E exp(f) exp(−exp f): minus the probability of one
    assert_close(gradient.squeeze(1), -(prediction.log_prob(one) - found).exp(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("level", "event", "nodes"), [(1.0, (2,), 161), (4.0, (2,), 801), (1.0, (3,), 81), (-1.0, (3,), 81)]
)
def test_joint_probability_is_the_integral(level: float, event: tuple[int, ...], nodes: int) -> None:
    """On a grid. Of small counts too, where the integrand's tail is far wider than its peak says.

    Several counts of one example are correlated: their own probabilities alone would miss by far more.
    """
    prediction = linearized(*event, level=level)
    target = prediction.quantile(0.6)
    axis = torch.linspace(-8, 8, nodes, dtype=torch.float64)
    u = torch.cartesian_prod(*[axis] * math.prod(event))
    log_weights = (-0.5 * u.square().sum(1)).log_softmax(0)
    expected = torch.stack(
        [
            (torch.distributions.Poisson((mean + u @ root.mT).exp()).log_prob(counts).sum(1) + log_weights).logsumexp(0)
            for mean, root, counts in zip(
                prediction.output.mean, torch.linalg.cholesky(prediction.output.covariance), target, strict=True
            )
        ]
    )
    assert_close(prediction.log_prob(target), expected, rtol=0.0, atol=2e-3)
    alone = linearized(*event, level=level, diagonal=True).log_prob(target)
    assert (alone - expected).abs().max() > 0.01


def test_large_counts_of_several_targets_are_lognormal() -> None:
    """At rates of e^14 a count is all but its rate, whose joint density is that of a lognormal."""
    covariance = 0.3 * random_spd(1, 3, seed=4)[0]
    mean = double([14.0, 13.5, 14.5])
    counts = (mean + 0.3).exp().round()
    found = PoissonLogNormal(mean, torch.linalg.cholesky(covariance)).log_prob(counts)
    logs = counts.log()
    expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(logs) - logs.sum()
    assert_close(found, expected, rtol=0.0, atol=2e-3)


def test_independent_counts_have_the_product_of_their_probabilities() -> None:
    prediction = linearized(3, diagonal=True)
    target = prediction.mean.round()
    alone = [
        PoissonLogNormal(prediction.output.mean[:, [i]], prediction.output.spread[:, [i], None].sqrt())
        for i in range(3)
    ]
    expected = sum(one.log_prob(target[:, [i]]) for i, one in enumerate(alone))
    assert_close(prediction.log_prob(target), expected, **TIGHT)


@pytest.mark.parametrize("event", EVENTS)
def test_a_certain_output_is_its_likelihood(event: tuple[int, ...]) -> None:
    size = math.prod(event)
    certain = PoissonPrediction(GaussianOutput(randn(4, *event, seed=0), torch.zeros(4, size, size).double()), CLOSED)
    target = torch.poisson(certain.mean, generator=rng(1))
    expected = -Poisson().negative_log_likelihood(certain.output.mean, target)
    assert_close(certain.log_prob(target), expected, rtol=0.0, atol=1e-10 if size == 1 else 0.03)


@pytest.mark.parametrize("event", EVENTS)
def test_moments_are_those_of_draws_of_the_output(event: tuple[int, ...]) -> None:
    prediction = linearized(*event, scale=0.05)
    draws = many(prediction)
    count = len(draws.outputs)
    assert ((draws.mean - prediction.mean).abs() < 5 * (prediction.epistemic_variance / count).sqrt()).all()
    assert_close(draws.epistemic_variance, prediction.epistemic_variance, rtol=0.1, atol=0.0)


def test_samples_have_its_moments() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        distribution = linearized(2).distribution
        samples = distribution.sample((50_000,))
    assert samples.shape == (50_000, 5, 2)
    assert_close(samples.mean(0), distribution.mean, rtol=0.05, atol=0.0)


def test_float32_is_enough() -> None:
    exact = linearized(2, level=6.0)
    single = PoissonPrediction(GaussianOutput(exact.output.mean.float(), exact.output.spread.float()), CLOSED)
    target = exact.mean.round()
    assert single.log_prob(target.float()).dtype == torch.float32
    assert_close(single.log_prob(target.float()).double(), exact.log_prob(target), rtol=1e-4, atol=1e-4)
    assert_close(single.quantile(0.95).double(), exact.quantile(0.95), rtol=1e-3, atol=1.0)


# Draws


@pytest.mark.parametrize("event", EVENTS)
def test_draws_are_a_mixture(event: tuple[int, ...]) -> None:
    prediction = sampled(*event)
    components = stats.poisson(prediction.outputs.exp().numpy())
    target = prediction.mean.round()
    logs = torch.as_tensor(components.logpmf(target.numpy())).reshape(7, 5, -1).sum(2)
    assert_close(prediction.log_prob(target), logs.logsumexp(0) - math.log(7), **TIGHT)
    assert_close(prediction.cdf(target), torch.as_tensor(components.cdf(target.numpy())).mean(0), **TIGHT)
    assert_close(prediction.epistemic_variance, prediction.outputs.exp().var(0, correction=0), **TIGHT)
    assert type(from_outputs(Poisson(), prediction.outputs, SAMPLED)) is type(prediction)


# From a posterior


def test_posteriors_predict_by_each_method_and_differentiably() -> None:
    x = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
    y = torch.poisson((1.5 + torch.sin(3 * x)).exp(), generator=rng(0))
    model = seeded(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
    posterior = bk.Laplace(model, Poisson()).fit([(x, y)], progress=False).posterior()
    closed = posterior.predict(x)
    assert type(closed) is PoissonPrediction
    draws = posterior.sample(4000, generator=rng(0))
    linear = posterior.predict(x, "linearized", draws=draws)
    assert type(linear) is type(posterior.predict(x, "sampling", num_samples=3)) is PoissonMixturePrediction
    median = closed.quantile(0.5)
    assert_close(linear.log_prob(median), closed.log_prob(median), rtol=0.0, atol=0.05)
    point = x[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda inputs: posterior.predict(inputs).log_prob(y[:3]), point)
    assert torch.autograd.gradcheck(lambda inputs: posterior.predict(inputs).variance, point)
