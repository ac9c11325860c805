"""TKFAC: the Fisher's trace and partial traces, exactly, on every kind of rows and by every way to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayes_kfac import linalg
from bayes_kfac.curvature import Rows, SparseRows, output_gradients
from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Categorical, Gaussian
from bayes_kfac.structures import BlockSpec, DiagonalGaussian, MatrixNormalGaussian, tkfac, whitened
from tests.fishers import IN, KINDS, OUT, correlated_rows, error, exact_fisher, fisher_of, get, traces
from tests.helpers import TIGHT, assert_same_statistics, block_fishers, randn, random_spd, record, seeded
from tests.random_rows import written_out

TKFAC = get("tkfac")


@pytest.mark.parametrize("kind", KINDS)
def test_trace_and_partial_traces_are_the_fishers(kind):
    """Of a side that words are on, the diagonal of its partial trace."""
    rows = KINDS[kind]()
    fisher, expected = fisher_of(TKFAC, rows), exact_fisher(rows)
    diagonal = (isinstance(rows.inputs, SparseRows), rows.transposed and isinstance(rows.transposed.inputs, SparseRows))
    for mine, whole, is_diagonal in zip(traces(fisher), traces(expected), diagonal, strict=True):
        kept = torch.diag_embed(whole.diagonal(dim1=-2, dim2=-1)) if is_diagonal else whole
        assert_close(mine, kept, **TIGHT)
    assert_close(
        fisher.diagonal(dim1=-2, dim2=-1).sum(-1), expected.diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-12, atol=0
    )


def test_the_factors_are_moments_weighted_by_the_size_of_the_other_side():
    """``E[‖g‖² aaᵀ]`` and ``E[‖a‖² ggᵀ]`` over ``E[‖a‖² ‖g‖²]``, the published form, one example at a time."""
    rows = KINDS["one position"]()
    assert isinstance(rows.inputs, torch.Tensor)
    A, G, trace = torch.zeros(IN, IN).double(), torch.zeros(OUT, OUT).double(), 0.0
    for n in range(6):
        for c in range(2):
            a, g = rows.inputs[n, 0], rows.gradients[c, n, 0]
            A, G, trace = A + g @ g * torch.outer(a, a), G + a @ a * torch.outer(g, g), trace + a @ a * (g @ g)
    assert_close(fisher_of(TKFAC, rows), torch.kron(G, A) / trace / 6, **TIGHT)


def test_it_is_one_step_of_the_power_iteration_for_the_nearest_product():
    """On the rearranged Fisher, from the identity; the iteration's limit is nearer."""
    rows = KINDS["two positions"]()
    expected = exact_fisher(rows)
    rearranged = expected.reshape(OUT, IN, OUT, IN).permute(0, 2, 1, 3).reshape(OUT**2, IN**2)
    A = torch.eye(OUT).double().flatten() @ rearranged
    G = rearranged @ torch.eye(IN).double().flatten()
    product = torch.kron(G.reshape(OUT, OUT), A.reshape(IN, IN))
    assert_close(fisher_of(TKFAC, rows), product / torch.einsum("i->", A[:: IN + 1]), **TIGHT)
    U, S, V = torch.linalg.svd(rearranged)
    nearest = torch.kron(S[0] * U[:, 0].reshape(OUT, OUT), V[0].reshape(IN, IN))
    assert error(nearest, expected) < error(fisher_of(TKFAC, rows), expected)


def test_kfac_loses_the_trace_where_sizes_go_together():
    rows = correlated_rows(0, batch=200)
    expected, found = exact_fisher(rows).trace(), fisher_of(get("kron"), rows).trace()
    assert found < 0.7 * expected
    assert_close(fisher_of(TKFAC, rows).trace(), expected, **TIGHT)


@pytest.mark.parametrize("structure", ["kron", "tkfac", "ekfac", "tekfac"])
def test_one_datum_of_one_position_is_a_product(structure):
    """``F = Σ_c g_c g_cᵀ ⊗ a aᵀ``: all Kronecker structures have it exactly."""
    rows = Rows(randn(1, 1, IN, seed=0), randn(2, 1, 1, OUT, seed=1))
    assert_close(fisher_of(get(structure), rows), exact_fisher(rows), **TIGHT)


@pytest.mark.parametrize("structure", ["kron", "tkfac", "ekfac", "tekfac"])
def test_deep_linear_networks_have_products(structure):
    """With Gaussian noise gradients are the same for every input, and each layer's Fisher is a product."""
    model, x = seeded(nn.Sequential(nn.Linear(IN, 5), nn.Linear(5, OUT), nn.Linear(OUT, 2))), randn(9, IN, seed=3)
    output = model(x)
    columns = output_gradients(Gaussian(0.5).double(), output, "exact")
    expected = block_fishers(model, x, 4 * torch.eye(2).double().expand(9, 2, 2))
    for name, rows in record(model, x, columns).items():
        assert_close(fisher_of(get(structure), rows), expected[name], **TIGHT)


