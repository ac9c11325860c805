"""Scores of predictions: point error, intervals, class probabilities, calibration and the CRPS.

Pure functions of tensors, or of anything :func:`torch.as_tensor` takes. They average over all examples and return a
0-dimensional tensor on the device of the first argument, computed in the widest precision among the arguments and at
least in float32; plain Python numbers count as PyTorch's default dtype. Shapes have to agree exactly, because ``[n]``
against ``[n, 1]`` would broadcast to a plausible but wrong number. NaN is refused rather than counted, since
comparisons would silently turn it into a miss.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bayes_kfac.errors import ArgumentError, check_choice, check_count, check_fraction

TensorLike: TypeAlias = Tensor | ArrayLike


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


def root_mean_squared_error(mean: TensorLike, target: TensorLike) -> Tensor:
    """Root mean squared error of a point prediction, in the unit of the target.

    Args:
        mean: Predicted means, any shape.
        target: Observed values, the shape of ``mean``.

    Returns:
        ``sqrt(mean((mean - target)²))`` over all entries.

    Raises:
        ArgumentError: If shapes differ, or an argument is empty or holds NaN.
    """
    mean, target = _same_shape(mean=mean, target=target)
    return (mean - target).square().mean().sqrt()


def coverage(lower: TensorLike, upper: TensorLike, target: TensorLike) -> Tensor:
    """Fraction of targets inside their interval, boundaries included.

    A calibrated interval of level 0.9 has a coverage of about 0.9; see :func:`sharpness` for the other half.

    Args:
        lower: Lower ends, any shape.
        upper: Upper ends, the shape of ``lower``.
        target: Observed values, the shape of ``lower``.

    Returns:
        The fraction, in ``[0, 1]``.

    Raises:
        ArgumentError: If shapes differ, an argument is empty or holds NaN, or ``lower > upper`` anywhere.
    """
    lower, upper, target = _same_shape(lower=lower, upper=upper, target=target)
    _check_ordered(lower, upper)
    return ((lower <= target) & (target <= upper)).to(target.dtype).mean()


def sharpness(lower: TensorLike, upper: TensorLike) -> Tensor:
    """Mean width of intervals, in the unit of the target; smaller is better at equal :func:`coverage`.

    Args:
        lower: Lower ends, any shape.
        upper: Upper ends, the shape of ``lower``.

    Returns:
        ``mean(upper - lower)`` over all entries.

    Raises:
        ArgumentError: If shapes differ, an argument is empty or holds NaN, or ``lower > upper`` anywhere.
    """
    lower, upper = _same_shape(lower=lower, upper=upper)
    _check_ordered(lower, upper)
    return (upper - lower).mean()


def interval_score(lower: TensorLike, upper: TensorLike, target: TensorLike, level: float) -> Tensor:
    """Interval score of central intervals, in the unit of the target; smaller is better.

    The width, plus ``2 / (1 - level)`` times the distance by which the target was missed. It is a proper score: among
    all intervals, the true central quantiles minimise its expectation.

    Source: Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation, Section 6.2.

    Args:
        lower: Lower ends, any shape.
        upper: Upper ends, the shape of ``lower``.
        target: Observed values, the shape of ``lower``.
        level: Nominal probability of the intervals, in ``[0, 1)``.

    Returns:
        The mean score over all entries.

    Raises:
        ArgumentError: If shapes differ, an argument is empty or holds NaN, ``lower > upper`` anywhere, or ``level`` is
            outside ``[0, 1)``.
    """
    lower, upper, target = _same_shape(lower=lower, upper=upper, target=target)
    _check_ordered(lower, upper)
    # At most one of the two is positive; both are zero inside the interval.
    missed = (lower - target).clamp(min=0) + (target - upper).clamp(min=0)
    return ((upper - lower) + 2 / (1 - check_fraction("level", level)) * missed).mean()


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
    probs, labels = _classification(probs, labels)
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
    probs, labels = _classification(probs, labels)
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
    probs, labels = _classification(probs, labels)
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return (probs - one_hot).square().sum(-1).mean()


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
    curve = reliability_curve(probs, labels, num_bins, scheme)
    gap = (curve.accuracy - curve.confidence).abs()
    return (curve.count * gap).sum() / curve.count.sum()


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
    probs, labels = _classification(probs, labels)
    check_count("num_bins", num_bins)
    check_choice("scheme", scheme, ("width", "mass"))

    # In sorted order every bin is a contiguous run. Bins are closed on the right, (edge, next edge].
    confidence, order = probs.amax(-1).sort()
    correct = (probs.argmax(-1) == labels).to(probs.dtype)[order]
    inner = torch.arange(1, num_bins, device=probs.device)
    if scheme == "width":
        edges = inner.to(probs.dtype) / num_bins
    else:
        # Each edge is the last confidence of its share of the examples, ⌈i n / num_bins⌉ of them up to bin i.
        edges = confidence[(inner * len(confidence) + num_bins - 1) // num_bins - 1]
    _, count = torch.unique_consecutive(torch.bucketize(confidence, edges), return_counts=True)

    # One mean for each run sums pairwise; a scatter would add one by one and lose digits in float32.
    runs = count.tolist()
    return ReliabilityCurve(
        confidence=torch.stack([run.mean() for run in torch.split(confidence, runs)]),
        accuracy=torch.stack([run.mean() for run in torch.split(correct, runs)]),
        count=count,
    )


def crps_gaussian(mean: TensorLike, stddev: TensorLike, target: TensorLike) -> Tensor:
    """Continuous ranked probability score of Gaussian predictions, in the unit of the target; smaller is better.

    ``σ (z (2Φ(z) - 1) + 2φ(z) - 1/√π)`` with ``z = (target - mean) / σ``. A standard deviation of zero is a point
    prediction, whose score is the absolute error.

    Source: Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation, Section 4.2.

    Args:
        mean: Predicted means, any shape.
        stddev: Predicted standard deviations, not negative, the shape of ``mean``.
        target: Observed values, the shape of ``mean``.

    Returns:
        The mean score over all entries.

    Raises:
        ArgumentError: If shapes differ, an argument is empty or holds NaN, or a standard deviation is negative.
    """
    mean, stddev, target = _same_shape(mean=mean, stddev=stddev, target=target)
    if bool((stddev < 0).any()):
        raise ArgumentError(f"stddev has a negative entry, {stddev.min().item():g}. Allowed: numbers >= 0.")
    error = target - mean
    # The clamp is for σ = 0 only: z is then 0 for a hit and huge for a miss, and both give the limit |error|.
    z = error / stddev.clamp(min=torch.finfo(stddev.dtype).tiny)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return (error * torch.erf(z / math.sqrt(2)) + stddev * (2 * density - 1 / math.sqrt(math.pi))).mean()


def crps_samples(samples: TensorLike, target: TensorLike) -> Tensor:
    """Continuous ranked probability score of predictive samples, in the unit of the target; smaller is better.

    The score of the empirical distribution in its energy form, ``E|X - y| - E|X - X'| / 2`` with ``X`` and ``X'``
    drawn with replacement from the samples. The second term comes from one sort, in O(S log S) instead of O(S²).

    Source: Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation, Section 4.2.

    Args:
        samples: Samples of the prediction, ``[S, ...]``.
        target: Observed values, ``[...]``.

    Returns:
        The mean score over all entries of ``target``.

    Raises:
        ArgumentError: If the shapes do not fit, or an argument is empty or holds NaN.
    """
    samples, target = _real(samples=samples, target=target)
    if samples.shape[1:] != target.shape or samples.ndim == 0:
        raise ArgumentError(
            f"samples has shape {tuple(samples.shape)} and target {tuple(target.shape)}. "
            "Allowed: samples [S, ...] for a target [...]."
        )
    # Both terms ignore a shift; relative to the target, a large common offset costs no digits.
    error = (samples - target).sort(0).values
    num_samples = len(error)
    # Σᵢⱼ |xᵢ - xⱼ| / 2 = Σᵢ (2i - S - 1) x₍ᵢ₎ for ascending x₍₁₎ ... x₍ₛ₎.
    weight = torch.arange(1 - num_samples, num_samples, 2, dtype=error.dtype, device=error.device) / num_samples
    spread: Tensor = torch.tensordot(weight, error, dims=1) / num_samples
    return (error.abs().mean(0) - spread).mean()


def _real(**arguments: TensorLike) -> list[Tensor]:
    """Return real, non-empty tensors without NaN, of one floating dtype and on the first one's device.

    Args:
        **arguments: Values by the names to use in messages.

    Returns:
        The tensors, in the order of the arguments.

    Raises:
        ArgumentError: If one is complex, empty or holds NaN.
    """
    tensors = {name: _as_tensor(name, value) for name, value in arguments.items()}
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()), torch.float32)
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise ArgumentError(f"{name} has dtype {tensor.dtype}. Allowed: real numbers.")
        if tensor.numel() == 0:
            raise ArgumentError(f"{name} is empty, of shape {tuple(tensor.shape)}. Allowed: at least one entry.")
        if bool(tensor.isnan().any()):
            raise ArgumentError(f"{name} holds NaN. Allowed: numbers; leave missing values out.")
    return [tensor.to(device, dtype) for tensor in tensors.values()]


def _same_shape(**arguments: TensorLike) -> list[Tensor]:
    """Return the tensors of :func:`_real` if all have one shape.

    Args:
        **arguments: Values by the names to use in messages.

    Returns:
        The tensors, in the order of the arguments.

    Raises:
        ArgumentError: If the shapes differ.
    """
    tensors = _real(**arguments)
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in zip(arguments, tensors, strict=True))
        raise ArgumentError(f"Shapes differ: {shapes}. Allowed: one shape for all; reshape or squeeze them first.")
    return tensors


def _classification(probs: TensorLike, labels: TensorLike) -> tuple[Tensor, Tensor]:
    """Return class probabilities and labels that fit each other.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.

    Returns:
        Probabilities, at least float32, and labels, int64, on one device.

    Raises:
        ArgumentError: If they are not what their names say.
    """
    given = _as_tensor("probs", probs)
    # Rounded probabilities of a coarse dtype such as bfloat16 do not add up to one more closely than this.
    tolerance = max(1e-4, 2 * torch.finfo(given.dtype).eps) if given.is_floating_point() else 1e-4
    (probs,) = _real(probs=given)
    indices = _as_tensor("labels", labels)

    if probs.ndim != 2 or indices.shape != probs.shape[:1]:
        raise ArgumentError(
            f"probs has shape {tuple(probs.shape)} and labels {tuple(indices.shape)}. "
            "Allowed: probs [n, C] and labels [n]."
        )
    # No entry can exceed one by more than the tolerance if none is negative and they add up to one.
    if bool((probs < 0).any()):
        raise ArgumentError(f"probs has an entry {probs.min().item():g}. Allowed: [0, 1]; apply a softmax to logits.")
    deviation = (probs.sum(-1) - 1).abs()
    if not bool((deviation <= tolerance).all()):
        total = probs[deviation.argmax()].sum().item()
        raise ArgumentError(f"probs has a row that sums to {total:g}. Allowed: 1 in each row; normalise over classes.")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ArgumentError(f"labels has dtype {indices.dtype}. Allowed: an integer dtype.")
    indices = indices.to(probs.device, torch.int64)
    if bool(((indices < 0) | (indices >= probs.shape[-1])).any()):
        found = f"{indices.min().item()} to {indices.max().item()}"
        raise ArgumentError(f"labels range from {found}. Allowed: 0 to {probs.shape[-1] - 1}, the classes of probs.")
    return probs, indices


def _check_ordered(lower: Tensor, upper: Tensor) -> None:
    """Refuse intervals whose ends are swapped.

    Args:
        lower: Lower ends, any shape.
        upper: Upper ends, the shape of ``lower``.

    Raises:
        ArgumentError: If ``lower > upper`` anywhere.
    """
    if bool((lower > upper).any()):
        raise ArgumentError("lower exceeds upper somewhere. Allowed: lower <= upper; are the two swapped?")


def _as_tensor(name: str, value: TensorLike) -> Tensor:
    """Return ``value`` as a tensor.

    Args:
        name: The argument's name, for the message.
        value: Anything that :func:`torch.as_tensor` takes.

    Returns:
        The tensor, which may share memory with a tensor but not with an array.

    Raises:
        ArgumentError: If it cannot be converted.
    """
    if isinstance(value, np.ndarray):
        # PyTorch warns of read-only arrays, such as columns of a pandas table, and rejects reversed ones.
        value = value.copy()
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} of type {type(value).__name__} is no tensor: {error}") from error
