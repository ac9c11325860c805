"""Schedules say on which steps something is due."""

from __future__ import annotations

import pytest

from bayes_kfac.errors import ArgumentError
from bayes_kfac.training.schedules import Every


def test_every_is_periodic_and_denser_at_the_start():
    assert [step for step in range(35) if Every(10).is_due(step)] == [0, 1, 2, 4, 8, 10, 20, 30]
    assert all(Every(1).is_due(step) for step in range(5))


def test_period_is_checked():
    with pytest.raises(ArgumentError, match="period=0"):
        Every(0)
