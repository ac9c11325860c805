"""The least linear map that agrees with a few images, against its definition on dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac.structures.rearranged import RearrangedFisher
from tests.helpers import TIGHT, randn

IN, OUT = 9, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def known_of(M: Tensor, V: Tensor, R: Tensor) -> RearrangedFisher:
    """What is known of a matrix ``[*blocks, d_in, d_out]``."""
    return RearrangedFisher(V, R, V @ M.mT, R @ M)


def some(*blocks: int, count: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, and a few vectors of each side."""
    M = randn(*blocks, IN, OUT, seed=seed)
    return M, randn(*blocks, count, OUT, seed=seed + 1), randn(*blocks, count, IN, seed=seed + 2)


def projector(vectors: Tensor) -> Tensor:
    return torch.linalg.pinv(vectors) @ vectors


def written_out(known: RearrangedFisher) -> Tensor:
    return known.image(torch.eye(OUT).double().expand(*known.rows.shape[:-2], OUT, OUT)).mT


@pytest.mark.parametrize("blocks", [(), (3,)])
def test_it_is_the_map_without_what_leads_from_beyond_to_beyond(blocks):
    """``M − (1 − P_R) M (1 − P_V)``: the same images both ways, and no map of smaller norm has them."""
    M, V, R = some(*blocks)
    known = known_of(M, V, R)
    one_V, one_R = torch.eye(OUT).double() - projector(V), torch.eye(IN).double() - projector(R)
    assert_close(written_out(known), M - one_R @ M @ one_V, **CLOSE)
    assert_close(known.image(V), known.images, **CLOSE)
    assert_close(known.adjoint_image(R), known.adjoint_images, **CLOSE)
    x, y = randn(4, OUT, seed=8), randn(4, IN, seed=9)
    assert_close(known.image(x) @ y.mT, x @ known.adjoint_image(y).mT, **CLOSE)


def test_its_singular_value_decomposition_is_that_of_the_map_written_out():
    known = known_of(*some(3))
    rows, values, columns = known.singular_pairs(4)
    assert_close(columns.mT @ (values.unsqueeze(-1) * rows), written_out(known), **CLOSE)
    assert_close(rows @ rows.mT, torch.eye(4).double().expand(3, 4, 4), **CLOSE)
    assert_close(columns @ columns.mT, torch.eye(4).double().expand(3, 4, 4), **CLOSE)
    assert bool((values.diff(dim=-1) <= 0).all())
    for all_of, some_of in zip((rows, values.unsqueeze(-1), columns), known.singular_pairs(2), strict=True):
        assert torch.equal(all_of[..., :2, :], some_of.reshape(3, 2, -1))


def test_terms_that_are_rounding_or_beyond_the_dimension_are_zero():
    """Also of blocks of a single weight, whose map is a number."""
    M = randn(IN, 1, seed=0) @ randn(1, OUT, seed=1)
    rows, values, columns = known_of(M, *some()[1:]).singular_pairs(3)
    assert_close(columns[:1].mT @ (values[:1, None] * rows[:1]), M, **CLOSE)
    assert not any(bool(term[1:].any()) for term in (rows, values, columns))
    one = torch.ones(1, 1).double()
    rows, values, columns = RearrangedFisher(one, one, 3 * one, 3 * one).singular_pairs(2)
    assert_close(values, torch.tensor([3.0, 0.0]).double(), **TIGHT)
    assert rows.shape == columns.shape == (2, 1)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scales_of_vectors_and_map_do_not_matter(scale):
    M, V, R = some()
    expected = written_out(known_of(M, V, R))
    lengths = torch.tensor([[1e-6], [1e6]]).double()
    assert_close(written_out(known_of(M * scale, V * lengths, R / lengths)), expected * scale, rtol=1e-7, atol=0)


def test_zeros_and_repetitions_say_nothing():
    M, V, R = some(count=3)
    V[1], R[2] = 0, 0
    expected = known_of(M, V[[0, 2]], R[:2])
    assert_close(written_out(known_of(M, V, R)), written_out(expected), **CLOSE)
    V[1], R[2] = 2 * V[0], R[0] - R[1]
    assert_close(written_out(known_of(M, V, R)), written_out(expected), **CLOSE)


def test_a_map_that_is_zero_has_values_of_zero():
    _, V, R = some()
    rows, values, columns = known_of(torch.zeros(IN, OUT).double(), V, R).singular_pairs(4)
    assert torch.equal(values, torch.zeros_like(values))
    assert bool(torch.isfinite(rows).all() and torch.isfinite(columns).all())
    nothing = known_of(torch.zeros(IN, OUT).double(), V * 0, R * 0)
    assert torch.equal(written_out(nothing), torch.zeros(IN, OUT).double())


def test_a_product_is_taken_off():
    M, V, R = some(2)
    G, A = randn(2, 2, 3, seed=5), randn(2, 3, 3, seed=6)
    product = A.flatten(-2).unsqueeze(-1) * G.flatten(-2).unsqueeze(-2)
    less = known_of(M, V, R).minus(G, A)
    assert_close(less.images, V @ (M - product).mT, **TIGHT)
    assert_close(less.adjoint_images, R @ (M - product), **TIGHT)


def test_factors_are_flattened():
    V, R = torch.randn(2, 1, 6), torch.randn(2, 3, 3)
    known = RearrangedFisher.of(V, R, R, V)
    assert known.rows.shape == (2, OUT)
    assert known.columns.shape == (2, IN)


def test_single_precision_knows_as_much_as_it_can():
    M, V, R = some(count=3)
    known = known_of(M.float(), V.float(), R.float())
    assert_close(written_out(known_of(M, V, R)).float(), known.image(torch.eye(OUT)).mT, rtol=1e-4, atol=1e-5)
