"""Schedules: on which steps the optimizer does what it need not do on every step."""

from __future__ import annotations

from dataclasses import dataclass

from bayes_kfac.errors import check_count


@dataclass(frozen=True)
class Every:
    """Every ``period`` steps, and more often at the start: on steps 0, 1, 2, 4, 8, ... below the period.

    A moving average changes fastest while it is young; without the early steps the first statistics of a single batch
    would rule for a whole period.

    Attributes:
        period: The number of steps between two events.
    """

    period: int

    def __post_init__(self) -> None:
        check_count("period", self.period)

    def is_due(self, step: int) -> bool:
        """Whether something happens on this step, counted from 0."""
        is_power_of_two = step & (step - 1) == 0
        return step % self.period == 0 or (step < self.period and is_power_of_two)
