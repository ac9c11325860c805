"""Sums of two Kronecker products against dense matrices: plus, minus, indefinite, and where they break down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import linalg
from bayes_kfac.errors import NotPositiveDefiniteError
from bayes_kfac.structures import MatrixNormalGaussian, TwoKroneckerGaussian, gaussian_from_state
from bayes_kfac.structures.two_kronecker import FLOOR, with_second_product
from tests.helpers import TIGHT, dense_kron, randn, random_spd

OUT, IN = 3, 4
KINDS = [("full", "full"), ("diagonal", "full"), ("full", "diagonal"), ("diagonal", "diagonal")]


def side(*blocks: int, size: int, kind: str, seed: int, symmetric: bool = False) -> Tensor:
    """A Cholesky factor, or a symmetric indefinite factor."""
    if kind == "diagonal":
        values = randn(*blocks, 1, size, seed=seed)
        return values if symmetric else 0.5 + values.abs()
    if symmetric:
        return linalg.symmetrize(randn(*blocks, size, size, seed=seed))
    return torch.linalg.cholesky(random_spd(*blocks, size, seed=seed))


def parts(
    blocks: tuple[int, ...] = (), kinds: tuple[str, str] = ("full", "full"), seed: int = 0
) -> tuple[MatrixNormalGaussian, Tensor, Tensor]:
    """A matrix normal, and ``A`` and ``G`` of a second product, indefinite and at most half of the first."""
    row, column = (side(*blocks, size=n, kind=k, seed=seed + n) for n, k in zip((OUT, IN), kinds, strict=True))
    G, A = (
        side(*blocks, size=n, kind=k, seed=seed + 10 + n, symmetric=True) for n, k in zip((OUT, IN), kinds, strict=True)
    )
    return MatrixNormalGaussian(row, column), _at_most_half(A, column), _at_most_half(G, row)


def _at_most_half(factor: Tensor, root: Tensor) -> Tensor:
    """The factor at a scale at which two of them are ``0.5`` where the first product is white."""
    white = linalg.dense(linalg.congruence(factor, root))
    return factor / torch.linalg.eigvalsh(white).abs().amax(-1)[..., None, None] / 2**0.5


def total(first: MatrixNormalGaussian, A: Tensor, G: Tensor) -> Tensor:
    return first.to_dense() + dense_kron(linalg.dense(G).contiguous(), linalg.dense(A).contiguous())


def build(first: MatrixNormalGaussian, A: Tensor, G: Tensor) -> TwoKroneckerGaussian:
    (gaussian,) = with_second_product([first], [(A, G)], ["layer"])
    return gaussian


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("blocks", [(), (2,)])
def test_it_is_the_sum_of_both(blocks, kinds, sign):
    """``R ⊗ S ± P ⊗ Q``: precision, solution, determinant, and samples by their linear map."""
    first, A, G = parts(blocks, kinds)
    G = G * sign
    gaussian, P = build(first, A, G), total(first, A, G)
    assert_close(gaussian.to_dense(), P, **TIGHT)
    assert_close(gaussian.logdet(), torch.linalg.slogdet(P).logabsdet, **TIGHT)
    value = randn(*gaussian.shape, seed=7)
    expected = torch.linalg.solve(P, value.flatten(-2).unsqueeze(-1)).reshape(value.shape)
    assert_close(gaussian.solve(value), expected, **TIGHT)
    units = torch.eye(OUT * IN).double().reshape(-1, *[1] * len(blocks), OUT, IN).expand(-1, *gaussian.shape)
    B = gaussian.sample(units).flatten(-2).movedim(0, -1)
    assert_close(B @ B.mT, torch.linalg.inv(P), **TIGHT)
    assert torch.equal(gaussian.num_clamped, torch.zeros(blocks).double())
    assert linalg.is_diagonal(gaussian.basis_row) == (kinds[0] == "diagonal")
    assert linalg.is_diagonal(gaussian.basis_column) == (kinds[1] == "diagonal")


def test_both_may_be_definite():
    """The published case, as for two tasks: no direction is below the first product."""
    first, A, G = parts()
    A, G = A @ A, G @ G
    assert_close(build(first, A, G).to_dense(), total(first, A, G), **TIGHT)
    assert bool((build(first, A, G).precision >= 1 - 1e-12).all())


@pytest.mark.parametrize("scale", [2.0, 5.0, 1000.0])
@pytest.mark.parametrize("blocks", [(), (2,)])
def test_directions_that_the_second_takes_away_are_raised_and_counted(blocks, scale):
    """As eigenvalues of the sum where the first product is white: those below the floor are at it, others as before."""
    first, A, G = parts(blocks)
    gaussian, P = build(first, A, G * scale), total(first, A, G * scale)
    root = dense_kron(first.scale_tril_row, first.scale_tril_column)
    before = torch.linalg.eigvalsh(root.mT @ P @ root)
    after = torch.linalg.eigvalsh(root.mT @ gaussian.to_dense() @ root)
    assert_close(after, before.clamp(min=FLOOR).sort(-1).values, rtol=1e-8, atol=1e-8)
    assert torch.equal(gaussian.num_clamped, (before < FLOOR).sum(-1).double())
    assert bool((gaussian.num_clamped > 0).any())
    assert bool(torch.isfinite(gaussian.sample(randn(*gaussian.shape, seed=0))).all())


def test_the_count_is_kept_in_the_state():
    first, A, G = parts((2,))
    gaussian = build(first, A, G * 5)
    again = gaussian_from_state(gaussian.kind, gaussian.state)
    assert isinstance(again, TwoKroneckerGaussian)
    assert torch.equal(again.num_clamped, gaussian.num_clamped)
    single = gaussian.to(torch.float32)
    assert isinstance(single, TwoKroneckerGaussian)
    assert torch.equal(single.num_clamped, gaussian.num_clamped.float())


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_the_first_product_comes_back(kinds):
    """To start the next refresh from."""
    first, A, G = parts((2,), kinds)
    again = build(first, A, G).first
    assert_close(again.to_dense(), first.to_dense(), **TIGHT)
    assert_close(again.scale_tril_row, first.scale_tril_row, **TIGHT)
    assert_close(again.scale_tril_column, first.scale_tril_column, **TIGHT)


def test_blocks_of_many_shapes_are_each_their_own():
    several = [parts(()), parts((2,)), parts((), ("diagonal", "full")), parts((), seed=40)]
    gaussians = with_second_product(
        [first for first, _, _ in several], [(A, G) for _, A, G in several], [f"layer{i}" for i in range(4)]
    )
    for gaussian, (first, A, G) in zip(gaussians, several, strict=True):
        assert_close(gaussian.to_dense(), total(first, A, G), **TIGHT)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_a_factor_that_is_not_finite_is_an_error_that_names_the_layer(kind):
    first, A, G = parts((), (kind, "full"))
    G[0, 0] = torch.nan
    with pytest.raises(NotPositiveDefiniteError, match=r"'layer'.*NaN"):
        build(first, A, G)
