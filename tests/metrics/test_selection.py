"""Risk and coverage against loops and against all orders of tied examples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_kfac import metrics
from bayes_kfac.errors import ArgumentError
from tests.metrics.data import random_classification, seeds


@given(seed=seeds, n=st.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_curve_against_loop(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    loss, confidence = rng.exponential(size=n), rng.normal(size=n)
    curve = metrics.risk_coverage_curve(loss, confidence)
    order = sorted(range(n), key=lambda i: -confidence[i])
    for kept in range(1, n + 1):
        assert curve.coverage[kept - 1].item() == pytest.approx(kept / n)
        assert curve.risk[kept - 1].item() == pytest.approx(np.mean([loss[i] for i in order[:kept]]))
        # The threshold is usable: it keeps exactly these.
        assert (confidence >= curve.threshold[kept - 1].item()).sum() == kept
    assert metrics.area_under_risk_coverage(loss, confidence).item() == pytest.approx(curve.risk.mean().item())


@given(
    loss=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    data=st.data(),
)
@settings(deadline=None, max_examples=25)
def test_ties_are_the_mean_over_all_orders(loss: list[int], data: st.DataObject) -> None:
    n = len(loss)
    confidence = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    risks = []
    for permutation in itertools.permutations(range(n)):
        order = sorted(permutation, key=lambda i: -confidence[i])  # stable: ties stay as the permutation has them
        risks.append(np.cumsum([loss[i] for i in order]) / np.arange(1, n + 1))
    curve = metrics.risk_coverage_curve(loss, confidence)
    np.testing.assert_allclose(curve.risk, np.mean(risks, 0), rtol=1e-5)


def test_no_confidence_at_all_has_the_mean_loss_everywhere() -> None:
    curve = metrics.risk_coverage_curve([1.0, 0.0, 0.0, 1.0], torch.zeros(4))
    assert curve.risk.tolist() == [0.5] * 4


@given(seed=seeds, n=st.integers(2, 50))
@settings(deadline=None, max_examples=20)
def test_area_is_least_when_confidence_knows_the_loss(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    loss = rng.exponential(size=n)
    areas = [metrics.area_under_risk_coverage(loss, score).item() for score in (-loss, rng.normal(size=n), loss)]
    assert areas[0] <= areas[1] <= areas[2]


def test_selective_accuracy_by_hand() -> None:
    probs = [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]]
    labels = [0, 1, 1, 0]  # the third is wrong
    found = [metrics.selective_accuracy(probs, labels, coverage).item() for coverage in (0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([1, 1, 2 / 3, 3 / 4])
    # Another confidence: the third first.
    assert metrics.selective_accuracy(probs, labels, 0.25, [1.0, 2.0, 9.0, 3.0]).item() == 0


def test_coverage_is_rounded_up_to_whole_examples() -> None:
    probs, labels = random_classification(0, 10, 3)
    curve = metrics.risk_coverage_curve(probs.argmax(-1) != labels, probs.amax(-1))
    for coverage, kept in ((1e-12, 1), (1e-6, 1), (0.3, 3), (0.31, 4), (0.7, 7), (1, 10)):
        found = metrics.selective_accuracy(probs, labels, coverage)
        assert found.item() == pytest.approx(1 - curve.risk[kept - 1].item())


def test_selective_accuracy_of_all_is_the_accuracy() -> None:
    probs, labels = random_classification(1, 101, 3)
    assert metrics.selective_accuracy(probs, labels, 1.0).item() == pytest.approx(
        metrics.accuracy(probs, labels).item()
    )


def test_risk_is_differentiable_in_the_loss() -> None:
    loss = torch.rand(6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    confidence = torch.tensor([1, 2, 2, 3, 0, 1])
    assert torch.autograd.gradcheck(lambda own: metrics.area_under_risk_coverage(own, confidence), loss)


def test_refuses() -> None:
    with pytest.raises(ArgumentError, match="Shapes differ: loss"):
        metrics.risk_coverage_curve([1.0, 2.0], [1.0])
    with pytest.raises(ArgumentError, match=r"loss has shape \(2, 1\)"):
        metrics.area_under_risk_coverage([[1.0], [2.0]], [[1.0], [2.0]])
    for coverage in (0, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match="coverage"):
            metrics.selective_accuracy([[0.5, 0.5]], [0], coverage)
    with pytest.raises(ArgumentError, match="Shapes differ"):
        metrics.selective_accuracy([[0.5, 0.5]], [0], 0.5, [1.0, 2.0])
