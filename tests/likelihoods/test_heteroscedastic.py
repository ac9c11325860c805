"""The heteroscedastic Gaussian against SciPy, PyTorch, quadrature and the Gaussian of one scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import BayesKfacError, TargetError
from bayes_kfac.likelihoods import Gaussian, HeteroscedasticGaussian
from tests.helpers import randn, rng, seeded

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def data(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs ``[*shape[:-1], 2 d]`` and targets ``[*shape]``."""
    return randn(*shape[:-1], 2 * shape[-1], seed=seed), randn(*shape, seed=seed + 1)


@pytest.mark.parametrize("shape", [(7, 1), (7, 3), (7, 2, 3)])
def test_loss_is_the_density_of_the_first_half_as_means_and_the_second_as_log_scales(shape: tuple[int, ...]) -> None:
    output, target = data(*shape)
    mean, scale = output[..., : shape[-1]], output[..., shape[-1] :].exp()
    expected = -stats.norm(mean.numpy(), scale.numpy()).logpdf(target.numpy()).reshape(7, -1).sum(1)
    assert_close(HeteroscedasticGaussian().negative_log_likelihood(output, target), torch.as_tensor(expected), **TIGHT)
    theirs = functional.gaussian_nll_loss(mean, target, scale.square(), full=True, reduction="sum") / 7
    assert_close(HeteroscedasticGaussian()(output, target), theirs, **TIGHT)


def test_with_one_scale_it_is_the_gaussian() -> None:
    """Loss, gradient and Fisher of the means."""
    mean, target = randn(5, 2, seed=0), randn(5, 2, seed=1)
    output = torch.cat([mean, torch.full_like(mean, math.log(0.3))], -1)
    gaussian, own = Gaussian(torch.tensor(0.3, dtype=torch.float64)), HeteroscedasticGaussian()
    assert_close(own(output, target), gaussian(mean, target), **TIGHT)
    gradient = own.target_gradient(output, target)
    assert_close(gradient[:, :2], gaussian.target_gradient(mean, target), **TIGHT)
    assert_close(own.fisher_root(output)[:2, :, :2], gaussian.fisher_root(mean), **TIGHT)


@settings(deadline=None, max_examples=30)
@given(log_scale=st.floats(-6.0, 6.0), mean=st.floats(-3.0, 3.0))
def test_fisher_is_the_expectation_over_targets(log_scale: float, mean: float) -> None:
    """``E g gᵀ = diag(1/σ², 2)``, whose integrand is a polynomial of degree 4 in the target: 5 nodes are exact."""
    output = torch.tensor([[mean, log_scale]], dtype=torch.float64)
    nodes, weights = (torch.as_tensor(each) for each in np.polynomial.hermite_e.hermegauss(5))
    targets = (mean + math.exp(log_scale) * nodes).unsqueeze(-1)
    gradient = HeteroscedasticGaussian().target_gradient(output.expand(5, 2), targets)
    expected = torch.einsum("n,ni,nj->ij", weights / weights.sum(), gradient, gradient)
    columns = HeteroscedasticGaussian().fisher_root(output)[:, 0]
    scale = torch.tensor([math.exp(log_scale), 1.0], dtype=torch.float64)
    assert_close(columns.mT @ columns * scale * scale[:, None], expected * scale * scale[:, None], rtol=1e-8, atol=1e-8)
    exact = torch.tensor([math.exp(-2 * log_scale), 2.0], dtype=torch.float64)
    assert_close(columns.mT @ columns, exact.diag(), rtol=1e-12, atol=0.0)


def test_sampled_gradients_are_of_targets() -> None:
    """Each is one target's gradient: that of ``mean − scale² ·`` its first half."""
    output, _ = data(4, 3)
    likelihood = HeteroscedasticGaussian()
    sampled = likelihood.sample_gradient(output, 5, rng(0))
    mean, log_scale = output.chunk(2, -1)
    targets = mean - (2 * log_scale).exp() * sampled[..., :3]
    for gradient, target in zip(sampled, targets, strict=True):
        assert_close(gradient, likelihood.target_gradient(output, target), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("output", "target", "hint"),
    [
        ((4, 2), (4,), r"target\.reshape\(\(4, 1\)\)"),
        ((4, 3, 2), (4, 3), r"target\.reshape\(\(4, 3, 1\)\)"),
        ((4, 1), (4, 1), "two outputs for each target"),
        ((4, 3), (4, 3), "two outputs for each target"),
        ((4, 2), (4, 2), "two outputs for each target"),
        ((4, 2), (1, 1), "two outputs for each target"),
        ((8,), (4,), "two outputs for each target"),
    ],
)
def test_other_shapes_are_refused(output: tuple[int, ...], target: tuple[int, ...], hint: str) -> None:
    with pytest.raises(TargetError, match=hint) as caught:
        HeteroscedasticGaussian()(torch.zeros(output), torch.zeros(target))
    assert isinstance(caught.value, BayesKfacError)