def test_the_trace_of_a_networks_layers_is_exact():
    """A convolution, whose positions share weights, and a classifier with an exact Fisher."""
    model = seeded(nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)))
    x = randn(7, 1, 3, 3, seed=3)
    output = model(x)
    columns = output_gradients(Categorical(), output, "exact")
    expected = block_fishers(model, x, torch.einsum("cni,cnj->nij", columns, columns))
    for name, rows in record(model, x, columns).items():
        kfac, exact = fisher_of(get("kron"), rows).trace(), expected[name].trace()
        assert_close(fisher_of(TKFAC, rows).trace(), exact, **TIGHT)
        assert abs(kfac - exact) > 1e-3 * exact


# The ways to the partial traces


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "word" not in kind and kind != "tied"])
def test_products_of_positions_and_jacobians_give_the_same(kind, monkeypatch):
    found = {}
    for grams in (True, False):
        monkeypatch.setattr(tkfac, "_prefers_grams", lambda rows, grams=grams: grams)
        found[grams] = TKFAC.measure(KINDS[kind]())
    assert_same_statistics(found[True], found[False])


def test_the_way_is_chosen_by_operations():
    """Few positions by their products, many by Jacobians."""
    few, many = (Rows(randn(2, shared, 8, seed=0), randn(1, 2, shared, 8, seed=1)) for shared in (1, 50))
    assert tkfac._prefers_grams(few)
    assert not tkfac._prefers_grams(many)


@pytest.mark.parametrize("kind", KINDS)
def test_jacobians_in_pieces_add_up(kind, monkeypatch):
    whole = TKFAC.measure(KINDS[kind]())
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", 1)
    monkeypatch.setattr(tkfac, "_prefers_grams", lambda rows: False)
    assert_same_statistics(TKFAC.measure(KINDS[kind]()), whole)


@pytest.mark.parametrize("kind", ["a word", "bags of words"])
def test_words_have_the_diagonal_of_the_rows_written_out(kind):
    rows = KINDS[kind]()
    sparse, dense = TKFAC.measure(rows), TKFAC.measure(written_out(rows))
    assert sparse.sums["input"].shape == (1, IN)
    assert_close(sparse.sums["input"][0], dense.sums["input"].diagonal(), **TIGHT)
    assert_close(sparse.sums["gradient"], dense.sums["gradient"], **TIGHT)


def test_sharing_makes_no_difference():
    rows = KINDS["nine positions"]()
    assert_same_statistics(get("tkfac", "reduce").measure(rows), TKFAC.measure(rows))


@pytest.mark.parametrize("kind", ["one position", "stacked"])
def test_young_averages_have_the_partial_traces_of_the_blend(kind):
    """With the identity, as the warm-up has it: those of ``(1 − w) F + w I``."""
    rows, weight = KINDS[kind](), 0.3
    statistics = TKFAC.measure(rows)
    blocks = rows.gradients.shape[1:-3]
    blended = statistics.lean(TKFAC.identity((*blocks, OUT, IN), rows.gradients), weight)
    expected = (1 - weight) * exact_fisher(rows) + weight * torch.eye(OUT * IN).double()
    for mine, whole in zip(traces(fisher_of(TKFAC, blended)), traces(expected), strict=True):
        assert_close(mine, whole, **TIGHT)


# Priors


def test_a_matrix_normals_precision_is_added_exactly():
    prior = MatrixNormalGaussian(*(torch.linalg.cholesky(random_spd(size, seed=size)) for size in (OUT, IN)))
    statistics = TKFAC.measure(KINDS["one position"]())
    (gaussian,) = TKFAC.gaussians([BlockSpec("layer", statistics, 20.0, prior)])
    A, G = TKFAC.factors(statistics)
    assert_close(gaussian.to_dense(), 20 * linalg.kron(G, A) + prior.to_dense(), **TIGHT)


def test_a_prior_that_is_no_product_is_refused_by_name():
    statistics = TKFAC.measure(KINDS["one position"]())
    spec = BlockSpec("layer", statistics, 20.0, DiagonalGaussian(torch.ones(OUT, IN).double()))
    for attempt in (TKFAC.gaussians, lambda specs: TKFAC.spectrum(specs[0])):
        with pytest.raises(ArgumentError, match="a diagonal Gaussian, which structure='tkfac' cannot add exactly"):
            attempt([spec])
