"""Scores of class probabilities against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from bayes_kfac import metrics
from tests.metrics.data import random_classification, seeds


@given(seed=seeds, n=st.integers(2, 60), num_classes=st.integers(2, 6))
@settings(deadline=None, max_examples=40)
def test_classification_against_sklearn(seed: int, n: int, num_classes: int) -> None:
    probs, labels = random_classification(seed, n, num_classes)
    nll = log_loss(labels, probs, labels=range(num_classes))
    assert metrics.categorical_nll(probs, labels).item() == pytest.approx(nll, rel=1e-12)
    accuracy = accuracy_score(labels, probs.argmax(-1))
    assert metrics.accuracy(probs, labels).item() == pytest.approx(accuracy, rel=1e-12)
    brier = np.square(probs.numpy() - np.eye(num_classes)[labels]).sum(1).mean()
    assert metrics.brier_score(probs, labels).item() == pytest.approx(brier, rel=1e-12)


@given(seed=seeds, n=st.integers(2, 60))
@settings(deadline=None, max_examples=20)
def test_brier_is_twice_the_binary_one_of_sklearn(seed: int, n: int) -> None:
    probs, labels = random_classification(seed, n, 2)
    expected = 2 * brier_score_loss(labels, probs[:, 1], pos_label=1)
    assert metrics.brier_score(probs, labels).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nll_of_impossible_label_is_finite(dtype: torch.dtype) -> None:
    nll = metrics.categorical_nll(torch.tensor([[1, 0]], dtype=dtype), [1])
    assert nll.dtype == dtype
    assert nll.item() == pytest.approx(-math.log(torch.finfo(dtype).tiny))


@pytest.mark.parametrize("score", [metrics.categorical_nll, metrics.brier_score])
@given(seed=seeds)
@settings(deadline=None, max_examples=25)
def test_score_is_least_at_the_truth(score, seed: int) -> None:
    """Of all constant predictions, the frequencies of the labels score least."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 20, size=3)
    labels = np.repeat(np.arange(3), counts)

    def expected(probs: np.ndarray) -> float:
        return score(np.tile(probs, (len(labels), 1)), labels).item()

    assert expected(counts / counts.sum()) <= expected(rng.dirichlet(np.ones(3))) + 1e-12


def test_smooth_scores_are_differentiable() -> None:
    probs = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    logits, labels = probs.log().requires_grad_(), torch.tensor([0, 2, 1, 1])
    for score in (metrics.categorical_nll, metrics.brier_score, metrics.expected_calibration_error):
        assert torch.autograd.gradcheck(lambda own, score=score: score(own.softmax(-1), labels), logits)
