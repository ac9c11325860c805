"""What every structure is for, on real data: a noisy trainer, a Laplace fit, and a posterior in a file."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac import structures
from tests.helpers import rng, seeded
from tests.posteriors import ESTIMATES, STRUCTURES

EPOCHS = 12


@pytest.fixture(params=STRUCTURES, ids="-".join)
def names(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@cache
def diabetes(size: int = 256) -> tuple[Tensor, Tensor]:
    """Ten standardised inputs and a standardised target."""
    x, y = (torch.as_tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    return (x / x.std(0))[:size], ((y - y.mean()) / y.std())[:size, None]


@cache
def digits(size: int = 256) -> tuple[Tensor, Tensor]:
    """Images of 8 x 8."""
    x, y = load_digits(return_X_y=True)
    return torch.as_tensor(x / 16, dtype=torch.float32)[:size].reshape(-1, 1, 8, 8), torch.as_tensor(y)[:size]


def mlp() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 1))).float()


def cnn() -> nn.Module:
    """Shared weights, a normalisation with a structure of its own, and classes."""
    return seeded(
        nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(27, 10))
    ).float()


def trainer(names: tuple[str, str], model: nn.Module, **options) -> bk.NoisyNaturalGradient:
    structure, damping = names
    return bk.NoisyNaturalGradient(
        model,
        bk.likelihoods.Gaussian(0.7),
        num_data=len(diabetes()[0]),
        lr=0.05,
        structure=structure,
        damping=damping,
        statistics_every=2,
        inverse_every=4,
        generator=rng(0),
        **options,
    )


def train(optimizer: bk.NoisyNaturalGradient, epochs: int = EPOCHS) -> list[float]:
    """The negative evidence lower bound over ``num_data`` at each step, by one sample."""
    x, y = diabetes()
    history = []
    for _ in range(epochs):
        for part in torch.arange(len(x)).split(64):
            with optimizer.sampled_params():
                optimizer.zero_grad()
                loss = optimizer.likelihood(optimizer.model(x[part]), y[part])
                loss.backward()
            optimizer.step()
            history.append(loss.item() + optimizer.kl().item() / optimizer.num_data)
    return history


def test_noisy_training_improves_a_finite_bound(names):
    optimizer = trainer(names, mlp())
    history = torch.tensor(train(optimizer))
    assert bool(torch.isfinite(history).all())
    assert history[-8:].mean() < history[:8].mean()
    prediction = optimizer.posterior().predict(diabetes()[0])
    assert bool((prediction.epistemic_variance > 0).all())
    assert prediction.log_prob(diabetes()[1]).mean() > -1.4  # that of the targets' own normal distribution is -1.42


def test_training_goes_on_bit_for_bit_from_a_checkpoint(names, tmp_path):
    optimizer = trainer(names, mlp())
    train(optimizer, 2)
    torch.save({"model": optimizer.model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(optimizer, 1)
    resumed = trainer(names, mlp())
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, 1)
    for name, value in optimizer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_a_laplace_fit_has_an_evidence_that_improves_by_tuning(names):
    structure, damping = names
    model, (x, y) = copy.deepcopy(_trained()), digits()
    laplace = bk.Laplace(model, bk.likelihoods.Categorical(), structure=structure, damping=damping)
    laplace.fit(DataLoader(TensorDataset(x, y), batch_size=100), progress=False)
    before = laplace.log_marginal_likelihood()
    laplace.optimize_prior_precision(progress=False)
    after = laplace.log_marginal_likelihood()
    assert bool(torch.isfinite(before))
    assert after > before
    posterior = laplace.posterior()
    assert bool(torch.isfinite(posterior.kl()))
    prediction = posterior.predict(x, generator=rng(0))
    assert bool((prediction.probs >= 0).all())
    if structure not in ESTIMATES:  # three batches tell too little
        assert (prediction.probs.argmax(-1) == y).float().mean() > 0.6  # the evidence likes broad priors


def test_a_posterior_comes_back_from_its_file(names, tmp_path):
    optimizer = trainer(names, mlp())
    train(optimizer, 1)
    posterior = optimizer.posterior()
    posterior.save(tmp_path / "p.safetensors")
    again = bk.Posterior.load(tmp_path / "p.safetensors", mlp())
    before, after = (p.predict(diabetes()[0]).variance for p in (posterior, again))
    assert torch.equal(before, after)
    draws, others = (p.sample(2, generator=rng(0)).values for p in (posterior, again))
    assert all(torch.equal(draws[name], others[name]) for name in draws)


def test_summaries_name_the_structure(names):
    optimizer = trainer(names, mlp())
    label = structures.get(names[0], damping=names[1], sharing="expand").label
    assert label in str(optimizer.summary())


@cache
def _trained() -> nn.Module:
    model, (x, y) = cnn(), digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model
