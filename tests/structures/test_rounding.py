"""Refreshes in float32 beside the optimum in float64, on data that determine some directions well and others not."""

from __future__ import annotations

import pytest
import torch

from bayes_kfac.curvature import Rows
from bayes_kfac.structures import BlockGaussian, BlockSpec, MatrixNormalGaussian, get


def refreshed(
    name: str, damping: str, dtype: torch.dtype, *, seed: int, scale: float, times: int = 8
) -> tuple[BlockGaussian, Rows]:
    """The Gaussian after some refreshes on collinear data, and the last rows; in float64 from scratch each time."""
    structure = get(name, damping=damping, sharing="expand")
    generator = torch.Generator().manual_seed(seed)
    in_features, out_features = [(6, 4), (24, 8), (60, 30)][seed % 3]
    inputs, gradients = (
        torch.randn(rank, size, generator=generator, dtype=torch.float64)
        for rank, size in ((1 + seed % in_features, in_features), (1 + seed // 2 % out_features, out_features))
    )
    statistics = gaussian = rows = None
    for _ in range(times):
        a = 3 * torch.randn(40, len(inputs), generator=generator, dtype=torch.float64) @ inputs
        g = 5 * torch.randn(1, 40, 1, len(gradients), generator=generator, dtype=torch.float64) @ gradients
        rows = Rows(a.unsqueeze(1), g)
        batch = structure.measure(rows.to(dtype), statistics.frame if statistics else {})
        statistics = structure.reframed(statistics.moving_average(batch, 0.9) if statistics else batch, "layer")
        previous = gaussian if dtype == torch.float32 else None
        (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, scale, 1.0, previous)])
    return gaussian, rows


@pytest.mark.parametrize("scale", [1e5, 1e7])
@pytest.mark.parametrize("seed", [3, 44, 47, 50, 53])
@pytest.mark.parametrize(("name", "damping"), [("kron", "optimal"), ("kpsvd", "optimal"), ("tnt", "optimal")])
def test_where_both_factors_are_singular_no_side_is_lost_in_float32(name, damping, seed, scale):
    """Refreshes that went by the trace of a rounded product lost a side: variances up to 431 times too large."""
    single, rows = refreshed(name, damping, torch.float32, seed=seed, scale=scale)
    double, _ = refreshed(name, damping, torch.float64, seed=seed, scale=scale)
    ratio = (
        single.whitened_rows(rows.to(torch.float32)).variance().mean() / double.whitened_rows(rows).variance().mean()
    )
    assert 0.75 < float(ratio) < 1.3
    # where data determine nothing a rounded factor is not zero, so that variances are too small, if anything
    assert float(single.marginal_variance().mean() / double.marginal_variance().mean()) < 1.1


@pytest.mark.parametrize("scale", [1e3, 1e5])
@pytest.mark.parametrize("seed", [7, 31])
@pytest.mark.parametrize("name", ["kron", "foof", "kpsvd", "tkfac", "ingd", "psgd"])
def test_directions_are_those_of_the_roots_in_float32(name, seed, scale):
    """Products with covariances are rounding where these are small: directions were up to 1000 times off, and uphill.

    The error is measured by the posterior's precision, as the length of a natural gradient step is.
    """
    single, rows = refreshed(name, "optimal", torch.float32, seed=seed, scale=scale)
    gradient = rows.jacobians().mean((0, 1)).reshape(single.shape).float()
    exact = MatrixNormalGaussian(*(root.double() for root in single.state.values()))
    expected = exact.solve(gradient.double())
    error = single.solve(gradient).double() - expected
    assert float((error * exact.multiply(error)).sum()) < 0.1**2 * float((expected * gradient).sum())


@pytest.mark.parametrize("name", ["ekfac", "tekfac"])
def test_refreshes_add_no_rounding_to_measured_eigenvalues(name):
    """Each added that of the factors' eigenvalues: after 300 refreshes variances were down to 0.002 of the prior's."""
    single, _ = refreshed(name, "exact", torch.float32, seed=7, scale=1e5, times=300)
    double, _ = refreshed(name, "exact", torch.float64, seed=7, scale=1e5, times=300)
    ratio = single.marginal_variance() / double.marginal_variance()
    assert float(ratio.min()) > 0.9
    assert float(ratio.max()) < 1.01
