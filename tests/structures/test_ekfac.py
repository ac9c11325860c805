"""EKFAC and TEKFAC: the Fisher's own diagonal in a Kronecker-factored basis, and what becomes of it in another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import linalg
from bayes_kfac.curvature import Rows, Statistics, output_gradients
from bayes_kfac.errors import ArgumentError, NotPositiveDefiniteError
from bayes_kfac.likelihoods import Categorical
from bayes_kfac.structures import (
    BlockSpec,
    DiagonalGaussian,
    KroneckerEigenGaussian,
    MatrixNormalGaussian,
    Structure,
    whitened,
)
from tests.curvature.modules.cases import CASES, TYPICAL
from tests.fishers import IN, KINDS, OUT, correlated_rows, error, exact_fisher, fisher_of, get
from tests.helpers import TIGHT, assert_same_statistics, block_fishers, dense_kron, randn, random_spd, record, seeded
from tests.posteriors import surveyed
from tests.random_rows import SEEDS, words

EKFAC, TEKFAC, KRON, TKFAC = get("ekfac"), get("tekfac"), get("kron"), get("tkfac")
BOTH = pytest.mark.parametrize("structure", [EKFAC, TEKFAC], ids=["ekfac", "tekfac"])


def basis_of(statistics: Statistics) -> Tensor:
    """``Q_G ⊗ Q_A``."""
    return dense_kron(*(linalg.dense(statistics.frame[name]).contiguous() for name in ("basis_row", "basis_column")))


def diagonal_in(basis: Tensor, matrix: Tensor) -> Tensor:
    return (basis.mT @ matrix @ basis).diagonal(dim1=-2, dim2=-1)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(size, size, seed=seed))[0]


def trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


# What is measured


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_the_fishers_diagonal_in_the_basis(structure, kind):
    """``S = diag (Q_G ⊗ Q_A)ᵀ F̄ (Q_G ⊗ Q_A)``; before there is a basis, that of the Fisher itself."""
    rows = KINDS[kind]()
    fisher = exact_fisher(rows)
    first, statistics = structure.measure(rows), surveyed(structure, rows)
    assert not first.frame
    assert_close(first.mean("scale").flatten(-2), fisher.diagonal(dim1=-2, dim2=-1), **TIGHT)
    assert_close(statistics.mean("scale").flatten(-2), diagonal_in(basis_of(statistics), fisher), **TIGHT)


@pytest.mark.parametrize(("structure", "product"), [(EKFAC, KRON), (TEKFAC, TKFAC)], ids=["ekfac", "tekfac"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_basis_is_the_eigenvectors_of_the_factors(structure, product, kind):
    rows = KINDS[kind]()
    statistics = surveyed(structure, rows)
    A, G = product.factors(product.measure(rows))
    for factor, basis in ((A, statistics.frame["basis_column"]), (G, statistics.frame["basis_row"])):
        assert linalg.is_diagonal(basis) == linalg.is_diagonal(factor)
        rotated = linalg.dense(linalg.congruence(factor, basis))
        assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1)), **TIGHT)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_the_gaussian_is_the_diagonal_turned_back(structure, kind):
    """``P = N (Q_G ⊗ Q_A) diag(S) (Q_G ⊗ Q_A)ᵀ + δ I``, whatever is asked of the damping."""
    statistics = surveyed(structure, KINDS[kind]())
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, 20.0, 0.7)])
    assert isinstance(gaussian, KroneckerEigenGaussian)
    Q, S = basis_of(statistics), statistics.mean("scale").flatten(-2)
    expected = 20 * (Q * S.unsqueeze(-2)) @ Q.mT + 0.7 * torch.eye(OUT * IN).double()
    assert_close(gaussian.to_dense(), expected, **TIGHT)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_is_exact(structure, kind):
    rows = KINDS[kind]()
    assert_close(trace(fisher_of(structure, rows)), trace(exact_fisher(rows)), **TIGHT)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_examples_in_pieces_add_up(structure, kind, monkeypatch):
    rows = KINDS[kind]()
    frame = surveyed(structure, rows).frame
    whole = structure.measure(rows, frame)
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", 1)
    assert_same_statistics(structure.measure(rows, frame), whole)


def test_sharing_decides_about_the_basis_alone():
    rows = KINDS["nine positions"]()
    expand, reduce = EKFAC.measure(rows), get("ekfac", "reduce").measure(rows)
    assert torch.equal(expand.sums["scale"], reduce.sums["scale"])
    assert not torch.equal(expand.sums["input"], reduce.sums["input"])


# How near it is


@given(seed=SEEDS)
def test_it_is_never_further_from_the_fisher_than_kfac_in_the_same_basis(seed):
    for rows in (correlated_rows(seed), correlated_rows(seed, shared=3)):
        expected = exact_fisher(rows)
        for corrected, product in ((EKFAC, KRON), (TEKFAC, TKFAC)):
            mine, theirs = error(fisher_of(corrected, rows), expected), error(fisher_of(product, rows), expected)
            assert mine <= theirs * (1 + 1e-10)


def test_it_is_nearer_than_kfac_for_every_layer_of_a_network():
    """A convolution and a classifier with an exact Fisher, against the Fisher by torch.func."""
    model = seeded(nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)))
    x = randn(7, 1, 3, 3, seed=3)
    output = model(x)
    columns = output_gradients(Categorical(), output, "exact")
    expected = block_fishers(model, x, torch.einsum("cni,cnj->nij", columns, columns))
    for name, rows in record(model, x, columns).items():
        found = {structure: error(fisher_of(get(structure), rows), expected[name]) for structure in ("kron", "ekfac")}
        assert found["ekfac"] < found["kron"]
        assert_close(trace(fisher_of(EKFAC, rows)), trace(expected[name]), **TIGHT)


@pytest.mark.parametrize("case", TYPICAL)
def test_every_kind_of_module_has_its_trace_and_its_order(case):
    """Attention, recurrence, embeddings, tied weights: exact traces, and errors that the eigenvalues only lessen."""
    build, inputs = CASES[case]
    for rows in record(seeded(build()), inputs).values():
        expected = exact_fisher(rows)
        for corrected, product in ((EKFAC, KRON), (TEKFAC, TKFAC)):
            fisher = fisher_of(corrected, rows)
            assert_close(trace(fisher), trace(expected), **TIGHT)
            assert error(fisher, expected) <= error(fisher_of(product, rows), expected) * (1 + 1e-10) + 1e-10
        assert_close(trace(fisher_of(TKFAC, rows)), trace(expected), **TIGHT)


def turned_units(idle: int = 0) -> Rows:
    """Examples of one input and one output each, in turned coordinates: a Fisher that is diagonal there, of any scale.

    Input ``i`` and output ``o`` occur together with a gradient of their own size. ``idle`` more have no gradient.
    """
    sizes = 0.2 + randn(OUT, IN, seed=1).square()
    inputs = torch.eye(IN).double().repeat(OUT, 1) * torch.linspace(1, 2, IN).double()
    gradients = torch.eye(OUT).double().repeat_interleave(IN, 0) * sizes.reshape(-1, 1)
    inputs = torch.cat([inputs @ orthogonal(IN, 2), randn(idle, IN, seed=3)])
    gradients = torch.cat([gradients @ orthogonal(OUT, 4), torch.zeros(idle, OUT).double()])
    return Rows(inputs.unsqueeze(1), gradients[None, :, None])


def test_a_fisher_that_is_diagonal_in_kfacs_basis_is_exact():
    rows = turned_units()
    expected = exact_fisher(rows)
    assert error(fisher_of(EKFAC, rows), expected) < 1e-12 * torch.linalg.vector_norm(expected)
    assert error(fisher_of(KRON, rows), expected) > 0.1 * torch.linalg.vector_norm(expected)


def test_inputs_without_gradient_turn_ekfacs_basis_and_not_tekfacs():
    """They are nothing to the Fisher, and to its partial traces."""
    rows = turned_units(idle=5)
    expected = exact_fisher(rows)
    assert error(fisher_of(TEKFAC, rows), expected) < 1e-12 * torch.linalg.vector_norm(expected)
    assert error(fisher_of(EKFAC, rows), expected) > 0.01 * torch.linalg.vector_norm(expected)


# Another basis


def in_basis(rows: Rows, row: Tensor, column: Tensor) -> Statistics:
    return EKFAC.measure(rows, {"basis_row": row, "basis_column": column})


def random_statistics(seed: int, **changes: int) -> Statistics:
    """Measured in a random basis, which is not that of the factors."""
    return in_basis(correlated_rows(seed, **changes), orthogonal(OUT, seed), orthogonal(IN, seed + 1))


def test_a_new_basis_keeps_what_was_measured_beyond_kfac():
    """The diagonal of ``G ⊗ A + Q diag(S − diag(Qᵀ (G ⊗ A) Q)) Qᵀ`` in the new basis, written out."""
    statistics = random_statistics(3, batch=400)
    after = EKFAC.reframed(statistics, "layer")
    A, G = KRON.factors(statistics)
    Q, product = basis_of(statistics), torch.kron(G, A)
    model = product + (Q * (statistics.mean("scale").flatten() - diagonal_in(Q, product))) @ Q.mT
    expected = diagonal_in(basis_of(after), model)
    assert expected.min() > 0
    assert_close(after.mean("scale").flatten(), expected, **TIGHT)


@given(seed=SEEDS)
def test_a_new_basis_keeps_the_trace(seed):
    """To rounding, also where the model has negative numbers on its diagonal, which are set to zero."""
    for rows in (correlated_rows(seed, batch=3), correlated_rows(seed, batch=5, shared=2)):
        statistics = in_basis(rows, orthogonal(OUT, seed), orthogonal(IN, seed))
        after = EKFAC.reframed(statistics, "layer")
        assert bool((after.mean("scale") >= 0).all())
        assert_close(after.sums["scale"].sum(), statistics.sums["scale"].sum(), rtol=1e-10, atol=0)


def test_negative_numbers_do_occur_and_are_zero_then():
    smallest = [
        float(EKFAC.reframed(random_statistics(seed, batch=3), "layer").sums["scale"].min()) for seed in range(9)
    ]
    assert min(smallest) == 0


def test_the_same_basis_again_changes_nothing():
    once = EKFAC.reframed(random_statistics(3), "layer")
    twice = EKFAC.reframed(once, "layer")
    assert_close(twice.mean("scale"), once.mean("scale"), **TIGHT)
    assert_close(basis_of(twice).abs(), basis_of(once).abs(), **TIGHT)


def test_where_kfac_is_exact_so_is_every_new_basis():
    """Of a product the diagonal is known in any basis."""
    rows = Rows(randn(1, 1, IN, seed=0), randn(2, 1, 1, OUT, seed=1))
    start = in_basis(rows, orthogonal(OUT, 2), orthogonal(IN, 3))
    after = EKFAC.reframed(start, "layer")
    assert_close(fisher_of(EKFAC, after), exact_fisher(rows), **TIGHT)
    assert error(fisher_of(EKFAC, start), exact_fisher(rows)) > 0.1


def test_a_new_basis_of_an_old_average_is_nearer_than_kfac():
    """What a refresh in training is for: many examples measured in a basis that is out of date."""
    better = 0
    for seed in range(20):
        rows = correlated_rows(seed, batch=200)
        after = EKFAC.reframed(random_statistics(seed, batch=200), "layer")
        expected = exact_fisher(rows)
        better += error(fisher_of(EKFAC, after), expected) < error(fisher_of(KRON, rows), expected)
    assert better >= 18


@BOTH
def test_stacked_blocks_and_diagonal_sides_are_reframed_like_single_dense_ones(structure):
    stacked = structure.measure(KINDS["stacked, two positions"]())
    after = structure.reframed(stacked, "layer")
    for i in range(2):
        alone = Statistics({name: value[i] for name, value in stacked.sums.items()}, stacked.counts)
        assert_close(after.sums["scale"][i], structure.reframed(alone, "layer").sums["scale"], **TIGHT)
    lookup = structure.measure(KINDS["bags of words"]())
    after = structure.reframed(lookup, "layer")
    assert torch.equal(after.frame["basis_column"], torch.ones(1, IN).double())
    assert_close(after.sums["scale"].sum(-2), lookup.sums["scale"].sum(-2), rtol=0.5, atol=0)


@BOTH
@pytest.mark.parametrize("case", ["nothing", "no gradients", "no inputs", "equal eigenvalues", "one direction"])
def test_degenerate_factors_have_a_basis(structure, case):
    """Eigenvectors of equal eigenvalues are any; the trace is the Fisher's in all of them."""
    rows = {
        "nothing": Rows(torch.zeros(3, 1, IN).double(), torch.zeros(1, 3, 1, OUT).double()),
        "no gradients": Rows(randn(3, 1, IN, seed=0), torch.zeros(1, 3, 1, OUT).double()),
        "no inputs": Rows(torch.zeros(3, 1, IN).double(), randn(1, 3, 1, OUT, seed=0)),
        "equal eigenvalues": Rows(torch.eye(IN).double().unsqueeze(1), torch.ones(1, IN, 1, OUT).double()),
        "one direction": Rows(torch.ones(3, 1, IN).double(), torch.ones(1, 3, 1, OUT).double()),
    }[case]
    for statistics in (surveyed(structure, rows), structure.reframed(structure.measure(rows), "layer")):
        assert all(bool(torch.isfinite(value).all()) for value in statistics.sums.values())
        assert_close(statistics.mean("scale").sum(), trace(exact_fisher(rows)), **TIGHT)


