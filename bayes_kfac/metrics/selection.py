"""Selective prediction: how good the answers are that remain when the least confident ones are withheld.

Examples are kept by descending confidence. Where confidences tie, results are the expectation over all orders of the
tied examples, so that neither the order of the data nor luck matters.

Source: El-Yaniv and Wiener (2010), On the foundations of noise-free selective classification; Geifman and El-Yaniv
(2017), Selective classification for deep neural networks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kfac.errors import ArgumentError, check_positive
from bayes_kfac.metrics.checks import TensorLike, classification, count_of_share, same_shape, vector


class RiskCoverageCurve(NamedTuple):
    """Risk at each number of answers kept, from the most confident one alone to all.

    Attributes:
        coverage: Share of the examples that is kept, ``[n]``: ``1/n, 2/n, ..., 1``.
        risk: Mean loss over them, ``[n]``.
        threshold: The least confidence among them, ``[n]``: keep what has at least this much.
    """

    coverage: Tensor
    risk: Tensor
    threshold: Tensor


def risk_coverage_curve(loss: TensorLike, confidence: TensorLike) -> RiskCoverageCurve:
    """Mean loss of the most confident examples, for every number of them.

    Args:
        loss: What each answer costs, ``[n]``: ``probs.argmax(-1) != labels``, or a squared error.
        confidence: Any score that is larger where the answer is trusted more, ``[n]``: the largest probability, or
            minus an entropy or a variance. Only its order matters.

    Returns:
        The curve.

    Raises:
        ArgumentError: If shapes differ or are not ``[n]``, or an argument is empty or holds NaN.
    """
    loss, confidence = vector(loss=loss, confidence=confidence)
    loss, confidence = same_shape(loss=loss, confidence=confidence)
    threshold, order = confidence.sort(descending=True)
    _, group, size = torch.unique_consecutive(threshold, return_inverse=True, return_counts=True)
    # In a random order of tied examples, each place has their mean loss in expectation.
    tied_mean = loss.new_zeros(len(size)).index_add(0, group, loss[order]) / size
    kept = torch.arange(1, len(loss) + 1, dtype=loss.dtype, device=loss.device)
    return RiskCoverageCurve(kept / len(loss), tied_mean[group].cumsum(0) / kept, threshold)


def area_under_risk_coverage(loss: TensorLike, confidence: TensorLike) -> Tensor:
    """Area under the risk-coverage curve (AURC), in the unit of the loss; smaller is better.

    The mean of :func:`risk_coverage_curve` over all coverages ``1/n, ..., 1``. It is small if answers are good, and if
    confidence knows which are: a random order has the mean loss as its expectation.

    Source: Geifman, Uziel and El-Yaniv (2019), Bias-reduced uncertainty estimation for deep neural classifiers.

    Args:
        loss: What each answer costs, ``[n]``.
        confidence: A score that is larger where the answer is trusted more, ``[n]``.

    Returns:
        The area.

    Raises:
        ArgumentError: If shapes differ or are not ``[n]``, or an argument is empty or holds NaN.
    """
    return risk_coverage_curve(loss, confidence).risk.mean()


def selective_accuracy(
    probs: TensorLike, labels: TensorLike, coverage: float, confidence: TensorLike | None = None
) -> Tensor:
    """Accuracy on the share of the examples about which the prediction is most confident.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.
        coverage: The share that is kept, in ``(0, 1]``, rounded up to a whole number of examples.
        confidence: A score that is larger where the answer is trusted more, ``[n]``; by default the probability of the
            predicted class.

    Returns:
        The fraction, in ``[0, 1]``.

    Raises:
        ArgumentError: If ``probs`` are no probabilities, ``labels`` are no indices of their classes, ``confidence``
            has another shape or holds NaN, or ``coverage`` is outside ``(0, 1]``.
    """
    probs, labels = classification(probs, labels)
    if check_positive("coverage", coverage) > 1:
        raise ArgumentError(f"coverage={coverage!r} is out of range. Allowed: 0 < coverage <= 1.")
    wrong = (probs.argmax(-1) != labels).to(probs.dtype)
    curve = risk_coverage_curve(wrong, probs.amax(-1) if confidence is None else confidence)
    return 1 - curve.risk[count_of_share(coverage, len(labels)) - 1]
