"""Plots of predictions: uncertainty bands for regression and reliability diagrams for classification.

Each function draws on the axes it is given, or on those of a new figure, and returns them for further changes. No
global style is read or set beyond Matplotlib's own defaults. Matplotlib itself is optional and imported on first use:
``pip install 'bayes-kfac[plot]'``.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from bayes_kfac.errors import ArgumentError, check_fraction
from bayes_kfac.metrics import TensorLike, expected_calibration_error, reliability_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): told apart with any common kind of colour vision.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
# Opaque tints of the first colour: no grid line shines through, and the legend shows the very colours of the plot.
_TOTAL = "#D3E5F1"
_EPISTEMIC = "#8FC0DD"
_INK = "#333333"
_GRID = "#E6E6E6"

# Marks the diagonal of a reliability diagram, so that it is drawn once however many curves share the axes.
_DIAGONAL = "bayes_kfac.diagonal"


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
        level: Probability of both intervals, in ``[0, 1)``.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If shapes do not fit, or ``level`` is outside ``[0, 1)``.
    """
    check_fraction("level", level)
    inputs = _column("x", x)
    order = inputs.argsort(stable=True)
    lower, upper = prediction.interval(level)
    columns = {
        "prediction.mean": prediction.mean,
        "prediction.epistemic_variance": prediction.epistemic_variance,
        "lower end of prediction.interval": lower,
        "upper end of prediction.interval": upper,
    }
    mean, epistemic_variance, low, high = (_column(name, value, len(inputs))[order] for name, value in columns.items())
    inputs = inputs[order]
    epistemic = NormalDist().inv_cdf((1 + level) / 2) * np.sqrt(epistemic_variance)
    points = None
    if data is not None:
        data_x = _column("data[0]", data[0])
        points = data_x, _column("data[1]", data[1], len(data_x))

    ax = _prepare(ax, figsize=(6.4, 4.0))
    percent = f"{100 * level:.4g} %"
    ax.fill_between(inputs, low, high, color=_TOTAL, linewidth=0, label=f"total, {percent}")
    ax.fill_between(
        inputs, mean - epistemic, mean + epistemic, color=_EPISTEMIC, linewidth=0, label=f"epistemic, {percent}"
    )
    ax.plot(inputs, mean, color=_PALETTE[0], linewidth=1.8, label="mean")
    if points is not None:
        ax.scatter(*points, s=18, color=_INK, edgecolors="white", linewidths=0.6, zorder=3, label="data")
    _label(ax, "x", "y")
    ax.margins(x=0)
    _legend(ax)
    return ax


def plot_reliability(
    probs: TensorLike, labels: TensorLike, *, num_bins: int = 15, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Plot a reliability diagram: accuracy against confidence in bins of equal width.

    Points below the diagonal are overconfident. The area of the halo around a point is proportional to the number of
    examples in its bin, and the legend shows the expected calibration error (ECE). Call it again with the same axes to
    compare models.

    Source: Guo et al. (2017), On calibration of modern neural networks.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.
        num_bins: Number of bins.
        label: Name of the curve in the legend.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If ``probs`` are no probabilities, ``labels`` are no indices of their classes, or ``num_bins`` is
            no positive integer.
    """
    curve = reliability_curve(probs, labels, num_bins)
    error = f"ECE {expected_calibration_error(probs, labels, num_bins).item():.3f}"
    confidence, accuracy, count = (field.detach().cpu().numpy() for field in curve)

    ax = _prepare(ax, figsize=(4.6, 4.6))
    if not any(line.get_gid() == _DIAGONAL for line in ax.lines):
        ax.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (4, 3)), gid=_DIAGONAL, label="calibrated")
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        # The cycle belongs to these axes alone and gives each further curve its own colour.
        ax.set_prop_cycle(color=_PALETTE)
    (line,) = ax.plot(
        confidence, accuracy, linewidth=1.4, marker="o", markersize=3, label=f"{label}, {error}" if label else error
    )
    # A bin of few examples keeps the small marker of its line; a halo at the edge of the plot must not be cut in half.
    area = 900 * count / count.sum()
    ax.scatter(confidence, accuracy, s=area, color=line.get_color(), alpha=0.3, linewidths=0, zorder=2, clip_on=False)
    _label(ax, "confidence", "accuracy")
    _legend(ax)
    return ax


def _prepare(ax: Axes | None, *, figsize: tuple[float, float]) -> Axes:
    """Return the axes, or those of a new figure, with a light grid and without a box.

    Args:
        ax: Axes to draw on, or None.
        figsize: Width and height of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                "Plots need Matplotlib, which is not installed: pip install 'bayes-kfac[plot]'"
            ) from error
        _, ax = plt.subplots(figsize=figsize, layout="constrained")
    ax.set_axisbelow(True)
    ax.grid(visible=True, color=_GRID, linewidth=0.8)
    ax.tick_params(length=0, colors=_INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#BBBBBB")
    return ax


def _label(ax: Axes, x: str, y: str) -> None:
    """Name the axes, unless the caller already did."""
    if not ax.get_xlabel():
        ax.set_xlabel(x)
    if not ax.get_ylabel():
        ax.set_ylabel(y)


def _legend(ax: Axes) -> None:
    """Put a quiet legend where it covers least."""
    # Said explicitly, "best" does not warn when many points make it slow.
    ax.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", labelcolor=_INK, fontsize="small")


def _column(name: str, value: TensorLike, length: int | None = None) -> np.ndarray:
    """Return ``[n]`` or ``[n, 1]`` as a flat float64 array.

    Args:
        name: The argument's name, for the message.
        value: Numbers on any device.
        length: The ``n`` to insist on, if any.

    Returns:
        The array, ``[n]``.

    Raises:
        ArgumentError: If the shape is another one.
    """
    array = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype=np.float64)
    if array.shape not in {(array.size,), (array.size, 1)} or length not in {None, array.size}:
        n = "n" if length is None else length
        raise ArgumentError(f"{name} has shape {array.shape}. Allowed: [{n}] or [{n}, 1].")
    return array.ravel()
