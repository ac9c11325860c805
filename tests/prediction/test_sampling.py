"""Weight draws: where they come from, that they are functions, and where they meet the linearised prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from bayes_kfac import Posterior
from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Categorical, Gaussian
from bayes_kfac.prediction import Draws, MixturePrediction, sampled_outputs
from bayes_kfac.structures import BlockGaussian
from tests.helpers import block, randn, rng, seeded
from tests.posteriors import DAMPING_KINDS, dense_covariances, random_posterior

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def mlp() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)))


def cnn() -> nn.Module:
    return seeded(
        nn.Sequential(nn.Conv2d(2, 4, (3, 2), padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(60, 2))
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {"mlp": (mlp, (5, 3)), "cnn": (cnn, (5, 2, 3, 4))}


def deviations(posterior: Posterior, draws: Draws) -> dict[str, Tensor]:
    """What each draw adds to the mean, as blocks ``[draws, *blocks, out·in]`` put together by hand."""
    centred = {name: value - posterior.mean[name] for name, value in draws.values.items()}
    return {name: block(layer, centred).flatten(-2) for name, layer in posterior.layers.items()}


def basis_draws(posterior: Posterior, monkeypatch: pytest.MonkeyPatch, scale: float = 1.0) -> Draws:
    """Draws for noise that runs through ``±scale`` times the basis vectors of all layers' weights together."""
    sizes = [math.prod(gaussian.shape) for gaussian in posterior.blocks.values()]
    total = sum(sizes)
    columns = iter(torch.eye(total, dtype=torch.float64).split(sizes, dim=1))

    def basis(gaussian: BlockGaussian, generator: object, count: tuple[int, ...] = ()) -> Tensor:
        noise = scale * next(columns).reshape(total, *gaussian.shape)
        return torch.cat([noise, -noise])

    with monkeypatch.context() as patch:
        patch.setattr("bayes_kfac.structures.joint.standard_normal", basis)
        return posterior.sample(2 * total)


# The map from noise to weights


