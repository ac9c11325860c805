"""Regression results against SciPy: closed form and mixtures, moments, densities, quantiles, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.testing import assert_close

from bayes_kfac.errors import ArgumentError, TargetError
from bayes_kfac.likelihoods import FixedNoise, GammaNoise, Gaussian, LearnedNoise
from bayes_kfac.prediction import (
    GaussianOutput,
    GaussianPrediction,
    MixturePrediction,
    Prediction,
    Source,
    from_gaussian,
    from_outputs,
)
from bayes_kfac.provenance import Provenance
from tests.helpers import randn, random_spd, rng

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
PROVENANCE = Provenance("a test", "kron", "factored", "mc", "expand", temperature=1.0, num_data=20)
CLOSED, SAMPLED = Source("linearized", None, PROVENANCE), Source("sampling", 7, PROVENANCE)
EVENTS = [(), (1,), (3,), (2, 2)]
LEVELS = [0.5, 0.9, 0.95, 0.999]


def double(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def closed_form(*event: int, noise: Tensor | None = None, diagonal: bool = False) -> GaussianPrediction:
    covariance = random_spd(5, math.prod(event), seed=1)
    spread = covariance.diagonal(dim1=-2, dim2=-1) if diagonal else covariance
    noise = double(0.3) if noise is None else noise
    return GaussianPrediction(GaussianOutput(randn(5, *event, seed=0), spread), noise, CLOSED)


def fixed(event: tuple[int, ...]) -> Gaussian:
    return Gaussian(FixedNoise(torch.linspace(0.4, 0.9, math.prod(event), dtype=torch.float64).reshape(event)))


def learned(event: tuple[int, ...]) -> Gaussian:
    return Gaussian(LearnedNoise(torch.linspace(0.4, 0.9, math.prod(event), dtype=torch.float64).reshape(event)))


def gamma(event: tuple[int, ...]) -> Gaussian:
    """A belief with a posterior of its own for each output: Student-t components with 5 to 9 degrees of freedom."""
    noise = GammaNoise(2.5, 1.0, event).double()
    with torch.no_grad():
        steps = torch.linspace(0.0, 0.6, math.prod(event), dtype=torch.float64).reshape(event)
        noise.log_concentration.add_(steps)
    return Gaussian(noise)


NOISES: dict[str, Callable[[tuple[int, ...]], Gaussian]] = {"fixed": fixed, "learned": learned, "gamma": gamma}


def mixture(
    *event: int, noise: str = "fixed", draws: int = 7, batch: int = 5, spread: float = 1.0
) -> MixturePrediction:
    outputs = spread * randn(draws, batch, *event, seed=0)
    return MixturePrediction(outputs, NOISES[noise](event).requires_grad_(False), SAMPLED)


def scipy_components(prediction: MixturePrediction) -> stats.rv_continuous:
    """The component densities of the likelihood, with the draws as the first dimension, as a frozen SciPy family."""
    noise = prediction.likelihood.noise
    if isinstance(noise, GammaNoise):
        concentration, rate = noise.log_concentration.exp().numpy(), noise.log_rate.exp().numpy()
        return stats.t(df=2 * concentration, loc=prediction.outputs.numpy(), scale=np.sqrt(rate / concentration))
    return stats.norm(loc=prediction.outputs.numpy(), scale=noise.variance().sqrt().numpy())


PREDICTIONS = [
    (f"closed-{event}-{diagonal}", lambda event=event, diagonal=diagonal: closed_form(*event, diagonal=diagonal))
    for event in EVENTS
    for diagonal in (False, True)
] + [
    (f"mixture-{noise}-{event}", lambda event=event, noise=noise: mixture(*event, noise=noise))
    for event in EVENTS
    for noise in NOISES
]


@pytest.fixture(params=[make for _, make in PREDICTIONS], ids=[name for name, _ in PREDICTIONS])
def prediction(request: pytest.FixtureRequest) -> GaussianPrediction | MixturePrediction:
    return request.param()


# What holds for every result


def test_variance_is_aleatoric_plus_epistemic(prediction: GaussianPrediction | MixturePrediction) -> None:
    """Always; and ``stddev`` is its root, the covariance's diagonal is it."""
    assert_close(prediction.variance, prediction.aleatoric_variance + prediction.epistemic_variance, rtol=0.0, atol=0.0)
    assert_close(prediction.stddev.square(), prediction.variance, **TIGHT)
    diagonal = prediction.covariance.diagonal(dim1=-2, dim2=-1)
    assert_close(diagonal.reshape(prediction.mean.shape), prediction.variance, **TIGHT)
    epistemic = prediction.epistemic_covariance.diagonal(dim1=-2, dim2=-1)
    assert_close(epistemic.reshape(prediction.mean.shape), prediction.epistemic_variance, **TIGHT)
    assert (prediction.aleatoric_variance > 0).all()
    assert (prediction.epistemic_variance > 0).all()


