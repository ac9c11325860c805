"""The prior of a fit: every form that a user can write gives the posterior of its dense formula, or an error."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac import structures
from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures import BlockSpec, MatrixNormalGaussian
from tests.helpers import TIGHT, randn, random_spd
from tests.laplace.oracles import (
    NETS,
    X,
    Y,
    batches,
    dense_priors,
    fishers,
    fit_net,
    fitted,
    gaussian,
    mlp,
    prior_forms,
)
from tests.posteriors import DAMPING_KINDS

FORMS = ["model", "layer", "parameter", "weight"]
#: Where the cold flip-flop ends, see ``structures.damping.TOLERANCE``.
CONVERGED = {"rtol": 2e-5, "atol": 2e-5}


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("structure", "form"),
    [(s, f) for s in ("dense", "diagonal", "kron") for f in FORMS if (s, f) != ("kron", "weight")],
)
@pytest.mark.parametrize("name", NETS)
def test_the_precision_is_the_datas_plus_the_priors(name: str, structure: str, form: str) -> None:
    """``P = N/τ F̄ + P₀`` exactly, for a prior per model, layer, parameter or weight; kron takes all but the last."""
    layers = fit_net(name).layers
    prior = prior_forms(layers)[form]
    laplace = fit_net(name, structure=structure, prior_precision=prior, temperature=0.3)
    data, priors = fishers(laplace), dense_priors(prior, laplace.layers)
    for layer, block in laplace.posterior().blocks.items():
        assert_close(block.to_dense(), 11 / 0.3 * data[layer] + priors[layer], **TIGHT)


@pytest.mark.parametrize(
    "value", [0.7, torch.tensor(0.7), torch.tensor([0.7], dtype=torch.float64), {"0": 0.7, "2": torch.tensor(0.7)}]
)
def test_numbers_and_tensors_of_one_element_are_the_same_prior(value: Any) -> None:
    posterior = fit_net("mlp", prior_precision=value).posterior()
    assert posterior.prior_precision == pytest.approx({"0": 0.7, "2": 0.7}, rel=1e-7)
    for name, block in fit_net("mlp", prior_precision=0.7).posterior().blocks.items():
        assert_close(posterior.blocks[name].to_dense(), block.to_dense(), rtol=1e-6, atol=1e-6)


def test_a_layer_and_the_parameters_of_another_may_be_named_together() -> None:
    prior = {"0.weight": 0.3, "0.bias": torch.full((4,), 0.9), "2": 0.5}
    laplace = fit_net("mlp", structure="dense", prior_precision=prior)
    precision = fishers(laplace)
    blocks = laplace.posterior().blocks
    by_column = torch.tensor([0.3, 0.3, 0.3, 0.9], dtype=torch.float64).repeat(4)
    assert_close(blocks["0"].to_dense(), 11 * precision["0"] + torch.diag(by_column), rtol=1e-6, atol=1e-6)
    assert_close(blocks["2"].to_dense(), 11 * precision["2"] + 0.5 * eye(10), **TIGHT)


def test_without_a_prior_it_is_one() -> None:
    assert fit_net("mlp").posterior().prior_precision == {"0": 1.0, "2": 1.0}


def test_a_prior_is_set_as_a_whole_which_is_where_it_is_checked() -> None:
    laplace = fit_net("mlp")
    with pytest.raises(TypeError, match="does not support item assignment"):
        laplace.prior_precision["0"] = -5.0
    laplace.prior_precision = {**laplace.prior_precision, "0": 5.0}
    assert laplace.posterior().prior_precision == {"0": 5.0, "2": 1.0}


# The three dampings in the coordinates in which the prior is white


def factored(A: Tensor, G: Tensor, scale: float, by_column: Tensor) -> Tensor:
    """``scale (G + √γ/π I) ⊗ R⁻¹ (Rᵀ A R + π√γ I) R⁻ᵀ`` with ``R R = diag(by_column)⁻¹`` and ``γ = 1/scale``."""
    root = torch.diag(by_column.rsqrt())
    white, gamma = root @ A @ root, 1 / scale
    pi = math.sqrt((torch.trace(white) / len(A)) / (torch.trace(G) / len(G)))
    back = torch.linalg.inv(root)
    column = back @ (white + pi * math.sqrt(gamma) * eye(len(A))) @ back
    return scale * torch.kron(G + math.sqrt(gamma) / pi * eye(len(G)), column)


def optimal(A: Tensor, G: Tensor, scale: float, by_column: Tensor) -> Tensor:
    """The matrix normal nearest to ``scale G ⊗ A + I ⊗ diag(by_column)`` in KL(q‖p), by its own fixed point."""
    U, V, prior = eye(len(G)), eye(len(A)), torch.diag(by_column)
    for _ in range(3000):
        U = torch.linalg.inv((scale * torch.trace(A @ V) * G + torch.trace(prior @ V) * eye(len(G))) / len(A))
        V = torch.linalg.inv((scale * torch.trace(G @ U) * A + torch.trace(U) * prior) / len(G))
    return torch.kron(torch.linalg.inv(U), torch.linalg.inv(V))


def exact(A: Tensor, G: Tensor, scale: float, by_column: Tensor) -> Tensor:
    return scale * torch.kron(G, A) + torch.kron(eye(len(G)), torch.diag(by_column))


FORMULAS = {"factored": (factored, TIGHT), "optimal": (optimal, CONVERGED), "exact": (exact, TIGHT)}


def factors(laplace: bk.Laplace, name: str) -> tuple[Tensor, Tensor]:
    assert laplace._fitted is not None
    statistics = laplace._fitted.measurement.statistics[name]
    return statistics.mean("input"), statistics.mean("gradient")


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_a_precision_for_each_column_enters_by_its_damping(damping: str) -> None:
    """Of columns of a weight and its bias, of very different size."""
    by_column = torch.tensor([0.1, 2.0, 30.0, 5.0], dtype=torch.float64)
    prior = {"0.weight": by_column[:3].expand(4, 3), "0.bias": by_column[3], "2": 0.4}
    laplace = fit_net("mlp", damping=damping, prior_precision=prior, temperature=0.5)
    formula, tolerance = FORMULAS[damping]
    block = laplace.posterior().blocks["0"]
    assert_close(block.to_dense(), formula(*factors(laplace, "0"), 22.0, by_column), **tolerance)


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_weight_and_bias_may_have_precisions_of_their_own(damping: str) -> None:
    prior = {"0.weight": 0.2, "0.bias": 7.0, "2.weight": 3.0, "2.bias": 0.5}
    laplace = fit_net("mlp", damping=damping, prior_precision=prior)
    formula, tolerance = FORMULAS[damping]
    for name, size in (("0", 3), ("2", 4)):
        by_column = torch.tensor([prior[f"{name}.weight"]] * size + [prior[f"{name}.bias"]], dtype=torch.float64)
        expected = formula(*factors(laplace, name), 11.0, by_column)
        assert_close(laplace.posterior().blocks[name].to_dense(), expected, **tolerance)


def test_a_refresh_that_starts_at_the_optimum_stays_there() -> None:
    """A previous Gaussian is taken to the coordinates in which the prior is white, column by column."""
    structure = structures.get("kron", damping="optimal", sharing="expand")
    fit = fit_net("mlp")._fitted
    assert fit is not None
    by_column = torch.tensor([[1e-2, 3.0, 500.0, 5.0]], dtype=torch.float64)
    prior = MatrixNormalGaussian(
        torch.linalg.cholesky(random_spd(4, seed=1)), torch.linalg.cholesky(random_spd(4, seed=2))
    )
    for own in (by_column, prior):
        spec = BlockSpec("0", fit.measurement.statistics["0"], 11.0, own)
        (cold,) = structure.gaussians([spec])
        (warm,) = structure.gaussians([replace(spec, previous=cold)])
        assert_close(warm.to_dense(), cold.to_dense(), **CONVERGED)


@pytest.mark.parametrize("prior_precision", [1e-3, 1.0, 1e3])
def test_one_number_is_the_published_damping(prior_precision: float) -> None:
    """``(G + √γ/π I) ⊗ (A + π√γ I)`` with ``γ = τδ/N`` and no whitening, to rounding."""
    laplace = fit_net("mlp", damping="factored", prior_precision=prior_precision, temperature=2.0)
    for name, block in laplace.posterior().blocks.items():
        A, G = factors(laplace, name)
        gamma = 2.0 * prior_precision / 11
        pi = math.sqrt((torch.trace(A) / len(A)) / (torch.trace(G) / len(G)))
        left = G + math.sqrt(gamma) / pi * eye(len(G))
        product = 11 / 2.0 * torch.kron(left, A + pi * math.sqrt(gamma) * eye(len(A)))
        assert_close(block.to_dense(), product, rtol=1e-12, atol=1e-12 * float(product.abs().max()))


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_stacked_blocks_have_priors_of_their_own(damping: str) -> None:
    """Each group of a convolution is a block, with a precision for each of its columns."""
    weight = randn(1, 1, 2, 2, seed=3).exp()
    by_group = torch.cat([weight.expand(2, 1, 2, 2), 9 * weight.expand(2, 1, 2, 2)])
    prior = {"0": 0.3, "2.weight": by_group, "2.bias": torch.tensor([0.5, 0.5, 4.0, 4.0]).double(), "5": 1.0}
    laplace = fit_net("cnn", damping=damping, prior_precision=prior)
    formula, tolerance = FORMULAS[damping]
    A, G = factors(laplace, "2")
    for group, block in enumerate(laplace.posterior().blocks["2"].to_dense()):
        by_column = torch.cat([by_group[2 * group].flatten(), prior["2.bias"][2 * group, None]])
        assert_close(block, formula(A[group], G[group], 11.0, by_column), **tolerance)


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_each_word_may_have_a_precision(damping: str) -> None:
    """The columns of an embedding's block are its words, and its input factor stays diagonal."""
    words = torch.linspace(0.1, 5, 6, dtype=torch.float64)
    laplace = fit_net(
        "words", damping=damping, prior_precision={"embed.weight": words[:, None].expand(6, 3), "head": 1}
    )
    A, G = factors(laplace, "embed")
    assert A.shape == (1, 6)
    formula, tolerance = FORMULAS[damping]
    block = laplace.posterior().blocks["embed"]
    assert_close(block.to_dense(), formula(torch.diag(A[0]), G, 11.0, words), **tolerance)


