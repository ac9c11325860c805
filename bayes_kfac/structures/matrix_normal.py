"""The matrix normal block: ``W ~ MN(0, U, V)`` with ``cov(vec W) = U ⊗ V``, kept as two triangular square roots.

``U`` (out×out) is on the output side, ``V`` (in×in) on the input side; ``U = L_U L_Uᵀ`` and ``V = L_V L_Vᵀ`` are the
arguments of :class:`bayes_kfac.distributions.MatrixNormal`. Sampling and solving are products with the roots. The root
of a diagonal side is its diagonal, ``[*blocks, 1, size]``.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import SparseRows
from bayes_kfac.structures.base import BlockGaussian, register_gaussian
from bayes_kfac.structures.whitened import WhitenedRows, product_rows

#: The relative error of products with covariances from which on they are taken with roots, at twice the cost.
COVARIANCE_ERROR = 1e-3


@register_gaussian("matrix_normal")
class MatrixNormalGaussian(BlockGaussian):
    """A zero-mean matrix normal.

    Args:
        scale_tril_row: ``L_U``, lower triangular, ``[*blocks, out, out]`` or ``[*blocks, 1, out]``.
        scale_tril_column: ``L_V``, lower triangular, ``[*blocks, in, in]`` or ``[*blocks, 1, in]``.
    """

    def __init__(self, scale_tril_row: Tensor, scale_tril_column: Tensor) -> None:
        self.scale_tril_row = scale_tril_row
        self.scale_tril_column = scale_tril_column

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        blocks = self.scale_tril_row.shape[:-2]
        return (*blocks, self.scale_tril_row.shape[-1], self.scale_tril_column.shape[-1])

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        product = linalg.left_product(self.scale_tril_row, noise)
        return linalg.right_product(product, linalg.transpose(self.scale_tril_column))

    def whiten(self, value: Tensor) -> Tensor:  # noqa: D102
        product = linalg.left_product(linalg.transpose(self.scale_tril_row), value)
        return linalg.right_product(product, self.scale_tril_column)

    def solve(self, value: Tensor) -> Tensor:  # noqa: D102
        if self._needs_roots:
            return self.sample(self.whiten(value))
        row, column = self._covariances
        return linalg.right_product(linalg.left_product(row, value), column)

    @cached_property
    def _needs_roots(self) -> bool:
        """Whether products with ``U`` and ``V`` would be rounding where variances are small.

        ``U`` rounds by its largest eigenvalue: in float32, where data determine some directions a million times better
        than the prior does others, ``U g V`` could lead uphill. Products with the roots lose half as many digits, and
        ``⟨g, L Lᵀ g⟩`` is a square.
        """
        sides = (self.scale_tril_row, self.scale_tril_column)
        conditions = torch.stack([_condition(root).max() for root in sides])
        return bool((conditions > COVARIANCE_ERROR / torch.finfo(conditions.dtype).eps).any())

    @cached_property
    def _covariances(self) -> tuple[Tensor, Tensor]:
        """``U`` and ``V``: training solves many times with them, and each takes two products where roots take four."""
        return linalg.gram(self.scale_tril_row), linalg.gram(self.scale_tril_column)

    def multiply(self, value: Tensor) -> Tensor:  # noqa: D102
        by_row = _precision_product(self.scale_tril_row, value)
        return _precision_product(self.scale_tril_column, by_row.mT).mT

    def logdet(self) -> Tensor:  # noqa: D102
        out_features, in_features = self.shape[-2:]
        log_u = 2 * linalg.diagonal(self.scale_tril_row).log().sum(-1)
        log_v = 2 * linalg.diagonal(self.scale_tril_column).log().sum(-1)
        return -(in_features * log_u + out_features * log_v)

    def whitened(self, inputs: Tensor | SparseRows, gradients: Tensor) -> WhitenedRows:  # noqa: D102
        return product_rows(self.scale_tril_row, self.scale_tril_column, inputs, gradients)

    def marginal_variance(self) -> Tensor:  # noqa: D102
        variance_row, variance_column = _variances(self.scale_tril_row), _variances(self.scale_tril_column)
        return variance_row.unsqueeze(-1) * variance_column.unsqueeze(-2)

    def trace_covariance(self) -> Tensor:  # noqa: D102
        return self.scale_tril_row.square().sum((-2, -1)) * self.scale_tril_column.square().sum((-2, -1))

    def to_power(self, exponent: float) -> MatrixNormalGaussian:  # noqa: D102
        powers = (linalg.root_of_power(root, exponent) for root in self.state.values())
        return MatrixNormalGaussian(*map(linalg.triangular_root, powers))

    def to_dense(self) -> Tensor:  # noqa: D102
        root = linalg.kron(linalg.dense(self.scale_tril_row), linalg.dense(self.scale_tril_column))
        return torch.cholesky_inverse(root)

    @property
    def matrix_normal_roots(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.scale_tril_row, self.scale_tril_column

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"scale_tril_row": self.scale_tril_row, "scale_tril_column": self.scale_tril_column}


def _precision_product(root: Tensor, value: Tensor) -> Tensor:
    """``(R Rᵀ)⁻¹ V``."""
    return linalg.left_solve(root, linalg.left_solve(root, value), transposed=True)


def _variances(root: Tensor) -> Tensor:
    """The diagonal of ``R Rᵀ``, ``[*blocks, size]``."""
    squares = root.square()
    return linalg.diagonal(squares) if linalg.is_diagonal(root) else squares.sum(-1)


def _condition(root: Tensor) -> Tensor:
    """The condition number of ``R Rᵀ``, from below, ``[*blocks]``."""
    return _variances(root).amax(-1) / linalg.diagonal(root).square().amin(-1)
