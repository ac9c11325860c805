"""Scores of prediction intervals: how often they hold, how wide they are, and both at once.

Lower ends, upper ends and targets have one shape, any; a score is its mean over all entries, in the target's unit.
"""

from __future__ import annotations

from torch import Tensor

from bayes_kfac.errors import check_fraction
from bayes_kfac.metrics.checks import TensorLike, check_ordered, same_shape


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
    lower, upper, target = same_shape(lower=lower, upper=upper, target=target)
    check_ordered(lower, upper)
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
    lower, upper = same_shape(lower=lower, upper=upper)
    check_ordered(lower, upper)
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
    lower, upper, target = same_shape(lower=lower, upper=upper, target=target)
    check_ordered(lower, upper)
    # At most one of the two is positive; both are zero inside the interval.
    missed = (lower - target).clamp(min=0) + (target - upper).clamp(min=0)
    return ((upper - lower) + 2 / (1 - check_fraction("level", level)) * missed).mean()
