"""The distributions in Pyro: sites, plates, effect handlers, predictions and inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, SVI, Predictive, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac.distributions import BlockNormal, MatrixNormal
from bayes_kfac.likelihoods import Gaussian
from tests.distributions.test_matrix_normal import random_parameters
from tests.helpers import randn, seeded
from tests.posteriors import random_posterior

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def matrix_normal() -> MatrixNormal:
    return MatrixNormal(*random_parameters(3, 2, 4))


def block_normal() -> BlockNormal:
    posterior = random_posterior(seeded(nn.Linear(3, 2)), Gaussian(0.5), damping="exact")
    return BlockNormal(randn(2, 4, seed=1), posterior.blocks["(root)"])


@pytest.fixture(params=[matrix_normal, block_normal])
def prior(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(autouse=True)
def _pyro_starts_anew() -> Iterator[None]:
    pyro.clear_param_store()
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        yield
    pyro.clear_param_store()


def covariance(prior: Any) -> Tensor:
    """``cov(vec X)``, written out."""
    if isinstance(prior, MatrixNormal):
        return prior.covariance_matrix
    return torch.linalg.inv(prior.gaussian.to_dense())


# Sites


def test_a_site_in_nested_plates_and_with_an_event_dimension(prior: Any) -> None:
    def model() -> None:
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 5, dim=-1):
            pyro.sample("plain", prior)
        with pyro.plate("one", 5):
            pyro.sample("event", prior.expand((5, 6)).to_event(1))

    trace = poutine.trace(model).get_trace()
    assert trace.nodes["plain"]["value"].shape == (3, 5, 2, 4)
    assert trace.nodes["event"]["value"].shape == (5, 6, 2, 4)
    expected = sum(prior.log_prob(trace.nodes[name]["value"]).sum() for name in ("plain", "event"))
    assert_close(trace.log_prob_sum(), expected, **CLOSE)


def test_masks_scales_and_subsampling(prior: Any) -> None:
    """Each weighs the log densities of a site's matrices, and leaves their values alone."""
    mask = torch.tensor([True, False, True, True, False])

    def model() -> None:
        with pyro.plate("all", 5), poutine.mask(mask=mask):
            pyro.sample("masked", prior)
        with pyro.plate("some", 20, subsample_size=5), poutine.scale(scale=0.5):
            pyro.sample("scaled", prior)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    masked, scaled = (prior.log_prob(trace.nodes[name]["value"]) for name in ("masked", "scaled"))
    assert_close(trace.nodes["masked"]["log_prob"], masked * mask, **CLOSE)
    assert_close(trace.nodes["scaled"]["log_prob_sum"], scaled.sum() * 20 / 5 * 0.5, **CLOSE)


def test_observed_and_conditioned_sites(prior: Any) -> None:
    value = randn(2, 4, seed=5)
    trace = poutine.trace(lambda: pyro.sample("w", prior, obs=value)).get_trace()
    assert_close(trace.log_prob_sum(), prior.log_prob(value), **CLOSE)
    conditioned = poutine.condition(lambda: pyro.sample("w", prior), data={"w": value})
    assert torch.equal(conditioned(), value)


def test_enumeration_leaves_a_site_alone(prior: Any) -> None:
    trace = poutine.trace(config_enumerate(lambda: pyro.sample("w", prior))).get_trace()
    assert not prior.has_enumerate_support
    assert trace.nodes["w"]["infer"].get("enumerate") is None


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(prior: Any, parallel: bool) -> None:
    """Draws one by one or in one plate: of the same shapes and, up to chance, the same moments."""
    x = randn(3, 4, seed=6)

    def model() -> Tensor:
        with pyro.plate("several", 2):
            weight = pyro.sample("w", prior)
        return weight @ x.T

    draws = Predictive(model, num_samples=400, parallel=parallel, return_sites=["w", "_RETURN"])()
    assert draws["w"].shape == (400, 2, 2, 4)
    assert_close(draws["_RETURN"], draws["w"] @ x.T, **CLOSE)
    flat = draws["w"].reshape(800, 8)
    spread = covariance(prior).diagonal().sqrt()
    assert ((flat.mean(0) - prior.mean.flatten()).abs() < 4 * spread / 800**0.5).all()
    assert ((flat.std(0) / spread).log().abs() < 4 / (2 * 800) ** 0.5).all()


# Inference


def regression(prior: Any) -> tuple[Callable[[], None], Tensor, Tensor]:
    """Multi-output linear regression under the prior, with the mean and covariance of its exact posterior."""
    x, noise = randn(12, 4, seed=7), 0.7
    y = randn(12, 2, seed=8)

    def model() -> None:
        weight = pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weight.mT, noise).to_event(1), obs=y)

    precision = torch.linalg.inv(covariance(prior))
    posterior = torch.linalg.inv(precision + torch.kron(torch.eye(2, dtype=torch.float64), x.T @ x / noise**2))
    mean = posterior @ (precision @ prior.mean.flatten() + (y.T @ x / noise**2).flatten())
    return model, mean, posterior


@pytest.mark.parametrize("kernel", [NUTS, lambda model: HMC(model, step_size=0.1, num_steps=8)], ids=["NUTS", "HMC"])
def test_a_latent_site_under_nuts_and_hmc(prior: Any, kernel: Callable[..., Any]) -> None:
    """The chain's moments are those of the conjugate posterior, by its own effective sample size."""
    model, mean, posterior = regression(prior)
    chain = MCMC(kernel(model), num_samples=150, warmup_steps=50, disable_progbar=True)
    chain.run()
    draws = chain.get_samples()["w"].flatten(1)
    effective = chain.diagnostics()["w"]["n_eff"].flatten()
    assert ((draws.mean(0) - mean).abs() < 4 * (posterior.diagonal() / effective).sqrt()).all()
    assert (draws.var(0) / posterior.diagonal()).log().abs().mean() < 0.3


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_find_the_conjugate_posterior(prior: Any, guide: type) -> None:
    """Its mean, that is; a site without constraints is shifted and scaled as it is."""
    model, mean, posterior = regression(prior)
    made = guide(model)
    svi = SVI(model, made, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98}), Trace_ELBO())
    for _ in range(150):
        svi.step()
    assert ((made.median()["w"].flatten() - mean).abs() < 0.5 * posterior.diagonal().sqrt()).all()


def test_the_distribution_as_a_guide_reaches_the_evidence(prior: Any) -> None:
    """A guide that is the prior itself has an evidence lower bound of 0 where nothing is observed, draw by draw."""

    def site() -> None:
        with pyro.plate("several", 3):
            pyro.sample("w", prior)

    for elbo in (Trace_ELBO(num_particles=3), Trace_ELBO(num_particles=3, vectorize_particles=True)):
        assert abs(elbo.loss(site, site)) < 1e-10
