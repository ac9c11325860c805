"""Scores of real-valued predictions against SciPy, uncertainty-toolbox and brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, stats

from bayes_kfac import metrics
from bayes_kfac.errors import ArgumentError
from tests.metrics.data import finite


def crps_by_pairs(samples: np.ndarray, target: float) -> float:
    """Reference: the energy form with all pairs."""
    return float(np.abs(samples - target).mean() - np.abs(samples[:, None] - samples[None, :]).mean() / 2)


def test_root_mean_squared_error() -> None:
    assert metrics.root_mean_squared_error([1.0, 2.0, 5.0], [1.0, 0.0, 4.0]).item() == pytest.approx(math.sqrt(5 / 3))


@pytest.mark.parametrize(("mean", "stddev", "target"), [(0, 1, 0), (1, 2, -0.5), (-3, 0.2, -2), (10, 5, 0)])
def test_crps_gaussian_against_integral(mean: float, stddev: float, target: float) -> None:
    distribution = stats.norm(mean, stddev)
    below, _ = integrate.quad(lambda v: distribution.cdf(v) ** 2, mean - 12 * stddev, target)
    above, _ = integrate.quad(lambda v: distribution.sf(v) ** 2, target, mean + 12 * stddev)
    result = metrics.crps_gaussian(*(np.array([v], dtype=np.float64) for v in (mean, stddev, target)))
    assert result.item() == pytest.approx(below + above, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_crps_gaussian_without_spread_is_absolute_error(dtype: torch.dtype) -> None:
    zero = torch.zeros(3, dtype=dtype)
    assert metrics.crps_gaussian(zero, zero, torch.tensor([0, 2, -4], dtype=dtype)).item() == pytest.approx(2)


@given(
    samples=hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=1, max_side=30), elements=finite),
    target=finite,
)
@settings(deadline=None, max_examples=100)
def test_crps_samples_against_pairs(samples: np.ndarray, target: float) -> None:
    # A plain Python float would be rounded to float32 first.
    result = metrics.crps_samples(samples, np.float64(target))
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx(crps_by_pairs(samples, target), rel=1e-9, abs=1e-9)


def test_crps_samples_averages_over_targets() -> None:
    rng = np.random.default_rng(0)
    samples, target = rng.normal(size=(40, 5, 2)), rng.normal(size=(5, 2))
    expected = np.mean(
        [crps_by_pairs(samples[:, i, j], target[i, j]) for i, j in itertools.product(range(5), range(2))]
    )
    assert metrics.crps_samples(samples, target).item() == pytest.approx(expected)


def test_crps_of_one_sample_is_absolute_error() -> None:
    assert metrics.crps_samples([[1.0, 5.0]], [2.0, 2.0]).item() == pytest.approx(2)


def test_crps_samples_tends_to_gaussian() -> None:
    samples = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000, loc=1, scale=2)
    gaussian = metrics.crps_gaussian(1.0, 2.0, 2.5)
    assert metrics.crps_samples(samples, 2.5).item() == pytest.approx(gaussian.item(), rel=1e-3)


def test_crps_samples_keeps_digits_under_a_large_offset() -> None:
    # All numbers are multiples of 1/8 near 1e6, exact in float32, so only the algorithm could lose digits.
    samples = torch.arange(64, dtype=torch.float32) / 8
    near = metrics.crps_samples(samples, torch.tensor(3.0))
    far = metrics.crps_samples(samples + 1e6, torch.tensor(3.0 + 1e6))
    assert far.item() == pytest.approx(near.item(), rel=1e-6)


def test_crps_is_differentiable() -> None:
    samples = torch.randn(6, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: metrics.crps_samples(s, target), samples)
    mean = samples[0].detach().requires_grad_()
    stddev = samples[1].detach().exp().requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: metrics.crps_gaussian(m, s, target), (mean, stddev))


def test_fair_crps_leaves_out_the_pairs_of_a_sample_with_itself() -> None:
    rng = np.random.default_rng(0)
    samples, target = rng.normal(size=7), 0.3
    pairs = [abs(a - b) for a, b in itertools.permutations(samples, 2)]
    expected = np.abs(samples - target).mean() - np.mean(pairs) / 2
    assert metrics.crps_samples(samples, np.float64(target), fair=True).item() == pytest.approx(expected)


def test_fair_crps_has_the_score_of_the_distribution_as_its_expectation() -> None:
    """For 2 samples as for many, where the other score is too large by E|X - X'| / 2S."""
    rng = np.random.default_rng(1)
    target = np.zeros(200_000)
    gaussian = metrics.crps_gaussian(0.0, 1.0, 0.0).item()
    samples = rng.normal(size=(2, len(target)))
    assert metrics.crps_samples(samples, target, fair=True).item() == pytest.approx(gaussian, abs=5e-3)
    too_much = 2 / math.sqrt(math.pi) / (2 * 2)
    assert metrics.crps_samples(samples, target).item() == pytest.approx(gaussian + too_much, abs=5e-3)


# Energy score


@pytest.mark.parametrize("fair", [False, True])
def test_energy_score_of_one_output_is_the_crps(fair: bool) -> None:
    rng = np.random.default_rng(0)
    samples, target = rng.normal(size=(9, 5, 1)), rng.normal(size=(5, 1))
    crps = metrics.crps_samples(samples, target, fair=fair)
    assert metrics.energy_score(samples, target, fair=fair).item() == pytest.approx(crps.item())


