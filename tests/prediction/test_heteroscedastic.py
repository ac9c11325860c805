"""Predictions with predicted noise, against SciPy's integrals, draws of the output, and the Gaussian of known noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn
from torch.distributions import MixtureSameFamily
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, TargetError
from bayes_kfac.likelihoods import HeteroscedasticGaussian
from bayes_kfac.prediction import (
    GaussianOutput,
    GaussianPrediction,
    HeteroscedasticMixturePrediction,
    HeteroscedasticPrediction,
    Source,
    from_gaussian,
    from_outputs,
)
from bayes_kfac.provenance import Provenance
from tests.helpers import TIGHT, randn, random_spd, rng, seeded

PROVENANCE = Provenance("a test", "kron", "factored", "mc", "expand", temperature=1.0, num_data=20)
CLOSED, SAMPLED = Source("linearized", None, PROVENANCE), Source("sampling", 7, PROVENANCE)
EVENTS = [(1,), (3,), (2, 2)]  # of targets


def output(*event: int, batch: int = 5, scale: float = 0.3, diagonal: bool = False) -> GaussianOutput:
    shape = (*event[:-1], 2 * event[-1])
    covariance = scale * random_spd(batch, math.prod(shape), seed=1)
    spread = covariance.diagonal(dim1=-2, dim2=-1).clone() if diagonal else covariance
    return GaussianOutput(0.7 * randn(batch, *shape, seed=0), spread)


def linearized(*event: int, **options: object) -> HeteroscedasticPrediction:
    return HeteroscedasticPrediction(output(*event, **options), CLOSED)


def sampled(*event: int, draws: int = 7) -> HeteroscedasticMixturePrediction:
    return HeteroscedasticMixturePrediction(randn(draws, 5, *event[:-1], 2 * event[-1], seed=0), SAMPLED)


def many(prediction: HeteroscedasticPrediction, count: int = 200_000) -> HeteroscedasticMixturePrediction:
    """The mixture over draws of a prediction's own output: the Monte Carlo oracle."""
    return HeteroscedasticMixturePrediction(prediction.output.sample(count, rng(3)), SAMPLED)


PREDICTIONS: dict[str, Callable[[], HeteroscedasticPrediction | HeteroscedasticMixturePrediction]] = {
    **{f"linearized-{event}": lambda event=event: linearized(*event) for event in EVENTS},
    **{f"diagonal-{event}": lambda event=event: linearized(*event, diagonal=True) for event in EVENTS},
    **{f"sampled-{event}": lambda event=event: sampled(*event) for event in EVENTS},
}


@pytest.fixture(params=PREDICTIONS.values(), ids=PREDICTIONS.keys())
def prediction(request: pytest.FixtureRequest) -> HeteroscedasticPrediction | HeteroscedasticMixturePrediction:
    return request.param()


# What holds for both


def test_variance_is_aleatoric_plus_epistemic(prediction) -> None:
    assert_close(prediction.variance, prediction.aleatoric_variance + prediction.epistemic_variance, rtol=0.0, atol=0.0)
    diagonal = prediction.covariance.diagonal(dim1=-2, dim2=-1)
    assert_close(diagonal.reshape(prediction.mean.shape), prediction.variance, **TIGHT)
    assert prediction.mean.shape == prediction.aleatoric_variance.shape == prediction.expected_log_scale.shape


def test_quantiles_invert_the_distribution_function(prediction) -> None:
    for probability in (0.001, 0.1, 0.5, 0.9, 0.999):
        values = prediction.quantile(probability)
        assert values.shape == prediction.mean.shape
        assert_close(prediction.cdf(values), torch.full_like(values, probability), rtol=1e-9, atol=1e-12)
    lower, upper = prediction.interval(0.8)
    assert torch.equal(lower, prediction.quantile((1 - 0.8) / 2))
    assert (upper > lower).all()


def test_density_is_the_derivative_of_the_distribution_function() -> None:
    for make in (linearized, sampled):
        prediction = make(1)
        target = (prediction.mean + 0.3).requires_grad_()
        (density,) = torch.autograd.grad(prediction.cdf(target).sum(), target)
        assert_close(prediction.log_prob(target), density.log().squeeze(1), rtol=1e-9, atol=1e-9)


