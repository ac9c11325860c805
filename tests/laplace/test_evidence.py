"""The evidence is the dense formula's, differentiable in all that it may be asked for, and exact where Laplace is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.likelihoods import Categorical, GammaNoise, Gaussian
from tests.helpers import TIGHT, block_fishers, randn, rng, seeded
from tests.laplace.oracles import (
    LIKELIHOODS,
    NETS,
    NOISE_SCALE,
    X,
    Y,
    batches,
    by_layer,
    dense_priors,
    evidence_by_hand,
    fishers,
    fit_net,
    fitted,
    gaussian,
    log_likelihood,
    mlp,
    prior_forms,
)
from tests.posteriors import BY_COLUMN, DAMPING_KINDS, FAMILY_NAMES

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def by_hand(laplace: bk.Laplace, name: str, prior: Any, temperature: float = 1.0) -> Tensor:
    """The evidence of a net of ``NETS`` by the dense formula."""
    net = NETS[name]
    return evidence_by_hand(
        log_likelihood(laplace, net.x, net.y),
        fishers(laplace),
        dense_priors(prior, laplace.layers),
        by_layer({key: p.detach() for key, p in laplace.model.named_parameters()}, laplace.layers),
        11 / temperature,
        temperature,
    )


@pytest.mark.parametrize(
    ("structure", "form"),
    [
        (structure, form)
        for structure in FAMILY_NAMES
        for form in ("model", "layer", "parameter", "weight")
        if form != "weight" or structure not in BY_COLUMN
    ],
)
@pytest.mark.parametrize("name", NETS)
def test_the_evidence_is_the_dense_formula(name: str, structure: str, form: str) -> None:
    """``log p(D|M)/τ + log N(M; 0, P₀⁻¹) − ½ log det P + d/2 log 2π``, for each net, structure and form of the prior.

    Whether the prior is the fit's own or asked for afterwards.
    """
    prior = prior_forms(fit_net(name, structure=structure).layers)[form]
    laplace = fit_net(name, structure=structure, prior_precision=prior, temperature=0.6)
    assert_close(laplace.log_marginal_likelihood(), by_hand(laplace, name, prior, 0.6), **CLOSE)
    other = fit_net(name, structure=structure)
    assert_close(other.log_marginal_likelihood(prior, temperature=0.6), by_hand(other, name, prior, 0.6), **CLOSE)
    value = other.log_marginal_likelihood()
    assert (value.dtype, value.shape, value.requires_grad) == (torch.float64, (), False)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_the_evidence_of_dense_blocks_by_torch_func(kind: str) -> None:
    """Nothing of the library is in the oracle but the layers' names."""
    case = LIKELIHOODS[kind]
    model, y = mlp(case.outputs), case.targets(11)
    laplace = fitted(model, case.make(), batches(X, y), structure="dense", prior_precision=0.4)
    output = model(X).detach()
    hessian = block_fishers(model, X, case.fisher(output))
    away = by_layer(dict(model.named_parameters()), laplace.layers)
    priors = {name: 0.4 * torch.eye(len(value), dtype=torch.float64) for name, value in away.items()}
    expected = evidence_by_hand(case.log_likelihood(output, y), hessian, priors, away, 11.0)
    assert_close(laplace.log_marginal_likelihood(), expected.detach(), **CLOSE)


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_the_prior_enters_the_evidence_exactly_whatever_the_damping(damping: str) -> None:
    """Cross terms are of the posterior alone."""
    laplace = fit_net("mlp", damping=damping, prior_precision=0.2)
    assert_close(laplace.log_marginal_likelihood(), by_hand(laplace, "mlp", 0.2), **CLOSE)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_the_evidence_takes_the_fisher_that_was_asked_for(fisher: str) -> None:
    laplace = fit_net("classifier", fisher=fisher, generator=rng(0))
    assert_close(laplace.log_marginal_likelihood(), by_hand(laplace, "classifier", 1.0), **CLOSE)
    exact = fit_net("classifier").log_marginal_likelihood()
    assert not torch.isclose(laplace.log_marginal_likelihood(), exact, rtol=1e-4)


