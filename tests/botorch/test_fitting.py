"""From data to a surrogate: the whole Gauss-Newton matrix, the exact evidence, and what a stranger types."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from botorch.exceptions.warnings import InputDataWarning
from botorch.models.transforms.input import Normalize
from botorch.models.transforms.outcome import Standardize
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from bayes_kfac import Laplace
from bayes_kfac.botorch import LinearizedSurrogate, fitting
from bayes_kfac.errors import ArgumentError, NonFiniteError, UnsupportedModelError
from tests.botorch.test_linearized import CLOSE, covariance
from tests.helpers import in_block, parameter_jacobians, randn, rng, seeded

D = 2


def inputs(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, D, generator=rng(seed), dtype=torch.float64)


def outcomes(X: Tensor, noise: float = 0.0, seed: int = 2) -> Tensor:
    clean = torch.stack([torch.sin(5 * X[:, 0]) + X[:, 1], (X - 0.3).square().sum(1)], dim=1)
    return 3 * clean + 7 + noise * randn(*clean.shape, seed=seed)


def network(outputs: int = 2, hidden: int = 4) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(D, hidden), nn.Tanh(), nn.Linear(hidden, outputs)))


def jacobian(surrogate: LinearizedSurrogate, X: Tensor) -> Tensor:
    """By all weights of all layers, ``[n·m, weights]``."""
    weights = surrogate.weight_posterior
    derivatives = parameter_jacobians(weights.model, X, weights.mean)
    return torch.cat([in_block(layer, derivatives).flatten(2) for layer in weights.layers.values()], -1).flatten(0, 1)


def test_the_covariance_is_that_of_the_whole_gauss_newton_matrix():
    """``J* (δI + JᵀJ/σ²)⁻¹ J*ᵀ``, all layers together; the mean is the network's. Further data are added to it."""
    X, at = inputs(9), inputs(4, seed=3)
    Y = outcomes(X)
    surrogate = LinearizedSurrogate.fit(X, Y, network=network(), prior_precision=0.7, noise_scale=0.2, steps=40)
    J, K, scale = jacobian(surrogate, X), jacobian(surrogate, at), surrogate.outcome_transform.stdvs.flatten()
    precision = 0.7 * torch.eye(J.shape[1], dtype=torch.float64) + J.mT @ J / 0.04
    expected = (K @ torch.linalg.inv(precision) @ K.mT) * scale.repeat(4) * scale.repeat(4)[:, None]
    found = surrogate.posterior(at)
    assert_close(covariance(found), expected, rtol=1e-7, atol=1e-8)
    means = surrogate.outcome_transform.untransform(surrogate.weight_posterior.model(at))[0].detach()
    assert_close(found.mean, means, **CLOSE)

    more, seen = inputs(3, seed=4), randn(3, 2, seed=5)
    J2 = jacobian(surrogate, more)
    after = torch.linalg.inv(precision + J2.mT @ J2 / 0.04)
    f = surrogate.weight_posterior.model(more).detach()
    residual = (surrogate.outcome_transform(seen)[0] - f).reshape(-1, 1)
    change = (K @ after @ J2.mT @ residual / 0.04).reshape(4, 2)
    found = surrogate.condition_on_observations(more, seen).posterior(at)
    assert_close(found.mean, means + change * scale, rtol=1e-7, atol=1e-8)


def test_prior_and_noise_are_where_the_exact_evidence_is_greatest(monkeypatch):
    """Of all values of the grids, each density written out: ``N(y − f + J M; 0, J Jᵀ/δ + σ² I)`` and the priors."""
    X, model = inputs(9), network()
    Y = Standardize(2)(outcomes(X, noise=0.5))[0]
    precisions, scales = torch.tensor([0.1, 0.5, 2.0, 9.0]).double(), torch.tensor([0.03, 0.2, 0.5, 2.0]).double()
    delta, sigma = fitting._most_evident(model, X, Y, precisions, scales)
    surrogate = LinearizedSurrogate(fitting._prior(model, fitting.Gaussian(1.0), 1.0), num_outputs=2)
    weights = surrogate.weight_posterior
    J = jacobian(surrogate, X)
    mean = torch.cat([layer.matrix(weights.mean).flatten() for layer in weights.layers.values()])
    targets = (Y - model(X).detach()).flatten() + J @ mean

    def evidence(delta: Tensor, sigma: Tensor) -> float:
        joint = J @ J.mT / delta + sigma**2 * torch.eye(len(J), dtype=torch.float64)
        prior = -0.5 * delta.log() ** 2 - 0.5 * ((sigma.log() + 2) / 0.5) ** 2
        return float(MultivariateNormal(torch.zeros_like(targets), joint).log_prob(targets) + prior)

    table = {(float(d), float(s)): evidence(d, s) for d in precisions for s in scales}
    assert (delta, sigma) == max(table, key=table.__getitem__)
    assert fitting._most_evident(model, X, Y, torch.tensor([9.0]).double(), torch.tensor([0.5]).double()) == (9.0, 0.5)


