"""Joint predictions of several inputs: covariances between examples, and functions drawn from the affine model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from bayes_kfac import Posterior
from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Categorical, Gaussian
from bayes_kfac.prediction import Draws, LinearizedModel
from tests.helpers import randn, rng, seeded
from tests.posteriors import (
    FAMILIES,
    dense_function_covariance,
    dense_function_samples,
    dense_mean,
    random_posterior,
)
from tests.prediction.models import MODELS, posterior_of

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
with_structures = pytest.mark.parametrize(
    ("structure", "damping"), FAMILIES, ids=["-".join(names) for names in FAMILIES]
)


def two_others(inputs: Any) -> Any:
    """Two other examples: mixtures of the first ones, or of words others of them."""

    def other(leaf: Tensor) -> Tensor:
        if leaf.ndim == 0:
            return leaf
        return leaf[:2] * 0.5 - leaf[1:3] if leaf.is_floating_point() else (leaf[1:3] + 1) % 6

    return tree_map_only(Tensor, other, inputs)


# Covariances


@with_structures
@pytest.mark.parametrize("name", MODELS)
def test_between_two_sets_of_inputs(name, structure, damping):
    """``[n, m, c, d]`` is output ``c`` of example ``n`` with output ``d`` of example ``m``, and not the other way."""
    posterior, inputs = posterior_of(MODELS[name], structure=structure, damping=damping)
    others = two_others(inputs)
    expected = dense_function_covariance(posterior, inputs, others)
    found = posterior.function_covariance(inputs, others)
    assert found.shape == (5, 2, *expected.shape[2:])
    assert_close(found, expected, **CLOSE)
    assert_close(posterior.function_covariance(others, inputs), expected.transpose(0, 1).mT, **CLOSE)


@with_structures
@pytest.mark.parametrize("name", MODELS)
def test_within_one_set_of_inputs(name, structure, damping):
    """Symmetric, without a negative eigenvalue, and on its diagonal what ``predict`` has of each example."""
    posterior, inputs = posterior_of(MODELS[name], structure=structure, damping=damping)
    joint = posterior.function_covariance(inputs)
    matrix = joint.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    assert_close(matrix, matrix.mT, **CLOSE)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-9 * torch.linalg.eigvalsh(matrix).max()
    assert_close(joint, dense_function_covariance(posterior, inputs, inputs), **CLOSE)
    within = joint.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    assert_close(within, posterior.predict(inputs).epistemic_covariance, **CLOSE)
    assert_close(posterior.function_covariance(inputs, inputs), joint, rtol=0, atol=0)
    copied = tree_map_only(Tensor, torch.clone, inputs)
    assert_close(posterior.function_covariance(inputs, copied), joint, **CLOSE)


def test_noise_of_the_targets_is_not_in_it():
    model = seeded(nn.Linear(3, 2))
    x = randn(4, 3, seed=1)
    quiet, noisy = (random_posterior(model, Gaussian(scale)).function_covariance(x) for scale in (0.1, 5.0))
    assert torch.equal(quiet, noisy)


def test_of_logits_it_is_that_of_the_linearised_output():
    posterior = random_posterior(seeded(nn.Linear(3, 2)), Categorical())
    x = randn(4, 3, seed=1)
    assert_close(posterior.function_covariance(x), dense_function_covariance(posterior, x, x), **CLOSE)


def test_an_affine_model_has_its_weights_covariance():
    """``cov(x W, x' W) = x̃ᵀ V x̃' · U`` of a matrix normal, in school formulas."""
    posterior = random_posterior(seeded(nn.Linear(3, 2)), Gaussian(0.5))
    (block,) = posterior.blocks.values()
    U, V = block.scale_tril_row @ block.scale_tril_row.mT, block.scale_tril_column @ block.scale_tril_column.mT
    x, y = (torch.cat([randn(n, 3, seed=n), torch.ones(n, 1).double()], dim=1) for n in (4, 2))
    expected = (x @ V @ y.mT)[:, :, None, None] * U
    assert_close(posterior.function_covariance(x[:, :3], y[:, :3]), expected, **CLOSE)


# Functions


@with_structures
@pytest.mark.parametrize("name", MODELS)
def test_functions_are_the_affine_models_under_the_draws(name, structure, damping):
    """``f(x) + J(x) (w − M)`` for each draw, with torch.func's Jacobians by the parameters themselves."""
    posterior, inputs = posterior_of(MODELS[name], structure=structure, damping=damping)
    draws = posterior.sample(4, generator=rng(0))
    functions = posterior.function_samples(inputs, draws=draws)
    expected = dense_function_samples(posterior, inputs, draws)
    assert_close(functions, expected, **CLOSE)
    assert (expected.std(0) > 1e-3).any()
    assert_close(posterior.predict(inputs, "linearized", draws=draws).outputs, expected, **CLOSE)


def test_a_step_in_one_direction_is_one_column_of_the_jacobian():
    """Draws that are set by hand, from one weight at a time: nothing is scaled or left out."""
    posterior, inputs = posterior_of(MODELS["mlp"])
    values = {name: posterior.mean[name].expand(2, *posterior.mean[name].shape).clone() for name in posterior.mean}
    values["2.weight"][1, 3, 2] += 0.5
    values["4.bias"][1, 1] -= 0.25
    functions = posterior.function_samples(inputs, draws=Draws(values))
    assert_close(functions[0], dense_mean(posterior, inputs), rtol=0, atol=1e-14)
    assert_close(functions, dense_function_samples(posterior, inputs, Draws(values)), **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "transformer", "recurrent", "dict"])
