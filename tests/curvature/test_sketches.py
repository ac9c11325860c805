"""Sums of outer products kept as columns: they add as the matrices do, within the limit exactly, beyond it by rule."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac.curvature import Columns, FrequentDirections, LatestColumns, LeadingColumns, Statistics, principal
from bayes_kfac.curvature.sketches import columns_from_dump
from tests.helpers import TIGHT, randn

KINDS = [LeadingColumns, FrequentDirections, LatestColumns]
BLOCKS = [(), (2,)]
OUT, IN = 3, 4


@pytest.fixture(params=KINDS, ids=lambda kind: kind.kind)
def kind(request: pytest.FixtureRequest) -> type[Columns]:
    return request.param


@pytest.fixture(params=BLOCKS, ids=["plain", "stacked"])
def blocks(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


def batch(count: int, blocks: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """Columns of unequal length in directions of unequal weight."""
    return randn(*blocks, count, OUT, IN, seed=seed) * torch.logspace(0, -1, IN, dtype=torch.float64)


def matrix(values: Tensor) -> Tensor:
    return values.flatten(-2).mT @ values.flatten(-2)


def eigenvalues(values: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(values)


@pytest.mark.parametrize("count", [3, 40])
def test_short_columns_survive_beside_long_ones_in_float32(count):
    """Their squares would be the rounding of the long ones' squares, and the directions' variances the prior's."""
    lengths = torch.tensor([1e4, 1.0, 1e-2])
    values = (torch.linalg.qr(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))[0] * lengths).mT
    mixed = torch.linalg.qr(torch.randn(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    columns = (mixed @ values.double()).float().reshape(count, 3, 4)
    exact = principal(columns.double(), 3)
    found = principal(columns, 3)
    assert found.dtype == torch.float32
    assert_close(found.square().sum((-2, -1)).double(), exact.square().sum((-2, -1)), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("count", [1, 5, 12, 30])
def test_principal_columns_are_orthogonal_and_have_the_same_sum(blocks, count):
    """By either Gram matrix, longest first."""
    values = batch(count, blocks)
    columns = principal(values, 100)
    assert columns.shape == (*blocks, min(count, OUT * IN), OUT, IN)
    assert_close(matrix(columns), matrix(values), **TIGHT)
    gram = columns.flatten(-2) @ columns.flatten(-2).mT
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    assert_close(gram, torch.diag_embed(lengths), **TIGHT)
    assert bool((lengths.diff() <= 1e-12).all())


def test_within_the_limit_sums_of_columns_are_sums_of_matrices(kind, blocks):
    first, second = (kind.of(batch(4, blocks, seed), 20) for seed in (0, 1))
    expected = matrix(batch(4, blocks, 0)) + matrix(batch(4, blocks, 1))
    assert_close((first + second).to_dense(), expected, **TIGHT)
    assert_close((first * 0.3 + second * 0.7).to_dense(), 0.3 * first.to_dense() + 0.7 * second.to_dense(), **TIGHT)
    assert_close((first * 0).to_dense(), torch.zeros_like(expected), **TIGHT)
    total = first + second
    assert_close(total.diagonal().flatten(-2), expected.diagonal(dim1=-2, dim2=-1), **TIGHT)
    assert_close(total.trace(), expected.diagonal(dim1=-2, dim2=-1).sum(-1), **TIGHT)


def test_the_identity_is_exact_and_blends(kind, blocks):
    """It is no column; it weighs as the floor, which nothing reduces."""
    identity = kind.identity((*blocks, OUT, IN), 3, randn(1, seed=0))
    eye = torch.eye(OUT * IN, dtype=torch.float64).expand(*blocks, -1, -1)
    assert_close(identity.to_dense(), eye, **TIGHT)
    own = kind.of(batch(3, blocks), 3)
    assert_close((own * 0.9 + identity * 0.4).to_dense(), 0.9 * matrix(batch(3, blocks)) + 0.4 * eye, **TIGHT)


def test_arithmetic_leaves_its_operands_alone(kind):
    first, second = (kind.of(batch(4, (), seed), 5) for seed in (0, 1))
    before = {name: tensor.clone() for name, tensor in first.tensors.items()}
    first + second, first * 3
    for name, tensor in before.items():
        assert torch.equal(first.tensors[name], tensor)


def test_leading_columns_are_the_truncated_eigendecomposition(blocks):
    """The nearest matrix of that rank to ``β U Uᵀ + (1 − β) G Gᵀ``, by one of its columns' Gram matrix."""
    old, new, decay = LeadingColumns.of(batch(9, blocks, 0), 5), batch(7, blocks, 1), 0.8
    assert old.values.shape[-3] == 5
    updated = old * decay + LeadingColumns.of(new, 20) * (1 - decay)
    whole = decay * old.to_dense() + (1 - decay) * matrix(new)
    values, vectors = torch.linalg.eigh(whole)
    leading = (vectors[..., -5:] * values[..., None, -5:]) @ vectors[..., -5:].mT
    assert_close(updated.to_dense(), leading, **TIGHT)


def test_the_error_of_leading_columns_falls_with_their_number(blocks):
    whole = matrix(batch(30, blocks))
    errors = [
        torch.linalg.matrix_norm(LeadingColumns.of(batch(30, blocks), rank).to_dense() - whole) for rank in range(1, 13)
    ]
    assert all(bool((b < a).all()) for a, b in pairwise(errors))
    assert bool((errors[-1] < 1e-12).all())


@pytest.mark.parametrize("limit", [1, 3, 6, 11])
def test_frequent_directions_are_never_further_below_than_their_floor(blocks, limit):
    """``0 ⪯ F − F̂ ⪯ φ I``, and ``φ`` is no more than the mean of what any truncation must lose."""
    sketch, whole = FrequentDirections.of(batch(2, blocks, 100), limit), matrix(batch(2, blocks, 100))
    for step in range(20):
        sketch = sketch * 0.9 + FrequentDirections.of(batch(3, blocks, step), limit)
        whole = 0.9 * whole + matrix(batch(3, blocks, step))
    lost = eigenvalues(whole - matrix(sketch.columns))
    assert sketch.values.shape[-3] == limit
    assert bool((sketch.floor > 0).all())
    assert bool((lost >= -1e-10).all())
    assert bool((lost <= sketch.floor[..., None] + 1e-10).all())
    for rank in range(limit + 1):
        left_out = eigenvalues(whole)[..., : OUT * IN - rank].sum(-1)
        assert bool((sketch.floor <= left_out / (limit + 1 - rank) + 1e-10).all())


def test_frequent_directions_lose_nothing_where_there_are_no_more_directions():
    values = randn(2, OUT, IN, seed=0)
    repeated = values[[0, 1, 0, 1, 1]]
    sketch = FrequentDirections.of(repeated, 4)
    assert_close(sketch.to_dense(), matrix(repeated), **TIGHT)
    assert sketch.floor < 1e-12
    whole = FrequentDirections.of(batch(50), OUT * IN)
    assert_close(whole.to_dense(), matrix(batch(50)), **TIGHT)
    assert whole.floor == 0


def test_a_window_keeps_the_latest_and_averages_over_them():
    """Those that left are forgotten: the average is that of the examples in the window, by their counts and decay."""
    running = Statistics(
        {}, {"fisher": 0.0}, columns={"fisher": LatestColumns.identity((OUT, IN), 3, randn(1, seed=0)) * 0}
    )
    for step in range(6):
        column = LatestColumns.of(batch(1, (), step), 3, weight=float(step + 1))
        running = running.moving_average(Statistics({}, {"fisher": step + 1.0}, columns={"fisher": column}), 0.9)
    kept = [(0.9 ** (5 - step), step) for step in (3, 4, 5)]
    total = sum(weight * matrix(batch(1, (), step)) for weight, step in kept)
    count = sum(weight * (step + 1) for weight, step in kept)
    assert running.columns["fisher"].values.shape == (3, OUT, IN)
    assert_close(running.mean_columns("fisher").to_dense(), total / count, **TIGHT)


def test_statistics_add_scale_and_lean_columns_with_their_counts(kind):
    first, second = (
        Statistics({"x": randn(2, seed=n)}, {"x": 1.0, "f": n}, columns={"f": kind.of(batch(3, (), n), 9)})
        for n in (2, 5)
    )
    total = first + second * 0.5
    assert total.counts["f"] == 4.5
    expected = matrix(batch(3, (), 2)) + 0.5 * matrix(batch(3, (), 5))
    assert_close(total.mean_columns("f").to_dense(), expected / 4.5, **TIGHT)
    assert_close(total.map(Tensor.float).columns["f"].to_dense().double(), expected, rtol=1e-5, atol=1e-5)
    leant = first.lean(second, 0.25)
    assert leant.counts["f"] == 2
    averages = [own.mean_columns("f").to_dense() for own in (first, second)]
    assert_close(leant.mean_columns("f").to_dense(), 0.75 * averages[0] + 0.25 * averages[1], **TIGHT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_what_is_not_finite_is_named_and_does_not_fail_before(kind, value):
    """Reductions take eigenvectors, which have no word for NaN; the check of the statistics has.

    Nor have they for numbers whose squares overflow.
    """
    values = batch(8)
    values[3, 1, 2] = value
    for limit in (3, 20):
        columns = kind.of(values, limit) + kind.of(batch(1), limit)
        expected = ["f"] if kind is not LatestColumns or limit > 3 else []  # it has left the window
        assert Statistics({}, {"f": 8.0}, columns={"f": columns}).non_finite() == expected


def test_a_sketch_comes_back_from_a_file_of_plain_tensors(kind):
    columns = kind.of(batch(8), 5)
    buffer = io.BytesIO()
    torch.save(columns.dump(), buffer)
    buffer.seek(0)
    again = columns_from_dump(torch.load(buffer, weights_only=True))
    assert type(again) is kind
    assert again.limit == 5
    assert again.tensors.keys() == columns.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in columns.tensors.items())