def test_a_factor_with_nan_is_an_error_that_names_the_layer():
    statistics = EKFAC.measure(KINDS["one position"]()) * float("nan")
    with pytest.raises(NotPositiveDefiniteError, match=r"'encoder\.2'.*NaN"):
        EKFAC.reframed(replace(statistics, counts=dict.fromkeys(statistics.counts, 1.0)), "encoder.2")


def test_the_basis_goes_where_the_statistics_go():
    single = surveyed(EKFAC, KINDS["one position"]()).map(Tensor.float)
    assert {value.dtype for value in (*single.sums.values(), *single.frame.values())} == {torch.float32}
    (gaussian,) = EKFAC.gaussians([BlockSpec("layer", single, 20.0, 0.7)])
    assert {tensor.dtype for tensor in gaussian.state.values()} == {torch.float32}


# Priors


def refuse(spec: BlockSpec, structure: Structure, what: str) -> None:
    remedy = r"one precision for a block, Posterior\.nearest_matrix_normal\(\) of a posterior, or structure='kron'"
    for attempt in (structure.gaussians, lambda specs: structure.spectrum(specs[0])):
        with pytest.raises(ArgumentError, match=f"{what}, which structure='{structure.name}' .* Allowed: {remedy}"):
            attempt([spec])


@BOTH
def test_precisions_may_differ_from_block_to_block(structure):
    statistics = surveyed(structure, KINDS["stacked"]())
    prior = torch.tensor([0.7, 3.0], dtype=torch.float64)[:, None, None]
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, 20.0, prior)])
    for i, own in enumerate((0.7, 3.0)):
        expected = 20 * fisher_of(structure, statistics)[i] + own * torch.eye(OUT * IN).double()
        assert_close(gaussian.to_dense()[i], expected, **TIGHT)