def test_moments_have_the_targets_shape(prediction: GaussianPrediction | MixturePrediction) -> None:
    shape = prediction.mean.shape
    size = math.prod(shape[1:])
    for value in (prediction.variance, prediction.aleatoric_variance, prediction.epistemic_variance, prediction.stddev):
        assert value.shape == shape
    assert prediction.covariance.shape == prediction.epistemic_covariance.shape == (5, size, size)
    assert prediction.log_prob(torch.zeros(shape, dtype=torch.float64)).shape == (5,)
    assert all(end.shape == shape for end in prediction.interval(0.9))


def test_distribution_has_the_same_moments_and_density(prediction: GaussianPrediction | MixturePrediction) -> None:
    """``distribution`` is the joint predictive: its mean, variance and log-density are the result's."""
    distribution = prediction.distribution
    assert_close(distribution.mean.reshape(prediction.mean.shape), prediction.mean, **TIGHT)
    assert_close(distribution.variance.reshape(prediction.mean.shape), prediction.variance, **TIGHT)
    target = randn(*prediction.mean.shape, seed=2)
    value = target.reshape(distribution.mean.shape)
    assert_close(distribution.log_prob(value).reshape(5), prediction.log_prob(target), **TIGHT)


def test_targets_that_do_not_fit_are_refused(prediction: GaussianPrediction | MixturePrediction) -> None:
    """Column against row, another batch, and integers: errors, never a broadcast."""
    shape = prediction.mean.shape
    with pytest.raises(TargetError, match="must be equal"):
        prediction.log_prob(torch.zeros(*shape, 1, dtype=torch.float64))
    with pytest.raises(TargetError, match="must be equal"):
        prediction.log_prob(torch.zeros(1, *shape[1:], dtype=torch.float64))
    with pytest.raises(TargetError, match="floating point"):
        prediction.log_prob(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("level", [0, 1, -0.5, 1.5, 95, math.nan, [0.1, 0.9], torch.tensor([0.1, 0.9])])
def test_levels_outside_the_unit_interval_are_refused(
    prediction: GaussianPrediction | MixturePrediction, level: float
) -> None:
    with pytest.raises(ArgumentError, match=r"level=.*Allowed: 0 < level < 1"):
        prediction.interval(level)
    with pytest.raises(ArgumentError, match=r"probability=.*Allowed: 0 < probability < 1"):
        prediction.quantile(level)


def test_interval_is_central(prediction: GaussianPrediction | MixturePrediction) -> None:
    """Its ends are the two quantiles that leave the same probability on either side; wider levels contain it."""
    lower, upper = prediction.interval(0.9)
    assert_close(lower, prediction.quantile(0.05), **TIGHT)
    assert_close(upper, prediction.quantile(0.95), **TIGHT)
    wider = prediction.interval(0.99)
    assert (wider[0] < lower).all()
    assert (lower < prediction.quantile(0.5)).all()
    assert (prediction.quantile(0.5) < upper).all()
    assert (upper < wider[1]).all()


def test_distribution_function_undoes_quantiles(prediction: GaussianPrediction | MixturePrediction) -> None:
    for probability in (0.05, 0.5, 0.9):
        reached = prediction.cdf(prediction.quantile(probability))
        assert reached.shape == prediction.mean.shape
        assert_close(reached, torch.full_like(reached, probability), rtol=0.0, atol=1e-10)
    with pytest.raises(TargetError, match="must be equal"):
        prediction.cdf(torch.zeros(1, *prediction.mean.shape[1:], dtype=torch.float64))


def test_source_says_how_it_was_made(prediction: GaussianPrediction | MixturePrediction) -> None:
    assert prediction.source in (CLOSED, SAMPLED)
    assert prediction.source.posterior is PROVENANCE


# The closed form


@pytest.mark.parametrize("event", [(), (1,)])
def test_closed_form_of_one_output_is_scipys_normal(event: tuple[int, ...]) -> None:
    prediction = closed_form(*event)
    variance = prediction.epistemic_covariance.reshape(prediction.mean.shape) + 0.3
    reference = stats.norm(prediction.mean.numpy(), variance.sqrt().numpy())
    target = randn(*prediction.mean.shape, seed=2)
    assert_close(prediction.log_prob(target), torch.as_tensor(reference.logpdf(target.numpy())).reshape(5), **TIGHT)
    assert isinstance(prediction.distribution, Normal)
    for level in LEVELS:
        for end, expected in zip(prediction.interval(level), reference.interval(level), strict=True):
            assert_close(end, torch.as_tensor(expected), **TIGHT)
    for probability in (1e-4, 0.1, 0.5, 0.975):
        assert_close(prediction.quantile(probability), torch.as_tensor(reference.ppf(probability)), **TIGHT)
    assert_close(prediction.cdf(target), torch.as_tensor(reference.cdf(target.numpy())), rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("event", [(3,), (2, 2)])
def test_closed_form_of_several_outputs_is_joint(event: tuple[int, ...]) -> None:
    """One log-density for an example, with the correlation between its outputs: SciPy's multivariate normal."""
    noise = torch.linspace(0.1, 0.5, math.prod(event), dtype=torch.float64).reshape(event)
    prediction = closed_form(*event, noise=noise)
    target = randn(*prediction.mean.shape, seed=2)
    log_prob = prediction.log_prob(target)
    marginal = Normal(prediction.mean, prediction.stddev).log_prob(target).flatten(1).sum(1)
    for n in range(5):
        covariance = prediction.epistemic_covariance[n].numpy() + np.diag(noise.flatten().numpy())
        mean = prediction.mean[n].flatten().numpy()
        expected = stats.multivariate_normal(mean, covariance).logpdf(target[n].flatten().numpy())
        assert log_prob[n].item() == pytest.approx(expected, rel=1e-10)
    assert isinstance(prediction.distribution, MultivariateNormal)
    assert ((log_prob - marginal).abs() > 1e-3).any()


@pytest.mark.parametrize("event", [(3,), (2, 2)])
def test_intervals_of_several_outputs_are_of_each_alone(event: tuple[int, ...]) -> None:
    prediction = closed_form(*event)
    expected = stats.norm.interval(0.9, prediction.mean.numpy(), prediction.variance.sqrt().numpy())
    for end, value in zip(prediction.interval(0.9), expected, strict=True):
        assert_close(end, torch.as_tensor(value), **TIGHT)


def test_noise_broadcasts_against_one_examples_output() -> None:
    prediction = closed_form(2, 3, noise=double([[0.1], [0.7]]))
    expected = double([[0.1, 0.1, 0.1], [0.7, 0.7, 0.7]]).expand(5, 2, 3)
    assert_close(prediction.aleatoric_variance, expected, **TIGHT)
    flat = prediction.covariance - prediction.epistemic_covariance
    assert_close(flat, torch.diag_embed(expected.flatten(1)), **TIGHT)


def test_from_gaussian_takes_the_expected_variance_of_a_belief() -> None:
    """The linearised result of a Gamma belief has its expected variance, ``rate / (concentration − 1)``, as noise."""
    likelihood = Gaussian(GammaNoise(5.0, 2.0)).double()
    result = from_gaussian(likelihood, closed_form(2).output, CLOSED, link=None, num_samples=3, generator=None)
    assert isinstance(result, GaussianPrediction)
    assert result.source is CLOSED
    assert_close(result.aleatoric_variance, torch.full((5, 2), 0.5, dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert not result.variance.requires_grad


@pytest.mark.parametrize("event", [(3,), (2, 2)])
def test_variances_alone_are_independent_outputs(event: tuple[int, ...]) -> None:
    """The marginals are those of the full covariance; the joint density is their product."""
    full, diagonal = closed_form(*event), closed_form(*event, diagonal=True)
    target = randn(*full.mean.shape, seed=2)
    assert_close(diagonal.quantile(0.9), full.quantile(0.9), **TIGHT)
    assert isinstance(diagonal.distribution, Independent)
    expected = stats.norm(full.mean.numpy(), full.stddev.numpy()).logpdf(target.numpy()).reshape(5, -1).sum(-1)
    assert_close(diagonal.log_prob(target), torch.as_tensor(expected), **TIGHT)
    assert ((diagonal.log_prob(target) - full.log_prob(target)).abs() > 1e-3).any()
    assert_close(diagonal.covariance, torch.diag_embed(diagonal.variance.flatten(1)), **TIGHT)


@pytest.mark.parametrize("link", ["mc", "probit", "nonsense"])
def test_links_are_refused(link: str) -> None:
    with pytest.raises(ArgumentError, match=rf"link='{link}' is for class probabilities.*Leave link= out"):
        from_gaussian(Gaussian(0.5), closed_form(2).output, CLOSED, link=link, num_samples=3, generator=None)


# Mixtures


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("event", EVENTS)
def test_mixture_density_is_the_mean_of_densities(event: tuple[int, ...], noise: str) -> None:
    """``log (1/S) Σ_s Π_k p(y_k | f_sk)``: joint over an example's outputs, then averaged over draws."""
    prediction = mixture(*event, noise=noise)
    target = randn(*prediction.mean.shape, seed=2)
    joint = np.exp(scipy_components(prediction).logpdf(target.numpy()).reshape(7, 5, -1).sum(-1))
    assert_close(prediction.log_prob(target), torch.as_tensor(np.log(joint.mean(0))), **TIGHT)


def test_mixture_density_is_not_that_of_the_mean() -> None:
    """The trap: the density at the average output, or of a Gaussian with the mixture's moments, is another one."""
    outputs = double([[[-3.0]], [[3.0]]])
    prediction = MixturePrediction(outputs, Gaussian(double(0.5)), SAMPLED)
    origin = torch.zeros(1, 1, dtype=torch.float64)
    expected = stats.norm.logpdf(3.0, scale=0.5)
    assert prediction.log_prob(origin).item() == pytest.approx(expected, rel=1e-12)
    of_the_mean = prediction.likelihood.distribution(prediction.mean).log_prob(origin).item()
    assert of_the_mean > expected + 10
    assert prediction.log_prob(outputs[0]).item() == pytest.approx(
        math.log(0.5) + stats.norm.logpdf(0.0, scale=0.5), rel=1e-9
    )


@settings(deadline=None, max_examples=30)
@given(draws=st.integers(1, 9), seed=st.integers(0, 2**31), spread=st.floats(0.0, 50.0))
def test_mixture_density_is_a_mean_whatever_the_draws(draws: int, seed: int, spread: float) -> None:
    """Also where every density underflows, and for any number of draws (not a power of two)."""
    outputs = spread * randn(draws, 3, 2, seed=seed)
    prediction = MixturePrediction(outputs, Gaussian(double(0.1)), SAMPLED)
    target = torch.zeros(3, 2, dtype=torch.float64)
    logs = stats.norm.logpdf(0.0, outputs.numpy(), 0.1).sum(-1)
    expected = np.logaddexp.reduce(logs, axis=0) - math.log(draws)
    assert_close(prediction.log_prob(target), torch.as_tensor(expected), rtol=1e-11, atol=1e-10)


def test_mixture_of_one_draw_is_the_likelihood() -> None:
    prediction = mixture(3, draws=1)
    target = randn(5, 3, seed=2)
    assert_close(prediction.log_prob(target), -fixed((3,)).negative_log_likelihood(prediction.mean, target), **TIGHT)
    assert torch.equal(prediction.epistemic_variance, torch.zeros_like(prediction.mean))


@pytest.mark.parametrize("noise", NOISES)
def test_mixture_moments_are_those_of_the_draws(noise: str) -> None:
    """NumPy's mean and (population) covariance of the outputs; the noise is the components' own variance."""
    prediction = mixture(2, 2, noise=noise)
    outputs = prediction.outputs.numpy().reshape(7, 5, 4)
    for n in range(5):
        expected = np.cov(outputs[:, n].T, bias=True)
        assert_close(prediction.epistemic_covariance[n], torch.as_tensor(expected), **TIGHT)
    assert_close(prediction.mean, torch.as_tensor(outputs.mean(0)).reshape(5, 2, 2), **TIGHT)
    component = torch.as_tensor(scipy_components(prediction).var())[0]
    assert_close(prediction.aleatoric_variance, component, **TIGHT)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("event", EVENTS)
def test_quantile_has_its_probability(event: tuple[int, ...], noise: str) -> None:
    """The mixture's distribution function at the quantile, by SciPy, is the probability asked for."""
    prediction = mixture(*event, noise=noise)
    reference = scipy_components(prediction)
    for probability in (1e-5, 0.025, 0.3, 0.5, 0.975, 1 - 1e-5):
        quantile = prediction.quantile(probability)
        reached = torch.as_tensor(reference.cdf(quantile.numpy()).mean(0))
        assert_close(reached, torch.full_like(reached, probability), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("probability", [0.025, 0.05, 0.5, 0.95, 0.975])
def test_a_quantile_takes_few_evaluations(probability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 500 mixtures at once: halving alone takes more than 60."""
    prediction = MixturePrediction(randn(64, 500, 1, seed=0), Gaussian(FixedNoise(0.5)), SAMPLED)
    calls, cdf = [], MixturePrediction._cdf

    def counted(self: MixturePrediction, value: Tensor) -> Tensor:
        calls.append(value)
        return cdf(self, value)

    monkeypatch.setattr(MixturePrediction, "_cdf", counted)
    reached = cdf(prediction, prediction.quantile(probability))
    assert_close(reached, torch.full_like(reached, probability), rtol=0.0, atol=1e-14)
    assert len(calls) < 30


@settings(deadline=None, max_examples=30)
@given(
    probability=st.floats(1e-4, 1 - 1e-4),
    spread=st.floats(0.0, 100.0),
    noise=st.sampled_from(sorted(NOISES)),
    seed=st.integers(0, 2**31),
)
@example(probability=0.25, spread=9.0, noise="fixed", seed=1)  # level between modes, at just this probability
def test_quantile_of_any_mixture(probability: float, spread: float, noise: str, seed: int) -> None:
    """From one lump to well-separated modes, where the quantile lies far from mean and components."""
    outputs = spread * randn(4, 3, 1, seed=seed)
    prediction = MixturePrediction(outputs, NOISES[noise]((1,)).requires_grad_(False), SAMPLED)
    reached = scipy_components(prediction).cdf(prediction.quantile(probability).numpy()).mean(0)
    assert reached == pytest.approx(np.full((3, 1), probability), abs=1e-6)


def test_quantile_is_the_root_that_scipy_finds() -> None:
    """Independently of distribution functions at the answer: Brent's method on two well-separated modes."""
    prediction = MixturePrediction(double([[[-3.0]], [[5.0]], [[5.5]]]), Gaussian(double(0.5)), SAMPLED)

    def distance(value: float) -> float:
        return stats.norm.cdf(value, [-3.0, 5.0, 5.5], 0.5).mean() - 0.9

    expected = optimize.brentq(distance, -20, 20, xtol=1e-13)
    assert prediction.quantile(0.9).item() == pytest.approx(expected, abs=1e-10)


def test_samples_of_the_mixture_fall_into_the_interval() -> None:
    """80 % of 20 000 samples of the joint distribution lie in the 80 % interval of each output."""
    prediction = mixture(2, noise="gamma")
    torch.manual_seed(0)
    samples = prediction.distribution.sample((20_000,))
    lower, upper = prediction.interval(0.8)
    coverage = ((samples > lower) & (samples < upper)).double().mean(0)
    assert_close(coverage, torch.full_like(coverage, 0.8), rtol=0.0, atol=5 * (0.8 * 0.2 / 20_000) ** 0.5)


def test_float32_quantiles_end() -> None:
    """Bisection stops at the dtype's last digit, also far from zero where neighbours are wide apart."""
    outputs = (1e6 + randn(4, 3, 1, seed=0)).float()
    prediction = MixturePrediction(outputs, Gaussian(1.0), SAMPLED)
    lower, upper = prediction.interval(0.9)
    assert lower.dtype == torch.float32
    assert (lower < upper).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda o, s: GaussianPrediction(GaussianOutput(o, 0 * o), double(1.0).float(), s),
        lambda o, s: MixturePrediction(o.expand(2, 4, 1), Gaussian(1.0), s),
    ],
)
def test_tails_are_kept_in_single_precision(make: Callable[[Tensor, Source], Prediction]) -> None:
    """SciPy's quantiles up to 1e-8 of either end, and probabilities far below the digits of float32 about 1."""
    prediction = make(torch.zeros(4, 1), SAMPLED)
    for probability in (1e-10, 1e-8, 1e-4, 0.5, 0.9999, 1 - 1e-8):
        quantile = prediction.quantile(probability)
        assert quantile.dtype == torch.float32
        assert_close(quantile, torch.full_like(quantile, stats.norm.ppf(probability)), rtol=1e-6, atol=1e-6)
    lower, upper = prediction.interval(1 - 2e-8)
    assert_close(lower, -upper, rtol=1e-6, atol=0.0)
    target = torch.full((4, 1), -9.0)
    assert_close(prediction.cdf(target), torch.full_like(target, stats.norm.cdf(-9.0)), rtol=1e-4, atol=0.0)


def test_draws_keep_the_noise_they_were_made_with() -> None:
    likelihood = Gaussian(0.5)
    prediction = from_outputs(likelihood, torch.zeros(3, 2, 1), SAMPLED)
    likelihood.set_noise_scale(9.0)
    assert_close(prediction.aleatoric_variance, torch.full((2, 1), 0.25))
    assert_close(prediction.log_prob(torch.zeros(2, 1)), Normal(torch.zeros(2), 0.5).log_prob(torch.zeros(2)))


def test_joint_distribution_is_a_mixture_over_outputs() -> None:
    """One draw of the weights rules all outputs of an example: components are joint, not mixed output by output."""
    distribution = mixture(3).distribution
    assert isinstance(distribution, MixtureSameFamily)
    assert isinstance(distribution.component_distribution, Independent)
    assert distribution.batch_shape == (5,)
    assert distribution.event_shape == (3,)


def test_from_outputs_keeps_outputs_and_source() -> None:
    outputs = randn(7, 5, 2, seed=0)
    result: Prediction = from_outputs(fixed((2,)), outputs, SAMPLED)
    assert isinstance(result, MixturePrediction)
    assert result.source is SAMPLED
    assert torch.equal(result.outputs, outputs)


def test_closed_form_and_mixture_agree_on_a_gaussian() -> None:
    """Draws of a Gaussian output give its closed form, within five standard errors of 20 000 draws."""
    exact = closed_form(2, noise=double([0.3, 0.8]))
    root = torch.linalg.cholesky(exact.epistemic_covariance)
    noise = torch.randn(20_000, 5, 2, generator=rng(3), dtype=torch.float64)
    outputs = exact.mean + torch.einsum("bij,sbj->sbi", root, noise)
    sampled = MixturePrediction(outputs, Gaussian(double([0.3, 0.8]).sqrt()), SAMPLED)
    target = exact.mean + 0.5
    errors = 5 * (2 / 20_000) ** 0.5 * torch.einsum("bi,bj->bij", exact.stddev, exact.stddev)
    assert ((sampled.covariance - exact.covariance).abs() <= errors).all()
    assert_close(sampled.log_prob(target), exact.log_prob(target), rtol=0.0, atol=0.05)
    assert_close(sampled.quantile(0.9), exact.quantile(0.9), rtol=0.0, atol=0.1)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("event", EVENTS)
def test_entropy_is_that_of_the_distribution_and_of_the_noise_plus_information(event, diagonal):
    """Torch's entropies of the joint Gaussian, and of the noise; their difference is the information."""
    noise = torch.linspace(0.2, 0.7, math.prod(event), dtype=torch.float64).reshape(event)
    prediction = closed_form(*event, noise=noise, diagonal=diagonal)
    total = prediction.distribution.entropy().reshape(5)
    of_noise = Normal(torch.zeros_like(noise), noise.sqrt()).entropy().sum().expand(5)
    assert_close(prediction.entropy, total, **TIGHT)
    assert_close(prediction.expected_entropy, of_noise, **TIGHT)
    assert_close(prediction.mutual_information, total - of_noise, **TIGHT)


def test_information_is_found_below_the_digits_of_the_entropies():
    """Next to nothing is known to be left: ½ S / R, where a difference of two entropies is 0 in single precision."""
    output = GaussianOutput(torch.zeros(1, 1), torch.full((1, 1, 1), 1e-9))
    prediction = GaussianPrediction(output, torch.tensor(1.0), CLOSED)
    assert_close(prediction.mutual_information, torch.tensor([0.5e-9]))


def test_information_of_a_mixture_is_bounded_by_that_of_a_gaussian():
    """By quadrature: the entropy of a mixture of three Gaussians minus that of one of them."""
    outputs = double([[-1.0], [0.0], [2.0]]).unsqueeze(-1)
    prediction = MixturePrediction(outputs, fixed((1,)), SAMPLED)
    target = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    log_prob = MixturePrediction(outputs.expand(3, 20001, 1), fixed((1,)), SAMPLED).log_prob(target.unsqueeze(1))
    entropy = -torch.trapezoid(log_prob.exp() * log_prob, target)
    assert (entropy - prediction.expected_entropy).item() < prediction.mutual_information.item()
    variance = outputs.var(correction=0) / 0.4**2
    assert_close(prediction.mutual_information, 0.5 * variance.log1p().reshape(1), **TIGHT)
