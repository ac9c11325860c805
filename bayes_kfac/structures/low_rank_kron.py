"""A block whose precision is a function of two Kronecker factors that are of low rank but for a multiple of ``I``.

A factor ``Q diag(s) Qᵀ + ρ I`` has the eigenvalues ``s_i + ρ`` along its ``k`` columns, and ``ρ`` in all directions
that they leave out, its *rest*. So the precision has an eigenvalue for each pair of a column or the rest on the output
side and of one on the input side, ``Λ`` of shape ``(k_G + 1, k_A + 1)``, the rests last, and every function of it costs
products with the columns alone. Nothing of size ``out²`` or ``in²`` is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kfac.curvature import SparseRows
from bayes_kfac.structures.base import BlockGaussian, register_gaussian
from bayes_kfac.structures.whitened import WhitenedByRoot, WhitenedRows, same_for_all


@register_gaussian("low_rank_kron")
class LowRankKroneckerGaussian(BlockGaussian):
    """A zero-mean Gaussian that is white, up to a diagonal, in a basis of a few columns and their complement.

    Args:
        basis_row: ``Q_G``, orthonormal rows ``[*blocks, k_G, out]``; rows of zeros are none.
        basis_column: ``Q_A``, orthonormal rows ``[*blocks, k_A, in]``; rows of zeros are none.
        precision: ``Λ``, ``[*blocks, k_G + 1, k_A + 1]``, positive; that of the rests last.
        scale_column: The size of the coordinates on the input side in which all this is so, ``[*blocks, 1, in]``; ones
            by default.
    """

    def __init__(
        self, basis_row: Tensor, basis_column: Tensor, precision: Tensor, scale_column: Tensor | None = None
    ) -> None:
        self.basis_row = basis_row
        self.basis_column = basis_column
        self.precision = precision
        ones = basis_column.new_ones(*basis_column.shape[:-2], 1, basis_column.shape[-1])
        self.scale_column = ones if scale_column is None else scale_column

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return (*self.precision.shape[:-2], self.basis_row.shape[-1], self.basis_column.shape[-1])

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        return self._scaled(noise, self.precision.rsqrt()) * self.scale_column

    def whiten(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._scaled(value * self.scale_column, self.precision.rsqrt())

    def multiply(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._scaled(value / self.scale_column, self.precision) / self.scale_column

    def logdet(self) -> Tensor:  # noqa: D102
        rows, columns = multiplicity(self.basis_row), multiplicity(self.basis_column)
        white = (rows.unsqueeze(-1) * columns.unsqueeze(-2) * self.precision.log()).sum((-2, -1))
        return white - 2 * self.shape[-2] * self.scale_column.log().sum((-2, -1))

    def whitened(self, inputs: Tensor | SparseRows, gradients: Tensor) -> WhitenedByRoot:  # noqa: D102
        return WhitenedByRoot(WhitenedRows(inputs, same_for_all(gradients)), self.shape, self.whiten)

    def marginal_variance(self) -> Tensor:  # noqa: D102
        row, column = _shares(self.basis_row), _shares(self.basis_column)
        return row.mT @ self.precision.reciprocal() @ column * self.scale_column.square()

    def to_dense(self) -> Tensor:  # noqa: D102
        size = self.shape[-2] * self.shape[-1]
        units = torch.eye(size, dtype=self.precision.dtype, device=self.precision.device)
        units = units.reshape(size, *[1] * (len(self.shape) - 2), *self.shape[-2:]).expand(size, *self.shape)
        return self.multiply(units).flatten(-2).movedim(0, -1)

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {
            "basis_row": self.basis_row,
            "basis_column": self.basis_column,
            "precision": self.precision,
            "scale_column": self.scale_column,
        }

    def _scaled(self, value: Tensor, scale: Tensor) -> Tensor:
        """Each part of a value times its own factor of ``[*blocks, k_G + 1, k_A + 1]``."""
        rest = scale[..., -1:, -1:]
        by_row, by_column = scale[..., :-1, -1:] - rest, scale[..., -1:, :-1] - rest
        by_both = scale[..., :-1, :-1] - scale[..., :-1, -1:] - by_column
        left = self.basis_row @ value
        within = left @ self.basis_column.mT
        right = value @ self.basis_column.mT
        along_rows = by_row * left + (by_both * within) @ self.basis_column
        return rest * value + self.basis_row.mT @ along_rows + (right * by_column) @ self.basis_column


def multiplicity(basis: Tensor) -> Tensor:
    """How many dimensions each row of a basis has, and last how many it leaves out: ``[*blocks, k + 1]``."""
    return _shares(basis).sum(-1).round()


def _shares(basis: Tensor) -> Tensor:
    """How much of each coordinate is along each column, and what is left: ``[*blocks, k + 1, size]``."""
    squares = basis.square()
    rest = (1 - squares.sum(-2, keepdim=True)).clamp(min=0)
    return torch.cat([squares, rest], dim=-2)
