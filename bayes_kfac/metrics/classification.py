"""Scores of class probabilities, ``[n, C]``, with labels, ``[n]``: hits, densities and distances."""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kfac.metrics.checks import TensorLike, classification


def accuracy(probs: TensorLike, labels: TensorLike) -> Tensor:
    """Fraction of examples whose most probable class is the label; the first class wins a tie.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.

    Returns:
        The fraction, in ``[0, 1]``.

    Raises:
        ArgumentError: If ``probs`` are no probabilities, or ``labels`` are no indices of their classes.
    """
    probs, labels = classification(probs, labels)
    return (probs.argmax(-1) == labels).to(probs.dtype).mean()


def categorical_nll(probs: TensorLike, labels: TensorLike) -> Tensor:
    """Mean negative log-probability of the labels, in nats.

    Probabilities are clamped from below at the smallest normal number of the dtype. A label of probability zero
    therefore costs a large but finite amount (about 87 nats in float32 and 708 in float64), so that one certain
    mistake does not hide all other examples behind an infinity.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.

    Returns:
        ``mean(-log p[label])``.

    Raises:
        ArgumentError: If ``probs`` are no probabilities, or ``labels`` are no indices of their classes.
    """
    probs, labels = classification(probs, labels)
    chosen = probs.gather(-1, labels.unsqueeze(-1))
    return -chosen.clamp(min=torch.finfo(probs.dtype).tiny).log().mean()


def brier_score(probs: TensorLike, labels: TensorLike) -> Tensor:
    """Brier score: squared distance between probabilities and one-hot labels, in ``[0, 2]``.

    This is the original definition, which sums over all classes. For two classes it is twice the value that looks at
    the positive class only.

    Source: Brier (1950), Verification of forecasts expressed in terms of probability.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.

    Returns:
        The sum over classes, averaged over examples.

    Raises:
        ArgumentError: If ``probs`` are no probabilities, or ``labels`` are no indices of their classes.
    """
    probs, labels = classification(probs, labels)
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return (probs - one_hot).square().sum(-1).mean()
