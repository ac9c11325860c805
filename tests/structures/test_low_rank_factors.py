"""Kronecker factors of low rank: the matrices they stand for, written out, and that they are K-FAC at full rank."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import linalg, structures
from bayes_kfac.curvature import SHARING_KINDS, Rows, kronecker_factors
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import (
    DAMPING_KINDS,
    BlockSpec,
    LowRankKroneckerGaussian,
    SketchyStructure,
    SkfacStructure,
)
from tests.helpers import TIGHT, dense_kron, randn, rng, seeded
from tests.random_rows import dense_rows, tied_rows, words, written_out

OUT, IN, SCALE = 4, 6, 40.0
KINDS = [SketchyStructure, SkfacStructure]
CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def masked(rows: Rows) -> Rows:
    mask = torch.tensor([[True, True, False], [True, False, False], *[[True] * 3] * 6])
    return replace(rows, mask=mask, gradients=rows.gradients * mask[..., None], examples=5.5)


ROWS = {
    "plain": lambda: dense_rows(2, (), 8, 3, in_=IN, out=OUT),
    "stacked": lambda: dense_rows(2, (2,), 8, 3, in_=IN, out=OUT),
    "masked": lambda: masked(dense_rows(2, (), 8, 3, in_=IN, out=OUT)),
    "a share": lambda: replace(dense_rows(2, (), 8, 3, in_=IN, out=OUT), share=0.4),
    "tied": lambda: tied_rows(batch=8, size=OUT, width=IN, sparse=False),
}
PRIORS = {"number": 0.7, "columns": 0.2 + randn(IN, seed=9).square()}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> type[SketchyStructure] | type[SkfacStructure]:
    return request.param


def built(structure, rows: Rows, prior=0.7):
    (gaussian,) = structure.gaussians([BlockSpec("layer", structure.measure(rows), SCALE, prior)])
    return gaussian


def factors(structure, rows: Rows) -> tuple[Tensor, Tensor]:
    """``A`` and ``G`` as the sketches have them."""
    statistics = structure.measure(rows)
    A, G = (statistics.mean_columns(name).to_dense() for name in ("input", "gradient"))
    return A, G


# The factors


@pytest.mark.parametrize("sharing", SHARING_KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_with_enough_columns_the_factors_are_those_of_kfac(kind, rows, sharing):
    """Their sums and their counts, for masks, shares of the columns, and tied weights."""
    statistics = kind(64, sharing=sharing).measure(ROWS[rows]())
    expected = kronecker_factors(ROWS[rows](), sharing)
    assert dict(statistics.counts) == pytest.approx(dict(expected.counts))
    for name, value in expected.sums.items():
        assert_close(statistics.columns[name].to_dense(), value, **TIGHT)


def test_words_are_measured_as_they_are_written_out(kind):
    rows = Rows(words(9, 2, 2, size=IN), randn(2, 9, 2, OUT, seed=1))
    statistics, expected = kind(64).measure(rows), kind(64).measure(written_out(rows))
    for name, value in expected.columns.items():
        assert_close(statistics.columns[name].to_dense(), value.to_dense(), **TIGHT)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_sketchy_is_never_below_kfac_and_at_most_its_floor_above(rank):
    """``A ⪯ Â + ρ I`` and ``Â ⪯ A``, over batches; and less so with each column more."""
    batches = [dense_rows(2, (), 5, 2, in_=IN, out=OUT, seed=10 * n) for n in range(6)]
    structure = SketchyStructure(rank)
    sketch, exact = structure.measure(batches[0]), kronecker_factors(batches[0], "expand")
    for rows in batches[1:]:
        sketch = sketch.moving_average(structure.measure(rows), 0.7)
        exact = exact.moving_average(kronecker_factors(rows, "expand"), 0.7)
    for name, value in exact.sums.items():
        above = torch.linalg.eigvalsh(sketch.columns[name].to_dense() - value)
        assert above.min() >= -1e-10
        assert above.max() <= sketch.columns[name].floor + 1e-10
        assert (sketch.columns[name].floor > 0) == (rank < value.shape[-1])


def test_skfac_takes_some_of_the_rows_where_there_are_more_than_the_window():
    """Three rows in the place of nine, weighing threefold; of later batches the latest."""
    rows = dense_rows(1, (), 3, 3, in_=IN, out=OUT)
    A, G = factors(SkfacStructure(3), rows)
    a, g = rows.inputs.flatten(0, 1), rows.gradients[0].flatten(0, 1)
    kept = SkfacStructure(3).measure(rows).columns["input"].values.squeeze(-2)
    chosen = torch.cdist(kept, a).argmin(-1)  # the same on both sides, where they are as many
    assert len(chosen.unique()) == 3
    a, g = a[chosen], g[chosen]
    assert_close(A, a.mT @ a / 3, **TIGHT)
    assert_close(G, 3 * g.mT @ g / 3, **TIGHT)
    later = dense_rows(1, (), 3, 1, in_=IN, out=OUT, seed=5)
    total = SkfacStructure(3).measure(rows) + SkfacStructure(3).measure(later)
    assert_close(total.mean_columns("input").to_dense(), factors(SkfacStructure(3), later)[0], **TIGHT)


@pytest.mark.parametrize(("batch", "shared", "columns"), [(256, 1, 2), (256, 1, 16), (16, 256, 1), (64, 16, 4)])
def test_skfac_takes_rows_of_all_positions_and_columns_in_proportion(batch, shared, columns):
    """Rows that say where they are: no factor of their number is the step at which they are taken."""
    position = torch.arange(shared).expand(batch, shared)
    inputs = torch.nn.functional.one_hot(position % 16, 16).double()
    column = torch.arange(columns)[:, None, None].expand(columns, batch, shared)
    gradients = torch.nn.functional.one_hot(column, columns).double()
    A, G = factors(SkfacStructure(), Rows(inputs, gradients))
    exact = kronecker_factors(Rows(inputs, gradients), "expand")
    for own, name in ((A, "input"), (G, "gradient")):
        expected = exact.mean(name).diagonal(dim1=-2, dim2=-1)
        there = expected > 0
        ratio = own.diagonal(dim1=-2, dim2=-1)[there] / expected[there]
        # a class of sixteen has 16 rows of 256, with a standard deviation of less than 4
        assert_close(ratio, torch.ones_like(ratio), rtol=0.0, atol=0.75)
        assert_close(own.trace(), expected.sum(), **TIGHT)


def test_skfac_takes_the_same_rows_whatever_else_is_random():
    rows = dense_rows(2, (), 40, 9, in_=IN, out=OUT)
    before = torch.get_rng_state()
    first = factors(SkfacStructure(7), rows)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    assert all(map(torch.equal, first, factors(SkfacStructure(7), rows)))


def test_skfac_inverts_by_the_gram_matrix_of_the_rows():
    """``(aᵀ a / m + λ I)⁻¹ = (I − aᵀ (m λ I + a aᵀ)⁻¹ a) / λ`` on both sides, the paper's formula."""
    a, g, V = randn(3, IN, seed=0), randn(3, OUT, seed=1), randn(OUT, IN, seed=2)
    structure = SkfacStructure()
    statistics = structure.measure(Rows(a[:, None], g[None, :, None]))
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, 1.0, 0.3)])
    pi = ((a.square().sum() / IN) / (g.square().sum() / OUT)).sqrt()

    def inverse(rows: Tensor, damping: Tensor) -> Tensor:
        gram = 3 * damping * torch.eye(3).double() + rows @ rows.mT
        return (torch.eye(rows.shape[1]).double() - rows.mT @ torch.linalg.solve(gram, rows)) / damping

    expected = inverse(g, 0.3**0.5 / pi) @ V @ inverse(a, 0.3**0.5 * pi)
    assert_close(gaussian.solve(V), expected, **TIGHT)


