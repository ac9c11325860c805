"""A block that is diagonal in a Kronecker-factored basis: ``P = (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ``.

``Q_G`` (out×out) and ``Q_A`` (in×in) are orthogonal, ``Λ`` is any positive ``out×in`` matrix: the exactly damped
Kronecker product has ``Λ = data_scale · d_G d_Aᵀ + prior_precision``. Not a matrix normal in general.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.structures.base import BlockGaussian, register_gaussian


@register_gaussian("kron_eigen")
class KroneckerEigenGaussian(BlockGaussian):
    """A zero-mean Gaussian with Kronecker-factored eigenvectors.

    Args:
        basis_row: ``Q_G``, ``[*blocks, out, out]``, eigenvectors as columns.
        basis_column: ``Q_A``, ``[*blocks, in, in]``, eigenvectors as columns.
        precision: ``Λ``, ``[*blocks, out, in]``.
    """

    def __init__(self, basis_row: Tensor, basis_column: Tensor, precision: Tensor) -> None:
        self.basis_row = basis_row
        self.basis_column = basis_column
        self.precision = precision

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.precision.shape)

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        return self._from_basis(noise * self.precision.rsqrt())

    def solve(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._from_basis((self.basis_row.mT @ value @ self.basis_column) / self.precision)

    def logdet(self) -> Tensor:  # noqa: D102
        return self.precision.log().sum((-2, -1))

    def quad(self, inputs: Tensor, gradients: Tensor) -> Tensor:  # noqa: D102
        # [*blocks, 1, ...]: one basis for all examples of a block
        rotated_inputs = inputs @ self.basis_column.unsqueeze(-3)
        rotated_gradients = gradients @ self.basis_row.unsqueeze(-3)
        if inputs.shape[-2] == 1:
            # a Jacobian of rank one needs no Jacobian: Σ_oi g_co g_do a_i² / Λ_oi
            weights = rotated_inputs.squeeze(-2).square() @ self.precision.reciprocal().mT
            rows = rotated_gradients.squeeze(-2)
            return torch.einsum("c...no,...no,d...no->ncd", rows, weights, rows)
        jacobians = torch.einsum("c...nto,...nti->c...noi", rotated_gradients, rotated_inputs)
        jacobians = jacobians * self.precision.rsqrt().unsqueeze(-3)
        return torch.einsum("c...noi,d...noi->ncd", jacobians, jacobians)

    def marginal_variance(self) -> Tensor:  # noqa: D102
        return self.basis_row.square() @ self.precision.reciprocal() @ self.basis_column.square().mT

    def trace_covariance(self) -> Tensor:  # noqa: D102
        return self.precision.reciprocal().sum((-2, -1))

    def to_dense(self) -> Tensor:  # noqa: D102
        basis = linalg.kron(self.basis_row, self.basis_column)
        return (basis * self.precision.flatten(-2).unsqueeze(-2)) @ basis.mT

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"basis_row": self.basis_row, "basis_column": self.basis_column, "precision": self.precision}

    def _from_basis(self, value: Tensor) -> Tensor:
        return self.basis_row @ value @ self.basis_column.mT
