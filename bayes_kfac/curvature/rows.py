"""Rows: what one forward and backward pass shows of one block.

Inputs are ``[*blocks, batch, shared, in]``; output gradients have a leading dimension of columns, one for each
output-gradient vector pulled back: ``[columns, *blocks, batch, shared, out]``. The Jacobian of column ``c`` is
``J_c = Σ_t g_ct a_tᵀ``, of shape ``(out, in)`` for each block and example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayes_kfac import linalg


@dataclass(frozen=True)
class SparseRows:
    """Input rows with few elements that are not zero, ``a = Σ_k weights_k e_{indices_k}``: words of a vocabulary.

    Attributes:
        indices: ``[batch, shared, k]``; an index may occur twice.
        weights: ``[batch, shared, k]``.
        size: The number of elements of a row.
    """

    indices: Tensor
    weights: Tensor
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows written out, ``(batch, shared, size)``."""
        return (*self.indices.shape[:-1], self.size)

    @property
    def ndim(self) -> int:
        """The number of dimensions of the rows written out."""
        return self.indices.ndim

    def to(self, dtype: torch.dtype) -> SparseRows:
        """The same rows with weights of another dtype."""
        return replace(self, weights=self.weights.to(dtype))

    def scaled(self, scale: Tensor) -> SparseRows:
        """The rows with each element times its own factor of ``[size]``."""
        return replace(self, weights=self.weights * scale[self.indices])

    def __getitem__(self, index: Any) -> SparseRows:
        """Some of the rows: an index of ``batch`` and ``shared``, whole in the last dimension."""
        return replace(self, indices=self.indices[index], weights=self.weights[index])

    def dense(self) -> Tensor:
        """The rows written out, ``[batch, shared, size]``."""
        rows = self.weights.new_zeros(self.shape)
        return rows.scatter_add_(-1, self.indices, self.weights)

    def second_moment(self, *, scale: Tensor | None = None) -> Tensor:
        """The diagonal of ``Σ a aᵀ`` over all rows, ``[1, size]``.

        Args:
            scale: A factor on each row, ``[batch, shared]``.

        Returns:
            The sum; it is of all rows, not their mean.
        """
        weights = self.weights if scale is None else self.weights * scale.unsqueeze(-1)
        flat, values = self.indices.flatten(0, 1), weights.flatten(0, 1)
        if flat.shape[-1] > 1:  # an index that occurs twice in a row has the sum of its weights
            keys = flat + torch.arange(len(flat), device=flat.device).unsqueeze(-1) * self.size
            unique, position = keys.unique(return_inverse=True)
            values = values.new_zeros(len(unique)).scatter_add_(0, position.flatten(), values.flatten())
            flat = unique % self.size
        total = values.new_zeros(self.size).scatter_add_(0, flat.flatten(), values.square().flatten())
        return total.unsqueeze(0)

    def gram(self, scale: Tensor) -> Tensor:
        """``a_t diag(scale) a_uᵀ`` for all pairs of rows of an example, ``[batch, shared, shared]``.

        Args:
            scale: ``[size]``.

        Returns:
            The products.
        """
        batch, shared, count = self.indices.shape
        indices, weights = self.indices.flatten(1), self.weights.flatten(1)
        same = indices.unsqueeze(-1) == indices.unsqueeze(-2)
        pairs = same * (weights * scale[indices]).unsqueeze(-1) * weights.unsqueeze(-2)
        return pairs.reshape(batch, shared, count, shared, count).sum((2, 4))


