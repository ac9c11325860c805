"""Whitened Jacobians of every structure's Gaussians: covariances from rows equal those of Jacobians written out.

Rows are of few positions and of many, dense and of words, as they are and transposed, so that every way through
``structures.whitened`` is gone, at once and in pieces.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import structures
from bayes_kfac.curvature import Rows, SparseRows
from bayes_kfac.structures import BlockGaussian, BlockSpec, MatrixNormalGaussian, Structure
from bayes_kfac.structures.whitened import WhitenedRows
from tests.helpers import TIGHT, randn
from tests.posteriors import FAMILIES
from tests.random_rows import dense_rows, tied_rows, words

OUT, IN = 3, 4


@pytest.fixture(params=FAMILIES, ids="-".join)
def structure(request: pytest.FixtureRequest) -> Structure:
    name, damping = request.param
    return structures.get(name, damping=damping, sharing="expand")


def of_words(columns: int, batch: int, shared: int, count: int, seed: int) -> Rows:
    return Rows(words(batch, shared, count, size=IN, seed=seed), randn(columns, batch, shared, OUT, seed=seed + 1))


def of_layer(columns: int, batch: int, shared: int, seed: int, blocks: tuple[int, ...] = ()) -> Rows:
    return dense_rows(columns, blocks, batch, shared, in_=IN, out=OUT, seed=seed)


def of_tied(columns: int, batch: int, seed: int, *, sparse: bool) -> Rows:
    """Both uses with inputs and gradients of their own."""
    rows = tied_rows(columns, batch=batch, size=OUT, width=IN, sparse=sparse)
    lookup = rows.transposed
    assert lookup is not None
    inputs = words(batch, 2, 1, size=OUT, seed=seed) if sparse else randn(batch, 2, OUT, seed=seed)
    return replace(
        rows,
        inputs=randn(batch, 4, IN, seed=seed + 1),
        gradients=randn(columns, batch, 4, OUT, seed=seed + 2),
        transposed=replace(lookup, inputs=inputs, gradients=randn(columns, batch, 2, IN, seed=seed + 3)),
    )


#: Of ``(columns, batch, seed)``. Four positions of a 3×4 block are few for one column, nine are many for any number.
ROWS = {
    "one position": lambda c, n, s: of_layer(c, n, 1, s),
    "two positions": lambda c, n, s: of_layer(c, n, 2, s),
    "many positions": lambda c, n, s: of_layer(c, n, 9, s),
    "stacked, one position": lambda c, n, s: of_layer(c, n, 1, s, (2,)),
    "stacked, two positions": lambda c, n, s: of_layer(c, n, 2, s, (2,)),
    "stacked, many positions": lambda c, n, s: of_layer(c, n, 9, s, (2,)),
    "stacked twice": lambda c, n, s: of_layer(c, n, 2, s, (2, 3)),
    "a word": lambda c, n, s: of_words(c, n, 1, 1, s),
    "words": lambda c, n, s: of_words(c, n, 5, 1, s),
    "a bag": lambda c, n, s: of_words(c, n, 1, 6, s),
    "bags": lambda c, n, s: of_words(c, n, 3, 4, s),
    "tied": lambda c, n, s: of_tied(c, n, s, sparse=False),
    "tied to words": lambda c, n, s: of_tied(c, n, s, sparse=True),
}


@pytest.fixture(params=ROWS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def gaussian_of(structure: Structure, rows: Rows) -> BlockGaussian:
    """What the structure makes of other rows of the same kind; its covariance is well away from a multiple of ``I``."""
    (gaussian,) = structure.gaussians([BlockSpec("layer", structure.measure(rows), 20.0, 0.7)])
    return gaussian


def dense_products(gaussian: BlockGaussian, rows: Rows, others: Rows) -> Tensor:
    """``Σ_blocks J_c P⁻¹ J'_dᵀ``, ``[batch, other batch, columns, columns]``, all written out."""
    covariance = torch.linalg.inv(gaussian.to_dense())
    J, K = rows.jacobians().flatten(-2), others.jacobians().flatten(-2)
    return torch.einsum("c...ni,...ij,d...mj->nmcd", J, covariance, K)


