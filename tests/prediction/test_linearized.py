"""Linearised predictions against dense Jacobians, and the model that they must leave as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac.errors import UsageError
from bayes_kfac.likelihoods import Gaussian
from bayes_kfac.prediction import LinearizedModel
from tests.helpers import randn, seeded
from tests.posteriors import DAMPING_KINDS, dense_output_covariance, random_posterior

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


class Lambda(nn.Module):
    """A module without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class UsedTwice(nn.Module):
    """One hidden layer, used twice in a forward pass: its Jacobian is the sum over both uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))))


class FlattenedTime(nn.Module):
    """Batch and time are one dimension inside, and two again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class TwoInputs(nn.Module):
    """Two arguments, of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(3, 4), nn.Linear(2, 4, bias=False), nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.last(torch.tanh(self.left(left)) * torch.sigmoid(self.right(right)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 2))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, (2, 1), dilation=(2, 1), padding="same", padding_mode="circular", bias=False),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


def with_norm() -> nn.Module:
    """Frozen statistics, a parameter without a block, dropout: all as in evaluation mode."""
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.PReLU(4), nn.Dropout(0.5), nn.Linear(4, 2)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (5, 3)),
    "one-output": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), (5, 3)),
    "no-output-dimension": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), Lambda(lambda y: y.squeeze(-1))),
        (5, 3),
    ),
    "relu-in-place": (lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), (5, 3)),
    "root-is-the-layer": (lambda: nn.Linear(3, 2), (5, 3)),
    "cnn": (cnn, (3, 2, 6, 8)),
    "fully-convolutional": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1)),
        (2, 2, 3, 2),
    ),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2, padding=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 2)
        ),
        (3, 2, 8),
    ),
    "sequence-pooled": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), Lambda(lambda y: y.mean(1)), nn.Linear(4, 2)
        ),
        (4, 6, 3),
    ),
    "sequence-outputs": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (4, 3, 3)),
    "flattened-time": (FlattenedTime, (4, 3, 3)),
    "used-twice": (UsedTwice, (5, 3)),
    "batch-norm-and-others": (with_norm, (5, 3)),
    "many-positions": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), Lambda(lambda y: y.sum(1)), nn.Linear(2, 3)),
        (2, 40, 2),
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    model = seeded(make())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.copy_(randn(4, seed=3))
            module.running_var.copy_(0.5 + randn(4, seed=4).square())
    return model, randn(*shape, seed=1)


@pytest.mark.parametrize("damping", DAMPING_KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_mean_and_covariance_are_the_dense_ones(name: str, damping: str) -> None:
    """``f(x)`` and ``J P⁻¹ Jᵀ`` with torch.func's Jacobians and the dense precision, by every structure of blocks."""
    model, x = build(name)
    posterior = random_posterior(model, Gaussian(0.5), damping=damping)
    expected_mean, expected = dense_output_covariance(posterior, x)
    output = LinearizedModel(model, posterior.mean, posterior.layers, posterior.blocks).output(x)
    mean, covariance = output.mean, output.covariance
    assert_close(mean, expected_mean, **CLOSE)
    assert_close(covariance, expected, **CLOSE)
    assert expected.diagonal(dim1=-2, dim2=-1).min() > 1e-3
    assert not mean.requires_grad
    assert not covariance.requires_grad


def test_the_result_object_has_mean_covariance_and_noise() -> None:
    """Through ``predict``: the closed form adds the noise to the diagonal and nothing else."""
    model, x = build("mlp")
    posterior = random_posterior(model, Gaussian(torch.tensor([0.5, 0.2], dtype=torch.float64)))
    expected_mean, expected = dense_output_covariance(posterior, x)
    prediction = posterior.predict(x)
    assert_close(prediction.mean, expected_mean, **CLOSE)
    assert_close(prediction.epistemic_covariance, expected, **CLOSE)
    noise = torch.diag(torch.tensor([0.25, 0.04], dtype=torch.float64))
    assert_close(prediction.covariance, expected + noise, **CLOSE)


@pytest.mark.parametrize("as_dict", [False, True])
def test_several_arguments(as_dict: bool) -> None:
    model = seeded(TwoInputs())
    posterior = random_posterior(model, Gaussian(0.5))
    left, right = randn(5, 3, seed=1), randn(5, 2, seed=2)
    inputs: Any = {"right": right, "left": left} if as_dict else (left, right)
    expected_mean, expected = dense_output_covariance(posterior, inputs)
    prediction = posterior.predict(inputs)
    assert_close(prediction.mean, expected_mean, **CLOSE)
    assert_close(prediction.epistemic_covariance, expected, **CLOSE)


