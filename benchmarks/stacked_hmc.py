"""Hamiltonian Monte Carlo on many independent targets at once: a stack of chains, one for each row.

Every row has its own step size, adapted to its own acceptance by dual averaging (Hoffman and Gelman 2014), and accepts
or rejects by itself; only the number of leapfrog steps is drawn for all of them together. The mass matrix is the
identity: write targets in coordinates in which the prior is standard normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chains:
    """What was drawn.

    Attributes:
        draws: ``[draws, rows, dimensions]``.
        acceptance: The mean probability of acceptance of each row after warm-up.
        step: The step size of each row.
    """

    draws: Tensor
    acceptance: Tensor
    step: Tensor


def hmc(
    log_density: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    warmup: int,
    iterations: int,
    keep: int,
    leapfrogs: tuple[int, int] = (10, 30),
    target: float = 0.8,
    generator: torch.Generator | None = None,
) -> Chains:
    """Draw from the densities of all rows.

    Args:
        log_density: Maps ``[rows, dimensions]`` to ``[rows]``, each of its own row only.
        start: Where the chains start.
        warmup: Iterations in which step sizes adapt, which are not kept.
        iterations: Iterations after these.
        keep: How many draws to keep of them, evenly spaced.
        leapfrogs: The least and greatest number of leapfrog steps of an iteration.
        target: The mean probability of acceptance to adapt to.
        generator: The source of randomness.
    """
    adapted = _DualAveraging(torch.full(start.shape[:1], 0.02, dtype=start.dtype), target)
    at, (value, gradient) = start, _with_gradient(log_density, start)
    kept, accepted = [], torch.zeros_like(value)
    spacing = iterations // keep
    for iteration in range(warmup + iterations):
        step = (adapted.step if iteration < warmup else adapted.average).unsqueeze(1)
        momentum = torch.randn(at.shape, dtype=at.dtype, generator=generator)
        before = value - 0.5 * momentum.square().sum(1)
        place, slope = at, gradient
        count = int(torch.randint(leapfrogs[0], leapfrogs[1] + 1, (), generator=generator))
        for _ in range(count):
            momentum = momentum + 0.5 * step * slope
            place = place + step * momentum
            there, slope = _with_gradient(log_density, place)
            momentum = momentum + 0.5 * step * slope
        gain = there - 0.5 * momentum.square().sum(1) - before
        probability = gain.nan_to_num(-math.inf).clamp(max=0).exp()  # a trajectory that diverged is rejected
        accept = torch.rand(probability.shape, dtype=at.dtype, generator=generator) < probability
        at = torch.where(accept.unsqueeze(1), place, at)
        gradient = torch.where(accept.unsqueeze(1), slope, gradient)
        value = torch.where(accept, there, value)
        if iteration < warmup:
            adapted.update(probability)
        else:
            accepted += probability / iterations
            if (iteration - warmup + 1) % spacing == 0 and len(kept) < keep:
                kept.append(at)
    return Chains(torch.stack(kept), accepted, adapted.average)


def split_rhat(draws: Tensor) -> Tensor:
    """The split-R̂ of quantities ``[draws, ...]`` of one chain: its halves against each other (Gelman et al. 2013)."""
    half = len(draws) // 2
    parts = torch.stack([draws[:half], draws[-half:]])
    within = parts.var(1).mean(0)
    between = parts.mean(1).var(0)
    return ((half - 1) / half + between / within).sqrt()


def _with_gradient(log_density: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    at = at.detach().requires_grad_()
    value = log_density(at)
    (gradient,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), gradient


class _DualAveraging:
    """Step sizes, one for each row, adapted until the mean probability of acceptance is what is wanted."""

    def __init__(self, start: Tensor, target: float) -> None:
        self.step, self.average = start, start
        self._centre, self._target = (10 * start).log(), target
        self._error, self._count = torch.zeros_like(start), 0

    def update(self, probability: Tensor) -> None:
        self._count += 1
        weight = 1 / (self._count + 10)
        self._error = (1 - weight) * self._error + weight * (self._target - probability)
        log_step = self._centre - math.sqrt(self._count) / 0.05 * self._error
        forget = self._count**-0.75
        self.average = (forget * log_step + (1 - forget) * self.average.log()).exp()
        self.step = log_step.exp()
