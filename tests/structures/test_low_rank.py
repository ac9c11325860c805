"""Low-rank structures: the matrices they stand for, written out, and the published formulas."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import structures
from bayes_kfac.curvature import Rows
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import (
    BlockSpec,
    DiagonalGaussian,
    LowRankGaussian,
    MFacStructure,
    SlangStructure,
    SmwStructure,
    TongaStructure,
)
from bayes_kfac.structures.low_rank import LowRankStructure
from tests.helpers import TIGHT, randn, rng, seeded
from tests.random_rows import dense_rows, tied_rows, words

OUT, IN, SCALE, PRIOR = 3, 5, 40.0, 0.7
ROWS = {
    "plain": lambda: dense_rows(2, (), 9, 2, in_=IN, out=OUT),
    "stacked": lambda: dense_rows(2, (2,), 9, 2, in_=IN, out=OUT),
    "words": lambda: Rows(words(9, 2, 2, size=IN), randn(2, 9, 2, OUT, seed=1)),
    "tied to words": lambda: tied_rows(batch=9, size=OUT, width=IN),
}


@pytest.fixture(params=ROWS)
def rows(request: pytest.FixtureRequest) -> Rows:
    return ROWS[request.param]()


def fisher(rows: Rows) -> Tensor:
    """One example's Fisher, ``[*blocks, out·in, out·in]``, by its Jacobians."""
    J = rows.jacobians().flatten(-2)
    return torch.einsum("c...ni,c...nj->...ij", J, J) / rows.num_examples


def truncated(matrix: Tensor, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors[..., -rank:] * values[..., None, -rank:]) @ vectors[..., -rank:].mT


def built(structure: LowRankStructure, rows: Rows, prior=PRIOR) -> LowRankGaussian:
    (gaussian,) = structure.gaussians([BlockSpec("layer", structure.measure(rows), SCALE, prior)])
    assert isinstance(gaussian, LowRankGaussian)
    return gaussian


def eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype).expand_as(like)


# The matrices


@pytest.mark.parametrize("rank", [1, 4, 15])
def test_tonga_is_the_truncated_fisher(rows, rank):
    gaussian, F = built(TongaStructure(rank), rows), fisher(rows)
    assert_close(gaussian.to_dense(), SCALE * truncated(F, rank) + PRIOR * eye(F), **TIGHT)


@pytest.mark.parametrize("rank", [1, 4, 15])
def test_slang_is_the_truncated_fisher_with_the_whole_diagonal(rows, rank):
    gaussian, F = built(SlangStructure(rank), rows), fisher(rows)
    leading = truncated(F, rank)
    expected = leading + torch.diag_embed((F - leading).diagonal(dim1=-2, dim2=-1))
    assert_close(gaussian.to_dense(), SCALE * expected + PRIOR * eye(F), **TIGHT)
    assert_close(gaussian.to_dense().diagonal(dim1=-2, dim2=-1), SCALE * F.diagonal(dim1=-2, dim2=-1) + PRIOR, **TIGHT)


def test_slang_is_nearer_to_the_fisher_than_tonga_and_both_with_their_rank():
    rows = ROWS["plain"]()
    exact = built(SmwStructure(), rows).to_dense()
    errors = {
        kind: [torch.linalg.matrix_norm(built(kind(rank), rows).to_dense() - exact) for rank in range(1, 12)]
        for kind in (TongaStructure, SlangStructure)
    }
    assert all(slang < tonga for slang, tonga in zip(*reversed(errors.values()), strict=True))
    assert all(b < a for own in errors.values() for a, b in pairwise(own))


def test_of_all_examples_smw_is_the_whole_fisher(rows):
    dense = structures.get("dense", damping="exact", sharing="expand")
    (expected,) = dense.gaussians([BlockSpec("layer", dense.measure(rows), SCALE, PRIOR)])
    gaussian = built(SmwStructure(), rows)
    assert_close(gaussian.to_dense(), expected.to_dense(), **TIGHT)
    assert_close(gaussian.logdet(), expected.logdet(), **TIGHT)
    assert_close(gaussian.marginal_variance(), expected.marginal_variance(), **TIGHT)


def test_a_window_of_smw_is_the_fisher_of_its_columns():
    """Ten of eighteen Jacobians, which stand for all of them."""
    rows = ROWS["plain"]()
    kept = SmwStructure(10).measure(rows).columns["fisher"].values.flatten(-2)
    distances = torch.cdist(kept, rows.jacobians().flatten(0, 1).flatten(-2))
    assert_close(distances.amin(-1), torch.zeros(10, dtype=torch.float64), **TIGHT)
    assert len(distances.argmin(-1).unique()) == 10
    F = kept.mT @ kept * (18 / 10) / 9
    assert_close(built(SmwStructure(10), rows).to_dense(), SCALE * F + PRIOR * eye(F), **TIGHT)