@pytest.mark.parametrize("damping", DAMPING_KINDS)
def test_kron_refuses_what_is_no_product_and_says_what_takes_it(damping: str) -> None:
    """Precisions that differ along the output side; ``structure="diagonal"`` and ``"dense"`` have room for them."""
    values = torch.ones(4, 3, dtype=torch.float64)
    values[2, 1] = 1.5
    prior = {"0.weight": values, "0.bias": 1.0, "2": 1.0}
    laplace = fit_net("mlp", damping=damping, prior_precision=prior)
    for compute in (laplace.posterior, laplace.log_marginal_likelihood):
        with pytest.raises(ArgumentError, match=r"layer '0'.*structure='kron' cannot.*structure='diagonal'"):
            compute()
    with pytest.raises(ArgumentError, match="structure='kron'"):
        fit_net("mlp").log_marginal_likelihood(prior)
    fit_net("mlp", structure="diagonal", prior_precision=prior).posterior()


# Parameters that are blocks by themselves


@pytest.mark.parametrize("structure", ["dense", "diagonal", "kron"])
def test_a_parameter_that_is_its_own_layer_may_have_a_precision_for_each_weight(structure: str) -> None:
    """Its layer has the parameter's name, and the form is the parameter's."""
    values = torch.tensor([0.1, 1.0, 8.0], dtype=torch.float64)
    laplace = fit_net("twice", structure=structure, prior_precision={"shift": values, "layer": 1.0, "head": 1.0})
    block = laplace.posterior().blocks["shift"]
    expected = 11 * fishers(laplace)["shift"] + torch.diag_embed(values.reshape(*block.shape).flatten(-2))
    assert_close(block.to_dense(), expected, **TIGHT)