@pytest.mark.parametrize("damping", DAMPING_KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_basis_noise_gives_a_root_of_the_covariance(name: str, damping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``B Bᵀ = P⁻¹`` of every layer without Monte Carlo, weights and biases in their places; layers are independent."""
    posterior = random_posterior(MODELS[name][0](), Gaussian(0.5), damping=damping)
    draws = basis_draws(posterior, monkeypatch)
    parts = deviations(posterior, draws)
    assert sum((part != 0).flatten(1).any(1).int() for part in parts.values()).max() == 1
    for layer, covariance in dense_covariances(posterior).items():
        half = parts[layer][: len(draws) // 2]
        by_block = half.reshape(len(half), -1, half.shape[-1])
        product = torch.einsum("sgi,sgj->gij", by_block, by_block)
        assert_close(product, covariance.reshape(product.shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_draws_have_the_posteriors_moments(name: str) -> None:
    """Mean and marginal variance of 4 000 draws, within five standard errors; no layer's noise is reused by another."""
    posterior = random_posterior(MODELS[name][0](), Gaussian(0.5))
    count = 4000
    draws = posterior.sample(count, generator=rng(0))
    for layer, part in deviations(posterior, draws).items():
        variance = dense_covariances(posterior)[layer].diagonal(dim1=-2, dim2=-1)
        assert (part.mean(0).abs() <= 5 * (variance / count).sqrt()).all()
        assert ((part.square().mean(0) - variance).abs() <= 5 * variance * (2 / count) ** 0.5).all()
    first, last = (part.reshape(count, -1) for part in deviations(posterior, draws).values())
    correlation = torch.corrcoef(torch.cat([first, last], dim=1).T)[: first.shape[1], first.shape[1] :]
    assert correlation.abs().max() < 6 / count**0.5


def test_draws_hold_one_value_of_each_parameter() -> None:
    """Named and shaped like the model's parameters, in their dtype; deterministic parameters are not among them."""
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.LayerNorm(9), nn.PReLU(9), nn.Linear(9, 2)).float()
    draws = random_posterior(model, Gaussian(0.5)).sample(6, generator=rng(0))
    parameters = dict(model.named_parameters())
    assert set(draws.values) == set(parameters) - {"3.weight"}
    for name, value in draws.values.items():
        assert value.shape == (6, *parameters[name].shape)
        assert value.dtype == torch.float32
        assert not value.requires_grad
    assert len(draws) == 6
    for index, draw in enumerate(draws):
        assert all(torch.equal(value, draws.values[name][index]) for name, value in draw.items())
    assert len(list(draws)) == 6


# Draws are functions


def test_draws_are_the_same_functions_at_every_call() -> None:
    """Also on another batch: the outputs of an input do not depend on what it is asked with."""
    posterior = random_posterior(mlp(), Gaussian(0.5))
    draws = posterior.sample(8, generator=rng(0))
    x = randn(6, 3, seed=1)
    first, again = posterior.predict(x, draws=draws), posterior.predict(x, draws=draws)
    assert torch.equal(first.outputs, again.outputs)
    part = posterior.predict(x[2:4], draws=draws)
    assert_close(part.outputs, first.outputs[:, 2:4], rtol=1e-12, atol=1e-13)
    assert len(draws) == 8


def test_outputs_are_the_models_under_each_draw() -> None:
    """``outputs[s]`` is the model run with the ``s``-th draw of every layer, by torch.func."""
    model = cnn()
    posterior = random_posterior(model, Gaussian(0.5))
    draws, x = posterior.sample(4, generator=rng(0)), randn(5, 2, 3, 4, seed=1)
    prediction = posterior.predict(x, draws=draws)
    assert isinstance(prediction, MixturePrediction)
    assert prediction.outputs.shape == (4, 5, 2)
    for index in range(4):
        own = {name: value[index] for name, value in draws.values.items()}
        assert_close(prediction.outputs[index], functional_call(model, own, x).detach(), **CLOSE)
    assert torch.equal(sampled_outputs(model, posterior.mean, draws, x), prediction.outputs)


def test_draws_do_not_move_with_the_model() -> None:
    """Training on changes neither draws nor what they predict."""
    model = mlp()
    posterior = random_posterior(model, Gaussian(0.5))
    draws, x = posterior.sample(4, generator=rng(0)), randn(5, 3, seed=1)
    before, values = posterior.predict(x, draws=draws), copy.deepcopy(draws.values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-2.0)
    assert torch.equal(posterior.predict(x, draws=draws).outputs, before.outputs)
    assert all(torch.equal(value, draws.values[name]) for name, value in values.items())


def test_draws_may_be_written_by_hand() -> None:
    """Any weights of all of the posterior's parameters serve as draws, such as an ensemble's."""
    model = seeded(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)))
    posterior = random_posterior(model, Gaussian(0.5))
    x = randn(5, 3, seed=1)
    values = {name: value.expand(2, *value.shape) for name, value in posterior.mean.items()}
    draws = Draws(values | {"2.bias": torch.tensor([[0.0], [10.0]], dtype=torch.float64)})
    outputs = posterior.predict(x, draws=draws).outputs
    assert_close(outputs[1] - outputs[0], torch.full((5, 1), 10.0, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("method", ["linearized", "sampling"])
def test_draws_of_another_posterior_are_refused(method: str) -> None:
    """Weights that the model lacks would be left aside, and those without a draw stay at the mean: no uncertainty."""
    posterior, x = random_posterior(mlp(), Gaussian(0.5)), randn(5, 3, seed=1)
    other = random_posterior(seeded(nn.Linear(3, 2)), Gaussian(0.5)).sample(3)
    wider = random_posterior(seeded(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))), Gaussian())
    last = Draws({"2.weight": posterior.sample(3).values["2.weight"]})
    for draws, difference in [
        (other, r"\n  0\.bias: draws None, posterior \(4,\).*\n  bias: draws \(2,\), posterior None"),
        (wider.sample(3), r"\n  0\.weight: draws \(5, 3\), posterior \(4, 3\)"),
        (last, r"\n  0\.bias: draws None, posterior \(4,\)"),
    ]:
        message = r"(?s)draws= are of another posterior\..*draws=posterior\.sample\(num_samples\).*" + difference
        with pytest.raises(ArgumentError, match=message):
            posterior.predict(x, method, draws=draws)
        with pytest.raises(ArgumentError, match=message):
            posterior.function_samples(x, draws=draws)
    for thing in (8, torch.ones(2)):
        with pytest.raises(ArgumentError, match=r"(?s)draws=.* is not allowed\. Allowed: Draws"):
            posterior.predict(x, method, draws=thing)  # type: ignore[arg-type]


# Randomness