def test_density_is_that_of_its_distribution(prediction) -> None:
    target = prediction.mean + 0.4
    distribution = prediction.distribution
    assert distribution.batch_shape == (5,)
    assert_close(prediction.log_prob(target), distribution.log_prob(target.reshape(5, *distribution.event_shape)))
    assert_close(distribution.mean.reshape(prediction.mean.shape), prediction.mean, rtol=0.0, atol=0.02)
    if not isinstance(distribution, MixtureSameFamily) or isinstance(prediction, HeteroscedasticMixturePrediction):
        assert_close(distribution.variance.reshape(prediction.mean.shape), prediction.variance, rtol=1e-6, atol=0.0)


def test_targets_of_other_shapes_and_links_are_refused(prediction) -> None:
    for call in (prediction.log_prob, prediction.cdf):
        with pytest.raises(TargetError, match="must be equal"):
            call(prediction.mean.flatten())
    with pytest.raises(ArgumentError, match="probability=1"):
        prediction.quantile(1.0)
    with pytest.raises(ArgumentError, match="link='probit' is for class probabilities"):
        from_gaussian(HeteroscedasticGaussian(), output(1), CLOSED, link="probit", num_samples=3, generator=None)


def test_information_is_never_negative_and_entropy_adds_up(prediction) -> None:
    assert prediction.mutual_information.shape == (5,)
    assert (prediction.mutual_information > 0).all()
    assert_close(prediction.entropy, prediction.expected_entropy + prediction.mutual_information, **TIGHT)


# The linearised output


@pytest.mark.parametrize("event", EVENTS)
def test_moments_are_those_of_draws_of_the_output(event: tuple[int, ...]) -> None:
    """Within five standard errors of 200 000 draws: mean, both variances, covariance, expected entropy."""
    prediction = linearized(*event)
    draws = many(prediction)
    count = len(draws.outputs)
    assert ((draws.mean - prediction.mean).abs() < 5 * (prediction.epistemic_variance / count).sqrt()).all()
    assert_close(draws.epistemic_covariance, prediction.epistemic_covariance, rtol=0.05, atol=0.01)
    noise = (2 * draws._log_scales).exp()
    assert ((noise.mean(0) - prediction.aleatoric_variance).abs() < 5 * noise.std(0) / count**0.5).all()
    assert_close(draws.expected_entropy, prediction.expected_entropy, rtol=0.0, atol=0.02)


