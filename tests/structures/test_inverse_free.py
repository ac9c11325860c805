"""INGD and IKFAC: products alone reach the nearest matrix normal, follow it, and survive what Cholesky does not."""

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
from bayes_kfac.structures import (
    BlockGaussian,
    BlockSpec,
    InverseFreeKFACStructure,
    InverseFreeStructure,
    MatrixNormalGaussian,
)
from tests.helpers import randn, random_spd
from tests.random_rows import dense_rows, tied_rows, words
from tests.structures.test_in_use import mlp, train, trainer

OUT, IN = 3, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def ingd(**options) -> InverseFreeStructure:
    return InverseFreeStructure(**options)


def spec_of(
    A: Tensor, G: Tensor, scale: float = 30.0, prior: object = 2.0, previous: BlockGaussian | None = None, **changes
) -> BlockSpec:
    statistics = Statistics({"input": A, "gradient": G}, {"input": 1.0, "gradient": 1.0})
    return replace(BlockSpec("layer", statistics, scale, prior, previous), **changes)


def build(structure: structures.Structure, spec: BlockSpec) -> MatrixNormalGaussian:
    (gaussian,) = structure.gaussians([spec])
    assert isinstance(gaussian, MatrixNormalGaussian)
    return gaussian


def optimal(spec: BlockSpec) -> BlockGaussian:
    """K-FAC's nearest matrix normal by Cholesky factorisations, swept to rounding."""
    kron = structures.get("kron", damping="optimal", sharing="expand")
    gaussian: BlockGaussian | None = None
    for _ in range(20):
        (gaussian,) = kron.gaussians([replace(spec, previous=gaussian)])
    assert gaussian is not None
    return gaussian


def spectral(size: int, power: float, *, seed: int) -> Tensor:
    """A matrix with the eigenvalues ``k^-power`` and random eigenvectors."""
    Q = torch.linalg.qr(randn(size, size, seed=seed)).Q
    return (Q * torch.arange(1, size + 1, dtype=torch.float64) ** -power) @ Q.T


def mean_curvature(A: Tensor, G: Tensor) -> float:
    return float(torch.trace(A) * torch.trace(G)) / (len(A) * len(G))


def distance(gaussian: BlockGaussian, other: BlockGaussian) -> float:
    """How far the one's precision is from the other's in the other's coordinates, by the mean square."""
    L = torch.linalg.cholesky(torch.linalg.inv(other.to_dense()))
    white = L.T @ gaussian.to_dense() @ L
    return float((white - torch.eye(len(L), dtype=L.dtype)).norm() / math.sqrt(len(L)))


# The fixed point


