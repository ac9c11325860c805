"""Layers that are frozen or unfrozen between steps keep, lose and gain what they should."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import UnsupportedModelError
from tests.training.loops.plain import (
    BATCHES,
    EXAMPLES,
    SAME,
    SIGMA,
    Net,
    X,
    assert_identical,
    assert_same,
    gaussian,
    make,
    train,
)


def test_what_is_frozen_from_the_start_is_what_params_leaves_out():
    model = Net()
    model.body.requires_grad_(False)
    optimizer, other = make(model), Net()
    expected = make(other, params=other.head.parameters())
    assert_same(train(optimizer), train(expected))


def test_a_frozen_layer_stays_as_it_was_and_goes_on_with_its_old_state():
    model = Net()
    optimizer = train(make(model, statistics_every=1), BATCHES[:2])
    frozen, before = [p.detach().clone() for p in model.body.parameters()], optimizer.blocks["body"]
    model.body.requires_grad_(False)
    train(optimizer, BATCHES[2:4])
    assert all(torch.equal(a, b) for a, b in zip(frozen, model.body.parameters(), strict=True))
    assert list(optimizer.posterior().blocks) == ["head"]
    assert [row.structure for row in optimizer.summary().rows] == ["constant"] * 2 + ["kron/factored 2×6"] * 2
    # the posterior's variance is the head's alone: J P⁻¹ Jᵀ with J = [h 1] for each output
    with torch.no_grad():
        features = functional.pad(model.act(model.body(X)), (0, 1), value=1.0)
    covariance = torch.linalg.inv(optimizer.posterior().blocks["head"].to_dense()).reshape(2, 6, 2, 6)
    variance = torch.stack([((features @ covariance[o, :, o]) * features).sum(-1) for o in range(2)], dim=-1)
    assert_close(optimizer.posterior().predict(X).epistemic_variance, variance, **SAME)
    model.body.requires_grad_(True)
    train(optimizer, BATCHES[4:])
    decay, after = optimizer.param_groups[0]["statistics_decay"], optimizer.blocks["body"]
    assert after.statistics.counts["gradient"] == pytest.approx(
        before.statistics.counts["gradient"] * decay + EXAMPLES * (1 - decay)
    )
    assert after.momentum_weight == pytest.approx(0.9 * before.momentum_weight + 0.1)
    assert not torch.equal(frozen[0], model.body.weight)


def test_a_layer_that_is_unfrozen_later_joins_with_statistics_at_its_first_step():
    """Although none are due then; its hyper-parameters are the defaults, those of groups are not touched."""
    model = Net()
    model.body.requires_grad_(False)
    groups = [{"params": model.head.parameters(), "prior_precision": 9.0}]
    optimizer = make(model, statistics_every=100, prior_precision=2.0, groups=groups, warmup=False)
    train(optimizer, BATCHES[:3])
    model.body.requires_grad_(True)
    assert not optimizer.statistics_schedule.is_due(optimizer.steps)
    x, y = BATCHES[3]
    with optimizer.sampled_params():
        assert optimizer.is_measuring
        optimizer.zero_grad()
        optimizer.likelihood(model(x), y).backward()
        head = model.head.weight.detach().clone()
        hidden = model.act(model.body(x)).detach()
    optimizer.step()
    # G of the body is Σ_c of what 1/σ for each output sends back through head and tanh
    backward = ((1 - hidden**2).unsqueeze(1) * head) / SIGMA
    gram = torch.einsum("nci,ncj->ij", backward, backward) / EXAMPLES
    assert_close(optimizer.blocks["body"].statistics.mean("gradient"), gram, **SAME)
    posterior = optimizer.posterior()
    assert posterior.prior_precision == {"body": 2.0, "head": 9.0}
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    train(optimizer, BATCHES[4:])
    assert not torch.equal(model.body.weight, Net().body.weight)


def test_a_group_holds_for_a_layer_that_is_frozen_as_yet():
    model = Net()
    model.body.requires_grad_(False)
    groups = [{"params": model.body.parameters(), "lr": 0.0, "prior_precision": 9.0}]
    optimizer = train(make(model, groups=groups))
    model.body.requires_grad_(True)
    train(optimizer)
    assert torch.equal(model.body.weight, Net().body.weight)
    assert optimizer.posterior().prior_precision == {"body": 9.0, "head": 1.0}


def test_a_checkpoint_knows_the_state_of_frozen_layers(tmp_path):
    """Saved while the body is frozen, loaded into new objects, unfrozen: the run that went on, bit for bit."""

    def half(*, resumed: bool) -> bk.NoisyKFAC:
        optimizer = make(Net(), statistics_every=1)
        if not resumed:
            train(optimizer, BATCHES[:2])
        optimizer.model.body.requires_grad_(False)
        return optimizer

    optimizer, other = half(resumed=False), half(resumed=True)
    train(optimizer, BATCHES[2:4])
    torch.save([optimizer.state_dict(), optimizer.model.state_dict()], tmp_path / "checkpoint.pt")
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(states[0])
    other.model.load_state_dict(states[1])
    for each in (optimizer, other):
        each.model.body.requires_grad_(True)
        train(each, BATCHES[4:])
    assert_identical(other, optimizer)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    ],
    ids=["StepLR", "LambdaLR"],
)
def test_schedules_hold_for_layers_that_join_later(schedule):
    """Their groups are there from the start: a schedule knows no others."""
    model = Net(activation=nn.PReLU())
    model.act.requires_grad_(False)
    model.body.requires_grad_(False)
    groups = [{"params": model.head.parameters(), "lr": 0.04}]
    optimizer = make(model, others="deterministic", deterministic_lr=0.03, groups=groups)
    scheduler = schedule(optimizer)
    for _ in range(2):
        train(optimizer, BATCHES[:2])
        scheduler.step()
        model.requires_grad_(True)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.0125, 0.0075])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 1]


@pytest.mark.parametrize(
    ("others", "structure"), [("deterministic", "deterministic"), ("diagonal", "diagonal/exact 1×1")]
)
def test_what_is_unfrozen_later_follows_the_policy_for_others(others, structure):
    model = Net(activation=nn.PReLU())
    model.act.requires_grad_(False)
    likelihood = gaussian(
        bk.likelihoods.GammaNoise(2.0, 2.0)
    )  # it has a KL term, which frozen parameters take no part in
    optimizer = train(make(model, likelihood, others=others), BATCHES[:2])
    before = model.act.weight.detach().clone()
    assert optimizer.summary().rows[2].structure == "constant"
    model.act.requires_grad_(True)
    train(optimizer, BATCHES[2:])
    assert optimizer.summary().rows[2].structure == structure
    assert ("act.weight" in optimizer.posterior().blocks) == (others == "diagonal")
    assert not torch.equal(model.act.weight, before)
    model.act.requires_grad_(False)
    moved = model.act.weight.detach().clone()
    for x, y in BATCHES:
        with optimizer.sampled_params():
            optimizer.zero_grad(set_to_none=False)  # a gradient of zero would be enough for Adam's momentum to go on
            optimizer.likelihood(model(x), y).backward()
        optimizer.step()
    assert torch.equal(model.act.weight, moved)


def test_unfreezing_what_no_block_covers_is_an_error_by_default():
    model = Net(activation=nn.PReLU())
    model.act.requires_grad_(False)
    optimizer = train(make(model))
    model.act.requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match=r"act\.weight: PReLU has no adapter"):
        train(optimizer)
    model.act.requires_grad_(False)
    train(optimizer)


@pytest.mark.parametrize(("part", "shape"), [("bias", (2, 5)), ("weight", (2, 1))])
def test_one_of_weight_and_bias_may_be_frozen_alone(part, shape):
    """It is a constant, the block is the other's; whole again, the block goes on with its old state."""
    model = Net()
    optimizer = train(make(model, statistics_every=1), BATCHES[:2])
    whole, parameter = optimizer.blocks["head"], getattr(model.head, part)
    parameter.requires_grad_(False)
    frozen = parameter.detach().clone()
    train(optimizer, BATCHES[2:4])
    assert torch.equal(parameter, frozen)
    alone = list(optimizer.layers)[-1]
    assert optimizer.posterior().blocks[alone].shape == shape
    assert [row.structure for row in optimizer.summary().rows if row.parameter == f"head.{part}"] == ["constant"]
    counts = optimizer.blocks[alone].statistics.counts["gradient"]
    assert counts == pytest.approx((1 - 0.99**2) * EXAMPLES)  # two steps of its own, from nothing
    parameter.requires_grad_(True)
    train(optimizer, BATCHES[4:])
    assert optimizer.blocks["head"].posterior.shape == (2, 6)
    assert optimizer.blocks["head"].momentum_weight == pytest.approx(0.9 * whole.momentum_weight + 0.1)
    assert not torch.equal(parameter, frozen)


def test_a_model_frozen_after_training_keeps_its_variance():
    """For deployment all is frozen; the posterior of before and the one of after, saved and loaded, are the same."""
    optimizer = train(make(Net(activation=nn.PReLU()), others="diagonal"))
    before = optimizer.posterior().predict(X).epistemic_variance
    optimizer.model.requires_grad_(False)
    assert before.min() > 0
    assert_close(optimizer.posterior().predict(X).epistemic_variance, before, rtol=0, atol=0)
    with pytest.raises(UnsupportedModelError, match="no layer with a curvature block"):
        train(optimizer)
