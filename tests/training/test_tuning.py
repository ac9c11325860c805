"""Tuning while training: the prior's precision goes to where the evidence is greatest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.training.tuning import BOUNDS, EXTRINSIC_DAMPING, tune_prior_precision
from tests.helpers import randn, rng, seeded
from tests.posteriors import FAMILIES


def data(size: int = 60) -> tuple[Tensor, Tensor]:
    return randn(size, 4, seed=0), randn(size, 2, seed=1)


def trainer(structure: str = "kron", damping: str = "factored", **options) -> bk.NoisyNaturalGradient:
    """A trainer after one step, with a layer norm's dense block beside the two linear ones."""
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)))
    optimizer = bk.NoisyNaturalGradient(
        model,
        bk.likelihoods.Gaussian(torch.tensor(0.6).double()),
        num_data=60,
        structure=structure,
        damping=damping,
        generator=rng(0),
        **options,
    )
    x, y = data()
    optimizer.step(lambda: step(optimizer, x, y))
    return optimizer


def step(optimizer: bk.NoisyNaturalGradient, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = optimizer.likelihood(optimizer.model(x), y)
    loss.backward()
    return loss.detach()


def groups_of(model: nn.Module) -> list[dict]:
    return [{"params": list(module.parameters())} for module in model]


@pytest.mark.parametrize(("structure", "damping"), FAMILIES, ids="-".join)
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_it_is_the_maximum_of_the_evidence(structure: str, damping: str, temperature: float) -> None:
    """Of one group with three blocks, by the gradient of the evidence from the same curvature."""
    optimizer = trainer(structure, damping, temperature=temperature)
    tune_prior_precision(optimizer)
    (found,) = set(optimizer.prior_precision.values())
    assert found != 1.0
    laplace = bk.Laplace.from_trainer(optimizer, [data()], progress=False)
    logarithm = torch.tensor(math.log(found), dtype=torch.float64, requires_grad=True)
    evidence = laplace.log_marginal_likelihood(logarithm.exp())
    (slope,) = torch.autograd.grad(evidence, logarithm)
    assert abs(float(slope)) < 1e-6
    for factor in (0.9, 1.1):
        assert laplace.log_marginal_likelihood(factor * found) < evidence.detach() - 1e-4


def test_the_determined_directions_are_counted() -> None:
    """MacKay's fixed point, ``δ ‖M‖² = d − δ tr P⁻¹``, of the exactly damped posterior."""
    optimizer = trainer(damping="exact")
    tune_prior_precision(optimizer)
    posterior = optimizer.posterior()
    length, determined = 0.0, 0.0
    for name, block in posterior.blocks.items():
        delta = posterior.prior_precision[name]
        mean = posterior.layers[name].matrix(posterior.mean)
        length += delta * float(mean.square().sum())
        determined += mean.numel() - delta * float(block.trace_covariance().sum())
    assert length == pytest.approx(determined, rel=1e-9)


def test_each_group_has_its_own() -> None:
    model = trainer().model
    optimizer = bk.NoisyKFAC(
        model, bk.likelihoods.Gaussian(0.6), num_data=60, groups=groups_of(model), generator=rng(0)
    )
    x, y = data()
    optimizer.step(lambda: step(optimizer, x, y))
    tune_prior_precision(optimizer)
    assert len(set(optimizer.prior_precision.values())) == 3


def test_weights_that_are_all_zero_have_the_largest_precision_that_is_allowed() -> None:
    optimizer = trainer()
    with torch.no_grad():
        for parameter in optimizer.model.parameters():
            parameter.zero_()
    tune_prior_precision(optimizer)
    (found,) = set(optimizer.prior_precision.values())
    assert found == pytest.approx(BOUNDS[1], rel=1e-6)


def test_before_the_first_step_there_is_nothing_to_go_by() -> None:
    model = trainer().model
    optimizer = bk.NoisyKFAC(model, bk.likelihoods.Gaussian(0.6), num_data=60)
    with pytest.raises(UsageError):
        tune_prior_precision(optimizer)
    assert set(optimizer.prior_precision.values()) == {1.0}


# fit


@pytest.mark.parametrize("start", [1e-2, 1e2])
def test_fit_finds_a_good_prior_from_a_bad_one(start: float) -> None:
    """On the diabetes set the bound ends near that of the other start, and above that of the bad prior."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.as_tensor(array, dtype=torch.float32) for array in load_diabetes(return_X_y=True))
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)

    def bound(start: float, tune: str | None) -> tuple[float, bk.Posterior]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1))
        loader = DataLoader(TensorDataset(x[:200], y[:200]), batch_size=50, shuffle=True, generator=rng(0))
        states: list[bk.training.FitState] = []
        posterior = bk.fit(
            model,
            bk.likelihoods.Gaussian(0.7),
            loader,
            epochs=30,
            lr=3e-2,
            prior_precision=start,
            tune=tune,
            statistics_every=2,
            inverse_every=10,
            progress=False,
            callbacks=[states.append],
            generator=rng(0),
        )
        return states[-1].elbo, posterior

    tuned, posterior = bound(start, "marginal_likelihood")
    plain, _ = bound(start, None)
    ideal, _ = bound(10.0, "marginal_likelihood")
    assert tuned > plain + 5
    assert tuned > ideal - 15
    assert len(set(posterior.prior_precision.values())) == 2
    assert start not in posterior.prior_precision.values()


def test_the_first_tenth_of_the_epochs_is_left_alone() -> None:
    """The mean at the start is the initialisation's, which says nothing about the prior."""
    x, y = data()
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    seen = []
    bk.fit(
        model,
        bk.likelihoods.Gaussian(torch.tensor(0.6).double()),
        [(x, y)],
        epochs=20,
        num_data=60,
        tune="marginal_likelihood",
        progress=False,
        callbacks=[lambda state: seen.append(set(state.optimizer.prior_precision.values()))],
    )
    assert seen[0] == seen[1] == {1.0}
    assert len(seen[2]) == 2


def test_groups_of_the_users_own_are_kept() -> None:
    x, y = data()
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    posterior = bk.fit(
        model,
        bk.likelihoods.Gaussian(torch.tensor(0.6).double()),
        [(x, y)],
        epochs=2,
        num_data=60,
        tune="marginal_likelihood",
        groups=[{"params": list(model.parameters())}],
        progress=False,
    )
    assert len(set(posterior.prior_precision.values())) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tune": "marginal_likelihood"}, EXTRINSIC_DAMPING),
        ({"tune": "marginal_likelihood", "extrinsic_damping": 0.0}, 0.0),
        ({}, 0.0),
    ],
)
def test_steps_are_damped_by_default_where_the_prior_is_tuned(given: dict, expected: float) -> None:
    """Else the mean walks at random where the data say little, and its length asks for a prior ever weaker."""
    seen = []

    def look(state: bk.training.FitState) -> None:
        seen.extend(group["extrinsic_damping"] for group in state.optimizer.param_groups if group["kind"] == "block")

    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    likelihood = bk.likelihoods.Gaussian(torch.tensor(0.6).double())
    bk.fit(model, likelihood, [data()], epochs=1, num_data=60, callbacks=[look], progress=False, **given)
    assert seen
    assert set(seen) == {expected}