@BOTH
def test_precisions_may_differ_from_word_to_word(structure):
    """On a side that is kept as it is, and only there."""
    rows = Rows(words(10, 2, 2, size=IN), randn(2, 10, 2, OUT, seed=1))
    statistics, by_word = surveyed(structure, rows), torch.linspace(1, 2, IN).double()
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, 20.0, by_word)])
    expected = 20 * fisher_of(structure, statistics) + torch.diag(by_word.repeat(OUT))
    assert_close(gaussian.to_dense(), expected, **TIGHT)
    by_row = torch.linspace(1, 2, OUT).double().unsqueeze(-1)
    refuse(BlockSpec("layer", statistics, 20.0, by_row), structure, "precisions of single weights")


@BOTH
def test_other_priors_are_refused_with_a_remedy(structure):
    statistics = surveyed(structure, KINDS["one position"]())
    by_column = torch.linspace(1, 2, IN).double()
    refuse(BlockSpec("layer", statistics, 20.0, by_column), structure, "precisions of single weights")
    diagonal = DiagonalGaussian(torch.ones(OUT, IN).double())
    refuse(BlockSpec("layer", statistics, 20.0, diagonal), structure, "a diagonal Gaussian")


#: Roots of a matrix normal of 3×4 blocks, the rows' or the columns' diagonal or neither.
ROOTS = {
    "dense": lambda *blocks: (cholesky(*blocks, OUT), cholesky(*blocks, IN)),
    "a diagonal row": lambda *blocks: (cholesky(*blocks, OUT)[..., -1:, :].square() + 0.1, cholesky(*blocks, IN)),
    "a diagonal column": lambda *blocks: (cholesky(*blocks, OUT), cholesky(*blocks, IN)[..., -1:, :].square() + 0.1),
}


