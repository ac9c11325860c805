"""A block whose precision is low-rank plus diagonal, ``P = D^(1/2) (I + Σ_k w_k w_kᵀ) D^(1/2)``.

The columns ``w_k``, of the shape of the block, are orthogonal to each other, so that every function of the matrix in
the middle acts on each of them alone: ``f(I + Σ w wᵀ) = f(1) I + Σ (f(1 + s) − f(1)) / s · w wᵀ`` with ``s = ‖w‖²``.
Any ``D + U Uᵀ`` is of this form, by the eigenvectors of the ``k×k`` matrix ``Uᵀ D⁻¹ U``: this is the identity of
Sherman, Morrison and Woodbury and its like for the root and the determinant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import SparseRows, principal
from bayes_kfac.structures.base import BlockGaussian, register_gaussian
from bayes_kfac.structures.whitened import WhitenedByRoot, WhitenedRows, same_for_all


@register_gaussian("low_rank")
class LowRankGaussian(BlockGaussian):
    """A zero-mean Gaussian whose precision is a diagonal and a few columns.

    Args:
        columns: ``w``, ``[*blocks, k, out, in]``, orthogonal to each other; see :meth:`of` for any others.
        diagonal: The diagonal of ``D``, ``[*blocks, out, in]``, positive.
    """

    def __init__(self, columns: Tensor, diagonal: Tensor) -> None:
        self.columns = columns
        self.diagonal = diagonal

    @classmethod
    def of(cls, columns: Sequence[Tensor], diagonals: Sequence[Tensor], names: Sequence[str]) -> list[LowRankGaussian]:
        """The Gaussians with precisions ``D + Σ_k u_k u_kᵀ``, in one call for blocks of equal shape.

        Args:
            columns: ``u``, ``[*blocks, k, out, in]``, of each block.
            diagonals: ``D``, ``[*blocks, out, in]``, of each block.
            names: The blocks' names, for messages.

        Returns:
            The Gaussians, in the order given.
        """
        white = [own * diagonal.rsqrt().unsqueeze(-3) for own, diagonal in zip(columns, diagonals, strict=True)]
        # in float64: what float32 leaves of dependent columns is long beside the prior and orthogonal to nothing
        rotated = linalg.map_by_shape(
            lambda stack, members: (principal(stack, stack.shape[-3], members),), white, names
        )
        return [cls(own, diagonal) for (own,), diagonal in zip(rotated, diagonals, strict=True)]

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.diagonal.shape)

    @property
    def squares(self) -> Tensor:
        """``s``, the eigenvalues of ``Uᵀ D⁻¹ U``, ``[*blocks, k]``."""
        return self.columns.square().sum((-2, -1))

    def root(self, value: Tensor) -> Tensor:
        """``(I + Σ w wᵀ)^(-1/2) V`` for ``V`` of shape ``[..., *blocks, out, in]``."""
        lengths = (1 + self.squares).sqrt()
        return self._changed(value, -1 / (lengths * (1 + lengths)))  # (1 / r − 1) / (r² − 1), also where r = 1

    def sample(self, noise: Tensor) -> Tensor:  # noqa: D102
        return self.root(noise) * self.diagonal.rsqrt()

    def whiten(self, value: Tensor) -> Tensor:  # noqa: D102
        return self.root(value * self.diagonal.rsqrt())

    def multiply(self, value: Tensor) -> Tensor:  # noqa: D102
        scale = self.diagonal.sqrt()
        return self._changed(value * scale, torch.ones_like(self.squares)) * scale

    def logdet(self) -> Tensor:  # noqa: D102
        return self.diagonal.log().sum((-2, -1)) + self.squares.log1p().sum(-1)

    def whitened(self, inputs: Tensor | SparseRows, gradients: Tensor) -> WhitenedByRoot:  # noqa: D102
        rows = WhitenedRows(inputs, same_for_all(gradients), self.diagonal.reciprocal())
        return WhitenedByRoot(rows, self.shape, self.root)

    def marginal_variance(self) -> Tensor:  # noqa: D102
        weights = (1 / (1 + self.squares))[..., None, None]
        variance = 1 - (self.columns.square() * weights).sum(-3)
        # no variance is below that given all other weights, where rounding would have it so
        return torch.maximum(variance, 1 / (1 + self.columns.square().sum(-3))) / self.diagonal

    def to_dense(self) -> Tensor:  # noqa: D102
        columns = (self.columns * self.diagonal.sqrt().unsqueeze(-3)).flatten(-2)
        return columns.mT @ columns + torch.diag_embed(self.diagonal.flatten(-2))

    @property
    def state(self) -> dict[str, Tensor]:  # noqa: D102
        return {"columns": self.columns, "diagonal": self.diagonal}

    def _changed(self, value: Tensor, weights: Tensor) -> Tensor:
        """``V + Σ_k weights_k w_k ⟨w_k, V⟩``."""
        products = torch.einsum("...koi,...oi->...k", self.columns, value)
        return value + torch.einsum("...koi,...k->...oi", self.columns, products * weights)