def density_by_scipy(mean: Tensor, covariance: Tensor, target: float) -> float:
    """``∫ N(l) N(y; E[m | l], var[m | l] + exp(2 l)) dl``, in pieces of a standard deviation."""
    (m, s), ((mm, ml), (_, ll)) = mean.tolist(), covariance.tolist()

    def integrand(log_scale: float) -> float:
        given = m + ml / ll * (log_scale - s)
        deviation = math.sqrt(mm - ml**2 / ll + math.exp(2 * log_scale))
        return float(stats.norm.pdf(log_scale, s, ll**0.5) * stats.norm.pdf(target, given, deviation))

    edges = s + ll**0.5 * np.arange(-10, 11)
    return sum(integrate.quad(integrand, a, b, epsabs=0, epsrel=1e-9)[0] for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("spread", [[[0.3, 0.1], [0.1, 0.2]], [[0.3, -0.5], [-0.5, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
def test_density_of_one_target_is_the_integral(spread: list[list[float]]) -> None:
    """SciPy's adaptive integral, to 1e-9: with mean and scale correlated, and with a mean that is certain."""
    covariance = torch.tensor([spread], dtype=torch.float64)
    mean = torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    prediction = HeteroscedasticPrediction(GaussianOutput(mean, covariance), CLOSED)
    for target in (-3.0, -0.2, 0.31, 2.0):
        expected = math.log(density_by_scipy(mean[0], covariance[0], target))
        assert_close(
            prediction.log_prob(torch.tensor([[target]], dtype=torch.float64)).item(), expected, rtol=0.0, atol=1e-9
        )


@pytest.mark.parametrize(("event", "bound"), [((1,), 0.02), ((2,), 0.03), ((2, 2), 0.06)])
def test_joint_density_is_the_mean_over_draws(event: tuple[int, ...], bound: float) -> None:
    """Several targets of one example are correlated: marginal densities alone would miss by far more."""
    prediction = linearized(*event, scale=1.0)
    target = prediction.mean + 0.5
    assert_close(prediction.log_prob(target), many(prediction).log_prob(target), rtol=0.0, atol=bound)
    if math.prod(event) > 1:
        alone = linearized(*event, scale=1.0, diagonal=True).log_prob(target)
        assert (alone - prediction.log_prob(target)).abs().max() > 2 * bound


def test_independent_targets_have_the_product_of_their_densities() -> None:
    prediction = linearized(3, diagonal=True)
    target = prediction.mean + 0.5
    alone = 0.0
    for index in range(3):
        means, spread = prediction.output.mean[:, [index, index + 3]], prediction.output.spread[:, [index, index + 3]]
        one = HeteroscedasticPrediction(GaussianOutput(means, spread), CLOSED)
        alone = alone + one.log_prob(target[:, index : index + 1])
    assert_close(prediction.log_prob(target), alone, **TIGHT)


@pytest.mark.parametrize("event", EVENTS)
def test_with_a_certain_scale_it_is_the_gaussian(event: tuple[int, ...]) -> None:
    """Density, quantiles, information and entropy of the Gaussian likelihood with that noise."""
    whole = output(*event)
    prediction = HeteroscedasticPrediction(whole, CLOSED)
    means, log_scales = prediction._indices
    covariance = whole.spread.clone()
    covariance[:, log_scales] = 0.0
    covariance[:, :, log_scales] = 0.0
    certain = HeteroscedasticPrediction(GaussianOutput(whole.mean, covariance), CLOSED)
    gaussians = [
        GaussianPrediction(
            GaussianOutput(certain.mean[n : n + 1], covariance[n : n + 1][:, means][:, :, means]),
            certain.aleatoric_variance[n],
            CLOSED,
        )
        for n in range(5)
    ]
    target = certain.mean + 0.5
    for n, gaussian in enumerate(gaussians):
        assert_close(certain.log_prob(target)[n : n + 1], gaussian.log_prob(target[n : n + 1]), rtol=1e-6, atol=1e-6)
        assert_close(certain.quantile(0.9)[n : n + 1], gaussian.quantile(0.9), rtol=1e-9, atol=1e-9)
        assert_close(certain.mutual_information[n : n + 1], gaussian.mutual_information, **TIGHT)
        assert_close(certain.entropy[n : n + 1], gaussian.entropy, **TIGHT)


def test_a_certain_output_is_its_likelihood() -> None:
    certain = HeteroscedasticPrediction(GaussianOutput(randn(4, 2, seed=0), torch.zeros(4, 2, 2).double()), CLOSED)
    target = randn(4, 1, seed=1)
    expected = -HeteroscedasticGaussian().negative_log_likelihood(certain.output.mean, target)
    assert_close(certain.log_prob(target), expected, **TIGHT)
    assert_close(certain.mutual_information, torch.zeros(4).double(), **TIGHT)


def information_by_quadrature(prediction: HeteroscedasticPrediction) -> Tensor:
    """``H[y] − E H[y | w]`` of one target: the first is ``−∫ p log p``, on a grid that is fine where ``p`` is."""
    deviation = (prediction.epistemic_variance + (2 * prediction.expected_log_scale).exp()).sqrt()
    steps = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    grid = prediction.mean + deviation * steps.sinh() / 4
    size, count = grid.shape
    whole = GaussianOutput(
        prediction.output.mean.repeat_interleave(count, 0), prediction.output.spread.repeat_interleave(count, 0)
    )
    log_density = HeteroscedasticPrediction(whole, CLOSED).log_prob(grid.reshape(-1, 1)).reshape(size, count)
    entropy = torch.trapezoid(-log_density.exp() * log_density * deviation * steps.cosh() / 4, steps)
    return entropy - prediction.expected_entropy


@pytest.mark.parametrize(("size", "gap"), [(1e-4, 1e-2), (1e-2, 0.2), (0.3, 1.0)])
def test_information_is_a_bound_that_is_tight_where_little_is_uncertain(size: float, gap: float) -> None:
    covariance = size * random_spd(3, 2, seed=0)
    mean = torch.stack([torch.zeros(3), torch.linspace(-1, 0.5, 3)], 1).double()
    prediction = HeteroscedasticPrediction(GaussianOutput(mean, covariance), CLOSED)
    exact, bound = information_by_quadrature(prediction), prediction.mutual_information
    assert (bound >= exact - 1e-9).all()
    assert (bound <= (1 + gap) * exact).all()


def product_of_integrals(log_scale: float, target: Tensor, variance: float = 1e-4) -> float:
    """The joint log-density of independent targets whose means are 0 and log-scales are about 0, on a fine grid."""
    z = torch.linspace(-60, 60, 40_001, dtype=torch.float64)
    scale = (variance + (2 * log_scale * z).exp()).sqrt()
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    given = torch.distributions.Normal(0.0, scale).log_prob(target[:, None])
    return float((given + standard).logsumexp(1).sum()) + len(target) * math.log(float(z[1] - z[0]))


@pytest.mark.parametrize("units", [1.0, 1e4])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("deviation", [0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("outlier", [3.0, 20.0, 40.0])
def test_density_of_outliers_is_the_integral(outlier: float, deviation: float, count: int, units: float) -> None:
    """Where the scale that explains them is up to tens of standard deviations from what was believed."""
    target = torch.zeros(count, dtype=torch.float64)
    target[0] = outlier
    variances = torch.tensor([1e-4 * units**2] * count + [deviation**2] * count, dtype=torch.float64)
    mean = torch.tensor([0.0] * count + [math.log(units)] * count, dtype=torch.float64)
    prediction = HeteroscedasticPrediction(GaussianOutput(mean[None], variances.diag()[None]), CLOSED)
    expected = product_of_integrals(deviation, target) - count * math.log(units)
    found = prediction.log_prob(units * target[None]).item()
    assert found == pytest.approx(expected, rel=0, abs=[1e-8, 0.02, 0.1][count - 1])


@pytest.mark.parametrize("deviation", [3.0, 10.0, 30.0])
def test_little_may_be_known_of_the_scale(deviation: float) -> None:
    """Density and distribution function of one target on a fine grid."""
    spread = torch.tensor([[[1.0, 0.0], [0.0, deviation**2]]], dtype=torch.float64)
    prediction = HeteroscedasticPrediction(GaussianOutput(torch.zeros(1, 2).double(), spread), CLOSED)
    z = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    weights = torch.softmax(-0.5 * z.square(), 0)
    scale = (1 + (2 * deviation * z).exp()).sqrt()
    for target in (0.1, 1.0, 1e3):
        given = torch.distributions.Normal(0.0, scale)
        value = torch.tensor([[target]], dtype=torch.float64)
        density = (weights * given.log_prob(value[0]).exp()).sum()
        assert_close(prediction.log_prob(value), density.log()[None], rtol=0.0, atol=1e-5)
        assert_close(prediction.cdf(value), (weights * given.cdf(value[0])).sum()[None, None], rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("target", [200.0, 500.0])
def test_density_of_outliers_that_the_means_explain(target: float) -> None:
    """Where a large scale would too, but is less likely than what is not known of the mean."""
    values = torch.tensor([target, 0.0], dtype=torch.float64)
    spread = torch.tensor([1e4, 1e4, 1.0, 1.0], dtype=torch.float64).diag()
    found = HeteroscedasticPrediction(GaussianOutput(torch.zeros(1, 4).double(), spread[None]), CLOSED)
    assert_close(found.log_prob(values[None]).item(), product_of_integrals(1.0, values, 1e4), rtol=0.0, atol=0.02)


def test_correlated_outliers_are_those_of_wide_draws() -> None:
    """The importance-weighted mean over draws of log-scales that are three times as wide."""
    prediction = linearized(2)
    target = prediction.mean + torch.tensor([25.0, -10.0])
    draws = 3 * randn(400_000, 1, 4, seed=8)
    root = torch.linalg.cholesky(prediction.output.spread)
    outputs = prediction.output.mean + torch.einsum("bij,sbj->sbi", root, draws.expand(-1, 5, -1))
    wide, narrow = (torch.distributions.Normal(0.0, scale) for scale in (3.0, 1.0))
    weights = (narrow.log_prob(draws) - wide.log_prob(draws)).sum(2)
    mean, log_scale = outputs.chunk(2, -1)
    given = torch.distributions.Normal(mean, log_scale.exp()).log_prob(target).sum(2)
    expected = (given + weights).logsumexp(0) - math.log(len(draws))
    assert_close(prediction.log_prob(target), expected, rtol=0.0, atol=0.1)


@pytest.mark.parametrize("log_scale", [-80.0, 44.0, 80.0])
def test_quantiles_of_scales_whose_squares_overflow(log_scale: float) -> None:
    for prediction in (
        HeteroscedasticPrediction(GaussianOutput(torch.tensor([[0.0, log_scale]]), torch.full((1, 2), 1e-9)), CLOSED),
        HeteroscedasticMixturePrediction(torch.tensor([[[0.0, log_scale]]]), SAMPLED),
    ):
        expected = stats.norm.ppf(0.9) * math.hypot(math.exp(log_scale), float(prediction.epistemic_variance) ** 0.5)
        assert prediction.quantile(0.9).item() == pytest.approx(expected, rel=1e-3)


def test_float32_is_enough() -> None:
    double = linearized(2)
    single = HeteroscedasticPrediction(GaussianOutput(double.output.mean.float(), double.output.spread.float()), CLOSED)
    target = double.mean + 0.5
    assert single.log_prob(target.float()).dtype == torch.float32
    assert_close(single.log_prob(target.float()).double(), double.log_prob(target), rtol=1e-4, atol=1e-4)
    assert_close(single.quantile(0.95).double(), double.quantile(0.95), rtol=1e-4, atol=1e-4)


def test_parts_of_a_large_batch_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction = linearized(3)
    target = prediction.mean + 0.5
    whole = prediction.log_prob(target)
    monkeypatch.setattr("bayes_kfac.prediction.heteroscedastic.DENSITY_SIZE", 1)
    assert_close(prediction.log_prob(target), whole, **TIGHT)


# Draws


@pytest.mark.parametrize("event", EVENTS)
def test_draws_are_a_mixture_of_normals(event: tuple[int, ...]) -> None:
    prediction = sampled(*event)
    means, log_scales = prediction.outputs.chunk(2, -1)
    components = stats.norm(means.numpy(), log_scales.exp().numpy())
    target = prediction.mean + 0.5
    logs = torch.as_tensor(components.logpdf(target.numpy())).reshape(7, 5, -1).sum(2)
    assert_close(prediction.log_prob(target), logs.logsumexp(0) - math.log(7), **TIGHT)
    assert_close(prediction.cdf(target), torch.as_tensor(components.cdf(target.numpy())).mean(0), **TIGHT)
    assert_close(prediction.aleatoric_variance, torch.as_tensor(components.var()).mean(0), **TIGHT)
    assert_close(prediction.epistemic_variance, means.var(0, correction=0), **TIGHT)
    assert type(from_outputs(HeteroscedasticGaussian(), prediction.outputs, SAMPLED)) is type(prediction)


# From a posterior


def fitted() -> tuple[bk.Posterior, Tensor, Tensor]:
    x = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
    y = torch.sin(3 * x) + (x - 1).exp() * randn(60, 1, seed=0)
    model = seeded(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)))
    return bk.Laplace(model, HeteroscedasticGaussian()).fit([(x, y)], progress=False).posterior(), x, y


def test_posteriors_predict_by_each_method() -> None:
    """In closed form, its draws, and the last layer's sampled weights, in which the model is affine: all the same."""
    posterior, x, y = fitted()
    closed = posterior.predict(x)
    assert type(closed) is HeteroscedasticPrediction
    assert closed.source.num_samples is None
    draws = posterior.sample(4000, generator=rng(0))
    linear = posterior.predict(x, "linearized", draws=draws)
    assert type(linear) is type(posterior.predict(x, "sampling", num_samples=3)) is HeteroscedasticMixturePrediction
    assert_close(linear.log_prob(y), closed.log_prob(y), rtol=0.0, atol=0.1)
    assert_close(linear.aleatoric_variance, closed.aleatoric_variance, rtol=0.25, atol=0.0)
    diagonal = posterior.predict(x, output_covariance="diagonal")
    assert_close(diagonal.mean, closed.mean, **TIGHT)
    assert_close(diagonal.aleatoric_variance, closed.aleatoric_variance, **TIGHT)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=7)
    assert_close(posterior.predict(loader, progress=False).log_prob(y), closed.log_prob(y), **TIGHT)


def test_predictions_are_differentiable_in_the_inputs() -> None:
    posterior, x, y = fitted()
    point = x[:3].clone().requires_grad_()

    def score(inputs: Tensor) -> Tensor:
        prediction = posterior.predict(inputs)
        return prediction.log_prob(y[:3]) + prediction.aleatoric_variance.sum(1) + prediction.mutual_information

    assert torch.autograd.gradcheck(score, point)