def assert_all_equal_dense(gaussian: BlockGaussian, rows: Rows, others: Rows) -> None:
    whitened, theirs = gaussian.whitened_rows(rows), gaussian.whitened_rows(others)
    within = dense_products(gaussian, rows, rows).diagonal(dim1=0, dim2=1).movedim(-1, 0)
    assert_close(whitened.covariance(), within, **TIGHT)
    assert_close(whitened.variance(), within.diagonal(dim1=-2, dim2=-1), **TIGHT)
    assert_close(whitened.between(theirs), dense_products(gaussian, rows, others), **TIGHT)
    white = gaussian.whiten(rows.jacobians().movedim(-3, 0)).flatten(2)
    assert_close(whitened.jacobians(), white, **TIGHT)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_ability_equals_its_dense_formula(structure, kind, columns, batch):
    """Within examples, between any two, their variances alone, and the Jacobians themselves, ``Bᵀ J``."""
    gaussian = gaussian_of(structure, ROWS[kind](2, 10, 50))
    rows = ROWS[kind](columns, batch, 7)
    assert_all_equal_dense(gaussian, rows, ROWS[kind](columns, 3, 20))


def test_an_empty_batch_has_empty_products(structure, kind):
    gaussian, rows = gaussian_of(structure, ROWS[kind](2, 10, 50)), ROWS[kind](3, 0, 7)
    whitened, theirs = gaussian.whitened_rows(rows), gaussian.whitened_rows(ROWS[kind](3, 4, 20))
    assert whitened.covariance().shape == (0, 3, 3)
    assert whitened.variance().shape == (0, 3)
    assert whitened.between(theirs).shape == (0, 4, 3, 3)
    assert theirs.between(whitened).shape == (4, 0, 3, 3)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("kind", [name for name in ROWS if "tied" not in name])
def test_gradients_that_are_the_same_for_all_examples(structure, kind, columns):
    """Those of an output layer share their memory, and give what copies of them give."""
    gaussian = gaussian_of(structure, ROWS[kind](2, 10, 50))
    rows, others = ROWS[kind](columns, 4, 7), ROWS[kind](columns, 3, 20)
    one = rows.gradients[..., :1, :, :]
    same = replace(rows, gradients=one.expand_as(rows.gradients))
    copied = replace(rows, gradients=same.gradients.contiguous())
    assert same.gradients.stride(-3) == 0 != copied.gradients.stride(-3)
    assert_all_equal_dense(gaussian, same, others)
    assert_close(gaussian.whitened_rows(same).covariance(), gaussian.whitened_rows(copied).covariance(), **TIGHT)
    theirs = replace(others, gradients=one.expand_as(others.gradients))
    assert_all_equal_dense(gaussian, rows, theirs)
    assert_all_equal_dense(gaussian, same, theirs)
    alone = gaussian.whitened_rows(same)
    assert not isinstance(alone, WhitenedRows) or alone.gradients.shape[-3] == 1


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("shared", [1, 2])
def test_unit_vectors_as_gradients(structure, shared, scale):
    """As at an output layer, where nothing needs to be multiplied; and others that only look like them."""
    gaussian = gaussian_of(structure, of_layer(2, 10, 2, 50))
    units = scale * torch.eye(OUT).double()[:, None, None].expand(OUT, 4, shared, OUT)
    rows = replace(of_layer(OUT, 4, shared, 7), gradients=units)
    assert_all_equal_dense(gaussian, rows, replace(of_layer(OUT, 3, shared, 20), gradients=units[:, :3]))
    swapped = replace(rows, gradients=units.flip(0))
    assert_all_equal_dense(gaussian, swapped, rows)


def test_inputs_of_stacked_blocks_that_are_unit_vectors(structure):
    """Of one example, and as many blocks as inputs: an identity, but not that of output gradients."""
    gaussian = gaussian_of(structure, dense_rows(2, (2,), 10, 2, in_=2, out=2, seed=50))
    inputs = torch.eye(2).double()[:, None, None]
    rows = replace(dense_rows(3, (2,), 1, 1, in_=2, out=2, seed=7), inputs=inputs)
    assert_all_equal_dense(gaussian, rows, dense_rows(3, (2,), 4, 1, in_=2, out=2, seed=20))


