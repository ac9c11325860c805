"""Structures that see each example's own Jacobian, and not its two sides apart: dense, diagonal, unit-wise.

Their one statistic is ``fisher``, a sum over examples and output-gradient columns. The prior enters exactly, whatever
``damping`` says, positions that share weights are summed exactly, whatever ``sharing`` says, and every kind of block is
treated alike. Jacobians are formed for as many examples at a time as memory likes (:func:`pieces`); of words of a
vocabulary only the columns that are not zero are (:func:`word_columns`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bayes_kfac.curvature import NO_FRAME, Frame, Layer, Rows, SparseRows, Statistics
from bayes_kfac.structures import whitened
from bayes_kfac.structures.base import Structure


class JacobianStructure(Structure):
    """The Fisher from Jacobians ``[columns, *blocks, batch, out, in]``."""

    def __init__(self, *, damping: str = "exact", sharing: str = "expand") -> None:
        super().__init__(damping=damping, sharing=sharing)
        self.damping = "exact"

    def for_layer(self, layer: Layer) -> Structure:  # noqa: D102
        return self

    def measure(self, rows: Rows, frame: Frame = NO_FRAME) -> Statistics:  # noqa: D102
        return Statistics({"fisher": self._fisher(rows)}, {"fisher": rows.num_examples})

    def identity(  # noqa: D102
        self, shape: tuple[int, ...], like: Tensor, *, sparse_sides: frozenset[str] = frozenset(), tied: bool = False
    ) -> Statistics:
        return Statistics({"fisher": self._identity(shape, like)}, {"fisher": 1.0})

    @abstractmethod
    def _fisher(self, rows: Rows) -> Tensor:
        """What is kept of the sum of the Jacobians' outer products."""

    @abstractmethod
    def _identity(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The same of one outer product that is the identity, in ``like``'s dtype and on its device."""


def in_pieces(function: Callable[[Rows], Tensor], rows: Rows) -> Tensor:
    """A sum over examples, of as many at a time as their Jacobians may take memory.

    Args:
        function: The sum of a few.
        rows: All of them.

    Returns:
        The sum.
    """
    first, *others = (function(part) for part in pieces(rows))
    return sum(others, first)


def squares(rows: Rows) -> Tensor:
    """``Σ J ∘ J`` over examples and columns, ``[*blocks, out, in]``: the diagonal of the Fisher."""
    if rows.transposed is None and isinstance(rows.inputs, SparseRows):
        words, columns = word_columns(rows.inputs, rows.gradients)
        by_word = columns.square().sum(-2)  # [k, out]
        return by_word.new_zeros(rows.inputs.size, by_word.shape[-1]).index_add_(0, words, by_word).mT
    if rows.transposed is None and isinstance(rows.inputs, Tensor) and rows.inputs.shape[-2] == 1:
        return rows.gradients.squeeze(-2).square().sum(0).mT @ rows.inputs.squeeze(-2).square()
    return in_pieces(lambda part: part.jacobians().square().sum(0).sum(-3), rows)


def pieces(rows: Rows) -> Iterator[Rows]:
    """The same rows in pieces of the batch whose Jacobians take bounded memory."""
    for examples, _ in _places(rows, len(rows.gradients) * rows.gradients.shape[-1] * rows.inputs.shape[-1]):
        yield _piece(rows, examples, slice(None))


def small_pieces(rows: Rows, elements: int) -> Iterator[Rows]:
    """The same rows in pieces of bounded memory: some examples at a time, or some columns of one.

    Args:
        rows: The rows.
        elements: What an example of a block takes.

    Yields:
        The pieces.
    """
    columns = len(rows.gradients)
    for examples, width in _places(rows, elements):
        for first in range(0, columns, width):
            yield _piece(rows, examples, slice(first, first + width))


def _places(rows: Rows, elements: int) -> Iterator[tuple[slice, int]]:
    """Examples that fit into memory together, and how many columns of them do."""
    columns, *blocks, batch, _, _ = rows.gradients.shape
    size = max(1, elements * torch.Size(blocks).numel() * rows.gradients.element_size())
    budget = whitened.jacobian_bytes(rows.gradients.device)
    step = max(1, budget // size)
    width = columns if size <= budget else max(1, columns * budget // size)
    for start in range(0, max(batch, 1), step):
        yield slice(start, start + step), width


def _piece(rows: Rows, examples: slice, columns: slice) -> Rows:
    return replace(
        rows,
        inputs=rows.inputs[..., examples, :, :],
        gradients=rows.gradients[columns, ..., examples, :, :],
        transposed=None if rows.transposed is None else _piece(rows.transposed, examples, columns),
        mask=None if rows.mask is None else rows.mask[examples],
    )


def word_columns(inputs: SparseRows, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of each example's Jacobian that are not zero: those of the words that occur in it.

    Args:
        inputs: The words.
        gradients: ``[columns, batch, shared, out]``.

    Returns:
        Which word each of them is of, ``[k]``, and the columns themselves, ``[k, columns, out]``.
    """
    batch = inputs.shape[0]
    example = torch.arange(batch, device=gradients.device)[:, None, None]
    pairs, position = (inputs.indices + example * inputs.size).unique(return_inverse=True)
    terms = inputs.weights[..., None, None] * gradients.movedim(0, -2).unsqueeze(-3)  # [batch, shared, k, columns, out]
    columns = gradients.new_zeros(len(pairs), *terms.shape[-2:])
    return pairs % inputs.size, columns.index_add_(0, position.flatten(), terms.flatten(0, 2))
