"""Linearised predictions are differentiable in inputs that ask for it, by finite differences, and in nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayes_kfac import Posterior
from bayes_kfac.likelihoods import Gaussian
from tests.curvature.modules.cases import Model, with_statistics
from tests.helpers import randn, record, rng, seeded
from tests.posteriors import FAMILIES, random_posterior
from tests.prediction.models import mlp, recurrent

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (2, 3)),
    "last layer alone": (lambda: nn.Linear(3, 2), (2, 3)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)),
        (2, 2, 3),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2)), (2, 3)),
    "rms norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.RMSNorm(3, eps=0.1), nn.Linear(3, 2)), (2, 3)),
    "group norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 2), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(4, 2)),
        (2, 2, 3),
    ),
    "batch norm": (
        lambda: with_statistics(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))),
        (2, 3),
    ),
    "attention": (
        lambda: Model(
            lambda m, x: m.head(m.attention(x, x, x)[0].sum(1)),
            attention=nn.MultiheadAttention(2, 1, batch_first=True),
            head=nn.Linear(2, 2),
        ),
        (2, 2, 2),
    ),
    "recurrent": (recurrent, (2, 2, 3)),
    "examples meet": (
        lambda: Model(
            lambda m, x: m.last(torch.tanh(m.first(x) - m.first(x).mean(0))),
            first=nn.Linear(3, 3),
            last=nn.Linear(3, 1),
        ),
        (2, 3),
    ),
}
FUNCTIONS: dict[str, Callable[[Posterior, Tensor], Any]] = {
    "mean": lambda posterior, x: posterior.predict(x).mean,
    "covariance": lambda posterior, x: posterior.predict(x).covariance,
    "variance": lambda posterior, x: posterior.predict(x, output_covariance="diagonal").variance,
    "joint": lambda posterior, x: posterior.function_covariance(x),
    "between": lambda posterior, x: posterior.function_covariance(x, x.detach() * 0.5 + 0.1),
    "between, the other way": lambda posterior, x: posterior.function_covariance(x.detach() * 0.5 + 0.1, x),
    "functions": lambda posterior, x: posterior.function_samples(x, draws=posterior.sample(2, generator=rng(0))),
}


def posterior_of(name: str, **options: str) -> tuple[Posterior, Tensor]:
    build, shape = MODELS[name]
    model, x = seeded(build()), randn(*shape, seed=1)
    return random_posterior(model, Gaussian(0.5), rows=record(model, x), **options), x


def at(posterior: Posterior, function: str, x: Tensor) -> Callable[[Tensor], Any]:
    """A function with its other arguments fixed; what ``detach`` fixes must not move with the finite differences."""
    if function.startswith("between"):
        fixed = x.detach() * 0.5 + 0.1
        if function == "between":
            return lambda y: posterior.function_covariance(y, fixed)
        return lambda y: posterior.function_covariance(fixed, y)
    return lambda y: FUNCTIONS[function](posterior, y)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_are_finite_differences(name, function):
    """Through every kind of layer: its inputs and its output gradients both move with the inputs."""
    posterior, x = posterior_of(name)
    assert torch.autograd.gradcheck(at(posterior, function, x), x.requires_grad_(), fast_mode=True)
    assert all(parameter.grad is None for parameter in posterior.model.parameters())


@pytest.mark.parametrize(("structure", "damping"), FAMILIES, ids=["-".join(names) for names in FAMILIES])
@pytest.mark.parametrize("function", ["covariance", "variance", "joint", "functions"])
def test_derivatives_for_every_structure(function, structure, damping):
    posterior, x = posterior_of("convolution", structure=structure, damping=damping)
    assert torch.autograd.gradcheck(at(posterior, function, x), x.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("function", ["covariance", "joint", "between"])
def test_derivatives_of_derivatives(function):
    """An acquisition function is climbed with curvature too."""
    posterior, x = posterior_of("mlp")
    assert torch.autograd.gradgradcheck(at(posterior, function, x), x.requires_grad_(), fast_mode=True)


def test_one_of_several_arguments_may_ask():
    model = seeded(Model(lambda m, x, scale: m.layer(x.tanh()) * scale, layer=nn.Linear(3, 2)))
    posterior = random_posterior(model, Gaussian(0.5))
    x, scale = randn(2, 3, seed=1), randn(2, 1, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: posterior.predict((x, s)).covariance, scale, fast_mode=True)
    assert torch.autograd.gradcheck(lambda s: posterior.predict({"x": x, "scale": s}).mean, scale, fast_mode=True)
    assert x.grad is None


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_in_a_graph_that_did_not_ask(name, function):
    """Plain inputs; and under ``no_grad`` or ``inference_mode`` any. The numbers are the same."""
    posterior, x = posterior_of(name)
    leaf = x.clone().requires_grad_()
    with_graph = FUNCTIONS[function](posterior, leaf)
    assert with_graph.requires_grad
    plain = FUNCTIONS[function](posterior, x)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, with_graph.detach(), rtol=1e-12, atol=1e-12)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            inside = FUNCTIONS[function](posterior, leaf)
        assert not inside.requires_grad
        assert torch.equal(inside, plain)


def test_the_posteriors_own_tensors_get_no_gradients():
    """Nor the model's parameters, which asked for them, nor the blocks."""
    posterior, x = posterior_of("mlp")
    posterior.predict(x.requires_grad_()).covariance.sum().backward()
    assert x.grad is not None
    blocks = [tensor for block in posterior.blocks.values() for tensor in block.state.values()]
    for tensor in (*posterior.model.parameters(), *posterior.mean.values(), *blocks):
        assert tensor.grad is None


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_derivatives_in_the_models_own_precision(kind):
    """Inputs in single precision, or in 16 bits, get gradients in theirs."""
    posterior, x = posterior_of("mlp")
    exact = x.clone().requires_grad_()
    posterior.predict(exact).covariance.sum().backward()
    low = posterior.to(kind)
    low.blocks = {name: block.to(torch.float32) for name, block in low.blocks.items()}
    low = Posterior(
        low.model, Gaussian(0.5), low.blocks, prior_precision=low.prior_precision, provenance=low.provenance
    )
    leaf = x.to(kind).requires_grad_()
    low.predict(leaf).covariance.sum().backward()
    tolerance = 1e-4 if kind == torch.float32 else 0.1
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)
