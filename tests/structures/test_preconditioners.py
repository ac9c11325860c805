"""Structures that are no posterior: their published formulas, what they refuse and why, and that they train."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import structures
from bayes_kfac.curvature import Rows
from bayes_kfac.errors import ArgumentError, UnsupportedModelError
from bayes_kfac.structures import BlockGaussian, BlockSpec
from tests.helpers import TIGHT, randn, rng, seeded
from tests.random_rows import dense_rows, tied_rows, words, written_out

NAMES = structures.preconditioners()
DAMPING = 0.3


def built(name: str, rows: Rows, damping: float = DAMPING) -> BlockGaussian:
    structure = structures.get(name, damping="exact", sharing="expand")
    (gaussian,) = structure.gaussians([BlockSpec("layer", structure.measure(rows), 1.0, damping)])
    return gaussian


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.pow(exponent) @ vectors.T


def test_they_are_listed_apart_from_posteriors():
    assert NAMES == ("eva", "mkor", "shampoo")
    assert not set(NAMES) & set(structures.available())


@pytest.mark.parametrize("shared", [1, 4])
def test_eva_is_the_damped_outer_product_of_means(shared):
    """``U = (V − (ḡᵀVā) / (γ + ‖ā‖²‖ḡ‖²) ḡāᵀ) / γ``, the dense inverse of ``vec(ḡāᵀ) vec(ḡāᵀ)ᵀ + γI``."""
    rows = dense_rows(1, (), 7, shared)
    a, g, V = rows.inputs.mean((0, 1)), rows.gradients[0].sum(1).mean(0), randn(2, 3, seed=9)
    length = a.square().sum() * g.square().sum()
    expected = (V - (g @ V @ a) / (DAMPING + length) * torch.outer(g, a)) / DAMPING
    gaussian = built("eva", rows)
    assert_close(gaussian.solve(V), expected, **TIGHT)
    mean = torch.outer(g, a).flatten()
    assert_close(gaussian.to_dense(), torch.outer(mean, mean) + DAMPING * torch.eye(6).double(), **TIGHT)


@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("blocks", [(), (2,)])
def test_mkor_is_the_papers_update_of_inverses(shared, blocks):
    """``G⁻¹ ← (G⁻¹ − (1−β) z zᵀ / (β + (1−β) ḡᵀ z)) / β`` from ``I``, over many batches, on both sides."""
    structure, decay = structures.get("mkor", damping="factored", sharing="expand"), 0.9
    identity = structure.identity((*blocks, 2, 3), torch.zeros(1).double())
    inverse = {side: factor.clone() for side, factor in identity.sums.items()}
    average = structure.measure(dense_rows(1, blocks, 7, shared)) * 0
    for step in range(20):
        rows = dense_rows(1, blocks, 7, shared, seed=2 * step)
        average = average.moving_average(structure.measure(rows), decay)
        means = {"input": rows.inputs.mean((-3, -2)), "gradient": rows.gradients[0].sum(-2).mean(-2)}
        for side, mean in means.items():
            z = inverse[side] @ mean.unsqueeze(-1)
            scale = decay + (1 - decay) * (mean.unsqueeze(-2) @ z)
            inverse[side] = (inverse[side] - (1 - decay) * (z @ z.mT) / scale) / decay
    A, G = structure.factors(average.lean(identity, decay**20))  # as training's warm-up has it
    assert_close(torch.linalg.inv(A), inverse["input"], **TIGHT)
    assert_close(torch.linalg.inv(G), inverse["gradient"], **TIGHT)


def test_mkor_is_damped_as_kfac():
    """``(G + √γ/π I) ⊗ (A + π√γ I)``."""
    structure, rows = structures.get("mkor", damping="factored", sharing="expand"), dense_rows(1, (), 7, 2)
    statistics = structure.measure(rows)
    (gaussian,) = structure.gaussians([BlockSpec("layer", statistics, 1.0, DAMPING)])
    A, G = structure.factors(statistics)
    pi = ((A.trace() / 3) / (G.trace() / 2)) ** 0.5
    left, right = G + DAMPING**0.5 / pi * torch.eye(2).double(), A + DAMPING**0.5 * pi * torch.eye(3).double()
    assert_close(gaussian.to_dense(), torch.kron(left, right), **TIGHT)


def test_the_factors_of_mkor_depend_on_the_batch_size():
    """Why it is no posterior: gradients of either sign cancel in the mean of a batch, and inputs about it are lost."""
    structure = structures.get("mkor", damping="factored", sharing="expand")
    traces = {}
    for size in (1, 10, 100):
        rows = dense_rows(1, (), 1000, 1)
        parts = zip(rows.inputs.split(size), rows.gradients.split(size, 1), strict=True)
        measured = [structure.measure(Rows(*part)) for part in parts]
        traces[size] = structure.factors(sum(measured[1:], measured[0]))[1].trace().item()
    assert traces[10] == pytest.approx(traces[1] / 10, rel=0.3)
    assert traces[100] == pytest.approx(traces[1] / 100, rel=0.6)


@pytest.mark.parametrize("shared", [1, 4])
def test_shampoo_is_quarter_roots_of_the_gradients_moments(shared):
    """``U = (L + γ)^(-1/4) V (R + γ)^(-1/4)`` of a batch's mean gradient."""
    rows = dense_rows(1, (), 7, shared)
    gradient, V = rows.jacobians()[0].mean(0), randn(2, 3, seed=9)
    left = gradient @ gradient.T + DAMPING * torch.eye(2).double()
    right = gradient.T @ gradient + DAMPING * torch.eye(3).double()
    assert_close(built("shampoo", rows).solve(V), power(left, -0.25) @ V @ power(right, -0.25), **TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_words_are_measured_without_writing_them_out(name):
    """Eva's mean input is dense; the others keep the diagonal of a vocabulary's side."""
    rows = Rows(words(7, 3, 2), randn(1, 7, 3, 2, seed=1))
    statistics = [
        structures.get(name, damping="exact", sharing="expand").measure(own) for own in (rows, written_out(rows))
    ]
    sparse, dense = (own.mean("input") for own in statistics)
    assert sparse.shape == (1, 5)
    assert_close(sparse, dense if name == "eva" else dense.diagonal().unsqueeze(0), **TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_masked_positions_do_not_count(name):
    rows = dense_rows(1, (), 4, 3)
    mask = torch.tensor([[True, True, False]] * 4)
    kept = Rows(rows.inputs[:, :2], rows.gradients[..., :2, :])
    masked = Rows(rows.inputs, rows.gradients * mask.unsqueeze(-1), mask=mask)
    assert_close(built(name, masked).to_dense(), built(name, kept).to_dense(), **TIGHT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks", [(), (2,)])
def test_the_identity_has_the_shapes_of_what_is_measured(name, blocks):
    structure = structures.get(name, damping="exact", sharing="expand")
    measured = structure.measure(dense_rows(1, blocks))
    identity = structure.identity((*blocks, 2, 3), torch.zeros(1).double())
    assert {n: v.shape for n, v in measured.sums.items()} == {n: v.shape for n, v in identity.sums.items()}
    (gaussian,) = structure.gaussians([BlockSpec("layer", identity, 1.0, DAMPING)])
    dense = gaussian.to_dense()
    assert_close(dense, dense[..., :1, :1] * torch.eye(6).double().expand_as(dense), **TIGHT)


@pytest.mark.parametrize("name", ["eva", "mkor"])
def test_means_refuse_tied_weights(name):
    with pytest.raises(UnsupportedModelError, match=f"structure='{name}' has one mean input.*Untie them"):
        built(name, tied_rows(1))


@pytest.mark.parametrize("name", NAMES)
def test_other_priors_are_refused(name):
    structure = structures.get(name, damping="exact", sharing="expand")
    prior = built("eva", dense_rows(1))
    with pytest.raises(ArgumentError, match=f"structure='{name}' cannot add exactly"):
        structure.gaussians([BlockSpec("layer", structure.measure(dense_rows(1)), 1.0, prior)])


# In training


def network() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))


def trainer(name: str, **options) -> bk.NaturalGradient:
    defaults = {"lr": 0.05, "extrinsic_damping": 1.0, "fisher": "empirical", "generator": rng(0)}
    return bk.NaturalGradient(
        network(), bk.likelihoods.Gaussian(0.5).double(), num_data=40, structure=name, **(defaults | options)
    )


def step(optimizer: bk.NaturalGradient) -> float:
    x = randn(40, 3, seed=1)
    with optimizer.sampled_params():
        optimizer.zero_grad()
        loss = optimizer.likelihood(optimizer.model(x), x[:, :1].sin())
        loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", NAMES)
def test_they_train_and_resume(name):
    optimizer = trainer(name)
    losses = [step(optimizer) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    resumed = trainer(name)
    resumed.model.load_state_dict(optimizer.model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert step(resumed) == step(optimizer)
    assert step(resumed) == step(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_they_refuse_to_be_a_posterior_with_the_reason(name):
    refusal = f"structure='{name}' is a preconditioner and no posterior: "
    with pytest.raises(ArgumentError, match=refusal):
        bk.NoisyNaturalGradient(network(), bk.likelihoods.Gaussian(0.5), num_data=40, structure=name)
    with pytest.raises(ArgumentError, match=refusal):
        bk.Laplace(network(), bk.likelihoods.Gaussian(0.5), structure=name)
    optimizer = trainer(name)
    step(optimizer)
    with pytest.raises(ArgumentError, match=refusal):
        optimizer.posterior()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_they_need_the_gradients_of_the_data(name, fisher):
    with pytest.raises(
        ArgumentError, match=f"fisher='{fisher}' does not go with structure='{name}'. Allowed: 'empirical'"
    ):
        trainer(name, fisher=fisher)
