"""SINGD: structured roots are those of the blocks of the factors, measured without what they do not see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac.curvature import Rows, SparseRows
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import (
    BlockSpec,
    InverseFreeStructure,
    MatrixNormalGaussian,
    StructuredInverseFreeStructure,
)
from tests.helpers import randn
from tests.random_rows import dense_rows, tied_rows, words
from tests.structures.test_inverse_free import CLOSE, IN, OUT, build, ingd, optimal, spec_of


def singd(**options) -> StructuredInverseFreeStructure:
    return StructuredInverseFreeStructure(**options)


def blocks_of(matrix: Tensor, size: int) -> Tensor:
    index = torch.arange(len(matrix)) // size
    return matrix * (index[:, None] == index)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("side", ["input", "output"])
def test_structured_roots_are_those_of_the_blocks_of_the_factors(side, size):
    """And the nearest matrix normal whose roots have the form: none nearby is nearer."""
    rows = dense_rows(2, (), 30, 1, in_=7, out=5)
    structure = singd(**{"input_block": None, "output_block": None, f"{side}_block": size})
    whole = ingd().measure(rows)
    A, G = whole.mean("input"), whole.mean("gradient")
    blocked = spec_of(blocks_of(A, size), G) if side == "input" else spec_of(A, blocks_of(G, size))
    gaussian = build(structure, BlockSpec("layer", structure.measure(rows), 30.0, 2.0))
    assert_close(gaussian.to_dense(), optimal(blocked).to_dense(), **CLOSE)
    exact = 30.0 * torch.kron(G, A) + 2.0 * torch.eye(35)

    def divergence(q: MatrixNormalGaussian) -> Tensor:
        return torch.trace(exact @ torch.linalg.inv(q.to_dense())) + q.logdet()

    row, column = (
        torch.diag(r[0]) if len(r) == 1 else r for r in (gaussian.scale_tril_row, gaussian.scale_tril_column)
    )
    for seed in range(5):
        left, right = (0.05 * randn(n, n, seed=seed + n).tril() for n in (5, 7))
        left, right = (left, blocks_of(right, size)) if side == "input" else (blocks_of(left, size), right)
        neighbour = MatrixNormalGaussian(row @ (torch.eye(5) + left), column @ (torch.eye(7) + right))
        assert divergence(neighbour) > divergence(gaussian)


def test_diagonal_sides_are_rows_in_statistics_and_roots():
    structure = singd()
    statistics = structure.measure(dense_rows(2, (2,), 10, 2, in_=IN, out=OUT))
    assert {name: value.shape for name, value in statistics.sums.items()} == {
        "input": (2, 1, IN),
        "gradient": (2, 1, OUT),
    }
    gaussian = build(structure, BlockSpec("layer", statistics, 30.0, 2.0))
    assert {value.shape for value in gaussian.state.values()} == {(2, 1, IN), (2, 1, OUT)}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["plain", "stacked", "masked", "words", "part of the columns"])
@pytest.mark.parametrize("sizes", [(1, None), (None, 1), (1, 1)])
def test_a_diagonal_side_is_measured_without_its_matrix(sizes, kind, sharing):
    """And is the diagonal of it, with the same counts: masks, pooling and shares of the columns included."""
    plain = dense_rows(2, (), 10, 3, in_=IN, out=OUT)
    rows = {
        "plain": plain,
        "stacked": dense_rows(2, (2,), 10, 3, in_=IN, out=OUT),
        "masked": replace(plain, mask=randn(10, 3, seed=5) > 0),
        "words": Rows(words(10, 2, 2, size=IN), randn(2, 10, 2, OUT, seed=1)),
        "part of the columns": replace(plain, share=0.5),
    }[kind]
    structure = StructuredInverseFreeStructure(sharing=sharing, input_block=sizes[0], output_block=sizes[1])
    measured, whole = structure.measure(rows), InverseFreeStructure(sharing=sharing).measure(rows)
    assert dict(measured.counts) == dict(whole.counts)
    for (name, value), size in zip(measured.sums.items(), sizes, strict=True):
        expected = whole.sums[name]
        if size == 1 and expected.shape[-2] != 1:
            expected = expected.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        assert_close(value, expected, **CLOSE)


def test_a_diagonal_side_may_be_wider_than_any_matrix():
    """Of 200,000 features the matrix would take 320 GB."""
    rows = Rows(randn(3, 1, 200_000, seed=0), randn(1, 3, 1, 2, seed=1))
    structure = StructuredInverseFreeStructure(input_block=1, output_block=None)
    gaussian = build(structure, BlockSpec("layer", structure.measure(rows), 30.0, 2.0))
    again = build(structure, BlockSpec("layer", structure.measure(rows), 30.0, 2.0, gaussian))
    assert_close(again.marginal_variance(), gaussian.marginal_variance(), **CLOSE)


def test_one_block_is_the_whole():
    rows = dense_rows(2, (), 10, 2, in_=IN, out=OUT)
    for sizes in ((None, None), (IN, OUT), (100, 100)):
        structure = singd(input_block=sizes[0], output_block=sizes[1])
        gaussian = build(structure, BlockSpec("layer", structure.measure(rows), 30.0, 2.0))
        expected = build(ingd(), BlockSpec("layer", ingd().measure(rows), 30.0, 2.0))
        assert_close(gaussian.to_dense(), expected.to_dense(), **CLOSE)


@pytest.mark.parametrize("sizes", [(2, None), (None, 2), (1, 2)])
def test_warm_up_blends_structured_statistics(sizes):
    """The identity has the same form as what is measured, of tied weights too."""
    structure = singd(input_block=sizes[0], output_block=sizes[1])
    for rows in (tied_rows(batch=10, size=OUT, width=IN), tied_rows(batch=10, size=OUT, width=IN, sparse=False)):
        measured = structure.measure(rows)
        sides = frozenset({"gradient"} if isinstance(rows.transposed.inputs, SparseRows) else set())
        identity = structure.identity((OUT, IN), rows.gradients, sparse_sides=sides, tied=True)
        blended = measured.lean(identity, 0.5)
        assert {n: v.shape for n, v in blended.sums.items()} == {n: v.shape for n, v in measured.sums.items()}
        gaussian = build(structure, BlockSpec("layer", blended, 30.0, 2.0))
        assert_close(gaussian.to_dense(), optimal(BlockSpec("layer", blended, 30.0, 2.0)).to_dense(), **CLOSE)


def test_options_are_kept_and_checked():
    structure = singd(sweeps=3, input_block=2, output_block=None)
    again = structure.configured(damping="exact", sharing="reduce")
    assert again.options == {"sweeps": 3, "input_block": 2, "output_block": None}
    for wrong in ({"sweeps": 0}, {"input_block": 0}, {"output_block": -1}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            singd(**wrong)
