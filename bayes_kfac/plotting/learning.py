"""Pictures of learning: curves over the number of labels, over epochs, and what an acquisition wants next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bayes_kfac.errors import ArgumentError
from bayes_kfac.metrics import TensorLike
from bayes_kfac.plotting.style import INK, LIGHT, PALETTE, as_array, column, label_axes, legend, next_style, prepare

if TYPE_CHECKING:
    from matplotlib.axes import Axes


#: A legend beside the data and not over them.
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "borderpad": 0}


class Epoch(Protocol):
    """What :func:`plot_elbo` needs to know of an epoch; :class:`bayes_kfac.training.FitState` has it."""

    @property
    def epoch(self) -> int:
        """Epochs done."""

    @property
    def kl(self) -> float:
        """The divergence of the posterior from the prior, in nats."""

    @property
    def elbo(self) -> float:
        """The evidence lower bound, in nats."""


def plot_learning_curve(x: TensorLike, values: TensorLike, *, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Plot a figure of merit over the number of labels, its mean over seeds with a band of one standard error.

    The standard error is ``s / √seeds`` with the sample standard deviation ``s``; it says how well the mean is known,
    not how much the seeds differ. Call it again with the same axes to compare methods.

    Args:
        x: Numbers of labels, or anything else that learning goes along with, ``[t]``, ascending.
        values: The figure, ``[seeds, t]``, or ``[t]`` for one seed, which has no band.
        label: Name of the curve in the legend.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If shapes do not fit, ``x`` does not ascend, or a value is NaN.
    """
    along = column("x", x)
    given = as_array("values", values)
    seeds = given[None] if given.ndim == 1 else given
    if seeds.ndim != 2 or seeds.shape[1] != len(along) or not len(seeds):
        raise ArgumentError(
            f"values has shape {given.shape}. Allowed: [seeds, {len(along)}] or [{len(along)}], for x of "
            f"{len(along)} numbers."
        )
    if np.isnan(seeds).any():
        raise ArgumentError("values holds NaN. Allowed: numbers; end x and values where the shortest run ends.")
    if (np.diff(along) <= 0).any():
        raise ArgumentError("x does not ascend. Allowed: ascending numbers; sort x and the columns of values.")
    mean = seeds.mean(0)

    ax = prepare(ax, figsize=(6.4, 4.0))
    style = next_style(ax)
    if len(seeds) > 1:
        error = seeds.std(0, ddof=1) / np.sqrt(len(seeds))
        ax.fill_between(along, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
    ax.plot(along, mean, linewidth=1.8, label=label, **style)
    ax.margins(x=0.01)
    label_axes(ax, "labelled examples", "test score (mean ± standard error)" if len(seeds) > 1 else "test score")
    legend(ax)
    return ax


def plot_acquisition(
    x: TensorLike,
    scores: TensorLike,
    *,
    pool: TensorLike | None = None,
    picked: TensorLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the scores of an acquisition over one or two inputs, with the candidates and those that were picked.

    Over one input it is a curve, made to stand below :func:`plot_predictive_band` on a shared axis. Over two it is a
    map of filled contours, of a grid or of any scattered points that do not lie on one line.

    Args:
        x: Where the scores were computed, ``[n]``, ``[n, 1]`` or ``[n, 2]``, in any order.
        scores: The scores, ``[n]``; higher is better.
        pool: The candidates, ``[m]``, ``[m, 1]`` or ``[m, 2]``.
        picked: Those that were picked, shaped likewise.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes; a map has a colour bar beside them.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If shapes do not fit, a number is not finite, or the points of a map lie on one line.
    """
    inputs = _points("x", x)
    height = column("scores", scores, len(inputs))
    if not (np.isfinite(inputs).all() and np.isfinite(height).all()):
        raise ArgumentError("x or scores hold NaN or infinity. Allowed: finite numbers; leave picked candidates out.")
    others = {
        name: _points(name, value, inputs.shape[1])
        for name, value in {"pool": pool, "picked": picked}.items()
        if value is not None
    }
    draw = _acquisition_curve if inputs.shape[1] == 1 else _acquisition_map
    return draw(inputs, height, others.get("pool"), others.get("picked"), ax)


def plot_elbo(epochs: Iterable[Epoch], *, ax: Axes | None = None) -> Axes:
    """Plot minus the evidence lower bound over epochs, and the two parts that it is the sum of.

    ``-ELBO = num_data · nll + KL``, in nats: what the data cost under the posterior, and what it cost to move away from
    the prior. A total that still falls wants more epochs. Collect the epochs of a training by
    ``bk.fit(..., callbacks=[epochs.append])``.

    Args:
        epochs: What a callback of :func:`bayes_kfac.fit` is given after each epoch.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If there is no epoch.
    """
    epochs = list(epochs)
    if not epochs:
        raise ArgumentError("epochs is empty. Allowed: the states that a callback of fit was given.")
    along = np.array([state.epoch for state in epochs])
    kl = np.array([state.kl for state in epochs])
    parts = {
        "−ELBO": np.array([-state.elbo for state in epochs]),
        "KL from the prior": kl,
        "negative log-likelihood of the data": np.array([-state.elbo for state in epochs]) - kl,
    }

    ax = prepare(ax, figsize=(6.4, 4.0))
    # Lines and no stacked areas: with continuous targets the log-likelihood may have either sign.
    for name, values in parts.items():
        ax.plot(along, values, linewidth=1.8, label=name, **next_style(ax))
    ax.margins(x=0)
    label_axes(ax, "epoch", "nats")
    legend(ax)
    return ax


def _acquisition_curve(
    inputs: np.ndarray, scores: np.ndarray, pool: np.ndarray | None, picked: np.ndarray | None, ax: Axes | None
) -> Axes:
    order = inputs[:, 0].argsort(kind="stable")
    along, height = inputs[order, 0], scores[order]
    floor = min(0.0, height.min())
    ax = prepare(ax, figsize=(6.4, 2.4))
    ax.fill_between(along, floor, height, color=LIGHT, linewidth=0)
    ax.plot(along, height, linewidth=1.8, **next_style(ax))
    ax.margins(x=0)
    ax.set_ylim(bottom=floor)
    if pool is not None:
        # A rug on the axis, in the height of the axes and not of the data.
        ax.plot(
            pool[:, 0],
            np.full(len(pool), 0.02),
            transform=ax.get_xaxis_transform(),
            color=INK,
            linestyle="none",
            marker="|",
            markersize=7,
            label="pool",
        )
    if picked is not None:
        at = np.interp(picked[:, 0], along, height)
        ax.vlines(picked[:, 0], floor, at, color=PALETTE[1], linewidth=1, linestyle=(0, (2, 2)))
        ax.scatter(picked[:, 0], at, s=70, marker="*", color=PALETTE[1], zorder=3, clip_on=False, label="picked")
    label_axes(ax, "x", "score")
    legend(ax, **_ABOVE)
    return ax


def _acquisition_map(
    inputs: np.ndarray, scores: np.ndarray, pool: np.ndarray | None, picked: np.ndarray | None, ax: Axes | None
) -> Axes:
    if np.linalg.matrix_rank(inputs - inputs.mean(0)) < 2:
        raise ArgumentError("The points of x lie on one line. Allowed for a map: points all over an area, or x [n, 1].")
    ax = prepare(ax, figsize=(5.6, 4.4))
    filled = ax.tricontourf(inputs[:, 0], inputs[:, 1], scores, levels=12, cmap="Blues")
    bar = ax.figure.colorbar(filled, ax=ax, label="score")
    bar.outline.set_visible(False)
    if pool is not None:
        ax.scatter(pool[:, 0], pool[:, 1], s=12, color=INK, edgecolors="white", linewidths=0.5, zorder=3, label="pool")
    if picked is not None:
        star: dict[str, Any] = {"marker": "*", "color": PALETTE[1], "edgecolors": "white", "linewidths": 0.8}
        ax.scatter(picked[:, 0], picked[:, 1], s=150, zorder=4, label="picked", **star)
    ax.grid(visible=False)
    ax.set(xlim=(inputs[:, 0].min(), inputs[:, 0].max()), ylim=(inputs[:, 1].min(), inputs[:, 1].max()))
    label_axes(ax, "x₁", "x₂")
    legend(ax, **_ABOVE)
    return ax


def _points(name: str, value: TensorLike, dimensions: int | None = None) -> np.ndarray:
    """Return ``[n]`` as ``[n, 1]``, and ``[n, 1]`` or ``[n, 2]`` as they are.

    Args:
        name: The argument's name, for the message.
        value: Numbers on any device.
        dimensions: The number of inputs to insist on, if any.

    Returns:
        The array, float64.

    Raises:
        ArgumentError: If the shape is another one, or empty.
    """
    array = as_array(name, value)
    points = array[:, None] if array.ndim == 1 else array
    allowed = (1, 2) if dimensions is None else (dimensions,)
    if points.ndim != 2 or points.shape[1] not in allowed or not points.size:
        shapes = ["[n]"] * (1 in allowed) + [f"[n, {size}]" for size in allowed]
        raise ArgumentError(f"{name} has shape {array.shape}. Allowed: {' or '.join(shapes)}.")
    return points
