"""Turns end where nothing moves any more, and neither sooner nor much later."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from bayes_kfac.structures.alternating import PATIENCE, SWEEPS, TOLERANCE, alternated, settled
from tests.helpers import TIGHT, randn


def movements(values: list[float]) -> int:
    """How many sweeps there are that move by these, and by the last of them from then on."""
    count = 0

    def sweep(sides: int) -> tuple[int, float]:
        nonlocal count
        count += 1
        return sides + 1, values[min(sides, len(values) - 1)]

    assert settled(sweep, 0) == count
    return count


def test_two_sides_fit_each_other():
    """Sinkhorn's scaling of a matrix to sums of one."""
    matrix = randn(4, 4, seed=0).exp()
    row, column = alternated(lambda v: 1 / (matrix @ v), lambda u: 1 / (matrix.mT @ u), torch.ones(4).double())
    scaled = row[:, None] * matrix * column
    assert_close(scaled.sum(0), torch.ones(4).double(), **TIGHT)
    assert_close(scaled.sum(1), torch.ones(4).double(), rtol=0, atol=10 * TOLERANCE)


def test_the_end_is_below_the_tolerance():
    assert movements([1.0, 1e-3, 1e-6, TOLERANCE / 2, 1.0]) == 4


def test_first_sweeps_that_move_further_are_not_the_end():
    assert movements([0.1, 0.2, 0.15, 0.01, 0.0]) == 5


@pytest.mark.parametrize("rest", [1e-7, math.nan])
def test_rounding_and_nan_are_the_end(rest):
    assert movements([1.0, rest]) <= 2 + PATIENCE


def test_slow_progress_goes_on():
    assert movements([0.999**index for index in range(SWEEPS)]) == SWEEPS
