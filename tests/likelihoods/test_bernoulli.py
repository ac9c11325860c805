"""The Bernoulli likelihood against PyTorch, SciPy and full enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from bayes_kfac.errors import BayesKfacError, TargetError
from bayes_kfac.likelihoods import Bernoulli

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def data(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    output = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return output, torch.randint(2, shape, generator=generator).double()


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_loss_is_binary_cross_entropy(shape: tuple[int, ...]) -> None:
    output, target = data(*shape)
    assert_close(Bernoulli()(output, target), functional.binary_cross_entropy_with_logits(output, target), **TIGHT)


@pytest.mark.parametrize("shape", [(7, 3), (7, 2, 3)])
def test_loss_sums_over_an_examples_dimensions(shape: tuple[int, ...]) -> None:
    output, target = data(*shape)
    log_probs = special.log_expit(torch.where(target.bool(), output, -output).numpy()).reshape(7, -1).sum(1)
    assert_close(Bernoulli().negative_log_likelihood(output, target), torch.as_tensor(-log_probs), **TIGHT)
    assert_close(Bernoulli()(output, target), torch.as_tensor(-log_probs.mean()), **TIGHT)


def test_target_gradient_is_probability_minus_target() -> None:
    output, target = data(7, 3)
    assert_close(Bernoulli().target_gradient(output, target), output.sigmoid() - target, **TIGHT)


@settings(deadline=None, max_examples=30)
@given(logit=st.floats(-30.0, 30.0))
def test_fisher_is_the_expectation_over_both_targets(logit: float) -> None:
    """``Σ_y p(y) g_y²`` by enumeration is the root squared, also where one target is all but certain."""
    output = torch.tensor([[logit]], dtype=torch.float64)
    zero, one = (Bernoulli().target_gradient(output, torch.full_like(output, y)) for y in (0.0, 1.0))
    expected = (-output).sigmoid() * zero.square() + output.sigmoid() * one.square()
    assert_close(
        Bernoulli().fisher_root(output)[0].square(), expected, rtol=1e-3 if abs(logit) > 15 else 1e-9, atol=1e-15
    )


def test_sampled_targets_are_binary_at_their_probabilities() -> None:
    """Every sampled gradient is one example's, ``p − y`` for a binary target."""
    output, _ = data(3, 2)
    likelihood, count = Bernoulli(), 20_000
    samples = likelihood.sample_gradient(output, count, torch.Generator().manual_seed(2))
    probs = output.sigmoid()
    targets = probs - samples
    rounded = targets.round()
    assert_close(targets, rounded, rtol=0.0, atol=1e-14)
    assert set(rounded.unique().tolist()) == {0.0, 1.0}
    assert_close(samples[7], likelihood.target_gradient(output, rounded[7]), **TIGHT)
    assert ((rounded.mean(0) - probs).abs() <= 5 * (probs * (1 - probs) / count).sqrt()).all()


def test_distribution_is_the_sigmoid() -> None:
    output, _ = data(7, 3)
    assert_close(Bernoulli().distribution(output).probs, torch.as_tensor(special.expit(output.numpy())), **TIGHT)


@pytest.mark.parametrize("value", [-0.1, 1.1, 2.0, -1.0, math.nan])
def test_targets_outside_the_unit_interval_are_refused(value: float) -> None:
    """Labels of -1 and 1, class indices beyond 1 and NaN would all give a number, and none would be a likelihood."""
    target = torch.tensor([[0.0], [1.0], [value]])
    with pytest.raises(TargetError, match="allowed: 0 and 1") as caught:
        Bernoulli()(torch.zeros(3, 1), target)
    assert isinstance(caught.value, BayesKfacError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("output", "target"), [((4,), (4, 1)), ((4, 1), (4,)), ((4, 2), (4, 1))])
def test_targets_never_broadcast(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match="must be equal"):
        Bernoulli()(torch.zeros(output), torch.zeros(target))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_targets_that_are_not_floats_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TargetError, match=r"must be floating point.*target\.to\("):
        Bernoulli()(torch.zeros(4, 1), torch.zeros(4, 1, dtype=dtype))
