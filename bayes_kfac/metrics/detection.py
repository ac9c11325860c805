"""Detection by a score: of inputs that are out of distribution by their uncertainty, or of mistakes.

Every function takes the scores of the examples to be detected, the positives, ``[n]``, and those of the others, the
negatives, ``[m]``; a higher score should mean positive. Tied scores are one threshold, wherever they stand. In papers
on out-of-distribution detection positives are more often the examples *in* distribution: their scores are then the
confidence, minus the uncertainty. The AUROC is the same both ways, the other two are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kfac.errors import ArgumentError, check_positive
from bayes_kfac.metrics.checks import TensorLike, count_of_share, vector


def auroc(positive: TensorLike, negative: TensorLike) -> Tensor:
    """Area under the receiver operating characteristic: how often a positive scores higher than a negative.

    ``P(positive > negative) + P(positive = negative) / 2`` over all pairs, by sorting. 1/2 is chance, 1 is perfect.

    Source: Hanley and McNeil (1982), The meaning and use of the area under a ROC curve.

    Args:
        positive: Scores of the examples to be detected, ``[n]``.
        negative: Scores of the others, ``[m]``.

    Returns:
        The area, in ``[0, 1]``.

    Raises:
        ArgumentError: If a shape is not one-dimensional, or an argument is empty or holds NaN.
    """
    positive, negative = vector(positive=positive, negative=negative)
    ordered = negative.sort().values
    below, up_to = (torch.searchsorted(ordered, positive, side=side) for side in ("left", "right"))
    return (below + up_to).sum().to(positive.dtype) / (2 * len(positive) * len(negative))


def average_precision(positive: TensorLike, negative: TensorLike) -> Tensor:
    """Area under the precision-recall curve (AUPR), by steps: the mean precision over the positives.

    ``Σ_k (R_k - R_{k-1}) P_k`` over the distinct scores as thresholds. Chance is the share of positives. Nothing is
    interpolated between the thresholds, which would be too optimistic.

    Source: Davis and Goadrich (2006), The relationship between precision-recall and ROC curves.

    Args:
        positive: Scores of the examples to be detected, ``[n]``.
        negative: Scores of the others, ``[m]``.

    Returns:
        The area, in ``(0, 1]``.

    Raises:
        ArgumentError: If a shape is not one-dimensional, or an argument is empty or holds NaN.
    """
    positive, negative = vector(positive=positive, negative=negative)
    # With the score of a positive as the threshold; each one stands for a step of the recall of 1/n.
    detected, alarms = _at_least(positive, positive), _at_least(negative, positive)
    return (detected.to(positive.dtype) / (detected + alarms)).mean()


def false_positive_rate(positive: TensorLike, negative: TensorLike, true_positive_rate: float = 0.95) -> Tensor:
    """Share of negatives that are taken for positives when a given share of the positives is detected (FPR@95).

    The smallest one among the thresholds that detect at least this share; smaller is better.

    Source: Liang, Li and Srikant (2018), Enhancing the reliability of out-of-distribution image detection; their
    positives are the examples in distribution.

    Args:
        positive: Scores of the examples to be detected, ``[n]``.
        negative: Scores of the others, ``[m]``.
        true_positive_rate: The share of positives to detect, in ``(0, 1]``.

    Returns:
        The share, in ``[0, 1]``.

    Raises:
        ArgumentError: If a shape is not one-dimensional, an argument is empty or holds NaN, or ``true_positive_rate``
            is outside ``(0, 1]``.
    """
    positive, negative = vector(positive=positive, negative=negative)
    if check_positive("true_positive_rate", true_positive_rate) > 1:
        raise ArgumentError(f"true_positive_rate={true_positive_rate!r} is out of range. Allowed: 0 < rate <= 1.")
    needed = count_of_share(true_positive_rate, len(positive))
    threshold = positive.sort(descending=True).values[needed - 1]
    return (negative >= threshold).to(negative.dtype).mean()


def _at_least(scores: Tensor, thresholds: Tensor) -> Tensor:
    """How many scores reach each threshold, int64."""
    return len(scores) - torch.searchsorted(scores.sort().values, thresholds)
