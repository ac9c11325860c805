"""A precision that is the sum of two Kronecker products, ``P = P₁ + G ⊗ A``, the second of which may be indefinite.

``P₁`` is that of a matrix normal with covariance roots ``L_U`` and ``L_V``. The eigenvectors ``E_U`` of
``L_Uᵀ G L_U`` and ``E_V`` of ``L_Vᵀ A L_V`` diagonalise both at once:

    ``P⁻¹ = (K_U ⊗ K_V) diag(D)⁻¹ (K_U ⊗ K_V)ᵀ`` with ``K_U = L_U E_U``, ``K_V = L_V E_V`` and ``D = 1 + d_U d_Vᵀ``.

``D`` is what the precision of a direction is, in units of the first product's. A second product that all but cancels
the first there, or more than that, tells of what the two leave out and not of a direction without curvature. So ``D``
is raised to :data:`FLOOR`, and how often is counted. A floor of rounding would be enough to have a Gaussian, of which
those directions' variances would make no posterior; between 0.1 and 0.5 it matters little where the floor is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.structures.base import register_gaussian
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian

#: The least precision of a direction, relative to that of the first product.
FLOOR = 0.2


@register_gaussian("two_kronecker")
class TwoKroneckerGaussian(KroneckerEigenGaussian):
    """A zero-mean Gaussian whose precision is the sum of two Kronecker products.

    Args:
        basis_row: ``K_U``, ``[*blocks, out, out]``.
        basis_column: ``K_V``, ``[*blocks, in, in]``.
        precision: ``D``, ``[*blocks, out, in]``.
        log_volume: ``log |det (K_U ⊗ K_V)|``, ``[*blocks]``.
        num_clamped: In how many of the ``out · in`` directions ``D`` was raised to :data:`FLOOR`, ``[*blocks]``.
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
    def note(self) -> str:  # noqa: D102
        raised = int(self.num_clamped.sum())
        return f"{raised} of {self.precision.numel()} directions raised" if raised else ""

    @property
    def first(self) -> MatrixNormalGaussian:
        """The matrix normal whose precision is the first of the two products."""
        return MatrixNormalGaussian(linalg.triangular_root(self.basis_row), linalg.triangular_root(self.basis_column))


def with_second_product(
    firsts: Sequence[MatrixNormalGaussian], seconds: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]
) -> list[TwoKroneckerGaussian]:
    """Add a second Kronecker product to the precisions of matrix normals.

    Args:
        firsts: The matrix normals.
        seconds: For each the factors ``A``, ``[*blocks, in, in]``, and ``G``, ``[*blocks, out, out]``, of ``G ⊗ A``,
            symmetric; a diagonal one is ``[*blocks, 1, size]``.
        names: The layers' names, for messages.

    Returns:
        The Gaussians.
    """
    pairs = list(zip(firsts, seconds, strict=True))
    rows = [linalg.congruence(G, first.scale_tril_row) for first, (_, G) in pairs]
    columns = [linalg.congruence(A, first.scale_tril_column) for first, (A, _) in pairs]
    by_row, by_column = (linalg.map_by_shape(linalg.symmetric_eigh, side, names) for side in (rows, columns))
    return [_sum(first, *row, *column) for first, row, column in zip(firsts, by_row, by_column, strict=True)]


def _sum(first: MatrixNormalGaussian, d_U: Tensor, E_U: Tensor, d_V: Tensor, E_V: Tensor) -> TwoKroneckerGaussian:
    K_U, K_V = linalg.product(first.scale_tril_row, E_U), linalg.product(first.scale_tril_column, E_V)
    D = 1 + d_U.unsqueeze(-1) * d_V.unsqueeze(-2)
    num_clamped = (D < FLOOR).sum((-2, -1)).to(D)
    return TwoKroneckerGaussian(K_U, K_V, D.clamp(min=FLOOR), -first.logdet() / 2, num_clamped)
