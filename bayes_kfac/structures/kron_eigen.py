"""A block that is diagonal in a Kronecker-factored basis: ``P = (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ``.

``Q_G`` (out×out) and ``Q_A`` (in×in) are orthogonal, ``Λ`` is any positive ``out×in`` matrix: the exactly damped
Kronecker product has ``Λ = data_scale · d_G d_Aᵀ + prior_precision``. Not a matrix normal in general. The basis of a
diagonal factor is the identity, kept as ones ``[*blocks, 1, size]``.
"""

from __future__ import annotations

from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import SparseRows
from bayes_kfac.structures.base import register_gaussian
from bayes_kfac.structures.diagonal import DiagonalGaussian


@register_gaussian("kron_eigen")
class KroneckerEigenGaussian(DiagonalGaussian):
    """A zero-mean Gaussian with Kronecker-factored eigenvectors.

    Args:
        basis_row: ``Q_G``, ``[*blocks, out, out]``, eigenvectors as columns.
        basis_column: ``Q_A``, ``[*blocks, in, in]``, eigenvectors as columns.
        precision: ``Λ``, ``[*blocks, out, in]``.
    """

    def __init__(self, basis_row: Tensor, basis_column: Tensor, precision: Tensor) -> None:
        super().__init__(precision)
        self.basis_row = basis_row
        self.basis_column = basis_column

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        return self._from_basis(super().sample(noise))

    def solve(self, value: Tensor) -> Tensor:  # noqa: D102
        rotated = linalg.left_product(linalg.transpose(self.basis_row), value)
        return self._from_basis(super().solve(linalg.right_product(rotated, self.basis_column)))

    def quad(self, inputs: Tensor | SparseRows, gradients: Tensor) -> Tensor:  # noqa: D102
        # [*blocks, 1, ...]: one basis for all examples of a block
        if isinstance(inputs, Tensor):  # sparse rows come with the identity for their basis
            inputs = linalg.right_product(inputs, self.basis_column.unsqueeze(-3))
        return super().quad(inputs, linalg.right_product(gradients, self.basis_row.unsqueeze(-3)))

    def marginal_variance(self) -> Tensor:  # noqa: D102
        variance = linalg.left_product(self.basis_row.square(), self.precision.reciprocal())
        return linalg.right_product(variance, linalg.transpose(self.basis_column.square()))

    def trace_covariance(self) -> Tensor:  # noqa: D102
        return self.precision.reciprocal().sum((-2, -1))

    def to_dense(self) -> Tensor:  # noqa: D102
        basis = linalg.kron(linalg.dense(self.basis_row), linalg.dense(self.basis_column))
        return (basis * self.precision.flatten(-2).unsqueeze(-2)) @ basis.mT

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"basis_row": self.basis_row, "basis_column": self.basis_column, "precision": self.precision}

    def _from_basis(self, value: Tensor) -> Tensor:
        rotated = linalg.left_product(self.basis_row, value)
        return linalg.right_product(rotated, linalg.transpose(self.basis_column))