@pytest.mark.parametrize(
    ("batch", "size"), [(2, 1), (5, 2 * 3 * OUT * IN * 8)], ids=["two in singles", "five in pairs"]
)
def test_pieces_of_the_batch_are_the_whole(structure, kind, batch, size, monkeypatch):
    """Jacobians are formed of one example at a time, or of two, where no more of them are allowed."""
    gaussian = gaussian_of(structure, ROWS[kind](2, 10, 50))
    rows, others = ROWS[kind](3, batch, 7), ROWS[kind](3, 3, 20)
    monkeypatch.setattr("bayes_kfac.structures.whitened.CPU_JACOBIAN_BYTES", size)
    assert_all_equal_dense(gaussian, rows, others)
    if "tied" not in kind:
        same = replace(rows, gradients=rows.gradients[..., :1, :, :].expand_as(rows.gradients))
        assert_all_equal_dense(gaussian, same, others)


@pytest.mark.parametrize(("out", "in_"), [(1, 1), (1, 6), (6, 1), (5, 2)])
def test_blocks_of_any_shape(structure, out, in_):
    gaussian = gaussian_of(structure, dense_rows(2, (2,), 10, 2, in_=in_, out=out, seed=50))
    for shared in (1, 2, 12):
        rows = dense_rows(3, (2,), 4, shared, in_=in_, out=out, seed=7)
        assert_all_equal_dense(gaussian, rows, dense_rows(3, (2,), 3, shared, in_=in_, out=out, seed=20))


@pytest.mark.parametrize(("shared", "other"), [(1, 1), (1, 2), (2, 1), (3, 5)])
def test_other_examples_may_have_other_numbers_of_positions(structure, shared, other):
    """Sequences of different lengths."""
    gaussian = gaussian_of(structure, of_layer(2, 10, 2, 50))
    assert_all_equal_dense(gaussian, of_layer(3, 4, shared, 7), of_layer(3, 2, other, 20))


def test_between_is_symmetric_and_has_the_covariance_on_its_diagonal(structure, kind):
    gaussian, rows = gaussian_of(structure, ROWS[kind](2, 10, 50)), ROWS[kind](3, 4, 7)
    whitened = gaussian.whitened_rows(rows)
    between = whitened.between(whitened)
    assert_close(between, between.transpose(0, 1).mT, **TIGHT)
    assert_close(between.diagonal(dim1=0, dim2=1).movedim(-1, 0), whitened.covariance(), **TIGHT)


@pytest.mark.parametrize("in_", [1, IN])
def test_words_meet_a_side_that_is_not_diagonal(in_):
    """As of a prior that was not measured on words; a vocabulary of one has both forms."""
    gaussian = matrix_normal(OUT, in_)
    rows, others = (Rows(words(n, 3, 2, size=in_, seed=n), randn(2, n, 3, OUT, seed=n)) for n in (4, 5))
    assert_all_equal_dense(gaussian, rows, others)


# What it costs


class Counted:
    """How many examples' Jacobians are formed, and how many at a time at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        jacobians = WhitenedRows.jacobians

        def counted(rows: WhitenedRows) -> Tensor:
            formed = jacobians(rows)
            self.batches.append(len(formed))
            return formed

        monkeypatch.setattr(WhitenedRows, "jacobians", counted)


def matrix_normal(out: int, in_: int) -> MatrixNormalGaussian:
    row, column = (torch.eye(size).double() + 0.1 * randn(size, size, seed=size).tril() for size in (out, in_))
    return MatrixNormalGaussian(row, column)


def test_few_positions_need_no_jacobians_and_many_no_gram_of_positions(monkeypatch):
    """By count: one position of a wide layer, and a hundred of a small one."""
    counted = Counted(monkeypatch)
    wide = matrix_normal(20, 30).whitened_rows(dense_rows(4, (), 5, 1, in_=30, out=20, seed=1))
    wide.covariance(), wide.variance(), wide.between(wide)
    assert counted.batches == []
    long = matrix_normal(2, 3).whitened_rows(dense_rows(4, (), 5, 100, in_=3, out=2, seed=1))
    long.covariance()
    assert counted.batches == [5]
    long.variance()
    assert counted.batches == [5, 5]


def test_variances_alone_are_cheaper_by_gram_where_covariances_are_not():
    """Products of all pairs of columns are counted for covariances, those of each with itself for variances."""
    whitened = matrix_normal(2, 3).whitened_rows(dense_rows(50, (), 2, 4, in_=3, out=2, seed=1))
    shared, in_, out, columns = 4, 3, 2, 50
    for products in (columns, columns**2):
        kernel = shared**2 * (in_ + columns * out) + products * shared * out
        jacobians = out * in_ * (columns * shared + products)
        assert whitened._prefers_kernel(products) == (kernel <= jacobians)
    assert not whitened._prefers_kernel(columns**2)


def test_words_need_no_jacobians(monkeypatch):
    """Nor their vocabulary's size: within an example by the words that meet."""
    counted = Counted(monkeypatch)
    for damping in ("factored", "exact"):
        structure = structures.get("kron", damping=damping, sharing="expand")
        whitened = gaussian_of(structure, of_words(2, 10, 3, 2, 50)).whitened_rows(of_words(3, 4, 3, 2, 7))
        assert isinstance(whitened.inputs, SparseRows)
        whitened.covariance(), whitened.variance()
    assert counted.batches == []


