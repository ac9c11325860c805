"""The Fisher of a block rearranged: a linear map between matrices of its two sides, known by a few of its images.

``F = E[vec J vec Jᵀ]`` is the map ``M V = E[Jᵀ V J]`` from out×out to in×in, with adjoint ``Mᵀ R = E[J R Jᵀ]``, and a
Kronecker product ``G ⊗ A`` is the map ``V ↦ ⟨G, V⟩ A`` of rank one. So the sum of ``k`` Kronecker products nearest to
``F`` in the Frobenius norm is the sum of the leading ``k`` terms of the map's singular value decomposition (Van Loan &
Pitsianis 1993). A pass over the data shows ``Y = M V`` and ``X = Mᵀ R`` for a few ``V`` and ``R``. The least map that
agrees with both,

    ``Y V⁺ + (R⁺)ᵀ Xᵀ − (R⁺)ᵀ (Rᵀ Y) V⁺``,

lives on the spans of ``V, X`` and of ``R, Y``, where it is a small matrix; it lacks of ``M`` what maps from beyond
``V`` to beyond ``R``. Its leading singular vectors are the next ``V`` and ``R``: a power iteration where there is one,
a block Krylov method with restarts where there are more.

Matrices are flattened, ``[*blocks, k, d]``; where a side is diagonal, these are its diagonals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

#: Vectors of a span that are shorter than this, relatively and squared, are rounding.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class RearrangedFisher:
    """The least map ``M`` with ``M V_j = Y_j`` and ``Mᵀ R_j = X_j``. All float64.

    Attributes:
        rows: ``V``, ``[*blocks, k, d_out]``; zeros say nothing.
        columns: ``R``, ``[*blocks, k, d_in]``.
        images: ``Y``, ``[*blocks, k, d_in]``.
        adjoint_images: ``X``, ``[*blocks, k, d_out]``.
    """

    rows: Tensor
    columns: Tensor
    images: Tensor
    adjoint_images: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, images: Tensor, adjoint_images: Tensor) -> RearrangedFisher:
        """The map from factors ``[*blocks, k, size, size]`` or ``[*blocks, k, 1, size]``."""
        return cls(*(factors.flatten(-2).double() for factors in (rows, columns, images, adjoint_images)))

    def minus(self, row: Tensor, column: Tensor) -> RearrangedFisher:
        """The same less the Kronecker product of two factors, ``[*blocks, size, size]`` or ``[*blocks, 1, size]``."""
        row, column = row.flatten(-2).double().unsqueeze(-2), column.flatten(-2).double().unsqueeze(-2)
        return replace(
            self,
            images=self.images - self.rows @ row.mT * column,
            adjoint_images=self.adjoint_images - self.columns @ column.mT * row,
        )

    def image(self, rows: Tensor) -> Tensor:
        """``M V`` for ``V`` of shape ``[*blocks, k, d_out]``."""
        return rows @ self._row_basis.mT @ self._core.mT @ self._column_basis

    def adjoint_image(self, columns: Tensor) -> Tensor:
        """``Mᵀ R`` for ``R`` of shape ``[*blocks, k, d_in]``."""
        return columns @ self._column_basis.mT @ self._core @ self._row_basis

    def singular_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition, largest first.

        Returns:
            The singular vectors ``[*blocks, 2k, d_out]``, the values ``[*blocks, 2k]``, and the singular vectors
            ``[*blocks, 2k, d_in]``; those of the value zero are any, or zero.
        """
        left, values, right = torch.linalg.svd(self._core)
        return right @ self._row_basis, values, left.mT @ self._column_basis

    @property
    def _row_basis(self) -> Tensor:
        return self._row_span[0]

    @property
    def _column_basis(self) -> Tensor:
        return self._column_span[0]

    @cached_property
    def _row_span(self) -> tuple[Tensor, Tensor]:
        return _orthonormal(torch.cat([self.rows, self.adjoint_images], -2))

    @cached_property
    def _column_span(self) -> tuple[Tensor, Tensor]:
        return _orthonormal(torch.cat([self.columns, self.images], -2))

    @cached_property
    def _core(self) -> Tensor:
        """The map in orthonormal bases of the two spans, ``[*blocks, 2k, 2k]``."""
        V, X = self._row_span[1].chunk(2, -2)
        R, Y = self._column_span[1].chunk(2, -2)
        R_inverse = torch.linalg.pinv(R, rtol=NEGLIGIBLE**0.5)
        by_image = Y.mT @ torch.linalg.pinv(V.mT, rtol=NEGLIGIBLE**0.5)
        return by_image - R_inverse @ (R @ by_image) + R_inverse @ X


def _orthonormal(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis ``B`` of the span of the rows, and their coordinates ``C``: ``rows = C B``.

    Args:
        vectors: ``[*blocks, k, d]``.

    Returns:
        ``B``, ``[*blocks, k, d]``, with zeros where the span has fewer dimensions, and ``C``, ``[*blocks, k, k]``.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    directions = vectors / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    values, rotation = torch.linalg.eigh(directions @ directions.mT)
    is_spanned = values > NEGLIGIBLE
    roots = torch.where(is_spanned, values, torch.ones_like(values)).sqrt()
    basis = (rotation * (is_spanned / roots).unsqueeze(-2)).mT @ directions
    return basis, lengths * rotation * (is_spanned * roots).unsqueeze(-2)
