"""K-FAC's Gaussians against the formulas of its three dampings, written with ``torch.kron``."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import linalg, structures
from bayes_kfac.curvature import Statistics
from bayes_kfac.curvature.statistics import kronecker_factors
from bayes_kfac.errors import NotPositiveDefiniteError
from bayes_kfac.structures import BlockGaussian, BlockSpec, KroneckerEigenGaussian, MatrixNormalGaussian, Structure
from bayes_kfac.structures.damping import optimal_spectra
from bayes_kfac.structures.kron import _sum_of_products
from tests.helpers import TIGHT, Rows, dense_kron, randn, random_spd
from tests.random_rows import SEEDS

OUT, IN = 3, 4
DAMPINGS = structures.DAMPING_KINDS
#: How near dense turns of the two equations come to the optimum.
CONVERGED = {"rtol": 1e-5, "atol": 1e-5}


def kron(damping: str, sharing: str = "expand") -> Structure:
    return structures.get("kron", damping=damping, sharing=sharing)


def random_factors(*blocks: int, out: int = OUT, in_: int = IN, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``A`` and ``G``, of very different traces so that π matters."""
    return 5.0 * random_spd(*blocks, in_, seed=seed), 0.2 * random_spd(*blocks, out, seed=seed + 1)


def spec_of(
    A: Tensor,
    G: Tensor,
    data_scale: float = 30.0,
    prior_precision: float = 2.0,
    previous: BlockGaussian | None = None,
    name: str = "layer",
) -> BlockSpec:
    """Sums and counts whose averages are ``A`` and ``G``."""
    statistics = Statistics({"input": 40 * A, "gradient": 10 * G}, {"input": 40.0, "gradient": 10.0})
    return BlockSpec(name, statistics, data_scale, prior_precision, previous)


def build(damping: str, spec: BlockSpec) -> BlockGaussian:
    (gaussian,) = kron(damping).gaussians([spec])
    return gaussian


