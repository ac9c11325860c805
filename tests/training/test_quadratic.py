"""The quadratic model is that of the dense Fisher, and damping follows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.curvature import output_gradients
from bayes_kfac.training.quadratic import LevenbergMarquardt, QuadraticModel, fisher_products
from tests.helpers import TIGHT, parameter_jacobians, randn, seeded


class Recurrent(nn.Module):
    """The last state of an LSTM, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


NETS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), randn(6, 3, seed=1)),
    "cnn": lambda: (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)),
        randn(6, 1, 4, 4, seed=1),
    ),
    "batch norm": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)),
        randn(6, 3, seed=1),
    ),
    "recurrent": lambda: (Recurrent(), randn(6, 5, 3, seed=1)),
}


def directions_for(model: nn.Module, count: int = 2) -> list[dict[str, Tensor]]:
    return [
        {name: randn(*p.shape, seed=100 * k + i) for i, (name, p) in enumerate(model.named_parameters())}
        for k in range(count)
    ]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_products_are_those_of_the_dense_fisher(net, kind):
    """``D F Dᵀ`` with ``F = E Σ_c Jᵀ b_c b_cᵀ J`` by torch.func; recurrences have no forward derivatives."""
    model, x = NETS[net]()
    seeded(model)
    likelihood = {"gaussian": bk.likelihoods.Gaussian(0.7), "categorical": bk.likelihoods.Categorical()}[kind].double()
    directions = directions_for(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    products = fisher_products(model, likelihood, x, directions)
    output = model(x)
    columns = output_gradients(likelihood, output, "exact").flatten(2)
    derivatives = parameter_jacobians(model, x, dict(model.named_parameters()))
    along = [
        sum((derivatives[name].flatten(2) * direction[name].flatten()).sum(-1) for name in direction)
        for direction in directions
    ]
    rows = torch.stack([torch.einsum("cno,no->cn", columns, own).flatten() for own in along])
    assert_close(products, (rows @ rows.T / len(x)).detach(), **TIGHT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_examples_outside_of_a_mask_do_not_count():
    model, x = NETS["mlp"]()
    seeded(model)
    likelihood, directions = bk.likelihoods.Gaussian(0.7).double(), directions_for(model)
    mask = torch.tensor([True, True, False, True, False, True])
    assert_close(
        fisher_products(model, likelihood, x, directions, mask),
        fisher_products(model, likelihood, x[mask], directions),
        **TIGHT,
    )


def test_the_minimum_is_the_loss_own_where_it_is_quadratic():
    """A linear model with Gaussian noise: gradient and model lead to the least squares along the directions."""
    model, x, y = seeded(nn.Linear(3, 2)), randn(20, 3, seed=1), randn(20, 2, seed=2)
    likelihood = bk.likelihoods.Gaussian(0.5).double()
    directions = directions_for(model)
    loss = likelihood(model(x), y)
    gradients = dict(zip(["weight", "bias"], torch.autograd.grad(loss, list(model.parameters())), strict=True))
    slope = torch.stack([sum((gradients[n] * own[n]).sum() for n in gradients) for own in directions])
    quadratic = QuadraticModel(slope.detach(), fisher_products(model, likelihood, x, directions))
    coefficients = quadratic.minimum()

    def at(c: Tensor) -> Tensor:
        changed = {n: p + sum(c[k] * directions[k][n] for k in range(2)) for n, p in model.named_parameters()}
        return likelihood(torch.func.functional_call(model, changed, (x,)), y)

    best = coefficients.clone().requires_grad_()
    (slope_there,) = torch.autograd.grad(at(best), best)
    assert_close(slope_there, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(quadratic.at(coefficients), (at(coefficients) - loss).detach(), **TIGHT)


def test_a_direction_of_zero_gets_no_coefficient():
    """The first step has no step before it."""
    quadratic = QuadraticModel(torch.tensor([-2.0, 0.0]), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert_close(quadratic.minimum(), torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize(
    ("promised", "found", "change"),
    [
        (-1.0, -0.9, "falls"),
        (-1.0, -0.5, "stays"),
        (-1.0, -0.1, "grows"),
        (-1.0, 0.3, "grows"),
        (-1.0, float("nan"), "grows"),
        (0.0, 0.0, "grows"),
    ],
)
def test_damping_follows_how_much_of_the_promise_comes_true(promised, found, change):
    rule = LevenbergMarquardt(damping=2.0, every=5)
    rule.observe(promised, found)
    expected = {"falls": 2.0 * 0.95**5, "stays": 2.0, "grows": 2.0 / 0.95**5}[change]
    assert rule.damping == pytest.approx(expected)


def test_damping_has_a_floor_and_is_due_at_the_end_of_each_period():
    rule = LevenbergMarquardt(damping=1e-8, every=3)
    rule.observe(-1.0, -1.0)
    assert rule.damping == 1e-8
    assert [step for step in range(9) if rule.is_due(step)] == [2, 5, 8]
