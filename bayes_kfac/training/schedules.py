"""Schedules: on which steps the optimizer does what it need not do on every step, and for which layers.

:class:`Every` is a fixed period. The others look at the running averages of the statistics: :class:`WhileAlike` waits
longer and longer while they stay alike, :class:`OnTraceChange` until their trace has moved.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import Statistics
from bayes_kfac.errors import ArgumentError, check_count, check_positive

Averages = Mapping[str, Statistics]


class Schedule(ABC):
    """Says what is due, and is told what was done."""

    @abstractmethod
    def due(self, step: int, averages: Averages) -> set[str]:
        """The layers for which something is to happen on a step, counted from 0.

        Args:
            step: The step.
            averages: The running averages as they are.

        Returns:
            Their names.
        """

    def done(self, step: int, averages: Averages) -> None:
        """Take note of what has happened.

        Args:
            step: The step.
            averages: The running averages of the layers that it happened to.
        """
        return  # a fixed schedule need not know

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers that a later :meth:`load_state_dict` goes on from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        return


@dataclass(frozen=True)
class Every(Schedule):
    """Every ``period`` steps, and more often at the start: on steps 0, 1, 2, 4, 8, ... below the period.

    A moving average changes fastest while it is young; without the early steps the first statistics of a single batch
    would rule for a whole period.

    Attributes:
        period: The number of steps between two events.

    Example:
        >>> from bayes_kfac.training.schedules import Every
        >>> [step for step in range(30) if Every(10).is_due(step)]
        [0, 1, 2, 4, 8, 10, 20]
    """

    period: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "period", check_count("period", self.period))

    def is_due(self, step: int) -> bool:
        """Whether something happens on this step, counted from 0."""
        is_power_of_two = step & (step - 1) == 0
        return step % self.period == 0 or (step < self.period and is_power_of_two)

    def due(self, step: int, averages: Averages) -> set[str]:  # noqa: D102
        return set(averages) if self.is_due(step) else set()


@dataclass
class _Interval:
    """What :class:`WhileAlike` knows of a layer."""

    next: int
    current: int = 1
    before: int = 1
    seen: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass
class WhileAlike(Schedule):
    """The less a layer's statistics change, the longer until they are taken again (SP-NGD: Osawa et al. 2019, §5.2).

    Where they differ from the last ones by less than ``threshold`` in the Frobenius norm, relatively, and from those
    before too, the interval becomes the sum of the last two; where they differ from the last, half of it.

    Attributes:
        threshold: How much is alike.
        most: The longest interval, in steps.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> from bayes_kfac.training.schedules import OnTraceChange, WhileAlike
        >>> optimizer = bk.NoisyKFAC(
        ...     torch.nn.Linear(2, 1), bk.likelihoods.Gaussian(), num_data=10,
        ...     statistics_every=WhileAlike(threshold=0.1, most=100), inverse_every=OnTraceChange(every=5),
        ... )
        >>> optimizer.is_measuring  # nothing was measured yet
        True
    """

    threshold: float = 0.1
    most: int = 1000
    _layers: dict[str, _Interval] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        self.most = check_count("most", self.most)

    def due(self, step: int, averages: Averages) -> set[str]:  # noqa: D102
        return {name for name in averages if name not in self._layers or self._layers[name].next <= step}

    def done(self, step: int, averages: Averages) -> None:  # noqa: D102
        for name, statistics in averages.items():
            own = self._layers.setdefault(name, _Interval(step))
            now = _matrices(statistics)
            alike = [_difference(now, earlier) < self.threshold for earlier in own.seen]
            if alike != [] and not alike[0]:
                current = max(1, own.current // 2)
            elif len(alike) > 1 and alike[1]:
                current = min(self.most, own.current + own.before)
            else:
                current = own.current
            self._layers[name] = _Interval(step + current, current, own.current, [now, *own.seen[:1]])

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {name: vars(own) for name, own in self._layers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._layers = {name: _Interval(**own) for name, own in state.items()}


@dataclass
class OnTraceChange(Schedule):
    """When the trace of a layer's statistics has changed enough since the last time (THOR: Chen et al. 2021).

    Attributes:
        threshold: The relative change of a statistic's trace that is enough.
        every: Steps between two looks.
    """

    threshold: float = 0.01
    every: int = 10
    _traces: dict[str, dict[str, float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        self.every = check_count("every", self.every)

    def due(self, step: int, averages: Averages) -> set[str]:  # noqa: D102
        if not Every(self.every).is_due(step):
            return set()
        return {name for name, own in averages.items() if self._has_moved(name, _traces(own))}

    def done(self, step: int, averages: Averages) -> None:  # noqa: D102
        self._traces |= {name: _traces(own) for name, own in averages.items()}

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {name: dict(own) for name, own in self._traces.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._traces = {name: dict(own) for name, own in state.items()}

    def _has_moved(self, name: str, traces: Mapping[str, float]) -> bool:
        before = self._traces.get(name, {})
        return before.keys() != traces.keys() or any(
            traces[key] != before[key] and abs(traces[key] - before[key]) >= self.threshold * abs(before[key])
            for key in traces
        )


def as_schedule(name: str, value: SupportsIndex | Schedule) -> Schedule:
    """A schedule from an argument: a period, or a schedule of the user's.

    Args:
        name: The argument's name, for the message.
        value: The argument.

    Returns:
        The schedule.

    Raises:
        ArgumentError: If it is neither.
    """
    if isinstance(value, Schedule):
        return copy.deepcopy(value)  # what it takes note of is of one training
    if not isinstance(value, Integral):
        raise ArgumentError(f"{name}={value!r} is not allowed. Allowed: a whole number >= 1, or a Schedule.")
    return Every(check_count(name, value))


def dump_schedule(schedule: Schedule) -> dict[str, Any]:
    """A schedule's state, with its kind."""
    return {"kind": type(schedule).__name__, "state": schedule.state_dict()}


def load_schedule(schedule: Schedule, dumped: Mapping[str, Any]) -> None:
    """Go on from :func:`dump_schedule`, or begin anew where that was of another kind.

    Args:
        schedule: The schedule.
        dumped: The dump; one of before there were kinds is the state alone.
    """
    kind = type(schedule).__name__
    if dumped.get("kind", kind) == kind:
        schedule.load_state_dict(dumped.get("state", dumped))


def _difference(now: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> float:
    """``‖X − Y‖ / ‖Y‖`` in the Frobenius norm, the largest of all statistics; infinite where shapes differ."""
    if {key: value.shape for key, value in now.items()} != {key: value.shape for key, value in earlier.items()}:
        return float("inf")
    each = [
        torch.linalg.vector_norm(value - earlier[key]) / torch.linalg.vector_norm(earlier[key])
        for key, value in now.items()
        if bool(earlier[key].any() | value.any())
    ]
    return float(torch.stack(each).max()) if each else 0.0


def _matrices(statistics: Statistics) -> dict[str, Tensor]:
    """The averages, in shapes that do not change; of those that are kept as columns the diagonal."""
    plain = {key: statistics.mean(key) for key in statistics.sums}
    return plain | {key: statistics.mean_columns(key).diagonal() for key in statistics.columns}


def _traces(statistics: Statistics) -> dict[str, float]:
    """The trace of each statistic; of one that is no square matrix, the sum of its elements."""
    found = {}
    for key, value in _matrices(statistics).items():
        is_square = value.ndim > 1 and value.shape[-1] == value.shape[-2]
        found[key] = float((linalg.trace(value) if is_square else value).sum())
    return found
