"""The diagonal structure: the mean of each example's squared gradient, and a Gaussian that works on sparse rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bayes_kfac import structures
from bayes_kfac.curvature import Rows, Statistics, find_layers, output_gradients
from bayes_kfac.likelihoods import Categorical
from bayes_kfac.structures import BlockSpec, DiagonalGaussian
from tests.curvature.modules.cases import CASES, TYPICAL
from tests.helpers import TIGHT, block_fishers, randn, record, rng, seeded
from tests.random_rows import SEEDS, dense_rows, sparse_rows, tied_rows, words, written_out

diagonal = structures.get("diagonal", damping="exact", sharing="expand")


@pytest.mark.parametrize("name", TYPICAL)
def test_the_fisher_is_the_diagonal_of_each_examples_own(name):
    """Exact for every module, tied weights and words of a vocabulary included: not the square of a batch's gradient."""
    build, inputs = CASES[name]
    model = seeded(build())
    output = model(inputs) if not isinstance(inputs, tuple) else model(*inputs)
    root = output_gradients(Categorical(), output, "exact")
    expected = block_fishers(model, inputs, torch.einsum("cni,cnj->nij", root.flatten(2), root.flatten(2)))
    for layer, rows in record(model, inputs, root).items():
        statistics = diagonal.measure(rows)
        fisher = expected[layer].diagonal(dim1=-2, dim2=-1).reshape(statistics.sums["fisher"].shape)
        assert dict(statistics.counts) == {"fisher": len(output)}
        assert_close(statistics.mean("fisher"), fisher, **TIGHT)


def test_the_precision_is_the_scaled_fisher_plus_the_prior():
    fisher = randn(2, 3, 4, seed=0).square()
    spec = BlockSpec("layer", Statistics({"fisher": 5 * fisher}, {"fisher": 5.0}), 30.0, 2.0)
    (gaussian,) = diagonal.gaussians([spec])
    assert isinstance(gaussian, DiagonalGaussian)
    assert_close(gaussian.to_dense(), torch.diag_embed((30 * fisher + 2).flatten(-2)), **TIGHT)


def test_it_serves_every_layer_whatever_its_kind_asks_for():
    """Also normalisations, whose blocks would be dense."""
    layers, _ = find_layers(CASES["layer norm"][0]())
    assert layers["0"].adapter.structure == "dense"
    assert {diagonal.for_layer(layer) for layer in layers.values()} == {diagonal}


@given(rows=sparse_rows(), columns=st.integers(1, 3), out=st.integers(1, 3), seed=SEEDS)
def test_quad_on_sparse_rows_is_quad_on_the_rows_written_out(rows, columns, out, seed):
    gaussian = DiagonalGaussian(randn(out, rows.size, seed=seed).square() + 0.1)
    sparse = Rows(rows, randn(columns, *rows.indices.shape[:2], out, seed=seed))
    dense = written_out(sparse)
    assert_close(gaussian.quad(sparse.inputs, sparse.gradients), gaussian.quad(dense.inputs, dense.gradients), **TIGHT)


def test_the_identity_has_the_names_and_shapes_of_what_is_measured():
    for rows in (tied_rows(), Rows(words(3, 2, 1), randn(1, 3, 2, 4, seed=0)), dense_rows(blocks=(2,))):
        measured = diagonal.measure(rows)
        identity = diagonal.identity(measured.sums["fisher"].shape, randn(1, seed=0), tied=rows.transposed is not None)
        assert {n: v.shape for n, v in identity.sums.items()} == {n: v.shape for n, v in measured.sums.items()}
        assert bool((identity.mean("fisher") == 1).all())


def test_of_independent_examples_the_batchs_gradient_serves():
    """With one row for a group of examples the square of their sum counts for all of them."""
    gradients = randn(1, 6, 1, 4, seed=0)
    grouped = Rows(torch.ones(1, 1, 1, dtype=torch.float64), gradients.sum(1, keepdim=True), examples=6.0)
    statistics = diagonal.measure(grouped)
    assert dict(statistics.counts) == {"fisher": 6.0}
    assert_close(statistics.sums["fisher"][:, 0], gradients.sum((0, 1, 2)).square(), **TIGHT)


def test_a_words_variance_is_the_priors_until_it_is_seen():
    rows = Rows(words(8, 3, 1, size=20), randn(2, 8, 3, 2, seed=1))
    (gaussian,) = diagonal.gaussians([BlockSpec("words", diagonal.measure(rows), 10.0, 4.0)])
    seen = torch.zeros(20, dtype=torch.bool).scatter(0, rows.inputs.indices.flatten(), value=True)
    assert 0 < seen.sum() < 20
    assert_close(gaussian.marginal_variance()[:, ~seen], torch.full((2, int((~seen).sum())), 0.25).double(), **TIGHT)
    assert bool((gaussian.marginal_variance()[:, seen] < 0.25).all())
    assert gaussian.sample(torch.randn(7, 2, 20, generator=rng(0)).double()).shape == (7, 2, 20)
