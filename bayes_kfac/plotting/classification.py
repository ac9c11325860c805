"""Pictures of predictions of classes: whether confidence is right, and what it is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bayes_kfac.metrics import (
    TensorLike,
    area_under_risk_coverage,
    expected_calibration_error,
    reliability_curve,
    risk_coverage_curve,
)
from bayes_kfac.plotting.style import diagonal, label_axes, legend, marker_of, next_style, prepare

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_reliability(
    probs: TensorLike,
    labels: TensorLike,
    *,
    num_bins: int = 15,
    scheme: str = "width",
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot a reliability diagram: accuracy against confidence in bins of confidence.

    Points below the diagonal are overconfident. The area of the halo around a point is proportional to the number of
    examples in its bin, and the legend shows the expected calibration error (ECE). Call it again with the same axes to
    compare models.

    Source: Guo et al. (2017), On calibration of modern neural networks.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.
        num_bins: Number of bins.
        scheme: ``"width"`` for bins of equal width, ``"mass"`` for bins of equal numbers of examples; see
            :func:`bayes_kfac.metrics.reliability_curve`.
        label: Name of the curve in the legend.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If ``probs`` are no probabilities, ``labels`` are no indices of their classes, or an option is
            not allowed.
    """
    curve = reliability_curve(probs, labels, num_bins, scheme)
    error = f"ECE {expected_calibration_error(probs, labels, num_bins, scheme).item():.3f}"
    confidence, accuracy, count = (field.detach().cpu().numpy() for field in curve)

    ax = prepare(ax, figsize=(4.6, 4.6))
    diagonal(ax, "calibrated")
    style = next_style(ax)
    ax.plot(
        confidence,
        accuracy,
        linewidth=1.4,
        marker=marker_of(style),
        markersize=3.5,
        label=f"{label}, {error}" if label else error,
        **style,
    )
    # A bin of few examples keeps the small marker of its line; a halo at the edge of the plot must not be cut in half.
    area = 900 * count / count.sum()
    ax.scatter(confidence, accuracy, s=area, color=style["color"], alpha=0.3, linewidths=0, zorder=2, clip_on=False)
    label_axes(ax, "confidence", "accuracy")
    legend(ax)
    return ax


def plot_risk_coverage(
    loss: TensorLike, confidence: TensorLike, *, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Plot the mean loss of the answers that are kept, against the share of them, by descending confidence.

    A curve that falls steeply to the left has a confidence that knows where the mistakes are. The legend shows the area
    under it (AURC). Call it again with the same axes to compare models, or scores of confidence.

    Source: Geifman and El-Yaniv (2017), Selective classification for deep neural networks.

    Args:
        loss: What each answer costs, ``[n]``: ``probs.argmax(-1) != labels``, or a squared error.
        confidence: A score that is larger where the answer is trusted more, ``[n]``.
        label: Name of the curve in the legend.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ArgumentError: If shapes differ or are not ``[n]``, or an argument is empty or holds NaN.
    """
    curve = risk_coverage_curve(loss, confidence)
    coverage, risk = curve.coverage.detach().cpu().numpy(), curve.risk.detach().cpu().numpy()
    area = f"AURC {area_under_risk_coverage(loss, confidence).item():.3g}"

    ax = prepare(ax, figsize=(5.6, 3.6))
    ax.plot(coverage, risk, linewidth=1.8, label=f"{label}, {area}" if label else area, **next_style(ax))
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0)
    label_axes(ax, "coverage: share of the examples answered", "risk: mean loss of the answers")
    legend(ax)
    return ax
