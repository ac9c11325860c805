"""PSGD's Kronecker-factored preconditioner as a covariance: ``P = Qᵀ Q`` with ``Q = Q_G ⊗ Q_A`` triangular.

Preconditioned SGD fits ``P`` to pairs ``(v, h)`` with ``v ~ N(0, I)`` by the least ``E[hᵀ P h + vᵀ P⁻¹ v]`` (Li 2018).
Of curvature-vector pairs, ``h = H v``, it tends to ``|H|⁻¹``: the covariance itself, of which ``Qᵀ`` is the lower
triangular root. Of gradients, ``h = g`` with ``E[g gᵀ] = H``, it tends to ``H^(-1/2)``, and the covariance is ``P²``.

With ``H = G ⊗ A + γ I`` the expectations are known, and ``P_G`` and ``P_A`` share the eigenvectors of ``G`` and ``A``.
With ``λ_oi = g_o a_i + γ`` their eigenvalues ``u`` and ``v`` solve, for ``m = 2`` of pairs and ``m = 1`` of gradients,

    ``u_o² Σ_i λ_oi^m v_i = Σ_i 1/v_i``  and  ``v_i² Σ_o λ_oi^m u_o = Σ_o 1/u_o``

in turns: the optimum of a function that is convex in their logarithms. This is where PSGD's steps on the Lie group of
``Q`` lead; where eigenvalues differ by a hundred it takes hundreds of steps, as many as they differ by.

What is least is ``Σ λ_oi^(m/2) (x_oi + 1/x_oi)``, where ``x_oi`` is 1 if ``P`` is right in a direction. So it differs
from ``damping="optimal"`` of K-FAC, which has ``Σ (x_oi − log x_oi)``, in that too broad and too narrow cost the same,
and that directions count by their precision. All of this is in the coordinates in which the prior is white.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.errors import check_choice
from bayes_kfac.structures.alternating import alternated
from bayes_kfac.structures.base import BlockGaussian, BlockSpec, Card, register
from bayes_kfac.structures.damping import WhiteBlock
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian

#: What the preconditioner is fitted to, and the power of the curvature there that its inverse tends to.
CRITERIA = {"newton": 2, "whitening": 1}


@register("psgd")
class PSGDStructure(KroneckerStructure):
    """The matrix normal whose covariance is the Kronecker preconditioner of PSGD.

    The prior enters by PSGD's own criterion, whatever ``damping`` says.

    Args:
        damping: Not used.
        sharing: How positions that share weights are summed.
        criterion: ``"newton"`` for pairs of curvature and vector, ``"whitening"`` for gradients.
    """

    card = Card(
        formula="F ≈ G ⊗ A; covariance P_G ⊗ P_A, the least of E[hᵀPh + vᵀP⁻¹v], h = (G ⊗ A + γI) v",
        captures="What kron does, as a matrix normal; the weights that data determine best are fitted best.",
        use="To compare with PSGD, or where the posterior of well determined weights matters more than the bound.",
        cost="Statistics n (in² + out²); refresh eigenvectors, in³ + out³; sample or solve in·out (in + out); memory "
        "in² + out².",
        source="Li 2018; Li 2022 (PSGD).",
    )

    def __init__(self, *, damping: str = "optimal", sharing: str = "expand", criterion: str = "newton") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "optimal"
        self.criterion = check_choice("criterion", criterion, tuple(CRITERIA))

    @property
    def options(self) -> dict[str, Any]:  # noqa: D102
        return {"criterion": self.criterion}

    def gaussians(self, specs: Sequence[BlockSpec]) -> list[BlockGaussian]:  # noqa: D102
        blocks, names = [self._white(spec) for spec in specs], [spec.name for spec in specs]
        columns = linalg.map_by_shape(linalg.eigh, [block.A for block in blocks], names)
        rows = linalg.map_by_shape(linalg.eigh, [block.G for block in blocks], names)
        return [self._gaussian(block, *row, *column) for block, row, column in zip(blocks, rows, columns, strict=True)]

    def _gaussian(self, block: WhiteBlock, d_G: Tensor, Q_G: Tensor, d_A: Tensor, Q_A: Tensor) -> MatrixNormalGaussian:
        """The Gaussian of a block from the eigenvalues and eigenvectors of its factors."""
        power = CRITERIA[self.criterion]
        eigenvalues = d_G.double().unsqueeze(-1) * d_A.double().unsqueeze(-2) + block.gamma.double()
        u, v = _preconditioner(eigenvalues**power)
        row, column = (
            linalg.triangular_root(linalg.product(Q, values.pow(1 / power).to(Q).unsqueeze(-2)))
            for Q, values in ((Q_G, u), (Q_A, v))
        )
        return MatrixNormalGaussian(
            linalg.product(block.row_root, row / block.spec.data_scale**0.5), linalg.product(block.column_root, column)
        )


def _preconditioner(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Positive ``u`` and ``v`` with the least ``Σ_oi (u_o v_i moments_oi + 1 / (u_o v_i))``.

    Args:
        moments: Eigenvalues of ``E[h hᵀ]``, ``[*blocks, out, in]``.

    Returns:
        ``u``, ``[*blocks, out]``, and ``v``, ``[*blocks, in]``.
    """
    row_given, column_given = partial(_given, moments), partial(_given, moments.mT)
    return alternated(row_given, column_given, moments.mean(-2).rsqrt())


def _given(moments: Tensor, other: Tensor) -> Tensor:
    """One side given the other: ``u_o² Σ_i moments_oi v_i = Σ_i 1/v_i``."""
    return (other.reciprocal().sum(-1, keepdim=True) / (moments @ other.unsqueeze(-1)).squeeze(-1)).sqrt()
