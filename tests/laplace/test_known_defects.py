"""Defects that were reproduced in laplace-torch 0.3, each as something that this library does not have.

What happens there is said in each test. The networks are small and, but for one, in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bayes_kfac as bk
from tests.helpers import TIGHT, parameter_jacobians, randn, rng, seeded

CLASSES = 3
X, Y = randn(40, 4, seed=1), torch.randint(CLASSES, (40,), generator=rng(2))
LOADER = [(X[:16], Y[:16]), (X[16:32], Y[16:32]), (X[32:], Y[32:])]


def classifier() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)))


def laplace(model: nn.Module, loader: list | None = None, likelihood: nn.Module | None = None, **options):
    loader = loader or LOADER
    options = {"num_data": sum(len(x) for x, _ in loader), **options}
    return bk.Laplace(model, likelihood or bk.likelihoods.Categorical(), **options).fit(loader, progress=False)


def unit_noise() -> nn.Module:
    return bk.likelihoods.Gaussian(torch.tensor(1.0, dtype=torch.float64))


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def damped_by_hand(A: Tensor, G: Tensor, damping: str, scale: float, prior_precision: float) -> Tensor:
    """The precision of a block for ``scale = N/τ``, dense."""
    gamma = prior_precision / scale
    if damping == "exact":
        return scale * (torch.kron(G, A) + gamma * eye(len(A) * len(G)))
    pi = float((A.trace() / len(A) / (G.trace() / len(G))).sqrt())
    return scale * torch.kron(G + gamma**0.5 / pi * eye(len(G)), A + gamma**0.5 * pi * eye(len(A)))


@pytest.mark.parametrize("damping", ["exact", "factored"])
def test_the_damping_is_kept_through_the_algebra(damping):
    """There: scaling by the temperature and adding the prior both forget ``damping=True``, which has no effect."""
    model = seeded(nn.Sequential(nn.Linear(4, CLASSES, bias=False)))
    fitted = laplace(model, damping=damping, prior_precision=0.7, temperature=0.5)
    probabilities = model(X).detach().softmax(-1)
    G = (torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]).mean(0)
    A = X.mT @ X / len(X)
    expected = damped_by_hand(A, G, damping, len(X) / 0.5, 0.7)
    posterior = fitted.posterior()
    assert posterior.provenance.damping == damping
    assert_close(posterior.blocks["0"].to_dense(), expected, **TIGHT)
    J = torch.kron(eye(CLASSES), X[:1])
    assert_close(posterior.function_covariance(X[:1])[0, 0], J @ torch.linalg.solve(expected, J.mT), **TIGHT)


def validation_data() -> tuple[list, list]:
    """Labels with noise: a prior that is too weak and one that is too strong are both worse than one between."""
    generator = rng(0)
    x = torch.randn(260, 2, generator=generator, dtype=torch.float64)
    y = (x + 0.2 * torch.randn(260, 2, generator=generator, dtype=torch.float64) > 0).sum(1)
    return [(x[:60], y[:60])], [
        (part_x, part_y) for part_x, part_y in zip(x[60:].split(50), y[60:].split(50), strict=True)
    ]


def test_each_value_of_a_grid_is_judged_by_itself():
    """There: one metric runs on over all values, so each is judged by the mean of all before; the last was chosen."""
    train, validation = validation_data()
    model = seeded(nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 3)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0][0]), train[0][1]).backward()
        optimizer.step()
    grid = [10.0**k for k in range(-4, 5)]
    alone = []
    for value in grid:
        posterior = laplace(model, train, prior_precision=value).posterior()
        log_prob = torch.cat([posterior.predict(x, link="probit").log_prob(y) for x, y in validation])
        alone.append(-log_prob.mean())
    nll = torch.stack(alone)
    best = grid[int(nll.argmin())]
    running = nll.cumsum(0) / torch.arange(1, len(grid) + 1)
    assert grid[int(running.argmin())] == grid[-1] > best, "a metric that runs on would choose the last"
    for values in (grid, grid[::-1]):
        fitted = laplace(model, train)
        fitted.optimize_prior_precision(
            method="validation", loader=validation, grid=values, progress=False, link="probit"
        )
        assert {float(value) for value in fitted.prior_precision.values()} == {best}


@pytest.mark.parametrize("method", ["linearized", "sampling"])
def test_a_generator_decides_every_prediction(method):
    """There: ``generator=`` of the call that predicts is checked and then dropped."""
    posterior = laplace(classifier()).posterior()

    def predict(seed: int) -> Tensor:
        torch.manual_seed(seed + 100)  # must not matter
        return posterior.predict(X, method, num_samples=5, generator=rng(7)).probs

    assert torch.equal(predict(1), predict(2))
    other = posterior.predict(X, method, num_samples=5, generator=rng(8)).probs
    assert not torch.allclose(predict(1), other)


def test_a_model_in_bfloat16_is_fitted_and_predicts():
    """There: the eigendecomposition has no kernel for the dtype, is tried again with jitter, and then ``exit()``."""
    model = classifier().float()
    half = copy.deepcopy(model).bfloat16()
    posteriors = [laplace(model, [(x.float(), y) for x, y in LOADER]).posterior()]
    posteriors.append(laplace(half, [(x.bfloat16(), y) for x, y in LOADER]).posterior())
    full, rounded = (one.predict(X.to(one.mean["0.weight"].dtype), link="probit").probs for one in posteriors)
    assert torch.isfinite(rounded).all()
    assert_close(rounded.float(), full, rtol=0, atol=0.03)
    assert all(value.dtype == torch.bfloat16 for value in half.parameters())
    states = [value for block in posteriors[1].blocks.values() for value in block.state.values()]
    assert {value.dtype for value in states} == {torch.float32}, "statistics in 16 bits are not positive definite"


def test_function_samples_have_the_covariance_of_their_inputs():
    """There: all inputs share the noise, so that a sample at one input is that at another, up to scale."""
    posterior = laplace(classifier()).posterior()
    x = torch.stack([X[0], -X[0] + 0.5 * X[1], X[2]])
    samples = posterior.function_samples(x, 20_000, generator=rng(0)).flatten(1)
    expected = posterior.function_covariance(x).transpose(1, 2).reshape(3 * CLASSES, 3 * CLASSES)
    scale = expected.diagonal().sqrt()
    expected = expected / scale / scale[:, None]
    assert expected[:CLASSES, CLASSES : 2 * CLASSES].diagonal().max() < 0.1, "inputs that agree would hide the defect"
    assert_close(torch.cov(samples.mT) / scale / scale[:, None], expected, rtol=0, atol=0.03)


def test_predictions_at_two_inputs_do_not_share_their_noise():
    """There: the same noise goes into every input's sample, which couples what is sampled for each on its own."""
    logits = laplace(classifier()).posterior().predict(X[:2], num_samples=20_000, generator=rng(0)).logits
    correlation = torch.corrcoef(logits.flatten(1).mT)[:CLASSES, CLASSES:]
    assert correlation.abs().max() < 0.05


