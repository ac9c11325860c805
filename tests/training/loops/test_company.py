"""Evaluations, other optimizers and other libraries' loops around a step leave its numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import bayes_kfac as bk
from tests.helpers import rng
from tests.training.loops.plain import (
    BATCHES,
    SAME,
    Batch,
    Net,
    assert_blocks,
    assert_identical,
    assert_means,
    assert_same,
    bare_of_hooks,
    gaussian,
    make,
    train,
)

# Forward passes that are no training


def test_evaluations_teachers_and_metrics_inside_the_context_never_count():
    """A loop full of other forward passes, of the model and of its moving average, is the plain loop."""
    optimizer = make(Net())
    model, likelihood = optimizer.model, optimizer.likelihood
    teacher = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    logged = []
    for x, y in BATCHES:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            with torch.no_grad():
                model(x * 3)
                target = teacher(x)
            model.eval()
            logged.append(likelihood(model(x * 5), y).item())
            model.train()
            output = model(x)
            logged.append(likelihood(output.detach(), target).item())
            likelihood(output, y).backward()
            logged.append((output - y).square().mean().item())
            with torch.inference_mode():
                logged.append(likelihood(model(x), y).item())
        optimizer.step()
        teacher.update_parameters(model)
        logged.append(likelihood(model(x), y).item())
    assert_identical(optimizer, train(make(Net())))
    assert bare_of_hooks(model, teacher, likelihood)


# Several optimizers


class HeadOnly(Net):
    """The head of the net, on features."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)


def test_a_bayesian_head_beside_adamw_is_the_head_on_the_features_of_the_moment():
    model, features = Net(), []
    head = make(model, params=model.head.parameters())
    adam = torch.optim.AdamW(model.body.parameters(), lr=1e-2)
    for x, y in BATCHES:
        with head.sampled_params():
            head.zero_grad()
            adam.zero_grad()
            features.append(model.act(model.body(x)).detach())
            head.likelihood(model(x), y).backward()
        head.step()
        adam.step()
    alone = HeadOnly()
    assert not torch.equal(model.body.weight, alone.body.weight)
    alone.body.load_state_dict(model.body.state_dict())
    expected = make(alone, params=alone.head.parameters())
    assert_same(head, train(expected, [(f, y) for f, (_, y) in zip(features, BATCHES, strict=True)]))
    constant = [row.parameter for row in head.summary().rows if row.why == "not among params="]
    assert constant == ["body.weight", "body.bias"]


@pytest.mark.parametrize("share_likelihood", [True, False])
def test_two_optimizers_with_nested_contexts_are_one_with_two_layers(share_likelihood):
    """One generator for both draws the noise in the order in which one optimizer draws it for its layers."""
    model, generator, likelihood = Net(), rng(7), gaussian()
    options = {"generator": generator, "kl_clip": None}  # the clip is one number for all layers of an optimizer
    body = make(model, likelihood, params=model.body.parameters(), **options)
    head = make(model, likelihood if share_likelihood else gaussian(), params=model.head.parameters(), **options)
    for x, y in BATCHES:
        with body.sampled_params(), head.sampled_params():
            model.zero_grad()
            likelihood(model(x), y).backward()
        head.step()
        body.step()
    expected = train(make(Net(), kl_clip=None))
    assert_means(model, expected.model)
    assert_blocks({**body.blocks, **head.blocks}, expected.blocks)


# Schedulers that cycle the momentum


@pytest.mark.parametrize("kind", [bk.NoisyKFAC, bk.NaturalGradient])
@pytest.mark.parametrize(
    ("schedule", "momenta"),
    [
        (
            partial(OneCycleLR, max_lr=1, total_steps=4, pct_start=0.5, anneal_strategy="linear"),
            [0.95, 0.85, 0.9, 0.95],
        ),
        (partial(CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2), [0.9, 0.85, 0.8, 0.85]),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_schedulers_cycle_the_momentum(kind, schedule, momenta):
    """It is that of the average of gradients; Adam's own betas stay."""
    optimizer = kind(Net(), gaussian("learned"), num_data=64)
    scheduler, weight, seen = schedule(optimizer), 0.0, []
    for batch in BATCHES[:4]:
        momentum = optimizer.param_groups[0]["momentum"]
        seen.append(momentum)
        weight = momentum * weight + 1 - momentum
        train(optimizer, [batch])
        assert optimizer.blocks["head"].momentum_weight == pytest.approx(weight)
        scheduler.step()
    assert seen == pytest.approx(momenta)


# The loops of Lightning and Accelerate


class LightningShaped:
    """The part of a Lightning module and its trainer that touches optimizers."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], training_step: Callable[[Batch], Tensor]) -> None:
        self.optimizers, self.training_step = optimizers, training_step

    def fit(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            for optimizer in self.optimizers:
                others = self.toggle(optimizer)
                optimizer.step(closure=partial(self.closure, optimizer, batch))
                for parameter in others:
                    parameter.requires_grad_(True)

    def closure(self, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
        loss = self.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        return loss

    def toggle(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        """Freeze the parameters of all other optimizers, as ``toggle_optimizer`` does."""
        mine = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        groups = [group for other in self.optimizers for group in other.param_groups]
        others = [parameter for group in groups for parameter in group["params"] if parameter not in mine]
        for parameter in others:
            parameter.requires_grad_(False)
        return others


def head_and_body() -> tuple[Net, bk.NoisyKFAC, torch.optim.Optimizer]:
    model = Net()
    head = make(model, gaussian("learned"), params=model.head.parameters())
    return model, head, torch.optim.AdamW(model.body.parameters(), lr=1e-2)


def test_a_lightning_shaped_loop_is_the_plain_one():
    """Closures, and the other optimizer's parameters frozen in turns, as in a GAN."""
    model, head, adam = head_and_body()
    LightningShaped([head, adam], lambda batch: head.likelihood(model(batch[0]), batch[1])).fit(BATCHES)
    twin, expected, twin_adam = head_and_body()
    for batch in BATCHES:
        train(expected, [batch])
        twin_adam.zero_grad()
        expected.likelihood(twin(batch[0]), batch[1]).backward()
        twin_adam.step()
    assert_same(head, expected)
    assert_close(head.likelihood.noise_scale, expected.likelihood.noise_scale, **SAME)


class Accelerated:
    """As Accelerate wraps an optimizer: ``step`` and ``zero_grad`` do nothing while gradients are accumulated."""

    def __init__(self, optimizer: torch.optim.Optimizer, every: int) -> None:
        self.optimizer, self.every, self.seen = optimizer, every, 0

    def backward(self, loss: Tensor) -> None:
        (loss / self.every).backward()
        self.seen += 1

    @property
    def sync_gradients(self) -> bool:
        return self.seen % self.every == 0

    def step(self) -> None:
        if self.sync_gradients:
            self.optimizer.step()

    def zero_grad(self) -> None:
        if self.sync_gradients:
            self.optimizer.zero_grad()


def test_an_accelerate_shaped_loop_is_the_plain_one_on_whole_batches():
    optimizer, expected = make(Net()), make(Net())
    wrapped = Accelerated(optimizer, every=2)
    for index, (x, y) in enumerate(BATCHES):
        for micro in zip(x.split(4), y.split(4), strict=True):
            optimizer.generator.manual_seed(index)
            with optimizer.sampled_params():
                wrapped.backward(optimizer.likelihood(optimizer.model(micro[0]), micro[1]))
            wrapped.step()
            wrapped.zero_grad()
        expected.generator.manual_seed(index)
        train(expected, [(x, y)])
    assert_same(optimizer, expected)