def test_energy_score_against_pairs() -> None:
    rng = np.random.default_rng(0)
    samples, target = rng.normal(size=(6, 4, 3)), rng.normal(size=(4, 3))
    near = np.linalg.norm(samples - target, axis=-1).mean()
    apart = np.linalg.norm(samples[:, None] - samples[None, :], axis=-1).mean()
    assert metrics.energy_score(samples, target).item() == pytest.approx(near - apart / 2)


def test_energy_score_does_not_change_under_rotations() -> None:
    rng = np.random.default_rng(0)
    samples, target = rng.normal(size=(6, 4, 3)), rng.normal(size=(4, 3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    turned = metrics.energy_score(samples @ rotation, target @ rotation)
    assert turned.item() == pytest.approx(metrics.energy_score(samples, target).item())


def test_energy_score_rewards_the_right_correlation() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(500, 1)) * np.ones((1, 2))
    apart = rng.normal(size=(100, 500, 2))
    together = apart[..., :1] * np.ones((1, 1, 2))
    assert metrics.energy_score(together, target) < metrics.energy_score(apart, target)


# Densities


def test_gaussian_nll_against_scipy() -> None:
    rng = np.random.default_rng(0)
    mean, stddev, target = rng.normal(size=(5, 2)), np.exp(rng.normal(size=(5, 2))), rng.normal(size=(5, 2))
    expected = -stats.norm.logpdf(target, mean, stddev).mean()
    assert metrics.gaussian_nll(mean, stddev, target).item() == pytest.approx(expected, rel=1e-12)


def test_mixture_nll_averages_densities() -> None:
    log_probs = np.log([[0.2, 0.5], [0.4, 0.1]])
    expected = -(np.log(0.3) + np.log(0.3)) / 2
    assert metrics.mixture_nll(log_probs).item() == pytest.approx(expected)
    assert metrics.mixture_nll(log_probs) < -log_probs.mean()


def test_mixture_nll_takes_impossible_components_and_far_targets() -> None:
    assert metrics.mixture_nll([[-math.inf], [0.0]]).item() == pytest.approx(math.log(2))
    far = torch.tensor([[-1e4], [-1e4]])  # the densities themselves are zero
    assert metrics.mixture_nll(far).item() == pytest.approx(1e4)


def test_mixture_nll_of_one_component_is_its_own() -> None:
    rng = np.random.default_rng(0)
    mean, stddev, target = rng.normal(size=5), np.exp(rng.normal(size=5)), rng.normal(size=5)
    one = metrics.mixture_nll(stats.norm.logpdf(target, mean, stddev)[None])
    assert one.item() == pytest.approx(metrics.gaussian_nll(mean, stddev, target).item())


# Proper scores are least, in expectation, at the truth

POPULATION = stats.norm.ppf((np.arange(4000) + 0.5) / 4000, loc=0.5, scale=1.5)


@pytest.mark.parametrize("score", [metrics.gaussian_nll, metrics.crps_gaussian])
@given(shift=st.floats(-1, 1), factor=st.floats(0.5, 2))
@settings(deadline=None, max_examples=25)
def test_score_is_least_at_the_truth(score: Any, shift: float, factor: float) -> None:
    def expected(mean: float, stddev: float) -> float:
        return score(np.full_like(POPULATION, mean), np.full_like(POPULATION, stddev), POPULATION).item()

    assert expected(0.5, 1.5) <= expected(0.5 + shift, 1.5 * factor) + 1e-3


@given(factor=st.floats(0.1, 10), shift=st.floats(-10, 10))
@settings(deadline=None, max_examples=25)
def test_units(factor: float, shift: float) -> None:
    """In another unit the CRPS is in that unit, and the NLL shifts by the unit's logarithm."""
    rng = np.random.default_rng(0)
    mean, stddev, target = rng.normal(size=8), np.exp(rng.normal(size=8)), rng.normal(size=8)
    other = (factor * mean + shift, factor * stddev, factor * target + shift)
    assert metrics.crps_gaussian(*other).item() == pytest.approx(
        factor * metrics.crps_gaussian(mean, stddev, target).item()
    )
    assert metrics.gaussian_nll(*other).item() == pytest.approx(
        metrics.gaussian_nll(mean, stddev, target).item() + math.log(factor)
    )
    samples = rng.normal(size=(5, 8))
    assert metrics.crps_samples(factor * samples + shift, factor * target + shift).item() == pytest.approx(
        factor * metrics.crps_samples(samples, target).item()
    )


def test_densities_are_differentiable() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, stddev, target = torch.rand(3, 4, dtype=torch.float64, generator=generator).requires_grad_().unbind()
    assert torch.autograd.gradcheck(metrics.gaussian_nll, (mean, stddev + 0.1, target))
    samples = torch.randn(3, 4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(metrics.mixture_nll, samples)
    assert torch.autograd.gradcheck(lambda own: metrics.energy_score(own, torch.zeros_like(own[0])), samples)


def test_refuses() -> None:
    with pytest.raises(ArgumentError, match="stddev has an entry 0"):
        metrics.gaussian_nll([0.0], [0.0], [0.0])
    with pytest.raises(ArgumentError, match="stddev has a negative entry, -1"):
        metrics.gaussian_nll([0.0], [-1.0], [0.0])
    with pytest.raises(ArgumentError, match=r"log_probs has shape \(\)"):
        metrics.mixture_nll(1.0)
    for score in (metrics.crps_samples, metrics.energy_score):
        with pytest.raises(ArgumentError, match="samples holds 1 sample"):
            score(torch.ones(1, 2, 3), torch.ones(2, 3), fair=True)
    with pytest.raises(ArgumentError, match=r"target has shape \(3,\)"):
        metrics.energy_score(torch.ones(4, 3), torch.ones(3))
