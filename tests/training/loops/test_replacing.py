"""Modules that are replaced, inserted or removed between steps: what is new begins afresh, the rest goes on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayes_kfac as bk
from tests.helpers import randn, seeded
from tests.training.loops.plain import BATCHES, EXAMPLES, N, Net, X, assert_identical, gaussian, make, train


def head_of(outputs: int = 2) -> nn.Linear:
    return seeded(nn.Linear(5, outputs), 3)


def batches(outputs: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(x, randn(EXAMPLES, outputs, seed=20 + i)) for i, (x, _) in enumerate(BATCHES)]


@pytest.mark.parametrize("options", [{}, {"warmup": False}, {"extrinsic_damping": 0.1}, {"momentum": 0.0}])
@pytest.mark.parametrize("outputs", [2, 3])
def test_a_new_head_begins_afresh_and_the_body_goes_on(outputs, options):
    """Also where its shape is that of the old one, whose statistics and momentum are not its own."""
    optimizer = train(make(Net(), statistics_every=1, **options), BATCHES)
    body = optimizer.blocks["body"]
    old = optimizer.model.head
    optimizer.model.head = head_of(outputs)
    train(optimizer, batches(outputs)[:1])
    decay, blocks = 0.99, optimizer.blocks
    assert blocks["head"].statistics.counts["gradient"] == pytest.approx(EXAMPLES * (1 - decay))
    assert blocks["head"].momentum_weight == pytest.approx(1 - options.get("momentum", 0.9))
    assert blocks["head"].momentum.shape == (outputs, 6)
    assert blocks["body"].statistics.counts["gradient"] == pytest.approx(
        body.statistics.counts["gradient"] * decay + EXAMPLES * (1 - decay)
    )
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(optimizer.model.parameters())
    assert not held & set(old.parameters())
    before = optimizer.model.head.weight.detach().clone()
    train(optimizer, batches(outputs)[1:])
    assert not torch.equal(optimizer.model.head.weight, before)
    assert optimizer.posterior().predict(X).epistemic_variance.shape == (4, outputs)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_new_parameter_in_an_old_module_is_a_new_layer(name):
    optimizer = train(make(Net(), statistics_every=1))
    head = optimizer.model.head
    setattr(head, name, nn.Parameter(torch.zeros_like(getattr(head, name))))
    train(optimizer, BATCHES[:1])
    assert optimizer.blocks["head"].statistics.counts["gradient"] == pytest.approx(EXAMPLES * 0.01)
    assert getattr(head, name).any()


def test_a_head_that_is_replaced_while_frozen_begins_afresh():
    optimizer = train(make(Net(), statistics_every=1))
    optimizer.model.head.requires_grad_(False)
    train(optimizer)
    optimizer.model.head = head_of().requires_grad_(False)
    train(optimizer)
    optimizer.model.head.requires_grad_(True)
    train(optimizer, BATCHES[:1])
    assert optimizer.blocks["head"].statistics.counts["gradient"] == pytest.approx(EXAMPLES * 0.01)


def sequential() -> nn.Sequential:
    return seeded(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))


@pytest.mark.parametrize("structure", ["kron", "tridiagonal", "dense"])
@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda model: model.insert(0, seeded(nn.Linear(3, 3))), ["0", "1", "3"]),
        (lambda model: model.insert(2, seeded(nn.Linear(5, 5))), ["0", "2", "3"]),
        (lambda model: model.append(seeded(nn.Linear(2, 2))), ["0", "2", "3"]),
        (lambda model: model.pop(1), ["0", "1"]),
    ],
    ids=["inserted first", "inserted", "appended", "removed"],
)
def test_modules_that_come_and_go_shift_the_names_of_others(change, names, structure, warmup):
    optimizer = train(natural(sequential(), structure=structure, warmup=warmup))
    change(optimizer.model)
    before = [parameter.detach().clone() for parameter in optimizer.model.parameters()]
    train(optimizer)
    assert list(optimizer.blocks) == names
    assert not any(torch.equal(a, b) for a, b in zip(before, optimizer.model.parameters(), strict=True))
    assert optimizer.posterior().predict(X).epistemic_variance.min() > 0


def test_layers_whose_names_shift_go_on_and_so_does_a_run_that_is_resumed_then():
    """One of them is frozen while its name shifts."""
    optimizer = train(make(sequential(), statistics_every=1))
    first, last = optimizer.blocks.values()
    optimizer.model[0].requires_grad_(False)
    train(optimizer, BATCHES[:1])
    optimizer.model.insert(0, seeded(nn.Linear(3, 3)))
    train(optimizer, BATCHES[:1])
    model = sequential().insert(0, seeded(nn.Linear(3, 3)))
    model[1].requires_grad_(False)
    resumed = make(model, statistics_every=1)
    resumed.model.load_state_dict(optimizer.model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        each.model.requires_grad_(True)
        train(each, BATCHES[:1])
    assert_identical(resumed, optimizer)
    weights = {name: state.momentum_weight for name, state in optimizer.blocks.items()}
    after = [1 - 0.9**2, 0.9 * first.momentum_weight + 0.1, 0.9**3 * last.momentum_weight + 1 - 0.9**3]
    assert weights == pytest.approx(dict(zip(["0", "1", "3"], after, strict=True)))


def natural(model: nn.Module, **options: Any) -> bk.NoisyNaturalGradient:
    defaults = {"num_data": N, "lr": 0.05, "fisher": "exact", "statistics_every": 3, "inverse_every": 3}
    return bk.NoisyNaturalGradient(model, gaussian(), **{**defaults, **options})


@pytest.mark.parametrize("kind", [bk.NaturalGradient, bk.AdaptiveNaturalGradient])
@pytest.mark.parametrize("outputs", [2, 3])
def test_training_without_noise_takes_up_a_new_head_as_a_new_optimizer_does(kind, outputs):
    """A model of one layer: nothing of the old head is in the new one's first steps."""
    optimizer, model = kind(Net(), gaussian(), num_data=N, fisher="exact"), None
    train(optimizer)
    optimizer.model.body.requires_grad_(False)
    train(optimizer)
    optimizer.model.head = head_of(outputs)
    model = copy.deepcopy(optimizer.model)
    train(optimizer, batches(outputs)[:1])
    assert list(optimizer.layers) == ["head"]
    options = {"initial_damping": optimizer.damping} if kind is bk.AdaptiveNaturalGradient else {}
    fresh = kind(model, gaussian(), num_data=N, fisher="exact", **options)
    train(fresh, batches(outputs)[:1])
    assert torch.equal(fresh.model.head.weight, optimizer.model.head.weight)