@pytest.mark.parametrize(("batch", "outputs"), [(1, 1000), (300, 4)])
def test_a_window_of_smw_is_of_all_outputs_alike(batch, outputs):
    """Of an example with more outputs than there is room for, and of many examples."""
    gradients = torch.eye(outputs, dtype=torch.float64)[:, None, None].expand(-1, batch, 1, -1)
    rows = Rows(torch.ones(batch, 1, 1, dtype=torch.float64), gradients)
    variances = SmwStructure().measure(rows).mean_columns("fisher").diagonal().flatten()
    halves = variances.unflatten(0, (2, -1)).mean(-1)
    assert_close(halves, torch.ones(2, dtype=torch.float64), rtol=0.0, atol=0.15)


def test_smw_solves_by_the_gram_matrix_of_inputs_and_gradients():
    """``P⁻¹ V = (V − Σ c_n g_n a_nᵀ) / δ`` with ``c = (n δ I + (a aᵀ) ∘ (g gᵀ))⁻¹ v``, the formula of SNGD."""
    a, g, V = randn(8, IN, seed=0), randn(8, OUT, seed=1), randn(OUT, IN, seed=2)
    structure = SmwStructure()
    statistics = structure.measure(Rows(a[:, None], g[None, :, None]))
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, 1.0, PRIOR)])
    v = torch.einsum("no,oi,ni->n", g, V, a)
    c = torch.linalg.solve(8 * PRIOR * torch.eye(8).double() + (a @ a.mT) * (g @ g.mT), v)
    assert_close(gaussian.solve(V), (V - torch.einsum("n,no,ni->oi", c, g, a)) / PRIOR, **TIGHT)


# M-FAC


def test_mfac_has_one_column_for_a_batch_and_averages_over_the_latest(rows):
    structure = MFacStructure(3)
    parts = [replace(rows, gradients=rows.gradients * (1 + n)) for n in range(5)]
    total = structure.measure(parts[0])
    for part in parts[1:]:
        total = total + structure.measure(part)
    assert total.columns["fisher"].values.shape[-3] == 3
    assert total.counts["fisher"] == 5 * rows.num_examples
    columns = [structure.measure(part).columns["fisher"].to_dense() for part in parts[2:]]
    assert_close(total.mean_columns("fisher").to_dense(), sum(columns) / (3 * rows.num_examples), **TIGHT)


@pytest.mark.parametrize("columns", [1, 3])
def test_mfac_is_without_bias_whatever_the_gradients_are_of(columns):
    """Over 20,000 batches of gradients of mean one, whose plain sum would be off by the square of the mean."""
    inputs = torch.ones(20000, 6, 1, 1, dtype=torch.float64)
    gradients = 1 + randn(columns, 20000, 6, 1, 3, seed=0) * torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    structure = MFacStructure(1)
    mean = structure.measure(Rows(inputs, gradients)).mean_columns("fisher").to_dense().mean(0)
    expected = torch.einsum("cbnto,cbntp->op", gradients, gradients) / (20000 * 6)
    assert_close(mean, expected, rtol=0.03, atol=0.0)
    plain = gradients.sum((0, 2, 3))
    assert (plain.mT @ plain / (20000 * 6))[0, 0] > 2 * expected[0, 0]


@pytest.mark.parametrize("kind", ["equal", "of a few kinds", "of equal columns"])
def test_mfac_is_without_bias_where_examples_repeat(kind):
    """On the average over 400 batches; columns of equal signs would make it as many times too large as they are."""
    total, exact, columns = 0.0, 0.0, 3 if kind == "of equal columns" else 1
    for seed in range(400):
        inputs = randn(1, 1, IN, seed=seed).expand(24, 1, IN)
        if kind == "of a few kinds":
            inputs = torch.eye(IN, dtype=torch.float64)[torch.randint(IN, (24, 1), generator=rng(seed))]
        rows = Rows(inputs, randn(1, 1, 1, 1, seed=1000 + seed).expand(columns, 24, 1, 1))
        total = total + MFacStructure().measure(rows).columns["fisher"].trace()
        exact = exact + SmwStructure().measure(rows).columns["fisher"].trace()
    # the square of a sum of signs has a standard deviation of √2 of its mean, and that of what it multiplies as much
    assert total / exact == pytest.approx(1.0, abs=0.3)


def test_mfac_is_the_same_for_the_same_data():
    rows = ROWS["plain"]()
    first = MFacStructure().measure(rows).columns["fisher"].values
    torch.randn(3)
    assert torch.equal(first, MFacStructure().measure(rows).columns["fisher"].values)
    single = MFacStructure().measure(rows.to(torch.float32)).columns["fisher"].values
    assert_close(single.double(), first, rtol=1e-4, atol=1e-4)


