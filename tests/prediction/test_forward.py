"""Calling a model with weights that are not its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac.errors import ArgumentError, BayesKfacError
from bayes_kfac.prediction.forward import call, differentiable, evaluating, training
from tests.helpers import randn, seeded


class Scaled(nn.Module):
    """``scale · (left + right)`` with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, left: Tensor, right: Tensor | None = None, *, wrap: Any = None) -> Any:
        total = self.scale * (left if right is None else left + right) + self.shift
        return total if wrap is None else wrap(total)


@pytest.mark.parametrize("mode", [evaluating, training])
def test_every_module_gets_its_own_mode_back(mode: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)), nn.Linear(3, 3))
    model.train()
    model[1].eval()
    model[1][0].train()
    modes = [module.training for module in model.modules()]
    with mode(model):
        assert {module.training for module in model.modules()} == {mode is training}
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (torch.ones(3), 2.5),
        ((torch.ones(3),), 2.5),
        ((torch.ones(3), torch.ones(3)), 4.5),
        ({"left": torch.ones(3)}, 2.5),
        ({"right": torch.zeros(3), "left": torch.ones(3)}, 2.5),
    ],
)
def test_one_argument_a_tuple_or_keywords(inputs: Any, expected: float) -> None:
    assert_close(call(Scaled(), {}, inputs).detach(), torch.full((3,), expected))


def test_parameters_and_buffers_are_replaced_for_one_call() -> None:
    """What is not given is the model's own."""
    model = Scaled()
    assert_close(call(model, {"scale": torch.tensor(10.0)}, torch.ones(3)), torch.full((3,), 10.5))
    assert_close(call(model, {"shift": torch.tensor(0.0)}, torch.ones(3)).detach(), torch.full((3,), 2.0))
    assert model.scale.item() == 2.0
    assert model.shift.item() == 0.5
    assert isinstance(model.scale, nn.Parameter)


def test_tied_weights_are_replaced_together() -> None:
    """One name of a tied weight stands for all of its places."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    result = call(model, {"0.weight": 3 * torch.eye(2)}, torch.ones(1, 2))
    assert_close(result, torch.full((1, 2), 9.0))


@pytest.mark.parametrize("wrap", [lambda y: {"logits": y, "loss": y.sum()}, lambda y: (y, None), lambda y: [y]])
def test_an_output_may_stand_out_in_a_collection(wrap: Any) -> None:
    assert_close(call(Scaled(), {}, {"left": torch.ones(3), "wrap": wrap}).detach(), torch.full((3,), 2.5))


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (lambda y: (y, y), "tuple"),
        (lambda y: {"left": y, "right": y}, "dict"),
        (lambda y: y.sum(), "Tensor"),
        (lambda y: None, "NoneType"),
    ],
)
def test_outputs_without_a_batch_are_refused(wrap: Any, kind: str) -> None:
    """The error names what came out and what to do about it."""
    with pytest.raises(ArgumentError, match=rf"returned {kind}.*Wrap the model") as caught:
        call(Scaled(), {}, {"left": torch.ones(1), "wrap": wrap})
    assert isinstance(caught.value, BayesKfacError)


def test_differentiable_copies_inference_tensors_only() -> None:
    ordinary = randn(3, seed=0)
    assert differentiable(ordinary) is ordinary
    with torch.inference_mode():
        made = ordinary.clone()
    copied = differentiable(made)
    assert not copied.is_inference()
    assert torch.equal(copied, ordinary)


def test_root_module_may_be_a_layer() -> None:
    model = seeded(nn.Linear(3, 2))
    x = randn(4, 3, seed=1)
    state = {"weight": randn(2, 3, seed=2), "bias": randn(2, seed=3)}
    assert_close(call(model, state, x), x @ state["weight"].T + state["bias"])
