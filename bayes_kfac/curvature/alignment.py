"""Rows and the examples that they belong to: brought from where a layer has them to the batch of the output.

Rows lie in a layer as ``[*blocks, batch, shared, size]``, where its batch may be the output's, coarser or finer, as
models flatten ``[batch, time]`` before a layer or at the end. Or they lie as ``[time, batch]``, flattened or not: in
layers that see time first, and in those that see several batches one after another. Or each is of one example and they
lie in any order, a few of one and many of the next: nodes of several graphs, tokens that are sent to an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayes_kfac.batches import weighing_examples
from bayes_kfac.curvature.layers import Layer
from bayes_kfac.curvature.rows import Rows, SparseRows, side_by_side


def batch_first(rows: Rows, num_examples: int) -> Rows | None:
    """Rows ``[batch, positions]`` with the batch dimension of the output; ``None`` where they cannot lie like this."""
    batch, shared = rows.inputs.shape[-3:-1]
    if batch == num_examples:
        return rows
    if batch % num_examples and (num_examples % batch or batch * shared % num_examples):
        return None
    sizes = (num_examples, batch * shared // num_examples)
    return _moved(rows, lambda tensor: tensor.flatten(-3, -2).unflatten(-2, sizes))


def positions_first(rows: Rows, num_examples: int) -> Rows | None:
    """Rows ``[positions, batch]`` with the batch dimension of the output; ``None`` where they cannot lie like this."""
    batch, shared = rows.inputs.shape[-3:-1]
    if batch * shared % num_examples:
        return None
    sizes = (batch * shared // num_examples, num_examples)
    return _moved(rows, lambda tensor: tensor.flatten(-3, -2).unflatten(-2, sizes).transpose(-3, -2))


#: How the rows of a layer lie: functions of rows and the number of examples, the likeliest first.
Way = Callable[[Rows, int], Rows | None]
WAYS: tuple[Way, ...] = (batch_first, positions_first)


@dataclass(frozen=True, eq=False)
class Owned:
    """The way of rows that lie in any order in one forward pass; examples with fewer of them are filled up with zeros.

    Attributes:
        owner: The example of each row, ``[batch·shared]``.
    """

    owner: Tensor

    def __call__(self, rows: Rows, num_examples: int) -> Rows:
        """Rows with the batch dimension of the output, and a mask of those that are there where some are not."""
        counts = self.owner.bincount(minlength=num_examples)
        order = self.owner.argsort(stable=True)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(order), device=order.device) - first.repeat_interleave(counts)
        source = order.new_full((num_examples, int(counts.max())), -1)
        source[self.owner[order], place] = order
        is_row = source >= 0
        moved = _moved(
            rows, lambda tensor: tensor.flatten(-3, -2)[..., source, :].masked_fill(~is_row.unsqueeze(-1), 0)
        )
        return replace(moved, mask=None if bool(is_row.all()) else is_row)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owned) and torch.equal(self.owner, other.owner)

    def __hash__(self) -> int:
        return hash(self.owner.shape)


def in_every_example(rows: Rows, columns: int, examples: int) -> Rows:
    """Rows whose columns are ``columns × examples`` of gradients apart: all inputs are in every example."""
    inputs = _map(
        rows.inputs,
        lambda tensor: tensor.flatten(-3, -2).unsqueeze(-3).expand(*[-1] * (tensor.ndim - 3), examples, -1, -1),
    )
    gradients = rows.gradients.flatten(-3, -2).unflatten(0, (columns, examples)).movedim(1, -3)
    return replace(rows, inputs=inputs, gradients=gradients)


def _moved(rows: Rows, move: Callable[[Tensor], Tensor]) -> Rows:
    return replace(rows, inputs=_map(rows.inputs, move), gradients=move(rows.gradients))


def _map(inputs: Tensor | SparseRows, function: Callable[[Tensor], Tensor]) -> Tensor | SparseRows:
    if isinstance(inputs, SparseRows):
        return SparseRows(function(inputs.indices), function(inputs.weights), inputs.size)
    return function(inputs)


def joined(calls: Sequence[Rows], mask: Tensor | None, examples: float) -> Rows:
    """The rows of a layer's calls as one, which know what of them weighs, and how many examples they come from.

    Where all calls together have as many positions as the mask, as those of a loop over time, or where one of them has,
    they are the same ones; elsewhere an example weighs as a whole.

    Args:
        calls: The rows of each call, in the order of time.
        mask: Which elements of the output weigh, ``[batch, ...]``.
        examples: How many examples there are.

    Returns:
        The rows.
    """
    whole = side_by_side(calls)
    if mask is not None and whole.inputs.shape[-3] == len(mask):
        flat = mask.reshape(len(mask), -1)
        parts = [whole] if whole.inputs.shape[-2] == flat.shape[1] else calls
        weighs = torch.cat([_positions(flat, part) for part in parts], dim=1)
        whole = replace(whole, mask=weighs if whole.mask is None else whole.mask & weighs)
    return replace(whole, examples=examples)


def _positions(mask: Tensor, rows: Rows) -> Tensor:
    """Which positions of a call weigh, ``[batch, shared]``, of a flat mask; its own are those of the examples' rows."""
    shared = rows.inputs.shape[-2]
    if mask.shape[1] == shared and rows.mask is None:
        return mask
    return weighing_examples(mask).unsqueeze(1).expand(len(mask), shared)


def both_ways(layer: Layer, whole: Mapping[tuple[str, bool], Rows]) -> Rows:
    """The rows of a layer as it is with those transposed; no rows where one of the two did not happen."""
    plain, transposed = whole.get((layer.name, False)), whole.get((layer.name, True))
    if not layer.is_tied_to_transpose:
        assert plain is not None
        return plain
    like = plain or transposed
    assert like is not None
    nothing = no_rows(layer, like.gradients.movedim(-3, 1), like.examples)
    return replace(plain or nothing, transposed=transposed or nothing.transposed)


def no_rows(layer: Layer, gradients: Tensor, examples: float | None) -> Rows:
    """The rows of examples that do not use a layer.

    Args:
        layer: The layer.
        gradients: What others have, ``[columns, batch, ...]``.
        examples: How many examples count, where it is not the batch.

    Returns:
        Rows without positions.
    """
    *blocks, out_features, in_features = layer.shape
    columns, batch = gradients.shape[:2]

    def nothing(inputs: int, outputs: int, *, sparse: bool) -> Rows:
        own = gradients.new_zeros(columns, *blocks, batch, 0, outputs)
        if sparse:
            weights = gradients.new_zeros(batch, 0, 1)
            return Rows(SparseRows(weights.long(), weights, inputs), own, examples=examples)
        return Rows(gradients.new_zeros(*blocks, batch, 0, inputs), own, examples=examples)

    rows = nothing(in_features, out_features, sparse="input" in layer.sparse_sides)
    if not layer.is_tied_to_transpose:
        return rows
    return replace(rows, transposed=nothing(out_features, in_features, sparse="gradient" in layer.sparse_sides))
