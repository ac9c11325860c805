"""Integrals under a normal distribution: nodes and the logarithms of their weights, always the same.

Where the linearised output is a Gaussian and the prediction is not, its density is such an integral: deterministic, and
differentiable in the inputs.

In one dimension the nodes are equally spaced. For integrands that are analytic and vanish at both ends that trapezoidal
rule converges geometrically (Trefethen & Weideman 2014, "The exponentially convergent trapezoidal rule"), and here
faster than Gauss-Hermite: these integrands are not polynomials but ``exp(−exp(·))``, and half of the Hermite nodes are
where a normal has nothing. Where a log-scale has a standard deviation of 1, these nodes give a
density to 1e-10, and as many Hermite nodes to 1e-5.
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
