"""Detection scores against scikit-learn and all pairs, with ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bayes_kfac import metrics
from bayes_kfac.errors import ArgumentError
from tests.metrics.data import seeds

#: Few distinct values, so that most scores tie.
tied = st.lists(st.integers(-3, 3), min_size=1, max_size=25)


def sklearns(positive: list[int], negative: list[int]) -> tuple[np.ndarray, np.ndarray]:
    labels = np.r_[np.ones(len(positive), dtype=int), np.zeros(len(negative), dtype=int)]
    return labels, np.r_[positive, negative].astype(float)


@given(positive=tied, negative=tied)
@settings(deadline=None, max_examples=60)
def test_equals_sklearn(positive: list[int], negative: list[int]) -> None:
    labels, scores = sklearns(positive, negative)
    assert metrics.auroc(positive, negative).item() == pytest.approx(roc_auc_score(labels, scores), rel=1e-6)
    precision = average_precision_score(labels, scores)
    assert metrics.average_precision(positive, negative).item() == pytest.approx(precision, rel=1e-6)


@given(positive=tied, negative=tied, rate=st.sampled_from([0.1, 0.5, 0.7, 0.95, 1.0]))
@settings(deadline=None, max_examples=60)
def test_false_positive_rate_is_the_least_on_the_curve_of_sklearn(
    positive: list[int], negative: list[int], rate: float
) -> None:
    false, true, _ = roc_curve(*sklearns(positive, negative), drop_intermediate=False)
    expected = false[true >= rate - 1e-9].min()
    assert metrics.false_positive_rate(positive, negative, rate).item() == pytest.approx(expected, rel=1e-6)


@given(positive=tied, negative=tied)
@settings(deadline=None, max_examples=30)
def test_auroc_over_all_pairs(positive: list[int], negative: list[int]) -> None:
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert metrics.auroc(positive, negative).item() == pytest.approx(np.mean(pairs), rel=1e-6)


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
def test_only_the_order_of_scores_matters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positive, negative = rng.normal(size=30) + 1, rng.normal(size=40)
    for metric in (metrics.auroc, metrics.average_precision, metrics.false_positive_rate):
        assert metric(np.exp(positive), np.exp(negative)).item() == metric(positive, negative).item()
        shuffled = metric(rng.permutation(positive), rng.permutation(negative))
        assert shuffled.item() == pytest.approx(metric(positive, negative).item())


@given(positive=tied, negative=tied)
@settings(deadline=None, max_examples=20)
def test_auroc_is_the_same_with_the_other_class_as_positive(positive: list[int], negative: list[int]) -> None:
    """Confidence for the examples in distribution, or uncertainty for those out of it."""
    other = metrics.auroc([-score for score in negative], [-score for score in positive])
    assert other.item() == pytest.approx(metrics.auroc(positive, negative).item(), rel=1e-6)


def test_perfect_and_hopeless_detection() -> None:
    high, low = torch.tensor([math.inf, 2.0]), torch.tensor([1.0, -math.inf])
    assert [metrics.auroc(high, low), metrics.average_precision(high, low)] == [1, 1]
    assert metrics.false_positive_rate(high, low) == 0
    assert [metrics.auroc(low, high), metrics.false_positive_rate(low, high)] == [0, 1]
    assert metrics.average_precision(low, high).item() == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_many_scores_are_counted_exactly() -> None:
    """10¹⁰ pairs do not fit single precision, but their number is not summed in it."""
    scores = torch.arange(100_000, dtype=torch.float32)
    assert metrics.auroc(scores + 0.5, scores).item() == pytest.approx(0.5 + 0.5e-5, abs=1e-7)


def test_integers_that_single_precision_cannot_tell_apart() -> None:
    assert metrics.auroc([2**24 + 1], torch.tensor([2**24], dtype=torch.int32)) == 1


def test_the_least_share_of_positives_is_one_of_them() -> None:
    assert metrics.false_positive_rate([1.0, 2.0, 3.0], [2.0], 1e-12) == 0


def test_refuses() -> None:
    for metric in (metrics.auroc, metrics.average_precision, metrics.false_positive_rate):
        with pytest.raises(ArgumentError, match=r"negative has shape \(2, 1\)"):
            metric([1.0], [[1.0], [2.0]])
        with pytest.raises(ArgumentError, match="positive is empty"):
            metric([], [1.0])
        with pytest.raises(ArgumentError, match="negative holds NaN"):
            metric([1.0], [math.nan])
    for rate in (0, 1.01):
        with pytest.raises(ArgumentError, match="true_positive_rate"):
            metrics.false_positive_rate([1.0], [1.0], rate)


def test_columns_of_a_table_are_taken_without_a_warning() -> None:
    table = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    for metric in (metrics.auroc, metrics.average_precision, metrics.false_positive_rate):
        assert metric(table[:, 0], table[:, 1]) == metric(table[:, 0].clone(), table[:, 1].clone())