# The Gaussian


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("damping", DAMPING_KINDS)
@pytest.mark.parametrize("rows", ["plain", "stacked", "tied"])
def test_with_enough_columns_it_is_kfac(kind, rows, damping, prior):
    """For every damping, prior and kind of block; also as an evidence."""
    own = kind(64, damping=damping)
    kron = structures.get("kron", damping=damping, sharing="expand")
    gaussian, expected = (built(structure, ROWS[rows](), PRIORS[prior]) for structure in (own, kron))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if damping == "optimal" else CLOSE
    assert_close(gaussian.to_dense(), expected.to_dense(), **tolerance)
    assert_close(gaussian.marginal_variance(), expected.marginal_variance(), **tolerance)
    assert_close(gaussian.logdet(), expected.logdet(), **tolerance)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    information = [
        structure.information(BlockSpec("layer", structure.measure(ROWS[rows]()), 1.0, PRIORS[prior]))(scale)
        for structure in (own, kron)
    ]
    assert_close(*information, **CLOSE)


@pytest.mark.parametrize("rows", ["plain", "stacked"])
@pytest.mark.parametrize("limit", [1, 3, 5])
def test_of_few_columns_it_is_the_damped_product_of_the_sketches(kind, limit, rows):
    """``G ⊗ A + γ I`` and ``(G + √γ/π I) ⊗ (A + π√γ I)``, written out; the evidence is of the first."""
    A, G = factors(kind(limit), ROWS[rows]())
    gamma = 0.7 / SCALE
    product = dense_kron(G.contiguous(), A.contiguous())
    eye = torch.eye(OUT * IN, dtype=torch.float64)
    exact = SCALE * product + 0.7 * eye
    gaussian = built(kind(limit, damping="exact"), ROWS[rows]())
    assert isinstance(gaussian, LowRankKroneckerGaussian)
    assert_close(gaussian.to_dense(), exact, **CLOSE)
    assert_close(gaussian.logdet(), torch.linalg.slogdet(exact).logabsdet, **CLOSE)
    variance = torch.linalg.inv(exact).diagonal(dim1=-2, dim2=-1)
    assert_close(gaussian.marginal_variance().flatten(-2), variance, **CLOSE)
    spec = BlockSpec("layer", kind(limit).measure(ROWS[rows]()), 1.0, torch.tensor(0.7, dtype=torch.float64))
    information = kind(limit).information(spec)(torch.tensor(SCALE, dtype=torch.float64))
    assert_close(information, torch.linalg.slogdet(exact / 0.7).logabsdet.sum(), **CLOSE)
    pi = ((linalg.trace(A) / IN) / (linalg.trace(G) / OUT)).sqrt()
    damped = [linalg.add_to_diagonal(G, gamma**0.5 / pi), linalg.add_to_diagonal(A, gamma**0.5 * pi)]
    factored = built(kind(limit, damping="factored"), ROWS[rows]())
    assert_close(factored.to_dense(), SCALE * dense_kron(*damped), **CLOSE)