def test_a_function_is_the_same_at_every_call(name):
    """At all inputs, at some of them, and at others beside them; example by example too."""
    posterior, inputs = posterior_of(MODELS[name])
    draws = posterior.sample(6, generator=rng(0))
    whole = posterior.function_samples(inputs, draws=draws)
    some = tree_map_only(Tensor, lambda leaf: leaf[1:3] if leaf.ndim else leaf, inputs)
    assert_close(posterior.function_samples(some, draws=draws), whole[:, 1:3], **CLOSE)
    assert_close(posterior.function_samples(inputs, draws=draws, memory_budget=1), whole, **CLOSE)
    assert torch.equal(posterior.function_samples(inputs, draws=draws), whole)


@with_structures
def test_their_covariance_over_examples_is_the_function_covariance(structure, damping):
    """Empirical moments of forty thousand functions, within five standard errors of each element."""
    posterior, inputs = posterior_of(MODELS["mlp"], structure=structure, damping=damping)
    count = 40_000
    functions = posterior.function_samples(inputs[:3], count, generator=rng(0)).flatten(1)
    expected = posterior.function_covariance(inputs[:3]).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    mean = dense_mean(posterior, inputs[:3]).flatten()
    variances = expected.diagonal()
    assert bool(((functions.mean(0) - mean).abs() < 5 * (variances / count).sqrt()).all())
    away = functions - mean
    errors = ((torch.outer(variances, variances) + expected.square()) / count).sqrt()
    assert bool(((away.mT @ away / count - expected).abs() < 5 * errors).all())
    # examples are not drawn apart: the bound could tell
    apart = expected - torch.block_diag(*(expected[i : i + 2, i : i + 2] for i in (0, 2, 4)))
    assert (apart.abs() > 10 * errors).any()


def test_draws_are_made_of_the_generator():
    posterior, inputs = posterior_of(MODELS["mlp"])
    one, same = (posterior.function_samples(inputs, 5, generator=rng(3)) for _ in range(2))
    assert one.shape == (5, 5, 2)
    assert torch.equal(one, same)
    assert torch.equal(one, posterior.function_samples(inputs, draws=posterior.sample(5, generator=rng(3))))
    assert not torch.equal(one, posterior.function_samples(inputs, 5, generator=rng(4)))
    assert len(posterior.function_samples(inputs)) == 64


@pytest.mark.parametrize("num_samples", [0, -1, 2.5, True])
def test_the_number_of_functions_is_checked(num_samples):
    posterior, inputs = posterior_of(MODELS["mlp"])
    with pytest.raises(ArgumentError, match=r"num_samples=.*integer >= 1"):
        posterior.function_samples(inputs, num_samples)