@dataclass(frozen=True)
class Rows:
    """What one forward and backward pass shows of one block.

    Attributes:
        inputs: ``[*blocks, batch, shared, in]``, with the 1 of the bias.
        gradients: ``[columns, *blocks, batch, shared, out]``.
        transposed: Uses in which the block's matrix is transposed, as an embedding's is where it is tied to the output
            layer: their inputs are on the block's ``out`` side, their gradients on its ``in`` side.
        mask: Which positions weigh, ``[batch, shared]``; ``None`` for all.
        examples: How many examples the rows come from, where it is not the length of the batch.
        share: How much of what is not summed over columns counts here, where columns are pulled back in parts: shares
            add up to 1, and what has a share of 0 need not be computed again.
    """

    inputs: Tensor | SparseRows
    gradients: Tensor
    transposed: Rows | None = None
    mask: Tensor | None = None
    examples: float | None = None
    share: float = 1.0

    @property
    def num_examples(self) -> float:
        """How many examples the rows come from, by their share."""
        return self.share * (self.inputs.shape[-3] if self.examples is None else self.examples)

    @property
    def num_rows(self) -> float:
        """How many positions of all examples weigh, by their share."""
        batch, shared = self.inputs.shape[-3:-1]
        return self.share * float(batch * shared if self.mask is None else self.mask.sum())

    def to(self, dtype: torch.dtype) -> Rows:
        """The same rows in another dtype."""
        transposed = None if self.transposed is None else self.transposed.to(dtype)
        return replace(self, inputs=self.inputs.to(dtype), gradients=self.gradients.to(dtype), transposed=transposed)

    def for_algebra(self) -> Rows:
        """The same rows in the dtype that they are summed in."""
        return self.to(linalg.algebra_dtype(self.gradients.dtype))

    def pooled(self) -> Rows:
        """One position for each example: the mean of its inputs and the sum of its gradients."""
        gradients = self.gradients.sum(-2, keepdim=True)
        batch, shared = self.inputs.shape[-3:-1]
        every = self.gradients.new_ones((), dtype=torch.bool).expand(batch, shared)
        weighs = every if self.mask is None else self.mask
        weights = weighs.to(self.gradients.dtype) / weighs.sum(-1, keepdim=True).clamp(min=1)
        # an example that does not use the layer has no mean
        mask = None if self.mask is None and shared else weighs.any(-1, keepdim=True)
        if isinstance(self.inputs, Tensor):
            weights = weights.to(self.inputs.dtype)
            inputs: Tensor | SparseRows = (self.inputs * weights.unsqueeze(-1)).sum(-2, keepdim=True)
        else:
            flat = (self.inputs.weights * weights.unsqueeze(-1)).flatten(1).unsqueeze(1)
            inputs = SparseRows(self.inputs.indices.flatten(1).unsqueeze(1), flat, self.inputs.size)
        return Rows(inputs, gradients, mask=mask, examples=self.examples, share=self.share)

    def total(self, column: int) -> Tensor:
        """The sum of one column's Jacobians over all examples, ``[*blocks, out, in]``: a gradient of the weights."""
        gradients = self.gradients[column].flatten(-3, -2)
        if isinstance(self.inputs, SparseRows):
            flat, weights = self.inputs.indices.flatten(0, 1), self.inputs.weights.flatten(0, 1)
            scattered = gradients.new_zeros(self.inputs.size, gradients.shape[-1])
            for k in range(flat.shape[-1]):
                scattered.index_add_(0, flat[:, k], gradients * weights[:, k : k + 1])
            total = scattered.mT
        else:
            total = gradients.mT @ self.inputs.flatten(-3, -2).to(gradients.dtype)
        return total if self.transposed is None else total + self.transposed.total(column).mT

    def magnitude(self, column: int) -> Tensor:
        """A bound of :meth:`total`'s norm, and of the size of what cancels in it: the norms' product."""
        values = self.inputs.weights if isinstance(self.inputs, SparseRows) else self.inputs
        own = torch.linalg.vector_norm(values.float()) * torch.linalg.vector_norm(self.gradients[column].float())
        return own if self.transposed is None else own + self.transposed.magnitude(column)

    def response(self, change: Tensor) -> Tensor:
        """What changes of the weights do to the outputs to first order, ``Σ_t g_ct · (δW a_t)``.

        Args:
            change: ``δW``, ``[draws, *blocks, out, in]``.

        Returns:
            ``[draws, batch, columns]``, summed over blocks.
        """
        if isinstance(self.inputs, SparseRows):
            chosen = change.mT[:, self.inputs.indices]  # [draws, batch, shared, k, out]
            outputs = (chosen * self.inputs.weights.unsqueeze(-1)).sum(-2)
        else:
            outputs = torch.einsum("...nti,s...oi->s...nto", self.inputs, change)
        own = torch.einsum("c...nto,s...nto->snc", self.gradients, outputs)
        return own if self.transposed is None else own + self.transposed.response(change.mT)

    def jacobians(self) -> Tensor:
        """``J_c = Σ_t g_ct a_tᵀ`` over all uses, ``[columns, *blocks, batch, out, in]``."""
        inputs = self.inputs if isinstance(self.inputs, Tensor) else self.inputs.dense()
        jacobians = torch.einsum("c...nto,...nti->c...noi", self.gradients, inputs)
        return jacobians if self.transposed is None else jacobians + self.transposed.jacobians().mT


def side_by_side(calls: Sequence[Rows]) -> Rows:
    """The rows of several calls as one, laid along ``shared``: the calls use the same weights."""
    if len(calls) == 1:
        return calls[0]
    inputs: Tensor | SparseRows
    if isinstance(calls[0].inputs, SparseRows):
        sparse = [call.inputs for call in calls if isinstance(call.inputs, SparseRows)]
        most = max(rows.indices.shape[-1] for rows in sparse)
        widen = [(0, most - rows.indices.shape[-1]) for rows in sparse]
        inputs = SparseRows(
            torch.cat([torch.nn.functional.pad(r.indices, w) for r, w in zip(sparse, widen, strict=True)], dim=1),
            torch.cat([torch.nn.functional.pad(r.weights, w) for r, w in zip(sparse, widen, strict=True)], dim=1),
            sparse[0].size,
        )
    else:
        inputs = torch.cat([call.inputs for call in calls if isinstance(call.inputs, Tensor)], dim=-2)
    masks = None
    if any(call.mask is not None for call in calls):
        every = calls[0].gradients.new_ones((), dtype=torch.bool)
        masks = [every.expand(call.inputs.shape[-3:-1]) if call.mask is None else call.mask for call in calls]
    return replace(
        calls[0],
        inputs=inputs,
        gradients=torch.cat([call.gradients for call in calls], dim=-2),
        mask=None if masks is None else torch.cat(masks, dim=-1),
    )


def of_all_columns(parts: Sequence[Rows]) -> Rows:
    """The rows of several parts of a batch's columns as one."""
    if len(parts) == 1:
        return parts[0]
    transposed = [part.transposed for part in parts if part.transposed is not None]
    return replace(
        parts[0],
        gradients=torch.cat([part.gradients for part in parts]),
        transposed=of_all_columns(transposed) if transposed else None,
    )
