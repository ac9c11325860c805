"""Schedules say on which steps something is due."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bayes_kfac as bk
from bayes_kfac.curvature import LeadingColumns, Statistics
from bayes_kfac.errors import ArgumentError
from bayes_kfac.training.schedules import Every, OnTraceChange, Schedule, WhileAlike, as_schedule
from tests.helpers import randn, rng, seeded


def test_every_is_periodic_and_denser_at_the_start():
    assert [step for step in range(35) if Every(10).is_due(step)] == [0, 1, 2, 4, 8, 10, 20, 30]
    assert all(Every(1).is_due(step) for step in range(5))


def test_period_is_checked():
    with pytest.raises(ArgumentError, match="period=0"):
        Every(0)


# Schedules that look at the statistics


def averages(*values: float) -> dict[str, Statistics]:
    """One layer for each value, whose factor is that multiple of the identity."""
    return {
        f"layer{i}": Statistics(
            {"input": value * torch.eye(2), "gradient": torch.eye(3)}, {"input": 1.0, "gradient": 1.0}
        )
        for i, value in enumerate(values)
    }


def taken(schedule: Schedule, series: list[float]) -> list[int]:
    """The steps on which a layer whose average goes through these values is due."""
    found = []
    for step, value in enumerate(series):
        if schedule.due(step, averages(value)):
            schedule.done(step, averages(value))
            found.append(step)
    return found


def test_intervals_grow_as_fibonaccis_while_statistics_are_alike():
    assert taken(WhileAlike(), [1.0] * 40) == [0, 1, 2, 4, 7, 12, 20, 33]
    assert taken(WhileAlike(most=4), [1.0] * 20) == [0, 1, 2, 4, 7, 11, 15, 19]


def test_periods_of_numpy_are_kept_as_pythons():
    """In the state too, which is to be loaded with ``weights_only=True``."""
    schedule = WhileAlike(most=np.int64(4))
    assert taken(schedule, [1.0] * 20) == [0, 1, 2, 4, 7, 11, 15, 19]
    assert type(schedule.state_dict()["layer0"]["current"]) is int
    assert type(OnTraceChange(every=np.int64(4)).every) is type(as_schedule("inverse_every", np.int64(4)).period) is int


def test_intervals_halve_where_statistics_change():
    series = [1.0] * 20 + [2.0] * 10
    assert taken(WhileAlike(), series) == [0, 1, 2, 4, 7, 12, 20, 24, 28]


def test_statistics_that_always_change_are_taken_always():
    assert taken(WhileAlike(), [2.0**k for k in range(8)]) == list(range(8))


def test_layers_have_intervals_of_their_own():
    schedule = WhileAlike()
    due = []
    for step in range(9):
        now = averages(1.0, 2.0**step)
        due.append(sorted(schedule.due(step, now)))
        schedule.done(step, {name: now[name] for name in due[-1]})
    assert [names.count("layer1") for names in due] == [1] * 9
    assert [step for step, names in enumerate(due) if "layer0" in names] == [0, 1, 2, 4, 7]


def test_a_trace_that_has_moved_is_due_at_the_next_look():
    series = [1.0, 1.0, 1.0, 1.0, 1.005, 1.005, 1.02, 1.02, 1.02, 1.0, 1.0]
    assert taken(OnTraceChange(0.01, every=2), series) == [0, 6, 10]


def test_a_trace_of_zero_that_stays_zero_has_not_moved():
    assert taken(OnTraceChange(every=1), [0.0] * 5) == [0]
    zero = {"layer": Statistics({"lag": torch.zeros(2, 2)}, {"lag": 1.0})}
    schedule = OnTraceChange(every=1)
    schedule.done(0, zero)
    assert schedule.due(1, zero) == set()
    assert schedule.due(2, {"layer": Statistics({"lag": torch.eye(2)}, {"lag": 1.0})}) == {"layer"}


@pytest.mark.parametrize("make", [WhileAlike, OnTraceChange])
def test_a_schedule_that_serves_two_trainings_is_fresh_in_each(make):
    given = make()
    one, other = (
        bk.NoisyKFAC(
            nn.Linear(2, 1), bk.likelihoods.Gaussian(), num_data=10, statistics_every=given, inverse_every=given
        )
        for _ in range(2)
    )
    schedules = [one.statistics_schedule, one.inverse_schedule, other.statistics_schedule, other.inverse_schedule]
    assert [taken(schedule, [1.0] * 10) for schedule in schedules] == [taken(make(), [1.0] * 10)] * 4


@pytest.mark.parametrize("schedule", [WhileAlike(), OnTraceChange(0.01, every=1)])
def test_a_schedule_goes_on_from_its_state(schedule):
    taken(schedule, [1.0] * 6)
    again = type(schedule)()
    again.load_state_dict(schedule.state_dict())
    for step in range(6, 20):
        assert schedule.due(step, averages(1.0)) == again.due(step, averages(1.0))


@pytest.mark.parametrize("schedule", [WhileAlike(), OnTraceChange(0.01, every=1)])
def test_statistics_that_are_kept_as_columns_count_too(schedule):
    """They are no sums: a schedule that saw sums alone would take them for unchanged, or never be due."""
    found = []
    for step in range(6):
        columns = LeadingColumns.of(2.0**step * torch.eye(4).reshape(4, 2, 2), 8)
        now = {"layer": Statistics({}, {"fisher": 1.0}, columns={"fisher": columns})}
        if schedule.due(step, now):
            schedule.done(step, now)
            found.append(step)
    assert found == list(range(6))


@pytest.mark.parametrize("value", [0, 2.5, "often"])
def test_what_is_no_schedule_is_refused(value):
    with pytest.raises(ArgumentError, match="statistics_every="):
        as_schedule("statistics_every", value)


def test_training_goes_by_them_and_resumes_bit_for_bit():
    """Few measurements and refreshes, each layer's at its own time; the checkpoint knows them."""

    def make() -> bk.NoisyKFAC:
        model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
        return bk.NoisyKFAC(
            model,
            bk.likelihoods.Gaussian(0.5),
            num_data=30,
            statistics_every=WhileAlike(0.5),
            inverse_every=OnTraceChange(0.2, every=2),
            generator=rng(0),
        )

    x, y = randn(30, 3, seed=1), randn(30, 1, seed=2)

    def run(optimizer: bk.NoisyKFAC, steps: int) -> list[bool]:
        measured = []
        for _ in range(steps):
            measured.append(optimizer.is_measuring)
            with optimizer.sampled_params():
                optimizer.zero_grad()
                optimizer.likelihood(optimizer.model(x), y).backward()
            optimizer.step()
        return measured

    optimizer = make()
    measured = run(optimizer, 30)
    assert measured[:2] == [True, True]
    assert sum(measured) < 20
    saved = optimizer.model.state_dict(), optimizer.state_dict()
    resumed = make()
    resumed.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert run(optimizer, 10) == run(resumed, 10)
    for mine, theirs in zip(optimizer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_layer_is_averaged_over_its_own_time():
    """Measured every other step, a layer's average forgets at the same rate per step as one measured on each."""

    class Alternate(Schedule):
        def due(self, step: int, averages: dict[str, Statistics]) -> set[str]:
            return set(averages) if step % 2 == 0 else {"0"}

    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    optimizer = bk.NoisyKFAC(
        model,
        bk.likelihoods.Gaussian(0.5),
        num_data=30,
        statistics_every=Alternate(),
        statistics_decay=0.9,
        warmup=False,
    )
    x, y = randn(30, 3, seed=1), randn(30, 1, seed=2)
    for _ in range(5):
        optimizer.step(lambda: _closure(optimizer, x, y))
    assert {name: state.age for name, state in optimizer.blocks.items()} == {"0": 0, "2": 0}
    weights = {name: state.identity_weight for name, state in optimizer.blocks.items()}
    assert weights == pytest.approx({"0": 0.9**5, "2": 0.9**5})


def _closure(optimizer: bk.NoisyKFAC, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = optimizer.likelihood(optimizer.model(x), y)
    loss.backward()
    return loss