def test_targets_that_are_not_floats_are_refused() -> None:
    with pytest.raises(TargetError, match=r"must be floating point.*target\.to\("):
        HeteroscedasticGaussian()(torch.zeros(4, 2), torch.zeros(4, 1, dtype=torch.int64))


def toy(count: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the true log-scale: the noise grows from left to right."""
    x = torch.linspace(-1, 1, count, dtype=torch.float64)[:, None]
    log_scale = -1.5 + x
    return x, torch.sin(3 * x) + log_scale.exp() * randn(count, 1, seed=0), log_scale


def network() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2)))


def test_training_finds_the_noise() -> None:
    """``bk.fit`` from a poor start comes near the truth's log-likelihood of the data, which no one scale does."""
    x, y, log_scale = toy(200)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    loader = [(x[n::4], y[n::4]) for n in range(4)]
    options = {"lr": 0.1, "prior_precision": 0.1, "temperature": 0.1}
    posterior = bk.fit(model, HeteroscedasticGaussian(), loader, num_data=len(x), epochs=150, progress=False, **options)
    prediction, residual = posterior.predict(x), y - torch.sin(3 * x)
    truth = Normal(torch.sin(3 * x), log_scale.exp()).log_prob(y).mean()
    one_scale = Normal(0.0, residual.std()).log_prob(residual).mean()
    assert truth - prediction.log_prob(y).mean() < 0.1 < truth - one_scale
    found = 0.5 * prediction.aleatoric_variance.log()
    assert (found - log_scale).abs().max() < 0.5


@pytest.mark.parametrize("structure", ["kron", "dense", "diagonal"])
def test_laplace_fits_tunes_and_comes_back_from_a_file(structure: str, tmp_path) -> None:
    x, y, _ = toy(60)
    model = network()
    laplace = bk.Laplace(model, HeteroscedasticGaussian(), structure=structure).fit([(x, y)], progress=False)
    before = laplace.log_marginal_likelihood()
    posterior = laplace.optimize_prior_precision().posterior()
    assert laplace.log_marginal_likelihood() > before
    posterior.save(tmp_path / "p.safetensors")
    again = bk.Posterior.load(tmp_path / "p.safetensors", network())
    assert type(again.likelihood) is HeteroscedasticGaussian
    assert torch.equal(again.predict(x).log_prob(y), posterior.predict(x).log_prob(y))
    laplace.optimize_prior_precision("validation", loader=[(x, y)], grid=[0.1, 1.0, 10.0], progress=False)
    with pytest.raises(bk.errors.ArgumentError, match=r"noise=True are for .* with one scale.*Leave them out"):
        laplace.optimize_prior_precision(noise=True)


def test_laplace_of_one_linear_layer_is_the_dense_fisher() -> None:
    """``P = Σ_n J_nᵀ diag(1/σ_n², 2) J_n + δ I``, written out."""
    x, y = randn(9, 3, seed=2), randn(9, 1, seed=3)
    model = seeded(nn.Sequential(nn.Linear(3, 2)))
    posterior = (
        bk.Laplace(model, HeteroscedasticGaussian(), structure="dense", prior_precision=0.7)
        .fit([(x, y)], progress=False)
        .posterior()
    )
    log_scale = model(x)[:, 1].detach()
    rows = torch.cat([x, torch.ones(9, 1, dtype=torch.float64)], 1)
    blocks = [
        torch.einsum("n,ni,nj->ij", w, rows, rows) for w in ((-2 * log_scale).exp(), 2 * torch.ones_like(log_scale))
    ]
    expected = torch.block_diag(*blocks) + 0.7 * torch.eye(8, dtype=torch.float64)
    assert_close(posterior.blocks["0"].to_dense(), expected, rtol=1e-10, atol=1e-10)