def test_noise_is_found():
    """Within a factor of two, from 60 noisy outcomes of a smooth function."""
    torch.manual_seed(0)
    X = inputs(60)
    for noise in (0.05, 0.6):
        Y = outcomes(X, noise=noise)[:, :1]
        surrogate = LinearizedSurrogate.fit(X, Y, steps=200)
        found = float(surrogate.likelihood.noise_scale * surrogate.outcome_transform.stdvs)
        assert abs(math.log(found / noise)) < math.log(2)


def test_predictions_of_a_smooth_function():
    """No arguments: errors far below the spread, and most of new outcomes within two standard deviations."""
    torch.manual_seed(0)
    X, at = inputs(40), inputs(200, seed=3)
    Y, expected = outcomes(X), outcomes(at)
    surrogate = LinearizedSurrogate.fit(X, Y)
    found = surrogate.posterior(at, observation_noise=True)
    assert found.mean.shape == (200, 2)
    assert ((found.mean - expected).square().mean(0).sqrt() < 0.15 * expected.std(0)).all()
    assert ((found.mean - expected).abs() < 2 * found.variance.sqrt()).double().mean() > 0.85


def test_more_data_from_where_the_weights_are():
    """A warm start is the network of the surrogate before, whose own predictions stay."""
    torch.manual_seed(0)
    X, at = inputs(20), inputs(5, seed=3)
    first = LinearizedSurrogate.fit(X, outcomes(X))
    before = first.posterior(at).mean
    more = torch.cat([X, inputs(1, seed=4)])
    model = first.weight_posterior.model
    second = LinearizedSurrogate.fit(more, outcomes(more), network=model, steps=1)
    cold = LinearizedSurrogate.fit(more, outcomes(more), steps=1)
    assert second.weight_posterior.model is model
    assert_close(first.posterior(at).mean, before)

    def error(surrogate: LinearizedSurrogate) -> Tensor:
        return (surrogate.posterior(more).mean - outcomes(more)).square().mean()

    assert error(second) < error(cold)


def test_a_structure_of_blocks_is_that_of_a_laplace_fit():
    X, at = inputs(9), inputs(4, seed=3)
    options = {"prior_precision": 0.7, "noise_scale": 0.2, "steps": 20}
    surrogate = LinearizedSurrogate.fit(X, outcomes(X), network=network(), structure="kron", **options)
    weights, transform = surrogate.weight_posterior, surrogate.outcome_transform
    laplace = Laplace(weights.model, weights.likelihood, structure="kron", prior_precision=0.7)
    expected = laplace.fit([(X, transform(outcomes(X))[0])], progress=False).posterior().predict(at)
    found = surrogate.posterior(at)
    assert_close(found.mean, transform.untransform(expected.mean)[0], **CLOSE)
    assert_close(found.variance, transform.stdvs**2 * expected.epistemic_variance, **CLOSE)
    assert weights.provenance.structure == "kron"


def test_batches_of_many_data():
    """More than a batch, and more than the evidence is taken of; a network in training mode stays in it."""
    X, model = inputs(600), network()
    model.train()
    surrogate = LinearizedSurrogate.fit(X, outcomes(X), network=model, structure="kron", steps=8)
    assert model.training
    assert surrogate.posterior(X[:3]).variance.shape == (3, 2)


def test_every_module_of_the_network_is_left_in_its_own_mode():
    """After an error too."""

    class Failing(nn.Tanh):
        def forward(self, X: Tensor) -> Tensor:
            if self.training:
                raise KeyError
            return super().forward(X)

    X = inputs(6)
    for middle in (nn.Dropout(0.1), Failing()):
        own = seeded(nn.Sequential(nn.Linear(D, 4), middle, nn.Linear(4, 2)))
        own[0].eval()
        modes = [module.training for module in own.modules()]
        with pytest.raises(KeyError) if isinstance(middle, Failing) else nullcontext():
            LinearizedSurrogate.fit(X, outcomes(X), network=own, steps=2)
        assert [module.training for module in own.modules()] == modes