# The Gaussian


@pytest.mark.parametrize("blocks", [(), (2,)])
@pytest.mark.parametrize("count", [0, 1, 4, 40])
def test_the_gaussian_of_any_columns_and_diagonal(blocks, count):
    columns, diagonal = randn(*blocks, count, OUT, IN, seed=0), 0.1 + randn(*blocks, OUT, IN, seed=1).square()
    (gaussian,) = LowRankGaussian.of([columns], [diagonal], ["layer"])
    flat = columns.flatten(-2)
    P = flat.mT @ flat + torch.diag_embed(diagonal.flatten(-2))
    V = randn(3, *blocks, OUT, IN, seed=2)
    assert_close(gaussian.to_dense(), P, **TIGHT)
    assert_close(gaussian.logdet(), torch.linalg.slogdet(P).logabsdet, **TIGHT)
    assert_close(gaussian.solve(V).flatten(-2), torch.linalg.solve(P, V.flatten(-2).unsqueeze(-1)).squeeze(-1), **TIGHT)
    assert_close(gaussian.multiply(V).flatten(-2), (P @ V.flatten(-2).unsqueeze(-1)).squeeze(-1), **TIGHT)
    variance = torch.linalg.inv(P).diagonal(dim1=-2, dim2=-1).reshape(*blocks, OUT, IN)
    assert_close(gaussian.marginal_variance(), variance, **TIGHT)


@pytest.mark.parametrize("scale", [1e4, 1e8, 1e12])
def test_variances_are_positive_where_data_are_strong_and_numbers_short(scale):
    """``1 − s / (1 + s)`` is nothing but rounding in float32."""
    columns, rows = math.sqrt(scale) * randn(40, OUT, IN, seed=0), dense_rows(3, (), 4, 2, in_=IN, out=OUT)
    (gaussian,) = LowRankGaussian.of([columns.float()], [torch.ones(OUT, IN)], ["layer"])
    assert bool((gaussian.marginal_variance() > 0).all())
    whitened = gaussian.whitened(rows.inputs.float(), rows.gradients.float())
    assert bool((whitened.variance() > 0).all())
    assert bool((torch.linalg.eigvalsh(whitened.covariance().double()) > -1e-9).all())


@pytest.mark.parametrize("count", [40, 200])
def test_dependent_columns_narrow_what_they_are_along_and_nothing_else_in_float32(count):
    """Inputs in a plane: what rounding leaves of the other columns is long beside the prior."""
    plane = randn(2, 9, seed=0)
    rows = Rows(randn(count, 1, 2, seed=1) @ plane, randn(1, count, 1, 8, seed=2)).to(torch.float32)
    columns = math.sqrt(1e6) * rows.jacobians().squeeze(0)
    single, double = (
        LowRankGaussian.of([columns.to(dtype)], [torch.ones(8, 9, dtype=dtype)], ["layer"])[0]
        for dtype in (torch.float32, torch.float64)
    )
    variance = double.whitened_rows(rows.to(torch.float64)).variance()
    assert_close(single.whitened_rows(rows).variance().double(), variance, rtol=0.05, atol=0.0)
    off = torch.linalg.svd(plane).Vh[2:].reshape(7, 1, 9)
    off_rows = Rows(off, randn(1, 7, 1, 8, seed=3)).to(torch.float32)
    assert_close(single.whitened_rows(off_rows).variance(), off_rows.gradients.square().sum((0, 2, 3))[:, None])


def test_pieces_of_bounded_size_are_the_whole(monkeypatch):
    rows = ROWS["stacked"]()
    whitened = built(SmwStructure(), rows).whitened_rows(rows)
    expected = whitened.covariance(), whitened.variance(), whitened.between(whitened)
    monkeypatch.setattr("bayes_kfac.structures.whitened.CPU_JACOBIAN_BYTES", 8 * 2 * 2 * OUT * IN * 2)
    found = whitened.covariance(), whitened.variance(), whitened.between(whitened)
    for own, other in zip(found, expected, strict=True):
        assert_close(own, other, **TIGHT)
    J = whitened.jacobians()
    assert_close(expected[0], J @ J.mT, **TIGHT)


# Priors and the evidence


@pytest.mark.parametrize("structure", [SlangStructure(3), TongaStructure(3), SmwStructure(7), MFacStructure(2)])
def test_the_posterior_of_one_task_is_the_prior_of_the_next(structure, rows):
    first = built(structure, rows)
    later = replace(rows, gradients=rows.gradients.flip(-1) * 0.5)
    second = built(structure, later, prior=first)
    alone = built(structure, later)
    assert_close(second.to_dense(), first.to_dense() + alone.to_dense() - PRIOR * eye(alone.to_dense()), **TIGHT)
    spec = BlockSpec("layer", structure.measure(later), SCALE, first)
    information = structure.information(spec)(torch.tensor(SCALE, dtype=torch.float64))
    assert_close(information, (second.logdet() - first.logdet()).sum(), **TIGHT)


