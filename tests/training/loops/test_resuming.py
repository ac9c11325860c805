"""A run that froze and unfroze parts of its model is resumed bit for bit; the state of another run is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError
from tests.helpers import seeded
from tests.training.loops.plain import BATCHES, assert_identical, gaussian, make, train


class Scaled(nn.Module):
    """Layers with scales that no adapter covers; they come before and after each other, in equal shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.PReLU(3), nn.Linear(3, 3)
        self.second, self.head = nn.PReLU(3), nn.Linear(3, 2)
        seeded(self)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.body(self.first(inputs))))


def optimizer_of(freeze: str = "", likelihood: Any = None, **options: Any) -> bk.NoisyKFAC:
    model = Scaled()
    for name in freeze.split():
        model.get_submodule(name).requires_grad_(False)
    likelihood = gaussian("learned") if likelihood is None else likelihood
    return make(model, likelihood, **{"others": "deterministic", "statistics_every": 1, **options})


def resume(optimizer: bk.NoisyKFAC, freeze: str = "", **options: Any) -> bk.NoisyKFAC:
    """New objects, in which some modules are frozen before the optimizer is made, with the state of others."""
    resumed = optimizer_of(freeze, **options)
    resumed.model.load_state_dict(optimizer.model.state_dict())
    resumed.likelihood.load_state_dict(optimizer.likelihood.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    return resumed


def unfreeze(optimizer: bk.NoisyKFAC) -> None:
    optimizer.model.requires_grad_(True)


def freeze(optimizer: bk.NoisyKFAC) -> None:
    optimizer.model.first.requires_grad_(False)
    optimizer.model.body.requires_grad_(False)


#: What was frozen at first, what happened then, and what is frozen where it is resumed.
HISTORIES = {
    "unfrozen": ("first", unfreeze, ""),
    "all unfrozen": ("first second", unfreeze, ""),
    "layers unfrozen": ("first body", unfreeze, ""),
    "frozen": ("", freeze, "first body"),
    "frozen both times": ("second", freeze, "first body second"),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_a_run_is_resumed_whatever_was_frozen_when(history):
    """And so it is after what is frozen is unfrozen again."""
    first, happened, now = HISTORIES[history]
    optimizer = train(optimizer_of(first), BATCHES[:2])
    happened(optimizer)
    train(optimizer, BATCHES[2:4])
    resumed = resume(optimizer, now)
    for each in (optimizer, resumed):
        train(each, BATCHES[:2])
        unfreeze(each)
        train(each, BATCHES[2:])
    assert_identical(resumed, optimizer)
    assert torch.equal(resumed.likelihood.noise_scale, optimizer.likelihood.noise_scale)


def test_a_resumed_run_and_the_one_that_went_on_share_no_memory():
    """Adam moves its moments in place."""
    optimizer = train(optimizer_of())
    before = {name: own["exp_avg"].clone() for name, own in optimizer._point_estimates.state_dict().items()}
    train(resume(optimizer))
    for name, own in optimizer._point_estimates.state_dict().items():
        assert torch.equal(own["exp_avg"], before[name])


def test_options_that_a_schedule_changed_are_resumed_with_a_frozen_layer():
    optimizer = optimizer_of()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(optimizer)
    schedule.step()
    freeze(optimizer)
    train(optimizer)
    resumed = resume(optimizer, "first body")
    assert [group["lr"] for group in resumed.param_groups] == [0.025, 0.005]
    unfreeze(resumed)
    train(resumed)
    assert [len(group["params"]) for group in resumed.param_groups] == [4, 3]


def renamed(state: dict[str, Any]) -> None:
    estimates = state["bayes_kfac"]["point_estimates"]
    estimates["third.weight"] = estimates.pop("first.weight")


def reshaped(state: dict[str, Any]) -> None:
    estimates = state["bayes_kfac"]["point_estimates"]
    estimates["first.weight"] = {key: value.reshape(-1)[:1] for key, value in estimates["first.weight"].items()}


def grouped(*names: str, **options: Any) -> bk.NoisyKFAC:
    model = Scaled()
    groups = [{"params": model.get_submodule(name).parameters()} for name in names]
    return make(model, gaussian("learned"), others="deterministic", groups=groups, **options)


def assert_refused(state: dict[str, Any], by: bk.NoisyKFAC, match: str) -> None:
    """With nothing changed."""
    options = [{**group, "params": len(group["params"])} for group in by.param_groups]
    with pytest.raises(ArgumentError, match=match):
        by.load_state_dict(state)
    assert by.steps == 0
    assert [{**group, "params": len(group["params"])} for group in by.param_groups] == options
    assert all(own.statistics is None for own in by.blocks.values())
    assert not any(by._point_estimates.state_dict().values())


@pytest.mark.parametrize(
    ("change", "likelihood", "match"),
    [
        (renamed, "learned", r"'third\.weight'\] but this optimizer trains \['first\.weight', 'likelihood"),
        (reshaped, "learned", r"shape \(1,\) for 'first\.weight', whose shape is \(3,\)"),
        (lambda state: None, 0.5, r"'likelihood\..*but this optimizer trains \['first\.weight', 'second\.weight'\]"),
    ],
)
def test_a_state_of_other_point_estimates_is_refused(change, likelihood, match):
    state = train(optimizer_of(lr=0.01)).state_dict()
    change(state)
    assert_refused(state, optimizer_of(likelihood=gaussian(likelihood)), match)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["head"], r"\[\['body'\], \['head'\], \[\]\].*\[\['head'\], \['body'\], \[\]\]"),
        (["body", "head"], r"\[\['body'\], \['head'\], \[\], \[\]\]"),
        ([], r"this one has \{'groups': \[\['body', 'head'\], \[\]\]\}"),
    ],
)
def test_a_state_of_other_groups_is_refused(names, match):
    """Also where their number is the same."""
    assert_refused(train(grouped("body", lr=0.01)).state_dict(), grouped(*names), match)
