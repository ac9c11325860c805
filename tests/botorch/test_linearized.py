"""The linearised surrogate: the Gaussian of torch.func's Jacobians, in BoTorch's shapes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.models.model import ModelList
from botorch.models.transforms.input import InputPerturbation, Normalize
from botorch.models.transforms.outcome import Log, Standardize
from botorch.posteriors import GPyTorchPosterior, TransformedPosterior
from botorch.sampling import SobolQMCNormalSampler
from botorch.sampling.get_sampler import get_sampler
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac import Posterior
from bayes_kfac.botorch import LinearizedSurrogate
from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Categorical, Gaussian
from bayes_kfac.likelihoods.noise import GammaNoise
from bayes_kfac.prediction import Features
from tests.helpers import randn, seeded
from tests.posteriors import dense_function_covariance, dense_mean, random_posterior

#: The jitter on the diagonal is relative, 1.5e-10.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
D, M = 3, 2
STRUCTURES = [("kron", "factored"), ("kron", "exact"), ("dense", "exact"), ("unit_wise", "exact"), ("smw", "exact")]


def posterior_of(outputs: int = M, noise: Any = 0.5, **options: Any) -> Posterior:
    model = seeded(nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, outputs)))
    return random_posterior(model, Gaussian(noise), **options)


def surrogate_of(outputs: int = M, **options: Any) -> LinearizedSurrogate:
    return LinearizedSurrogate(posterior_of(outputs), num_outputs=outputs, **options)


def dense(posterior: Posterior, X: Tensor) -> tuple[Tensor, Tensor]:
    """The mean ``[q, m]`` and the covariance ``[q·m, q·m]`` of the outputs at the points ``[q, d]``."""
    joint = dense_function_covariance(posterior, X, X).transpose(1, 2).flatten(2).flatten(0, 1)
    return dense_mean(posterior, X), joint


def covariance(posterior: GPyTorchPosterior) -> Tensor:
    return posterior.distribution.covariance_matrix


# The joint Gaussian


@pytest.mark.parametrize(("structure", "damping"), STRUCTURES, ids="-".join)
@pytest.mark.parametrize("shape", [(4,), (1,), (3, 1), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("outputs", [1, M])
def test_each_batch_has_the_joint_gaussian_of_its_points(outputs, shape, structure, damping):
    weights = posterior_of(outputs, structure=structure, damping=damping)
    X = randn(*shape, D, seed=1)
    found = LinearizedSurrogate(weights, num_outputs=outputs).posterior(X)
    assert type(found) is GPyTorchPosterior
    assert isinstance(found.distribution, MultitaskMultivariateNormal if outputs > 1 else MultivariateNormal)
    assert found.mean.shape == found.variance.shape == (*shape, outputs)
    size = shape[-1] * outputs
    means = found.mean.reshape(-1, shape[-1], outputs)
    for points, mean, joint in zip(
        X.reshape(-1, shape[-1], D), means, covariance(found).reshape(-1, size, size), strict=True
    ):
        expected = dense(weights, points)
        assert_close(mean, expected[0], **CLOSE)
        assert_close(joint, expected[1], **CLOSE)
    diagonal = covariance(found).diagonal(dim1=-2, dim2=-1)
    assert_close(found.variance, diagonal.reshape(*shape, outputs))


def test_a_network_may_give_one_number_for_each_input():
    """Outputs ``[batch]`` are those of one outcome."""
    net, X = seeded(nn.Linear(D, 1)), randn(3, 4, D, seed=1)
    found, expected = (
        LinearizedSurrogate(random_posterior(nn.Sequential(net, *last), Gaussian(0.5)), num_outputs=1).posterior(X)
        for last in ([nn.Flatten(0)], [])
    )
    assert_close(found.mean, expected.mean, **CLOSE)
    assert_close(covariance(found), covariance(expected), **CLOSE)


def test_covariances_between_batches_are_not_computed(monkeypatch):
    """Five batches of two points: five blocks, and not one of ten."""
    groups = []
    computed = Features.covariance

    def spy(self: Features, other: Features, groups_: int = 1) -> Tensor:
        groups.append(groups_)
        return computed(self, other, groups_)

    monkeypatch.setattr(Features, "covariance", spy)
    surrogate_of().posterior(randn(5, 2, D, seed=1))
    assert groups == [5]


@pytest.mark.parametrize("conditioned", [False, True])
def test_moments_are_differentiable_in_the_inputs(conditioned):
    surrogate = surrogate_of()
    if conditioned:
        surrogate = surrogate.condition_on_observations(randn(2, D, seed=3), randn(2, M, seed=4))

    def moments(X: Tensor) -> tuple[Tensor, Tensor]:
        found = surrogate.posterior(X, observation_noise=True)
        return found.mean, covariance(found)

    assert torch.autograd.gradcheck(moments, randn(2, 2, D, seed=1).requires_grad_(), fast_mode=True)


def test_nothing_is_in_a_graph_that_did_not_ask():
    found = surrogate_of().posterior(randn(2, D, seed=1))
    assert not found.mean.requires_grad
    assert not found.variance.requires_grad


@pytest.mark.parametrize("outputs", [1, M])
def test_more_points_than_weights_can_be_drawn_at(outputs):
    """And the same point twice: the Gaussian is degenerate, which is no error and no warning."""
    X = randn(1, 40, D, seed=1)
    X = torch.cat([X, X[:, :5], X[:, :1] + 1e-9], dim=1)
    found = surrogate_of(outputs).posterior(X)
    draws = found.rsample(torch.Size([7]))
    assert draws.shape == (7, 1, 46, outputs)
    assert_close(draws[:, :, 40], draws[:, :, 0], rtol=1e-3, atol=1e-3)


def test_samplers_are_found_and_the_draws_have_the_gaussians_moments():
    found = surrogate_of().posterior(randn(2, D, seed=1))
    sampler = get_sampler(found, torch.Size([4096]), seed=0)
    assert isinstance(sampler, SobolQMCNormalSampler)
    draws = sampler(found).flatten(1)
    assert_close(draws.mean(0), found.mean.flatten(), rtol=0.02, atol=0.02)
    assert_close(torch.cov(draws.mT), covariance(found), rtol=0.05, atol=0.05)


# Noise


def test_noise_of_the_likelihood():
    for noise in (0.5, torch.tensor([0.5, 2.0], dtype=torch.float64), "learned", GammaNoise(6.0, 6.0)):
        weights = posterior_of(noise=noise)
        surrogate, X = LinearizedSurrogate(weights, num_outputs=M), randn(3, 2, D, seed=1)
        added = covariance(surrogate.posterior(X, observation_noise=True)) - covariance(surrogate.posterior(X))
        expected = weights.predict(X[0]).aleatoric_variance.double().flatten()
        assert_close(added, torch.diag(expected).expand(3, -1, -1), **CLOSE)


@pytest.mark.parametrize("shape", [(), (1, M), (4, M), (3, 4, M), (4, 1)], ids=str)
def test_noise_that_is_given(shape):
    surrogate, X = surrogate_of(), randn(3, 4, D, seed=1)
    noise = randn(*shape, seed=2).square()
    added = surrogate.posterior(X, observation_noise=noise).variance - surrogate.posterior(X).variance
    assert_close(added, noise.expand(3, 4, M), **CLOSE)
    one = surrogate.posterior(X, [1], observation_noise=noise).variance - surrogate.posterior(X, [1]).variance
    assert_close(one, noise.expand(3, 4, M)[..., 1:], **CLOSE)


# Outputs


@pytest.mark.parametrize("indices", [[0], [1], [1, 0], [-1]], ids=str)
@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("conditioned", [False, True])
def test_some_outputs(conditioned, standardized, indices):
    """By ``output_indices`` and as a surrogate of their own: the marginal of the Gaussian of all outputs."""
    surrogate = surrogate_of(outcome_transform=standardize(randn(9, M, seed=7)) if standardized else None)
    if conditioned:
        surrogate = surrogate.condition_on_observations(randn(2, D, seed=3), randn(2, M, seed=4))
    X = randn(2, 3, D, seed=1)
    whole = surrogate.posterior(X, observation_noise=True)
    joint = covariance(whole).reshape(2, 3, M, 3, M)[:, :, indices][..., indices].reshape(2, 3 * len(indices), -1)
    subset = surrogate.subset_output(indices)
    assert subset.num_outputs == len(indices)
    assert surrogate.num_outputs == M
    for found in (surrogate.posterior(X, indices, observation_noise=True), subset.posterior(X, observation_noise=True)):
        assert_close(found.mean, whole.mean[..., indices], **CLOSE)
        assert_close(covariance(found), joint, **CLOSE)


def test_subsets_of_subsets():
    surrogate, X = surrogate_of(3), randn(2, D, seed=1)
    subset = surrogate.subset_output([2, 0]).subset_output([1])
    assert_close(subset.posterior(X).mean, surrogate.posterior(X).mean[..., :1], **CLOSE)


def test_a_part_of_a_model_list():
    both = ModelList(surrogate_of(1), surrogate_of(1))
    X = randn(2, D, seed=1)
    assert_close(both.posterior(X).mean, surrogate_of(1).posterior(X).mean.expand(2, 2), **CLOSE)


def test_posterior_transforms():
    X, weights = randn(4, 3, D, seed=1), torch.tensor([0.5, -2.0], dtype=torch.float64)
    found = surrogate_of().posterior(X, posterior_transform=ScalarizedPosteriorTransform(weights))
    whole = surrogate_of().posterior(X)
    assert_close(found.mean, (whole.mean * weights).sum(-1, keepdim=True), **CLOSE)
    joint = covariance(whole).reshape(4, 3, M, 3, M)
    assert_close(covariance(found), torch.einsum("bicjd,c,d->bij", joint, weights, weights), **CLOSE)


# Transforms


def standardize(Y: Tensor) -> Standardize:
    transform = Standardize(Y.shape[-1])
    transform(Y)
    return transform


def normalize(X: Tensor) -> Normalize:
    transform = Normalize(X.shape[-1])
    transform(X)
    return transform


@pytest.mark.parametrize("outputs", [1, M])
def test_inputs_and_outcomes_are_scaled_there_and_back(outputs):
    """The same as scaling by hand; a surrogate does not learn its scales anew from what it predicts."""
    scaled, by_hand = normalize(3 * randn(9, D, seed=6) + 1), standardize(10 * randn(9, outputs, seed=7) + 4)
    X = randn(5, 2, D, seed=1)
    surrogate = surrogate_of(outputs, input_transform=scaled, outcome_transform=by_hand)
    inner = surrogate_of(outputs).posterior((X - scaled.offset) / scaled.coefficient)
    found = surrogate.posterior(X)
    assert type(found) is GPyTorchPosterior
    assert_close(found.mean, by_hand.means + by_hand.stdvs * inner.mean, **CLOSE)
    scales = by_hand.stdvs.flatten().repeat(2)
    assert_close(covariance(found), covariance(inner) * scales * scales[:, None], **CLOSE)
    assert not surrogate.train().posterior(X).mean.requires_grad
    assert_close(surrogate.posterior(X).mean, found.mean)


def test_outcomes_on_another_scale_are_transformed_by_their_draws():
    found = surrogate_of(1, outcome_transform=Log()).posterior(randn(2, D, seed=1))
    assert isinstance(found, TransformedPosterior)
    assert (found.rsample(torch.Size([16])) > 0).all()


def test_one_input_that_becomes_several():
    transform = InputPerturbation(torch.tensor([[0.0], [0.1]], dtype=torch.float64).expand(2, D))
    X = randn(4, 3, D, seed=1)
    found = surrogate_of(input_transform=transform).posterior(X)
    assert_close(found.mean, surrogate_of().posterior(transform.eval()(X)).mean, **CLOSE)


# A model among others


def test_it_is_a_model_of_its_own():
    """Copies predict the same; modes come and go without a warning; the network stays as it was."""
    weights = posterior_of()
    weights.model.train()
    surrogate, X = LinearizedSurrogate(weights, num_outputs=M), randn(2, D, seed=1)
    expected = surrogate.posterior(X)
    again = copy.deepcopy(surrogate).train().eval().posterior(X)
    assert_close(again.mean, expected.mean)
    assert_close(covariance(again), covariance(expected))
    assert weights.model.training
    assert surrogate.batch_shape == torch.Size()
    assert all(parameter.grad is None for parameter in weights.model.parameters())


def test_wrong_arguments_are_named():
    surrogate, X = surrogate_of(), randn(2, D, seed=1)
    with pytest.raises(ArgumentError, match=r"float32, but the network's weights are torch\.float64.*posterior\.to"):
        surrogate.posterior(X.float())
    with pytest.raises(ArgumentError, match=r"X has shape \(3,\)"):
        surrogate.posterior(X[0])
    with pytest.raises(ArgumentError, match=r"X has shape \(0, 3\).*at least one point"):
        surrogate.posterior(X[:0])
    with pytest.raises(ArgumentError, match=r"X is a ndarray.*torch\.as_tensor"):
        surrogate.posterior(X.numpy())
    surrogate.posterior(X)  # the columns are counted at later calls too
    with pytest.raises(ArgumentError, match="does not take inputs of d=2 columns"):
        surrogate.posterior(X[:, :2])
    for indices in ([], [2], [-3]):
        with pytest.raises(ArgumentError, match="output_indices"):
            surrogate.posterior(X, indices)
    with pytest.raises(ArgumentError, match=r"observation_noise has shape \(3, 2\)"):
        surrogate.posterior(X, observation_noise=torch.ones(3, M))
    with pytest.raises(ArgumentError, match=r"observation_noise has shape \(3,\)"):
        surrogate_of(1).posterior(X, observation_noise=torch.ones(3))
    with pytest.raises(ArgumentError, match="likelihood is Categorical"):
        LinearizedSurrogate(random_posterior(seeded(nn.Linear(D, M)), Categorical()))
    with pytest.raises(ArgumentError, match=r"posterior is a Linear.*fit\(\)"):
        LinearizedSurrogate(nn.Linear(D, M))
    with pytest.raises(ArgumentError, match="num_outputs=1, but the network has 2"):
        LinearizedSurrogate(posterior_of()).posterior(X)
    with pytest.raises(ArgumentError, match="num_outputs=3, but the network has 2"):
        LinearizedSurrogate(posterior_of(), num_outputs=3).posterior(X)


def test_float32_is_float32():
    """A network in single precision predicts in it."""
    weights = posterior_of().to(torch.float32)
    weights.likelihood.float()
    X = randn(4, 2, D, seed=1).float()
    found = LinearizedSurrogate(weights, num_outputs=M).posterior(X, observation_noise=True)
    assert found.mean.dtype == found.variance.dtype == torch.float32
    exact = surrogate_of().posterior(X.double(), observation_noise=True)
    assert_close(covariance(found).double(), covariance(exact), rtol=1e-4, atol=1e-4)
