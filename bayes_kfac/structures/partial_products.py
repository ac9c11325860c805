"""Sums of ``Jᵀ V J`` and ``J R Jᵀ`` over examples and columns, from rows, for any matrices ``V`` and ``R``.

They are what the Fisher of a block does as a linear map between matrices of its two sides, ``V ↦ E[Jᵀ V J]`` (in×in
from out×out) and its adjoint ``R ↦ E[J R Jᵀ]``; with ``V = I`` and ``R = I`` they are its partial traces.
``J = Σ_t g_t a_tᵀ`` is each example's Jacobian. It is written out where positions are many. Where they are few,

    ``Jᵀ V J = Σ_tu (g_t · V g_u) a_t a_uᵀ`` and ``J R Jᵀ = Σ_tu (a_t · R a_u) g_t g_uᵀ``

need no Jacobian; which, is a matter of counts. On a side where inputs are sparse there are diagonals alone,
``[..., 1, size]``: ``V`` or ``R`` is one, and so is what is summed on that side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.curvature import Rows, SparseRows
from bayes_kfac.structures.jacobian import small_pieces, word_columns


def partial_products(rows: Rows, row_side: Tensor, column_side: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over examples and columns of ``J R Jᵀ`` and ``Jᵀ V J`` for ``k`` matrices of each side.

    Args:
        rows: What a batch shows of the block.
        row_side: ``V``, ``[*blocks, k, out, out]``, symmetric, or diagonals ``[*blocks, k, 1, out]``.
        column_side: ``R``, ``[*blocks, k, in, in]``, symmetric, or diagonals ``[*blocks, k, 1, in]``.

    Returns:
        ``Σ J R Jᵀ`` in the shape of ``V``, and ``Σ Jᵀ V J`` in the shape of ``R``.
    """
    by_row, by_column = torch.zeros_like(row_side), torch.zeros_like(column_side)
    sides = row_side.to(rows.gradients), column_side.to(rows.gradients)
    columns, shared, out_features = rows.gradients.shape[0], *rows.gradients.shape[-2:]
    in_features, count = rows.inputs.shape[-1], row_side.shape[-3]
    if isinstance(rows.inputs, SparseRows) and rows.transposed is None:
        return _of_words(rows.inputs, rows.gradients, *sides)
    # operations for one example
    by_position = 2 * count * shared * (columns * out_features**2 + in_features**2)
    by_position += 2 * count * shared**2 * (columns * out_features + in_features)
    by_jacobian = columns * out_features * in_features * (shared + 2 * count * (out_features + in_features))
    if rows.transposed is None and by_position <= by_jacobian:
        function, size = _by_positions, columns * shared * count * (shared + out_features + in_features)
    else:
        function, size = _by_jacobians, 2 * columns * out_features * in_features
    for piece in small_pieces(rows, size):
        more_by_row, more_by_column = function(piece, *sides)
        by_row, by_column = by_row + more_by_row, by_column + more_by_column
    return by_row, by_column


def _by_positions(rows: Rows, row_side: Tensor, column_side: Tensor) -> tuple[Tensor, Tensor]:
    """Through the products of positions, ``[*blocks, k, columns, batch, shared, shared]``."""
    assert isinstance(rows.inputs, Tensor)
    inputs, gradients = rows.inputs.unsqueeze(-4), rows.gradients.movedim(0, -4)
    of_inputs = _products(inputs, column_side)
    of_gradients = _products(gradients, row_side).sum(-4, keepdim=True)
    by_row = _second_moment(of_inputs, gradients, diagonal=linalg.is_diagonal(row_side))
    return by_row, _second_moment(of_gradients, inputs, diagonal=linalg.is_diagonal(column_side))


def _products(vectors: Tensor, factors: Tensor) -> Tensor:
    """``x_t · F x_u`` within each example, ``[*blocks, k, columns, batch, shared, shared]``."""
    flat = vectors.flatten(-4, -2).unsqueeze(-3)
    images = linalg.right_product(flat, factors).unflatten(-2, vectors.shape[-4:-1])
    vectors = vectors.unsqueeze(-5)
    if vectors.shape[-2] == 1:
        return (images * vectors).sum(-1, keepdim=True)
    return images @ vectors.mT


def _second_moment(kernel: Tensor, vectors: Tensor, *, diagonal: bool) -> Tensor:
    """``Σ_tu K_tu x_t x_uᵀ`` over columns and examples, ``[*blocks, k, size, size]``, or its diagonal."""
    vectors = vectors.unsqueeze(-5)
    weighted = kernel * vectors if vectors.shape[-2] == 1 else kernel @ vectors
    weighted, vectors = weighted.flatten(-4, -2), vectors.flatten(-4, -2)
    return (weighted * vectors).sum(-2, keepdim=True) if diagonal else weighted.mT @ vectors


def _by_jacobians(rows: Rows, row_side: Tensor, column_side: Tensor) -> tuple[Tensor, Tensor]:
    """Through each example's Jacobians, for one matrix after the other."""
    J = rows.jacobians().movedim(0, -4).flatten(-4, -3)  # [*blocks, columns · batch, out, in]
    by_row, by_column = [], []
    for V, R in zip(row_side.unbind(-3), column_side.unbind(-3), strict=True):
        J_R, V_J = linalg.right_product(J, R.unsqueeze(-3)), linalg.left_product(V.unsqueeze(-3), J)
        if linalg.is_diagonal(V):
            by_row.append((J_R * J).sum((-3, -1)).unsqueeze(-2))
        else:
            by_row.append(torch.einsum("...noi,...npi->...op", J_R, J))
        if linalg.is_diagonal(R):
            by_column.append((V_J * J).sum((-3, -2)).unsqueeze(-2))
        else:
            by_column.append(torch.einsum("...noi,...noj->...ij", V_J, J))
    return torch.stack(by_row, -3), torch.stack(by_column, -3)


def _of_words(inputs: SparseRows, gradients: Tensor, row_side: Tensor, column_side: Tensor) -> tuple[Tensor, Tensor]:
    """By the columns of Jacobians that are not zero."""
    words, J = word_columns(inputs, gradients)
    J = J.movedim(0, 1).unsqueeze(1)  # [columns, 1, words, out]
    weighted = J * column_side[:, 0, words].unsqueeze(-1)
    by_row = (weighted.mT @ J).sum(0)
    quadratic = (linalg.right_product(J, row_side) * J).sum((0, -1))
    return by_row, torch.zeros_like(column_side).index_add(-1, words, quadratic.unsqueeze(-2))