def test_outcomes_are_left_as_they_are_where_that_is_said():
    """``None`` is no transform, as in BoTorch. A linear network is then Bayesian linear regression, in closed form."""
    X, at = inputs(12), inputs(5, seed=3)
    Y, delta, sigma = Standardize(1)(outcomes(X)[:, :1])[0], 0.7, 0.3
    options = {"prior_precision": delta, "noise_scale": sigma, "outcome_transform": None, "steps": 1}
    surrogate = LinearizedSurrogate.fit(X, Y, network=nn.Linear(D, 1).double(), **options)
    assert not hasattr(surrogate, "outcome_transform")
    design, new = (torch.cat([part, torch.ones(len(part), 1).double()], dim=1) for part in (X, at))
    covariance = torch.linalg.inv(design.mT @ design / sigma**2 + delta * torch.eye(D + 1).double())
    found = surrogate.posterior(at)
    assert_close(found.mean, new @ covariance @ design.mT @ Y / sigma**2, **CLOSE)
    assert_close(found.distribution.covariance_matrix, new @ covariance @ new.mT, **CLOSE)


def test_transforms_learn_from_the_data():
    X = 100 * inputs(12) - 30
    Y = outcomes(inputs(12))
    normalize, standardize = Normalize(D), Standardize(2)
    surrogate = LinearizedSurrogate.fit(X, Y, input_transform=normalize, outcome_transform=standardize, steps=5)
    assert surrogate.input_transform is normalize
    assert surrogate.outcome_transform is standardize
    assert_close(normalize.bounds, torch.stack([X.amin(0), X.amax(0)]))
    assert_close(standardize.means, Y.mean(0, keepdim=True))
    assert surrogate.posterior(X).mean.shape == (12, 2)


def test_fits_wherever_it_is_called_and_warns_of_single_precision():
    with torch.no_grad():
        surrogate = LinearizedSurrogate.fit(inputs(6), outcomes(inputs(6)), steps=1)
    assert not surrogate.posterior(inputs(2)).mean.requires_grad
    with pytest.warns(InputDataWarning, match="float64"):
        surrogate = LinearizedSurrogate.fit(inputs(6).float(), outcomes(inputs(6)).float(), steps=1)
    assert surrogate.posterior(inputs(2).float()).variance.dtype == torch.float32


def test_inputs_outside_of_the_unit_cube_are_warned_of_as_in_botorch():
    with pytest.warns(InputDataWarning, match="unit cube"):
        LinearizedSurrogate.fit(9 * inputs(6), outcomes(inputs(6)), steps=1)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["train_X", "train_Y"])
def test_data_are_finite(name, broken):
    given = {"train_X": inputs(6), "train_Y": outcomes(inputs(6))}
    given[name][1, 0] = broken
    with pytest.raises(NonFiniteError, match=f"^{name} holds NaN or infinity"):
        LinearizedSurrogate.fit(**given)


def test_wrong_arguments_are_named():
    X, Y = inputs(6), outcomes(inputs(6))
    for wrong in ((X, Y[:, 0]), (X, Y[:5]), (X[0], Y), (X[:0], Y[:0])):
        with pytest.raises(ArgumentError, match="train_X has shape"):
            LinearizedSurrogate.fit(*wrong)
    with pytest.raises(ArgumentError, match=r"train_X is torch\.float32 and train_Y torch\.float64"):
        LinearizedSurrogate.fit(X.float(), Y)
    with pytest.raises(ArgumentError, match=r"structure=None is for 4000 outcomes.*structure='kron'"):
        LinearizedSurrogate.fit(X[:1].expand(2001, D), Y[:1].expand(2001, 2))
    for options in ({"prior_precision": 0.0}, {"noise_scale": -1.0}, {"steps": 0}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            LinearizedSurrogate.fit(X, Y, **options)
    with pytest.raises(ArgumentError, match="network puts out"):
        LinearizedSurrogate.fit(X, Y, network=network(outputs=1))
    with pytest.raises(ArgumentError, match=r"network is torch\.float32"):
        LinearizedSurrogate.fit(X, Y, network=network().float())
    with pytest.raises(ArgumentError, match=r"train_X is a ndarray.*torch\.as_tensor"):
        LinearizedSurrogate.fit(X.numpy(), Y)
    with pytest.raises(ArgumentError, match=f"does not take inputs of d={D} columns"):
        LinearizedSurrogate.fit(X, Y, network=nn.Linear(D + 1, 2).double())
    with pytest.raises(ArgumentError, match=r"network=.*Linear.*nn\.Module"):
        LinearizedSurrogate.fit(X, Y, network=nn.Linear)
    with pytest.raises(UnsupportedModelError):
        LinearizedSurrogate.fit(X, Y, network=nn.Sequential(network(), nn.PReLU()).double(), steps=1)
