"""K-FAC: ``F̄ ≈ G ⊗ A`` with ``A = E[a aᵀ]`` and ``G = E[g gᵀ]``.

How a prior enters is in :mod:`bayes_kfac.structures.damping`. Other structures whose Fisher is one Kronecker product
measure other factors, and are the same beyond: they override :meth:`KroneckerStructure.factors`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import FISHER_KINDS, NO_FRAME, Frame, Rows, Statistics, kronecker_factors
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, Structure, register
from bayes_kfac.structures.damping import WhiteBlock, damped


@register("kron")
class KroneckerStructure(Structure):
    """The Kronecker-factored Fisher of a layer."""

    card = Card(
        formula="F ≈ G ⊗ A, A = E[a aᵀ], G = E[g gᵀ]",
        captures="Correlations among a layer's inputs and among its outputs, as if inputs and gradients were "
        "independent; exact for deep linear networks. It misses the trace where their sizes go together.",
        use="The default: the published method, cheap, a matrix normal with factored or optimal damping.",
        cost="Statistics n (in² + out²); refresh in³ + out³; sample or solve in·out (in + out); memory in² + out².",
        source="Martens & Grosse 2015; as a posterior, Zhang et al. 2018.",
    )
    fishers = FISHER_KINDS

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        return kronecker_factors(rows, self.sharing)

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        *blocks, out_features, in_features = shape
        sizes = {"input": in_features, "gradient": out_features}
        sums = {}
        for side, size in sizes.items():
            factor = torch.eye(size, dtype=like.dtype, device=like.device)
            factor = factor.new_ones(1, size) if side in sparse_sides else factor
            sums[side] = factor.expand(*blocks, *factor.shape)
        if tied:  # the transposed uses add nothing
            sums["transposed_input"] = torch.zeros_like(sums["gradient"])
            sums["transposed_gradient"] = torch.zeros_like(sums["input"])
        return Statistics(sums, dict.fromkeys(sums, 1.0))

    def factors(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """The factors of one example's Fisher, ``F̄ ≈ G ⊗ A``.

        Args:
            statistics: What was measured.

        Returns:
            ``A``, ``[*blocks, in, in]``, and ``G``, ``[*blocks, out, out]``; a diagonal one is ``[*blocks, 1, size]``.
        """
        A, G = statistics.mean("input"), statistics.mean("gradient")
        if "transposed_input" in statistics.sums:
            A, G = _sum_of_products(A, G, statistics.mean("transposed_gradient"), statistics.mean("transposed_input"))
        return A, G

    def spectrum(self, spec: BlockSpec) -> Tensor:  # noqa: D102
        return self._white(spec).spectrum()

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        return damped([self._white(spec) for spec in specs], self.damping)

    def _white(self, spec: BlockSpec) -> WhiteBlock:
        return WhiteBlock.of(spec, *self.factors(spec.statistics), structure=self.name)


def _sum_of_products(A: Tensor, G: Tensor, B: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """One Kronecker product for ``G ⊗ A + H ⊗ B``: the product of its partial traces over its trace.

    It has the sum's trace and is the sum itself where the two are proportional on one side; one step of the power
    iteration for the nearest Kronecker product, from the identity (TKFAC: Gao et al. 2021).

    Args:
        A: The input factor of the first product.
        G: Its gradient factor.
        B: The factor of the second on the side of ``A``.
        H: The factor of the second on the side of ``G``.

    Returns:
        The two factors, on the sides of ``A`` and ``G``.
    """
    tr_A, tr_G, tr_B, tr_H = (linalg.trace(factor)[..., None, None] for factor in (A, G, B, H))
    total = tr_A * tr_G + tr_B * tr_H
    total = torch.where(total > 0, total, torch.ones_like(total))
    return _added(tr_G * A, tr_H * B) / total, _added(tr_A * G, tr_B * H)


def _added(left: Tensor, right: Tensor) -> Tensor:
    """The sum of two factors; diagonal where both are."""
    if linalg.is_diagonal(left) == linalg.is_diagonal(right):
        return left + right
    return linalg.dense(left) + linalg.dense(right)