def test_params_may_be_a_generator() -> None:
    """Looked at for the groups, and again by the trainer."""
    x, y = data()
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    posterior = bk.fit(
        model,
        bk.likelihoods.Gaussian(torch.tensor(0.6).double()),
        [(x, y)],
        epochs=2,
        num_data=60,
        tune="marginal_likelihood",
        params=(parameter for parameter in model[2].parameters()),
        progress=False,
    )
    assert list(posterior.blocks) == ["2"]


def test_unknown_ways_of_tuning_say_what_there_is() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(ArgumentError, match=r"tune='evidence' is unknown. Allowed: 'marginal_likelihood'"):
        bk.fit(model, bk.likelihoods.Gaussian(1.0), [], epochs=1, tune="evidence", progress=False)


# from_trainer


@pytest.mark.parametrize(("structure", "damping"), FAMILIES, ids="-".join)
def test_a_laplace_from_a_trainer_has_the_trainers_posterior(structure: str, damping: str) -> None:
    optimizer = trainer(structure, damping, temperature=0.5, prior_precision=2.0)
    before = {name: value.clone() for name, value in optimizer.model.state_dict().items()}
    posterior = bk.Laplace.from_trainer(optimizer, [data()], progress=False).posterior()
    expected = optimizer.posterior()
    assert posterior.provenance.temperature == 0.5
    assert posterior.prior_precision == pytest.approx(expected.prior_precision)
    assert posterior.blocks.keys() == expected.blocks.keys()
    for name, block in expected.blocks.items():
        torch.testing.assert_close(posterior.blocks[name].to_dense(), block.to_dense(), rtol=1e-10, atol=1e-10)
    for name, value in optimizer.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_its_evidence_is_that_of_the_trainers_curvature() -> None:
    """The likelihood at the mean is measured; the rest is the dense formula of the trainer's posterior."""
    optimizer = trainer(damping="exact", prior_precision=2.0)
    x, y = data()
    evidence = bk.Laplace.from_trainer(optimizer, [(x, y)], progress=False).log_marginal_likelihood()
    optimizer.model.eval()
    expected = -optimizer.likelihood.negative_log_likelihood(optimizer.model(x), y).sum().detach()
    posterior = optimizer.posterior()
    for name, block in posterior.blocks.items():
        mean = posterior.layers[name].matrix(posterior.mean)
        expected = expected - mean.square().sum() + 0.5 * mean.numel() * math.log(2) - 0.5 * block.logdet().sum()
    torch.testing.assert_close(evidence, expected, rtol=1e-9, atol=1e-9)


def test_parameters_outside_blocks_stay_outside() -> None:
    """``others="deterministic"`` and ``params=`` in training: the same blocks afterwards."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5).double())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    x, y = data()
    for others, blocks in (("deterministic", 2), ("diagonal", 3)):
        model = seeded(nn.Sequential(nn.Linear(4, 5), Scale(), nn.Linear(5, 2)))
        optimizer = bk.NoisyKFAC(
            model, bk.likelihoods.Gaussian(torch.tensor(0.6).double()), num_data=60, others=others, generator=rng(0)
        )
        optimizer.step(lambda optimizer=optimizer: step(optimizer, x, y))
        laplace = bk.Laplace.from_trainer(optimizer, [(x, y)], progress=False)
        assert len(laplace.layers) == blocks
        assert laplace.layers.keys() == optimizer.layers.keys()


def test_the_temperature_of_a_trained_posterior_is_tuned_on_validation_data() -> None:
    """The grid's best by its own predictions; the trainer keeps its temperature."""
    optimizer = trainer()
    x, y = data()
    laplace = bk.Laplace.from_trainer(optimizer, [(x, y)], progress=False)
    grid = [0.1, 1.0, 10.0]
    scores = {}
    for value in grid:
        laplace.temperature = value
        scores[value] = -float(laplace.posterior().predict(x[:20]).log_prob(y[:20]).mean())
    laplace.optimize_temperature([(x[:20], y[:20])], grid=grid, progress=False)
    assert laplace.temperature == min(scores, key=scores.__getitem__)
    assert optimizer.temperature == 1.0
