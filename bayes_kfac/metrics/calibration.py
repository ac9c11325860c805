"""Calibration of class probabilities: how far confidence is from accuracy, bin by bin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kfac.errors import check_choice, check_count
from bayes_kfac.metrics.checks import TensorLike, classification


class ReliabilityCurve(NamedTuple):
    """Confidence against accuracy in each non-empty bin, by ascending confidence.

    Attributes:
        confidence: Mean probability of the predicted class in each bin, ``[b]``.
        accuracy: Fraction of correct predictions in each bin, ``[b]``.
        count: Number of examples in each bin, ``[b]``, int64.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


def reliability_curve(
    probs: TensorLike, labels: TensorLike, num_bins: int = 15, scheme: str = "width"
) -> ReliabilityCurve:
    """Confidence and accuracy of the predicted class, in bins of similar confidence.

    Sources: Guo et al. (2017), On calibration of modern neural networks, for ``"width"``; Nguyen and O'Connor (2015),
    Posterior calibration and exploratory analysis for natural language processing models, for ``"mass"``.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.
        num_bins: Number of bins, empty ones included.
        scheme: ``"width"`` for the bins ``((i - 1) / num_bins, i / num_bins]``, or ``"mass"`` for bins of equal
            numbers of examples. Equal confidences always share a bin, so the order of the examples never matters.

    Returns:
        The curve over the non-empty bins.

    Raises:
        ArgumentError: If ``probs`` are no probabilities, ``labels`` are no indices of their classes, or an option is
            not allowed.
    """
    probs, labels = classification(probs, labels)
    correct = probs.argmax(-1) == labels
    return _binned(probs.amax(-1), correct, num_bins, scheme)


def expected_calibration_error(
    probs: TensorLike, labels: TensorLike, num_bins: int = 15, scheme: str = "width"
) -> Tensor:
    """Expected calibration error of the predicted class.

    The gap between confidence and accuracy in each bin of :func:`reliability_curve`, averaged with the number of
    examples as weights. The value depends on the bins, so compare only values that share ``num_bins`` and ``scheme``.

    Source: Guo et al. (2017), On calibration of modern neural networks, Equation 3.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.
        num_bins: Number of bins, empty ones included.
        scheme: How to choose the bins; see :func:`reliability_curve`.

    Returns:
        The error, in ``[0, 1]``.

    Raises:
        ArgumentError: If ``probs`` are no probabilities, ``labels`` are no indices of their classes, or an option is
            not allowed.
    """
    return _expected_gap(reliability_curve(probs, labels, num_bins, scheme))


def maximum_calibration_error(
    probs: TensorLike, labels: TensorLike, num_bins: int = 15, scheme: str = "width"
) -> Tensor:
    """Largest gap between confidence and accuracy of the predicted class among the bins of :func:`reliability_curve`.

    A bin of few examples has a large gap by chance; ``scheme="mass"`` avoids such bins.

    Source: Guo et al. (2017), On calibration of modern neural networks, Equation 5.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.
        num_bins: Number of bins, empty ones included.
        scheme: How to choose the bins; see :func:`reliability_curve`.

    Returns:
        The error, in ``[0, 1]``.

    Raises:
        ArgumentError: If ``probs`` are no probabilities, ``labels`` are no indices of their classes, or an option is
            not allowed.
    """
    return _gap(reliability_curve(probs, labels, num_bins, scheme)).max()


def classwise_calibration_error(
    probs: TensorLike, labels: TensorLike, num_bins: int = 15, scheme: str = "width"
) -> Tensor:
    """Expected calibration error of each class's probability, averaged over classes.

    It looks at all probabilities, not at those of the predicted class alone: ``Σ_c Σ_b (n_bc / n) |accuracy_bc -
    confidence_bc| / C``, where the "accuracy" of a class is how often it is the label. With ``scheme="width"`` it is
    also called the static, with ``scheme="mass"`` the adaptive calibration error. With many classes most probabilities
    are near 0, and so is the value.

    Sources: Kull et al. (2019), Beyond temperature scaling; Nixon et al. (2019), Measuring calibration in deep
    learning.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.
        num_bins: Number of bins of each class, empty ones included.
        scheme: How to choose the bins; see :func:`reliability_curve`.

    Returns:
        The error, in ``[0, 1]``.

    Raises:
        ArgumentError: If ``probs`` are no probabilities, ``labels`` are no indices of their classes, or an option is
            not allowed.
    """
    probs, labels = classification(probs, labels)
    curves = (_binned(own, labels == index, num_bins, scheme) for index, own in enumerate(probs.unbind(-1)))
    return torch.stack([_expected_gap(curve) for curve in curves]).mean()


def _gap(curve: ReliabilityCurve) -> Tensor:
    return (curve.accuracy - curve.confidence).abs()


def _expected_gap(curve: ReliabilityCurve) -> Tensor:
    return (curve.count * _gap(curve)).sum() / curve.count.sum()


def _binned(confidence: Tensor, correct: Tensor, num_bins: int, scheme: str) -> ReliabilityCurve:
    """Mean confidence and mean correctness in each non-empty bin.

    Args:
        confidence: ``[n]``.
        correct: Whether it was right, ``[n]``, bool.
        num_bins: Number of bins, empty ones included.
        scheme: ``"width"`` or ``"mass"``.

    Returns:
        The curve.
    """
    num_bins = check_count("num_bins", num_bins)
    check_choice("scheme", scheme, ("width", "mass"))
    # In sorted order every bin is a contiguous run. Bins are closed on the right, (edge, next edge].
    confidence, order = confidence.sort()
    hits = correct.to(confidence.dtype)[order]
    inner = torch.arange(1, num_bins, device=confidence.device)
    if scheme == "width":
        edges = inner.to(confidence.dtype) / num_bins
    else:
        # Each edge is the last confidence of its share of the examples, ⌈i n / num_bins⌉ of them up to bin i.
        edges = confidence[(inner * len(confidence) + num_bins - 1) // num_bins - 1]
    _, count = torch.unique_consecutive(torch.bucketize(confidence.detach(), edges.detach()), return_counts=True)

    # One mean for each run sums pairwise; a scatter would add one by one and lose digits in float32.
    runs = count.tolist()
    return ReliabilityCurve(
        confidence=torch.stack([run.mean() for run in torch.split(confidence, runs)]),
        accuracy=torch.stack([run.mean() for run in torch.split(hits, runs)]),
        count=count,
    )