@pytest.mark.parametrize("per", ["model", "layer", "parameter"])
@pytest.mark.parametrize("name", NETS)
def test_a_tuned_prior_may_be_given_back(name: str, per: str) -> None:
    """As it is read: to the evidence, to another fit, and from its posterior."""
    laplace = fit_net(name, structure="diagonal").optimize_prior_precision(per=per)
    evidence = laplace.log_marginal_likelihood()
    assert torch.equal(laplace.log_marginal_likelihood(laplace.prior_precision), evidence)
    for prior in (laplace.prior_precision, laplace.posterior().prior_precision):
        assert_close(fit_net(name, structure="diagonal", prior_precision=prior).log_marginal_likelihood(), evidence)


# Wrong priors


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        (0.0, r"prior_precision=0\.0 is out of range.*> 0"),
        (-1, r"prior_precision=-1 is out of range.*> 0"),
        (math.nan, r"prior_precision=nan is out of range"),
        (math.inf, r"prior_precision=inf is out of range"),
        ("big", r"prior_precision='big' is not a number.*> 0"),
        ([1.0, 2.0], r"prior_precision has shape \(2,\).*one number"),
        (torch.ones(2, 2), r"prior_precision has shape \(2, 2\).*one number"),
        ({}, r"leaves out \['0\.weight', '0\.bias'\] of layer '0'.*Name the layer, or all"),
        ({"0": 1.0}, r"leaves out \['2\.weight', '2\.bias'\] of layer '2'"),
        ({"0": 1.0, "2.weight": 1.0}, r"leaves out \['2\.bias'\] of layer '2'"),
        ({"0": 1.0, "2": 1.0, "0.bias": 1.0}, r"names the layer '0' and \['0\.bias'\] in it.*Name one"),
        ({"0": 1.0, "2": 1.0, "3": 1.0}, r"names \['3'\].*Allowed: the layers 0, 2, and the parameters 0\.weight"),
        ({"0": 1.0, "2": -1.0}, r"prior_precision\['2'\]=-1\.0 is out of range"),
        (
            {"0": torch.ones(4), "2": 1.0},
            r"prior_precision\['0'\] has shape \(4,\).*a number, or a tensor of shape \(4, 4\)",
        ),
        (
            {"0.weight": torch.ones(3, 4), "0.bias": 1.0, "2": 1.0},
            r"prior_precision\['0\.weight'\] has shape \(3, 4\).*\(4, 3\)",
        ),
        (
            {"0.weight": torch.zeros(4, 3), "0.bias": 1.0, "2": 1.0},
            r"prior_precision\['0\.weight'\] holds elements that are out of range",
        ),
    ],
)
def test_wrong_priors_are_named_with_what_is_allowed(prior: Any, match: str) -> None:
    """By the constructor, before any data, and by the evidence of another prior alike."""
    with pytest.raises(ArgumentError, match=match):
        bk.Laplace(mlp(), gaussian(), prior_precision=prior)
    with pytest.raises(ArgumentError, match=match):
        fit_net("mlp").log_marginal_likelihood(prior)