def identity(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def factored_precision(A: Tensor, G: Tensor, data_scale: float, prior_precision: float) -> Tensor:
    """``(N/τ) (G + √γ/π I) ⊗ (A + π√γ I)`` of one block, ``π² = (tr A / dim A) / (tr G / dim G)``."""
    gamma = prior_precision / data_scale
    pi = math.sqrt((torch.trace(A) / len(A)) / (torch.trace(G) / len(G)))
    return data_scale * torch.kron(G + math.sqrt(gamma) / pi * identity(G), A + pi * math.sqrt(gamma) * identity(A))


def exact_precision(A: Tensor, G: Tensor, data_scale: float, prior_precision: float) -> Tensor:
    """``(N/τ) G ⊗ A + δ I`` of one block."""
    product = torch.kron(G, A)
    return data_scale * product + prior_precision * identity(product)


def kl_divergence(q: Tensor, p: Tensor) -> Tensor:
    """``KL(q ‖ p)`` of two zero-mean Gaussians, from their dense precisions."""
    trace = torch.trace(p @ torch.linalg.inv(q))
    return 0.5 * (trace - len(p) + torch.logdet(q) - torch.logdet(p))


# The three dampings


@pytest.mark.parametrize("prior_precision", [0.02, 2.0, 200.0])
def test_factored_is_the_product_of_damped_factors(prior_precision):
    A, G = random_factors()
    gaussian = build("factored", spec_of(A, G, 30.0, prior_precision))
    assert isinstance(gaussian, MatrixNormalGaussian)
    assert_close(gaussian.to_dense(), factored_precision(A, G, 30.0, prior_precision), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("prior_precision", [0.02, 2.0, 200.0])
def test_exact_is_the_product_plus_the_prior(prior_precision):
    A, G = random_factors()
    gaussian = build("exact", spec_of(A, G, 30.0, prior_precision))
    assert isinstance(gaussian, KroneckerEigenGaussian)
    assert_close(gaussian.to_dense(), exact_precision(A, G, 30.0, prior_precision), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(("damping", "formula"), [("factored", factored_precision), ("exact", exact_precision)])
def test_each_of_stacked_blocks_has_its_own_pi(damping, formula):
    A, G = random_factors(2)
    A, G = A * torch.tensor([1.0, 50.0])[:, None, None], G * torch.tensor([3.0, 0.1])[:, None, None]
    dense = build(damping, spec_of(A, G)).to_dense()
    for i in range(2):
        assert_close(dense[i], formula(A[i], G[i], 30.0, 2.0), rtol=1e-10, atol=1e-9)


def test_pi_balances_the_mean_eigenvalues():
    """π is a square root: each side is damped by the same fraction of its own mean eigenvalue."""
    A, G = random_factors()
    gaussian = build("factored", spec_of(A, G, data_scale=1.0, prior_precision=0.09))
    row_precision = torch.linalg.inv(gaussian.scale_tril_row @ gaussian.scale_tril_row.T)
    column_precision = torch.linalg.inv(gaussian.scale_tril_column @ gaussian.scale_tril_column.T)
    damping_G, damping_A = (row_precision - G).diagonal(), (column_precision - A).diagonal()
    assert_close((damping_A / (torch.trace(A) / IN)).mean(), (damping_G / (torch.trace(G) / OUT)).mean(), **TIGHT)
    assert_close(damping_A[0] * damping_G[0], torch.tensor(0.09, dtype=torch.float64), **TIGHT)


def test_factored_is_tighter_than_exact_in_every_direction():
    """Its cross terms only add precision: the documented loss of variance."""
    A, G = random_factors()
    factored, exact = (build(damping, spec_of(A, G)) for damping in ("factored", "exact"))
    assert bool((torch.linalg.eigvalsh(factored.to_dense() - exact.to_dense()) > 0).all())
    assert bool((factored.marginal_variance() < exact.marginal_variance()).all())


def test_without_a_prior_to_speak_of_the_dampings_agree():
    A, G = random_factors()
    expected = torch.kron(G, A)
    for damping in DAMPINGS:
        dense = build(damping, spec_of(A, G, data_scale=1.0, prior_precision=1e-14)).to_dense()
        assert_close(dense, expected, rtol=1e-4, atol=1e-5)


# The optimal matrix normal


def covariances(gaussian: BlockGaussian, data_scale: float) -> tuple[Tensor, Tensor]:
    """``U`` and ``V`` of ``(G ⊗ A + γ I)⁻¹``, without the factor ``τ/N``."""
    assert isinstance(gaussian, MatrixNormalGaussian)
    U = data_scale * gaussian.scale_tril_row @ gaussian.scale_tril_row.mT
    return U, gaussian.scale_tril_column @ gaussian.scale_tril_column.mT


def assert_stationary(gaussian: BlockGaussian, A: Tensor, G: Tensor, scale: float, prior: float, **tolerance) -> None:
    U, V = covariances(gaussian, scale)
    gamma = prior / scale
    for own, other, mine, yours in [(G, A, U, V), (A, G, V, U)]:
        right = (torch.trace(other @ yours) * own + gamma * torch.trace(yours) * identity(own)) / len(other)
        left = torch.linalg.inv(mine)
        assert_close(left / left.norm(), right / left.norm(), **tolerance)


@pytest.mark.parametrize("prior", [0.03, 3.0, 300.0])
def test_optimal_satisfies_both_stationarity_equations(prior):
    """``U⁻¹ = (tr(AV) G + γ tr(V) I)/in`` and ``V⁻¹ = (tr(GU) A + γ tr(U) I)/out``."""
    A, G = random_factors()
    assert_stationary(build("optimal", spec_of(A, G, 30.0, prior)), A, G, 30.0, prior, **CONVERGED)


def test_optimal_is_not_at_its_end_where_a_second_sweep_moves_further_than_the_first():
    A, G = random_factors(out=5, in_=2, seed=872146)
    A, G = A.flip(0, 1), G[[3, 1, 4, 0, 2]][:, [3, 1, 4, 0, 2]]
    assert_stationary(build("optimal", spec_of(A, G)), A, G, 30.0, 2.0, **CONVERGED)


def test_warm_sweeps_reach_the_stationary_point_to_rounding():
    A, G = random_factors()
    gaussian = build("factored", spec_of(A, G))
    for _ in range(20):
        gaussian = build("optimal", spec_of(A, G, previous=gaussian))
    assert_stationary(gaussian, A, G, 30.0, 2.0, rtol=0, atol=1e-11)
    assert_close(gaussian.to_dense(), build("optimal", spec_of(A, G)).to_dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prior", [0.03, 3.0, 300.0])
def test_optimal_is_nearer_to_the_exact_posterior_than_factored(prior):
    A, G = random_factors()
    exact = exact_precision(A, G, 30.0, prior)
    optimal, factored = (
        kl_divergence(build(damping, spec_of(A, G, 30.0, prior)).to_dense(), exact)
        for damping in ("optimal", "factored")
    )
    assert 0 < optimal < factored


def test_no_matrix_normal_nearby_is_nearer_than_the_optimal_one():
    A, G = random_factors()
    exact, optimal = exact_precision(A, G, 30.0, 2.0), build("optimal", spec_of(A, G))
    best = kl_divergence(optimal.to_dense(), exact)
    for seed in range(20):
        neighbour = MatrixNormalGaussian(
            optimal.scale_tril_row @ (identity(G) + 0.02 * randn(OUT, OUT, seed=seed).tril()),
            optimal.scale_tril_column @ (identity(A) + 0.02 * randn(IN, IN, seed=seed + 100).tril()),
        )
        assert kl_divergence(neighbour.to_dense(), exact) > best


def test_warm_sweeps_approach_the_optimum_from_anywhere_and_never_step_back():
    A, G = random_factors()
    exact = exact_precision(A, G, 30.0, 2.0)
    best = kl_divergence(build("optimal", spec_of(A, G)).to_dense(), exact)
    gaussian: BlockGaussian = MatrixNormalGaussian(
        torch.linalg.cholesky(random_spd(OUT, seed=8)), torch.linalg.cholesky(random_spd(IN, seed=9))
    )
    distances = [kl_divergence(gaussian.to_dense(), exact)]
    for _ in range(6):
        gaussian = build("optimal", spec_of(A, G, previous=gaussian))
        distances.append(kl_divergence(gaussian.to_dense(), exact))
    assert all(later <= earlier + 1e-10 for earlier, later in pairwise(distances))
    assert distances[0] > best + 0.1
    assert_close(distances[-1], best, rtol=0, atol=1e-9)


def test_a_warm_start_follows_slowly_moving_factors():
    """A refresh in training starts where the last one ended, and stays near the optimum."""
    A, G = random_factors()
    gaussian = build("optimal", spec_of(A, G))
    for step in range(5):
        A, G = 0.9 * A + 0.1 * random_spd(IN, seed=50 + step), 0.9 * G + 0.1 * random_spd(OUT, seed=60 + step)
        gaussian = build("optimal", spec_of(A, G, previous=gaussian))
        exact = exact_precision(A, G, 30.0, 2.0)
        best = kl_divergence(build("optimal", spec_of(A, G)).to_dense(), exact)
        assert_close(kl_divergence(gaussian.to_dense(), exact), best, rtol=1e-3, atol=0)


def test_a_previous_gaussian_of_another_kind_is_no_start():
    A, G = random_factors()
    other = build("exact", spec_of(A, G))
    assert_close(
        build("optimal", spec_of(A, G, previous=other)).to_dense(), build("optimal", spec_of(A, G)).to_dense(), **TIGHT
    )


def test_a_warm_start_keeps_a_diagonal_side_a_row():
    """Of 200,000 words the matrix would take 320 GB."""
    A, G = 1 + randn(1, 200_000, seed=0).square(), random_spd(2, seed=1)
    gaussian = build("optimal", spec_of(A, G))
    warm = build("optimal", spec_of(A, G, previous=gaussian))
    assert_close(warm.marginal_variance(), gaussian.marginal_variance(), **CONVERGED)


def test_some_blocks_with_and_some_without_a_previous_gaussian():
    """A layer that joins late starts from scratch, and leaves the others as they would be without it."""
    A, G = random_factors()
    follower = spec_of(A, G, previous=build("factored", spec_of(A, G)))
    followed, *fresh = kron("optimal").gaussians([follower, spec_of(2 * A, G), spec_of(A, 3 * G)])
    assert_close(followed.to_dense(), build("optimal", follower).to_dense())
    for gaussian, (one, other) in zip(fresh, [(2 * A, G), (A, 3 * G)], strict=True):
        assert_stationary(gaussian, one, other, 30.0, 2.0, **CONVERGED)


@pytest.mark.parametrize("damping", ["factored", "exact"])
def test_only_the_optimal_damping_depends_on_the_previous_gaussian(damping):
    A, G = random_factors()
    previous = build(damping, spec_of(*random_factors(seed=7)))
    assert torch.equal(
        build(damping, spec_of(A, G, previous=previous)).to_dense(), build(damping, spec_of(A, G)).to_dense()
    )


# Known traps


def test_noise_is_scaled_by_the_root_of_temperature_over_data():
    """``W = sqrt(τ/N) R_G E R_Aᵀ``: a hundred times the data is a tenth of the noise."""
    A, G = random_factors()
    E = randn(OUT, IN, seed=3)
    N, tau, delta = 600.0, 0.3, 2.0
    gamma = tau * delta / N
    pi = math.sqrt((torch.trace(A) / IN) / (torch.trace(G) / OUT))
    R_G = torch.linalg.cholesky(torch.linalg.inv(G + math.sqrt(gamma) / pi * identity(G)))
    R_A = torch.linalg.cholesky(torch.linalg.inv(A + pi * math.sqrt(gamma) * identity(A)))
    expected = math.sqrt(tau / N) * R_G @ E @ R_A.T
    assert_close(build("factored", spec_of(A, G, N / tau, delta)).sample(E), expected, **TIGHT)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_noise_shrinks_with_the_root_of_the_data(damping):
    A, G = random_factors()
    E = randn(OUT, IN, seed=3)
    small = build(damping, spec_of(A, G, 10.0, 1e-9)).sample(E)
    large = build(damping, spec_of(A, G, 1000.0, 1e-7)).sample(E)
    assert_close(large, small / 10, **TIGHT)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_a_square_block_does_not_confuse_rows_with_columns_or_a_root_with_its_transpose(damping):
    """``cov(vec W) = U ⊗ V`` with ``U Uᵀ``-roots applied from the proper side, in a block where shapes cannot tell."""
    A, G = random_factors(out=3, in_=3)
    gaussian = build(damping, spec_of(A, G, data_scale=7.0, prior_precision=1e-12))
    covariance = torch.kron(torch.linalg.inv(G), torch.linalg.inv(A)) / 7.0
    B = gaussian.sample(torch.eye(9, dtype=torch.float64).reshape(9, 3, 3)).reshape(9, 9).T
    scale = covariance.abs().max()
    assert_close(B @ B.T / scale, covariance / scale, rtol=0, atol=1e-5)
    for wrong in (
        torch.kron(torch.linalg.inv(A), torch.linalg.inv(G)) / 7.0,
        B.T @ B,
    ):
        assert bool(((B @ B.T - wrong).abs() / scale > 1e-2).any())
    V = randn(3, 3, seed=5)
    assert_close(
        gaussian.solve(V) / scale, torch.linalg.inv(G) @ V @ torch.linalg.inv(A) / 7.0 / scale, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("damping", DAMPINGS)
def test_refreshing_does_not_damp_the_running_factors(damping):
    """Sums and averages stay what they were, also where an average is its sum."""
    A, G = random_factors()
    statistics = Statistics({"input": A.clone(), "gradient": G.clone()}, {"input": 1.0, "gradient": 1.0})
    spec = BlockSpec("layer", statistics, 30.0, 2.0)
    first = build(damping, spec)
    for _ in range(3):
        again = build(damping, spec)
    assert torch.equal(statistics.sums["input"], A)
    assert torch.equal(statistics.sums["gradient"], G)
    assert torch.equal(first.to_dense(), again.to_dense())


@pytest.mark.parametrize("damping", DAMPINGS)
def test_changing_the_statistics_later_does_not_change_a_gaussian(damping):
    A, G = random_factors()
    statistics = Statistics({"input": A, "gradient": G}, {"input": 1.0, "gradient": 1.0})
    gaussian = build(damping, BlockSpec("layer", statistics, 30.0, 2.0))
    before = gaussian.to_dense()
    A.mul_(7)
    G.add_(1)
    assert torch.equal(gaussian.to_dense(), before)


# Degenerate statistics


def test_a_zero_factor_in_one_of_stacked_blocks_leaves_the_other_alone():
    A, G = random_factors(2)
    G[0] = 0
    dense = build("factored", spec_of(A, G)).to_dense()
    assert bool(torch.isfinite(dense).all())
    assert_close(dense[1], factored_precision(A[1], G[1], 30.0, 2.0), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("dead", ["A", "G", "AG"])
def test_one_zero_factor_gives_the_prior(damping, dead):
    A, G = random_factors()
    A, G = A * ("A" not in dead), G * ("G" not in dead)
    dense = build(damping, spec_of(A, G)).to_dense()
    assert_close(dense, 2.0 * identity(dense), **TIGHT)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("gamma", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
def test_duplicate_features_are_survived_in_float32(damping, gamma):
    """``A`` is singular, so that all precision in one direction is the damping's, far below float32's rounding."""
    for seed in range(8):
        inputs, gradients = randn(50, 6, seed=seed), randn(6, 3, seed=seed + 4)
        inputs = torch.cat([inputs, inputs[:, :2]], dim=1)
        A, G = (inputs.T @ inputs / 50).float(), (gradients.T @ gradients / 6).float()
        gaussian = build(damping, spec_of(A, G, 1 / gamma, 1.0))
        assert {tensor.dtype for tensor in gaussian.state.values()} == {torch.float32}
        samples = gaussian.sample(randn(20, 3, 8, seed=2).float())
        variance = gaussian.marginal_variance()
        assert bool(torch.isfinite(samples).all())
        assert bool(torch.isfinite(gaussian.solve(samples)).all())
        assert bool(torch.isfinite(gaussian.logdet()))
        assert bool((variance > 0).all())
        assert bool((variance <= 2).all())  # the prior's is 1


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("gamma", [1e-6, 1e-8])
def test_fewer_examples_than_features_are_survived_in_float32(damping, gamma):
    """Half of the directions have no data, and rounding is above the damping: too tight there, and nothing worse."""
    inputs = randn(64, 128, seed=0)
    A, G = (inputs.T @ inputs / 64).float(), random_spd(8, seed=1).float()
    gaussian = build(damping, spec_of(A, G, 1 / gamma, 1.0))
    noise = randn(5, 8, 128, seed=2).float()
    for _ in range(30):  # refreshes of a training run
        gaussian = build(damping, spec_of(A, G, 1 / gamma, 1.0, previous=gaussian))
    assert bool(torch.isfinite(gaussian.sample(noise)).all())
    assert bool((gaussian.marginal_variance() > 0).all())
    assert bool((gaussian.marginal_variance() <= 1.1).all())


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("gamma", [1e-5, 1e-6, 1e-8])
def test_directions_without_data_keep_much_of_the_priors_variance_in_float32(damping, gamma):
    """As along features that add up to the bias; ``factored`` is narrower by itself."""
    inputs = randn(64, 2, seed=0) @ randn(2, 9, seed=1)
    A, G = inputs.T @ inputs / 64, 100 * random_spd(4, seed=2)
    off = torch.linalg.svd(inputs).Vh[2:].unsqueeze(1)
    rows = Rows(off, randn(1, len(off), 1, 4, seed=3))
    found = []
    for dtype in (torch.float64, torch.float32):
        gaussian = build(damping, spec_of(A.to(dtype), G.to(dtype), 1 / gamma, 1.0))
        found.append(gaussian.whitened_rows(rows.to(dtype)).variance().double().mean())
    assert 0.2 * found[0] < found[1] < 1.5 * found[0]


@pytest.mark.parametrize("damping", DAMPINGS)
def test_a_factor_with_nan_is_an_error_that_names_the_layer(damping):
    A, G = random_factors()
    specs = [spec_of(A, G), spec_of(A * math.nan, G, name="encoder.2")]
    with pytest.raises(NotPositiveDefiniteError, match=r"'encoder\.2'.*NaN") as caught:
        kron(damping).gaussians(specs)
    assert "'layer'" not in str(caught.value)


# Young averages


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_blending_is_an_average_that_started_at_the_identity(steps):
    """A debiased average of k updates, blended by ``decay^k``, is the biased recursion from ``F = I``."""
    decay, structure = 0.95, kron("factored")
    batches = [spec_of(*random_factors(2, seed=10 * step)).statistics for step in range(steps)]
    debiased = batches[0] * 0.0
    A, G = torch.eye(IN, dtype=torch.float64).expand(2, -1, -1), torch.eye(OUT, dtype=torch.float64).expand(2, -1, -1)
    for batch in batches:
        debiased = debiased.moving_average(batch, decay)
        A = decay * A + (1 - decay) * batch.mean("input")
        G = decay * G + (1 - decay) * batch.mean("gradient")
    identity = structure.identity((2, OUT, IN), torch.zeros((), dtype=torch.float64))
    blended = debiased.lean(identity, decay**steps)
    assert blended.counts == debiased.counts
    assert_close(blended.mean("input"), A, **TIGHT)
    assert_close(blended.mean("gradient"), G, **TIGHT)


def test_sharing_decides_what_is_measured():
    rows = Rows(randn(5, 3, IN, seed=0), randn(2, 5, 3, OUT, seed=1))
    for sharing in ("expand", "reduce"):
        measured, expected = kron("factored", sharing).measure(rows), kronecker_factors(rows, sharing)
        assert_close(measured.mean("input"), expected.mean("input"), **TIGHT)
        assert_close(measured.mean("gradient"), expected.mean("gradient"), **TIGHT)
    assert not torch.equal(kron("factored", "expand").measure(rows).sums["input"], expected.sums["input"])


# Diagonal sides


def as_diagonals(A: Tensor, G: Tensor, sides: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The factors with some of them diagonal, as they are kept and as matrices."""
    kept = [factor.diagonal()[None] if side in sides else factor for side, factor in (("A", A), ("G", G))]
    return *kept, *(torch.diag(factor[0]) if len(factor) == 1 else factor for factor in kept)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("sides", ["A", "G", "AG"])
def test_a_diagonal_factor_gives_the_gaussian_of_its_matrix(damping, sides):
    """Of an embedding's words, or of what they are tied to; kept as one row, never as a matrix."""
    A, G, dense_A, dense_G = as_diagonals(*random_factors(), sides)
    gaussian, expected = build(damping, spec_of(A, G)), build(damping, spec_of(dense_A, dense_G))
    assert type(gaussian) is type(expected)
    assert_close(gaussian.to_dense(), expected.to_dense(), rtol=1e-9, atol=1e-9)
    V = randn(2, OUT, IN, seed=3)
    assert_close(gaussian.solve(V), expected.solve(V), **TIGHT)
    shapes = {tuple(tensor.shape) for tensor in gaussian.state.values()}
    assert (1, IN) in shapes or "A" not in sides
    assert (1, OUT) in shapes or "G" not in sides


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("dead", ["A", "G", "AG"])
def test_a_diagonal_factor_of_zeros_gives_the_prior(damping, dead):
    """Words that no batch has shown."""
    A, G, *_ = as_diagonals(*random_factors(), "A")
    dense = build(damping, spec_of(A * ("A" not in dead), G * ("G" not in dead))).to_dense()
    assert_close(dense, 2.0 * identity(dense), **TIGHT)


def test_a_diagonal_factor_with_nan_is_an_error_that_names_the_layer():
    A, G, *_ = as_diagonals(*random_factors(), "A")
    for damping in DAMPINGS:
        with pytest.raises(NotPositiveDefiniteError, match=r"'words'.*NaN"):
            kron(damping).gaussians([spec_of(A, G), spec_of(A * math.nan, G, name="words")])


@pytest.mark.parametrize("damping", DAMPINGS)
def test_a_word_that_is_seen_more_often_is_known_better(damping):
    counts = torch.tensor([[0.0, 1.0, 10.0, 100.0]], dtype=torch.float64)
    variance = build(damping, spec_of(counts, random_spd(OUT, seed=1))).marginal_variance()
    assert bool((variance.diff(dim=-1) < 0).all())


# Tied weights: the sum of two products


def tied_spec(A: Tensor, G: Tensor, B: Tensor, H: Tensor, previous: BlockGaussian | None = None) -> BlockSpec:
    """``G ⊗ A + H ⊗ B``; the transposed uses have their inputs on the output side. Counts differ."""
    means = {"input": A, "gradient": G, "transposed_input": H, "transposed_gradient": B}
    counts = dict(zip(means, (40.0, 10.0, 30.0, 10.0), strict=True))
    sums = {name: counts[name] * mean for name, mean in means.items()}
    return BlockSpec("layer", Statistics(sums, counts), 30.0, 2.0, previous)


def one_product(A: Tensor, G: Tensor, B: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the sum's partial traces over its trace, from the dense sum."""
    whole = (torch.kron(G, A) + torch.kron(H, B)).reshape(len(G), len(A), len(G), len(A))
    return torch.einsum("aiaj->ij", whole) / torch.einsum("aiai->", whole), torch.einsum("aibi->ab", whole)


@pytest.mark.parametrize("sides", ["", "G"])
def test_tied_weights_have_the_gaussian_of_one_product(sides):
    """Its factors are the sum's partial traces; where the words are on the output side both of its factors are rows."""
    A, G = random_factors()
    B, H = random_factors(seed=5)
    kept_A, kept_G, A, G = as_diagonals(A, G, sides)
    kept_B, kept_H, B, H = as_diagonals(B, H, sides)
    spec, (left, right) = tied_spec(kept_A, kept_G, kept_B, kept_H), one_product(A, G, B, H)
    for damping, formula in [("factored", factored_precision), ("exact", exact_precision)]:
        assert_close(build(damping, spec).to_dense(), formula(left, right, 30.0, 2.0), rtol=1e-10, atol=1e-9)
    optimal = build("optimal", spec)
    assert_close(optimal.to_dense(), build("optimal", spec_of(left, right)).to_dense(), **CONVERGED)
    warm = build("optimal", replace(spec, previous=optimal))
    assert_close(warm.to_dense(), optimal.to_dense(), **CONVERGED)


@given(out=st.integers(1, 4), in_=st.integers(1, 4), seed=SEEDS, log_c=st.floats(-3, 3), side=st.sampled_from("AG"))
def test_a_sum_of_products_that_is_one_is_kept(out, in_, seed, log_c, side):
    """Two products that are proportional on one side, as where one module is called twice."""
    A, G = random_factors(out=out, in_=in_, seed=seed)
    B, H = random_factors(out=out, in_=in_, seed=seed + 5)
    A, G, B, H = (A, G, 10**log_c * A, H) if side == "A" else (A, G, B, 10**log_c * G)
    left, right = _sum_of_products(A, G, B, H)
    expected = torch.kron(G, A) + torch.kron(H, B)
    assert_close(torch.kron(right, left), expected, rtol=1e-9, atol=1e-9 * float(expected.max()))


@given(out=st.integers(1, 4), in_=st.integers(1, 4), seed=SEEDS, sides=st.sampled_from(["", "A", "G", "AG"]))
def test_a_sum_of_products_keeps_its_trace_and_definiteness(out, in_, seed, sides):
    A, G = random_factors(out=out, in_=in_, seed=seed)
    B, H = random_factors(out=out, in_=in_, seed=seed + 5)
    kept_A, kept_G, A, G = as_diagonals(A, G, sides)
    kept_B, kept_H, B, H = as_diagonals(B, H, sides)
    left, right = (linalg.dense(factor) for factor in _sum_of_products(kept_A, kept_G, kept_B, kept_H))
    trace = torch.trace(A) * torch.trace(G) + torch.trace(B) * torch.trace(H)
    assert_close(torch.trace(left) * torch.trace(right), trace, rtol=1e-10, atol=0)
    for factor in (left, right):
        assert bool((torch.linalg.eigvalsh(factor) > 0).all())


def test_a_sum_of_nothing_is_nothing():
    """Before any gradient: no division by a trace of zero."""
    zeros = [torch.zeros(2, 3, 3), torch.zeros(2, 2, 2)] * 2
    assert not any(factor.any() or factor.isnan().any() for factor in _sum_of_products(*zeros))
    A, G = random_factors()
    left, right = _sum_of_products(A, G, 0 * A, 0 * G)
    assert_close(torch.kron(right, left), torch.kron(G, A), **TIGHT)


# Properties


sizes = st.integers(1, 5)
log_scales = st.floats(-3, 3)


@given(out=sizes, in_=sizes, seed=SEEDS, log_c=log_scales, log_prior=log_scales, damping=st.sampled_from(DAMPINGS))
def test_scale_may_move_between_the_factors(out, in_, seed, log_c, log_prior, damping):
    """``A → cA, G → G/c`` is the same Fisher, hence the same Gaussian."""
    A, G = random_factors(out=out, in_=in_, seed=seed)
    c, prior = 10**log_c, 10**log_prior
    before, after = build(damping, spec_of(A, G, 30.0, prior)), build(damping, spec_of(c * A, G / c, 30.0, prior))
    tolerance = {"optimal": 1e-5}.get(damping, 1e-9)
    assert_close(after.to_dense(), before.to_dense(), rtol=tolerance, atol=tolerance * float(before.to_dense().max()))


@given(out=sizes, in_=sizes, seed=SEEDS, log_c=log_scales, damping=st.sampled_from(DAMPINGS))
def test_a_reparametrised_likelihood_scale_is_a_data_scale(out, in_, seed, log_c, damping):
    """``c`` times the Fisher for ``N`` data is the Fisher for ``c N`` data."""
    A, G = random_factors(out=out, in_=in_, seed=seed)
    c = 10**log_c
    fisher, data = build(damping, spec_of(A, c * G, 30.0, 2.0)), build(damping, spec_of(A, G, c * 30.0, 2.0))
    tolerance = {"optimal": 1e-5}.get(damping, 1e-9)
    assert_close(fisher.to_dense(), data.to_dense(), rtol=tolerance, atol=tolerance * float(data.to_dense().max()))


@given(
    out=sizes, in_=sizes, seed=SEEDS, damping=st.sampled_from(DAMPINGS), permutations=st.randoms(use_true_random=False)
)
def test_permuting_units_permutes_the_gaussian(out, in_, seed, damping, permutations):
    """Renumbering inputs and outputs of a layer renumbers its posterior, and nothing else."""
    A, G = random_factors(out=out, in_=in_, seed=seed)
    rows, columns = list(range(out)), list(range(in_))
    permutations.shuffle(rows)
    permutations.shuffle(columns)
    before, after = build(damping, spec_of(A, G)), build(damping, spec_of(A[columns][:, columns], G[rows][:, rows]))
    V = randn(out, in_, seed=seed)
    tolerance = {"optimal": 1e-5}.get(damping, 1e-9)
    close = {"rtol": tolerance, "atol": tolerance}
    assert_close(after.marginal_variance(), before.marginal_variance()[rows][:, columns], **close)
    assert_close(after.solve(V[rows][:, columns]), before.solve(V)[rows][:, columns], **close)
    assert_close(after.logdet(), before.logdet(), **close)


@given(out=sizes, in_=sizes, seed=SEEDS, log_prior=log_scales)
def test_optimal_is_never_further_than_factored_and_spends_its_variance_exactly(out, in_, seed, log_prior):
    """At the optimum ``tr(P Σ) = out · in``, as for the exact posterior; factored has less."""
    A, G = random_factors(out=out, in_=in_, seed=seed)
    prior = 10**log_prior
    exact = exact_precision(A, G, 30.0, prior)
    factored, optimal = (build(damping, spec_of(A, G, 30.0, prior)).to_dense() for damping in ("factored", "optimal"))
    assert kl_divergence(optimal, exact) <= kl_divergence(factored, exact) + 1e-9
    assert torch.trace(exact @ torch.linalg.inv(optimal)).item() == pytest.approx(out * in_, rel=1e-9)
    assert torch.trace(exact @ torch.linalg.inv(factored)).item() < out * in_


@given(out=sizes, in_=sizes, seed=SEEDS, log_prior=log_scales, damping=st.sampled_from(["factored", "exact"]))
def test_data_only_narrow_the_prior(out, in_, seed, log_prior, damping):
    """Not so for the optimal matrix normal, which makes up in some weights for what it loses in others."""
    A, G = random_factors(out=out, in_=in_, seed=seed)
    prior = 10**log_prior
    dense = build(damping, spec_of(A, G, 30.0, prior)).to_dense()
    assert bool((torch.linalg.eigvalsh(dense) >= prior * (1 - 1e-9)).all())


@given(blocks=st.integers(1, 3), out=sizes, in_=sizes, seed=SEEDS, log_prior=log_scales)
def test_factored_and_exact_equal_their_formulas_for_any_shape(blocks, out, in_, seed, log_prior):
    A, G = random_factors(blocks, out=out, in_=in_, seed=seed)
    prior = 10**log_prior
    for damping, formula in [("factored", factored_precision), ("exact", exact_precision)]:
        expected = torch.stack([formula(A[i], G[i], 30.0, prior) for i in range(blocks)])
        gaussian = build(damping, spec_of(A, G, 30.0, prior))
        assert_close(gaussian.to_dense(), expected, rtol=1e-9, atol=1e-9 * float(expected.max()))
        whole = replace(spec_of(A, G, 30.0, prior), name="again")
        assert torch.equal(build(damping, whole).logdet(), gaussian.logdet())


def test_the_dense_oracle_of_stacks_is_torch_kron():
    A, G = random_factors(2)
    assert torch.equal(dense_kron(G, A)[1], torch.kron(G[1], A[1]))


# The optimum, where few data see many weights


@pytest.mark.parametrize("scale", [1e2, 1e5, 1e8])
@pytest.mark.parametrize("structure", ["kron", "sketchy"])
def test_optimal_damping_is_optimal_where_both_factors_are_singular(scale: float, structure: str) -> None:
    """The equations of the optimum hold to rounding; turns had ended far from it, where first ones move further."""
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = (
        torch.randn(2000, 8, generator=generator, dtype=torch.float64)
        @ torch.randn(8, size, generator=generator, dtype=torch.float64)
        for size in (10, 20)
    )
    A, G = inputs.T @ inputs / 2000, gradients.T @ gradients / 2000
    d_A, d_G = torch.linalg.eigvalsh(A).clamp(min=0), torch.linalg.eigvalsh(G).clamp(min=0)
    gamma = torch.tensor(1 / scale, dtype=torch.float64)
    U, V = optimal_spectra(d_G, d_A, gamma)
    assert_close(1 / U, ((d_A * V).sum() * d_G + gamma * V.sum()) / 10, rtol=1e-9, atol=0.0)
    assert_close(1 / V, ((d_G * U).sum() * d_A + gamma * U.sum()) / 20, rtol=1e-9, atol=0.0)
    model = torch.nn.Linear(10, 20, bias=False, dtype=torch.float64)
    laplace = bk.Laplace(model, bk.likelihoods.Gaussian(scale**-0.5), structure=structure, damping="optimal")
    block = laplace.fit([(inputs, torch.zeros(2000, 20).double())], progress=False).posterior().blocks["(root)"]
    row, column = optimal_spectra(torch.ones(20).double(), d_A, torch.tensor(1 / scale / 2000, dtype=torch.float64))
    expected = (row.log().sum() * 10 + column.log().sum() * 20) - 200 * math.log(scale * 2000)
    assert_close(-block.logdet().double(), expected, rtol=1e-6, atol=1e-6)


def test_dimensions_count_as_equal_eigenvalues_do() -> None:
    d_G, d_A = torch.tensor([3.0, 0.5, 0.5, 0.0]).double(), torch.tensor([2.0, 0.1, 0.1, 0.1]).double()
    gamma = torch.tensor(0.3).double()
    U, V = optimal_spectra(d_G, d_A, gamma)
    u, v = optimal_spectra(
        torch.tensor([3.0, 0.5, 0.0]),
        torch.tensor([2.0, 0.1]),
        gamma,
        n_G=torch.tensor([1, 2, 1]),
        n_A=torch.tensor([1, 3]),
    )
    assert_close(torch.outer(U[[0, 1, 3]], V[:2]), torch.outer(u, v), rtol=1e-6, atol=0.0)
