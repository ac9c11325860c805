"""Natural gradient without noise is the dense formula, MAP training, and K-FAC where it was invented."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, UsageError
from tests.helpers import TIGHT, randn, rng, seeded

X, Y = randn(40, 3, seed=1), randn(40, 2, seed=2)
NUM_DATA = 40


def linear() -> nn.Module:
    return seeded(nn.Linear(3, 2))


def mlp() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)))


def gaussian() -> bk.likelihoods.Gaussian:
    return bk.likelihoods.Gaussian(0.5).double()


def trainer(model: nn.Module, kind: type = bk.NaturalGradient, **options) -> bk.NaturalGradient:
    defaults = {"num_data": NUM_DATA, "fisher": "exact", "warmup": False, "generator": rng(0)}
    return kind(model, gaussian(), **(defaults | options))


def step(optimizer: bk.NaturalGradient, x: Tensor = X, y: Tensor = Y) -> float:
    with optimizer.sampled_params():
        optimizer.zero_grad()
        loss = optimizer.likelihood(optimizer.model(x), y)
        loss.backward()
    optimizer.step()
    return loss.item()


def ridge(precision: float) -> Tensor:
    """The maximum a posteriori of a linear model with noise of scale .5, ``[weight, bias]``."""
    inputs = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], dim=1)
    return torch.linalg.solve(inputs.T @ inputs / 0.25 + precision * torch.eye(4).double(), inputs.T @ Y / 0.25).T


def weights(model: nn.Module) -> Tensor:
    return torch.cat([model.weight, model.bias[:, None]], dim=1).detach()


def test_one_undamped_step_of_length_one_is_the_maximum_a_posteriori_of_a_linear_model():
    """Newton's method on a quadratic: the exact Fisher is the Hessian, and the prior is in it exactly."""
    model = linear()
    optimizer = trainer(
        model, lr=1.0, momentum=0.0, kl_clip=None, structure="kron", damping="exact", prior_precision=3.0
    )
    step(optimizer)
    assert_close(weights(model), ridge(3.0), **TIGHT)


