"""K-BFGS: the updates are BFGS's, and the roots that they keep follow K-FAC's factored posterior."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import structures
from bayes_kfac.curvature import Rows, Statistics
from bayes_kfac.errors import ArgumentError, NotPositiveDefiniteError
from bayes_kfac.structures import BlockGaussian, BlockSpec, KBFGSStructure, KroneckerEigenGaussian, MatrixNormalGaussian
from bayes_kfac.structures.kbfgs import bfgs_root
from tests.helpers import TIGHT, randn, random_spd
from tests.random_rows import dense_rows, tied_rows, words

OUT, IN = 3, 4


def orthonormal(size: int, count: int, *, seed: int) -> Tensor:
    return torch.linalg.qr(randn(size, count, seed=seed)).Q


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def spec_of(A: Tensor, G: Tensor, previous: BlockGaussian | None = None, *, scale: float = 30.0) -> BlockSpec:
    statistics = Statistics({"input": A, "gradient": G}, {"input": 1.0, "gradient": 1.0})
    return BlockSpec("layer", statistics, scale, 2.0, previous)


def build(spec: BlockSpec, **options) -> KroneckerEigenGaussian:
    (gaussian,) = KBFGSStructure(**options).gaussians([spec])
    assert isinstance(gaussian, KroneckerEigenGaussian)
    return gaussian


def factored(spec: BlockSpec) -> BlockGaussian:
    (gaussian,) = structures.get("kron", damping="factored", sharing="expand").gaussians([spec])
    return gaussian


def distance(gaussian: BlockGaussian, other: BlockGaussian) -> float:
    """How far the one's precision is from the other's in the other's coordinates, by the mean square."""
    L = torch.linalg.cholesky(torch.linalg.inv(other.to_dense()))
    return float((L.T @ gaussian.to_dense() @ L - eye(len(L))).norm() / math.sqrt(len(L)))


# One update


def test_with_one_direction_the_update_is_the_textbooks():
    """``(I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ`` with ``ρ = 1 / yᵀs``, ``y = P s``."""
    P, L = random_spd(6, seed=0), torch.linalg.cholesky(random_spd(6, seed=1))
    x = orthonormal(6, 1, seed=2)
    s = (L @ x).squeeze(-1)
    y = P @ s
    rho, H = 1 / (y @ s), L @ L.T
    expected = (eye(6) - rho * torch.outer(s, y)) @ H @ (eye(6) - rho * torch.outer(y, s)) + rho * torch.outer(s, s)
    root, _ = bfgs_root(L, P, x, "layer")
    assert_close(root @ root.T, expected, **TIGHT)


def test_the_direction_of_a_vector_is_that_of_the_preconditioned_vector():
    """K-BFGS's own direction ``s = H ā`` is ``L x`` with ``x`` along ``Lᵀ ā``, and its update the textbook's."""
    P, L, a = random_spd(6, seed=0), torch.linalg.cholesky(random_spd(6, seed=1)), randn(6, seed=2)
    x = torch.nn.functional.normalize(L.T @ a, dim=0).unsqueeze(-1)
    root, _ = bfgs_root(L, P, x, "layer")
    s = L @ L.T @ a
    assert_close(root @ root.T @ (P @ s), s, **TIGHT)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_secant_equation_and_the_log_determinant_are_exact(count):
    P, L = random_spd(2, 6, seed=0), torch.linalg.cholesky(random_spd(2, 6, seed=1))
    X = orthonormal(6, count, seed=2).expand(2, 6, count)
    S = L @ X
    root, change = bfgs_root(L, P, X, "layer")
    assert_close(root @ (root.mT @ (P @ S)), S, **TIGHT)
    assert_close(torch.linalg.slogdet(root).logabsdet, torch.linalg.slogdet(L).logabsdet + change, **TIGHT)
    assert bool((torch.linalg.eigvalsh(root @ root.mT) > 0).all())
    if count == 6:
        assert_close(root @ root.mT, torch.linalg.inv(P), **TIGHT)


def test_what_is_right_stays_right():
    """A direction in which the root is conjugate and right is kept by updates along others."""
    P, L = random_spd(6, seed=0), torch.linalg.cholesky(random_spd(6, seed=1))
    root, _ = bfgs_root(L, P, orthonormal(6, 2, seed=2), "layer")
    X = orthonormal(6, 2, seed=2)
    other = torch.linalg.qr(randn(6, 2, seed=3) - X @ (X.T @ randn(6, 2, seed=3))).Q
    again, _ = bfgs_root(root, P, other, "layer")
    S = L @ X
    assert_close(again @ (again.T @ (P @ S)), S, **TIGHT)


def test_updates_along_all_directions_one_by_one_reach_the_inverse():
    """BFGS with exact steps ends in as many steps as there are dimensions."""
    P, root = random_spd(6, seed=0), torch.linalg.cholesky(random_spd(6, seed=1))
    for i in range(6):
        root, _ = bfgs_root(root, P, eye(6)[:, i : i + 1], "layer")
    assert_close(root @ root.T, torch.linalg.inv(P), **TIGHT)


# The posterior


