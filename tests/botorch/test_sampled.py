"""The surrogate of weight draws: the network under each of them, in BoTorch's shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.sampling.get_sampler import get_sampler
from botorch.sampling.index_sampler import IndexSampler
from torch import Tensor
from torch.func import functional_call
from torch.testing import assert_close

from bayes_kfac.botorch import SampledSurrogate
from bayes_kfac.errors import ArgumentError
from bayes_kfac.prediction import Draws
from tests.botorch.test_linearized import CLOSE, D, M, normalize, posterior_of, standardize
from tests.helpers import randn, rng


def surrogate_of(outputs: int = M, num_samples: int = 6, **options: object) -> SampledSurrogate:
    return SampledSurrogate(posterior_of(outputs), num_samples, num_outputs=outputs, generator=rng(0), **options)


@pytest.mark.parametrize("shape", [(4,), (3, 1), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("outputs", [1, M])
def test_values_are_the_networks_under_each_draw(outputs, shape):
    surrogate, X = surrogate_of(outputs), randn(*shape, D, seed=1)
    found = surrogate.posterior(X)
    assert type(found) is EnsemblePosterior
    assert found.values.shape == (*shape[:-1], 6, shape[-1], outputs)
    for index, draw in enumerate(surrogate.draws):
        expected = functional_call(surrogate.weight_posterior.model, draw, X).detach()
        assert_close(found.values[..., index, :, :], expected, **CLOSE)
    assert found.mean.shape == (*shape, outputs)
    assert torch.equal(surrogate.posterior(X).values, found.values)


def test_values_are_differentiable_in_the_inputs():
    surrogate = surrogate_of(num_samples=12)

    def values(X: Tensor) -> Tensor:
        return surrogate.posterior(X, observation_noise=True).values

    assert torch.autograd.gradcheck(values, randn(2, 2, D, seed=1).requires_grad_(), fast_mode=True)


def test_noise():
    """Independent for draws, points and outputs; the same at every call; that of the likelihood or a given one."""
    surrogate, X = surrogate_of(num_samples=4000), randn(3, 2, D, seed=1)
    plain = surrogate.posterior(X).values
    for noise, scale in ((True, 0.5), (torch.tensor([[4.0, 9.0]]), torch.tensor([2.0, 3.0]).double())):
        added = surrogate.posterior(X, observation_noise=noise).values - plain
        assert torch.equal(added, surrogate.posterior(X, observation_noise=noise).values - plain)
        assert_close(added[0], added[2], **CLOSE)
        standard = (added[0] / scale).flatten(1)
        assert_close(torch.cov(standard.mT), torch.eye(4, dtype=torch.float64), rtol=0, atol=0.1)
    by_point = torch.tensor([[1.0, 1.0], [100.0, 1.0]]).double()
    added = surrogate.posterior(X, observation_noise=by_point).values - plain
    assert_close(added.std(-3)[0], by_point.sqrt(), rtol=0.05, atol=0)


def test_some_outputs():
    surrogate, X = surrogate_of(), randn(3, 2, D, seed=1)
    whole = surrogate.posterior(X).values
    assert_close(surrogate.posterior(X, [1]).values, whole[..., 1:], **CLOSE)
    subset = surrogate.subset_output([1])
    assert subset.num_outputs == 1
    assert_close(subset.posterior(X).values, whole[..., 1:], **CLOSE)


def test_transforms():
    scaled, by_hand = normalize(3 * randn(9, D, seed=6) + 1), standardize(10 * randn(9, M, seed=7) + 4)
    X = randn(3, 2, D, seed=1)
    inner = surrogate_of().posterior((X - scaled.offset) / scaled.coefficient).values
    surrogate = surrogate_of(input_transform=scaled, outcome_transform=by_hand)
    assert_close(surrogate.posterior(X).values, by_hand.means + by_hand.stdvs * inner, **CLOSE)
    expected = by_hand.means[..., 1] + by_hand.stdvs[..., 1] * inner[..., 1]
    assert_close(surrogate.posterior(X, [1]).values.squeeze(-1), expected, **CLOSE)


def test_samplers_are_found():
    found = surrogate_of().posterior(randn(3, 2, D, seed=1))
    sampler = get_sampler(found, torch.Size([32]), seed=0)
    assert isinstance(sampler, IndexSampler)
    assert sampler(found).shape == (32, 3, 2, M)


def test_draws_may_be_given_and_are_kept():
    weights, X = posterior_of(), randn(2, D, seed=1)
    draws = weights.sample(5, generator=rng(1))
    surrogate = SampledSurrogate(weights, draws=draws, num_outputs=M)
    assert surrogate.draws is draws
    assert_close(surrogate.posterior(X).values, weights.predict(X, draws=draws).outputs, **CLOSE)
    noisy = surrogate.posterior(X, observation_noise=True).values
    assert_close(copy.deepcopy(surrogate).posterior(X, observation_noise=True).values, noisy)
    assert_close(surrogate.subset_output([0, 1]).posterior(X, observation_noise=True).values, noisy)


def test_wrong_arguments_are_named():
    with pytest.raises(ArgumentError, match="num_samples=0"):
        surrogate_of(num_samples=0)
    with pytest.raises(ArgumentError, match="draws= are of another posterior"):
        SampledSurrogate(posterior_of(), draws=Draws({"weight": torch.ones(3, M, D)}), num_outputs=M)
    with pytest.raises(ArgumentError, match="num_outputs=1, but the network has 2"):
        SampledSurrogate(posterior_of()).posterior(randn(2, D, seed=1))
    with pytest.raises(ArgumentError, match="observation_noise has shape"):
        surrogate_of().posterior(randn(2, D, seed=1), observation_noise=torch.ones(3, M))