def test_draws_of_some_layers_leave_the_others_at_their_mean():
    """A posterior over some layers: constants have no covariance and do not move."""
    whole, inputs = posterior_of(MODELS["mlp"])
    part = Posterior(
        whole.model,
        Gaussian(0.5),
        {"2": whole.blocks["2"]},
        prior_precision={"2": 1.3},
        provenance=whole.provenance,
    )
    draws = part.sample(4, generator=rng(0))
    assert set(draws.values) == {"2.weight"}
    assert_close(part.function_samples(inputs, draws=draws), dense_function_samples(part, inputs, draws), **CLOSE)
    assert_close(part.function_covariance(inputs), dense_function_covariance(part, inputs, inputs), **CLOSE)
    with pytest.raises(ArgumentError, match=r"another posterior(.|\n)*0\.weight: draws .*, posterior None"):
        part.function_samples(inputs, draws=whole.sample(4, generator=rng(0)))


def test_a_prediction_of_affine_draws_says_what_it_is():
    posterior, inputs = posterior_of(MODELS["mlp"])
    draws = posterior.sample(6, generator=rng(0))
    prediction = posterior.predict(inputs, "linearized", draws=draws)
    assert (prediction.source.method, prediction.source.num_samples) == ("linearized", 6)
    assert_close(prediction.outputs, posterior.function_samples(inputs, draws=draws), rtol=0, atol=0)
    sampled = posterior.predict(inputs, draws=draws)
    assert not torch.allclose(prediction.outputs, sampled.outputs, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "with_draws"), [("sampling", False), ("sampling", True), ("linearized", True), (None, True)]
)
def test_a_link_is_for_the_closed_form_only(method, with_draws):
    posterior = random_posterior(seeded(nn.Linear(3, 2)), Categorical())
    draws = posterior.sample(2) if with_draws else None
    with pytest.raises(ArgumentError, match=r"link='probit' is for method='linearized' without draws"):
        posterior.predict(randn(4, 3, seed=1), method, link="probit", draws=draws)


@pytest.mark.parametrize("kind", ["Full", "", None, 3])
def test_the_kind_of_output_covariance_is_checked(kind):
    posterior, inputs = posterior_of(MODELS["mlp"])
    with pytest.raises(ArgumentError, match=r"output_covariance=.* is unknown. Allowed: 'full', 'diagonal'"):
        posterior.predict(inputs, output_covariance=kind)


# Features: covariances of which not all pairs are wanted


@with_structures
@pytest.mark.parametrize("name", ["mlp", "cnn", "recurrent"])
def test_features_have_the_covariances_within_groups(name, structure, damping):
    """Of some outputs with all outputs, between groups of two and of one example."""
    posterior, inputs = posterior_of(MODELS[name], structure=structure, damping=damping)
    linearized = LinearizedModel(posterior.model, posterior.mean, posterior.layers, posterior.blocks)
    mine, theirs = linearized.features(inputs[:4], outputs=[1]), linearized.features(inputs[3:])
    assert_close(mine.mean, dense_mean(posterior, inputs[:4])[:, [1]], **CLOSE)
    expected = dense_function_covariance(posterior, inputs[:4], inputs[3:])[:, :, [1]]
    assert_close(mine.covariance(theirs), expected.unsqueeze(0), **CLOSE)
    within = mine.covariance(theirs, groups=2)
    assert_close(within, torch.stack([expected[:2, :1], expected[2:, 1:]]), **CLOSE)


def test_features_of_one_number_for_each_example():
    """Outputs ``[batch]`` are those of one output, ``[batch, 1]``."""
    net, inputs = seeded(nn.Linear(3, 1)), randn(4, 3, seed=1)
    flat, expected = (
        random_posterior(nn.Sequential(net, *last), Gaussian(0.5)).linearized.features(inputs)
        for last in ([nn.Flatten(0)], [])
    )
    assert flat.mean.shape == (4, 1)
    assert_close(flat.mean, expected.mean, **CLOSE)
    assert_close(flat.covariance(flat), expected.covariance(expected), **CLOSE)
