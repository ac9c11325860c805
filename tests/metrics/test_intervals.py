"""Interval scores against loops and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bayes_kfac import metrics
from tests.metrics.data import seeds


def test_coverage_includes_boundaries() -> None:
    lower, upper = [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    assert metrics.coverage(lower, upper, [0.0, 1.0, 0.5, 1.1]).item() == pytest.approx(0.75)


def test_coverage_takes_infinite_ends() -> None:
    assert metrics.coverage([-math.inf, 0.0], [0.0, math.inf], [-1e30, 1e30]).item() == 1


def test_sharpness() -> None:
    assert metrics.sharpness([0.0, -1.0], [1.0, 2.0]).item() == pytest.approx(2)


def test_interval_score_by_hand() -> None:
    # Width 2 each; a miss costs 2 / 0.1 = 20 times its distance, below as well as above.
    score = metrics.interval_score([0.0] * 3, [2.0] * 3, [1.0, -0.5, 2.25], level=0.9)
    assert score.item() == pytest.approx((2 + (2 + 10) + (2 + 5)) / 3)


@given(seed=seeds, level=st.floats(0, 0.99))
@settings(deadline=None, max_examples=30)
def test_interval_score_against_loop(seed: int, level: float) -> None:
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.normal(size=(20, 2)), axis=1)
    target = rng.normal(size=20) * 2
    expected = 0.0
    for (lower, upper), y in zip(ends, target, strict=True):
        expected += upper - lower
        if y < lower:
            expected += 2 / (1 - level) * (lower - y)
        if y > upper:
            expected += 2 / (1 - level) * (y - upper)
    score = metrics.interval_score(ends[:, 0], ends[:, 1], target, level)
    assert score.item() == pytest.approx(expected / 20)


def test_interval_score_is_least_at_true_quantiles() -> None:
    level = 0.8
    # A fine grid of quantiles stands for the population.
    target = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)

    def score(half_width: float, shift: float = 0.0) -> float:
        lower, upper = np.full_like(target, shift - half_width), np.full_like(target, shift + half_width)
        return metrics.interval_score(lower, upper, target, level).item()

    best = stats.norm.ppf((1 + level) / 2)
    for half_width, shift in [(0.95 * best, 0), (1.05 * best, 0), (best, 0.1), (best, -0.1)]:
        assert score(best) < score(half_width, shift)
