"""Each example's own Jacobian: in pieces of the batch, of words their columns alone, and the sum of its squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from bayes_kfac.curvature import Rows, SparseRows
from bayes_kfac.structures import whitened
from bayes_kfac.structures.jacobian import pieces, small_pieces, squares, word_columns
from tests.fishers import KINDS, exact_fisher, get
from tests.helpers import TIGHT, assert_same_statistics, randn
from tests.random_rows import sparse_rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [1, 2, 100])
def test_pieces_are_of_as_many_examples_as_memory_has_room_for(kind, examples, monkeypatch):
    """With all uses of the weights, and their masks."""
    rows = KINDS[kind]()
    batch = rows.gradients.shape[-3]
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", examples * rows.jacobians()[..., :1, :, :].numel() * 8)
    found = list(pieces(rows))
    assert [part.gradients.shape[-3] for part in found] == [
        min(examples, batch - start) for start in range(0, batch, examples)
    ]
    assert_close(torch.cat([part.jacobians() for part in found], -3), rows.jacobians(), **TIGHT)


def test_a_piece_has_its_part_of_the_mask(monkeypatch):
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", 1)
    mask = torch.rand(3, 4) > 0.5
    rows = Rows(randn(3, 4, 5, seed=0), randn(1, 3, 4, 2, seed=1), mask=mask)
    assert torch.equal(torch.cat([part.mask for part in pieces(rows)]), mask)


def test_an_example_that_is_larger_than_the_bound_is_a_piece_of_its_own(monkeypatch):
    """Or, where columns may be apart, each of its columns is."""
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", 1)
    rows = KINDS["one position"]()
    assert len(list(pieces(rows))) == 6
    found = list(small_pieces(rows, 100))
    assert [part.gradients.shape[:2] for part in found] == [(1, 1)] * 6 * len(rows.gradients)
    assert_close(sum(part.jacobians().square().sum() for part in found), rows.jacobians().square().sum(), **TIGHT)


@given(rows=sparse_rows())
def test_the_columns_of_words_are_those_of_the_jacobian_that_are_not_zero(rows: SparseRows):
    """Also where a word occurs several times, or has a weight of zero."""
    batch, shared, size = rows.shape
    gradients = randn(2, batch, shared, 3, seed=0)
    expected = Rows(rows, gradients).jacobians()  # [columns, batch, out, size]
    which, columns = word_columns(rows, gradients)
    assert len(which) == len({(n, int(word)) for n in range(batch) for word in rows.indices[n].flatten()})
    for word in range(size):
        own = columns[which == word]
        assert_close(
            torch.einsum("kco,kdp->codp", own, own),
            torch.einsum("cno,dnp->codp", expected[..., word], expected[..., word]),
            **TIGHT,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_of_squares_is_the_diagonal_of_the_fisher(kind):
    rows = KINDS[kind]()
    expected = exact_fisher(rows).diagonal(dim1=-2, dim2=-1)
    assert_close(squares(rows).flatten(-2) / rows.num_examples, expected, **TIGHT)


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_examples_in_pieces_add_up(structure, kind, monkeypatch):
    whole = get(structure).measure(KINDS[kind]())
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", 1)
    assert_same_statistics(get(structure).measure(KINDS[kind]()), whole)


def test_a_large_vocabulary_has_no_jacobian_of_its_own():
    """Of 64 examples they would be 64 × 200,000 × 16 numbers, 0.8 GB; the diagonal has 13 MB."""
    inputs = SparseRows(torch.arange(64 * 3).reshape(64, 3, 1), torch.ones(64, 3, 1), 200_000)
    assert squares(Rows(inputs, torch.ones(1, 64, 3, 16))).sum() == 64 * 3 * 16
