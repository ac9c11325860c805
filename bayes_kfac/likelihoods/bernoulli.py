"""Binary targets: the output is logits, ``[batch, ...]``; the target holds 0 and 1 in the same shape, as floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayes_kfac.errors import TargetError
from bayes_kfac.likelihoods.base import Likelihood, check_same_shape, register


@register
class Bernoulli(Likelihood):
    """``target ~ Bernoulli(sigmoid(output))``, independent over an example's dimensions.

    Example:
        >>> from bayes_kfac.likelihoods import Bernoulli
        >>> import torch
        >>> Bernoulli()(torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [1.0]]))
        tensor(0.6931)
    """

    def check(self, output: Tensor, target: Tensor) -> None:  # noqa: D102
        check_same_shape(output, target)
        if not bool(((target >= 0) & (target <= 1)).all()):  # so that NaN is refused too
            raise TargetError(f"target lies in [{target.min():g}, {target.max():g}]; allowed: 0 and 1.")

    def sample_gradient(self, output: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:  # noqa: D102
        probs = output.sigmoid().expand(num_samples, *output.shape)
        uniform = torch.rand(probs.shape, dtype=probs.dtype, device=probs.device, generator=generator)
        return probs - (uniform < probs).to(probs.dtype)

    def fisher_root(self, output: Tensor) -> Tensor:  # noqa: D102
        size = output[0].numel()
        basis = torch.eye(size, dtype=output.dtype, device=output.device).reshape(size, 1, *output.shape[1:])
        return basis * (output.sigmoid() * (-output).sigmoid()).sqrt()  # 1 − p of large outputs would cancel

    def distribution(self, output: Tensor) -> Distribution:  # noqa: D102
        return torch.distributions.Bernoulli(logits=output)

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {}

    def _elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(output, target, reduction="none")
