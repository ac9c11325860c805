"""Sums of ``Jᵀ V J`` and ``J R Jᵀ`` against explicit Jacobians, on every way to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import linalg
from bayes_kfac.curvature import Rows, SparseRows
from bayes_kfac.structures import partial_products as module
from bayes_kfac.structures import whitened
from bayes_kfac.structures.partial_products import partial_products
from tests.helpers import TIGHT, randn
from tests.random_rows import dense_rows, sparse_rows, tied_rows, words

#: By which way: few positions and many, from Gram matrices and from Jacobians.
ROWS = {
    "one position": lambda: dense_rows(2, shared=1, in_=4, out=3),
    "one column": lambda: dense_rows(1, shared=1, in_=4, out=3),
    "two positions": lambda: dense_rows(2, shared=2, in_=4, out=3),
    "many positions": lambda: dense_rows(2, shared=30, in_=4, out=3),
    "blocks": lambda: dense_rows(2, (2,), shared=1, in_=4, out=3),
    "blocks, positions": lambda: dense_rows(2, (2, 2), shared=2, in_=4, out=3),
    "blocks, many positions": lambda: dense_rows(2, (2,), shared=30, in_=4, out=3),
    "one output": lambda: dense_rows(2, shared=3, in_=4, out=1),
    "one input": lambda: dense_rows(2, shared=1, in_=1, out=3),
    "tied": lambda: tied_rows(sparse=False),
    "tied to words": tied_rows,
    "words": lambda: Rows(words(4, 3, 2), randn(2, 4, 3, 3, seed=1)),
}


def sides(rows: Rows, count: int = 2) -> tuple[Tensor, Tensor]:
    """Random symmetric ``V`` and ``R`` of a block, diagonal where inputs are sparse."""
    blocks, other = rows.gradients.shape[1:-3], rows.transposed
    out, in_ = rows.gradients.shape[-1], rows.inputs.shape[-1]
    V, R = (linalg.symmetrize(randn(*blocks, count, n, n, seed=n)) for n in (out, in_))
    if other is not None and isinstance(other.inputs, SparseRows):
        V = linalg.diagonal(V).unsqueeze(-2)
    if other is None and isinstance(rows.inputs, SparseRows):
        R = linalg.diagonal(R).unsqueeze(-2)
    return V, R


def expected(rows: Rows, V: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """By each example's Jacobian, ``[columns, *blocks, batch, out, in]``."""
    J = rows.jacobians()
    by_row = torch.einsum("c...noi,...kij,c...npj->...kop", J, linalg.dense(R), J)
    by_column = torch.einsum("c...noi,...kop,c...npj->...kij", J, linalg.dense(V), J)
    if linalg.is_diagonal(V):
        by_row = linalg.diagonal(by_row).unsqueeze(-2)
    return by_row, linalg.diagonal(by_column).unsqueeze(-2) if linalg.is_diagonal(R) else by_column


@pytest.fixture(params=ROWS)
def rows(request: pytest.FixtureRequest) -> Rows:
    return ROWS[request.param]()


def test_they_are_sums_over_explicit_jacobians(rows):
    V, R = sides(rows)
    for actual, one in zip(partial_products(rows, V, R), expected(rows, V, R), strict=True):
        assert_close(actual, one, **TIGHT)


@pytest.mark.parametrize("way", ["_by_positions", "_by_jacobians"])
@pytest.mark.parametrize("shared", [1, 2, 30])
def test_both_ways_are_the_same_wherever_they_are_taken(way, shared):
    rows = dense_rows(2, (2,), shared=shared, in_=4, out=3)
    V, R = sides(rows)
    for actual, one in zip(getattr(module, way)(rows, V, R), expected(rows, V, R), strict=True):
        assert_close(actual, one, **TIGHT)


def test_the_way_is_chosen_by_the_number_of_operations(monkeypatch):
    taken = []
    for way in ("_by_positions", "_by_jacobians"):
        original = getattr(module, way)
        monkeypatch.setattr(module, way, lambda *a, way=way, original=original: (taken.append(way), original(*a))[1])
    for shared in (1, 2, 100):
        rows = dense_rows(2, shared=shared, in_=4, out=3)
        partial_products(rows, *sides(rows))
    assert taken == ["_by_positions", "_by_positions", "_by_jacobians"]


@pytest.mark.parametrize("budget", [1, 200, 1000])
def test_pieces_of_examples_and_columns_add_up(rows, budget, monkeypatch):
    """Bounded memory: down to one column of one example at a time."""
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", budget)
    V, R = sides(rows)
    for actual, one in zip(partial_products(rows, V, R), expected(rows, V, R), strict=True):
        assert_close(actual, one, **TIGHT)


def test_memory_is_bounded_by_the_budget(monkeypatch):
    """Of a batch of hundred no more Jacobians are written out than fit."""
    largest = []
    original = Rows.jacobians
    monkeypatch.setattr(Rows, "jacobians", lambda rows: (largest.append(original(rows).numel() * 8), original(rows))[1])
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", 4000)
    rows = dense_rows(3, batch=100, shared=40, in_=4, out=3)
    partial_products(rows, *sides(rows))
    assert max(largest) <= 4000
    assert sum(largest) == 100 * 3 * 12 * 8


def test_an_example_that_is_too_large_is_taken_column_by_column(monkeypatch):
    largest = []
    original = Rows.jacobians
    monkeypatch.setattr(Rows, "jacobians", lambda rows: (largest.append(original(rows).numel()), original(rows))[1])
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", 1)
    rows = dense_rows(3, batch=2, shared=40, in_=4, out=3)
    partial_products(rows, *sides(rows))
    assert largest == [12] * 6


@given(words=sparse_rows())
def test_sparse_rows_are_their_rows_written_out(words):
    """On the diagonal of the input side, words occurring several times in an example."""
    rows = Rows(words, randn(2, *words.shape[:2], 3, seed=0))
    V, R = sides(rows)
    for actual, one in zip(partial_products(rows, V, R), expected(rows, V, R), strict=True):
        assert_close(actual, one, **TIGHT)


def test_identities_give_the_partial_traces():
    rows = dense_rows(2, shared=3, in_=4, out=3)
    by_row, by_column = partial_products(rows, torch.eye(3).double()[None], torch.eye(4).double()[None])
    J = rows.jacobians().flatten(0, 1)
    assert_close(by_row[0], (J @ J.mT).sum(0), **TIGHT)
    assert_close(by_column[0], (J.mT @ J).sum(0), **TIGHT)


def test_masked_positions_add_what_their_gradients_do():
    """Gradients at masked positions are zero: a mask weighs averages of inputs, and there are none here."""
    rows = dense_rows(2, shared=3, in_=4, out=3)
    mask = torch.tensor([[True, True, False]]).expand(3, -1)
    rows = replace(rows, gradients=rows.gradients * mask.unsqueeze(-1))
    V, R = sides(rows)
    for actual, one in zip(partial_products(replace(rows, mask=mask), V, R), partial_products(rows, V, R), strict=True):
        assert_close(actual, one, **TIGHT)
