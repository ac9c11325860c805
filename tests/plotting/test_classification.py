"""Reliability diagrams and risk-coverage curves: what is drawn where, not how it looks."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor

from bayes_kfac import metrics, plotting
from bayes_kfac.errors import ArgumentError
from tests.plotting.helpers import legend_texts


def test_reliability_draws_the_curve(classification: tuple[Tensor, Tensor]) -> None:
    probs, labels = classification
    ax = plotting.plot_reliability(probs, labels, num_bins=10, label="softmax")
    curve = metrics.reliability_curve(probs, labels, 10)
    error = metrics.expected_calibration_error(probs, labels, 10)

    diagonal, line = ax.lines
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(line.get_xydata(), torch.stack([curve.confidence, curve.accuracy], -1))
    area = ax.collections[0].get_sizes()
    np.testing.assert_allclose(area / area.sum(), curve.count / curve.count.sum(), rtol=1e-6)
    assert legend_texts(ax) == ["calibrated", f"softmax, ECE {error.item():.3f}"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")
    ax.figure.canvas.draw()


def test_reliability_without_label_shows_the_error_alone(classification: tuple[Tensor, Tensor]) -> None:
    ax = plotting.plot_reliability(*classification)
    assert legend_texts(ax)[-1].startswith("ECE 0.")


def test_reliability_compares_curves_on_one_diagonal(classification: tuple[Tensor, Tensor]) -> None:
    probs, labels = classification
    _, ax = plt.subplots()
    for name in ("a", "b", "c"):
        assert plotting.plot_reliability(probs, labels, label=name, ax=ax) is ax
    _, *curves = ax.lines
    assert len(curves) == 3
    assert len({line.get_color() for line in ax.lines}) == 4
    for line, halo in zip(curves, ax.collections, strict=True):
        np.testing.assert_allclose(halo.get_facecolor()[0, :3], mpl.colors.to_rgb(line.get_color()))
    assert [text.split(",")[0] for text in legend_texts(ax)] == ["calibrated", "a", "b", "c"]
    assert len(plt.get_fignums()) == 1

    # Cleared axes start afresh.
    ax.clear()
    plotting.plot_reliability(probs, labels, ax=ax)
    assert len(ax.lines) == 2


def test_reliability_refuses(classification: tuple[Tensor, Tensor]) -> None:
    probs, labels = classification
    with pytest.raises(ArgumentError, match="sums to"):
        plotting.plot_reliability(2 * probs, labels)
    with pytest.raises(ArgumentError, match="num_bins"):
        plotting.plot_reliability(probs, labels, num_bins=0)
    assert not plt.get_fignums()


def test_reliability_with_bins_of_equal_numbers(classification: tuple[Tensor, Tensor]) -> None:
    ax = plotting.plot_reliability(*classification, num_bins=10, scheme="mass")
    curve = metrics.reliability_curve(*classification, 10, "mass")
    np.testing.assert_allclose(ax.lines[-1].get_xydata(), torch.stack([curve.confidence, curve.accuracy], -1))
    error = metrics.expected_calibration_error(*classification, 10, "mass")
    assert legend_texts(ax)[-1] == f"ECE {error.item():.3f}"


# Risk and coverage


def test_risk_coverage_draws_the_curve(classification: tuple[Tensor, Tensor]) -> None:
    probs, labels = classification
    wrong, confidence = probs.argmax(-1) != labels, probs.amax(-1)
    ax = plotting.plot_risk_coverage(wrong, confidence, label="softmax")
    curve = metrics.risk_coverage_curve(wrong, confidence)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), torch.stack([curve.coverage, curve.risk], -1))
    area = metrics.area_under_risk_coverage(wrong, confidence).item()
    assert legend_texts(ax) == [f"softmax, AURC {area:.3g}"]
    assert ax.get_ylim()[0] == 0
    ax.figure.canvas.draw()


def test_risk_coverage_compares_models(classification: tuple[Tensor, Tensor]) -> None:
    """Each curve with a colour and with dashes of its own: they are told apart in grey too."""
    probs, labels = classification
    _, ax = plt.subplots()
    for name in ("a", "b", "c"):
        assert plotting.plot_risk_coverage(probs.argmax(-1) != labels, probs.amax(-1), label=name, ax=ax) is ax
    assert len({line.get_color() for line in ax.lines}) == len({str(line._dash_pattern) for line in ax.lines}) == 3
    assert len(plt.get_fignums()) == 1


def test_risk_coverage_refuses() -> None:
    with pytest.raises(ArgumentError, match="Shapes differ"):
        plotting.plot_risk_coverage([1.0, 2.0], [1.0])
    assert not plt.get_fignums()