def test_generator_is_respected() -> None:
    posterior, x = random_posterior(mlp(), Gaussian(0.5)), randn(5, 3, seed=1)

    def outputs(seed: int) -> Tensor:
        return posterior.predict(x, method="sampling", num_samples=3, generator=rng(seed)).outputs

    before = torch.get_rng_state()
    assert torch.equal(outputs(0), outputs(0))
    assert not torch.equal(outputs(0), outputs(1))
    first, again = posterior.sample(3, generator=rng(0)), posterior.sample(3, generator=rng(0))
    assert all(torch.equal(value, again.values[name]) for name, value in first.values.items())
    assert torch.equal(posterior.predict(x, draws=first).outputs, outputs(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_generator_the_global_one_serves() -> None:
    posterior, x = random_posterior(mlp(), Categorical()), randn(5, 3, seed=1)
    for method in ("sampling", "linearized"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first = posterior.predict(x, method=method, num_samples=3).logits
            second = posterior.predict(x, method=method, num_samples=3).logits
            torch.manual_seed(0)
            assert torch.equal(posterior.predict(x, method=method, num_samples=3).logits, first)
        assert not torch.equal(first, second)


# Buffers and modes


@pytest.mark.parametrize("method", ["linearized", "sampling"])
def test_buffers_are_the_posteriors_own(method: str) -> None:
    """Batch statistics are those at the snapshot: used in evaluation mode, neither updated nor read from the model."""
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 2))).train()
    for _ in range(5):
        model(randn(20, 3, seed=2))
    posterior = random_posterior(model, Gaussian(0.5))
    x = randn(5, 3, seed=1)
    before = posterior.predict(x, method, num_samples=4, generator=rng(0))
    tracked = model[1].running_mean.clone()
    model(10 + randn(20, 3, seed=3))
    assert not torch.equal(model[1].running_mean, tracked)
    after = posterior.predict(x, method, num_samples=4, generator=rng(0))
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.covariance, after.covariance)
    assert torch.equal(posterior.mean["1.running_mean"], tracked)
    assert_close(posterior.predict(x[:1], method, num_samples=4, generator=rng(0)).mean, before.mean[:1], **CLOSE)


def test_dropout_is_off() -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.Linear(4, 2))).train()
    posterior = random_posterior(model, Gaussian(0.5))
    x, draws = randn(5, 3, seed=1), posterior.sample(4, generator=rng(0))
    assert torch.equal(posterior.predict(x, draws=draws).outputs, posterior.predict(x, draws=draws).outputs)
    assert torch.equal(posterior.predict(x).mean, posterior.predict(x).mean)


# Where sampling and linearising are one


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_a_linear_models_moments_are_the_linearised_ones(damping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws that are a quadrature rule for the Gaussian give the closed form to rounding, where the model is affine."""
    model = seeded(nn.Linear(3, 2))
    posterior = random_posterior(model, Gaussian(torch.tensor([0.5, 0.2], dtype=torch.float64)), damping=damping)
    x = randn(5, 3, seed=1)
    draws = basis_draws(posterior, monkeypatch, scale=8**0.5)
    sampled, linearized = posterior.predict(x, draws=draws), posterior.predict(x)
    assert_close(sampled.mean, linearized.mean, **CLOSE)
    assert_close(sampled.covariance, linearized.covariance, **CLOSE)


def test_a_linear_models_samples_converge_to_the_linearised_prediction() -> None:
    """Mean, variance, density and quantiles of 20 000 random draws."""
    posterior = random_posterior(seeded(nn.Linear(3, 2)), Gaussian(0.5))
    x, count = randn(5, 3, seed=1), 20_000
    sampled = posterior.predict(x, method="sampling", num_samples=count, generator=rng(0))
    exact = posterior.predict(x)
    error = 5 * exact.stddev / count**0.5
    assert ((sampled.mean - exact.mean).abs() <= error).all()
    assert ((sampled.variance - exact.variance).abs() <= 2**0.5 * error * exact.stddev).all()
    assert_close(sampled.log_prob(exact.mean + 0.3), exact.log_prob(exact.mean + 0.3), rtol=0.0, atol=0.05)
    for end, expected in zip(sampled.interval(0.9), exact.interval(0.9), strict=True):
        assert ((end - expected).abs() <= 3 * error).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_sharp_posteriors_moments_are_the_linearised_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any smooth model is affine over a posterior that is narrow enough: both methods share blocks and places."""
    make, shape = MODELS[name]
    posterior = random_posterior(make(), Gaussian(0.5), num_data=10**10)
    x = randn(*shape, seed=1)
    total = sum(math.prod(gaussian.shape) for gaussian in posterior.blocks.values())
    sampled = posterior.predict(x, draws=basis_draws(posterior, monkeypatch, scale=total**0.5))
    linearized = posterior.predict(x)
    assert_close(sampled.mean, linearized.mean, rtol=1e-5, atol=1e-5)
    scale = linearized.epistemic_variance.mean()
    assert_close(sampled.epistemic_covariance / scale, linearized.epistemic_covariance / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [2, 12], ids=["one by one", "at once"])
def test_outputs_are_differentiable_in_inputs_that_ask(count: int) -> None:
    """By finite differences; in nothing else, and not where gradients are off."""
    posterior = random_posterior(mlp(), Gaussian(0.5))
    draws, x = posterior.sample(count, generator=rng(0)), randn(2, 3, seed=1).requires_grad_()

    def outputs(inputs: Tensor) -> Tensor:
        return sampled_outputs(posterior.model, posterior.mean, draws, inputs)

    assert torch.autograd.gradcheck(outputs, x, fast_mode=True)
    assert not outputs(x.detach()).requires_grad
    with torch.no_grad():
        assert not outputs(x).requires_grad
    outputs(x).sum().backward()
    for tensor in (*posterior.model.parameters(), *posterior.mean.values(), *draws.values.values()):
        assert tensor.grad is None