@pytest.mark.parametrize("structure", FAMILY_NAMES)
def test_asking_is_not_changing(structure: str) -> None:
    """What is asked for other priors, temperatures and noise stays out of the fit and of later answers."""
    laplace = fit_net("mlp", structure=structure, prior_precision=0.8)
    before, blocks = laplace.log_marginal_likelihood(), laplace.posterior().blocks
    laplace.log_marginal_likelihood({"0": 3.0, "2.weight": 0.1, "2.bias": 4.0}, temperature=0.2, noise_scale=3.0)
    laplace.log_marginal_likelihood(100.0)
    assert torch.equal(laplace.log_marginal_likelihood(), before)
    for name, block in laplace.posterior().blocks.items():
        assert torch.equal(block.to_dense(), blocks[name].to_dense())


@pytest.mark.parametrize("structure", FAMILY_NAMES)
def test_another_temperature_is_that_of_a_fit_at_it(structure: str) -> None:
    cold = fit_net("classifier", structure=structure, temperature=0.1).log_marginal_likelihood()
    assert_close(fit_net("classifier", structure=structure).log_marginal_likelihood(temperature=0.1), cold, **TIGHT)


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("scale", [0.05, 0.7, 20.0])
def test_another_noise_is_that_of_a_fit_with_it(structure: str, scale: float) -> None:
    """Measured again from scratch; also of noise that is learned, at another temperature, and with masked targets."""
    mask = torch.rand(Y.shape, generator=rng(1)) < 0.7
    mask[:2] = False
    for loader in (batches(X, Y), [(X, Y, mask)]):
        for make in (Gaussian, lambda value: Gaussian(bk.likelihoods.noise.LearnedNoise(value))):
            likelihoods = [make(torch.tensor(value, dtype=torch.float64)) for value in (NOISE_SCALE, scale)]
            measured, again = (
                fitted(mlp(), likelihood, loader, structure=structure, temperature=0.5) for likelihood in likelihoods
            )
            asked = measured.log_marginal_likelihood(0.4, noise_scale=scale)
            assert_close(asked, again.log_marginal_likelihood(0.4), **CLOSE)


def test_a_belief_about_the_noise_adds_its_own_divergence() -> None:
    """The posterior of a Gamma noise has a KL from its prior, that is part of the bound."""
    likelihood = Gaussian(GammaNoise(6.0, 6.0)).double()
    with torch.no_grad():
        likelihood.noise.log_rate.add_(0.5)
    laplace = fitted(mlp(), likelihood, batches(X, Y))
    kl = likelihood.kl().detach()
    assert kl > 0.1
    assert_close(laplace.log_marginal_likelihood(), by_hand(laplace, "mlp", 1.0) - kl, **CLOSE)


# Where Laplace is exact