@pytest.mark.parametrize("structure", [SlangStructure(3), TongaStructure(3), SmwStructure(), MFacStructure()])
def test_the_information_and_its_derivatives_in_scale_and_prior(structure, rows):
    statistics = structure.measure(rows)

    def information(scale: Tensor, prior: Tensor) -> Tensor:
        return structure.information(BlockSpec("layer", statistics, 1.0, prior))(scale)

    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    prior = (0.2 + randn(OUT, IN, seed=3).square()).requires_grad_()
    assert torch.autograd.gradcheck(information, (scale, prior))
    assert torch.autograd.gradgradcheck(information, (scale, prior.detach()))
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, SCALE, prior.detach())])
    before = DiagonalGaussian(prior.detach().expand(gaussian.shape)).logdet()
    assert_close(information(scale, prior), (gaussian.logdet() - before).sum(), **TIGHT)


def test_a_prior_that_is_no_low_rank_is_refused():
    dense = structures.get("dense", damping="exact", sharing="expand")
    rows = ROWS["plain"]()
    (prior,) = dense.gaussians([BlockSpec("layer", dense.measure(rows), SCALE, PRIOR)])
    with pytest.raises(ArgumentError, match=r"structure='tonga' cannot add exactly. Allowed: .*low-rank"):
        built(TongaStructure(), rows, prior)


# In use


@pytest.mark.parametrize(
    ("kind", "option"),
    [(SlangStructure, "rank"), (TongaStructure, "rank"), (SmwStructure, "window"), (MFacStructure, "window")],
)
def test_options_are_kept_and_checked(kind, option):
    structure = structures.get(kind(**{option: 5}), damping="factored", sharing="reduce")
    assert structure.options == {option: 5}
    assert structure.limit == 5
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ArgumentError, match=option):
            kind(**{option: wrong})


@cache
def data() -> tuple[Tensor, Tensor, nn.Module]:
    x = randn(40, 4, seed=0)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=-1)
    return x, y, seeded(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2)))


def test_a_laplace_fit_of_smw_is_the_exact_one():
    """Evidence, predictive variance, tuned prior and samples' distribution are those of the dense structure."""
    x, y, model = data()
    found = {}
    for structure in ("smw", "dense"):
        laplace = bk.Laplace(copy.deepcopy(model), bk.likelihoods.Gaussian(0.3).double(), structure=structure)
        laplace.fit([(x[:17], y[:17]), (x[17:], y[17:])], progress=False)
        before = laplace.log_marginal_likelihood()
        laplace.optimize_prior_precision(progress=False)
        prediction = laplace.posterior().predict(x[:7])
        found[structure] = before, laplace.log_marginal_likelihood(), prediction.covariance
    for own, other in zip(*found.values(), strict=True):
        assert_close(own, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("structure", [SlangStructure(2), TongaStructure(2), SmwStructure(6), MFacStructure(2)])
def test_training_with_reductions_goes_on_bit_for_bit(structure, tmp_path):
    """Statistics that were reduced to their limit come back from a checkpoint as they were."""

    def trainer() -> bk.NoisyNaturalGradient:
        options = {"lr": 0.01, "statistics_every": 1, "inverse_every": 2, "generator": rng(0)}
        likelihood = bk.likelihoods.Gaussian(0.3).double()
        return bk.NoisyNaturalGradient(
            copy.deepcopy(data()[2]), likelihood, num_data=40, structure=structure, **options
        )

    def train(optimizer: bk.NoisyNaturalGradient, steps: range) -> None:
        x, y, _ = data()
        for step in steps:
            part = slice(4 * (step % 10), 4 * (step % 10) + 4)
            with optimizer.sampled_params():
                optimizer.zero_grad()
                optimizer.likelihood(optimizer.model(x[part]), y[part]).backward()
            optimizer.step()

    whole = trainer()
    train(whole, range(7))
    torch.save({"model": whole.model.state_dict(), "optimizer": whole.state_dict()}, tmp_path / "checkpoint.pt")
    for name in ("0", "3"):
        state = whole.blocks[name]
        assert 0 < state.statistics.columns["fisher"].values.shape[-3] <= structure.limit
    train(whole, range(7, 10))
    resumed, saved = trainer(), torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, range(7, 10))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    for name, block in whole.posterior().blocks.items():
        assert torch.equal(block.to_dense(), resumed.posterior().blocks[name].to_dense())
