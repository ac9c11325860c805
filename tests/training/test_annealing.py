"""Temperature and size of the data set may be set on the way, and reach everything that goes by them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError
from bayes_kfac.training.tuning import tune_prior_precision
from tests.helpers import randn, seeded

X, Y = randn(12, 3, seed=0), randn(12, 2, seed=1)
CHANGES = {"temperature": 0.01, "num_data": 4800}


def make(method: Any = bk.NoisyKFAC, **options: Any) -> Any:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    likelihood = bk.likelihoods.Gaussian(bk.likelihoods.GammaNoise(2.0, 2.0))  # whose KL is weighed by both
    generator = torch.Generator().manual_seed(0)
    defaults = {"num_data": 48, "statistics_every": 2, "inverse_every": 4, "fisher": "exact", "generator": generator}
    return method(model, likelihood, **{**defaults, **options})


def train(optimizer: Any, steps: int) -> Any:
    for _ in range(steps):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            optimizer.likelihood(optimizer.model(X), Y).backward()
        optimizer.step()
    return optimizer


def weights(optimizer: Any) -> list[Tensor]:
    return [*optimizer.model.parameters(), *optimizer.likelihood.parameters()]


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("extrinsic_damping", [0.0, 0.1])
@pytest.mark.parametrize("method", [bk.NoisyKFAC, bk.NaturalGradient])
def test_setting_is_as_loading_the_state_into_an_optimizer_that_was_made_with_it(method, extrinsic_damping, name):
    optimizer = train(make(method, extrinsic_damping=extrinsic_damping), 6)
    state = copy.deepcopy([part.state_dict() for part in (optimizer.model, optimizer.likelihood, optimizer)])
    setattr(optimizer, name, CHANGES[name])
    other = make(method, extrinsic_damping=extrinsic_damping, **{name: CHANGES[name]})
    for part, own in zip((other.model, other.likelihood, other), state, strict=True):
        part.load_state_dict(own)
    for trained in (optimizer, other):
        train(trained, 7)
    for ours, theirs in zip(weights(optimizer), weights(other), strict=True):
        assert torch.equal(ours, theirs)
    assert getattr(optimizer.posterior().provenance, name) == CHANGES[name]


@pytest.mark.parametrize("name", CHANGES)
def test_posterior_evidence_and_tuning_go_by_what_was_set(name):
    """With steps of no length the statistics are those of an optimizer that had it from the start."""
    still = {"lr": 0.0, "deterministic_lr": 0.0, "method": bk.NaturalGradient}
    optimizer, other = train(make(**still), 3), make(**still, **{name: CHANGES[name]})
    setattr(optimizer, name, CHANGES[name])
    train(optimizer, 3)
    train(other, 6)
    for ours, theirs in zip(optimizer.posterior().blocks.values(), other.posterior().blocks.values(), strict=True):
        assert_close(ours.to_dense(), theirs.to_dense())
    evidences = [
        bk.Laplace.from_trainer(trained, [(X, Y)], progress=False).log_marginal_likelihood()
        for trained in (optimizer, other)
    ]
    assert_close(*evidences)
    for trained in (optimizer, other):
        tune_prior_precision(trained)
    assert optimizer.prior_precision == pytest.approx(other.prior_precision)


def test_noise_and_the_kl_follow_at_the_next_refresh():
    optimizer = train(make(lr=1e-9, inverse_every=1, warmup=False), 2)
    before = optimizer.blocks["0"].posterior.to_dense().trace()
    optimizer.temperature = 1e-3
    train(optimizer, 1)
    assert 300 < optimizer.blocks["0"].posterior.to_dense().trace() / before < 1000


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_steps_until_then_are_of_the_length_that_they_had(temperature):
    """The factors are those of before, and with the scale of now steps would be a thousand times as long or short."""
    steps = []
    for change in (1.0, temperature):
        optimizer = train(make(inverse_every=100, prior_precision=1e-6, kl_clip=None), 11)
        before = [value.detach().clone() for value in optimizer.model.parameters()]
        optimizer.temperature = change
        train(optimizer, 1)
        steps.append([now.detach() - own for now, own in zip(optimizer.model.parameters(), before, strict=True)])
    for with_change, without in zip(*steps, strict=True):
        assert_close(with_change, without, rtol=0.02, atol=1e-6)


def test_a_data_set_that_grows_takes_larger_batches():
    optimizer = make(num_data=6)
    with pytest.raises(ArgumentError, match="num_data=6 is smaller than a batch of 12"):
        train(optimizer, 1)
    optimizer.num_data = 12
    train(optimizer, 1)


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("temperature", "hot"), ("num_data", 2.5)])
def test_what_could_not_be_passed_cannot_be_set(name, value):
    optimizer = make()
    before = getattr(optimizer, name)
    with pytest.raises(ArgumentError, match=name):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before


@pytest.mark.parametrize("name", ["fisher", "warmup"])
def test_what_the_statistics_were_made_with_cannot_be_set(name):
    with pytest.raises(AttributeError):
        setattr(make(), name, "mc")
