"""Classification: the output is logits, ``[batch, ..., classes]``; the target is class indices, ``[batch, ...]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayes_kfac.errors import TargetError
from bayes_kfac.likelihoods.base import Likelihood, check_tensor, register


@register
class Categorical(Likelihood):
    """``target ~ softmax(output)``, the classes along the last dimension.

    Example:
        >>> from bayes_kfac.likelihoods import Categorical
        >>> import torch
        >>> Categorical()(torch.zeros(2, 4), torch.tensor([0, 3]))  # log 4: the mean over examples
        tensor(1.3863)
        >>> Categorical()(torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.long))  # 5 log 4: positions add up
        tensor(6.9315)
    """

    def check(self, output: Tensor, target: Tensor) -> None:  # noqa: D102
        check_tensor(target)
        if output.ndim < 2:
            raise TargetError(f"output of shape {tuple(output.shape)} must be logits [batch, ..., classes].")
        if target.is_floating_point() or target.dtype == torch.bool:
            raise TargetError(
                f"target of dtype {target.dtype} must hold class indices: target.long(). Two classes with one logit "
                "are a likelihoods.Bernoulli()."
            )
        if target.shape != output.shape[:-1]:
            raise TargetError(
                f"target of shape {tuple(target.shape)} must be {tuple(output.shape[:-1])} for logits of shape "
                f"{tuple(output.shape)}: class indices, with the classes along the logits' last dimension."
            )

    def sample_gradient(self, output: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:  # noqa: D102
        probs = output.softmax(-1).expand(num_samples, *output.shape)
        # argmax of p / Exponential(1) is a draw from p: no host sync, and NaN stays NaN for the trainer to report
        exponential = torch.empty_like(probs, memory_format=torch.contiguous_format).exponential_(generator=generator)
        sampled = (probs / exponential).argmax(-1)
        return probs - torch.nn.functional.one_hot(sampled, output.shape[-1])

    def fisher_root(self, output: Tensor) -> Tensor:  # noqa: D102
        # diag(p) − p pᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ, one column for each class of each position
        probs = output.softmax(-1)
        classes = output.shape[-1]
        identity = torch.eye(classes, dtype=output.dtype, device=output.device)
        columns = (identity - probs.unsqueeze(-2)).mul_(probs.sqrt().unsqueeze(-1))  # in place: it is classes²
        columns = columns.movedim(-2, 0)
        if output.ndim == 2:
            return columns
        positions = output[0, ..., 0].numel()
        one_position = torch.eye(positions, dtype=output.dtype, device=output.device)
        one_position = one_position.reshape(positions, 1, 1, *output.shape[1:-1], 1)
        return (one_position * columns).flatten(0, 1)

    def distribution(self, output: Tensor) -> Distribution:  # noqa: D102
        return torch.distributions.Categorical(logits=output)

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {}

    def _elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        # no index is left out of the loss: -100, torch's default, would be in the Fisher but not in the gradient
        try:
            return torch.nn.functional.cross_entropy(
                output.movedim(-1, 1), target.long(), reduction="none", ignore_index=torch.iinfo(torch.int64).min
            )
        except IndexError as error:  # on a GPU torch's own assertion: a look at the targets would wait for it
            raise TargetError(
                f"target holds classes {int(target.min())} to {int(target.max())}, but the logits are of "
                f"{output.shape[-1]}. Allowed: 0 to {output.shape[-1] - 1}, one logit for each class; two classes with "
                "one logit are a likelihoods.Bernoulli(); targets to be left out, such as -100, are for a mask: "
                "likelihood(output, target, target != -100)."
            ) from error