def regression(outputs: int = 1) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear model at its most probable weights under ``δ = 0.6`` and noise of 0.7, with its features."""
    x = randn(14, 3, seed=21)
    y = x @ randn(3, outputs, seed=22) + 0.7 * randn(14, outputs, seed=23) + 1.0
    features = torch.cat([x, torch.ones(14, 1, dtype=torch.float64)], 1)
    normal = features.T @ features / NOISE_SCALE**2 + 0.6 * torch.eye(4, dtype=torch.float64)
    mode = torch.linalg.solve(normal, features.T @ y / NOISE_SCALE**2).T
    model = nn.Linear(3, outputs).double()
    with torch.no_grad():
        model.weight.copy_(mode[:, :3])
        model.bias.copy_(mode[:, 3])
    return model, x, y, features


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("structure", ["dense", "kron"])
def test_the_evidence_of_linear_regression_is_the_exact_one(structure: str, outputs: int) -> None:
    """``log N(y; 0, σ² I + Φ Φᵀ / δ)`` of each output: nothing is approximated here."""
    model, x, y, features = regression(outputs)
    laplace = fitted(model, gaussian(), [(x, y)], structure=structure, prior_precision=0.6)
    covariance = NOISE_SCALE**2 * torch.eye(14, dtype=torch.float64) + features @ features.T / 0.6
    exact = MultivariateNormal(torch.zeros(14, dtype=torch.float64), covariance).log_prob(y.T).sum()
    assert_close(laplace.log_marginal_likelihood(), exact, **CLOSE)


# Gradients


@pytest.mark.parametrize("structure", FAMILY_NAMES)
@pytest.mark.parametrize("name", ["mlp", "cnn", "norm", "words", "twice", "tied to words"])
def test_gradients_by_the_prior_are_those_of_finite_differences(name: str, structure: str) -> None:
    """By one number, one for each layer, parameter or weight; eigenvalues that coincide give no NaN."""
    laplace = fit_net(name, structure=structure)
    parameters = {key: p for layer in laplace.layers.values() for key, p in layer.parameters.items()}

    def of_model(log: Tensor) -> Tensor:
        return laplace.log_marginal_likelihood(log.exp())

    def of_layers(*logs: Tensor) -> Tensor:
        return laplace.log_marginal_likelihood({k: v.exp() for k, v in zip(laplace.layers, logs, strict=True)})

    def of_parameters(*logs: Tensor) -> Tensor:
        return laplace.log_marginal_likelihood({k: v.exp() for k, v in zip(parameters, logs, strict=True)})

    def numbers(count: int) -> list[Tensor]:
        return [randn(seed=30 + i).requires_grad_() for i in range(count)]

    assert gradcheck(of_model, numbers(1))
    assert gradcheck(of_layers, numbers(len(laplace.layers)))
    assert gradcheck(of_parameters, numbers(len(parameters)))
    if structure not in BY_COLUMN:
        logs = [0.3 * randn(*p.shape, seed=50 + i).requires_grad_() for i, p in enumerate(parameters.values())]
        assert gradcheck(of_parameters, [log.detach().requires_grad_() for log in logs], fast_mode=True)


@pytest.mark.parametrize("structure", FAMILY_NAMES)
def test_gradients_by_temperature_and_noise_are_those_of_finite_differences(structure: str) -> None:
    laplace = fit_net("mlp", structure=structure)

    def function(log_prior: Tensor, log_temperature: Tensor, log_scale: Tensor) -> Tensor:
        return laplace.log_marginal_likelihood(
            log_prior.exp(), temperature=log_temperature.exp(), noise_scale=log_scale.exp()
        )

    assert gradcheck(function, [randn(seed=40 + i).requires_grad_() for i in range(3)])


def test_the_gradient_may_be_taken_again() -> None:
    """One decomposition serves many values of one prior, without its graph in between."""
    laplace = fit_net("mlp")
    for _ in range(2):
        prior = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        value = laplace.log_marginal_likelihood(prior)
        (first,) = torch.autograd.grad(value, prior)
        small = 1e-6
        difference = laplace.log_marginal_likelihood(0.3 + small) - laplace.log_marginal_likelihood(0.3 - small)
        assert_close(first, difference / (2 * small), rtol=1e-6, atol=0)


# Wrong calls


def test_nothing_fitted_is_an_error_that_says_what_to_call() -> None:
    laplace = bk.Laplace(mlp(), gaussian())
    for compute in (laplace.log_marginal_likelihood, laplace.posterior, laplace.optimize_prior_precision):
        with pytest.raises(UsageError, match=r"fit\(loader\)"):
            compute()
    for wants_data in (laplace.update, laplace.optimize_temperature):
        with pytest.raises(UsageError, match=r"fit\(loader\)"):
            wants_data([(X, Y)], progress=False)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf, "hot", torch.ones(2)])
@pytest.mark.parametrize("name", ["temperature", "noise_scale"])
def test_temperature_and_noise_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"{name}.*Allowed"):
        fit_net("mlp").log_marginal_likelihood(**{name: value})


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian([0.5, 0.7]).double(), Gaussian(GammaNoise()).double()])
def test_likelihoods_without_one_noise_refuse_another(likelihood: Any) -> None:
    """Classes have none, outputs with noises of their own several, and a belief is no number."""
    net = NETS["classifier" if isinstance(likelihood, Categorical) else "mlp"]
    laplace = fitted(net.make(), likelihood, batches(net.x, net.y))
    with pytest.raises(ArgumentError, match="noise"):
        laplace.log_marginal_likelihood(noise_scale=0.5)
    with pytest.raises(ArgumentError, match="noise"):
        laplace.optimize_prior_precision(noise=True)
    laplace.posterior()  # and the fit is as it was
    laplace.optimize_prior_precision()


def test_noises_of_outputs_enter_as_they_are() -> None:
    likelihood = Gaussian(torch.tensor([0.5, 0.7], dtype=torch.float64))
    laplace = fitted(seeded(nn.Sequential(nn.Linear(3, 2))), likelihood, batches(X, Y))
    features = torch.cat([X, torch.ones(11, 1, dtype=torch.float64)], 1)
    G = torch.diag(torch.tensor([0.5, 0.7], dtype=torch.float64) ** -2)
    expected = torch.kron(G, features.T @ features) + torch.eye(8, dtype=torch.float64)
    assert_close(laplace.posterior().blocks["0"].to_dense(), expected, **TIGHT)
    assert_close(laplace.log_marginal_likelihood(), by_hand(laplace, "mlp", 1.0), **CLOSE)
