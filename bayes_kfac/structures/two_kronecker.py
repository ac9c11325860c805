"""A precision that is the sum of two Kronecker products, ``P = P₁ + s G ⊗ A``, the second of which may be indefinite.

``P₁`` is that of a matrix normal with covariance roots ``L_U`` and ``L_V``. The eigenvectors ``E_U`` of
``L_Uᵀ G L_U`` and ``E_V`` of ``L_Vᵀ A L_V`` diagonalise both at once:

    ``P⁻¹ = (K_U ⊗ K_V) diag(D)⁻¹ (K_U ⊗ K_V)ᵀ`` with ``K_U = L_U E_U``, ``K_V = L_V E_V`` and ``D = 1 + s d_U d_Vᵀ``.

Where the sum stands for a Fisher and a prior ``P₀``, it has no direction in which it is less than the prior. An
indefinite product may break this. Then ``D`` is raised to what the prior alone has in that direction, ``kᵀ P₀ k``, or
to 1 where ``P₁`` itself has less, and how often is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.structures.base import register_gaussian
from bayes_kfac.structures.damping import WhiteBlock
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian


@register_gaussian("two_kronecker")
class TwoKroneckerGaussian(KroneckerEigenGaussian):
    """A zero-mean Gaussian whose precision is the sum of two Kronecker products.

    Args:
        basis_row: ``K_U``, ``[*blocks, out, out]``.
        basis_column: ``K_V``, ``[*blocks, in, in]``.
        precision: ``D``, ``[*blocks, out, in]``.
        log_volume: ``log |det (K_U ⊗ K_V)|``, ``[*blocks]``.
        num_clamped: In how many of the ``out · in`` directions the sum was less than the prior and was raised to it,
            ``[*blocks]``.
    """

    def __init__(
        self, basis_row: Tensor, basis_column: Tensor, precision: Tensor, log_volume: Tensor, num_clamped: Tensor
    ) -> None:
        super().__init__(basis_row, basis_column, precision, log_volume)
        self.num_clamped = num_clamped

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {**super().state, "num_clamped": self.num_clamped}

    @property
    def first(self) -> MatrixNormalGaussian:
        """The matrix normal whose precision is the first of the two products."""
        return MatrixNormalGaussian(linalg.triangular_root(self.basis_row), linalg.triangular_root(self.basis_column))


def with_second_product(
    blocks: Sequence[WhiteBlock], firsts: Sequence[MatrixNormalGaussian], seconds: Sequence[tuple[Tensor, Tensor]]
) -> list[TwoKroneckerGaussian]:
    """Add a second Kronecker product to the precisions of matrix normals.

    Args:
        blocks: The blocks, for their priors and the scales of their data.
        firsts: The Gaussians of the first product and the prior.
        seconds: The second product of one example's Fisher: ``A``, ``[*blocks, in, in]``, and ``G``,
            ``[*blocks, out, out]``, symmetric; a diagonal one is ``[*blocks, 1, size]``.

    Returns:
        The Gaussians.
    """
    names = [block.spec.name for block in blocks]
    pairs = list(zip(firsts, seconds, strict=True))
    of_rows = [linalg.congruence(G, first.scale_tril_row) for first, (_, G) in pairs]
    of_columns = [linalg.congruence(A, first.scale_tril_column) for first, (A, _) in pairs]
    rows = linalg.map_by_shape(linalg.symmetric_eigh, of_rows, names)
    columns = linalg.map_by_shape(linalg.symmetric_eigh, of_columns, names)
    return [
        _sum(block, first, *row, *column)
        for block, first, row, column in zip(blocks, firsts, rows, columns, strict=True)
    ]


def _sum(
    block: WhiteBlock, first: MatrixNormalGaussian, d_U: Tensor, E_U: Tensor, d_V: Tensor, E_V: Tensor
) -> TwoKroneckerGaussian:
    K_U, K_V = linalg.product(first.scale_tril_row, E_U), linalg.product(first.scale_tril_column, E_V)
    D = 1 + block.spec.data_scale * d_U.unsqueeze(-1) * d_V.unsqueeze(-2)
    of_prior = _white_squares(block.row_root, K_U).unsqueeze(-1) * _white_squares(block.column_root, K_V).unsqueeze(-2)
    floor = of_prior.clamp(max=1)
    num_clamped = (floor > D).sum((-2, -1)).to(D)
    return TwoKroneckerGaussian(K_U, K_V, torch.maximum(D, floor), -first.logdet() / 2, num_clamped)


def _white_squares(prior_root: Tensor, basis: Tensor) -> Tensor:
    """``|R⁻¹ k|²`` of each column of a basis, ``[*blocks, size]``."""
    if linalg.is_diagonal(basis):
        return (basis / prior_root).square().squeeze(-2)
    return linalg.left_solve(prior_root, basis).square().sum(-2)