@pytest.mark.parametrize("rows", ["plain", "stacked"])
@pytest.mark.parametrize("limit", [1, 3, 5])
def test_of_few_columns_the_optimal_damping_spends_its_variance_exactly(kind, limit, rows):
    """``tr(P Σ) = out · in`` for the exact ``P``, as at the optimum of ``KL(q ‖ p)``; a matrix normal it is too."""
    optimal, exact = (built(kind(limit, damping=damping), ROWS[rows]()) for damping in ("optimal", "exact"))
    trace = (exact.to_dense() @ torch.linalg.inv(optimal.to_dense())).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_close(trace, torch.full_like(trace, OUT * IN), **CLOSE)
    assert bool((torch.linalg.matrix_rank(optimal.precision) == 1).all())
    divergences = [
        torch.linalg.slogdet(q.to_dense()).logabsdet
        + (exact.to_dense() @ torch.linalg.inv(q.to_dense())).diagonal(dim1=-2, dim2=-1).sum(-1)
        for q in (optimal, built(kind(limit, damping="factored"), ROWS[rows]()))
    ]
    assert bool((divergences[0] < divergences[1]).all())


def test_what_a_sketch_left_out_goes_along_with_a_prior_by_column():
    """``ρ in / tr(S) · S`` in the place of ``ρ I``, of the same trace; the prior itself enters exactly."""
    S, structure = PRIORS["columns"], SketchyStructure(2, damping="exact")
    columns = structure.measure(ROWS["plain"]()).mean_columns("input")
    _, G = factors(structure, ROWS["plain"]())
    rows = columns.columns.flatten(-2)
    A = rows.mT @ rows + torch.diag(columns.floor * IN / S.sum() * S)
    assert_close(A.trace(), columns.trace(), **TIGHT)
    expected = SCALE * torch.kron(G, A) + torch.diag(S.repeat(OUT))
    assert_close(built(structure, ROWS["plain"](), S).to_dense(), expected, **CLOSE)


