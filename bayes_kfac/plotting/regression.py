"""Pictures of predictions of real numbers: bands over an input, and whether they hold."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from bayes_kfac.errors import ArgumentError, check_count, check_fraction, check_probability
from bayes_kfac.metrics import TensorLike, miscalibration_area
from bayes_kfac.metrics.pit import nominal_levels
from bayes_kfac.plotting.style import (
    DARK,
    INK,
    LIGHT,
    PALETTE,
    QUIET,
    column,
    diagonal,
    label_axes,
    legend,
    next_style,
    once,
    prepare,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class RegressionPrediction(Protocol):
    """What :func:`plot_predictive_band` needs to know of a prediction."""

    @property
    def mean(self) -> Tensor:
        """Predictive means, ``[n]`` or ``[n, 1]``."""

    @property
    def epistemic_variance(self) -> Tensor:
        """The part of the variance that comes from the uncertain weights, the shape of ``mean``."""

    def interval(self, level: float, /) -> tuple[Tensor, Tensor]:
        """Return the ends of the central interval of the total uncertainty, each the shape of ``mean``."""


def plot_predictive_band(
    x: TensorLike,
    prediction: RegressionPrediction,
    *,
    data: tuple[TensorLike, TensorLike] | None = None,
    level: float = 0.9,
    ax: Axes | None = None,
) -> Axes:
    """Plot the predictive mean over a scalar input, with its total and its epistemic uncertainty.

    The light band is the interval of the prediction, noise included. The dark band inside it is the Gaussian interval
    of the epistemic variance alone: what more data could still remove.

    Args:
        x: Inputs at which the prediction was made, ``[n]`` or ``[n, 1]``, in any order.
        prediction: A prediction for one output, ``[n]`` or ``[n, 1]``.
        data: Inputs and targets to scatter over the bands, ``[m]`` or ``[m, 1]`` each.
        level: Probability of both intervals, between 0 and 1.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If shapes do not fit, the prediction has no intervals, or ``level`` is not between 0 and 1.
    """
    level = check_probability("level", level)
    if not hasattr(prediction, "interval"):
        raise ArgumentError(
            f"prediction is a {type(prediction).__name__}, which has no intervals. Allowed: a prediction of real "
            "numbers or counts."
        )
    inputs = column("x", x)
    order = inputs.argsort(stable=True)
    lower, upper = prediction.interval(level)
    columns = {
        "prediction.mean": prediction.mean,
        "prediction.epistemic_variance": prediction.epistemic_variance,
        "lower end of prediction.interval": lower,
        "upper end of prediction.interval": upper,
    }
    mean, epistemic_variance, low, high = (column(name, value, len(inputs))[order] for name, value in columns.items())
    inputs = inputs[order]
    epistemic = NormalDist().inv_cdf((1 + level) / 2) * np.sqrt(epistemic_variance)
    points = None
    if data is not None:
        data_x = column("data[0]", data[0])
        points = data_x, column("data[1]", data[1], len(data_x))

    ax = prepare(ax, figsize=(6.4, 4.0))
    percent = f"{100 * level:.4g} %"
    ax.fill_between(inputs, low, high, color=LIGHT, linewidth=0, label=f"total, {percent}")
    ax.fill_between(inputs, mean - epistemic, mean + epistemic, color=DARK, linewidth=0, label=f"epistemic, {percent}")
    ax.plot(inputs, mean, color=PALETTE[0], linewidth=1.8, label="mean")
    if points is not None:
        ax.scatter(*points, s=18, color=INK, edgecolors="white", linewidths=0.6, zorder=3, label="data")
    label_axes(ax, "x", "y")
    ax.margins(x=0)
    legend(ax)
    return ax


def plot_pit(
    pit: TensorLike, *, num_bins: int = 10, level: float = 0.95, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Plot a histogram of probability integral transforms, which is flat where predictions are calibrated.

    A hump in the middle means that the predictions are too wide, a valley that they are too narrow, a slope that they
    are biased. The grey band holds each bar with probability ``level`` if the transforms are uniform, by the binomial
    distribution of its count. Call it again with the same axes to compare models.

    Sources: Dawid (1984), Statistical theory: the prequential approach; Gneiting, Balabdaoui and Raftery (2007),
    Probabilistic forecasts, calibration and sharpness.

    Args:
        pit: ``prediction.cdf(target)``, or those of :mod:`bayes_kfac.metrics`, in ``[0, 1]``, any shape.
        num_bins: Number of bars, of equal width.
        level: Probability of the band for each bar on its own, in ``[0, 1)``.
        label: Name of the histogram in the legend.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If ``pit`` is empty or leaves ``[0, 1]``, or an option is out of range.
    """
    from scipy.stats import binom

    num_bins = check_count("num_bins", num_bins)
    check_fraction("level", level)
    values = nominal_levels(pit, "quantile").detach().cpu().numpy()
    count, edges = np.histogram(values, bins=num_bins, range=(0, 1))
    to_density = num_bins / len(values)
    tail = (1 - level) / 2
    low, high = (binom.ppf(p, len(values), 1 / num_bins) * to_density for p in (tail, 1 - tail))

    ax = prepare(ax, figsize=(5.6, 3.6))
    gid = f"bayes_kfac.band {num_bins} {len(values)} {level}"
    if once(ax, gid):
        ax.axhspan(low, high, color="#DDDDDD", linewidth=0, zorder=0.5, gid=gid, label=f"chance, {100 * level:.4g} %")
        ax.axhline(1, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
    style = next_style(ax)
    # A line of steps that begins and ends on the floor: it counts as a curve, and shows in the legend as one.
    ax.plot(np.repeat(edges, 2), np.r_[0, np.repeat(count * to_density, 2), 0], linewidth=1.8, label=label, **style)
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0, top=max(ax.get_ylim()[1], 1.35 * max(high, count.max() * to_density)))
    label_axes(ax, "probability integral transform", "density")
    legend(ax, loc="upper center", ncols=2)
    return ax


def plot_coverage(pit: TensorLike, *, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Plot how often central intervals hold, against the probability that they claim.

    Below the diagonal they are too narrow, above it too wide. There are no bins: the curve rises at each target, and
    the legend shows the area between it and the diagonal, :func:`bayes_kfac.metrics.miscalibration_area`. Call it
    again with the same axes to compare models.

    Source: Kuleshov, Fenner and Ermon (2018), Accurate uncertainties for deep learning using calibrated regression.

    Args:
        pit: ``prediction.cdf(target)``, or those of :mod:`bayes_kfac.metrics`, in ``[0, 1]``, any shape.
        label: Name of the curve in the legend.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If ``pit`` is empty or leaves ``[0, 1]``.
    """
    area = f"area {miscalibration_area(pit).item():.3f}"
    levels = np.sort(nominal_levels(pit, "interval").detach().cpu().numpy())
    observed = np.arange(len(levels) + 1) / len(levels)

    ax = prepare(ax, figsize=(4.6, 4.6))
    diagonal(ax, "calibrated")
    ax.plot(
        np.r_[0, levels, 1],
        np.r_[observed, 1],
        drawstyle="steps-post",
        linewidth=1.8,
        label=f"{label}, {area}" if label else area,
        **next_style(ax),
    )
    label_axes(ax, "probability of the interval", "share of targets inside")
    legend(ax, loc="upper left")
    return ax
