"""Surrogates that are saved, moved and put into lists: whole, or not at all."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement
from botorch.models import ModelList, SingleTaskGP
from botorch.models.transforms import Normalize
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac.botorch import LinearizedSurrogate, SampledSurrogate
from bayes_kfac.botorch.base import Surrogate
from bayes_kfac.errors import UsageError
from bayes_kfac.likelihoods import Gaussian
from tests.helpers import randn, rng, seeded
from tests.posteriors import random_posterior

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what BoTorch imports
D = 2
X = randn(4, D, seed=1)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 1))


def linearized() -> Surrogate:
    return LinearizedSurrogate(random_posterior(seeded(network()), Gaussian(0.5)), input_transform=Normalize(D))


def conditioned() -> Surrogate:
    surrogate = linearized()
    assert isinstance(surrogate, LinearizedSurrogate)
    return surrogate.condition_on_observations(randn(3, D, seed=2), randn(3, 1, seed=3))


def fitted() -> Surrogate:
    inputs = torch.rand(6, D, generator=rng(0), dtype=torch.float64)
    return LinearizedSurrogate.fit(inputs, inputs.sum(1, keepdim=True).sin(), network=seeded(network()), steps=2)


def sampled() -> Surrogate:
    return SampledSurrogate(random_posterior(seeded(network()), Gaussian(0.5)), 4, generator=rng(0))


KINDS = [linearized, conditioned, fitted, sampled]


def moments(surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    posterior = surrogate.posterior(X, observation_noise=True)
    return posterior.mean, posterior.variance


@pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.InputDataWarning")
@pytest.mark.parametrize("make", KINDS)
def test_files_copies_and_pickles_hold_the_whole(make, tmp_path: Path):
    surrogate = make()
    expected = moments(surrogate)
    torch.save(surrogate, tmp_path / "surrogate.pt")
    loaded = torch.load(tmp_path / "surrogate.pt", weights_only=False)
    for again in (loaded, copy.deepcopy(surrogate), pickle.loads(pickle.dumps(surrogate))):
        assert_close(moments(again), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.InputDataWarning")
@pytest.mark.parametrize("make", KINDS)
def test_a_state_dict_would_not_be_the_whole(make):
    """In a list of models and in an acquisition too; what it was refused for predicts as before."""
    surrogate = make()
    expected = moments(surrogate)
    outer = ModelList(surrogate, SingleTaskGP(X, X[:, :1]))
    acquisition = qLogExpectedImprovement(surrogate, best_f=0.0)
    for module in (surrogate, outer, acquisition):
        with pytest.raises(UsageError, match=r"no state_dict.*torch\.save\(surrogate"):
            module.state_dict()
    for module, state in ((surrogate, {}), (surrogate, {"likelihood.noise.scale": torch.ones(1)}), (acquisition, {})):
        with pytest.raises(UsageError, match="no state_dict"):
            module.load_state_dict(state)
    assert_close(moments(surrogate), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.InputDataWarning")
@pytest.mark.parametrize("make", KINDS)
def test_stays_where_its_posterior_is(make):
    surrogate = make()
    expected = moments(surrogate)
    for move in (nn.Module.float, lambda module: module.to(torch.float32), lambda module: module.to("meta")):
        for module in (surrogate, qLogExpectedImprovement(surrogate, best_f=0.0)):
            with pytest.raises(UsageError, match=r"float64 on cpu.*posterior\.to"):
                move(module)
    assert_close(moments(surrogate.double().cpu().to(X)), expected, rtol=0, atol=0)


def test_transforms_come_to_the_network():
    """Those of BoTorch are in torch's default dtype unless they are told."""
    transform = Normalize(D, bounds=torch.tensor([[0.0, 0.0], [3.0, 7.0]]))
    surrogate = LinearizedSurrogate(random_posterior(seeded(network()), Gaussian(0.5)), input_transform=transform)
    assert transform.bounds.dtype == torch.float32
    assert surrogate.to(X).input_transform.bounds.dtype == torch.float64


def test_a_posterior_that_was_moved_makes_another():
    surrogate = linearized()
    moved = LinearizedSurrogate(surrogate.weight_posterior.to(torch.float32)).float()
    assert moved.posterior(X.float()).mean.dtype == torch.float32


def test_the_file_of_a_posterior_is_enough_for_one_that_was_made_from_it(tmp_path: Path):
    surrogate = linearized()
    surrogate.weight_posterior.save(tmp_path / "posterior.safetensors")
    again = type(surrogate.weight_posterior).load(tmp_path / "posterior.safetensors", seeded(network()))
    assert_close(moments(LinearizedSurrogate(again, input_transform=surrogate.input_transform)), moments(surrogate))
