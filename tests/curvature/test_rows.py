"""Rows: sparse rows do what the same rows written out do, and one position does what its example did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac.curvature import Rows, SparseRows
from bayes_kfac.curvature.rows import of_all_columns, side_by_side
from tests.helpers import TIGHT, randn, rng
from tests.random_rows import SEEDS, dense_rows, sparse_rows, tied_rows, words, written_out

# Sparse rows


def test_dense_adds_the_weights_of_an_index_that_occurs_twice():
    rows = SparseRows(torch.tensor([[[1, 3, 1], [0, 0, 0]]]), torch.tensor([[[2.0, 5.0, 7.0], [1.0, -1.0, 4.0]]]), 4)
    assert rows.shape == (1, 2, 4)
    assert rows.ndim == 3
    assert torch.equal(rows.dense(), torch.tensor([[[0.0, 9.0, 0.0, 5.0], [4.0, 0.0, 0.0, 0.0]]]))


@given(rows=sparse_rows())
def test_second_moment_is_the_diagonal_of_the_dense_one(rows):
    flat = rows.dense().flatten(0, 1)
    moment = rows.second_moment()
    assert moment.shape == (1, rows.size)
    assert_close(moment[0], (flat.mT @ flat).diagonal(), **TIGHT)


@given(rows=sparse_rows(), seed=SEEDS)
def test_second_moment_with_a_scale_is_that_of_scaled_rows(rows, seed):
    scale = randn(*rows.indices.shape[:2], seed=seed)
    flat = (rows.dense() * scale.unsqueeze(-1)).flatten(0, 1)
    assert_close(rows.second_moment(scale=scale)[0], flat.square().sum(0), **TIGHT)


def test_second_moment_without_masked_rows():
    rows, mask = words(3, 4, 2), torch.rand(3, 4, generator=rng(3)) < 0.5
    kept = rows.dense()[mask]
    assert 0 < len(kept) < 12
    assert_close(rows.second_moment(scale=mask)[0], kept.square().sum(0), **TIGHT)


@given(rows=sparse_rows(), seed=SEEDS)
def test_gram_is_of_the_dense_rows_in_a_diagonal_metric(rows, seed):
    scale = randn(rows.size, seed=seed).square()
    flat = rows.dense()
    assert_close(rows.gram(scale), (flat * scale) @ flat.mT, **TIGHT)


def test_to_another_dtype_keeps_the_words():
    rows = words(2, 3, 2)
    single = rows.to(torch.float32)
    assert single.weights.dtype == torch.float32
    assert torch.equal(single.indices, rows.indices)
    assert single.dense().dtype == torch.float32


@given(rows=sparse_rows(), seed=SEEDS)
def test_scaled_rows_are_the_dense_ones_with_each_column_scaled(rows, seed):
    scale = randn(rows.size, seed=seed)
    scaled = rows.scaled(scale)
    assert_close(scaled.dense(), rows.dense() * scale, **TIGHT)
    assert scaled.size == rows.size
    assert torch.equal(scaled.indices, rows.indices)


def test_scaling_is_differentiable_in_weights_and_scale():
    """By indices of which some occur twice."""
    indices = words(2, 3, 2).indices

    def dense(weights: Tensor, scale: Tensor) -> Tensor:
        return SparseRows(indices, weights, 5).scaled(scale).dense()

    inputs = randn(2, 3, 2, seed=1).requires_grad_(), randn(5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(dense, inputs)


@pytest.mark.parametrize(
    "index",
    [slice(1, 3), slice(4, 9), slice(0, 0), (slice(1, 3), slice(0, 2)), (..., slice(1, 3), slice(None), slice(None))],
    ids=str,
)
def test_an_index_takes_some_of_the_rows(index):
    """Of examples, or of examples and positions, as it would of the rows written out."""
    rows = words(5, 4, 2)
    some = rows[index]
    assert some.size == rows.size
    assert torch.equal(some.dense(), rows.dense()[index])
    assert some.shape == some.dense().shape


# Changes of the weights


@pytest.mark.parametrize("blocks", [(), (2,), (2, 3)])
@pytest.mark.parametrize("shared", [1, 4])
def test_a_response_is_the_jacobian_times_the_change(blocks, shared):
    """``Σ J_c δW`` over the elements of all blocks, for each draw, example and column."""
    rows = dense_rows(3, blocks, 5, shared)
    change = randn(7, *blocks, 2, 3, seed=9)
    expected = torch.einsum("c...noi,s...oi->snc", rows.jacobians(), change)
    response = rows.response(change)
    assert response.shape == (7, 5, 3)
    assert_close(response, expected, **TIGHT)


@given(rows=sparse_rows(), columns=st.integers(1, 3), out=st.integers(1, 3), draws=st.integers(1, 3), seed=SEEDS)
def test_sparse_rows_respond_as_dense_ones(rows, columns, out, draws, seed):
    sparse = Rows(rows, randn(columns, *rows.indices.shape[:2], out, seed=seed))
    change = randn(draws, out, rows.size, seed=seed + 1)
    expected = torch.einsum("cnoi,soi->snc", sparse.jacobians(), change)
    assert_close(sparse.response(change), expected, **TIGHT)


@pytest.mark.parametrize("sparse", [True, False])
def test_transposed_uses_respond_to_the_same_change(sparse):
    rows = tied_rows(sparse=sparse)
    change = randn(4, 5, 3, seed=9)
    expected = torch.einsum("cnoi,soi->snc", rows.jacobians(), change)
    assert_close(rows.response(change), expected, **TIGHT)
    assert not torch.allclose(expected, replace(rows, transposed=None).response(change))


def test_gradients_that_all_examples_share_respond_as_their_copies():
    rows = dense_rows(3, (), 5, 4)
    same = replace(rows, gradients=rows.gradients[:, :1].expand_as(rows.gradients))
    change = randn(7, 2, 3, seed=9)
    expected = torch.einsum("cnoi,soi->snc", same.jacobians(), change)
    assert_close(same.response(change), expected, **TIGHT)


# Jacobians


@pytest.mark.parametrize("blocks", [(), (2,)])
def test_jacobians_are_sums_of_outer_products(blocks):
    """Plain loops over columns, examples and positions."""
    rows = dense_rows(blocks=blocks)
    expected = torch.zeros(2, *blocks, 3, 2, 3, dtype=torch.float64)
    for c in range(2):
        for n in range(3):
            for t in range(4):
                g, a = rows.gradients[c, ..., n, t, :], rows.inputs[..., n, t, :]
                expected[c, ..., n, :, :] += g.unsqueeze(-1) * a.unsqueeze(-2)
    assert_close(rows.jacobians(), expected, **TIGHT)
    for c in range(2):
        assert_close(rows.total(c), expected[c].sum(-3), **TIGHT)


@given(rows=sparse_rows(), columns=st.integers(1, 3), out=st.integers(1, 3), seed=SEEDS)
def test_sparse_rows_have_the_jacobians_of_dense_ones(rows, columns, out, seed):
    sparse = Rows(rows, randn(columns, *rows.indices.shape[:2], out, seed=seed))
    assert_close(sparse.jacobians(), written_out(sparse).jacobians(), **TIGHT)
    for column in range(columns):
        assert_close(sparse.total(column), written_out(sparse).total(column), **TIGHT)


def test_transposed_uses_are_added_as_their_transpose():
    """An embedding of five words in three dimensions, tied to an output layer with three inputs."""
    tied = tied_rows()
    head, lookup = replace(tied, transposed=None), tied.transposed
    assert_close(tied.jacobians(), head.jacobians() + lookup.jacobians().mT, **TIGHT)
    for column in range(2):
        assert_close(tied.total(column), head.total(column) + lookup.total(column).mT, **TIGHT)


def test_a_magnitude_bounds_the_total():
    for rows in (dense_rows(), dense_rows(blocks=(2,)), tied_rows()):
        for column in range(2):
            assert rows.total(column).norm() <= rows.magnitude(column)


# One position for each example


@pytest.mark.parametrize("blocks", [(), (2,)])
def test_pooled_is_the_mean_of_inputs_and_the_sum_of_gradients(blocks):
    rows = dense_rows(blocks=blocks)
    pooled = rows.pooled()
    assert_close(pooled.inputs, rows.inputs.mean(-2, keepdim=True), **TIGHT)
    assert_close(pooled.gradients, rows.gradients.sum(-2, keepdim=True), **TIGHT)
    assert pooled.mask is None
    assert (pooled.num_examples, pooled.num_rows) == (3, 3)


@pytest.mark.parametrize("blocks", [(), (2,)])
def test_pooled_leaves_masked_positions_out(blocks):
    """Each example is pooled as if it were as short as its mask; one without any position has nothing."""
    mask = torch.tensor([[True, True, False, True], [False] * 4, [False, True, False, False]])
    rows = replace(dense_rows(blocks=blocks), mask=mask, examples=2.0)
    rows = replace(rows, gradients=rows.gradients * mask.unsqueeze(-1))
    pooled = rows.pooled()
    for n in (0, 2):
        own = rows.inputs[..., n, :, :][..., mask[n], :]
        assert_close(pooled.inputs[..., n, 0, :], own.mean(-2), **TIGHT)
        assert_close(pooled.gradients[..., n, 0, :], rows.gradients[..., n, mask[n], :].sum(-2), **TIGHT)
    assert not pooled.inputs[..., 1, :, :].any()
    assert torch.equal(pooled.mask, torch.tensor([[True], [False], [True]]))
    assert (pooled.num_examples, pooled.num_rows) == (2, 2)


def test_examples_without_positions_have_no_pooled_row():
    """They count as examples, but no input of theirs is in a mean."""
    rows = dense_rows()
    none = replace(rows, inputs=rows.inputs[:, :0], gradients=rows.gradients[..., :0, :]).pooled()
    assert not none.gradients.any()
    assert (none.num_examples, none.num_rows) == (3, 0)


def test_calls_with_and_without_a_mask_are_side_by_side():
    masked, whole = replace(dense_rows(), mask=torch.zeros(3, 4, dtype=torch.bool)), dense_rows()
    assert torch.equal(side_by_side([masked, whole]).mask, torch.arange(8).expand(3, 8) >= 4)


@given(rows=sparse_rows(), seed=SEEDS, has_mask=st.booleans())
def test_sparse_rows_are_pooled_as_dense_ones(rows, seed, has_mask):
    batch, shared = rows.indices.shape[:2]
    mask = torch.rand(batch, shared, generator=rng(seed)) < 0.6 if has_mask else None
    sparse = Rows(rows, randn(2, batch, shared, 2, seed=seed), mask=mask)
    pooled, expected = sparse.pooled(), written_out(sparse).pooled()
    assert pooled.inputs.shape == (batch, 1, rows.size)
    assert_close(pooled.inputs.dense(), expected.inputs, **TIGHT)
    assert torch.equal(pooled.gradients, expected.gradients)


def test_counts_of_rows_and_examples_go_by_the_mask():
    rows = dense_rows()
    assert (rows.num_examples, rows.num_rows) == (3, 12)
    masked = replace(rows, mask=torch.tensor([[True] * 4, [True, False, False, False], [False] * 4]), examples=2.0)
    assert (masked.num_examples, masked.num_rows) == (2, 5)


# Several calls


def test_side_by_side_adds_the_jacobians_of_calls():
    """Of as many positions as each of them has, and of one call itself."""
    first, second = dense_rows(shared=4), dense_rows(shared=2, seed=5)
    joined = side_by_side([first, second])
    assert_close(joined.jacobians(), first.jacobians() + second.jacobians(), **TIGHT)
    assert joined.num_rows == first.num_rows + second.num_rows
    assert joined.num_examples == 3
    assert side_by_side([first]) is first


def test_side_by_side_lays_masks_along():
    masks = [torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool)]
    calls = [replace(dense_rows(shared=mask.shape[1]), mask=mask, examples=3.0) for mask in masks]
    joined = side_by_side(calls)
    assert torch.equal(joined.mask, torch.cat(masks, dim=1))
    assert (joined.num_rows, joined.num_examples) == (12, 3)


def test_side_by_side_of_sparse_rows_fills_up_with_weights_of_zero():
    """Bags of different lengths: the index in an empty place does not matter."""
    calls = [Rows(words(3, 2, count, seed=count), randn(2, 3, 2, 4, seed=count)) for count in (1, 4, 2)]
    joined = side_by_side(calls)
    assert joined.inputs.indices.shape == (3, 6, 4)
    assert_close(joined.inputs.dense(), torch.cat([call.inputs.dense() for call in calls], dim=1), **TIGHT)
    assert_close(joined.jacobians(), sum((call.jacobians() for call in calls[1:]), calls[0].jacobians()), **TIGHT)
    moments = torch.stack([call.inputs.second_moment() for call in calls]).sum(0)
    assert_close(joined.inputs.second_moment(), moments, **TIGHT)


def test_parts_of_the_columns_are_put_together_with_their_transposed_uses():
    whole = tied_rows()
    parts = [
        replace(
            whole,
            gradients=whole.gradients[[column]],
            transposed=replace(whole.transposed, gradients=whole.transposed.gradients[[column]]),
        )
        for column in range(len(whole.gradients))
    ]
    assert torch.equal(of_all_columns(parts).jacobians(), whole.jacobians())


def test_to_another_dtype_takes_transposed_uses_along():
    single = tied_rows().to(torch.float32)
    tensors: list[Tensor] = [single.inputs, single.gradients, single.transposed.gradients]
    assert {tensor.dtype for tensor in (*tensors, single.transposed.inputs.weights)} == {torch.float32}
    assert single.jacobians().dtype == torch.float32
