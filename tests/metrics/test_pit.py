"""PITs against SciPy and by hand, and the miscalibration area against a fine grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bayes_kfac import metrics
from bayes_kfac.errors import ArgumentError
from tests.metrics.data import seeds


def test_gaussian_is_the_distribution_function_of_scipy() -> None:
    rng = np.random.default_rng(0)
    mean, stddev, target = rng.normal(size=(4, 3)), np.exp(rng.normal(size=(4, 3))), rng.normal(size=(4, 3))
    np.testing.assert_allclose(
        metrics.pit_gaussian(mean, stddev, target), stats.norm.cdf(target, mean, stddev), rtol=0, atol=1e-15
    )


def test_samples_by_hand() -> None:
    samples = [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]
    found = metrics.pit_samples(samples, [0.0, 2.5, 2.0])
    assert found.tolist() == pytest.approx([1 / 8, 5 / 8, 1 / 2])


def test_samples_of_the_targets_own_distribution_have_every_rank_equally_often() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(10, 20_000))
    pit = metrics.pit_samples(draws[1:], draws[0])
    counts, _ = np.histogram(pit, bins=10, range=(0, 1))
    assert counts.sum() == 20_000
    assert stats.chisquare(counts).pvalue > 0.01


def test_many_samples_tend_to_the_gaussian() -> None:
    samples = stats.norm.ppf((np.arange(5000) + 0.5) / 5000, loc=1, scale=2)[:, None]
    target = np.array([2.2])
    expected = metrics.pit_gaussian([1.0], [2.0], target).item()
    assert metrics.pit_samples(samples, target).item() == pytest.approx(expected, abs=2e-4)


def area_on_a_grid(pit: np.ndarray, kind: str) -> float:
    """Reference: the curves on many levels."""
    level = (np.arange(200_000) + 0.5) / 200_000
    begins = np.sort(np.abs(2 * pit - 1) if kind == "interval" else pit)
    observed = np.searchsorted(begins, level, side="right") / len(begins)
    return float(np.abs(observed - level).mean())


@given(seed=seeds, n=st.integers(1, 40), kind=st.sampled_from(["interval", "quantile"]))
@settings(deadline=None, max_examples=25)
def test_area_against_a_grid(seed: int, n: int, kind: str) -> None:
    pit = np.random.default_rng(seed).beta(0.7, 1.2, size=n).round(2)  # with ties
    assert metrics.miscalibration_area(pit, kind).item() == pytest.approx(area_on_a_grid(pit, kind), abs=1e-5)


@given(seed=seeds, n=st.integers(1, 40))
@settings(deadline=None, max_examples=25)
def test_quantile_area_is_the_wasserstein_distance_to_uniform(seed: int, n: int) -> None:
    """Both are the area between distribution functions; against a uniform grid of 20 000 points."""
    pit = np.random.default_rng(seed).uniform(size=n)
    expected = stats.wasserstein_distance(pit, (np.arange(20_000) + 0.5) / 20_000)
    assert metrics.miscalibration_area(pit, "quantile").item() == pytest.approx(expected, abs=5e-5)


def test_area_of_extremes() -> None:
    middle, ends = torch.full((7,), 0.5), torch.tensor([0.0, 1.0])
    assert metrics.miscalibration_area(middle).item() == pytest.approx(0.5)  # far too wide
    assert metrics.miscalibration_area(ends).item() == pytest.approx(0.5)  # far too narrow
    even = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert metrics.miscalibration_area(even, "quantile").item() == pytest.approx(1 / 4000)


def test_a_bias_is_seen_by_quantiles_more_than_by_intervals() -> None:
    target = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    pit = metrics.pit_gaussian(np.full(2000, 0.5), np.ones(2000), target)
    quantile, interval = (metrics.miscalibration_area(pit, kind).item() for kind in ("quantile", "interval"))
    assert quantile > 2 * interval > 0.02


def test_area_is_differentiable() -> None:
    pit = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(metrics.miscalibration_area, pit)


def test_refuses() -> None:
    with pytest.raises(ArgumentError, match=r"pit ranges from -0\.1 to 0\.5"):
        metrics.miscalibration_area([-0.1, 0.5])
    with pytest.raises(ArgumentError, match="kind='both' is unknown"):
        metrics.miscalibration_area([0.5], "both")
    with pytest.raises(ArgumentError, match="NaN"):
        metrics.miscalibration_area([math.nan])
    with pytest.raises(ArgumentError, match="stddev has an entry 0"):
        metrics.pit_gaussian([0.0], [0.0], [0.0])
    with pytest.raises(ArgumentError, match="samples has shape"):
        metrics.pit_samples([1.0, 2.0], [1.0, 2.0])