def test_pieces_are_as_large_as_is_allowed(monkeypatch):
    counted = Counted(monkeypatch)
    whitened = gaussian_of(structures.get("diagonal", damping="exact", sharing="expand"), of_layer(2, 10, 9, 50, (2,)))
    rows = of_layer(3, 7, 9, 7, (2,))
    monkeypatch.setattr("bayes_kfac.structures.whitened.CPU_JACOBIAN_BYTES", 3 * (3 * 2 * OUT * IN * 8))
    whitened.whitened_rows(rows).covariance()
    assert counted.batches == [3, 3, 1]


def test_of_one_position_with_weights_no_jacobians_are_formed(monkeypatch):
    counted = Counted(monkeypatch)
    for name, damping in (("diagonal", "exact"), ("kron", "exact")):
        structure = structures.get(name, damping=damping, sharing="expand")
        whitened = gaussian_of(structure, of_layer(2, 10, 1, 50)).whitened_rows(of_layer(3, 4, 1, 7))
        whitened.covariance(), whitened.variance()
    assert counted.batches == []


@pytest.mark.parametrize(("columns", "shared", "in_", "by_pairs"), [(2, 2, 40, True), (12, 6, 5, False)])
def test_pairs_of_positions_are_taken_where_they_are_fewer_operations(columns, shared, in_, by_pairs, monkeypatch):
    """Two positions of a wide layer, but not many of a narrow one with many outputs."""
    taken = []
    original = WhitenedRows._positions
    monkeypatch.setattr(WhitenedRows, "_positions", lambda rows: (taken.append(True), original(rows))[1])
    inputs, gradients = randn(3, shared, in_, seed=0), randn(columns, 3, shared, 4, seed=1)
    rows = WhitenedRows(inputs, gradients, randn(4, in_, seed=2).square())
    J = rows.jacobians()
    assert_close(rows.between(rows), torch.einsum("nck,mdk->nmcd", J, J), **TIGHT)
    assert bool(taken) == by_pairs


def test_products_with_few_others_form_no_jacobians(monkeypatch):
    """One column, one position, weights: with two examples by pairs, with fifty by Jacobians: the same."""
    formed = []
    original = WhitenedRows.jacobians
    monkeypatch.setattr(WhitenedRows, "jacobians", lambda rows: (formed.append(len(rows.inputs)), original(rows))[1])
    weights = randn(20, 20, seed=1).square()
    rows = WhitenedRows(randn(50, 1, 20, seed=2), randn(1, 50, 1, 20, seed=3), weights)
    one = replace(rows, inputs=rows.inputs[7:9], gradients=rows.gradients[:, 7:9])
    few = rows.between(one)
    assert not formed
    assert_close(few, rows.between(rows)[:, 7:9], **TIGHT)
    assert formed


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_covariances_within_groups_are_blocks_of_those_of_all_pairs(structure, kind, groups, monkeypatch):
    """Of groups of different sizes and numbers of columns, at once and a group at a time."""
    mine, theirs = ROWS[kind](2, 2 * groups, 5), ROWS[kind](3, 3 * groups, 7)
    gaussian = gaussian_of(structure, mine)
    left, right = gaussian.whitened_rows(mine), gaussian.whitened_rows(theirs)
    blocks = left.between(right).unflatten(1, (groups, 3)).unflatten(0, (groups, 2))
    expected = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert_close(left.within_groups(right, groups), expected, **TIGHT)
    monkeypatch.setattr("bayes_kfac.structures.whitened.CPU_JACOBIAN_BYTES", 1)
    assert_close(left.within_groups(right, groups), expected, **TIGHT)
