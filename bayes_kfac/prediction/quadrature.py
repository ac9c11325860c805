"""Integrals under a normal distribution: nodes and the logarithms of their weights, always the same.

Where the linearised output is a Gaussian and the prediction is not, its density is such an integral: deterministic, and
differentiable in the inputs.

In one dimension the nodes are equally spaced. For integrands that are analytic and vanish at both ends that trapezoidal
rule converges geometrically (Trefethen & Weideman 2014, "The exponentially convergent trapezoidal rule"), and here
faster than Gauss-Hermite: these integrands are not polynomials but ``exp(−exp(·))``, and half of the Hermite nodes are
where a normal has nothing. Where a log-scale has a standard deviation of 1, these nodes give a
density to 1e-10, and as many Hermite nodes to 1e-5. Where the integrand may be far narrower than the normal, or far out
in it, nodes are placed around its mode: in one dimension by a ``sinh``, in several by importance weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily

#: Nodes of one dimension.
NODES = 96
#: Nodes of several dimensions.
JOINT_NODES = 1024
#: How far nodes go, in standard deviations of a normal: beyond is 1e-17 of it.
REACH = 8.5


def trapezoid(reach: float, like: Tensor) -> tuple[Tensor, float]:
    """Equally spaced nodes.

    Args:
        reach: The last one; the first is its negative.
        like: Whose dtype and device they have.

    Returns:
        The nodes, ``[NODES]``, and their distance.
    """
    return torch.linspace(-reach, reach, NODES, dtype=like.dtype, device=like.device), 2 * reach / (NODES - 1)


def normal_rule(like: Tensor) -> tuple[Tensor, Tensor]:
    """A rule for expectations under a standard normal.

    Args:
        like: Whose dtype and device it has.

    Returns:
        Nodes and log-weights, both ``[NODES]``.
    """
    nodes, _ = trapezoid(REACH, like)
    return nodes, (-0.5 * nodes.square()).log_softmax(0)


def joint_normal_nodes(dims: int, like: Tensor, count: int = JOINT_NODES) -> Tensor:
    """Quasi-Monte Carlo nodes of equal weight: a scrambled Sobol sequence through the normal's quantiles.

    Args:
        dims: How many dimensions.
        like: Whose dtype and device they have.
        count: How many nodes, best a power of 2.

    Returns:
        ``[count, dims]``.
    """
    engine = torch.quasirandom.SobolEngine(dims, scramble=True, seed=0)
    uniform = engine.draw(count, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return torch.special.ndtri(uniform).to(like)


def line(centre: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes of one variable, close where a density has its mode, further apart as a ``sinh`` away from it.

    They reach as far as a standard normal at 0 does, and as far again on the other side of the mode.

    Args:
        centre: The mode, ``[..., 1]``.
        factor: The root of the curvature there, ``[..., 1, 1]``.

    Returns:
        The nodes, ``[..., NODES, 1]``, and the logarithms of their weights, ``[..., NODES]``.
    """
    width = 1 / factor
    reach = torch.asinh((centre.abs().unsqueeze(-1) + REACH) * factor)
    nodes, distance = trapezoid(1.0, centre)
    steps = reach * nodes.unsqueeze(-1)
    log_weights = (width * reach * distance * steps.cosh()).log().squeeze(-1)
    return centre.unsqueeze(-2) + width * steps.sinh(), log_weights


def cloud(centre: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes of several variables around a density's mode, half of them by its curvature and half as a standard normal.

    Args:
        centre: The mode, ``[..., d]``.
        factor: The Cholesky factor of the curvature there, ``[..., d, d]``.

    Returns:
        The nodes, ``[..., 2 JOINT_NODES, d]``, and the logarithms of their importance weights.
    """
    # to some sides the integrand falls off no faster than that, and the weights of the first half alone would have no
    # bound
    nodes = joint_normal_nodes(centre.shape[-1], centre)
    narrow = torch.linalg.solve_triangular(factor.mT, nodes.mT, upper=True).mT
    away = torch.cat([narrow, nodes.expand_as(narrow)], dim=-2)
    logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    densities = torch.logaddexp(log_normal(away @ factor) + logdet, log_normal(away)) - math.log(2)
    return centre.unsqueeze(-2) + away, -densities - math.log(2 * JOINT_NODES)


def log_normal(u: Tensor) -> Tensor:
    """The log-density of a standard normal, ``[...]`` of ``[..., d]``."""
    return -0.5 * u.square().sum(-1) - 0.5 * u.shape[-1] * math.log(2 * math.pi)


def normal_cdf(value: Tensor) -> Tensor:
    """The distribution function of a standard normal, to the dtype's digits in the lower tail too."""
    return 0.5 * torch.erfc(-math.sqrt(0.5) * value)  # torch.special.ndtr is 0 below −5.5 in float32


def mixture(components: Distribution, log_weights: Tensor) -> MixtureSameFamily:
    """The mixture over the last batch dimension of its components.

    Args:
        components: Distributions ``[..., count]``.
        log_weights: ``[count]``.

    Returns:
        The mixture ``[...]``.
    """
    return MixtureSameFamily(Categorical(logits=log_weights.expand(components.batch_shape)), components)


def equal_log_weights(count: int, like: Tensor) -> Tensor:
    """The log-weights of an equal mixture, ``[count]``."""
    return like.new_full((count,), -math.log(count))


def log_mean_exp(log_probs: Tensor) -> Tensor:
    """The logarithm of the mean over the first dimension: the log-density of an equal mixture."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))
