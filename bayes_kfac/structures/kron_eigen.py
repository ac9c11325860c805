"""A block that is diagonal in a Kronecker-factored basis: ``P⁻¹ = (B_G ⊗ B_A) diag(Λ)⁻¹ (B_G ⊗ B_A)ᵀ``.

``B_G`` (out×out) and ``B_A`` (in×in) are regular, ``Λ`` is any positive ``out×in`` matrix. Every sum of two Kronecker
products ``R ⊗ S + s G ⊗ A`` is of this form, by the eigenvectors ``Q`` of ``G`` and ``A`` whitened by ``R`` and ``S``:
``B_G = R^(-1/2) Q_G``, ``B_A = S^(-1/2) Q_A`` and ``Λ = 1 + s d_G d_Aᵀ``. Where ``R ⊗ S`` is a multiple of the
identity the bases are orthogonal. Not a matrix normal in general. A diagonal side is kept as its diagonal,
``[*blocks, 1, size]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import SparseRows
from bayes_kfac.structures.alternating import alternated
from bayes_kfac.structures.base import BlockGaussian, register_gaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian
from bayes_kfac.structures.whitened import WhitenedRows, product_rows

#: How far the vectors of a basis may be from orthogonal, relatively, for it to be a rotation up to its scale.
ORTHOGONAL = 1e-4


@register_gaussian("kron_eigen")
class KroneckerEigenGaussian(BlockGaussian):
    """A zero-mean Gaussian that is white in a Kronecker-factored basis, up to a diagonal.

    Args:
        basis_row: ``B_G``, ``[*blocks, out, out]``.
        basis_column: ``B_A``, ``[*blocks, in, in]``.
        precision: ``Λ``, ``[*blocks, out, in]``.
        log_volume: ``log |det (B_G ⊗ B_A)|``, ``[*blocks]``; 0 by default, as for orthogonal bases.
    """

    def __init__(
        self, basis_row: Tensor, basis_column: Tensor, precision: Tensor, log_volume: Tensor | None = None
    ) -> None:
        self.basis_row = basis_row
        self.basis_column = basis_column
        self.precision = precision
        self.log_volume = precision.new_zeros(precision.shape[:-2]) if log_volume is None else log_volume

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.precision.shape)

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        rotated = linalg.left_product(self.basis_row, noise * self.precision.rsqrt())
        return linalg.right_product(rotated, linalg.transpose(self.basis_column))

    def whiten(self, value: Tensor) -> Tensor:  # noqa: D102
        rotated = linalg.left_product(linalg.transpose(self.basis_row), value)
        return linalg.right_product(rotated, self.basis_column) * self.precision.rsqrt()

    def multiply(self, value: Tensor) -> Tensor:  # noqa: D102
        inner = _solve(self.basis_column, _solve(self.basis_row, value).mT).mT * self.precision
        by_row = _solve(linalg.transpose(self.basis_row), inner)
        return _solve(linalg.transpose(self.basis_column), by_row.mT).mT

    def logdet(self) -> Tensor:  # noqa: D102
        return self.precision.log().sum((-2, -1)) - 2 * self.log_volume

    def whitened(self, inputs: Tensor | SparseRows, gradients: Tensor) -> WhitenedRows:  # noqa: D102
        return product_rows(self.basis_row, self.basis_column, inputs, gradients, self.precision.reciprocal())

    def marginal_variance(self) -> Tensor:  # noqa: D102
        variance = linalg.left_product(self.basis_row.square(), self.precision.reciprocal())
        return linalg.right_product(variance, linalg.transpose(self.basis_column.square()))

    def to_power(self, exponent: float) -> BlockGaussian:  # noqa: D102
        row, column = squared_lengths(self.basis_row), squared_lengths(self.basis_column)
        if row is None or column is None:
            return super().to_power(exponent)
        eigenvalues = self.precision / (row * column)[..., None, None]
        bases = (self.basis_row / row.sqrt()[..., None, None], self.basis_column / column.sqrt()[..., None, None])
        return KroneckerEigenGaussian(*bases, eigenvalues**exponent)

    def to_dense(self) -> Tensor:  # noqa: D102
        inverse = linalg.kron(*(torch.linalg.inv(linalg.dense(basis)) for basis in (self.basis_row, self.basis_column)))
        return (inverse.mT * self.precision.flatten(-2).unsqueeze(-2)) @ inverse

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {
            "basis_row": self.basis_row,
            "basis_column": self.basis_column,
            "precision": self.precision,
            "log_volume": self.log_volume,
        }

    def as_prior(self) -> MatrixNormalGaussian:  # noqa: D102
        return self.nearest_matrix_normal()

    def nearest_matrix_normal(self) -> MatrixNormalGaussian:
        """The matrix normal ``q`` nearest in ``KL(q ‖ p)`` to this Gaussian ``p``.

        In the basis it is ``diag(u) ⊗ diag(v)`` with ``1/u_o = Σ_i Λ_oi v_i / in`` and ``1/v_i = Σ_o Λ_oi u_o / out``.

        Returns:
            The matrix normal.
        """
        out_features, in_features = self.shape[-2:]
        precision = self.precision.double()  # in float32 rounding would end the turns early
        sides = alternated(
            lambda column: in_features / (precision @ column.unsqueeze(-1)).squeeze(-1),
            lambda row: out_features / (precision.mT @ row.unsqueeze(-1)).squeeze(-1),
            precision.new_ones(*self.shape[:-2], in_features),
        )
        roots = (
            linalg.triangular_root(linalg.product(basis.double(), side.sqrt().unsqueeze(-2))).to(basis)
            for basis, side in zip((self.basis_row, self.basis_column), sides, strict=True)
        )
        return MatrixNormalGaussian(*roots)


def _solve(basis: Tensor, value: Tensor) -> Tensor:
    return value / basis.mT if linalg.is_diagonal(basis) else torch.linalg.solve(basis, value)


def squared_lengths(basis: Tensor) -> Tensor | None:
    """The squared length of the vectors of a basis, ``[*blocks]``, if they are orthogonal and of one length."""
    squares = linalg.gram(basis)
    lengths = linalg.diagonal(squares).mean(-1)
    other = linalg.add_to_diagonal(squares, -lengths).abs().amax((-2, -1))
    return lengths if bool((other <= ORTHOGONAL * lengths).all()) else None
