"""The Gaussian that is white in a Kronecker-factored basis, orthogonal or not, and the matrix normal nearest to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import linalg, structures
from bayes_kfac.curvature import Statistics
from bayes_kfac.structures import BlockSpec, KroneckerEigenGaussian, MatrixNormalGaussian, gaussian_from_state
from tests.helpers import dense_kron, randn, random_spd
from tests.random_rows import SEEDS, dense_rows

OUT, IN = 3, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
BLOCKS = [(), (2,), (2, 3)]


def basis(*blocks: int, size: int, kind: str, seed: int) -> Tensor:
    """A regular matrix, far from orthogonal and from symmetric; one that is triangular; one kept as its diagonal."""
    matrix = torch.eye(size).double() + 0.6 * randn(*blocks, size, size, seed=seed)
    if kind == "diagonal":
        return 0.3 + randn(*blocks, 1, size, seed=seed).square()
    return {"regular": matrix, "orthogonal": torch.linalg.qr(matrix)[0], "negative": -matrix}[kind]


def log_volume(row: Tensor, column: Tensor) -> Tensor:
    """``log |det (B_G ⊗ B_A)|``, from the whole product."""
    return torch.linalg.slogdet(dense_kron(linalg.dense(row).contiguous(), linalg.dense(column).contiguous())).logabsdet


def gaussian_of(
    blocks: tuple[int, ...] = (), row: str = "regular", column: str = "regular", seed: int = 0
) -> KroneckerEigenGaussian:
    bases = basis(*blocks, size=OUT, kind=row, seed=seed), basis(*blocks, size=IN, kind=column, seed=seed + 1)
    precision = 0.2 + randn(*blocks, OUT, IN, seed=seed + 2).square()
    return KroneckerEigenGaussian(*bases, precision, log_volume(*bases))


@pytest.fixture(params=[(row, column) for row in ("regular", "diagonal") for column in ("regular", "diagonal")])
def kinds(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(params=BLOCKS, ids=str)
def blocks(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


def covariance_of(gaussian: KroneckerEigenGaussian) -> Tensor:
    """``(B_G ⊗ B_A) diag(Λ)⁻¹ (B_G ⊗ B_A)ᵀ``, written out."""
    bases = (linalg.dense(factor).contiguous() for factor in (gaussian.basis_row, gaussian.basis_column))
    whole = dense_kron(*bases)
    return whole @ torch.diag_embed(1 / gaussian.precision.flatten(-2)) @ whole.mT


def columns(images: Tensor) -> Tensor:
    return images.flatten(-2).movedim(0, -1)


def units(gaussian: KroneckerEigenGaussian) -> Tensor:
    leading = gaussian.shape[:-2]
    return torch.eye(OUT * IN).double().reshape(-1, *[1] * len(leading), OUT, IN).expand(-1, *gaussian.shape)


def test_every_ability_is_that_of_the_dense_gaussian(blocks, kinds):
    """With bases of which neither is orthogonal: what holds for rotations alone would be found out."""
    gaussian = gaussian_of(blocks, *kinds)
    covariance, eye = covariance_of(gaussian), units(gaussian)
    precision = torch.linalg.inv(covariance)
    assert gaussian.shape == (*blocks, OUT, IN)
    assert_close(gaussian.to_dense(), precision, **CLOSE)
    B = columns(gaussian.sample(eye))
    assert_close(B @ B.mT, covariance, **CLOSE)
    assert_close(columns(gaussian.whiten(eye)), B.mT, **CLOSE)
    assert_close(columns(gaussian.solve(eye)), covariance, **CLOSE)
    assert_close(columns(gaussian.multiply(eye)), precision, **CLOSE)
    assert_close(gaussian.logdet(), torch.linalg.slogdet(precision).logabsdet, **CLOSE)
    assert_close(gaussian.marginal_variance().flatten(-2), covariance.diagonal(dim1=-2, dim2=-1), **CLOSE)
    assert_close(gaussian.trace_covariance(), covariance.diagonal(dim1=-2, dim2=-1).sum(-1), **CLOSE)


def test_maps_take_any_leading_dimensions(blocks, kinds):
    gaussian = gaussian_of(blocks, *kinds)
    value = randn(5, 2, *gaussian.shape, seed=5)
    precision = gaussian.to_dense()
    flat = value.flatten(-2).unsqueeze(-1)
    assert_close(gaussian.multiply(value), (precision @ flat).reshape(value.shape), **CLOSE)
    assert_close(gaussian.solve(value), torch.linalg.solve(precision, flat).reshape(value.shape), **CLOSE)
    assert_close(gaussian.multiply(gaussian.solve(value)), value, **CLOSE)


@pytest.mark.parametrize("shared", [1, 3, 12])
def test_products_of_jacobians_are_the_dense_ones(blocks, kinds, shared):
    gaussian = gaussian_of(blocks, *kinds)
    rows, others = (dense_rows(2, blocks, n, shared, in_=IN, out=OUT, seed=n) for n in (3, 4))
    J, K = rows.jacobians().flatten(-2), others.jacobians().flatten(-2)
    expected = torch.einsum("c...ni,...ij,d...mj->nmcd", J, covariance_of(gaussian), K)
    assert_close(gaussian.whitened_rows(rows).between(gaussian.whitened_rows(others)), expected, **CLOSE)
    within = torch.einsum("c...ni,...ij,d...nj->ncd", J, covariance_of(gaussian), J)
    assert_close(gaussian.whitened_rows(rows).covariance(), within, **CLOSE)
    assert_close(gaussian.whitened_rows(rows).variance(), within.diagonal(dim1=-2, dim2=-1), **CLOSE)


def test_the_volume_has_no_sign(blocks):
    """A reflection in the basis changes nothing."""
    gaussian = gaussian_of(blocks, "negative", "regular")
    mirrored = KroneckerEigenGaussian(
        -gaussian.basis_row, gaussian.basis_column, gaussian.precision, gaussian.log_volume
    )
    assert_close(mirrored.to_dense(), gaussian.to_dense(), **CLOSE)
    assert_close(gaussian.logdet(), torch.linalg.slogdet(gaussian.to_dense()).logabsdet, **CLOSE)


# State


def test_state_rebuilds_the_gaussian(blocks, kinds):
    gaussian = gaussian_of(blocks, *kinds)
    assert set(gaussian.state) == {"basis_row", "basis_column", "precision", "log_volume"}
    assert gaussian.state["log_volume"].shape == blocks
    rebuilt = gaussian_from_state("kron_eigen", {name: tensor.clone() for name, tensor in gaussian.state.items()})
    assert isinstance(rebuilt, KroneckerEigenGaussian)
    assert torch.equal(rebuilt.logdet(), gaussian.logdet())
    assert torch.equal(rebuilt.to_dense(), gaussian.to_dense())
    single = gaussian.to(torch.float32)
    assert {tensor.dtype for tensor in single.state.values()} == {torch.float32}
    assert_close(single.logdet().double(), gaussian.logdet(), rtol=1e-5, atol=1e-4)


def test_a_file_from_before_there_were_volumes_has_orthogonal_bases(blocks):
    """Three tensors: the volume of a rotation is one, its logarithm zero."""
    gaussian = gaussian_of(blocks, "orthogonal", "orthogonal")
    state = {name: tensor for name, tensor in gaussian.state.items() if name != "log_volume"}
    old = gaussian_from_state("kron_eigen", state)
    assert torch.equal(old.state["log_volume"], torch.zeros(blocks, dtype=torch.float64))
    assert_close(old.logdet(), torch.linalg.slogdet(gaussian.to_dense()).logabsdet, **CLOSE)
    assert_close(old.to_dense(), gaussian.to_dense(), **CLOSE)


def test_a_kron_fit_with_a_scalar_prior_has_the_volume_of_the_prior(blocks):
    """``R = I/√δ`` on one of the sides; a reader of its state need not know on which."""
    A, G = random_spd(*blocks, IN, seed=0), random_spd(*blocks, OUT, seed=1)
    statistics = Statistics({"input": A, "gradient": G}, {"input": 1.0, "gradient": 1.0})
    kron = structures.get("kron", damping="exact", sharing="expand")
    (gaussian,) = kron.gaussians([BlockSpec("layer", statistics, 20.0, 0.3)])
    expected = log_volume(gaussian.basis_row, gaussian.basis_column)
    assert_close(gaussian.log_volume, expected, **CLOSE)
    assert_close(gaussian.log_volume, torch.full(blocks, -0.5 * OUT * IN).double() * torch.tensor(0.3).double().log())


# The nearest matrix normal


def kl_divergence(q: Tensor, p: Tensor) -> Tensor:
    """``KL(q ‖ p)`` of two zero-mean Gaussians of precisions ``q`` and ``p``."""
    trace = torch.linalg.solve(q, p).diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (trace - p.shape[-1] + torch.logdet(q) - torch.logdet(p))


def test_the_nearest_matrix_normal_is_stationary_and_no_neighbour_is_nearer(blocks, kinds):
    gaussian = gaussian_of(blocks, *kinds)
    nearest = gaussian.nearest_matrix_normal()
    assert isinstance(nearest, MatrixNormalGaussian)
    assert nearest.shape == gaussian.shape
    p, q = gaussian.to_dense(), nearest.to_dense()
    best = kl_divergence(q, p)
    trace = torch.linalg.solve(q, p).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_close(trace, torch.full_like(trace, OUT * IN), **CLOSE)
    row, column = linalg.dense(nearest.scale_tril_row), linalg.dense(nearest.scale_tril_column)
    for seed in range(10):
        neighbour = MatrixNormalGaussian(
            row @ (torch.eye(OUT).double() + 0.01 * randn(OUT, OUT, seed=seed).tril()),
            column @ (torch.eye(IN).double() + 0.01 * randn(IN, IN, seed=seed + 100).tril()),
        )
        assert bool((kl_divergence(neighbour.to_dense(), p) > best).all())


def test_its_roots_are_lower_triangular_with_positive_diagonals(blocks, kinds):
    """As :class:`MatrixNormal` asks of them; diagonal sides stay diagonal."""
    nearest = gaussian_of(blocks, *kinds).nearest_matrix_normal()
    for root, kind in zip((nearest.scale_tril_row, nearest.scale_tril_column), kinds, strict=True):
        assert linalg.is_diagonal(root) == (kind == "diagonal")
        assert bool((linalg.diagonal(root) > 0).all())
        assert torch.equal(linalg.dense(root), linalg.dense(root).tril())


def test_it_is_the_optimal_damping_of_the_same_statistics(blocks):
    """Two ways to one optimum: of the eigenbasis, and the flip-flop of the factors."""
    A, G = random_spd(*blocks, IN, seed=0), random_spd(*blocks, OUT, seed=1)
    prior = MatrixNormalGaussian(
        torch.linalg.cholesky(random_spd(*blocks, OUT, seed=2)), torch.linalg.cholesky(random_spd(*blocks, IN, seed=3))
    )
    spec = BlockSpec("layer", Statistics({"input": A, "gradient": G}, {"input": 1.0, "gradient": 1.0}), 20.0, prior)
    exact, optimal = (
        structures.get("kron", damping=damping, sharing="expand").gaussians([spec])[0]
        for damping in ("exact", "optimal")
    )
    assert_close(exact.nearest_matrix_normal().to_dense(), optimal.to_dense(), rtol=1e-5, atol=1e-5)


@given(out=st.integers(1, 4), in_=st.integers(1, 4), seed=SEEDS)
def test_a_gaussian_that_is_a_matrix_normal_is_its_own_nearest(out, in_, seed):
    """``Λ`` of rank one, in any basis."""
    row = torch.eye(out).double() + 0.3 * randn(out, out, seed=seed)
    column = torch.eye(in_).double() + 0.3 * randn(in_, in_, seed=seed + 1)
    precision = (0.2 + randn(out, 1, seed=seed + 2).square()) * (0.2 + randn(1, in_, seed=seed + 3).square())
    gaussian = KroneckerEigenGaussian(row, column, precision)
    expected = covariance_of(gaussian)
    nearest = gaussian.nearest_matrix_normal()
    covariance = torch.kron(linalg.gram(nearest.scale_tril_row), linalg.gram(nearest.scale_tril_column))
    assert_close(covariance, expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))