@pytest.mark.parametrize("relative", [1.0, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("powers", [(0.5, 0.5), (1, 1), (2, 2), (3, 1)])
def test_from_scratch_it_is_the_nearest_matrix_normal(powers, relative):
    """``damping="optimal"`` of K-FAC to rounding, at any spectrum and any strength of the prior."""
    A, G = spectral(20, powers[0], seed=0), spectral(8, powers[1], seed=1)
    spec = spec_of(A, G, 1 / (relative * mean_curvature(A, G)), 1.0)
    assert distance(build(ingd(), spec), optimal(spec)) < 1e-8


@pytest.mark.parametrize("prior", [0.03, 3.0, 300.0])
def test_its_roots_solve_the_stationarity_equations(prior):
    """``(tr(GU) A + γ tr(U) I) V = out I`` and likewise for ``U``, written out."""
    A, G = 5 * random_spd(IN, seed=0), 0.2 * random_spd(OUT, seed=1)
    gaussian, gamma = build(ingd(), spec_of(A, G, 30.0, prior)), prior / 30.0
    U = 30.0 * gaussian.scale_tril_row @ gaussian.scale_tril_row.T
    V = gaussian.scale_tril_column @ gaussian.scale_tril_column.T
    for own, other, mine, yours in ((A, G, V, U), (G, A, U, V)):
        eye = torch.eye(len(own), dtype=torch.float64)
        target = torch.trace(other @ yours) * own + gamma * torch.trace(yours) * eye
        assert_close(target @ mine, len(other) * eye, **CLOSE)


def test_the_published_step_has_its_fixed_point_here():
    """``K ← K − β/2 K (tr(H_C)/out H_K + γ tr(CᵀC)/out KᵀK − I)`` and likewise for ``C``, dense roots, from I."""
    A, G, gamma = random_spd(IN, seed=0), random_spd(OUT, seed=1), 0.1
    K, C = torch.eye(IN, dtype=torch.float64), torch.eye(OUT, dtype=torch.float64)
    for _ in range(4000):
        H_K, H_C = K.T @ A @ K, C.T @ G @ C
        m_K = (torch.trace(H_C) * H_K + gamma * torch.trace(C.T @ C) * K.T @ K) / OUT - torch.eye(IN)
        m_C = (torch.trace(H_K) * H_C + gamma * torch.trace(K.T @ K) * C.T @ C) / IN - torch.eye(OUT)
        K, C = K - 0.05 / 2 * K @ m_K, C - 0.05 / 2 * C @ m_C
    precision = torch.linalg.inv(torch.kron(C @ C.T, K @ K.T))
    assert_close(build(ingd(), spec_of(A, G, 1.0, gamma)).to_dense(), precision, **CLOSE)


def test_the_damping_asked_for_makes_no_difference():
    for damping in structures.DAMPING_KINDS:
        assert structures.get("ingd", damping=damping, sharing="expand").damping == "optimal"


@pytest.mark.parametrize("prior", [0.7, torch.tensor([0.5, 1.0, 2.0, 4.0]).double(), "matrix normal"])
@pytest.mark.parametrize("rows", ["plain", "stacked", "words", "tied", "tied to words"])
def test_any_prior_and_any_block_of_k_fac(rows, prior):
    """Stacks, diagonal sides, tied weights, and priors by column or of an earlier task."""
    measured = {
        "plain": lambda: dense_rows(2, (), 10, 2, in_=IN, out=OUT),
        "stacked": lambda: dense_rows(2, (2,), 10, 2, in_=IN, out=OUT),
        "words": lambda: Rows(words(10, 2, 2, size=IN), randn(2, 10, 2, OUT, seed=1)),
        "tied": lambda: tied_rows(batch=10, size=OUT, width=IN, sparse=False),
        "tied to words": lambda: tied_rows(batch=10, size=OUT, width=IN),
    }[rows]()
    blocks = measured.gradients.shape[1:-3]
    if prior == "matrix normal":
        prior = MatrixNormalGaussian(*(torch.linalg.cholesky(random_spd(*blocks, n, seed=n)) for n in (OUT, IN)))
    spec = BlockSpec("layer", ingd().measure(measured), 20.0, prior)
    expected = optimal(spec).to_dense()
    gaussian = build(ingd(), spec)
    assert_close(gaussian.to_dense(), expected, **CLOSE)
    for _ in range(3):
        gaussian = build(ingd(), replace(spec, previous=gaussian))
    assert_close(gaussian.to_dense(), expected, **CLOSE)


def test_a_prior_that_is_no_product_is_refused_by_the_structures_name():
    spec = spec_of(random_spd(IN, seed=0), random_spd(OUT, seed=1), prior=randn(OUT, IN, seed=0).exp())
    with pytest.raises(ArgumentError, match="structure='ingd' cannot add exactly"):
        ingd().gaussians([spec])


@pytest.mark.parametrize("relative", [1.0, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("powers", [(0.5, 0.5), (2, 2), (3, 1)])
def test_ikfac_from_scratch_is_k_facs_factored_posterior(powers, relative):
    A, G = spectral(20, powers[0], seed=0), spectral(8, powers[1], seed=1)
    spec = spec_of(A, G, 1 / (relative * mean_curvature(A, G)), 1.0)
    (expected,) = structures.get("kron", damping="factored", sharing="expand").gaussians([spec])
    (gaussian,) = structures.get("ikfac", damping="exact", sharing="expand").gaussians([spec])
    assert distance(gaussian, expected) < 1e-8


def test_ikfac_follows_the_inverse_of_the_average_up_to_the_square_of_its_step():
    errors = []
    for share in (1e-2, 1e-3):
        before, after = moved(share)
        (start,), (target,) = (InverseFreeKFACStructure().gaussians([spec]) for spec in (before, after))
        (followed,) = InverseFreeKFACStructure(sweeps=1).gaussians([replace(after, previous=start)])
        errors.append(distance(followed, target))
        assert errors[-1] < 0.1 * distance(start, target)
    assert 60 < errors[0] / errors[1] < 160


# Following


def moved(share: float) -> tuple[BlockSpec, BlockSpec]:
    """Factors, and the same after one step of an average that forgets this share of them."""
    A, G = spectral(12, 1, seed=0), spectral(6, 1, seed=1)
    B, H = spectral(12, 1, seed=2), spectral(6, 1, seed=3)
    return spec_of(A, G, 1e3, 1.0), spec_of(A + share * (B - A), G + share * (H - G), 1e3, 1.0)


def test_a_sweep_follows_a_moving_average_up_to_the_square_of_its_step():
    """A tenth of the step leaves a hundredth of the error, which is far below the step's own."""
    errors = []
    for share in (1e-2, 1e-3):
        before, after = moved(share)
        start, target = build(ingd(), before), build(ingd(), after)
        followed = build(ingd(sweeps=1), replace(after, previous=start))
        errors.append(distance(followed, target))
        assert errors[-1] < 0.1 * distance(start, target)
    assert 60 < errors[0] / errors[1] < 160


def test_sweeps_converge_quadratically():
    before, after = moved(0.03)
    start, target = build(ingd(), before), build(ingd(), after)
    errors = [distance(build(ingd(sweeps=k), replace(after, previous=start)), target) for k in (1, 2, 3)]
    assert errors[1] < 5 * errors[0] ** 2
    assert errors[2] < 1e-6


def test_a_long_run_of_refreshes_stays_at_the_optimum():
    """Errors do not add up over an average that keeps moving."""
    A, G = spectral(12, 1, seed=0), spectral(6, 1, seed=1)
    gaussian = build(ingd(), spec_of(A, G, 1e3, 1.0))
    for step in range(60):
        inputs, gradients = randn(20, 12, seed=10 + step), 0.3 * randn(20, 6, seed=100 + step)
        A, G = 0.95 * A + 0.05 * inputs.T @ inputs / 20, 0.95 * G + 0.05 * gradients.T @ gradients / 20
        gaussian = build(ingd(), spec_of(A, G, 1e3, 1.0, gaussian))
    assert distance(gaussian, build(ingd(), spec_of(A, G, 1e3, 1.0))) < 1e-3


@pytest.mark.parametrize("stretch", [1e-3, 1.0, 1e3])
def test_any_start_is_led_to_the_optimum(stretch):
    """Roots far too narrow, far too broad, or of other eigenvectors."""
    spec = spec_of(random_spd(IN, seed=0), random_spd(OUT, seed=1))
    gaussian = MatrixNormalGaussian(
        stretch * torch.linalg.cholesky(random_spd(OUT, seed=2)), torch.linalg.cholesky(random_spd(IN, seed=3))
    )
    target = build(ingd(), spec)
    for _ in range(15):
        gaussian = build(ingd(), replace(spec, previous=gaussian))
        assert bool((gaussian.scale_tril_row.diagonal() > 0).all())
        assert bool((gaussian.scale_tril_column.diagonal() > 0).all())
    assert distance(gaussian, target) < 1e-10


def test_a_previous_gaussian_of_another_kind_or_form_is_no_start():
    spec = spec_of(random_spd(IN, seed=0), random_spd(OUT, seed=1))
    (exact,) = structures.get("kron", damping="exact", sharing="expand").gaussians([spec])
    rows = MatrixNormalGaussian(torch.ones(1, OUT).double(), torch.ones(1, IN).double())
    for previous in (exact, rows):
        other = replace(spec, previous=previous)
        assert torch.equal(build(ingd(), other).to_dense(), build(ingd(), spec).to_dense())


def test_blocks_with_and_without_a_start_are_built_side_by_side():
    A, G = random_spd(IN, seed=0), random_spd(OUT, seed=1)
    start = build(ingd(), spec_of(A, G))
    specs = [spec_of(A, G, previous=start), spec_of(2 * A, G), spec_of(A, 3 * G, previous=start), spec_of(G, A)]
    for spec, gaussian in zip(specs, ingd().gaussians(specs), strict=True):
        assert_close(gaussian.to_dense(), build(ingd(), spec).to_dense(), **CLOSE)


@pytest.mark.parametrize(("name", "damping"), [("ingd", "optimal"), ("ikfac", "factored"), ("kbfgs", "factored")])
def test_training_goes_as_with_factorisations(name, damping):
    """Noisy training on real data with the same draws: lower triangular roots of one covariance are one."""
    histories, variances = [], []
    for names in ((name, damping), ("kron", damping)):
        optimizer = trainer(names, mlp())
        histories.append(torch.tensor(train(optimizer, 20)))
        variances.append({key: block.marginal_variance() for key, block in optimizer.posterior().blocks.items()})
    mine, expected = (history[-20:].mean() for history in histories)
    assert abs(float(mine - expected)) < 0.02
    for key, variance in variances[0].items():
        assert_close(variance, variances[1][key], rtol=0.1, atol=0)


# Rounding


@pytest.mark.parametrize("relative", [1e-2, 1e-4, 1e-6, 1e-8])
def test_factors_rounded_to_sixteen_bits_are_survived(relative):
    """Rounding makes them indefinite by far more than the prior."""
    A, G = spectral(64, 2, seed=0), spectral(32, 2, seed=1)
    scale = 1 / (relative * mean_curvature(A, G))
    target = build(ingd(), spec_of(A, G, scale, 1.0))
    A, G = A.bfloat16().float(), G.bfloat16().float()
    assert torch.linalg.eigvalsh(A.double())[0] < 0
    gaussian = build(ingd(), spec_of(A, G, scale, 1.0))
    for _ in range(30):
        gaussian = build(ingd(), spec_of(A, G, scale, 1.0, gaussian))
        variance = gaussian.marginal_variance()
        assert bool(torch.isfinite(variance).all())
        assert bool((variance > 0).all())
        assert bool((variance < 1.1).all())  # the prior's is 1
    assert abs(float(gaussian.logdet()) - float(target.logdet())) < 0.2 * variance.numel()


def test_where_rounding_is_all_there_is_products_go_on():
    A, G = spectral(64, 2, seed=0).bfloat16().float(), spectral(32, 2, seed=1).bfloat16().float()
    assert bool(torch.isfinite(build(ingd(), spec_of(A, G, 1e14, 1.0)).logdet()))


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("rank", [2, 10])
def test_many_directions_without_data_leave_the_others_right_in_float32(rank, scale):
    """Rounding is above the prior in most directions: from scratch it only makes these too tight; refreshes go on."""
    for seed in range(4):
        inputs, gradients = randn(64, rank, seed=seed) @ randn(rank, 40, seed=seed + 10), randn(64, 6, seed=seed + 20)
        A, G = inputs.T @ inputs / 64, gradients.T @ gradients / 64
        double, single = (
            build(ingd(), spec_of(A.to(dtype), G.to(dtype), scale, 1.0)) for dtype in (torch.float64, torch.float32)
        )
        rows = Rows(inputs.unsqueeze(1), gradients[None, :, None])
        variance = single.whitened_rows(rows.to(torch.float32)).variance().mean().double()
        assert_close(variance, double.whitened_rows(rows).variance().mean(), rtol=0.1, atol=0)
        for _ in range(3):
            single = build(ingd(), spec_of(A.float(), G.float(), scale, 1.0, single))
            assert bool((single.marginal_variance() > 0).all())
            assert bool((single.marginal_variance() < 2).all())  # the prior's is 1


@pytest.mark.parametrize("gamma", [1e-2, 1e-5, 1e-8])
def test_fewer_examples_than_features_are_survived_in_float32(gamma):
    inputs, gradients = randn(20, 40, seed=0).float(), randn(20, 6, seed=1).float()
    A, G = inputs.T @ inputs / 20, gradients.T @ gradients / 20
    double = build(ingd(), spec_of(A.double(), G.double(), 1 / gamma, 1.0))
    gaussian = build(ingd(), spec_of(A, G, 1 / gamma, 1.0))
    for _ in range(20):
        gaussian = build(ingd(), spec_of(A, G, 1 / gamma, 1.0, gaussian))
    variance = gaussian.marginal_variance()
    assert bool(torch.isfinite(gaussian.sample(randn(5, 6, 40, seed=2).float())).all())
    assert bool((variance > 0).all())
    assert bool((variance < 1.1).all())
    if gamma > 1e-6:  # below, rounding is above the prior
        assert_close(variance.double(), double.marginal_variance(), rtol=0.05, atol=0)


def test_factors_with_nan_are_an_error_that_names_the_layer():
    A, G = random_spd(IN, seed=0), random_spd(OUT, seed=1)
    specs = [spec_of(A, G), spec_of(A * math.nan, G, name="encoder.2")]
    with pytest.raises(NotPositiveDefiniteError, match=r"'encoder\.2' hold NaN") as caught:
        ingd().gaussians(specs)
    assert "'layer'" not in str(caught.value)
