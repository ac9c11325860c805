"""Scores of real-valued predictions against SciPy, uncertainty-toolbox and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from scipy import integrate, stats

from bayes_kfac import metrics
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
