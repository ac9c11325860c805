"""FOOF: ``F̄ ≈ c I ⊗ A`` with ``A = E[a aᵀ]`` and ``c = E‖g‖² / out``: K-FAC whose output side is the identity.

Natural gradient descent on the outputs of a layer, not on its weights (Benzing 2022), is the step ``V (A + λI)⁻¹``,
which is ``G := I``. As a Fisher ``I ⊗ A`` would not know the likelihood's scale, and a posterior would be as narrow for
a loose fit as for a tight one. So here ``G`` is the multiple of ``I`` that is nearest to K-FAC's: it has the same
trace. The step is then ``V (A + γ/c I)⁻¹ / c``: the paper's, with ``λ = γ/c`` and a step size that follows the
gradients' scale.

With a prior ``δ I`` the damped product is a Kronecker product itself, ``c I ⊗ (A + γ/c I)``. ``damping="optimal"`` is
that, by Cholesky factorisations of the input side alone; ``"exact"`` is the same by eigenvectors; ``"factored"`` adds
cross terms as it does to K-FAC.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bayes_kfac.curvature import NO_FRAME, Frame, Rows, Statistics, kronecker_factors
from bayes_kfac.structures.base import Card, register
from bayes_kfac.structures.kron import KroneckerStructure


@register("foof")
class FOOFStructure(KroneckerStructure):
    """The Fisher by the inputs' second moments, the same for every output."""

    card = Card(
        formula="F ≈ c I ⊗ A, A = E[a aᵀ], c = E‖g‖² / out",
        captures="Correlations among a layer's inputs, and the size of all gradients together; nothing of the outputs.",
        use="Wide outputs, such as vocabularies or many classes, where K-FAC's output side costs too much.",
        cost="Statistics n (in² + out); refresh in³; sample or solve in²·out; memory in² + out.",
        source="Benzing 2022 (FOOF), with K-FAC's trace.",
    )

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        of_sizes = kronecker_factors(self._sizes(rows), self.sharing)
        widths = {"gradient": rows.gradients.shape[-1], "transposed_gradient": rows.inputs.shape[-1]}
        sums = {
            name: (total / widths[name]).repeat_interleave(widths[name], dim=-1) if name in widths else total
            for name, total in of_sizes.sums.items()
        }
        return Statistics(sums, of_sizes.counts)

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        whole = super().identity(shape, like, sparse_sides=sparse_sides, tied=tied)
        scalar = super().identity(shape, like, sparse_sides=frozenset({"input", "gradient"}), tied=tied)
        return Statistics(
            {name: (scalar if name.endswith("gradient") else whole).sums[name] for name in whole.sums}, whole.counts
        )

    def _sizes(self, rows: Rows) -> Rows:
        """The rows with the norm of each gradient in its place."""
        tied = rows.transposed
        if self.sharing == "reduce" and rows.inputs.shape[-2] > 1:
            rows = rows.pooled()
        return replace(
            rows,
            gradients=torch.linalg.vector_norm(rows.gradients, dim=-1, keepdim=True),
            transposed=None if tied is None else self._sizes(tied),
        )
