"""Rows and the examples that they belong to: brought from where a layer has them to the batch of the output.

Rows lie in a layer as ``[*blocks, batch, shared, size]``, where its batch may be the output's, coarser or finer, as
models flatten ``[batch, time]`` before a layer or at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from bayes_kfac.batches import weighing_examples
from bayes_kfac.curvature.layers import Layer
from bayes_kfac.curvature.rows import Rows, SparseRows


def fits(rows: Rows, num_examples: int) -> bool:
    """Whether rows can be told apart by example: the layer's batch is the output's, coarser or finer."""
    batch, shared = rows.inputs.shape[-3:-1]
    return batch % num_examples == 0 or (num_examples % batch == 0 and batch * shared % num_examples == 0)


def by_example(rows: Rows, num_examples: int) -> Rows:
    """Give rows the batch dimension of the output: models flatten ``[batch, time]``, before a layer or at the end."""
    batch, shared = rows.inputs.shape[-3:-1]
    if batch == num_examples:
        return rows
    sizes = (num_examples, batch * shared // num_examples)
    inputs = _map(rows.inputs, lambda tensor: tensor.flatten(-3, -2).unflatten(-2, sizes))
    return replace(rows, inputs=inputs, gradients=rows.gradients.flatten(-3, -2).unflatten(-2, sizes))


def in_every_example(rows: Rows, columns: int, examples: int) -> Rows:
    """Rows whose columns are ``columns × examples`` of gradients apart: all inputs are in every example."""
    inputs = _map(
        rows.inputs,
        lambda tensor: tensor.flatten(-3, -2).unsqueeze(-3).expand(*[-1] * (tensor.ndim - 3), examples, -1, -1),
    )
    gradients = rows.gradients.flatten(-3, -2).unflatten(0, (columns, examples)).movedim(1, -3)
    return replace(rows, inputs=inputs, gradients=gradients)


def _map(inputs: Tensor | SparseRows, function: Any) -> Tensor | SparseRows:
    if isinstance(inputs, SparseRows):
        return SparseRows(function(inputs.indices), function(inputs.weights), inputs.size)
    mapped: Tensor = function(inputs)
    return mapped


def masked(rows: Rows, mask: Tensor | None, examples: float) -> Rows:
    """Rows that know which of their positions weigh, and how many examples they come from."""
    if mask is None or rows.inputs.shape[-3] != len(mask):
        return replace(rows, examples=examples)
    # where the layer has as many positions as the mask they are the same ones; elsewhere an example weighs as a whole
    flat, shared = mask.reshape(len(mask), -1), rows.inputs.shape[-2]
    weighs = flat if flat.shape[1] == shared else weighing_examples(mask).unsqueeze(1).expand(len(mask), shared)
    return replace(rows, mask=weighs, examples=examples)


def both_ways(layer: Layer, joined: Mapping[tuple[str, bool], Rows]) -> Rows:
    """The rows of a layer as it is with those transposed; no rows where one of the two did not happen."""
    plain, transposed = joined.get((layer.name, False)), joined.get((layer.name, True))
    if not layer.is_tied_to_transpose:
        assert plain is not None
        return plain
    out_features, in_features = layer.shape[-2:]
    plain = plain or _no_rows(transposed, in_features, out_features, sparse=False)
    if transposed is None:
        is_sparse = any(use.adapter.sparse for use in layer.uses if use.transposed)
        transposed = _no_rows(plain, out_features, in_features, sparse=is_sparse)
    return replace(plain, transposed=transposed)


def _no_rows(like: Rows | None, inputs: int, outputs: int, *, sparse: bool) -> Rows:
    assert like is not None
    columns, batch = like.gradients.shape[0], like.gradients.shape[-3]
    gradients = like.gradients.new_zeros(columns, batch, 0, outputs)
    if sparse:
        weights = like.gradients.new_zeros(batch, 0, 1)
        return Rows(SparseRows(weights.long(), weights, inputs), gradients, examples=like.examples)
    return Rows(like.gradients.new_zeros(batch, 0, inputs), gradients, examples=like.examples)
