"""Parameters that no block covers follow the policy for others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.helpers import seeded
from tests.training.loops.plain import (
    BATCHES,
    EXAMPLES,
    SAME,
    SIGMA,
    X,
    make,
    train,
)


class Odd(nn.Module):
    """Parameters of every kind outside the blocks: a PReLU, a bilinear form, a parametrized weight, a bare one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.form = nn.Linear(3, 4), nn.PReLU(4), nn.Bilinear(4, 3, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.scale = nn.Parameter(torch.zeros(2))
        seeded(self)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.normed(self.form(self.act(self.body(inputs)), inputs)) * self.scale.exp()


def test_the_diagonal_policy_has_the_squares_of_each_examples_own_gradient():
    """For the exact Fisher, of the Jacobians of each output over σ, one at a time."""
    model = Odd()
    optimizer = make(model, others="diagonal", warmup=False)
    x, y = BATCHES[0]
    train(optimizer, [(x, y)])
    # without warm-up the first sample is the mean, from which the statistics were taken
    original = Odd()
    alone = [name for name in optimizer.layers if name != "body"]
    assert len(alone) == 7
    fisher = {name: torch.zeros_like(original.get_parameter(name)) for name in alone}
    for output in original(x).flatten():
        gradients = torch.autograd.grad(output, [original.get_parameter(name) for name in alone], retain_graph=True)
        for name, gradient in zip(alone, gradients, strict=True):
            fisher[name] += (gradient / SIGMA).square() / EXAMPLES
    for name in alone:
        assert_close(optimizer.blocks[name].statistics.mean("fisher"), fisher[name].reshape(-1, 1), **SAME)
    train(optimizer)
    assert optimizer.posterior().predict(X).epistemic_variance.min() > 0


def test_the_deterministic_policy_is_adam_on_the_same_gradients():
    """Step for step, at the samples of the others; what is a bare parameter has a block of its own all the same."""
    model = Odd()
    optimizer = make(model, others="deterministic", deterministic_lr=0.02)
    names = [row.parameter for row in optimizer.summary().rows if row.structure == "deterministic"]
    assert len(names) == 6
    estimates = [model.get_parameter(name) for name in names]
    twins = [estimate.detach().clone() for estimate in estimates]
    adam = torch.optim.Adam(twins, lr=0.02)
    for batch in BATCHES:
        train(optimizer, [batch])
        for twin, estimate in zip(twins, estimates, strict=True):
            twin.grad = estimate.grad.clone()
        adam.step()
    for twin, estimate in zip(twins, estimates, strict=True):
        assert_close(estimate, twin, rtol=0, atol=0)
    assert set(optimizer.posterior().blocks) == {"body", "scale"}


class Bare(nn.Module):
    """A model of bare parameters only."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.offset = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2))
        seeded(self)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.matrix + self.offset


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_model_of_bare_parameters_has_their_diagonal_fisher(fisher):
    optimizer = make(Bare(), fisher=fisher, warmup=False)
    x, y = BATCHES[0]
    residuals = (Bare()(x).detach() - y) / SIGMA**2 if fisher == "empirical" else torch.full_like(y, 1 / SIGMA)
    train(optimizer, [(x, y)])
    matrix = (x.unsqueeze(-1) * residuals.unsqueeze(1)).square().mean(0)
    assert_close(optimizer.blocks["matrix"].statistics.mean("fisher"), matrix.reshape(-1, 1), **SAME)
    assert_close(
        optimizer.blocks["offset"].statistics.mean("fisher"), residuals.square().mean(0).reshape(-1, 1), **SAME
    )