def cholesky(*shape: int) -> Tensor:
    return torch.linalg.cholesky(random_spd(*shape, seed=shape[-1]))


@BOTH
@pytest.mark.parametrize("roots", ROOTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_normal_is_made_white_first(structure, kind, roots):
    """In its coordinates the Fisher is the diagonal of what is known of it, in the factors' eigenvectors there."""
    rows = KINDS[kind]()
    blocks = rows.gradients.shape[1:-3]
    prior, statistics = MatrixNormalGaussian(*ROOTS[roots](*blocks)), surveyed(structure, rows)
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, 20.0, prior)])
    R = dense_kron(*(linalg.dense(root).contiguous() for root in prior.state.values()))
    product = fisher_of(TKFAC if structure is TEKFAC else KRON, rows)
    Q, S = basis_of(statistics), statistics.mean("scale").flatten(-2)
    model = product + (Q * (S - diagonal_in(Q, product)).unsqueeze(-2)) @ Q.mT
    # the eigenvectors are the library's: in them the product is diagonal, and they are orthogonal in white coordinates
    B = dense_kron(*(linalg.dense(gaussian.state[name]).contiguous() for name in ("basis_row", "basis_column")))
    for matrix in (product, prior.to_dense()):
        white = B.mT @ matrix @ B
        assert_close(white, torch.diag_embed(white.diagonal(dim1=-2, dim2=-1)), **TIGHT)
    found = diagonal_in(B, model)
    kept = found.clamp(min=0)
    kept = kept * (found.sum(-1, keepdim=True).clamp(min=0) / kept.sum(-1, keepdim=True))
    inverse = torch.linalg.inv(B)
    assert_close(gaussian.to_dense(), (inverse.mT * (20 * kept + 1).unsqueeze(-2)) @ inverse, **TIGHT)
    assert_close(trace(R.mT @ gaussian.to_dense() @ R), 20 * found.sum(-1).clamp(min=0) + OUT * IN, **TIGHT)
    spectrum = structure.spectrum(BlockSpec("layer", statistics, 20.0, prior))
    logdet = prior.logdet() + torch.log1p(20 * spectrum).sum((-2, -1))
    assert_close(gaussian.logdet(), logdet, **TIGHT)
    assert_close(gaussian.logdet(), torch.linalg.slogdet(gaussian.to_dense()).logabsdet, **TIGHT)


