"""Shampoo: the moments of the gradient itself, ``U = L^(-1/4) V R^(-1/4)`` (Gupta, Koren & Singer 2018).

``L = E[V Vᵀ]`` ``[*blocks, out, out]`` and ``R = E[Vᵀ V]`` ``[*blocks, in, in]`` for the mean gradients ``V`` of
batches; a side of sparse inputs keeps the diagonal. The damping ``γ`` is added to both. Statistics depend on the size
of the batches, as they do in the paper: a batch is one gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import NO_FRAME, Frame, Rows, SparseRows, Statistics
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, Structure, register
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian

#: Each side takes a quarter, so that both together are the inverse root of a second moment.
ROOT = 0.25


@register("shampoo")
class ShampooStructure(Structure):
    """Second moments of a layer's gradient on its two sides."""

    card = Card(
        formula="P = L^(1/4) ⊗ R^(1/4), L = E[V Vᵀ], R = E[Vᵀ V], V the mean gradient of a batch",
        captures="How gradients of whole batches vary on each side; their size rather than the curvature.",
        use="As an optimizer, where K-FAC's hooks see too little; with fisher='empirical'.",
        cost="Statistics in·out (in + out); refresh in³ + out³; a solve in·out (in + out); memory in² + out².",
        source="Gupta, Koren & Singer 2018.",
    )
    refusal = (
        "it is a root of the gradients' second moment, which falls with the batch size, and not a curvature. Of single "
        "gradients these moments are structure='tkfac'."
    )
    fishers = ("empirical",)

    def __init__(self, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "exact"

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        gradient = rows.total(0) / max(rows.num_examples, 1.0)
        other = rows.transposed
        sums = {
            "input": _moment(gradient.mT, diagonal=isinstance(rows.inputs, SparseRows)),
            "gradient": _moment(gradient, diagonal=other is not None and isinstance(other.inputs, SparseRows)),
        }
        return Statistics(sums, dict.fromkeys(sums, 1.0))

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        *blocks, out_features, in_features = shape
        sums = {}
        for side, size in {"input": in_features, "gradient": out_features}.items():
            ones = like.new_ones(*blocks, 1, size)
            sums[side] = ones if side in sparse_sides else torch.diag_embed(ones.squeeze(-2))
        return Statistics(sums, dict.fromkeys(sums, 1.0))

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        return [self._gaussian(spec) for spec in specs]

    def _gaussian(self, spec: BlockSpec) -> KroneckerEigenGaussian:
        if isinstance(spec.prior, BlockGaussian) or torch.as_tensor(spec.prior).ndim:
            raise spec.refuse_prior(self.name, "one precision for a block")
        damping = float(spec.prior) / spec.data_scale
        d_R, Q_R = linalg.eigh(spec.statistics.mean("input"), [spec.name])
        d_L, Q_L = linalg.eigh(spec.statistics.mean("gradient"), [spec.name])
        precision = (d_L + damping).pow(ROOT).unsqueeze(-1) * (d_R + damping).pow(ROOT).unsqueeze(-2)
        return KroneckerEigenGaussian(Q_L, Q_R, precision * spec.data_scale)


def _moment(gradient: Tensor, *, diagonal: bool) -> Tensor:
    return gradient.square().sum(-1).unsqueeze(-2) if diagonal else gradient @ gradient.mT
