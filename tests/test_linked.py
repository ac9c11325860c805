"""Posteriors whose layers are linked, from data to predictions: each number is that of the dense joint Gaussian."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError
from bayes_kfac.prediction import Draws
from bayes_kfac.training.tuning import tune_prior_precision
from tests.helpers import in_block, randn, rng, seeded
from tests.joints import as_vector, dense_covariance
from tests.posteriors import dense_derivatives, dense_function_samples, dense_mean

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SIZE = 40


def mlp() -> nn.Module:
    """A chain of three, with a normalisation in between that has a structure of its own."""
    return seeded(
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    )


def plain() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))


@cache
def data() -> tuple[Tensor, Tensor]:
    x = randn(SIZE, 3, seed=1)
    return x, torch.stack([x.sum(1).sin(), x[:, 0] - x[:, 1]], dim=1)


def fitted(model: nn.Module | None = None, **options: Any) -> bk.Laplace:
    laplace = bk.Laplace(
        model or plain(), bk.likelihoods.Gaussian(0.5), structure="tridiagonal", **{"prior_precision": 1.3, **options}
    )
    return laplace.fit(DataLoader(TensorDataset(*data()), batch_size=16), progress=False)


@cache
def posterior() -> bk.Posterior:
    made = fitted().posterior()
    assert set(made.blocks.links) == {"0", "2"}
    return made


def jacobian(of: bk.Posterior, x: Tensor) -> Tensor:
    """By torch.func, ``[batch, outputs, weights]``."""
    derivatives = dense_derivatives(of, x)
    return as_vector({name: in_block(layer, derivatives) for name, layer in of.layers.items()})


def away(of: bk.Posterior) -> Tensor:
    named = dict(of.model.named_parameters())
    return as_vector(
        {name: layer.matrix({k: named[k] - of.mean[k] for k in layer.parameters}) for name, layer in of.layers.items()}
    )


# The posterior


def test_linearised_predictions_are_those_of_the_dense_joint():
    own, x, others = posterior(), randn(5, 3, seed=7), randn(4, 3, seed=8)
    J, K, covariance = jacobian(own, x), jacobian(own, others), dense_covariance(own.blocks)
    output = own.output(x)
    assert_close(output.mean, dense_mean(own, x), **CLOSE)
    assert_close(output.covariance, J @ covariance @ J.mT, **CLOSE)
    diagonal = own.output(x, output_covariance="diagonal").variance
    assert_close(diagonal, (J @ covariance @ J.mT).diagonal(dim1=-2, dim2=-1), **CLOSE)
    expected = torch.einsum("nci,ij,mdj->nmcd", J, covariance, K)
    assert_close(own.function_covariance(x, others), expected, **CLOSE)
    tiny = own.function_covariance(x, others, memory_budget=1)
    assert_close(tiny, expected, **CLOSE)


def test_links_change_predictions():
    own, x = posterior(), randn(5, 3, seed=7)
    alone = own.nearest_matrix_normal()
    assert not alone.blocks.links
    ratio = (
        own.output(x, output_covariance="diagonal").variance / alone.output(x, output_covariance="diagonal").variance
    )
    assert bool(((ratio - 1).abs() > 0.05).any())


def test_draws_are_of_the_joint():
    """The same linear map of the same noise, and functions drawn are those of the draws."""
    own, x = posterior(), randn(5, 3, seed=7)
    draws = own.sample(6, generator=rng(0))
    noise = own.blocks.sample(own.blocks.standard_normal(rng(0), (6,)))
    changes = {
        name: torch.vmap(layer.matrix)({key: draws.values[key] - own.mean[key] for key in layer.parameters})
        for name, layer in own.layers.items()
    }
    assert_close(as_vector(changes), as_vector(noise), **CLOSE)
    assert_close(own.function_samples(x, draws=draws), dense_function_samples(own, x, draws), **CLOSE)
    assert_close(own.predict(x, draws=draws).mean, own.predict(x, "sampling", draws=draws).mean)


def test_draws_have_the_joint_covariance():
    """Many of them, as a check on the noise."""
    own, count = posterior(), 40_000
    draws = own.sample(count, generator=rng(1))
    assert isinstance(draws, Draws)
    change = as_vector(
        {
            name: torch.vmap(layer.matrix)({key: draws.values[key] - own.mean[key] for key in layer.parameters})
            for name, layer in own.layers.items()
        }
    )
    covariance = dense_covariance(own.blocks)
    spread = covariance.diagonal().sqrt()
    error = (change.mT @ change / count - covariance) / (spread[:, None] * spread)
    assert error.abs().max() < 5 * 2**0.5 / count**0.5


def test_kl_and_penalty_are_those_of_the_dense_joint():
    own = posterior()
    mean, covariance = (
        as_vector({n: layer.matrix(own.mean) for n, layer in own.layers.items()}),
        dense_covariance(own.blocks),
    )
    q = torch.distributions.MultivariateNormal(mean, covariance)
    p = torch.distributions.MultivariateNormal(torch.zeros_like(mean), torch.eye(len(mean)).double() / 1.3)
    assert_close(own.kl(), torch.distributions.kl_divergence(q, p), **CLOSE)
    moved = copy.deepcopy(own)
    with torch.no_grad():
        for parameter in moved.model.parameters():
            parameter.add_(0.1 * randn(*parameter.shape, seed=parameter.numel()))
    change = away(moved).detach()
    expected = 0.5 * change @ torch.linalg.solve(covariance, change)
    assert_close(moved.penalty(), expected, **CLOSE)
    assert torch.autograd.grad(moved.penalty(), list(moved.model.parameters()))[0].any()


def test_a_posterior_comes_back_from_its_file(tmp_path: Path):
    own, x = fitted(mlp()).posterior(), randn(5, 3, seed=7)
    own.save(tmp_path / "p.safetensors")
    again = bk.Posterior.load(tmp_path / "p.safetensors", mlp())
    assert {name: link.to for name, link in again.blocks.links.items()} == {"0": "3", "3": "5"}
    assert torch.equal(own.output(x).covariance, again.output(x).covariance)
    assert torch.equal(own.kl(), again.kl())
    draws, others = (p.sample(2, generator=rng(0)).values for p in (own, again))
    assert all(torch.equal(draws[name], others[name]) for name in draws)


def test_it_moves_as_a_whole():
    x = randn(5, 3, seed=7)
    own = fitted().posterior()
    expected = own.output(x).covariance
    moved = own.to(torch.float32)
    assert {link.row.dtype for link in moved.blocks.links.values()} == {torch.float32}
    assert_close(moved.output(x.float()).covariance.double(), expected, rtol=1e-3, atol=1e-5)


def test_a_linked_layer_by_itself_is_no_matrix_normal():
    """Neither the conditional block of the first nor, though it is one by itself, that of the last."""
    for name in posterior().blocks:
        with pytest.raises(ArgumentError, match="is linked to another"):
            posterior().distribution(name)
        nearest = posterior().nearest_matrix_normal().distribution(name)
        assert nearest.event_shape == posterior().blocks[name].shape


def test_summaries_say_what_is_linked():
    laplace = fitted(mlp())
    for summary in (laplace.summary(), laplace.posterior().summary()):
        lines = {row.block: row.structure for row in summary.rows}
        assert lines["0"].startswith("tridiagonal/factored → 3 ")
        assert lines["3"].startswith("tridiagonal/factored → 5 ")
        assert lines["5"].startswith("tridiagonal/factored 2×4")
    assert "→" not in str(laplace.posterior().nearest_matrix_normal().summary())


# Laplace


def test_the_evidence_has_the_joint_log_determinant():
    """Up to the prior's part of the diagonal blocks, which is exact."""
    laplace, plainly = fitted(), bk.Laplace(plain(), bk.likelihoods.Gaussian(0.5), prior_precision=1.3)
    plainly.fit(DataLoader(TensorDataset(*data()), batch_size=16), progress=False)
    blocks = laplace.posterior().blocks
    correlation = blocks.logdet() - blocks.as_prior().logdet()
    assert correlation < 0
    difference = laplace.log_marginal_likelihood() - plainly.log_marginal_likelihood()
    assert_close(difference, -0.5 * correlation, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("per", ["model", "layer", "parameter"])
def test_tuning_improves_the_evidence(per):
    laplace = fitted()
    before = laplace.log_marginal_likelihood()
    laplace.optimize_prior_precision(per=per, noise=True, progress=False)
    assert laplace.log_marginal_likelihood() > before
    assert torch.isfinite(laplace.posterior().kl())


def test_the_evidence_is_differentiable():
    laplace = fitted()
    prior, temperature, noise = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.3, 0.9, 0.5))

    def evidence(prior: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
        return laplace.log_marginal_likelihood(prior, temperature=temperature, noise_scale=noise)

    assert torch.autograd.gradcheck(evidence, (prior, temperature, noise))


def test_a_linked_posterior_is_no_prior_but_its_nearest_is():
    own = fitted().posterior()
    with pytest.raises(ArgumentError, match="prior= links layers"):
        bk.Laplace(plain(), bk.likelihoods.Gaussian(0.5), structure="tridiagonal", prior=own)
    later = fitted(prior=own.nearest_matrix_normal(), prior_precision=None)
    assert set(later.posterior().blocks.links) == {"0", "2"}
    assert torch.isfinite(later.log_marginal_likelihood())


def test_a_fit_goes_on_with_more_data():
    x, y = data()
    parts = fitted().update([(x[:10], y[:10])], progress=False)
    whole = bk.Laplace(plain(), bk.likelihoods.Gaussian(0.5), structure="tridiagonal", prior_precision=1.3)
    whole.fit([(torch.cat([x, x[:10]]), torch.cat([y, y[:10]]))], progress=False)
    expected = dense_covariance(whole.posterior().blocks)
    assert_close(dense_covariance(parts.posterior().blocks), expected, **CLOSE)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_every_fisher_links_layers(fisher):
    blocks = fitted(fisher=fisher, generator=rng(0)).posterior().blocks
    assert all(link.kept == 1 for link in blocks.links.values())
    assert bool((torch.linalg.eigvalsh(dense_covariance(blocks)) > 0).all())


# Training


def trainer(model: nn.Module, **options: Any) -> bk.NoisyNaturalGradient:
    return bk.NoisyNaturalGradient(
        model,
        bk.likelihoods.Gaussian(0.5),
        num_data=SIZE,
        generator=rng(0),
        structure="tridiagonal",
        **{"lr": 0.02, "statistics_every": 2, "inverse_every": 3, "fisher": "exact", **options},
    )


def train(optimizer: bk.NoisyNaturalGradient, steps: int, *, parts: int = 1) -> None:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        for inputs, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with optimizer.sampled_params():
                (optimizer.likelihood(optimizer.model(inputs), target) / parts).backward()
        optimizer.step()


def test_training_draws_from_the_joint():
    """The noise of a step, and its divergence from the prior."""
    optimizer = trainer(plain())
    train(optimizer, 8)
    gaussian = optimizer.blocks.posterior
    assert set(gaussian.links) == {"0", "2"}
    before = {name: layer.values() for name, layer in optimizer.layers.items()}
    expected = gaussian.sample(gaussian.standard_normal(copy.deepcopy(optimizer).generator))
    with optimizer.sampled_params():
        noise = {name: layer.values() - before[name] for name, layer in optimizer.layers.items()}
    assert_close(as_vector(noise), as_vector(expected), **CLOSE)
    assert_close(optimizer.kl(), gaussian.kl(before, dict.fromkeys(before, 1.0)), **CLOSE)


@pytest.mark.parametrize("extrinsic_damping", [0.0, 0.1])
def test_steps_are_preconditioned_by_the_joint(extrinsic_damping):
    """One step without momentum or noise to speak of: ``(F̄ + γ I)⁻¹ (∇ + γ_in W)`` with the dense joint."""
    options = {"momentum": 0.0, "kl_clip": None, "statistics_every": 1, "inverse_every": 1}
    optimizer = trainer(plain(), extrinsic_damping=extrinsic_damping, **options)
    train(optimizer, 3)
    before = {name: layer.values() for name, layer in optimizer.layers.items()}
    x, y = data()
    with optimizer.sampled_params():
        optimizer.zero_grad()
        optimizer.likelihood(optimizer.model(x), y).backward()
        at = {name: layer.values() for name, layer in optimizer.layers.items()}
    gradient = as_vector({n: layer.gradient() for n, layer in optimizer.layers.items()}) + as_vector(at) / SIZE
    optimizer.step()
    states = optimizer.blocks
    assert bool(states.preconditioner_links) == (extrinsic_damping > 0)
    covariance = (
        dense_covariance(states.preconditioner) if extrinsic_damping else SIZE * dense_covariance(states.posterior)
    )
    moved = as_vector({name: layer.values() for name, layer in optimizer.layers.items()}) - as_vector(before)
    assert_close(moved, -0.02 * covariance @ gradient, **CLOSE)


def test_training_goes_on_bit_for_bit_from_a_checkpoint(tmp_path: Path):
    """In between two refreshes, where links cannot be made again from the statistics."""
    optimizer = trainer(mlp(), extrinsic_damping=0.01)
    train(optimizer, 5)
    torch.save({"model": optimizer.model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    resumed = trainer(mlp(), extrinsic_damping=0.01)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for own in (optimizer, resumed):
        train(own, 4)
    assert set(resumed.blocks.links) == {"0", "3"}
    for name, value in optimizer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_checkpoints_of_before_there_were_links_are_read():
    optimizer = trainer(plain())
    train(optimizer, 2)
    old = optimizer.state_dict()
    del old["bayes_kfac"]["links"]
    resumed = trainer(plain())
    resumed.load_state_dict(old)
    assert not resumed.blocks.links
    train(resumed, 2)
    assert resumed.blocks.links


def test_micro_batches_are_the_batch():
    whole, halves = trainer(plain(), statistics_every=1), trainer(plain(), statistics_every=1)
    for own, parts in ((whole, 1), (halves, 2)):
        with torch.random.fork_rng():
            own.generator.manual_seed(0)
            x, y = data()
            own.zero_grad()
            gaussian = own.sampled_params()
            with gaussian:
                for inputs, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    (own.likelihood(own.model(inputs), target) / parts).backward()
            own.step()
    expected = dense_covariance(whole.posterior().blocks)
    assert_close(dense_covariance(halves.posterior().blocks), expected, **CLOSE)


def test_layers_may_go_and_come_back():
    """A chain closes over a frozen layer, with statistics from then on, and opens again."""
    model = plain()
    optimizer = trainer(model)
    train(optimizer, 4)
    model[2].requires_grad_(False)
    with optimizer.sampled_params():
        assert not optimizer.blocks.links  # what is left of the chain, until the next refresh
    optimizer.zero_grad()
    train(optimizer, 5)
    assert {name: link.to for name, link in optimizer.posterior().blocks.links.items()} == {"0": "4"}
    model[2].requires_grad_(True)
    train(optimizer, 6)
    posterior = optimizer.posterior()
    assert {name: link.to for name, link in posterior.blocks.links.items()} == {"0": "2", "2": "4"}
    assert bool((torch.linalg.eigvalsh(dense_covariance(posterior.blocks)) > 0).all())
    assert torch.isfinite(optimizer.kl())


def test_groups_may_differ():
    """In prior, damping and decay: the Gaussian stays one, and says how much of a correlation it has."""
    model = plain()
    groups = [
        {"params": model[2].parameters(), "prior_precision": 5.0, "extrinsic_damping": 0.1, "statistics_decay": 0.5}
    ]
    optimizer = trainer(model, groups=groups)
    train(optimizer, 8)
    blocks = optimizer.posterior().blocks
    assert set(blocks.links) == {"0", "2"}
    assert all(0 < link.kept <= 1 for link in blocks.links.values())
    assert bool((torch.linalg.eigvalsh(dense_covariance(blocks)) > 0).all())
    assert torch.isfinite(optimizer.kl())


def test_a_laplace_of_a_trainer_has_its_posterior():
    optimizer = trainer(plain())
    train(optimizer, 6)
    laplace = bk.Laplace.from_trainer(optimizer, [data()], progress=False)
    expected = dense_covariance(optimizer.posterior().blocks)
    assert_close(dense_covariance(laplace.posterior().blocks), expected, **CLOSE)
    assert torch.isfinite(laplace.log_marginal_likelihood())


def test_tuning_while_training():
    model = plain()
    x, y = data()
    posterior = bk.fit(
        model,
        bk.likelihoods.Gaussian(0.5),
        DataLoader(TensorDataset(x, y), batch_size=20),
        epochs=6,
        structure="tridiagonal",
        tune="marginal_likelihood",
        progress=False,
    )
    assert posterior.blocks.links
    assert all(precision != 1.0 for precision in posterior.prior_precision.values())


def test_the_tuned_prior_has_the_greatest_evidence():
    """At the mean as it is, the evidence of the linked layers is stationary in the precision."""
    optimizer = trainer(plain())
    train(optimizer, 6)
    tune_prior_precision(optimizer)
    (precision,) = set(optimizer.prior_precision.values())
    laplace = bk.Laplace.from_trainer(optimizer, [data()], progress=False)
    value = torch.tensor(precision, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(laplace.log_marginal_likelihood(value), value)
    assert abs(precision * slope.item()) < 1e-6


def test_training_goes_on_in_another_precision():
    optimizer = trainer(plain())
    train(optimizer, 4)
    optimizer.model.float()
    optimizer.likelihood.float()
    x, y = (tensor.float() for tensor in data())
    for _ in range(4):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            optimizer.likelihood(optimizer.model(x), y).backward()
        optimizer.step()
        links = optimizer.blocks.links
        assert {tensor.dtype for link in links.values() for tensor in link.state.values()} == {torch.float32}


def test_a_copy_trains_by_itself():
    optimizer = trainer(plain())
    train(optimizer, 4)
    twin = copy.deepcopy(optimizer)
    for own in (optimizer, twin):
        train(own, 3)
    for mine, theirs in zip(optimizer.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
