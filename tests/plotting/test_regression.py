"""Bands, PIT histograms and coverage curves: what is drawn where, not how it looks."""

from __future__ import annotations

from statistics import NormalDist

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from scipy import stats

from bayes_kfac import metrics, plotting
from bayes_kfac.errors import ArgumentError
from bayes_kfac.prediction import CategoricalPrediction, Source
from tests.plotting.helpers import legend_texts, predict


def band_at(ax: Axes, index: int, x: float) -> tuple[float, float]:
    """The ends of the index-th filled band at an input that is one of its vertices."""
    vertices = ax.collections[index].get_paths()[0].vertices
    ends = vertices[np.isclose(vertices[:, 0], x), 1]
    return ends.min(), ends.max()


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
    for level in (0, 1.0, -0.5, "wide"):
        with pytest.raises(ArgumentError, match=r"level=.* is out of range\. Allowed: 0 < level < 1"):
            plotting.plot_predictive_band(x, predict(x), level=level)
    classes = CategoricalPrediction(torch.zeros(2, 5, 3), Source("sampling", 2, ()))
    with pytest.raises(ArgumentError, match="prediction is a CategoricalPrediction, which has no intervals"):
        plotting.plot_predictive_band(x, classes)
    assert not plt.get_fignums()


# Probability integral transforms


def test_pit_draws_the_histogram() -> None:
    pit = torch.rand(500, generator=torch.Generator().manual_seed(0)).square()
    ax = plotting.plot_pit(pit, num_bins=8, label="squares")
    line = ax.lines[-1]
    expected, edges = np.histogram(pit, bins=8, range=(0, 1), density=True)
    x, height = line.get_data()
    np.testing.assert_allclose(height[1:-1], np.repeat(expected, 2))
    assert (height[0], height[-1]) == (0, 0)
    np.testing.assert_allclose(x, np.repeat(edges, 2))
    assert legend_texts(ax) == ["chance, 95 %", "squares"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("probability integral transform", "density")
    ax.figure.canvas.draw()


def test_pit_band_is_the_binomial_interval_of_a_bar() -> None:
    """Of uniform transforms a bar's count is binomial: the band has its quantiles."""
    pit = torch.rand(400, generator=torch.Generator().manual_seed(0))
    ax = plotting.plot_pit(pit, num_bins=10, level=0.9)
    (band,) = [patch for patch in ax.patches if patch.get_gid()]
    low, high = band.get_y(), band.get_y() + band.get_height()
    count = stats.binom(400, 0.1)
    assert (low * 40, high * 40) == pytest.approx((count.ppf(0.05), count.ppf(0.95)))


def test_pit_of_two_models_shares_the_band() -> None:
    pit = torch.rand(400, generator=torch.Generator().manual_seed(0))
    _, ax = plt.subplots()
    assert plotting.plot_pit(pit, label="a", ax=ax) is plotting.plot_pit(pit, label="b", ax=ax)
    assert len([patch for patch in ax.patches if patch.get_gid()]) == 1
    assert legend_texts(ax) == ["chance, 95 %", "a", "b"]
    styles = {(line.get_color(), line.get_linestyle()) for line in ax.lines[1:]}
    assert len(styles) == 2
    assert ax.get_ylim()[0] == 0


def test_coverage_draws_the_distribution_of_levels() -> None:
    """At each level, the share of targets whose central interval of that level holds them."""
    pit = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    ax = plotting.plot_coverage(pit, label="own")
    curve = ax.lines[-1]
    levels, observed = curve.get_data()
    assert curve.get_drawstyle() == "steps-post"
    for level, share in zip(levels[1:-1], observed[1:-1], strict=True):
        lower, upper = (1 - level) / 2, (1 + level) / 2
        inside = (pit >= lower - 1e-12) & (pit <= upper + 1e-12)
        assert share == pytest.approx(inside.double().mean().item())
    assert legend_texts(ax) == ["calibrated", f"own, area {metrics.miscalibration_area(pit).item():.3f}"]


def test_transforms_are_refused_outside_the_unit_interval() -> None:
    for plot in (plotting.plot_pit, plotting.plot_coverage):
        with pytest.raises(ArgumentError, match="pit ranges from 0 to 2"):
            plot([0.0, 2.0])
    with pytest.raises(ArgumentError, match="num_bins"):
        plotting.plot_pit([0.5], num_bins=0)
    with pytest.raises(ArgumentError, match="level"):
        plotting.plot_pit([0.5], level=1.0)
    assert not plt.get_fignums()
