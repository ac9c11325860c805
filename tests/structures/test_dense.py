"""The dense structure: the whole Fisher of a block, exactly, for every kind of module."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from bayes_kfac import structures
from bayes_kfac.curvature import Rows, Statistics, output_gradients
from bayes_kfac.errors import NotPositiveDefiniteError
from bayes_kfac.likelihoods import Categorical
from bayes_kfac.structures import BlockSpec, DenseGaussian
from tests.curvature.modules.cases import CASES, TYPICAL
from tests.helpers import TIGHT, block_fishers, randn, random_spd, record, seeded
from tests.random_rows import words, written_out

dense = structures.get("dense", damping="exact", sharing="expand")


@pytest.mark.parametrize("name", TYPICAL)
def test_the_fisher_is_the_mean_of_each_examples_own(name):
    build, inputs = CASES[name]
    model = seeded(build())
    output = model(inputs) if not isinstance(inputs, tuple) else model(*inputs)
    root = output_gradients(Categorical(), output, "exact")
    expected = block_fishers(model, inputs, torch.einsum("cni,cnj->nij", root.flatten(2), root.flatten(2)))
    for layer, rows in record(model, inputs, root).items():
        statistics = dense.measure(rows)
        assert statistics.sums["fisher"].shape[:-1] == rows.jacobians()[0, ..., 0, :, :].shape
        assert dict(statistics.counts) == {"fisher": len(output)}
        assert_close(statistics.mean("fisher").flatten(-3, -2), expected[layer], **TIGHT)


@pytest.mark.parametrize("blocks", [(), (2,)])
def test_the_precision_is_the_scaled_fisher_plus_the_prior(blocks):
    fisher = random_spd(*blocks, 6, seed=0)
    sums = {"fisher": 5 * fisher.unflatten(-2, (2, 3))}
    (gaussian,) = dense.gaussians([BlockSpec("layer", Statistics(sums, {"fisher": 5.0}), 30.0, 2.0)])
    assert isinstance(gaussian, DenseGaussian)
    assert gaussian.shape == (*blocks, 2, 3)
    assert_close(gaussian.to_dense(), 30 * fisher + 2 * torch.eye(6, dtype=torch.float64), **TIGHT)


def test_a_unit_wise_block_is_two_by_two_for_each_feature():
    """A normalisation's: the covariance of each weight with its own bias, and with no other feature's."""
    model, inputs = seeded(CASES["layer norm"][0]()), CASES["layer norm"][1]
    rows = record(model, inputs)["0"]
    (gaussian,) = dense.gaussians([BlockSpec("0", dense.measure(rows), 30.0, 2.0)])
    assert gaussian.shape == (4, 1, 2)
    for feature in range(4):
        J = rows.jacobians()[:, feature].flatten(0, 1).squeeze(-2)
        precision = 30 * J.mT @ J / len(inputs) + 2 * torch.eye(2, dtype=torch.float64)
        assert_close(gaussian.to_dense()[feature], precision, **TIGHT)


@pytest.mark.parametrize("structure", ["dense", "unit_wise"])
@pytest.mark.parametrize("data_scale", [1e5, 1e6, 1e8])
def test_directions_without_data_keep_the_priors_variance_in_float32(structure, data_scale):
    """As along features that add up to the bias: rounding narrows some of them, and widens none."""
    inputs = randn(64, 2, seed=0) @ randn(2, 9, seed=1)
    rows = Rows(inputs.unsqueeze(1), 10 * randn(1, 64, 1, 4, seed=2)).to(torch.float32)
    kind = structures.get(structure, damping="exact", sharing="expand")
    (gaussian,) = kind.gaussians([BlockSpec("layer", kind.measure(rows), data_scale, 1.0)])
    off = Rows(torch.linalg.svd(inputs).Vh[2:].unsqueeze(1), torch.ones(1, 7, 1, 4)).to(torch.float32)
    variance = gaussian.whitened_rows(off).variance() / 4
    assert 0.3 < variance.mean() < 1.1


def test_a_power_keeps_the_directions_that_data_determine_in_float32():
    """Inputs in a plane, weakly damped: the precision has eigenvalues from 1 to 1e9."""
    rows = Rows(randn(20, 1, 2, seed=0) @ randn(2, 5, seed=1), randn(1, 20, 1, 2, seed=2))
    halves = [
        dense.gaussians([BlockSpec("layer", dense.measure(own), 1e8, 1.0)])[0].to_power(0.5).whitened_rows(own)
        for own in (rows, rows.to(torch.float32))
    ]
    assert_close(halves[1].variance().double(), halves[0].variance(), rtol=0.01, atol=0.0)


def test_quad_on_sparse_rows_is_quad_on_the_rows_written_out():
    rows = Rows(words(3, 4, 2), randn(2, 3, 4, 3, seed=4))
    (gaussian,) = dense.gaussians([BlockSpec("layer", dense.measure(rows), 30.0, 2.0)])
    written = written_out(rows)
    assert_close(gaussian.quad(rows.inputs, rows.gradients), gaussian.quad(written.inputs, written.gradients), **TIGHT)


@pytest.mark.parametrize("blocks", [(), (2,)])
def test_the_identity_has_the_names_and_shapes_of_what_is_measured(blocks):
    measured = dense.measure(Rows(randn(*blocks, 5, 2, 3, seed=0), randn(2, *blocks, 5, 2, 4, seed=1)))
    identity = dense.identity((*blocks, 4, 3), randn(1, seed=0))
    assert {n: v.shape for n, v in identity.sums.items()} == {n: v.shape for n, v in measured.sums.items()}
    assert_close(identity.mean("fisher").flatten(-3, -2), torch.eye(12).double().expand(*blocks, 12, 12), **TIGHT)


def test_a_fisher_with_nan_is_an_error_that_names_the_layer():
    sums = {"fisher": torch.full((1, 2, 2), torch.nan)}
    with pytest.raises(NotPositiveDefiniteError, match=r"'norm\.3'.*NaN"):
        dense.gaussians([BlockSpec("norm.3", Statistics(sums, {"fisher": 1.0}), 30.0, 2.0)])
