"""Calibration of predictive distributions: where in its distribution each target fell.

The probability integral transform (PIT) of a target is the predictive distribution function there, ``F(y)``. Where the
predictions are calibrated, PITs are uniform on ``[0, 1]``; a hump in the middle means too wide, a valley too narrow, a
slope a bias. ``prediction.cdf(y)`` gives those of a regression's prediction in closed form.

Source: Dawid (1984), Statistical theory: the prequential approach; Gneiting, Balabdaoui and Raftery (2007),
Probabilistic forecasts, calibration and sharpness.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kfac.errors import ArgumentError, check_choice
from bayes_kfac.metrics.checks import TensorLike, check_samples, check_stddev, real, same_shape


def pit_gaussian(mean: TensorLike, stddev: TensorLike, target: TensorLike) -> Tensor:
    """PIT of Gaussian predictions, ``Φ((target - mean) / σ)``.

    Args:
        mean: Predicted means, any shape.
        stddev: Predicted standard deviations, positive, the shape of ``mean``.
        target: Observed values, the shape of ``mean``.

    Returns:
        One number in ``[0, 1]`` for each target, the shape of ``target``.

    Raises:
        ArgumentError: If shapes differ, an argument is empty or holds NaN, or a standard deviation is not positive.
    """
    mean, stddev, target = same_shape(mean=mean, stddev=stddev, target=target)
    check_stddev(stddev, allow_zero=False)
    return torch.special.ndtr((target - mean) / stddev)


def pit_samples(samples: TensorLike, target: TensorLike) -> Tensor:
    """PIT of predictions that are known by samples: the target's rank among them, brought to the unit interval.

    ``(#{x < y} + #{x = y} / 2 + 1/2) / (S + 1)``. A target that is distributed like the samples has each of the
    ``S + 1`` ranks equally often, and the values are the middles of as many equal bins: histograms with a divisor of
    ``S + 1`` bins are flat then. The samples have to be of the target, noise included, and not of its mean.

    Source: Hamill (2001), Interpretation of rank histograms for verifying ensemble forecasts.

    Args:
        samples: Samples of the prediction, ``[S, ...]``.
        target: Observed values, ``[...]``.

    Returns:
        One number in ``(0, 1)`` for each target, the shape of ``target``.

    Raises:
        ArgumentError: If the shapes do not fit, or an argument is empty or holds NaN.
    """
    samples, target = real(samples=samples, target=target)
    check_samples(samples, target)
    rank = ((samples < target).sum(0) + (samples <= target).sum(0)).to(target.dtype) / 2
    return (rank + 0.5) / (len(samples) + 1)


def miscalibration_area(pit: TensorLike, kind: str = "interval") -> Tensor:
    """Area between the observed and the nominal coverage over all levels, in ``[0, 1/2]``; 0 is calibrated.

    ``∫₀¹ |F̂(p) - p| dp``, exactly: no grid of levels is needed, since ``F̂`` has steps at the data only. For
    ``kind="interval"``, ``F̂(p)`` is the share of targets inside their central interval of level ``p``, that is, with
    ``|2 PIT - 1| ≤ p``; for ``kind="quantile"`` the share below their quantile of level ``p``, which sees a bias too.

    Sources: Kuleshov, Fenner and Ermon (2018), Accurate uncertainties for deep learning using calibrated regression,
    for the curves; Tran et al. (2020), Methods for comparing uncertainty quantifications for material property
    predictions, for the area.

    Args:
        pit: PITs, any shape: of :func:`pit_gaussian`, :func:`pit_samples` or ``prediction.cdf(target)``.
        kind: ``"interval"`` or ``"quantile"``.

    Returns:
        The area.

    Raises:
        ArgumentError: If ``pit`` is empty, holds NaN, or leaves ``[0, 1]``, or ``kind`` is unknown.
    """
    level = nominal_levels(pit, kind).sort().values
    edge = torch.cat([level.new_zeros(1), level, level.new_ones(1)])
    observed = torch.arange(len(level) + 1, dtype=level.dtype, device=level.device) / len(level)
    # ∫ |p - h| dp = (p - h) |p - h| / 2, between each two steps.
    left, right = edge[:-1] - observed, edge[1:] - observed
    return (right * right.abs() - left * left.abs()).sum() / 2


def nominal_levels(pit: TensorLike, kind: str) -> Tensor:
    """The level at which each target begins to be covered, ``[n]``.

    Args:
        pit: PITs, any shape.
        kind: ``"interval"`` or ``"quantile"``.

    Returns:
        The levels, in ``[0, 1]``.

    Raises:
        ArgumentError: If ``pit`` is empty, holds NaN, or leaves ``[0, 1]``, or ``kind`` is unknown.
    """
    check_choice("kind", kind, ("interval", "quantile"))
    (values,) = real(pit=pit)
    if bool(((values < 0) | (values > 1)).any()):
        found = f"{values.min().item():g} to {values.max().item():g}"
        raise ArgumentError(f"pit ranges from {found}. Allowed: 0 to 1; these are values of a distribution function.")
    values = values.flatten()
    return (2 * values - 1).abs() if kind == "interval" else values