def test_layers_outside_of_the_subset_have_no_prior() -> None:
    with pytest.raises(ArgumentError, match=r"names \['0'\].*Allowed: the layers 2,"):
        bk.Laplace(mlp(), gaussian(), subset="last_layer", prior_precision={"0": 1.0, "2": 1.0})
    bk.Laplace(mlp(), gaussian(), subset="last_layer", prior_precision={"2": 1.0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_prior_is_not_rounded_to_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    """0.3 in bfloat16 is 0.3008: statistics are in float32, and so are precisions."""
    model = mlp().to(dtype)
    laplace = fitted(
        model,
        bk.likelihoods.Gaussian(0.5),
        batches(X.to(dtype), Y.to(dtype)),
        prior_precision={"0.weight": 0.3, "0.bias": 0.3, "2": 0.3},
    )
    posterior = laplace.posterior()
    assert posterior.prior_precision["2"] == pytest.approx(0.3, rel=1e-6)
    by_weight = posterior.prior_precision["0"]
    assert isinstance(by_weight, Tensor)
    assert_close(by_weight.float(), torch.full((4, 4), 0.3), rtol=1e-6, atol=0)
    exact = sum(float(p.detach().double().square().sum()) for p in model.parameters())
    unit = laplace.log_marginal_likelihood(1e9) - laplace.log_marginal_likelihood(2e9)
    assert float(unit) == pytest.approx(0.5e9 * exact, rel=1e-6), "the prior's density is that of the weights"


def test_a_prior_of_another_dtype_or_with_a_graph_is_a_constant_of_the_posterior() -> None:
    prior = torch.tensor(0.7, requires_grad=True)
    laplace = fit_net("mlp", prior_precision={"0": prior, "2.weight": prior.expand(2, 4), "2.bias": prior})
    posterior = laplace.posterior()
    assert isinstance(posterior.prior_precision["0"], float)
    for block in posterior.blocks.values():
        assert not any(value.requires_grad for value in block.state.values())
    assert not posterior.prior_precision["2"].requires_grad  # type: ignore[union-attr]
    assert isinstance(laplace.model, nn.Module)
