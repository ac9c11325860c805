"""Observations change the linearised surrogate as they change the Gaussian of the weights, written out densely."""

from __future__ import annotations

import copy

import pytest
import torch
from botorch import settings
from botorch.models.transforms.outcome import Standardize
from botorch.sampling.normal import IIDNormalSampler, SobolQMCNormalSampler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import Posterior
from bayes_kfac.botorch import LinearizedSurrogate, SampledSurrogate
from bayes_kfac.errors import ArgumentError, NonFiniteError
from tests.botorch.test_linearized import CLOSE, STRUCTURES, D, M, covariance, posterior_of, standardize, surrogate_of
from tests.helpers import in_block, randn
from tests.posteriors import dense_covariances, dense_derivatives, dense_mean


def updated(weights: Posterior, X: Tensor, Y: Tensor, noise: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The mean ``[q, m]`` and covariance at new points after the Bayesian linear update of all weights.

    ``Σ⁻¹ = P + JᵀR⁻¹J`` and ``M' = M + Σ JᵀR⁻¹ (y − f)``, with the precision of all layers together.
    """
    precision = torch.block_diag(
        *(
            torch.linalg.inv(own)
            for block in dense_covariances(weights).values()
            for own in block.reshape(-1, *block.shape[-2:])
        )
    )

    def jacobian(points: Tensor) -> Tensor:
        derivatives = dense_derivatives(weights, points)
        return torch.cat([in_block(layer, derivatives).flatten(2) for layer in weights.layers.values()], -1).flatten(
            0, 1
        )

    J, K, R = jacobian(X), jacobian(at), noise.reshape(-1, 1)
    after = torch.linalg.inv(precision + J.mT @ (J / R))
    change = after @ (J.mT @ ((Y - dense_mean(weights, X)).reshape(-1, 1) / R))
    return dense_mean(weights, at) + (K @ change).reshape(len(at), -1), K @ after @ K.mT


@pytest.mark.parametrize(("structure", "damping"), STRUCTURES, ids="-".join)
@pytest.mark.parametrize("outputs", [1, M])
def test_equals_the_update_of_the_weights(outputs, structure, damping):
    weights = posterior_of(outputs, structure=structure, damping=damping)
    X, Y, at = randn(5, D, seed=1), randn(5, outputs, seed=2), randn(3, D, seed=3)
    noise = 0.1 + randn(5, outputs, seed=4).square()
    surrogate = LinearizedSurrogate(weights, num_outputs=outputs)
    for given_noise in (None, noise):
        found = surrogate.condition_on_observations(X, Y, noise=given_noise).posterior(at)
        mean, joint = updated(weights, X, Y, torch.full_like(Y, 0.25) if given_noise is None else noise, at)
        assert_close(found.mean, mean, **CLOSE)
        assert_close(covariance(found), joint, **CLOSE)


def test_step_by_step_equals_all_at_once():
    """Each step with noise of its own; and the surrogate of the step before stays as it was."""
    X, Y, at = randn(6, D, seed=1), randn(6, M, seed=2), randn(4, 2, D, seed=3)
    noise = 0.1 + randn(6, M, seed=4).square()
    surrogate = surrogate_of()
    once = surrogate.condition_on_observations(X, Y, noise=noise).posterior(at)
    steps = [slice(0, 1), slice(1, 4), slice(4, 6)]
    for part in steps:
        before = surrogate
        expected = before.posterior(at).variance
        surrogate = before.condition_on_observations(X[part], Y[part], noise=noise[part])
        assert_close(before.posterior(at).variance, expected, rtol=0, atol=0)
    assert_close(surrogate.posterior(at).mean, once.mean, **CLOSE)
    assert_close(covariance(surrogate.posterior(at)), covariance(once), **CLOSE)


def test_some_outputs_learn_from_the_others():
    """An observation of all outputs, asked for one; and of one of them, by a surrogate of it alone."""
    weights, X, Y, at = posterior_of(), randn(4, D, seed=1), randn(4, M, seed=2), randn(3, D, seed=3)
    surrogate = LinearizedSurrogate(weights, num_outputs=M)
    mean, _ = updated(weights, X, Y, torch.full_like(Y, 0.25), at)
    assert_close(surrogate.condition_on_observations(X, Y).posterior(at, [1]).mean, mean[:, 1:], **CLOSE)
    alone = surrogate.subset_output([1]).condition_on_observations(X, Y[:, 1:])
    blind = torch.stack([torch.full((4,), 1e14, dtype=torch.float64), torch.full((4,), 0.25, dtype=torch.float64)], -1)
    mean, _ = updated(weights, X, Y, blind, at)
    assert_close(alone.posterior(at).mean, mean[:, 1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("outputs", [[0], [1], [1, 0], [1, 1]], ids=str)
def test_what_was_seen_of_some_outputs_adds_to_what_was_seen_of_all(outputs):
    """Observations of a subset are of its outputs, in its order; those of the whole surrogate stay."""
    weights, X, Y, at = posterior_of(), randn(7, D, seed=1), randn(7, M, seed=2), randn(3, D, seed=3)
    noise = 0.1 + randn(7, M, seed=4).square()
    some, rest = slice(0, 3), slice(3, 7)
    surrogate = LinearizedSurrogate(weights, num_outputs=M)
    times = torch.tensor([outputs.count(0), outputs.count(1)])  # what was seen twice has half the noise
    expected = torch.cat([(noise[some] / times).clamp(max=1e14), noise[rest]])
    mean, joint = updated(weights, X, Y, expected, at)
    seen = {"X": X[some], "Y": Y[some][:, outputs], "noise": noise[some][:, outputs]}
    all_first = surrogate.condition_on_observations(X[rest], Y[rest], noise=noise[rest])
    found = all_first.subset_output(outputs).condition_on_observations(**seen).posterior(at)
    assert_close(found.mean, mean[:, outputs], rtol=1e-6, atol=1e-6)
    assert_close(found.variance, joint.diagonal().reshape(-1, M)[:, outputs], rtol=1e-6, atol=1e-6)


def test_a_subset_of_a_trained_surrogate_learns_from_its_own_output():
    """Training data, of all outputs, are observations where ``structure=None``."""
    X, Y, at = randn(6, D, seed=1).sigmoid(), randn(6, M, seed=2), randn(3, D, seed=3).sigmoid()
    surrogate = LinearizedSurrogate.fit(X, Y, steps=5)
    noise = torch.tensor([1e12, 0.3], dtype=torch.float64)
    blind = surrogate.condition_on_observations(at, randn(3, M, seed=4), noise=noise)
    alone = surrogate.subset_output([1]).condition_on_observations(at, randn(3, M, seed=4)[:, 1:], noise=noise[1:])
    assert_close(alone.posterior(at).mean, blind.posterior(at).mean[:, 1:], rtol=1e-6, atol=1e-6)
    fantasies = surrogate.subset_output([1]).fantasize(at, IIDNormalSampler(torch.Size([4]), seed=0))
    assert fantasies.posterior(at).mean.shape == (4, 3, 1)


@given(shape=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 3])), data=st.data())
def test_batches_of_inputs_observations_and_noise_broadcast(shape, data):
    """Any of the dimensions may be 1 or missing in any of them; each batch is what it would be alone."""

    def part() -> tuple[int, ...]:
        kept = tuple(data.draw(st.sampled_from([1, size])) for size in shape)
        return kept[data.draw(st.integers(0, len(shape))) :]

    surrogate = surrogate_of()
    X, at = randn(*part(), 2, D, seed=1), randn(*part(), 3, D, seed=2)
    Y, noise = randn(*part(), 2, M, seed=3), 0.1 + randn(*part(), 2, M, seed=4).square()
    fantasies = surrogate.condition_on_observations(X, Y, noise=noise)
    batch = torch.broadcast_shapes(X.shape[:-2], Y.shape[:-2], noise.shape[:-2])
    assert fantasies.batch_shape == batch
    batch = torch.broadcast_shapes(batch, at.shape[:-2])
    found = fantasies.posterior(at)
    assert found.mean.shape == (*batch, 3, M)
    X, Y, noise, at = (
        value.expand(*batch, *value.shape[-2:]).reshape(-1, *value.shape[-2:]) for value in (X, Y, noise, at)
    )
    means, joints = found.mean.reshape(-1, 3, M), covariance(found).reshape(-1, 3 * M, 3 * M)
    for index in range(len(X)):
        alone = surrogate.condition_on_observations(X[index], Y[index], noise=noise[index]).posterior(at[index])
        assert_close(means[index], alone.mean, **CLOSE)
        assert_close(joints[index], covariance(alone), **CLOSE)


def test_outcomes_are_transformed():
    """Observations are on the scale of the outcomes, noise on that of the network, as in BoTorch."""
    transform = standardize(10 * randn(9, M, seed=7) + 4)
    X, Y, noise, at = randn(2, D, seed=1), 10 * randn(2, M, seed=2), randn(2, M, seed=3).square(), randn(3, D, seed=4)
    surrogate = surrogate_of(outcome_transform=transform)
    found = surrogate.condition_on_observations(X, Y, noise=noise).posterior(at)
    inner = (
        surrogate_of().condition_on_observations(X, (Y - transform.means) / transform.stdvs, noise=noise).posterior(at)
    )
    assert_close(found.mean, transform.means + transform.stdvs * inner.mean, **CLOSE)
    assert_close(found.variance, transform.stdvs**2 * inner.variance, **CLOSE)


def test_many_batches_share_one_factor(monkeypatch):
    """The Cholesky factor of the observations is not copied for each batch of points: memory would be its product."""
    surrogate = surrogate_of().condition_on_observations(randn(20, D, seed=1), randn(20, M, seed=2))
    shapes, solve = [], torch.linalg.solve_triangular

    def spy(factor: Tensor, rows: Tensor, **options: bool) -> Tensor:
        shapes.append((factor.shape, rows.shape))
        return solve(factor, rows, **options)

    monkeypatch.setattr("torch.linalg.solve_triangular", spy)
    surrogate.posterior(randn(7, 5, 3, D, seed=3))
    assert shapes == [((20 * M, 20 * M), (20 * M, 7 * 5 * 3 * M))]


# Fantasies


@pytest.mark.parametrize("outputs", [1, M])
def test_fantasies_are_conditioned_on_draws(outputs):
    """``num_fantasies x batch_shape``: each is the surrogate given its own draws."""
    surrogate = surrogate_of(outputs, outcome_transform=standardize(10 * randn(9, outputs, seed=7)))
    X, at = randn(3, 2, D, seed=1), randn(5, 3, 4, D, seed=2)
    sampler = IIDNormalSampler(torch.Size([5]), seed=0)
    fantasies = surrogate.fantasize(X, sampler)
    assert fantasies.batch_shape == (5, 3)
    Y = sampler(surrogate.posterior(X, observation_noise=True))
    found = fantasies.posterior(at)
    assert_close(found.mean, surrogate.condition_on_observations(X, Y).posterior(at).mean, **CLOSE)
    assert_close(found.mean[2, 1], surrogate.condition_on_observations(X[1], Y[2, 1]).posterior(at[2, 1]).mean, **CLOSE)
    noisy = surrogate.fantasize(X, sampler, observation_noise=torch.full((1, outputs), 9.0, dtype=torch.float64))
    assert (noisy.posterior(at).variance > found.variance).all()


def test_fantasies_of_fantasies():
    surrogate, X, at = surrogate_of(1), randn(3, 1, D, seed=1), randn(2, D, seed=3)
    first = surrogate.fantasize(X, SobolQMCNormalSampler(torch.Size([4]), seed=0))
    second = first.fantasize(randn(4, 3, 2, D, seed=2), SobolQMCNormalSampler(torch.Size([2]), seed=1))
    assert second.batch_shape == (2, 4, 3)
    assert second.posterior(at).mean.shape == (2, 4, 3, 2, 1)
    assert (second.posterior(at).variance < first.posterior(at).variance).all()


def test_fantasies_are_differentiable_in_where_they_are():
    """By finite differences through the draws, as knowledge gradient needs."""
    surrogate, at = surrogate_of(1), randn(2, D, seed=2)

    def means(X: Tensor) -> Tensor:
        with settings.propagate_grads(True):
            return surrogate.fantasize(X, IIDNormalSampler(torch.Size([3]), seed=0)).posterior(at).mean

    assert torch.autograd.gradcheck(means, randn(1, 2, D, seed=1).requires_grad_(), fast_mode=True)


def test_copies_keep_what_was_observed():
    surrogate = surrogate_of().condition_on_observations(randn(2, D, seed=1), randn(2, M, seed=2))
    at = randn(2, D, seed=3)
    assert_close(copy.deepcopy(surrogate).posterior(at).mean, surrogate.posterior(at).mean)


def test_wrong_arguments_are_named():
    surrogate, X, Y = surrogate_of(), randn(2, D, seed=1), randn(2, M, seed=2)
    for wrong in ((X, Y[:1]), (X, Y[:, :1]), (X, Y[:, 0]), (X[:0], Y[:0])):
        with pytest.raises(ArgumentError, match="X has shape"):
            surrogate.condition_on_observations(*wrong)
    with pytest.raises(ArgumentError, match=r"^noise has shape"):
        surrogate.condition_on_observations(X, Y, noise=torch.ones(3, M))
    with pytest.raises(ArgumentError, match=r"Y has batch shape \(3,\).*\(2,\)"):
        surrogate.condition_on_observations(X.expand(2, 2, D), Y.expand(3, 2, M))
    fantasies = surrogate.condition_on_observations(X, Y.expand(3, 2, M))
    with pytest.raises(ArgumentError, match=r"X has batch shape \(2,\).*\(3,\)"):
        fantasies.posterior(X.expand(2, 2, D))


def test_arrays_are_refused():
    surrogate, X, Y = surrogate_of(), randn(3, D, seed=1), randn(3, M, seed=2)
    with pytest.raises(ArgumentError, match="Y is a ndarray"):
        surrogate.condition_on_observations(X, Y.numpy())
    with pytest.raises(ArgumentError, match="noise is a float"):
        surrogate.condition_on_observations(X, Y, noise=0.1)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["X", "Y", "noise"])
def test_observations_are_finite(name, broken):
    """They would make every prediction NaN."""
    given = {"X": randn(3, D, seed=1), "Y": randn(3, M, seed=2), "noise": torch.ones(3, M)}
    given[name][1, 0] = broken
    with pytest.raises(NonFiniteError, match=f"^{name} holds NaN or infinity"):
        surrogate_of().condition_on_observations(**given)


def test_noise_is_a_variance():
    """Which may be zero, as what a simulation returns has none."""
    surrogate, X, Y = surrogate_of(), randn(2, D, seed=1), randn(2, M, seed=2)
    exact = surrogate.condition_on_observations(X, Y, noise=torch.zeros(2, M))
    assert_close(exact.posterior(X).mean, Y, rtol=1e-4, atol=1e-4)
    for name, call in (
        ("noise", lambda noise: surrogate.condition_on_observations(X, Y, noise=noise)),
        ("observation_noise", lambda noise: surrogate.posterior(X, observation_noise=noise)),
    ):
        with pytest.raises(ArgumentError, match=f"^{name} holds -0.5. Allowed: variances"):
            call(torch.tensor([[1.0, -0.5]]))


def test_a_transform_is_not_changed_by_observations():
    transform = standardize(randn(9, M, seed=7))
    before = transform.means.clone()
    assert isinstance(transform, Standardize)
    surrogate_of(outcome_transform=transform).train().condition_on_observations(
        randn(2, D, seed=1), randn(2, M, seed=2)
    )
    assert torch.equal(transform.means, before)


@pytest.mark.parametrize("kind", [LinearizedSurrogate, SampledSurrogate])
@pytest.mark.parametrize("noise", [0, None, 1e-6, -1, "a"])
def test_noise_is_added_where_it_is_asked_for(kind, noise):
    surrogate, X = kind(posterior_of(1)), randn(2, D, seed=1)
    with pytest.raises(ArgumentError, match="observation_noise="):
        surrogate.posterior(X, observation_noise=noise)
