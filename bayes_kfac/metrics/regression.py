"""Scores of predictions of real numbers: point errors, densities and distances between distributions.

Means, standard deviations and targets have one shape, any; samples have one dimension more, the first, ``[S, ...]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayes_kfac.errors import ArgumentError
from bayes_kfac.metrics.checks import TensorLike, check_samples, check_stddev, real, same_shape


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
    mean, target = same_shape(mean=mean, target=target)
    return (mean - target).square().mean().sqrt()


def gaussian_nll(mean: TensorLike, stddev: TensorLike, target: TensorLike) -> Tensor:
    """Mean negative log-density of Gaussian predictions, in nats.

    ``(target - mean)² / 2σ² + log σ + log(2π) / 2``. It depends on the unit of the target: in a unit ``k`` times as
    large it is ``log k`` less.

    Source: Good (1952), Rational decisions: the logarithmic score.

    Args:
        mean: Predicted means, any shape.
        stddev: Predicted standard deviations, positive, the shape of ``mean``.
        target: Observed values, the shape of ``mean``.

    Returns:
        The mean over all entries.

    Raises:
        ArgumentError: If shapes differ, an argument is empty or holds NaN, or a standard deviation is not positive.
    """
    mean, stddev, target = same_shape(mean=mean, stddev=stddev, target=target)
    check_stddev(stddev, allow_zero=False)
    z = (target - mean) / stddev
    return (z.square() / 2 + stddev.log()).mean() + math.log(2 * math.pi) / 2


def mixture_nll(log_probs: TensorLike) -> Tensor:
    """Mean negative log-density of equal mixtures, such as those over draws of the weights, in nats.

    ``-log (1/S) Σ_s p_s``: densities are averaged, not their logarithms, which by Jensen's inequality would be a
    larger number and the score of another prediction.

    Args:
        log_probs: The log-density, or log-probability, of each target under each component, ``[S, ...]``.

    Returns:
        The mean over targets.

    Raises:
        ArgumentError: If ``log_probs`` is a single number, is empty, or holds NaN.
    """
    (log_probs,) = real(log_probs=log_probs)
    if log_probs.ndim == 0:
        raise ArgumentError("log_probs has shape (). Allowed: [S, ...], components first.")
    return math.log(len(log_probs)) - log_probs.logsumexp(0).mean()


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
    mean, stddev, target = same_shape(mean=mean, stddev=stddev, target=target)
    check_stddev(stddev, allow_zero=True)
    error = target - mean
    # The clamp is for σ = 0 only: z is then 0 for a hit and huge for a miss, and both give the limit |error|.
    z = error / stddev.clamp(min=torch.finfo(stddev.dtype).tiny)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return (error * torch.erf(z / math.sqrt(2)) + stddev * (2 * density - 1 / math.sqrt(math.pi))).mean()


def crps_samples(samples: TensorLike, target: TensorLike, *, fair: bool = False) -> Tensor:
    """Continuous ranked probability score of predictive samples, in the unit of the target; smaller is better.

    The score of the empirical distribution in its energy form, ``E|X - y| - E|X - X'| / 2`` with ``X`` and ``X'``
    drawn with replacement from the samples. The second term comes from one sort, in O(S log S) instead of O(S²).

    The empirical distribution of few samples is worse than the distribution they are drawn from, by ``E|X - X'| / 2S``.
    The fair score draws ``X`` and ``X'`` without replacement: its expectation is the score of the distribution itself,
    so that methods with different numbers of samples can be compared.

    Sources: Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation, Section 4.2; Ferro
    (2014), Fair scores for ensemble forecasts, for the fair score.

    Args:
        samples: Samples of the prediction, ``[S, ...]``.
        target: Observed values, ``[...]``.
        fair: Whether to score the distribution that the samples are drawn from; at least 2 are needed.

    Returns:
        The mean score over all entries of ``target``.

    Raises:
        ArgumentError: If the shapes do not fit, an argument is empty or holds NaN, or there is one sample and a fair
            score is asked for.
    """
    samples, target = real(samples=samples, target=target)
    check_samples(samples, target)
    # Both terms ignore a shift; relative to the target, a large common offset costs no digits.
    error = (samples - target).sort(0).values
    num_samples = len(error)
    pairs = num_samples * (_others(num_samples) if fair else num_samples)
    # Σᵢⱼ |xᵢ - xⱼ| / 2 = Σᵢ (2i - S - 1) x₍ᵢ₎ for ascending x₍₁₎ ... x₍ₛ₎.
    weight = torch.arange(1 - num_samples, num_samples, 2, dtype=error.dtype, device=error.device)
    spread: Tensor = torch.tensordot(weight / pairs, error, dims=1)
    return (error.abs().mean(0) - spread).mean()


def energy_score(samples: TensorLike, target: TensorLike, *, fair: bool = False) -> Tensor:
    """Energy score of samples of vectors, in the unit of the target; smaller is better.

    ``E‖X - y‖ - E‖X - X'‖ / 2`` with Euclidean norms: the CRPS of several outputs together, which also rewards their
    correlations. All pairs of samples are formed.

    Source: Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation, Section 4.3.

    Args:
        samples: Samples of the prediction, ``[S, n, d]``.
        target: Observed vectors, ``[n, d]``.
        fair: Whether to score the distribution that the samples are drawn from, as in :func:`crps_samples`.

    Returns:
        The mean score over examples.

    Raises:
        ArgumentError: If the shapes do not fit, an argument is empty or holds NaN, or there is one sample and a fair
            score is asked for.
    """
    samples, target = real(samples=samples, target=target)
    check_samples(samples, target)
    if target.ndim != 2:
        raise ArgumentError(f"target has shape {tuple(target.shape)}. Allowed: [n, d]; crps_samples takes any shape.")
    error = (samples - target).movedim(0, 1)
    num_samples = error.shape[1]
    pairs = num_samples * (_others(num_samples) if fair else num_samples)
    # Differences written out: distances from a Gram matrix lose digits where samples are close.
    distances = torch.cdist(error, error, compute_mode="donot_use_mm_for_euclid_dist")
    return (torch.linalg.vector_norm(error, dim=-1).mean(1) - distances.sum((1, 2)) / (2 * pairs)).mean()


def _others(num_samples: int) -> int:
    """How many samples differ from a given one; fair scores need one."""
    if num_samples < 2:
        raise ArgumentError("samples holds 1 sample. Allowed: 2 or more for fair=True.")
    return num_samples - 1
