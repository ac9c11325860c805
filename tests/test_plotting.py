"""Plots: what is drawn where, not how it looks."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor

from bayes_kfac import metrics, plotting
from bayes_kfac.errors import ArgumentError

mpl.use("Agg")


@dataclass
class GaussianPrediction:
    """A stand-in with the attributes that the band needs."""

    mean: Tensor
    epistemic_variance: Tensor
    noise_variance: float = 0.25

    @property
    def stddev(self) -> Tensor:
        return (self.epistemic_variance + self.noise_variance).sqrt()

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        half_width = NormalDist().inv_cdf((1 + level) / 2) * self.stddev
        return self.mean - half_width, self.mean + half_width


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    """Close all figures, and check that no plot touched the global style."""
    before = mpl.rcParams.copy()
    yield
    plt.close("all")
    assert mpl.rcParams == before


@pytest.fixture
def classification() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(2 * torch.randn(300, 4, generator=generator), -1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def predict(x: Tensor) -> GaussianPrediction:
    return GaussianPrediction(mean=torch.sin(x), epistemic_variance=0.1 + 0.05 * x.square())


def band_at(ax: Axes, index: int, x: float) -> tuple[float, float]:
    """The ends of the index-th filled band at an input that is one of its vertices."""
    vertices = ax.collections[index].get_paths()[0].vertices
    ends = vertices[np.isclose(vertices[:, 0], x), 1]
    return ends.min(), ends.max()


def legend_texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


# Predictive band


@pytest.mark.parametrize("column", [False, True], ids=["[n]", "[n, 1]"])
def test_band_draws_mean_and_both_intervals(column: bool) -> None:
    x = torch.linspace(-3, 3, 41)[torch.randperm(41, generator=torch.Generator().manual_seed(0))]
    prediction = predict(x[:, None] if column else x)
    ax = plotting.plot_predictive_band(x, prediction, level=0.8)

    (mean,) = ax.lines
    inputs, values = mean.get_data()
    assert np.all(np.diff(inputs) > 0)
    np.testing.assert_allclose(values, np.sin(inputs), atol=1e-6)

    z = NormalDist().inv_cdf(0.9)
    for i in (0, 17, 40):
        at = x[i].item()
        epistemic = 0.1 + 0.05 * at**2
        for index, variance in enumerate((epistemic + 0.25, epistemic)):
            half_width = z * np.sqrt(variance)
            assert band_at(ax, index, at) == pytest.approx((np.sin(at) - half_width, np.sin(at) + half_width), abs=1e-5)
    assert legend_texts(ax) == ["total, 80 %", "epistemic, 80 %", "mean"]
    ax.figure.canvas.draw()


def test_epistemic_band_is_darker_and_on_top() -> None:
    x = torch.linspace(-1, 1, 5)
    total, epistemic = plotting.plot_predictive_band(x, predict(x)).collections
    assert epistemic.get_facecolor()[0, :3].sum() < total.get_facecolor()[0, :3].sum()
    assert epistemic.get_zorder() >= total.get_zorder()


def test_band_scatters_data() -> None:
    x = torch.linspace(-1, 1, 5)
    data = (np.array([[0.5], [-0.5]]), torch.tensor([1.0, 2.0], requires_grad=True))
    ax = plotting.plot_predictive_band(x, predict(x), data=data)
    np.testing.assert_allclose(ax.collections[-1].get_offsets(), [[0.5, 1], [-0.5, 2]])
    assert legend_texts(ax)[-1] == "data"


def test_band_takes_gradients_and_coarse_dtypes() -> None:
    x = torch.linspace(-1, 1, 5, requires_grad=True)
    plotting.plot_predictive_band(x, predict(x))
    plotting.plot_predictive_band(x, predict(x.detach().to(torch.bfloat16)))


def test_band_keeps_axes_and_their_names() -> None:
    _, ax = plt.subplots()
    ax.set_xlabel("time / s")
    x = torch.linspace(-1, 1, 5)
    assert plotting.plot_predictive_band(x, predict(x), ax=ax) is ax
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time / s", "y")
    assert len(plt.get_fignums()) == 1


def test_band_refuses() -> None:
    x = torch.linspace(-1, 1, 5)
    with pytest.raises(ArgumentError, match=r"x has shape \(5, 2\)"):
        plotting.plot_predictive_band(torch.ones(5, 2), predict(x))
    with pytest.raises(ArgumentError, match=r"prediction.mean has shape \(5,\). Allowed: \[4\] or \[4, 1\]"):
        plotting.plot_predictive_band(x[:4], predict(x))
    with pytest.raises(ArgumentError, match=r"data\[1\] has shape \(3,\)"):
        plotting.plot_predictive_band(x, predict(x), data=([1.0, 2.0], [1.0, 2.0, 3.0]))
    with pytest.raises(ArgumentError, match="level"):
        plotting.plot_predictive_band(x, predict(x), level=1.0)
    assert not plt.get_fignums()


# Reliability diagram


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


# Matplotlib is optional


def test_missing_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, classification: tuple[Tensor, Tensor]
) -> None:
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    # The module itself imports without Matplotlib; only drawing needs it.
    runpy.run_path(plotting.__file__)
    x = torch.linspace(-1, 1, 5)
    with pytest.raises(ImportError, match=r"pip install 'bayes-kfac\[plot\]'"):
        plotting.plot_predictive_band(x, predict(x))
    with pytest.raises(ImportError, match=r"pip install 'bayes-kfac\[plot\]'"):
        plotting.plot_reliability(*classification)
