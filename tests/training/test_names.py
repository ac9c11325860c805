"""The trainers that are names of a structure: a whole step of each equals its published formulas, written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.curvature import Rows, output_gradients
from bayes_kfac.structures import standard_normal
from tests.fishers import exact_fisher, get
from tests.helpers import TIGHT, randn, record, seeded
from tests.posteriors import surveyed

N, TAU, DELTA, GAMMA_EX, LR, DECAY = 50, 0.7, 1.3, 0.04, 0.05, 0.8
GAMMA_IN = TAU * DELTA / N
STEPS = 5


def classifier() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


def convolution() -> nn.Module:
    """Positions share weights."""
    return seeded(nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)))


def data(step: int) -> tuple[Tensor, Tensor]:
    return randn(6, 3, seed=step), torch.arange(6) % 3


def make(trainer: type[bk.NoisyNaturalGradient], model: nn.Module, **options: Any) -> bk.NoisyNaturalGradient:
    defaults: dict[str, Any] = {
        "num_data": N,
        "lr": LR,
        "fisher": "exact",
        "prior_precision": DELTA,
        "temperature": TAU,
        "extrinsic_damping": GAMMA_EX,
        "momentum": 0.0,
        "statistics_decay": DECAY,
        "statistics_every": 1,
        "inverse_every": 1,
        "warmup": False,
        "kl_clip": None,
        "generator": torch.Generator().manual_seed(3),
    }
    return trainer(model, bk.likelihoods.Categorical(), **{**defaults, **options})


def weights_of(optimizer: bk.NoisyNaturalGradient) -> dict[str, Tensor]:
    return {name: layer.values().detach().clone() for name, layer in optimizer.layers.items()}


@dataclass
class Step:
    """What one step saw.

    Attributes:
        mean: The weights before it, by layer.
        sample: The weights that gradient and statistics were taken at.
        noise: The standard normal numbers of the sample.
        gradient: The gradient of the mean loss at the sample.
        rows: What the batch showed of each layer there.
    """

    mean: Mapping[str, Tensor]
    sample: Mapping[str, Tensor]
    noise: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    rows: Mapping[str, Rows]


def take(optimizer: bk.NoisyNaturalGradient, step: int) -> Step:
    """One step, and the same sample, gradient and rows once more from outside."""
    x, y = data(step)
    mean, twin = weights_of(optimizer), torch.Generator()
    twin.set_state(optimizer.generator.get_state())
    noise = {
        name: standard_normal(state.posterior, twin)
        for name, state in optimizer.blocks.items()
        if state.posterior is not None
    }
    with optimizer.sampled_params():
        optimizer.zero_grad()
        optimizer.likelihood(optimizer.model(x), y).backward()
        sample, other = weights_of(optimizer), copy.deepcopy(optimizer.model)
    gradient = {name: layer.gradient().clone() for name, layer in optimizer.layers.items()}
    for parameter in other.parameters():
        parameter.grad = None
    columns = output_gradients(bk.likelihoods.Categorical(), other(x), "exact")
    rows = record(other, x, columns)
    optimizer.step()
    return Step(mean, sample, noise, gradient, rows)


def turn(Q_G: Tensor, value: Tensor, Q_A: Tensor) -> Tensor:
    return Q_G @ value @ Q_A.T


@pytest.mark.parametrize("build", [classifier, convolution])
def test_steps_of_noisy_ekfac_equal_its_formulas(build: Callable[[], nn.Module]) -> None:
    """``W = M + Q_G (E ∘ sqrt((τ/N) / (R + γ_in))) Q_Aᵀ``, and the mean moves by ``V`` over ``R + γ`` in the basis.

    ``R`` is the average of the Fisher's diagonal in the basis of the step before, brought to that of the new factors.
    """
    optimizer = make(bk.NoisyEKFAC, build())
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    averages: dict[str, dict[str, Tensor]] = {}
    for index in range(STEPS):
        expected_noise = {
            name: turn(Q_G, ((TAU / N) / (averages[name]["R"] + GAMMA_IN)).sqrt(), Q_A)
            for name, (Q_G, Q_A) in bases.items()
        }
        seen = take(optimizer, index)
        assert seen.noise.keys() == expected_noise.keys()
        for name, rows in seen.rows.items():
            fisher, state = exact_fisher(rows), optimizer.blocks[name]
            assert state.statistics is not None
            out, in_ = state.statistics.sums["scale"].shape
            if name in bases:
                Q_G, Q_A = bases[name]
                spread = ((TAU / N) / (averages[name]["R"] + GAMMA_IN)).sqrt()
                noise = turn(Q_G, seen.noise[name] * spread, Q_A)
                assert_close(seen.sample[name] - seen.mean[name], noise, **TIGHT)
            else:
                Q_G, Q_A = torch.eye(out).double(), torch.eye(in_).double()
            # the averages, in the old basis
            factors = get("kron").measure(rows)
            Q = torch.kron(Q_G, Q_A)
            batch = {
                "A": factors.mean("input"),
                "G": factors.mean("gradient"),
                "R": (Q.T @ fisher @ Q).diagonal().reshape(out, in_),
            }
            share = (1 - DECAY) / (1 - DECAY ** (index + 1))
            old = averages.get(name, batch)
            mine = averages[name] = {key: (1 - share) * old[key] + share * value for key, value in batch.items()}
            # the new basis: the eigenvectors, whose signs are the library's
            K = torch.kron(mine["G"], mine["A"])
            model = K + Q @ torch.diag(mine["R"].flatten() - (Q.T @ K @ Q).diagonal()) @ Q.T
            Q_G, Q_A = bases[name] = tuple(state.statistics.frame[side] for side in ("basis_row", "basis_column"))
            for key, basis in (("G", Q_G), ("A", Q_A)):
                turned = basis.T @ mine[key] @ basis
                assert_close(turned, torch.diag(turned.diagonal()), **TIGHT)
            Q = torch.kron(Q_G, Q_A)
            moved = (Q.T @ model @ Q).diagonal().clamp(min=0)
            mine["R"] = (moved * mine["R"].sum() / moved.sum()).reshape(out, in_)
            assert_close(state.statistics.mean("scale"), mine["R"], **TIGHT)
            # the step
            V = seen.gradient[name] + GAMMA_IN * seen.sample[name]
            direction = turn(Q_G, (Q_G.T @ V @ Q_A) / (mine["R"] + GAMMA_IN + GAMMA_EX), Q_A)
            assert_close(weights_of(optimizer)[name], seen.mean[name] - LR * direction, **TIGHT)


def test_steps_of_noisy_adam_equal_its_formulas() -> None:
    """``W = M + E ∘ sqrt((τ/N) / (f + γ_in))``, and the mean moves by ``V / (f + γ)``, without a root."""
    optimizer = make(bk.NoisyAdam, classifier())
    averages: dict[str, Tensor] = {}
    for index in range(STEPS):
        seen = take(optimizer, index)
        for name, rows in seen.rows.items():
            if name in averages:
                noise = seen.noise[name] * ((TAU / N) / (averages[name] + GAMMA_IN)).sqrt()
                assert_close(seen.sample[name] - seen.mean[name], noise, **TIGHT)
            batch = exact_fisher(rows).diagonal().reshape(seen.mean[name].shape)
            share = (1 - DECAY) / (1 - DECAY ** (index + 1))
            f = averages[name] = (1 - share) * averages.get(name, batch) + share * batch
            V = seen.gradient[name] + GAMMA_IN * seen.sample[name]
            assert_close(weights_of(optimizer)[name], seen.mean[name] - LR * V / (f + GAMMA_IN + GAMMA_EX), **TIGHT)


@pytest.mark.parametrize("structure", ["ekfac", "tekfac"])
def test_the_average_forgets_the_bases_it_was_measured_in(structure: str) -> None:
    """Measured again and again at one place, it becomes what a fit of two passes finds."""
    x, y = data(0)
    model = convolution()
    optimizer = make(
        bk.NoisyNaturalGradient, model, structure=structure, lr=0.0, temperature=1e-16, statistics_decay=0.5
    )
    for _ in range(40):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            optimizer.likelihood(model(x), y).backward()
        optimizer.step()
    columns = output_gradients(bk.likelihoods.Categorical(), model(x), "exact")
    for name, rows in record(model, x, columns).items():
        statistics = optimizer.blocks[name].statistics
        assert statistics is not None
        expected = surveyed(get(structure), rows).mean("scale")
        assert_close(statistics.mean("scale"), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


def test_the_warm_up_starts_at_the_identity_in_any_basis() -> None:
    """``S`` goes from one to what was measured, with the weight that a start at one would still have."""
    optimizer = make(bk.NoisyEKFAC, classifier(), warmup=True)
    for index in range(3):
        take(optimizer, index)
        weight = DECAY ** (index + 1)
        for state in optimizer.blocks.values():
            assert state.statistics is not None
            assert state.posterior is not None
            blended = (1 - weight) * state.statistics.mean("scale") + weight
            assert_close(state.posterior.state["precision"], N / TAU * blended + DELTA, **TIGHT)


@pytest.mark.parametrize(("trainer", "structure"), [(bk.NoisyEKFAC, "ekfac"), (bk.NoisyAdam, "diagonal")])
def test_a_name_fixes_the_structure_and_nothing_else(trainer: type, structure: str) -> None:
    optimizer = make(trainer, classifier())
    assert optimizer.structure.name == structure
    take(optimizer, 0)
    assert optimizer.posterior().provenance.structure == structure
    assert math.isfinite(float(optimizer.kl()))
    copied = copy.deepcopy(optimizer)
    assert type(copied) is trainer
    assert_close(weights_of(copied), weights_of(optimizer))
    with pytest.raises(TypeError, match="structure"):
        make(trainer, classifier(), structure="kron")