@pytest.mark.parametrize("limit", [1, 2])
def test_of_tied_weights_the_sketches_floors_weigh_as_their_columns(limit):
    """``G ⊗ A + H ⊗ B`` as K-FAC has it, the product of its partial traces over its trace."""
    structure = SketchyStructure(limit, damping="exact")
    statistics = structure.measure(ROWS["tied"]())
    A, G, B, H = (
        statistics.mean_columns(name).to_dense()
        for name in ("input", "gradient", "transposed_gradient", "transposed_input")
    )
    whole = (torch.kron(G, A) + torch.kron(H, B)).reshape(OUT, IN, OUT, IN)
    left, right = torch.einsum("aibi->ab", whole), torch.einsum("aiaj->ij", whole)
    expected = SCALE * torch.kron(left, right) / left.trace() + 0.7 * torch.eye(OUT * IN).double()
    assert_close(built(structure, ROWS["tied"]()).to_dense(), expected, **CLOSE)


def test_rows_that_repeat_are_one_direction():
    """What rounding leaves of the others has no direction of its own."""
    row = dense_rows(1, (), 1, 1, in_=IN, out=OUT)
    rows = Rows(row.inputs.expand(3, 1, IN), row.gradients.expand(1, 3, 1, OUT))
    gaussian = built(SkfacStructure(damping="exact"), rows)
    for basis in (gaussian.basis_row, gaussian.basis_column):
        assert_close(torch.linalg.matrix_norm(basis) ** 2, torch.tensor(1.0, dtype=torch.float64), **TIGHT)
    assert_close(gaussian.logdet(), torch.linalg.slogdet(gaussian.to_dense()).logabsdet, **TIGHT)


def test_priors_of_single_weights_and_of_gaussians_are_refused(kind):
    earlier = built(kind(), ROWS["plain"]())
    for prior in (0.2 + randn(OUT, IN, seed=3).square(), earlier):
        with pytest.raises(ArgumentError, match=f"structure='{kind.name}' cannot add exactly"):
            built(kind(), ROWS["plain"](), prior)


def test_directions_without_data_have_the_priors_variance():
    """One example: all but one direction on each side are the prior's, in float32 too."""
    rows = dense_rows(1, (), 1, 1, in_=IN, out=OUT).to(torch.float32)
    gaussian = built(SkfacStructure(damping="exact"), rows)
    values = torch.linalg.eigvalsh(gaussian.to_dense())
    assert_close(values[:-1], torch.full_like(values[:-1], 0.7), rtol=1e-4, atol=1e-4)
    assert values[-1] > 1


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_columns_that_leave_nothing_out_have_their_variance_in_float32(kind, damping):
    """The rest of no dimension is not wide where the data are many: its variance would not cancel."""
    rows = dense_rows(1, (), 20, 1, in_=IN, out=1)
    double, single = (
        kind(damping=damping).gaussians([BlockSpec("layer", kind().measure(own), 1e7, 0.1)])[0]
        for own in (rows, rows.to(torch.float32))
    )
    assert_close(single.marginal_variance().double(), double.marginal_variance(), rtol=1e-4, atol=0.0)
    variance = single.whitened_rows(rows.to(torch.float32)).variance()
    assert_close(variance.double(), double.whitened_rows(rows).variance(), rtol=1e-3, atol=0.0)


# In use


@pytest.mark.parametrize("limit", [2, 5])
def test_training_with_reductions_goes_on_bit_for_bit(kind, limit, tmp_path):
    """Sketches that were reduced come back from a checkpoint as they were."""
    x, y = randn(40, 4, seed=0), randn(40, 2, seed=1)

    def trainer() -> bk.NoisyNaturalGradient:
        options = {"lr": 0.01, "statistics_every": 1, "inverse_every": 2, "generator": rng(0)}
        model = seeded(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
        likelihood = bk.likelihoods.Gaussian(0.3).double()
        return bk.NoisyNaturalGradient(model, likelihood, num_data=40, structure=kind(limit), **options)

    def train(optimizer: bk.NoisyNaturalGradient, steps: range) -> None:
        for step in steps:
            part = slice(8 * (step % 5), 8 * (step % 5) + 8)
            with optimizer.sampled_params():
                optimizer.zero_grad()
                optimizer.likelihood(optimizer.model(x[part]), y[part]).backward()
            optimizer.step()

    whole = trainer()
    train(whole, range(7))
    saved = copy.deepcopy({"model": whole.model.state_dict(), "optimizer": whole.state_dict()})
    torch.save(saved, tmp_path / "checkpoint.pt")
    train(whole, range(7, 10))
    resumed, saved = trainer(), torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, range(7, 10))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
