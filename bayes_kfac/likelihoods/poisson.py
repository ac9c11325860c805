"""Counts: the output is the logarithm of their rate, ``[batch, ...]``; the target holds them, in the same shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayes_kfac.errors import TargetError
from bayes_kfac.likelihoods.base import Likelihood, check_same_shape, register

#: The largest rate that targets are sampled at: beyond it a count does not fit a 64-bit integer, and torch's sampler
#: overflows.
MAX_SAMPLED_RATE = 1e15


@register
class Poisson(Likelihood):
    """``target ~ Poisson(exp(output))``, independent over an example's dimensions; targets are whole numbers as floats.

    Where counts are of unequal exposure (hours, areas), the model adds the exposure's logarithm to its output.

    Example:
        >>> from bayes_kfac.likelihoods import Poisson
        >>> import torch
        >>> Poisson()(torch.zeros(2, 1), torch.tensor([[0.0], [2.0]]))  # 1 + ½ log 2!
        tensor(1.3466)
    """

    def check(self, output: Tensor, target: Tensor) -> None:  # noqa: D102
        check_same_shape(output, target)
        if not bool(((target >= 0) & (target == target.floor()) & target.isfinite()).all()):  # so NaN is refused too
            raise TargetError(
                f"target lies in [{target.min():g}, {target.max():g}] and must hold counts; allowed: 0.0, 1.0, 2.0, ..."
            )

    def sample_gradient(self, output: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:  # noqa: D102
        rate = output.exp().expand(num_samples, *output.shape)
        # the sampler refuses NaN, which is the trainer's to report: it stays in the rate
        allowed = rate.nan_to_num(nan=0.0).clamp(max=MAX_SAMPLED_RATE).contiguous()
        return rate - torch.poisson(allowed, generator=generator)

    def fisher_root(self, output: Tensor) -> Tensor:  # noqa: D102
        size = output[0].numel()
        basis = torch.eye(size, dtype=output.dtype, device=output.device).reshape(size, 1, *output.shape[1:])
        return basis * (0.5 * output).exp()

    def distribution(self, output: Tensor) -> Distribution:  # noqa: D102
        return torch.distributions.Poisson(output.exp())

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {}

    def _elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return output.exp() - target * output + torch.lgamma(target + 1)
