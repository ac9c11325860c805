"""The unit-wise structure: the blocks of each output unit on the diagonal of the whole Fisher, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayes_kfac import structures
from bayes_kfac.curvature import Rows, output_gradients
from bayes_kfac.likelihoods import Gaussian
from bayes_kfac.structures import BlockSpec, UnitWiseGaussian, whitened
from bayes_kfac.structures.whitened import WhitenedJacobians, WhitenedRows
from tests.fishers import IN, KINDS, OUT, exact_fisher, fisher_of, get
from tests.helpers import TIGHT, assert_same_statistics, block_fishers, randn, random_spd, record, seeded

UNIT_WISE = get("unit_wise")


def within_units(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with zeros between the weights of different units."""
    return matrix * torch.block_diag(*torch.ones(OUT, IN, IN).double())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_fisher_within_units_and_zero_between(kind):
    rows = KINDS[kind]()
    assert_close(fisher_of(UNIT_WISE, rows), within_units(exact_fisher(rows)), **TIGHT)


def test_without_weight_sharing_inputs_are_weighted_by_squared_gradients():
    """``E[g_o² a aᵀ]``, the published form, one example at a time."""
    rows = KINDS["one position"]()
    assert isinstance(rows.inputs, torch.Tensor)
    expected = torch.zeros(OUT, IN, IN).double()
    for n in range(6):
        for g in rows.gradients[:, n, 0]:
            expected = expected + g.square()[:, None, None] * torch.outer(rows.inputs[n, 0], rows.inputs[n, 0]) / 6
    assert_close(UNIT_WISE.measure(rows).mean("fisher"), expected, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_in_pieces_add_up(kind, monkeypatch):
    whole = UNIT_WISE.measure(KINDS[kind]())
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", 1)
    assert_same_statistics(UNIT_WISE.measure(KINDS[kind]()), whole)


def test_independent_outputs_are_exact():
    """The output layer of a regression with several targets: its noise is independent."""
    model, x = seeded(nn.Sequential(nn.Linear(IN, 5), nn.Tanh(), nn.Linear(5, OUT))), randn(9, IN, seed=3)
    columns = output_gradients(Gaussian(0.5).double(), model(x), "exact")
    expected = block_fishers(model, x, 4 * torch.eye(OUT).double().expand(9, OUT, OUT))
    assert_close(fisher_of(UNIT_WISE, record(model, x, columns)["2"]), expected["2"], **TIGHT)


def test_one_unit_is_the_dense_structure():
    rows = Rows(randn(6, 2, IN, seed=0), randn(2, 6, 2, 1, seed=1))
    assert_close(fisher_of(UNIT_WISE, rows), fisher_of(get("dense"), rows), **TIGHT)


def test_one_input_is_the_diagonal():
    """As of a bare parameter, whose block is ``(elements, 1)``."""
    rows = Rows(torch.ones(6, 1, 1).double(), randn(2, 6, 1, OUT, seed=1))
    assert_close(fisher_of(UNIT_WISE, rows), fisher_of(get("diagonal"), rows), **TIGHT)


@pytest.mark.parametrize("blocks", [(), (2,), (2, 3)])
def test_the_gaussian_of_given_roots(blocks):
    """``cov(W_o) = L_o L_oᵀ`` for each row, whatever shape the stack of blocks has."""
    covariance = random_spd(*blocks, OUT, IN, seed=0)
    gaussian = UnitWiseGaussian(torch.linalg.cholesky(covariance))
    assert gaussian.shape == (*blocks, OUT, IN)
    each = [torch.block_diag(*units) for units in torch.linalg.inv(covariance).reshape(-1, OUT, IN, IN)]
    expected = torch.stack(each).reshape(*blocks, OUT * IN, OUT * IN)
    assert_close(gaussian.to_dense(), expected, **TIGHT)
    value = randn(5, 2, *blocks, OUT, IN, seed=1)
    assert_close(
        gaussian.multiply(value).flatten(-2), (expected @ value.flatten(-2).unsqueeze(-1)).squeeze(-1), **TIGHT
    )


@pytest.mark.parametrize("shared", [1, 2, 9])
@pytest.mark.parametrize("blocks", [(), (2,)])
def test_whitened_jacobians_in_pieces_are_those_at_once(shared, blocks, monkeypatch):
    """Of few positions inputs are whitened, of many Jacobians; either between examples with few and with many."""
    gaussian = UnitWiseGaussian(torch.linalg.cholesky(random_spd(*blocks, OUT, IN, seed=0)))
    rows, others = (
        gaussian.whitened(randn(*blocks, 5, T, IN, seed=T), randn(3, *blocks, 5, T, OUT, seed=T + 1))
        for T in (shared, 4)
    )
    whole = [rows.covariance(), rows.variance(), rows.jacobians(), rows.between(others), others.between(rows)]
    monkeypatch.setattr(whitened, "CPU_JACOBIAN_BYTES", 1)
    pieces = [rows.covariance(), rows.variance(), rows.jacobians(), rows.between(others), others.between(rows)]
    for piece, expected in zip(pieces, whole, strict=True):
        assert_close(piece, expected, **TIGHT)
    assert_close(whole[3], torch.einsum("nck,mdk->nmcd", rows.jacobians(), others.jacobians()), **TIGHT)
    assert all(isinstance(part, WhitenedRows if shared <= 3 else WhitenedJacobians) for part in rows._parts())


def test_many_draws_do_not_copy_the_roots():
    """A root for every draw would be 6 GB."""
    gaussian = UnitWiseGaussian(torch.eye(64).expand(4, 64, 64))
    noise = torch.ones(100_000, 4, 64)
    assert torch.equal(gaussian.sample(noise), noise)


def test_posteriors_of_tasks_add_up():
    """The posterior of one task is the prior of the next."""
    statistics = [UNIT_WISE.measure(KINDS[kind]()) for kind in ("one position", "two positions")]
    (first,) = UNIT_WISE.gaussians([BlockSpec("layer", statistics[0], 20.0, 0.7)])
    (second,) = UNIT_WISE.gaussians([BlockSpec("layer", statistics[1], 5.0, first)])
    fishers = [within_units(exact_fisher(KINDS[kind]())) for kind in ("one position", "two positions")]
    assert_close(second.to_dense(), 20 * fishers[0] + 5 * fishers[1] + 0.7 * torch.eye(OUT * IN).double(), **TIGHT)


def test_damping_and_sharing_make_no_difference():
    rows = KINDS["nine positions"]()
    other = structures.get("unit_wise", damping="factored", sharing="reduce")
    assert other.damping == "exact"
    assert_same_statistics(other.measure(rows), UNIT_WISE.measure(rows))
