"""What metrics take: real tensors of one shape, or class probabilities with their labels."""

from __future__ import annotations

import math
from functools import reduce
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bayes_kfac.errors import ArgumentError

TensorLike: TypeAlias = Tensor | ArrayLike


def real(**arguments: TensorLike) -> list[Tensor]:
    """Return real, non-empty tensors without NaN, of one floating dtype and on the first one's device.

    Args:
        **arguments: Values by the names to use in messages.

    Returns:
        The tensors, in the order of the arguments.

    Raises:
        ArgumentError: If one is complex, empty or holds NaN.
    """
    tensors = {name: as_tensor(name, value) for name, value in arguments.items()}
    dtype = reduce(torch.promote_types, map(_floating, tensors.values()), torch.float32)
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise ArgumentError(f"{name} has dtype {tensor.dtype}. Allowed: real numbers.")
        if tensor.numel() == 0:
            raise ArgumentError(f"{name} is empty, of shape {tuple(tensor.shape)}. Allowed: at least one entry.")
        if bool(tensor.isnan().any()):
            raise ArgumentError(f"{name} holds NaN. Allowed: numbers; leave missing values out.")
    return [tensor.to(device, dtype) for tensor in tensors.values()]


def _floating(tensor: Tensor) -> torch.dtype:
    """The dtype itself, or for integers that float32 cannot tell apart, float64."""
    dtype = tensor.dtype
    is_integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return torch.float64 if is_integer and torch.iinfo(dtype).bits > 24 else dtype


def same_shape(**arguments: TensorLike) -> list[Tensor]:
    """Return the tensors of :func:`real` if all have one shape.

    Args:
        **arguments: Values by the names to use in messages.

    Returns:
        The tensors, in the order of the arguments.

    Raises:
        ArgumentError: If the shapes differ.
    """
    tensors = real(**arguments)
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in zip(arguments, tensors, strict=True))
        raise ArgumentError(f"Shapes differ: {shapes}. Allowed: one shape for all; reshape or squeeze them first.")
    return tensors


def classification(probs: TensorLike, labels: TensorLike) -> tuple[Tensor, Tensor]:
    """Return class probabilities and labels that fit each other.

    Args:
        probs: Class probabilities, ``[n, C]``.
        labels: Class indices, ``[n]``, an integer dtype.

    Returns:
        Probabilities, at least float32, and labels, int64, on one device.

    Raises:
        ArgumentError: If they are not what their names say.
    """
    given = as_tensor("probs", probs)
    # Rounded probabilities of a coarse dtype such as bfloat16 do not add up to one more closely than this.
    tolerance = max(1e-4, 2 * torch.finfo(given.dtype).eps) if given.is_floating_point() else 1e-4
    (probs,) = real(probs=given)
    indices = as_tensor("labels", labels)

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


def check_ordered(lower: Tensor, upper: Tensor) -> None:
    """Refuse intervals whose ends are swapped.

    Args:
        lower: Lower ends, any shape.
        upper: Upper ends, the shape of ``lower``.

    Raises:
        ArgumentError: If ``lower > upper`` anywhere.
    """
    if bool((lower > upper).any()):
        raise ArgumentError("lower exceeds upper somewhere. Allowed: lower <= upper; are the two swapped?")


def check_stddev(stddev: Tensor, *, allow_zero: bool) -> None:
    """Refuse standard deviations that are none.

    Args:
        stddev: Standard deviations, any shape.
        allow_zero: Whether a point prediction is allowed.

    Raises:
        ArgumentError: If one is negative, or zero where zero is not allowed.
    """
    smallest = stddev.min().item()
    if smallest < 0:
        raise ArgumentError(
            f"stddev has a negative entry, {smallest:g}. Allowed: numbers {'>=' if allow_zero else '>'} 0."
        )
    if smallest == 0 and not allow_zero:
        raise ArgumentError("stddev has an entry 0. Allowed: numbers > 0; a point prediction has no density.")


def check_samples(samples: Tensor, target: Tensor) -> None:
    """Refuse samples that are not of this target.

    Args:
        samples: ``[S, ...]``.
        target: ``[...]``.

    Raises:
        ArgumentError: If the shapes do not fit.
    """
    if samples.shape[1:] != target.shape or samples.ndim == 0:
        raise ArgumentError(
            f"samples has shape {tuple(samples.shape)} and target {tuple(target.shape)}. "
            "Allowed: samples [S, ...] for a target [...]."
        )


def vector(**arguments: TensorLike) -> list[Tensor]:
    """Return the tensors of :func:`real`, contiguous, if each is one-dimensional.

    Args:
        **arguments: Values by the names to use in messages.

    Returns:
        The tensors, in the order of the arguments.

    Raises:
        ArgumentError: If one has another number of dimensions.
    """
    tensors = real(**arguments)
    for name, tensor in zip(arguments, tensors, strict=True):
        if tensor.ndim != 1:
            raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}. Allowed: [n], one number for each example.")
    return [tensor.contiguous() for tensor in tensors]  # PyTorch warns of searches in strided ones


def count_of_share(share: float, total: int) -> int:
    """How many of ``total`` make up a share, in ``(0, 1]``, rounded up: at least one."""
    # Rounded first: 0.7 · 10 is a little more than 7.
    return max(1, math.ceil(round(share * total, 9)))


def as_tensor(name: str, value: TensorLike) -> Tensor:
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