class Twice(nn.Module):
    """The same layer on two inputs, in two calls or in one."""

    def __init__(self, in_one_call: bool) -> None:
        super().__init__()
        self.layer, self.in_one_call = nn.Linear(3, 2, bias=False), in_one_call

    def forward(self, x: Tensor) -> Tensor:
        if self.in_one_call:
            return self.layer(x).flatten(1)
        return torch.cat([self.layer(x[:, 0]), self.layer(x[:, 1])], dim=1)


@pytest.mark.parametrize("in_one_call", [True, False])
def test_a_module_that_is_used_twice_has_the_precision_of_both_uses(in_one_call):
    """There: both factors add up over calls, and the curvature is twice what it is. The network is linear: exact."""
    x = randn(20, 2, 3, seed=5)
    model = seeded(Twice(in_one_call))
    fitted = laplace(model, [(x, randn(20, 4, seed=6))], unit_noise(), prior_precision=0.3)
    J = parameter_jacobians(model, x)["layer.weight"].flatten(2)
    expected = torch.einsum("nci,ncj->ij", J, J) + 0.3 * eye(6)
    assert_close(fitted.posterior().blocks["layer"].to_dense(), expected, **TIGHT)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_diagonal_request_forms_no_jacobian_and_no_covariance(subset):
    """There: ``diagonal_output=True`` takes the diagonal of the covariance that the full Jacobian has given."""
    inputs, width, outputs = 6, 30, 80
    model = seeded(nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)))
    posterior = laplace(model, [(X, randn(len(X), outputs, seed=3))], unit_noise(), subset=subset).posterior()
    variance = posterior.predict(X[:inputs]).output.variance
    with Largest() as largest:
        output = posterior.predict(X[:inputs], output_covariance="diagonal").output
    assert_close(output.variance, variance, **TIGHT)
    parameters = sum(block.precision.numel() for block in posterior.blocks.values())
    assert largest.elements < inputs * outputs * parameters / 20
    if subset == "last_layer":  # with all layers every output's gradient by all outputs is what is pulled back
        assert largest.elements < inputs * outputs * outputs


class Fragile(nn.Module):
    """Fails after a number of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls_left = classifier(), 10**6

    def forward(self, x: Tensor) -> Tensor:
        self.calls_left -= 1
        if self.calls_left <= 0:
            raise RuntimeError("out of memory")
        return self.net(x)


@pytest.mark.parametrize("what", ["predict by sampling", "predict linearized", "fit"])
def test_an_exception_leaves_the_model_as_it_was(what):
    """There: sampling overwrites the weights, and an exception in the model leaves a sample in their place."""
    model = Fragile().train()
    posterior = laplace(model).posterior()
    calls = {
        "fit": lambda: laplace(model),
        "predict linearized": lambda: posterior.predict(X),
        "predict by sampling": lambda: posterior.predict(X, "sampling", num_samples=5),
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.calls_left = 1 if what == "predict linearized" else 2
    with pytest.raises(RuntimeError, match="out of memory"):
        calls[what]()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