def test_examples_do_not_see_each_other() -> None:
    """A batch of one gives what the example has in a batch."""
    model, x = build("cnn")
    posterior = random_posterior(model, Gaussian(0.5))
    together, alone = posterior.predict(x), posterior.predict(x[1:2])
    assert_close(together.covariance[1:2], alone.covariance, **CLOSE)
    assert_close(together.mean[1:2], alone.mean, **CLOSE)


class EarlyExit(nn.Module):
    """Examples whose first element is positive go through one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden, hard = torch.tanh(self.stem(x)), x[:, 0, 0] > 0
        out = hidden.clone()
        out[hard] = torch.tanh(self.deep(hidden[hard]))
        return self.head(out).mean(1)


def test_predictions_do_not_depend_on_those_before() -> None:
    """All examples, and then some: two with two positions each, of four."""
    x = randn(4, 2, 3, seed=1)
    x[:, 0, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    posterior = random_posterior(seeded(EarlyExit()), Gaussian(0.5))
    posterior.predict(x.abs())
    _, expected = dense_output_covariance(posterior, x)
    assert_close(posterior.predict(x).epistemic_covariance, expected, **CLOSE)


def test_frozen_weights_are_constants() -> None:
    """A layer without a block contributes no variance, and its neighbours lose none."""
    model, x = build("mlp")
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    posterior = random_posterior(model, Gaussian(0.5))
    assert set(posterior.blocks) == {"2", "4"}
    assert_close(posterior.predict(x).epistemic_covariance, dense_output_covariance(posterior, x)[1], **CLOSE)


def test_tied_weights_are_replaced_everywhere() -> None:
    """Weights shared by two layers have one block, and take the posterior's values in both."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    posterior = random_posterior(seeded(model), Gaussian(0.5))
    x = randn(5, 3, seed=1)
    before = posterior.predict(x)
    with torch.no_grad():
        model[0].weight.mul_(3.0)
    after = posterior.predict(x)
    assert list(posterior.blocks["0"].shape) == [3, 3]
    assert torch.equal(before.mean, after.mean)
    assert_close(before.covariance, dense_output_covariance(posterior, x)[1] + 0.25 * torch.eye(2).double(), **CLOSE)


