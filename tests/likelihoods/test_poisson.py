"""The Poisson likelihood against SciPy, PyTorch and enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import BayesKfacError, TargetError
from bayes_kfac.likelihoods import Poisson
from tests.helpers import randn, rng, seeded

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def data(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    output = randn(*shape, seed=seed)
    return output, torch.poisson((output + 0.3).exp(), generator=rng(seed + 1))


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 3), (7, 2, 3)])
def test_loss_is_minus_the_log_probability_summed_over_an_examples_counts(shape: tuple[int, ...]) -> None:
    output, target = data(*shape)
    expected = -stats.poisson(output.exp().numpy()).logpmf(target.numpy()).reshape(7, -1).sum(1)
    assert_close(Poisson().negative_log_likelihood(output, target), torch.as_tensor(expected), **TIGHT)
    theirs = functional.poisson_nll_loss(output, target, reduction="sum") / 7
    assert_close(Poisson()(output, target) - (target + 1).lgamma().sum() / 7, theirs, **TIGHT)


def test_target_gradient_is_rate_minus_count() -> None:
    output, target = data(7, 3)
    assert_close(Poisson().target_gradient(output, target), output.exp() - target, **TIGHT)


@settings(deadline=None, max_examples=30)
@given(output=st.floats(-8.0, 4.0))
def test_fisher_is_the_expectation_over_counts(output: float) -> None:
    """``Σ_y p(y) g_y²`` by enumeration up to 400 is the rate, and the root squared."""
    logs = torch.full((401, 1), output, dtype=torch.float64)
    counts = torch.arange(401, dtype=torch.float64)[:, None]
    probs = Poisson().distribution(logs).log_prob(counts).exp()
    expected = (probs * Poisson().target_gradient(logs, counts).square()).sum()
    assert_close(expected.item(), math.exp(output), rtol=1e-9, atol=0.0)
    assert_close(Poisson().fisher_root(logs[:1]).square().item(), math.exp(output), rtol=1e-12, atol=0.0)


def test_sampled_targets_are_counts_at_their_rates() -> None:
    output, _ = data(3, 2)
    likelihood, count = Poisson(), 20_000
    samples = likelihood.sample_gradient(output, count, rng(2))
    targets = output.exp() - samples
    rounded = targets.round()
    assert_close(targets, rounded, rtol=0.0, atol=1e-12)
    assert (rounded >= 0).all()
    assert_close(samples[7], likelihood.target_gradient(output, rounded[7]), **TIGHT)
    assert ((rounded.mean(0) - output.exp()).abs() <= 5 * (output.exp() / count).sqrt()).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, 800.0])
def test_rates_that_are_no_numbers_are_left_for_the_trainer_to_report(value: float) -> None:
    samples = Poisson().sample_gradient(torch.tensor([[0.0], [value]]), 3, rng(0))
    assert samples[:, 0].isfinite().all()
    assert not samples[:, 1].isfinite().any()


def test_large_rates_are_sampled() -> None:
    """At a rate of e^30 the gradient, in units of its deviation, is a standard normal."""
    output = torch.full((1, 1), 30.0, dtype=torch.float64)
    standard = Poisson().sample_gradient(output, 4000, rng(0)) / (0.5 * output).exp()
    assert abs(float(standard.mean())) < 0.1
    assert abs(float(standard.std()) - 1) < 0.1


@pytest.mark.parametrize("value", [-1.0, 0.5, math.nan, math.inf])
def test_targets_that_are_no_counts_are_refused(value: float) -> None:
    with pytest.raises(TargetError, match=r"must hold counts; allowed: 0\.0, 1\.0") as caught:
        Poisson()(torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [value]]))
    assert isinstance(caught.value, BayesKfacError)


@pytest.mark.parametrize(("output", "target"), [((4,), (4, 1)), ((4, 1), (4,)), ((4, 2), (4, 1))])
def test_targets_never_broadcast(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match="must be equal"):
        Poisson()(torch.zeros(output), torch.zeros(target))


def test_targets_that_are_not_floats_are_refused() -> None:
    with pytest.raises(TargetError, match=r"must be floating point.*target\.to\("):
        Poisson()(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.int64))


def toy(count: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.linspace(-1, 1, count, dtype=torch.float64)[:, None]
    rate = (1.5 + torch.sin(3 * x)).exp()
    return x, torch.poisson(rate, generator=rng(0)), rate


def network() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)))


def test_training_finds_the_rate() -> None:
    x, y, rate = toy()
    torch.manual_seed(0)
    loader = [(x[n::6], y[n::6]) for n in range(6)]
    posterior = bk.fit(network(), Poisson(), loader, num_data=len(x), epochs=60, lr=0.1, kl_clip=1e-2, progress=False)
    assert (posterior.predict(x).mean / rate).log().abs().max() < 0.3


def test_laplace_fits_tunes_and_comes_back_from_a_file(tmp_path) -> None:
    x, y, _ = toy(60)
    laplace = bk.Laplace(network(), Poisson()).fit([(x, y)], progress=False)
    before = laplace.log_marginal_likelihood()
    posterior = laplace.optimize_prior_precision().posterior()
    assert laplace.log_marginal_likelihood() > before
    posterior.save(tmp_path / "p.safetensors")
    again = bk.Posterior.load(tmp_path / "p.safetensors", network())
    assert type(again.likelihood) is Poisson
    assert torch.equal(again.predict(x).log_prob(y), posterior.predict(x).log_prob(y))
    laplace.optimize_prior_precision("validation", loader=[(x, y)], grid=[0.1, 1.0, 10.0], progress=False)


def test_laplace_of_one_linear_layer_is_the_dense_fisher() -> None:
    """``P = Σ_n rate_n x_n x_nᵀ + δ I``: a Bayesian Poisson regression's, written out."""
    x, y = randn(9, 3, seed=2), torch.ones(9, 1, dtype=torch.float64)
    model = seeded(nn.Sequential(nn.Linear(3, 1)))
    laplace = bk.Laplace(model, Poisson(), structure="dense", prior_precision=0.7).fit([(x, y)], progress=False)
    rows = torch.cat([x, torch.ones(9, 1, dtype=torch.float64)], 1)
    expected = torch.einsum("n,ni,nj->ij", model(x)[:, 0].detach().exp(), rows, rows)
    expected = expected + 0.7 * torch.eye(4, dtype=torch.float64)
    assert_close(laplace.posterior().blocks["0"].to_dense(), expected, rtol=1e-10, atol=1e-10)