def estimated(activation: nn.Module | None = None) -> bk.NoisyKFAC:
    likelihood = gaussian("learned")
    return make(Net(activation=nn.PReLU(5) if activation is None else activation), likelihood, others="deterministic")


@pytest.mark.parametrize("count", [5, 1])
def test_a_new_point_estimate_is_trained_and_the_old_is_let_go(count):
    optimizer = train(estimated())
    old = optimizer.model.act.weight
    was, noise = old.detach().clone(), optimizer.likelihood.noise_scale.clone()
    optimizer.model.act = nn.PReLU(count).double()
    train(optimizer)
    assert not torch.equal(optimizer.model.act.weight, torch.full((count,), 0.25, dtype=torch.float64))
    assert torch.equal(old, was)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]
    assert all(parameter is not old for group in optimizer.param_groups for parameter in group["params"])
    steps = {name: int(own["step"]) for name, own in optimizer._point_estimates.state_dict().items()}
    assert steps == {"act.weight": len(BATCHES), "likelihood.noise.log_scale": 2 * len(BATCHES)}
    assert not torch.equal(optimizer.likelihood.noise_scale, noise)


def test_point_estimates_that_are_removed_leave_nothing_behind():
    optimizer = train(estimated())
    optimizer.model.act = nn.Tanh()
    train(optimizer)
    assert list(optimizer._point_estimates.state_dict()) == ["likelihood.noise.log_scale"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 1]


def test_of_the_parameters_that_were_chosen_those_that_are_still_there_are_trained():
    model = Net()
    optimizer = train(make(model, params=list(model.parameters())))
    model.head = head_of()
    train(optimizer)
    assert list(optimizer.layers) == ["body"]
    assert torch.equal(model.head.weight, head_of().weight)


SAME: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda model: None,
    "a move": lambda model: model.to("cpu", torch.float64),
    "swapped data": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
    "loaded": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "frozen and unfrozen": lambda model: model.requires_grad_(False).requires_grad_(True),
}


@pytest.mark.parametrize("change", SAME)
def test_parameters_that_stay_themselves_go_on(change):
    optimizer, expected = train(estimated()), train(estimated())
    SAME[change](optimizer.model)
    assert_identical(train(optimizer), train(expected))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_knows_its_own_parameters_again(copied):
    """One of its layers was set aside when it was made."""
    optimizer = train(estimated())
    optimizer.model.body.requires_grad_(False)
    train(optimizer)
    twin = copied(optimizer)
    for each in (optimizer, twin):
        each.model.requires_grad_(True)
        train(each)
    assert_identical(twin, optimizer)
    assert twin.blocks["body"].momentum_weight == pytest.approx(1 - 0.9 ** (2 * len(BATCHES)))


def test_a_checkpoint_of_a_replaced_head_is_resumed():
    optimizer = train(make(Net()))
    optimizer.model.head = head_of(3)
    train(optimizer, batches(3)[:2])
    model = Net()
    model.head = head_of(3)
    resumed = make(model)
    resumed.model.load_state_dict(optimizer.model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert_identical(train(resumed, batches(3)), train(optimizer, batches(3)))