@BOTH
def test_a_white_matrix_normal_is_a_number(structure):
    """Where the statistics are in their own basis, both ways are one."""
    statistics = surveyed(structure, KINDS["two positions"]())
    normal = MatrixNormalGaussian(2 * torch.eye(OUT).double(), torch.eye(IN).double())
    by_number, by_normal = structure.gaussians([BlockSpec("layer", statistics, 20.0, p) for p in (0.25, normal)])
    assert_close(by_normal.to_dense(), by_number.to_dense(), **TIGHT)
    assert_close(by_normal.logdet(), by_number.logdet(), **TIGHT)


@BOTH
def test_tasks_follow_one_another(structure):
    """The posterior of one task, as a matrix normal, is the prior of the next; more data make it narrower."""
    model, x = seeded(nn.Sequential(nn.Linear(IN, 5), nn.Tanh(), nn.Linear(5, OUT))), randn(12, IN, seed=3)
    tasks = [[(x[part], torch.arange(6) % OUT)] for part in (slice(6), slice(6, 12))]
    first = bk.Laplace(model, Categorical(), structure=structure.name).fit(tasks[0], progress=False).posterior()
    prior = first.nearest_matrix_normal()
    second = bk.Laplace(model, Categorical(), structure=structure.name, prior=prior).fit(tasks[1], progress=False)
    assert bool(torch.isfinite(second.log_marginal_likelihood()))
    for name, block in second.posterior().blocks.items():
        added = block.to_dense() - prior.blocks[name].to_dense()
        assert torch.linalg.eigvalsh(added).min() > -1e-10
        assert trace(added) > 0
    with pytest.raises(ArgumentError, match="nearest_matrix_normal"):
        bk.Laplace(model, Categorical(), structure=structure.name, prior=first).fit(
            tasks[1], progress=False
        ).posterior()


# A fit of two passes


@BOTH
def test_an_update_is_measured_in_the_fits_own_basis(structure):
    """And adds up to one measurement of all data there."""
    model, x, y = seeded(nn.Sequential(nn.Linear(IN, 5), nn.Tanh(), nn.Linear(5, OUT))), randn(12, IN, seed=3), None
    y = torch.arange(12) % OUT
    first, second = [(x[:5], y[:5])], [(x[5:], y[5:])]
    laplace = bk.Laplace(model, Categorical(), structure=structure.name).fit(first, progress=False)
    before = {name: block.state["basis_row"] for name, block in laplace.posterior().blocks.items()}
    after = laplace.update(second, progress=False).posterior()
    columns = output_gradients(Categorical(), model(x), "exact")
    for name, rows in record(model, x, columns).items():
        block = after.blocks[name]
        assert torch.equal(block.state["basis_row"], before[name])
        frame = {key: block.state[key] for key in ("basis_row", "basis_column")}
        whole = structure.measure(rows, frame).mean("scale")
        assert_close(block.state["precision"], 12 * whole + 1, **TIGHT)