class Counting(nn.Module):
    """Changes a buffer in place in every forward pass, and its output with it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(x) * self.calls


@pytest.mark.parametrize("method", ["linearized", "sampling"])
def test_buffers_that_a_forward_pass_changes(method: str) -> None:
    """Neither the model's buffers nor the posterior's move: every call, and every draw, starts from the snapshot."""
    model = seeded(Counting())
    posterior = random_posterior(model, Gaussian(0.5))
    x, draws = randn(5, 3, seed=1), posterior.sample(3, generator=torch.Generator().manual_seed(0))
    predictions = [
        posterior.predict(x) if method == "linearized" else posterior.predict(x, draws=draws) for _ in range(2)
    ]
    assert torch.equal(predictions[0].mean, predictions[1].mean)
    assert torch.equal(predictions[0].covariance, predictions[1].covariance)
    assert model.calls == 0
    assert posterior.mean["calls"] == 0
    if method == "sampling":
        weight, bias = draws.values["last.weight"], draws.values["last.bias"]
        expected = torch.einsum("ni,soi->sno", x, weight) + bias.unsqueeze(1)
        assert_close(predictions[0].outputs, expected, **CLOSE)


# The model is left as it was


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a prediction could change, by value and by identity."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modes": [module.training for module in model.modules()],
        "ids": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "versions": {name: tensor._version for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "grads": {
            name: None if parameter.grad is None else (id(parameter.grad), parameter.grad.clone())
            for name, parameter in model.named_parameters()
        },
        "hooks": [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key in ("modes", "ids", "versions", "requires_grad", "hooks"):
        assert before[key] == after[key], key
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    for name, grad in before["grads"].items():
        other = after["grads"][name]
        assert (grad is None) == (other is None), name
        assert grad is None or (grad[0] == other[0] and torch.equal(grad[1], other[1])), name


def model_with_history() -> tuple[nn.Module, Tensor]:
    """A model with mixed modes, gradients in place, a frozen weight, hooks and batch statistics."""
    model, x = build("batch-norm-and-others")
    model.train()
    model[1].eval()
    model(x).sum().backward()
    model[5].weight.requires_grad_(False)
    model[5].weight.grad = None
    model[0].register_forward_hook(lambda module, args, output: None)
    return model, x


@pytest.mark.parametrize("method", ["linearized", "sampling"])
@pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda context: context.__name__
)
def test_model_is_left_as_it_was(method: str, context: Callable[[], Any]) -> None:
    """Mode of every submodule, weights, buffers, gradients, hooks: in every gradient mode the caller may be in."""
    model, x = model_with_history()
    posterior = random_posterior(model, Gaussian(0.5))
    before, own = snapshot(model), copy.deepcopy(posterior.mean)
    with context():
        enabled = torch.is_grad_enabled()
        posterior.predict(x, method, num_samples=3)
        assert torch.is_grad_enabled() == enabled
    assert_same(before, snapshot(model))
    for name, value in own.items():
        assert torch.equal(value, posterior.mean[name]), name


@pytest.mark.parametrize("method", ["linearized", "sampling"])
def test_model_is_left_as_it_was_by_an_exception(method: str) -> None:
    model, x = model_with_history()
    posterior = random_posterior(model, Gaussian(0.5))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        posterior.predict(x[:, :2], method, num_samples=3)
    assert_same(before, snapshot(model))
    assert posterior.predict(x, method, num_samples=3).mean.shape == (5, 2)


# Gradient modes


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda context: context.__name__)
@pytest.mark.parametrize("name", ["mlp", "cnn", "batch-norm-and-others"])
def test_covariance_does_not_depend_on_the_gradient_mode(name: str, context: Callable[[], Any]) -> None:
    """Without a graph no Jacobian is seen: a covariance of zero would be the silent outcome."""
    model, x = build(name)
    posterior = random_posterior(model, Gaussian(0.5))
    expected = posterior.predict(x)
    with context():
        made_inside = {"outer": x, "inner": x.clone()}
        for inputs in made_inside.values():
            prediction = posterior.predict(inputs)
            assert_close(prediction.mean, expected.mean, rtol=0.0, atol=0.0)
            assert_close(prediction.covariance, expected.covariance, rtol=0.0, atol=0.0)
    assert_close(posterior.predict(made_inside["inner"]).covariance, expected.covariance, rtol=0.0, atol=0.0)


def test_posterior_made_under_inference_mode() -> None:
    model, x = build("mlp")
    expected = random_posterior(model, Gaussian(0.5)).predict(x)
    with torch.inference_mode():
        posterior = random_posterior(model, Gaussian(0.5))
        inside = posterior.predict(x)
    outside = posterior.predict(x)
    for prediction in (inside, outside):
        assert_close(prediction.covariance, expected.covariance, **CLOSE)
        assert prediction.log_prob(torch.zeros(5, 2, dtype=torch.float64)).isfinite().all()


class WithoutGraph(nn.Module):
    """A model whose author thought that it would only ever be evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


def test_a_model_that_builds_no_graph_is_an_error() -> None:
    """Its linearised variance would be a silent zero; sampling works."""
    posterior, x = random_posterior(seeded(WithoutGraph()), Gaussian(0.5)), randn(5, 3, seed=1)
    with pytest.raises(UsageError, match=r"no variance.*no_grad.*method='sampling'"):
        posterior.predict(x)
    assert (posterior.predict(x, "sampling", num_samples=5).epistemic_variance > 0).all()


def test_covariance_is_not_rounded_by_autocast() -> None:
    """The model runs in 16 bits; the covariance is algebra in 32, symmetric, and has a density."""
    model, x = build("mlp")
    expected = random_posterior(model, Gaussian(0.5)).predict(x)
    posterior = random_posterior(model.float(), Gaussian(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = posterior.predict(x.float())
        log_prob = prediction.log_prob(torch.zeros(5, 2))
    assert prediction.covariance.dtype == torch.float32
    assert_close(prediction.covariance.double(), expected.covariance, rtol=0.05, atol=0.05)
    assert_close(log_prob.double(), expected.log_prob(torch.zeros(5, 2).double()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_predictions_are_differentiable_in_inputs_that_require_gradients(damping: str) -> None:
    """Mean and variance against finite differences: an acquisition function is climbed along them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    posterior = random_posterior(model, Gaussian("learned").double(), damping=damping)

    def predict(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prediction = posterior.predict(x)
        return prediction.mean, prediction.covariance, posterior.function_covariance(x)

    leaf = randn(3, 3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(predict, leaf)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert not posterior.predict(leaf).variance.requires_grad
    assert not posterior.predict(leaf.detach()).variance.requires_grad


def test_float32_is_close_to_float64() -> None:
    """Predictions are in the model's dtype."""
    model, x = build("mlp")
    expected = random_posterior(model, Gaussian(0.5)).predict(x)
    prediction = random_posterior(model.float(), Gaussian(0.5)).predict(x.float())
    assert prediction.mean.dtype == prediction.covariance.dtype == torch.float32
    assert_close(prediction.covariance.double(), expected.covariance, rtol=1e-4, atol=1e-5)
