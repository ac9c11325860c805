"""Learning curves, acquisitions and the ELBO: what is drawn where, not how it looks."""

from __future__ import annotations

import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac import plotting
from bayes_kfac.errors import ArgumentError
from tests.plotting.helpers import legend_texts, predict


def test_learning_curve_draws_mean_and_standard_error() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 4))
    ax = plotting.plot_learning_curve([10, 20, 40, 80], values, label="BALD")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), np.stack([[10, 20, 40, 80], values.mean(0)], -1))
    band = ax.collections[0].get_paths()[0].vertices
    error = values[:, 1].std(ddof=1) / math.sqrt(5)
    ends = band[np.isclose(band[:, 0], 20), 1]
    assert (ends.min(), ends.max()) == pytest.approx((values[:, 1].mean() - error, values[:, 1].mean() + error))
    assert legend_texts(ax) == ["BALD"]
    assert ax.get_xlabel() == "labelled examples"
    assert ax.get_ylabel() == "test score (mean ± standard error)"


def test_learning_curve_of_one_seed_has_no_band() -> None:
    ax = plotting.plot_learning_curve([1, 2, 3], torch.tensor([0.1, 0.2, 0.3], requires_grad=True))
    assert not ax.collections
    assert ax.get_legend() is None


def test_learning_curves_share_axes_and_differ_in_style() -> None:
    _, ax = plt.subplots()
    ax.set_ylabel("RMSE / kWh")
    for name in ("a", "b"):
        assert plotting.plot_learning_curve([1, 2], np.ones((3, 2)), label=name, ax=ax) is ax
    for line, band in zip(ax.lines, ax.collections, strict=True):
        np.testing.assert_allclose(band.get_facecolor()[0, :3], mpl.colors.to_rgb(line.get_color()))
    assert len({line.get_color() for line in ax.lines}) == 2
    assert ax.get_ylabel() == "RMSE / kWh"


def test_learning_curve_refuses() -> None:
    for values in (np.ones((2, 4)), np.ones(4), np.ones((1, 2, 3)), np.ones((0, 3))):
        with pytest.raises(ArgumentError, match=r"values has shape .*Allowed: \[seeds, 3\] or \[3\]"):
            plotting.plot_learning_curve([1, 2, 3], values)
    with pytest.raises(ArgumentError, match="values of type list is no array of numbers"):
        plotting.plot_learning_curve([1, 2], [[1.0, 2.0], [1.0]])
    with pytest.raises(ArgumentError, match="values holds NaN"):
        plotting.plot_learning_curve([1, 2], [1.0, math.nan])
    with pytest.raises(ArgumentError, match="x does not ascend"):
        plotting.plot_learning_curve([2, 1], [1.0, 2.0])
    assert not plt.get_fignums()


def test_acquisition_over_one_input_draws_the_scores() -> None:
    x = torch.tensor([[1.0], [-1.0], [0.0]])
    ax = plotting.plot_acquisition(x, [3.0, 1.0, 2.0], pool=[-0.5, 0.5], picked=[0.5])
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[-1, 1], [0, 2], [1, 3]])
    np.testing.assert_allclose(ax.collections[-1].get_offsets(), [[0.5, 2.5]])  # on the curve
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [-0.5, 0.5])
    assert legend_texts(ax) == ["pool", "picked"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "score")
    assert ax.get_ylim()[0] == 0


def test_acquisition_stands_below_a_band() -> None:
    _, (top, bottom) = plt.subplots(2, 1, sharex=True)
    x = torch.linspace(-1, 1, 5)
    plotting.plot_predictive_band(x, predict(x), ax=top)
    assert plotting.plot_acquisition(x, x.square(), ax=bottom) is bottom
    assert top.get_xlim() == bottom.get_xlim() == (-1, 1)
    assert len(plt.get_fignums()) == 1


def test_acquisition_with_negative_scores_is_shown_whole() -> None:
    ax = plotting.plot_acquisition([0.0, 1.0], [-2.0, 1.0])
    assert ax.get_ylim()[0] == -2


def test_acquisition_over_two_inputs_is_a_map() -> None:
    side = torch.linspace(-1, 1, 9)
    grid = torch.cartesian_prod(side, side)
    pool = torch.rand(6, 2)
    ax = plotting.plot_acquisition(grid, grid[:, 0], pool=pool, picked=pool[:2])
    filled, dots, stars = ax.collections
    np.testing.assert_allclose(dots.get_offsets(), pool, rtol=1e-6)
    np.testing.assert_allclose(stars.get_offsets(), pool[:2], rtol=1e-6)
    # The score is the first input: a contour's level is where it lies.
    for level, path in zip(filled.levels[1:-1], filled.get_paths()[1:], strict=False):
        assert path.vertices[:, 0].min() == pytest.approx(level, abs=1e-9)
    assert (ax.get_xlim(), ax.get_ylim()) == ((-1, 1), (-1, 1))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x₁", "x₂")
    (_, bar) = ax.figure.axes
    assert bar.get_ylabel() == "score"
    ax.figure.canvas.draw()


def test_acquisition_refuses() -> None:
    x = torch.linspace(-1, 1, 5)
    with pytest.raises(ArgumentError, match=r"x has shape \(5, 3\). Allowed: \[n\] or \[n, 1\] or \[n, 2\]"):
        plotting.plot_acquisition(torch.ones(5, 3), x)
    with pytest.raises(ArgumentError, match=r"scores has shape \(4,\)"):
        plotting.plot_acquisition(x, x[:4])
    with pytest.raises(ArgumentError, match=r"pool has shape \(5,\). Allowed: \[n, 2\]"):
        plotting.plot_acquisition(torch.rand(5, 2), x, pool=x)
    with pytest.raises(ArgumentError, match="leave picked candidates out"):
        plotting.plot_acquisition(x, torch.full((5,), -torch.inf))
    with pytest.raises(ArgumentError, match="lie on one line"):
        plotting.plot_acquisition(torch.stack([x, 2 * x], -1), x)
    assert not plt.get_fignums()


def test_elbo_is_drawn_from_what_fit_tells() -> None:
    """The bound and its two parts, as callbacks see them."""
    torch.manual_seed(0)
    epochs: list[bk.training.FitState] = []
    data = TensorDataset(torch.randn(20, 2), torch.randn(20, 1))
    bk.fit(
        nn.Linear(2, 1),
        bk.likelihoods.Gaussian(1.0),
        DataLoader(data, 10),
        epochs=3,
        callbacks=[epochs.append],
        progress=False,
    )
    ax = plotting.plot_elbo(epoch for epoch in epochs)
    drawn = {line.get_label(): line.get_data() for line in ax.lines}
    np.testing.assert_allclose(drawn["−ELBO"], [[1, 2, 3], [-state.elbo for state in epochs]])
    np.testing.assert_allclose(drawn["KL from the prior"][1], [state.kl for state in epochs])
    losses = drawn["negative log-likelihood of the data"][1]
    np.testing.assert_allclose(losses, [20 * state.nll for state in epochs], rtol=1e-5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "nats")


def test_elbo_refuses_no_epoch() -> None:
    with pytest.raises(ArgumentError, match="epochs is empty"):
        plotting.plot_elbo([])
