"""Checkpoints: a run that is stopped and resumed is the run that went on, bit for bit."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError

OPTIONS = {
    "num_data": 60,
    "statistics_every": 3,
    "inverse_every": 5,
    "momentum": 0.9,
    "num_samples": 2,
    "antithetic": True,
    "kl_clip": 1e-2,
}


def make(hidden: int = 6, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 2))
    likelihood = bk.likelihoods.Gaussian(bk.likelihoods.GammaNoise(2.0, 2.0))
    generator = torch.Generator().manual_seed(4)
    optimizer = bk.NoisyKFAC(model, likelihood, generator=generator, **{**OPTIONS, **options})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    return model, likelihood, optimizer, scheduler


def run(model, likelihood, optimizer, scheduler, steps):
    for index in steps:
        generator = torch.Generator().manual_seed(index)
        x, y = torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = likelihood(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()


@pytest.mark.parametrize("options", [{}, {"damping": "optimal", "extrinsic_damping": 0.01}, {"damping": "exact"}])
@pytest.mark.parametrize("stop", [1, 7])
def test_resuming_mid_schedule_is_bit_for_bit(options, stop):
    """Stopped between two refreshes, saved to bytes, loaded into new objects: equal weights, noise and posterior."""
    whole = make(**options)
    run(*whole, range(12))
    first = make(**options)
    run(*first, range(stop))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first], buffer)
    buffer.seek(0)
    resumed = make(**options)
    torch.randn(7, generator=resumed[2].generator)  # its generator was elsewhere
    for part, state in zip(resumed, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*resumed, range(stop, 12))
    for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole[1].parameters(), resumed[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole[2].generator.get_state(), resumed[2].generator.get_state())
    mine, theirs = whole[2].posterior(), resumed[2].posterior()
    for name in mine.blocks:
        for key, value in mine.blocks[name].state.items():
            assert torch.equal(value, theirs.blocks[name].state[key])


def test_a_state_of_another_model_is_refused_and_nothing_changes():
    parts = make()
    run(*parts, range(2))
    state = parts[2].state_dict()
    other = make(hidden=7)
    with pytest.raises(ArgumentError, match=r"shape \(6, 4\) for layer '0'"):
        other[2].load_state_dict(state)
    assert other[2].steps == 0
    deeper = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2))
    optimizer = bk.NoisyKFAC(deeper, bk.likelihoods.Gaussian(1.0), num_data=60)
    with pytest.raises(ArgumentError, match="layers"):
        optimizer.load_state_dict(state)


def natural(structure, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    likelihood = bk.likelihoods.Gaussian(1.0)
    kind = bk.NaturalGradient if structure is None else bk.NoisyNaturalGradient
    optimizer = kind(model, likelihood, num_data=60, structure=structure or "kron", **options)
    for _ in range(2):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            likelihood(model(torch.ones(4, 3)), torch.ones(4, 2)).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("saved", "own", "match"),
    [
        ("tkfac", "kron", r"\{'structure': 'tkfac'\}, but this one has \{'structure': 'kron'\}"),
        ("dense", "kron", "'dense'"),
        (None, "kron", r"\{'method': 'natural gradient'\}"),
        (bk.structures.SlangStructure(rank=2), bk.structures.SlangStructure(rank=3), r"\{'rank': 2\}"),
    ],
)
def test_a_state_of_another_structure_is_refused_and_nothing_changes(saved, own, match):
    """Sums of the same name mean something else there."""
    dumped, optimizer = natural(saved).state_dict(), natural(own)
    before = optimizer.posterior()
    with pytest.raises(ArgumentError, match=match):
        optimizer.load_state_dict(dumped)
    assert optimizer.steps == 2
    for name, block in optimizer.posterior().blocks.items():
        for key, value in block.state.items():
            assert torch.equal(value, before.blocks[name].state[key])


def test_a_schedule_of_another_kind_begins_anew():
    schedules = bk.training.schedules
    dumped = natural("kron", statistics_every=schedules.OnTraceChange(every=1)).state_dict()
    optimizer = natural("kron", statistics_every=schedules.WhileAlike())
    before = optimizer.statistics_schedule.state_dict()
    optimizer.load_state_dict(dumped)
    assert optimizer.statistics_schedule.state_dict() == before


def test_a_state_of_another_optimizer_is_refused():
    parts = make()
    adam = torch.optim.Adam(parts[0].parameters())
    with pytest.raises(ArgumentError, match="not from a noisy natural gradient"):
        parts[2].load_state_dict(adam.state_dict())


def test_adding_a_parameter_group_later_is_refused():
    parts = make()
    with pytest.raises(ArgumentError, match="groups="):
        parts[2].add_param_group({"params": nn.Linear(2, 2).parameters()})
