"""The quadratic model of the loss along a few directions, exact on one batch, and damping by how well it does.

``M(c) = ∇ᵀd + ½ dᵀ (F + γ I) d`` with ``d = Σ_k c_k d_k`` and the exact Fisher ``F`` of the batch's mean loss: a matrix
of ``k × k`` numbers. With the preconditioned gradient and the last step for directions, its minimum is a learning rate
and a momentum (Martens & Grosse 2015, §6.4 and §7); how much of the decrease that it promises comes true tells whether
to trust it further (Levenberg-Marquardt, §6.5). Directions are tensors by parameter name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac.batches import count_examples
from bayes_kfac.curvature import output_gradients
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.prediction.forward import call

Direction = Mapping[str, Tensor]

#: What part of the promised decrease must come true for less damping, and below which there is more.
TRUSTED, DOUBTED = 0.75, 0.25


@dataclass(frozen=True)
class QuadraticModel:
    """A quadratic in a few coefficients.

    Attributes:
        slope: ``∇ᵀ d_k``, ``[k]``.
        curvature: ``d_kᵀ (F + γ I) d_l``, ``[k, k]``.
    """

    slope: Tensor
    curvature: Tensor

    def minimum(self) -> Tensor:
        """The coefficients of its minimum, ``[k]``; those of least length where directions are dependent or zero."""
        return -torch.linalg.pinv(self.curvature, hermitian=True) @ self.slope

    def at(self, coefficients: Tensor) -> Tensor:
        """Its value, relative to where all coefficients are zero."""
        return self.slope @ coefficients + 0.5 * coefficients @ self.curvature @ coefficients


@torch.no_grad()
def fisher_products(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Any,
    directions: Sequence[Direction],
    mask: Tensor | None = None,
) -> Tensor:
    """``d_kᵀ F d_l`` with the exact Fisher of a batch's mean loss at the model's weights; no Jacobian is formed.

    Args:
        model: The model, in the mode that it is in; left as it was.
        likelihood: What its output means.
        inputs: A batch: one argument, a tuple of arguments, or a mapping of keyword arguments.
        directions: Changes of the weights.
        mask: Which targets weigh, as the likelihood takes it.

    Returns:
        ``[k, k]`` in float64.
    """
    output, changes = _output_changes(model, inputs, directions)
    columns = output_gradients(likelihood, output, "exact", mask=mask)
    along = torch.stack([(columns * change).flatten(2).sum(-1) for change in changes]).double()
    examples = len(output) if mask is None else count_examples(mask)
    return torch.einsum("kcn,lcn->kl", along, along) / examples


def _output_changes(model: nn.Module, inputs: Any, directions: Sequence[Direction]) -> tuple[Tensor, list[Tensor]]:
    """The output, and to first order how each direction changes it, ``[batch, ...]``."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def function(changed: dict[str, Tensor]) -> Tensor:
        return call(model, weights | changed, inputs)

    names = list(directions[0])
    at = {name: weights[name] for name in names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, as it loads its forward-mode rules
            pairs: list[Any] = [torch.func.jvp(function, (at,), (dict(own),)) for own in directions]
    except (NotImplementedError, RuntimeError):  # operations without forward-mode derivatives, such as recurrences
        return _by_two_backward_passes(function, at, directions)
    return pairs[0][0], [change for _, change in pairs]


@torch.enable_grad()
def _by_two_backward_passes(
    function: Any, at: Mapping[str, Tensor], directions: Sequence[Direction]
) -> tuple[Tensor, list[Tensor]]:
    """``J d`` as the derivative of ``(Jᵀ u)ᵀ d``, which is linear in ``u``."""
    variables = {name: value.clone().requires_grad_() for name, value in at.items()}
    output = function(variables)
    u = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, list(variables.values()), u, create_graph=True, allow_unused=True)
    changes = []
    for direction in directions:
        along = [(p * direction[name]).sum() for name, p in zip(variables, pulled, strict=True) if p is not None]
        changes.append(torch.autograd.grad(torch.stack(along).sum(), u, retain_graph=True)[0])
    return output.detach(), changes


@dataclass
class LevenbergMarquardt:
    """Damping that falls while the quadratic model keeps its promises, and grows when it does not.

    Attributes:
        damping: ``λ``, on the scale of one example's Fisher.
        every: Steps between two comparisons; each changes the damping by ``factor ** every``.
        factor: Below 1.
        least: What the damping does not fall below.
    """

    damping: float = 1.0
    every: int = 5
    factor: float = 19 / 20
    least: float = 1e-8

    def is_due(self, step: int) -> bool:
        """Whether promise and truth are compared on this step, counted from 0."""
        return (step + 1) % self.every == 0

    def observe(self, promised: float, found: float) -> None:
        """Take note of how a step changed the loss.

        Args:
            promised: The change by the quadratic model, negative.
            found: The change that came true on the same batch.
        """
        ratio = found / promised if promised < 0 else 0.0
        if ratio > TRUSTED:
            self.damping = max(self.least, self.damping * self.factor**self.every)
        elif not ratio >= DOUBTED:  # NaN is a loss that overflowed
            self.damping /= self.factor**self.every
