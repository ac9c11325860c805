"""Copies in mid-training, and models that move or change their dtype, go on with the plain loop's numbers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from tests.helpers import randn
from tests.training.loops.plain import (
    BATCHES,
    Batch,
    Net,
    Sequences,
    assert_identical,
    assert_same,
    bare_of_hooks,
    float_batches,
    gaussian,
    make,
    train,
)

# Copies


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch_save(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("damping", ["factored", "optimal", "exact"])
def test_a_copy_in_mid_training_trains_on_to_the_same_bits(copied, damping):
    """The copy has its own model, likelihood, generator and schedule; neither of the two notices the other."""
    likelihood = gaussian(bk.likelihoods.GammaNoise(2.0, 2.0))
    options = {"others": "deterministic", "damping": damping, "num_samples": 2, "antithetic": True}
    optimizer = make(Net(activation=nn.PReLU()), likelihood, **options)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def run(optimizer: bk.NoisyKFAC, schedule: Any, batches: list[Batch]) -> None:
        for x, y in batches:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = optimizer.likelihood(optimizer.model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            schedule.step()

    run(optimizer, schedule, BATCHES[:3])
    other, other_schedule = copied((optimizer, schedule))
    assert other.model is not optimizer.model
    run(other, other_schedule, BATCHES[3:])
    run(optimizer, schedule, BATCHES[3:])
    assert_identical(other, optimizer)
    assert torch.equal(other.likelihood.noise_scale, optimizer.likelihood.noise_scale)
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert torch.equal(other.generator.get_state(), optimizer.generator.get_state())


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_model_in_training_is_copied_without_a_trace_of_its_optimizer(copied):
    batches = [(randn(4, 3, 3, seed=i), randn(4, 3, 2, seed=50 + i)) for i in range(2)]
    optimizer = train(make(Sequences()), batches)
    twin = copied(optimizer.model)
    assert bare_of_hooks(optimizer.model, twin, optimizer.likelihood)
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    train(optimizer, batches)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    assert torch.equal(twin(batches[0][0]), copied(twin)(batches[0][0]))


# Moves


def test_a_model_that_becomes_float64_goes_on_in_float64():
    """Statistics, posterior, momentum and Adam's moments follow; the numbers are those of float64 throughout."""

    def trained(first: torch.dtype) -> bk.NoisyKFAC:
        # a generator gives the same numbers in both dtypes to blocks of less than 16 weights
        model, likelihood = Net(activation=nn.PReLU(), hidden=3).to(first), gaussian("learned").to(first)
        options = {"others": "deterministic", "extrinsic_damping": 0.1, "statistics_every": 100, "inverse_every": 100}
        optimizer = make(model, likelihood, **options)
        train(optimizer, [(x.to(first), y.to(first)) for x, y in BATCHES[:3]])
        model.double()
        likelihood.double()
        return train(optimizer, BATCHES[3:4])  # a step on which nothing is made anew

    moved, expected = trained(torch.float32), trained(torch.float64)
    for state in moved.blocks.values():
        gaussians = [*state.posterior.state.values(), *state.preconditioner.state.values()]
        assert {t.dtype for t in [*state.statistics.sums.values(), *gaussians, state.momentum]} == {torch.float64}
    # three steps in float32, through factorisations of condition numbers of about a hundred
    assert_same(moved, expected, rtol=1e-4, atol=1e-5)
    assert_close(moved.likelihood.noise_scale, expected.likelihood.noise_scale, rtol=1e-4, atol=0)


def test_a_model_that_becomes_bfloat16_keeps_its_curvature_in_float32():
    model, likelihood = Net(activation=nn.PReLU()).float(), gaussian("learned").float()
    optimizer = train(make(model, likelihood, others="deterministic"), float_batches(3))
    model.to(torch.bfloat16)
    before = model.head.weight.detach().clone()
    train(optimizer, [(x.bfloat16(), y.bfloat16()) for x, y in BATCHES])
    assert not torch.equal(model.head.weight, before)
    for state in optimizer.blocks.values():
        tensors = [*state.statistics.sums.values(), *state.posterior.state.values(), state.momentum]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_a_move_to_where_the_model_is_leaves_the_state_alone():
    optimizer = train(make(Net()))
    blocks = optimizer.blocks
    optimizer.model.to("cpu", torch.float64)
    with optimizer.sampled_params():
        assert optimizer.blocks is blocks