def test_weights_are_the_mean_inside_of_the_context():
    optimizer = trainer(mlp())
    before = [parameter.clone() for parameter in optimizer.model.parameters()]
    with optimizer.sampled_params():
        assert all(torch.equal(a, b) for a, b in zip(before, optimizer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("structure", "damping"), [("kron", "exact"), ("kron", "factored"), ("dense", "exact"), ("diagonal", "exact")]
)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_step_is_a_power_of_the_damped_fisher(structure, damping, power):
    """``ΔW = −lr P^(-p) (∇ + γ_in W)`` with the dense ``P = F̄ + γ I`` of each block, eigenvalue by eigenvalue."""
    model = mlp()
    options = {"structure": structure, "damping": damping, "power": power, "prior_precision": 2.0}
    optimizer = trainer(model, lr=0.1, momentum=0.0, kl_clip=None, extrinsic_damping=0.3, **options)
    before = {name: layer.values() for name, layer in optimizer.layers.items()}
    gradients = {}
    with optimizer.sampled_params():
        optimizer.likelihood(model(X), Y).backward()
        gradients = {name: layer.gradient() for name, layer in optimizer.layers.items()}
    optimizer.step()
    whole = trainer(mlp(), structure=structure, damping=damping, prior_precision=2.0, extrinsic_damping=0.3)
    step(whole)
    for name, layer in optimizer.layers.items():
        values, vectors = torch.linalg.eigh(whole.blocks[name].preconditioner.to_dense())
        gradient = gradients[name] + 2.0 / NUM_DATA * before[name]
        moved = vectors @ (values**-power * (vectors.T @ gradient.flatten()))
        assert_close(layer.values() - before[name], -0.1 * moved.reshape(gradient.shape), **TIGHT)


def test_a_power_of_linked_layers_is_refused():
    optimizer = trainer(mlp(), structure="tridiagonal", power=0.5)
    with pytest.raises(ArgumentError, match=r"power=0\.5 is not allowed: layers are linked"):
        step(optimizer)


@pytest.mark.parametrize("power", [-0.1, 1.5])
def test_powers_out_of_range_are_refused(power):
    with pytest.raises(ArgumentError, match="power="):
        trainer(mlp(), power=power)


@pytest.mark.parametrize("option", ["num_samples", "antithetic"])
def test_options_of_samples_are_refused(option):
    with pytest.raises(ArgumentError, match=f"{option}= is of weight samples"):
        trainer(mlp(), **{option: 2})


def test_its_posterior_is_a_laplace_fit_at_the_weights():
    """With the curvature of one batch, all of the data, at the weights before the step."""
    model = mlp()
    optimizer = trainer(model, lr=0.0, structure="kron", damping="exact", prior_precision=2.0)
    step(optimizer)
    laplace = bk.Laplace(model, gaussian(), prior_precision=2.0).fit([(X, Y)], progress=False)
    mine, theirs = optimizer.posterior(), laplace.posterior()
    assert mine.provenance.method == "natural gradient"
    for name in theirs.blocks:
        assert_close(mine.blocks[name].to_dense(), theirs.blocks[name].to_dense(), **TIGHT)


def test_there_is_no_divergence_of_a_gaussian_in_training():
    with pytest.raises(UsageError, match=r"posterior\(\)\.kl\(\)"):
        trainer(mlp()).kl()


def test_it_goes_on_bit_for_bit_from_a_checkpoint():
    optimizer = trainer(mlp(), fisher="mc")
    for _ in range(3):
        step(optimizer)
    saved = (optimizer.model.state_dict(), optimizer.state_dict())
    resumed = trainer(mlp(), fisher="mc")
    resumed.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert step(optimizer) == step(resumed)
    assert step(optimizer) == step(resumed)


# Adaptive


def adaptive(model: nn.Module, **options) -> bk.AdaptiveNaturalGradient:
    return trainer(model, bk.AdaptiveNaturalGradient, **options)


def test_on_a_quadratic_the_model_is_the_loss_and_the_damping_falls():
    """A linear model: the promise comes true exactly, so that each comparison trusts more; and the optimum is found."""
    model = linear()
    optimizer = adaptive(model, structure="kron", damping="exact", prior_precision=3.0, damping_every=2)
    for _ in range(12):
        step(optimizer)
    assert optimizer.damping == pytest.approx(0.95**12)
    assert_close(weights(model), ridge(3.0), rtol=1e-5, atol=1e-6)


def test_it_trains_a_network_faster_than_a_fixed_step():
    """Full batches; the same structure, and steps of a length that Adam users would take."""
    losses = {}
    for kind, options in ((bk.AdaptiveNaturalGradient, {"initial_damping": 0.1}), (bk.NaturalGradient, {"lr": 0.05})):
        optimizer = trainer(mlp(), kind, structure="kron", statistics_every=1, inverse_every=1, **options)
        for _ in range(40):
            losses[kind] = step(optimizer)
    assert losses[bk.AdaptiveNaturalGradient] < losses[bk.NaturalGradient]


def test_damping_grows_where_the_promise_fails(monkeypatch):
    optimizer = adaptive(mlp(), damping_every=1)
    monkeypatch.setattr(optimizer, "_objective", iter([0.0, 1.0]).__next__)
    step(optimizer)
    assert optimizer.damping == pytest.approx(1 / 0.95)
    assert optimizer.param_groups[0]["extrinsic_damping"] == optimizer.damping


@pytest.mark.parametrize("steps", [0, 1])
def test_it_needs_the_likelihood_to_be_called(steps):
    """On each step: a quadratic model of an earlier batch would be of another loss."""
    optimizer = adaptive(mlp())
    for _ in range(steps):
        step(optimizer)
    with optimizer.sampled_params():
        optimizer.model(X).square().mean().backward()
    with pytest.raises(UsageError, match="likelihood\\(output, target\\) inside"):
        optimizer.step()


@pytest.mark.parametrize("name", ["lr", "momentum", "kl_clip", "extrinsic_damping"])
def test_what_it_finds_itself_is_refused(name):
    with pytest.raises(ArgumentError, match=f"{name}= is found by"):
        adaptive(mlp(), **{name: 0.1})


class Scaled(nn.Module):
    """Takes an argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return scale * self.inner(x)


class PassesOn(Scaled):
    """Takes any arguments by name."""

    def forward(self, x: Tensor, **options: float) -> Tensor:
        return super().forward(x, **options)


@pytest.mark.parametrize("kind", [Scaled, PassesOn])
def test_models_with_keyword_arguments_are_called_again_with_them(kind):
    optimizer = adaptive(kind(), damping_every=1, prior_precision=1e-12)
    with optimizer.sampled_params():
        loss = optimizer.likelihood(optimizer.model(X, scale=2.0), Y)
        loss.backward()
    with torch.no_grad():
        assert_close(optimizer._objective(), float(loss), rtol=1e-6, atol=0)
    optimizer.step()
    assert optimizer.damping != 1.0


@pytest.mark.parametrize("late", [False, True])
def test_the_batch_is_that_of_the_loss_whatever_else_the_model_is_called_with(late):
    """Unlabelled data for the Fisher, before the loss is taken or after."""
    optimizer = adaptive(mlp(), prior_precision=1e-12)
    with optimizer.sampled_params():
        output = optimizer.model(X)
        if not late:
            optimizer.model(100 * X)
        loss = optimizer.likelihood(output, Y)
        loss.backward()
        if late:
            optimizer.model(100 * X)
    with torch.no_grad():
        assert_close(optimizer._objective(), float(loss), rtol=1e-6, atol=0)


def test_the_adaptive_one_goes_on_bit_for_bit_from_a_checkpoint():
    optimizer = adaptive(mlp(), fisher="mc", damping_every=2)
    for _ in range(3):
        step(optimizer)
    saved = (optimizer.model.state_dict(), optimizer.state_dict())
    resumed = adaptive(mlp(), fisher="mc", damping_every=2)
    resumed.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(3):
        assert step(optimizer) == step(resumed)
    assert optimizer.damping == resumed.damping
    with pytest.raises(ArgumentError, match="is not from an AdaptiveNaturalGradient"):
        resumed.load_state_dict(trainer(mlp()).state_dict())
