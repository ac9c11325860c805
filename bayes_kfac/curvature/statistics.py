"""Statistics: sums over examples, and the counts that turn them into averages.

Sums and counts, not averages, are what is kept: they add over batches, accumulation steps, workers and tasks. An
exponential moving average is the same recursion on both, so that it is debiased by construction: after one update the
average is the batch's. Sums are in float32 whatever the model's dtype (float64 where the model is).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kfac.curvature.recorder import Rows

SHARING_KINDS = ("expand", "reduce")


@dataclass(frozen=True)
class Statistics:
    """Named sums and the counts they are to be divided by.

    Attributes:
        sums: Tensors by name.
        counts: How many terms each sum has, by the same names.
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, float]

    def mean(self, name: str) -> Tensor:
        """The average of one statistic."""
        return self.sums[name] / self.counts[name]

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            {name: value + other.sums[name] for name, value in self.sums.items()},
            {name: value + other.counts[name] for name, value in self.counts.items()},
        )

    def __mul__(self, factor: float) -> Statistics:
        return Statistics(
            {name: value * factor for name, value in self.sums.items()},
            {name: value * factor for name, value in self.counts.items()},
        )

    def moving_average(self, batch: Statistics, decay: float) -> Statistics:
        """One step of an exponential moving average, ``decay · self + (1 − decay) · batch``."""
        return self * decay + batch * (1 - decay)

    def lean(self, other: Statistics, weight: float) -> Statistics:
        """Statistics whose averages are ``(1 − weight) · self + weight · other``, with the counts of ``self``."""
        sums = {
            name: value * (1 - weight) + other.mean(name) * (weight * self.counts[name])
            for name, value in self.sums.items()
        }
        return Statistics(sums, self.counts)

    def non_finite(self) -> list[str]:
        """The names of the sums that hold NaN or infinity."""
        return [name for name, value in self.sums.items() if not bool(torch.isfinite(value).all())]


def kronecker_factors(rows: Rows, sharing: str) -> Statistics:
    """Sums for the two Kronecker factors of a layer's Fisher, ``F ≈ G ⊗ A`` for one example.

    ``expand``: ``A`` averages ``a aᵀ`` over examples and positions, ``G`` averages ``Σ_t g gᵀ`` over examples.
    ``reduce``: the same with ``mean_t a`` for ``a`` and ``Σ_t g`` for ``g``. Source: Eschenhagen et al. 2023.

    Args:
        rows: What a batch shows of the layer.
        sharing: ``"expand"`` or ``"reduce"``.

    Returns:
        ``input``: the sum for ``A``, ``[*blocks, in, in]``; ``gradient``: the sum for ``G``, ``[*blocks, out, out]``.
    """
    dtype = torch.promote_types(rows.inputs.dtype, torch.float32)
    inputs, gradients = rows.inputs.to(dtype), rows.gradients.to(dtype)
    if sharing == "reduce" and inputs.shape[-2] > 1:
        inputs, gradients = inputs.mean(-2, keepdim=True), gradients.sum(-2, keepdim=True)
    by_block = gradients.movedim(0, -4) if gradients.shape[0] > 1 else gradients[0]
    by_block = by_block.flatten(inputs.ndim - 3, -2)
    flat = inputs.flatten(-3, -2)
    return Statistics(
        {"input": flat.mT @ flat, "gradient": by_block.mT @ by_block},
        {"input": float(flat.shape[-2]), "gradient": float(rows.num_examples)},
    )
