"""Regression whose noise the model predicts too: outputs are means and log-scales, ``[batch, ..., 2·targets]``.

Why the logarithm of the scale, and not the natural parameters ``(μ/σ², −1/(2σ²))`` of Immer et al. (2023), "Effective
Bayesian heteroscedastic regression with deep neural networks", in which the loss is convex: predictions linearise the
model, and in these coordinates the linearised output is a Gaussian with a meaning. The mean stays one in the target's
units, the scale is lognormal and always positive, and every moment is in closed form; a ratio of two Gaussians has
none. The Fisher is diagonal and closed here too. What is known to go wrong with mean and scale under plain gradient
descent, where noisy regions hardly pull at the mean, is scaled away by the Fisher in a natural gradient whose blocks
know which inputs are noisy (``"dense"``, ``"unit_wise"``). A Kronecker product averages precisions apart from inputs,
so that the mean still learns slowly there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from bayes_kfac.batches import widened
from bayes_kfac.errors import TargetError
from bayes_kfac.likelihoods.base import Likelihood, check_tensor, register


@register
class HeteroscedasticGaussian(Likelihood):
    """``target ~ N(mean, exp(log_scale)²)`` with ``mean, log_scale = output.chunk(2, -1)``, independent over targets.

    For targets ``[batch, ..., d]`` the model has ``2 d`` outputs along the last dimension: all means, in the target's
    units, then the natural logarithms of all standard deviations. Standardise targets, so that log-scales start near
    where they end.

    Example:
        >>> from bayes_kfac.likelihoods import HeteroscedasticGaussian
        >>> import torch
        >>> HeteroscedasticGaussian()(torch.tensor([[0.0, 0.5]]), torch.zeros(1, 1))  # ½ + ½ log 2π
        tensor(1.4189)
    """

    def check(self, output: Tensor, target: Tensor) -> None:  # noqa: D102
        check_tensor(target)
        if target.ndim < 2 or output.shape != (*target.shape[:-1], 2 * target.shape[-1]):
            hint = " Give the model two outputs for each target: means, then log-scales."
            if output.shape == (*target.shape, 2):
                hint = f" Reshape the target: target.reshape({(*target.shape, 1)})."
            raise TargetError(
                f"output of shape {tuple(output.shape)} must be [batch, ..., 2 d] for targets [batch, ..., d], but the "
                f"target's shape is {tuple(target.shape)}.{hint}"
            )
        if not target.is_floating_point():
            raise TargetError(f"target of dtype {target.dtype} must be floating point: target.to({output.dtype}).")

    def sample_gradient(self, output: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:  # noqa: D102
        # a target μ + σε has the gradient −ε/σ by μ, and 1 − ε² by log σ
        mean, log_scale = output.chunk(2, -1)
        noise = torch.randn((num_samples, *mean.shape), dtype=output.dtype, device=output.device, generator=generator)
        return torch.cat([-noise * (-log_scale).exp(), 1 - noise.square()], -1)

    def fisher_root(self, output: Tensor) -> Tensor:  # noqa: D102
        # diag(1/σ², 2): one column for each output
        log_scale = output.chunk(2, -1)[1]
        root = torch.cat([(-log_scale).exp(), torch.full_like(log_scale, math.sqrt(2))], -1)
        size = output[0].numel()
        basis = torch.eye(size, dtype=output.dtype, device=output.device).reshape(size, 1, *output.shape[1:])
        return basis * root

    def distribution(self, output: Tensor) -> Distribution:  # noqa: D102
        mean, log_scale = output.chunk(2, -1)
        return Normal(mean, log_scale.exp())

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {}

    def output_mask(self, mask: Tensor, output: Tensor) -> Tensor:  # noqa: D102
        # a mask of single targets is of their means and of their scales
        return torch.cat([mask, mask], -1) if mask.ndim == output.ndim else widened(mask, output)

    def _elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        mean, log_scale = output.chunk(2, -1)
        return 0.5 * ((target - mean) * (-log_scale).exp()).square() + log_scale + 0.5 * math.log(2 * math.pi)
