"""Calibration errors against loops."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_kfac import metrics
from tests.metrics.data import random_classification, seeds


def bins_by_loop(probs: Tensor, labels: Tensor, num_bins: int, scheme: str) -> list[tuple[float, float, int]]:
    """Reference: (confidence, accuracy, count) of the non-empty bins, one example at a time."""
    examples = []
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        predicted = max(range(len(row)), key=row.__getitem__)
        examples.append((row[predicted], predicted == label))
    examples.sort()
    n = len(examples)
    if scheme == "width":
        uppers = [i / num_bins for i in range(1, num_bins)]
    else:
        uppers = [examples[math.ceil(i * n / num_bins) - 1][0] for i in range(1, num_bins)]
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for confidence, correct in examples:
        index = 0
        while index < num_bins - 1 and confidence > uppers[index]:
            index += 1
        bins[index].append((confidence, correct))
    return [
        (sum(c for c, _ in members) / len(members), sum(hit for _, hit in members) / len(members), len(members))
        for members in bins
        if members
    ]


@pytest.mark.parametrize("scheme", ["width", "mass"])
@given(
    seed=seeds,
    n=st.integers(1, 200),
    num_classes=st.integers(1, 5),
    num_bins=st.integers(1, 25),
    decimals=st.sampled_from([None, 1, 2]),
)
@settings(deadline=None, max_examples=60)
def test_calibration_against_loop(
    scheme: str, seed: int, n: int, num_classes: int, num_bins: int, decimals: int | None
) -> None:
    probs, labels = random_classification(seed, n, num_classes, decimals=decimals)
    expected = bins_by_loop(probs, labels, num_bins, scheme)
    curve = metrics.reliability_curve(probs, labels, num_bins, scheme)
    assert curve.count.tolist() == [count for _, _, count in expected]
    assert curve.confidence.tolist() == pytest.approx([confidence for confidence, _, _ in expected])
    assert curve.accuracy.tolist() == pytest.approx([accuracy for _, accuracy, _ in expected])
    error = sum(count / n * abs(accuracy - confidence) for confidence, accuracy, count in expected)
    result = metrics.expected_calibration_error(probs, labels, num_bins, scheme)
    assert result.item() == pytest.approx(error, abs=1e-12)


@given(n=st.integers(1, 60), num_bins=st.integers(1, 20), seed=seeds, scheme=st.sampled_from(["width", "mass"]))
@settings(deadline=None, max_examples=30)
def test_calibration_ignores_order(n: int, num_bins: int, seed: int, scheme: str) -> None:
    probs, labels = random_classification(seed, n, 3, decimals=1)
    order = list(range(n))
    random.Random(seed).shuffle(order)
    once = metrics.expected_calibration_error(probs, labels, num_bins, scheme)
    again = metrics.expected_calibration_error(probs[order], labels[order], num_bins, scheme)
    assert once.item() == pytest.approx(again.item(), abs=1e-12)


def test_width_bins_are_closed_on_the_right() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.61, 0.39], [0.8, 0.2], [1.0, 0.0]])
    assert metrics.reliability_curve(probs, [0, 0, 0, 0], num_bins=5).count.tolist() == [1, 2, 1]


def test_mass_bins_hold_equal_numbers() -> None:
    probs, labels = random_classification(0, 103, 4)
    count = metrics.reliability_curve(probs, labels, 10, scheme="mass").count
    assert len(count) == 10
    assert set(count.tolist()) == {10, 11}


def test_ece_of_certain_predictions() -> None:
    probs = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    assert metrics.expected_calibration_error(probs, [0, 0, 1, 1]).item() == 0
    assert metrics.expected_calibration_error(probs, [1, 1, 0, 0]).item() == 1


def test_ece_in_float32_stays_accurate_for_many_examples() -> None:
    probs = torch.tensor([[0.9, 0.1]]).repeat(2_000_000, 1)
    labels = torch.zeros(len(probs), dtype=torch.int64)
    assert metrics.expected_calibration_error(probs, labels).item() == pytest.approx(0.1, abs=1e-6)


@given(seed=seeds, n=st.integers(1, 60), num_bins=st.integers(1, 20), scheme=st.sampled_from(["width", "mass"]))
@settings(deadline=None, max_examples=30)
def test_maximum_is_the_largest_gap_and_bounds_the_expectation(seed: int, n: int, num_bins: int, scheme: str) -> None:
    probs, labels = random_classification(seed, n, 3)
    gaps = [abs(accuracy - confidence) for confidence, accuracy, _ in bins_by_loop(probs, labels, num_bins, scheme)]
    largest = metrics.maximum_calibration_error(probs, labels, num_bins, scheme)
    assert largest.item() == pytest.approx(max(gaps))
    assert metrics.expected_calibration_error(probs, labels, num_bins, scheme) <= largest + 1e-12


@given(seed=seeds, n=st.integers(1, 60), num_bins=st.integers(1, 20), scheme=st.sampled_from(["width", "mass"]))
@settings(deadline=None, max_examples=30)
def test_classwise_against_loop(seed: int, n: int, num_bins: int, scheme: str) -> None:
    """Each class against the rest: its probability is the confidence, and whether it is the label the hit."""
    probs, labels = random_classification(seed, n, 3)
    errors = []
    for index in range(3):
        own = probs[:, index]
        edges = np.arange(1, num_bins) / num_bins
        if scheme == "mass":
            edges = np.sort(own.numpy())[[math.ceil(i * n / num_bins) - 1 for i in range(1, num_bins)]]
        bins = np.searchsorted(edges, own.numpy(), side="left")
        hit = (labels == index).numpy()
        errors.append(
            sum((bins == b).sum() / n * abs(own.numpy()[bins == b].mean() - hit[bins == b].mean()) for b in set(bins))
        )
    result = metrics.classwise_calibration_error(probs, labels, num_bins, scheme)
    assert result.item() == pytest.approx(np.mean(errors), abs=1e-12)


@given(seed=seeds, n=st.integers(1, 60))
@settings(deadline=None, max_examples=20)
def test_classwise_does_not_depend_on_the_names_of_the_classes(seed: int, n: int) -> None:
    probs, labels = random_classification(seed, n, 4)
    renamed = torch.tensor([2, 0, 3, 1])
    inverse = renamed.argsort()
    once = metrics.classwise_calibration_error(probs, labels)
    again = metrics.classwise_calibration_error(probs[:, inverse], renamed[labels])
    assert once.item() == pytest.approx(again.item())
