"""Learned noise reaches the maximum-likelihood estimate, above its bound; the Gamma belief, its conjugate posterior."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats
from torch import Tensor
from torch.distributions import Gamma, kl_divergence
from torch.testing import assert_close

from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import BoundedNoise, FixedNoise, GammaNoise, Gaussian, LearnedNoise, Likelihood, Noise
from bayes_kfac.likelihoods.noise import Scale, noise_from

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def residual_data(*shape: int, scale: float | Tensor = 0.4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs of zero and targets with a known spread: the residuals of a model that no longer moves."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return torch.zeros(shape, dtype=torch.float64), target


def minimise(likelihood: Likelihood, loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        likelihood.parameters(),
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def gamma_at(concentration: float | list[float], rate: float | list[float]) -> GammaNoise:
    """A belief under a Gamma(6, 6) prior with the given posterior."""
    shape = np.shape(rate)
    noise = GammaNoise(6.0, 6.0, shape).double()
    with torch.no_grad():
        noise.log_concentration.copy_(torch.tensor(concentration, dtype=torch.float64).log())
        noise.log_rate.copy_(torch.tensor(rate, dtype=torch.float64).log())
    return noise


# Maximum likelihood


@pytest.mark.parametrize(
    ("shape", "noise_shape", "dims"),
    [
        ((50,), (), (0,)),
        ((50, 1), (), (0, 1)),
        ((50, 3), (), (0, 1)),
        ((50, 3), (3,), (0,)),
        ((50, 2, 3), (2, 1), (0, 2)),
    ],
)
def test_learned_noise_reaches_maximum_likelihood(
    shape: tuple[int, ...], noise_shape: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    """Minimising the criterion gives the root mean squared residual, over the dimensions that share a scale."""
    output, target = residual_data(*shape, scale=torch.linspace(0.3, 0.9, shape[-1], dtype=torch.float64))
    likelihood = Gaussian(LearnedNoise(torch.full(noise_shape, 2.0, dtype=torch.float64)))
    minimise(likelihood, lambda: likelihood(output, target))
    estimate = (target - output).square().mean(dims, keepdim=True).sqrt().reshape(noise_shape)
    assert_close(likelihood.noise_scale, estimate, rtol=1e-8, atol=0.0)


def test_gradient_descent_with_adam_gets_there_too() -> None:
    """Plain first-order steps, as beside the natural gradient, from a start that is far too large."""
    output, target = residual_data(100, 1)
    likelihood = Gaussian(LearnedNoise(5.0)).double()
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=5e-2)
    for _ in range(600):
        optimizer.zero_grad()
        likelihood(output, target).backward()
        optimizer.step()
    assert_close(likelihood.noise_scale, target.square().mean().sqrt(), rtol=1e-4, atol=0.0)


def test_bounded_noise_reaches_maximum_likelihood_above_its_bound() -> None:
    """Bounds on either side of the root mean squared residual, each output for itself."""
    output, target = residual_data(50, 2)
    estimate = (target - output).square().mean(0).sqrt()
    bound = estimate * torch.tensor([0.5, 1.5], dtype=torch.float64)
    likelihood = Gaussian(BoundedNoise(bound))
    assert_close(likelihood.noise_scale, torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=1e-2)
    for _ in range(1000):
        optimizer.zero_grad()
        likelihood(output, target).backward()
        optimizer.step()
    assert_close(likelihood.noise_scale, torch.stack([estimate[0], bound[1]]), rtol=1e-4, atol=0.0)


def test_bounded_noise_comes_back_from_its_bound_as_soon_as_residuals_grow() -> None:
    """It does not go on below, from where it would take as many steps back."""
    output, target = residual_data(50)
    likelihood = Gaussian(BoundedNoise(1.0, scale=1.2)).double()
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=1e-2)
    for residuals, steps in ((target, 1000), (10 * target, 300)):
        for _ in range(steps):
            optimizer.zero_grad()
            likelihood(output, residuals).backward()
            optimizer.step()
    assert_close(likelihood.noise_scale, (10 * target).square().mean().sqrt(), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize(
    ("minimum", "scale", "message"),
    [
        (0.0, 1.0, r"minimum=0.0 is out of range. Allowed: finite numbers > 0."),
        (1.0, -1.0, r"scale=-1.0 is out of range. Allowed: finite numbers > 0."),
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"scale has shape \(3,\) and minimum \(2,\). Allowed: one number"),
    ],
)
def test_what_cannot_bound_a_noise_is_refused(minimum: Scale, scale: Scale, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        BoundedNoise(minimum, scale)


def test_bounded_noise_is_not_set_to_a_scale() -> None:
    with pytest.raises(ArgumentError, match=r"BoundedNoise cannot be set to a scale\. Use likelihoods\.Gaussian"):
        Gaussian(BoundedNoise(0.5)).set_noise_scale(0.1)


# The Gamma belief


@pytest.mark.parametrize(("num_data", "outputs"), [(1, 1), (30, 1), (30, 2)])
def test_belief_reaches_the_conjugate_posterior(num_data: int, outputs: int) -> None:
    """The minimum of ``N · criterion + KL`` is ``Gamma(6 + N/2, 6 + N·mse/2)``, and its value the log-evidence."""
    output, target = residual_data(num_data, outputs)
    likelihood = Gaussian(GammaNoise(6.0, 6.0)).double()

    def objective() -> Tensor:
        return num_data * likelihood(output, target) + likelihood.kl()

    minimise(likelihood, objective)
    count, squares = target.numel(), target.square().sum().item()
    concentration, rate = 6 + count / 2, 6 + squares / 2
    posterior = likelihood.noise.posterior()
    assert posterior.concentration.item() == pytest.approx(concentration, rel=1e-5)
    assert posterior.rate.item() == pytest.approx(rate, rel=1e-5)
    log_evidence = (
        special.gammaln(concentration)
        - special.gammaln(6)
        + 6 * math.log(6)
        - concentration * math.log(rate)
        - 0.5 * count * math.log(2 * math.pi)
    )
    assert objective().item() == pytest.approx(-log_evidence, rel=1e-9)


def test_conjugate_posterior_is_stationary_exactly() -> None:
    """At ``Gamma(6 + N/2, 6 + N·mse/2)`` both gradients of ``N · criterion + KL`` vanish; per-output beliefs too."""
    output, target = residual_data(20, 2)
    rates = (6 + target.square().sum(0) / 2).tolist()
    noise = gamma_at([16.0, 16.0], rates)
    likelihood = Gaussian(noise)
    (20 * likelihood(output, target) + likelihood.kl()).backward()
    assert_close(noise.log_concentration.grad, torch.zeros(2, dtype=torch.float64), rtol=0.0, atol=1e-9)
    assert_close(noise.log_rate.grad, torch.zeros(2, dtype=torch.float64), rtol=0.0, atol=1e-9)


def test_belief_starts_at_its_prior() -> None:
    noise = GammaNoise(6.0, 6.0, (3,)).double()
    assert_close(noise.kl(), torch.zeros((), dtype=torch.float64), rtol=0.0, atol=1e-6)
    assert_close(noise.precision(), torch.ones(3, dtype=torch.float64), **TIGHT)
    assert_close(
        noise.log_precision(),
        torch.full((3,), special.digamma(6) - math.log(6), dtype=torch.float64),
        rtol=1e-6,
        atol=0,
    )


def test_divergence_is_torchs_summed_over_outputs() -> None:
    noise = gamma_at([8.0, 3.0], [2.0, 7.0])
    prior = Gamma(*torch.tensor([6.0, 6.0], dtype=torch.float64))
    expected = sum(
        kl_divergence(Gamma(*torch.tensor(pair, dtype=torch.float64)), prior) for pair in ([8.0, 2.0], [3.0, 7.0])
    )
    assert_close(noise.kl().detach(), expected, **TIGHT)
    assert_close(Gaussian(noise).kl(), noise.kl())


@settings(deadline=None, max_examples=30)
@given(
    concentration=st.floats(1.2, 50.0),
    rate=st.floats(0.1, 20.0),
    residual=st.floats(-4.0, 4.0),
)
def test_density_is_the_integral_over_the_precision(concentration: float, rate: float, residual: float) -> None:
    """A Student-t: ``∫ N(y; f, 1/τ) Gamma(τ) dτ`` by quadrature, its variance ``rate / (concentration − 1)``."""
    noise = gamma_at(concentration, rate)
    mean = torch.tensor([0.5], dtype=torch.float64)
    distribution = noise.distribution(mean)
    belief = stats.gamma(concentration, scale=1 / rate)
    mode = (concentration + 0.5) / (rate + residual**2 / 2)

    def integrand(precision: float) -> float:
        return stats.norm.pdf(residual, scale=precision**-0.5) * belief.pdf(precision)

    # split near the mode of the integrand, where quadrature would else step over it
    parts = [(0, mode / 4), (mode / 4, mode), (mode, 4 * mode), (4 * mode, np.inf)]
    density = sum(integrate.quad(integrand, *part, epsabs=0, epsrel=1e-11, limit=200)[0] for part in parts)
    assert distribution.log_prob(mean + residual).item() == pytest.approx(math.log(density), abs=1e-7)
    assert noise.variance().item() == pytest.approx(rate / (concentration - 1), rel=1e-9)
    assert distribution.variance.item() == pytest.approx(rate / (concentration - 1), rel=1e-9)


def test_density_has_one_location_and_scale_for_each_output() -> None:
    noise = gamma_at([8.0, 3.0], [2.0, 7.0])
    mean = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], dtype=torch.float64)
    target = mean + 0.3
    expected = stats.t.logpdf(0.3, df=[16.0, 6.0], scale=np.sqrt([2.0 / 8.0, 7.0 / 3.0]))
    assert_close(noise.distribution(mean).log_prob(target), torch.as_tensor(expected).expand(3, 2), **TIGHT)


def test_variance_is_not_the_inverse_of_the_expected_precision() -> None:
    """``E[1/τ] = rate / (concentration − 1)``, larger than ``1 / E[τ] = rate / concentration``."""
    noise = gamma_at(3.0, 6.0)
    assert noise.variance().item() == pytest.approx(3.0, rel=1e-12)
    assert noise.precision().item() == pytest.approx(0.5, rel=1e-12)
    assert Gaussian(noise).noise_scale.item() == pytest.approx(3.0**0.5, rel=1e-12)


@pytest.mark.parametrize("concentration", [1.0, 0.5])
def test_infinite_variance_is_an_error(concentration: float) -> None:
    with pytest.raises(ArgumentError, match="no finite variance"):
        gamma_at(concentration, 1.0).variance()


def test_gradients_reach_the_belief_through_the_criterion() -> None:
    noise = gamma_at([8.0, 3.0], [2.0, 7.0])
    output, target = residual_data(5, 2)
    Gaussian(noise)(output, target).backward()
    for parameter in (noise.log_concentration, noise.log_rate):
        assert (parameter.grad != 0).all()


# Shapes, configurations, dtypes


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3)])
@pytest.mark.parametrize("kind", ["fixed", "learned", "bounded", "gamma"])
def test_noise_of_any_shape_is_rebuilt(kind: str, shape: tuple[int, ...]) -> None:
    """``config()`` keeps kind, shape and values; ``state_dict()`` the rest."""
    scale = torch.linspace(0.5, 2.0, math.prod(shape)).reshape(shape)
    noise = {
        "fixed": FixedNoise(scale),
        "learned": LearnedNoise(scale),
        "bounded": BoundedNoise(scale, 0.9),
        "gamma": GammaNoise(3.0, 0.75, shape),
    }[kind]
    with torch.no_grad():
        for parameter in noise.parameters():
            parameter.mul_(1.5)
    rebuilt = noise_from(json.loads(json.dumps(noise.config())))
    assert type(rebuilt) is type(noise)
    rebuilt.load_state_dict(noise.state_dict())
    for quantity in ("precision", "log_precision", "variance"):
        value = getattr(noise, quantity)()
        assert value.shape == shape
        assert torch.equal(value, getattr(rebuilt, quantity)())
    assert_close(rebuilt.kl(), noise.kl())


def test_beliefs_agree_where_they_must() -> None:
    """A sharp Gamma belief, a learned scale, one above a bound and a fixed one are the same noise."""
    sharp = 1e8
    output, target = residual_data(6, 2)
    losses = [
        Gaussian(noise)(output, target).item()
        for noise in (
            FixedNoise(torch.tensor(0.5, dtype=torch.float64)),
            LearnedNoise(torch.tensor(0.5, dtype=torch.float64)),
            BoundedNoise(torch.tensor(0.3, dtype=torch.float64), 0.5),
            gamma_at(sharp, sharp / 4),
        )
    ]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-7)


@pytest.mark.parametrize("noise", [FixedNoise(0.5), LearnedNoise(0.5), BoundedNoise(0.5), GammaNoise()])
def test_density_follows_the_outputs_dtype(noise: Noise) -> None:
    mean = torch.zeros(3, 2, dtype=torch.float64)
    assert noise.distribution(mean).log_prob(mean).dtype == torch.float64
    assert Gaussian(noise).sample_gradient(mean, 2, None).dtype == torch.float64
    assert Gaussian(noise).fisher_root(mean.float()).dtype == torch.float32


def test_the_noise_does_not_follow_the_tensor_it_was_made_from() -> None:
    scale = torch.tensor([0.5, 1.0])
    noise = FixedNoise(scale)
    scale.fill_(7.0)
    assert_close(noise.variance(), torch.tensor([0.25, 1.0]))


@pytest.mark.parametrize(
    ("noise", "shown"),
    [
        (FixedNoise(0.3), "scale=tensor(0.3000)"),
        (LearnedNoise([0.5, 2.0]), "scale=tensor([0.5000, 2.0000])"),
        (BoundedNoise(0.5, 0.1), "minimum=tensor(0.5000), scale=tensor(0.5000)"),
        (GammaNoise(1.0, 1.0), "concentration=tensor(1.), rate=tensor(1.)"),
    ],
)
def test_a_printed_likelihood_shows_its_noise(noise: Noise, shown: str) -> None:
    assert f"{type(noise).__name__}({shown})" in repr(Gaussian(noise))
