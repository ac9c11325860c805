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


@dataclass(frozen=True)
class RearrangedFisher:
    """The least map ``M`` with ``M V_j = Y_j`` and ``Mᵀ R_j = X_j``.

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
        return cls(*(factors.flatten(-2) for factors in (rows, columns, images, adjoint_images)))

    def minus(self, row: Tensor, column: Tensor) -> RearrangedFisher:
        """The same less the Kronecker product of two factors, ``[*blocks, size, size]`` or ``[*blocks, 1, size]``."""
        row, column = row.flatten(-2).unsqueeze(-2), column.flatten(-2).unsqueeze(-2)
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

    def singular_pairs(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The leading terms of the singular value decomposition; zeros for values that are rounding.

        Args:
            count: How many.

        Returns:
            The singular vectors ``[*blocks, count, d_out]``, the values ``[*blocks, count]``, and the singular vectors
            ``[*blocks, count, d_in]``.
        """
        left, values, right = torch.linalg.svd(self._core, full_matrices=False)
        values = values * (values > _tolerance(values) * values[..., :1])
        rows, columns = right @ self._row_basis, left.mT @ self._column_basis
        is_large = (values > 0).unsqueeze(-1)
        terms = rows * is_large, values.unsqueeze(-1), columns * is_large
        rows, values, columns = (_first(term, count) for term in terms)
        return rows, values.squeeze(-1), columns

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
        """The map in orthonormal bases of the two spans, ``[*blocks, ≤ 2k, ≤ 2k]``."""
        V, X = self._row_span[1].chunk(2, -2)
        R, Y = self._column_span[1].chunk(2, -2)
        (V, Y), (R, X) = _of_length_one(V, Y), _of_length_one(R, X)
        R_inverse = torch.linalg.pinv(R, rtol=_tolerance(R))
        by_image = Y.mT @ torch.linalg.pinv(V.mT, rtol=_tolerance(V))
        return by_image - R_inverse @ (R @ by_image) + R_inverse @ X


def _orthonormal(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows ``B`` whose span holds all vectors, and their coordinates ``C``: ``vectors = C B``.

    Args:
        vectors: ``[*blocks, k, d]``.

    Returns:
        ``B``, ``[*blocks, min(k, d), d]``, and ``C``, ``[*blocks, k, min(k, d)]``.
    """
    basis, coordinates = torch.linalg.qr(vectors.mT)
    return basis.mT, coordinates.mT


def _of_length_one(vectors: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors and their images, scaled alike; zeros stay."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    inverse = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    return vectors * inverse, images * inverse


def _first(vectors: Tensor, count: int) -> Tensor:
    """The first vectors of a stack, or all and zeros."""
    missing = max(0, count - vectors.shape[-2])
    return torch.nn.functional.pad(vectors[..., :count, :], (0, 0, 0, missing))


def _tolerance(like: Tensor) -> float:
    """What is rounding, relative to what is largest."""
    return float(torch.finfo(like.dtype).eps ** 0.5)