@pytest.mark.parametrize("rows", ["plain", "stacked", "words", "tied", "tied to words"])
def test_from_scratch_it_is_k_facs_factored_posterior(rows):
    measured = {
        "plain": lambda: dense_rows(2, (), 10, 2, in_=IN, out=OUT),
        "stacked": lambda: dense_rows(2, (2,), 10, 2, in_=IN, out=OUT),
        "words": lambda: Rows(words(10, 2, 2, size=IN), randn(2, 10, 2, OUT, seed=1)),
        "tied": lambda: tied_rows(batch=10, size=OUT, width=IN, sparse=False),
        "tied to words": lambda: tied_rows(batch=10, size=OUT, width=IN),
    }[rows]()
    blocks = measured.gradients.shape[1:-3]
    roots = [torch.linalg.cholesky(random_spd(*blocks, size, seed=size)) for size in (OUT, IN)]
    for prior in (0.7, torch.tensor([0.5, 1.0, 2.0, 4.0]).double(), MatrixNormalGaussian(*roots)):
        spec = BlockSpec("layer", KBFGSStructure().measure(measured), 20.0, prior)
        expected = factored(spec)
        gaussian = build(spec)
        for _ in range(3):
            assert_close(gaussian.to_dense(), expected.to_dense(), rtol=1e-9, atol=1e-9)
            assert_close(gaussian.logdet(), expected.logdet(), rtol=1e-9, atol=1e-9)
            gaussian = build(replace(spec, previous=gaussian), directions=2)


def test_with_all_directions_a_refresh_is_exact():
    start = build(spec_of(random_spd(IN, seed=0), random_spd(OUT, seed=1)))
    spec = spec_of(7 * random_spd(IN, seed=2), random_spd(OUT, seed=3), start)
    assert_close(build(spec).to_dense(), factored(spec).to_dense(), **TIGHT)


@pytest.mark.parametrize("rows", ["plain", "stacked", "words"])
def test_refreshes_of_low_rank_lead_to_the_posterior_from_anywhere(rows):
    """Those where the root is most wrong; the log determinant is carried along exactly."""
    measured, other = (
        {
            "plain": dense_rows(2, (), 20, 1, in_=6, out=5, seed=seed),
            "stacked": dense_rows(2, (2,), 20, 1, in_=6, out=5, seed=seed),
            "words": Rows(words(20, 1, 2, size=6, seed=seed), randn(2, 20, 1, 5, seed=seed)),
        }[rows]
        for seed in (0, 7)
    )
    structure = KBFGSStructure(directions=2)
    spec = BlockSpec("layer", structure.measure(measured), 20.0, 0.7)
    gaussian = build(BlockSpec("layer", structure.measure(other) * 3.0, 20.0, 0.7), directions=2)
    target = factored(spec)
    for _ in range(20):
        gaussian = build(replace(spec, previous=gaussian), directions=2)
        assert_close(gaussian.logdet(), torch.linalg.slogdet(gaussian.to_dense()).logabsdet, **TIGHT)
    assert_close(gaussian.to_dense(), target.to_dense(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shrinking", [1.0, 0.98])
def test_a_few_directions_follow_a_moving_average(shrinking):
    """Nearer than not moving by far, and nearer with more directions; gradients may shrink meanwhile."""
    size = 40
    basis = orthonormal(size, size, seed=0) * torch.arange(1, size + 1).double() ** -0.75
    G, errors = random_spd(OUT, seed=1), {}
    for directions in (0, 4, 12):
        A = basis @ basis.T
        gaussian = build(spec_of(A, G, scale=1e3))
        for step in range(60):
            inputs = randn(32, size, seed=step) @ basis.T * shrinking**step
            A = 0.95 * A + 0.05 * inputs.T @ inputs / 32
            if directions:
                gaussian = build(spec_of(A, G, gaussian, scale=1e3), directions=directions)
        errors[directions] = distance(gaussian, factored(spec_of(A, G, scale=1e3)))
    assert errors[12] < 0.5 * errors[4] < 0.25 * errors[0]
    assert errors[4] < 0.15


def test_a_previous_gaussian_that_is_no_matrix_normal_is_no_start():
    spec = spec_of(random_spd(IN, seed=0), random_spd(OUT, seed=1))
    (exact,) = structures.get("kron", damping="exact", sharing="expand").gaussians([spec])
    for previous in (exact, factored(spec), build(spec_of(random_spd(OUT, seed=1), random_spd(OUT, seed=1)))):
        assert torch.equal(build(replace(spec, previous=previous), directions=1).to_dense(), build(spec).to_dense())


def test_blocks_with_and_without_a_start_are_built_side_by_side():
    A, G = random_spd(IN, seed=0), random_spd(OUT, seed=1)
    start, structure = build(spec_of(A, G)), KBFGSStructure(directions=1)
    specs = [spec_of(2 * A, G, start), spec_of(A, 2 * G), spec_of(3 * A, G, start), spec_of(G, A)]
    for spec, gaussian in zip(specs, structure.gaussians(specs), strict=True):
        assert_close(gaussian.to_dense(), build(spec, directions=1).to_dense(), **TIGHT)


def test_factors_with_nan_are_an_error_that_names_the_layer():
    A, G = random_spd(IN, seed=0), random_spd(OUT, seed=1)
    for previous in (None, build(spec_of(A, G))):
        with pytest.raises(NotPositiveDefiniteError, match=r"'layer'.*NaN"):
            build(spec_of(A * math.nan, G, previous))


def test_options_are_kept_and_checked():
    again = KBFGSStructure(directions=5).configured(damping="exact", sharing="reduce")
    assert (again.options, again.damping) == ({"directions": 5}, "factored")
    with pytest.raises(ArgumentError, match="directions=0"):
        KBFGSStructure(directions=0)
