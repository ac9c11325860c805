"""Eva: the Fisher as the outer product of a mean gradient, ``F ≈ vec(ḡ āᵀ) vec(ḡ āᵀ)ᵀ`` (Zhang, Shi & Li 2023).

``ā`` ``[*blocks, 1, in]`` is the mean of a layer's inputs, ``ḡ`` ``[*blocks, 1, out]`` that of its output gradients.
The damped inverse is a formula: ``U = (V − (ḡᵀ V ā) / (γ + ‖ā‖² ‖ḡ‖²) ḡ āᵀ) / γ``. With targets sampled from the model
the mean of the gradients is nothing but noise, so that Eva goes by the data's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac.curvature import NO_FRAME, Frame, Rows, SparseRows, Statistics
from bayes_kfac.errors import UnsupportedModelError
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, Structure, register
from bayes_kfac.structures.low_rank_gaussian import LowRankGaussian


@register("eva")
class EvaStructure(Structure):
    """The outer product of a layer's mean gradient, factored."""

    card = Card(
        formula="F ≈ vec(ḡ āᵀ) vec(ḡ āᵀ)ᵀ, ā = E[a], ḡ = E[g]",
        captures="One direction of a layer, and none of the curvature beside it.",
        use="As an optimizer where even K-FAC's factors are too much; with fisher='empirical'.",
        cost="Statistics n (in + out); refresh, solve and memory in·out.",
        source="Zhang, Shi & Li 2023.",
    )
    refusal = "it knows one direction of each layer, and would leave all others to the prior."
    fishers = ("empirical",)

    def __init__(self, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "exact"

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        return summed(rows, self.name)

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        *blocks, out_features, in_features = shape
        # of rank one nothing is nearer to the identity than nothing, and the damping is a multiple of it
        sums = {"input": like.new_zeros(*blocks, 1, in_features), "gradient": like.new_zeros(*blocks, 1, out_features)}
        return Statistics(sums, dict.fromkeys(sums, 1.0))

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        columns, diagonals = [], []
        for spec in specs:
            column, row = spec.statistics.mean("input"), spec.statistics.mean("gradient")
            mean = row.mT @ column * spec.data_scale**0.5
            if isinstance(spec.prior, BlockGaussian):
                raise spec.refuse_prior(self.name, "precisions")
            columns.append(mean.unsqueeze(-3))
            diagonals.append(torch.as_tensor(spec.prior, dtype=mean.dtype, device=mean.device).expand_as(mean))
        return list(LowRankGaussian.of(columns, diagonals, [spec.name for spec in specs]))


def summed(rows: Rows, structure: str) -> Statistics:
    """The sums of a batch's inputs, ``[*blocks, 1, in]``, and of its output gradients, ``[*blocks, 1, out]``.

    Args:
        rows: What the batch shows of the layer.
        structure: The structure's name, for messages.

    Returns:
        ``input``, to be divided by positions, and ``gradient``, by examples.

    Raises:
        UnsupportedModelError: If weights are used transposed too.
    """
    if rows.transposed is not None:
        raise UnsupportedModelError(
            f"structure={structure!r} has one mean input and one mean gradient for a block, and tied weights that are "
            "used transposed too have two. Untie them, or choose another structure."
        )
    gradients = rows.gradients.sum(0).flatten(-3, -2).sum(-2, keepdim=True)
    return Statistics(
        {"input": _total(rows.inputs, rows.mask) * rows.share, "gradient": gradients},
        {"input": rows.num_rows, "gradient": rows.num_examples},
    )


def _total(inputs: Tensor | SparseRows, mask: Tensor | None) -> Tensor:
    """The sum of all rows that weigh, ``[*blocks, 1, in]``."""
    if isinstance(inputs, SparseRows):
        weights = inputs.weights if mask is None else inputs.weights * mask.unsqueeze(-1)
        total = weights.new_zeros(inputs.size).scatter_add_(0, inputs.indices.flatten(), weights.flatten())
        return total.unsqueeze(0)
    weighted = inputs if mask is None else inputs * mask.unsqueeze(-1)
    return weighted.flatten(-3, -2).sum(-2, keepdim=True)
