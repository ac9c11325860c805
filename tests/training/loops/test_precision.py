"""Mixed precision, memory formats, checkpointing and changes in place give the plain loop's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import bayes_kfac as bk
from bayes_kfac.errors import UsageError
from tests.helpers import randn
from tests.training.loops.plain import (
    BATCHES,
    EXAMPLES,
    Batch,
    ImageNet,
    Net,
    assert_identical,
    assert_same,
    float_batches,
    float_net,
    gaussian,
    make,
    train,
)

# Mixed precision


def train_mixed(optimizer: bk.NoisyKFAC, dtype: torch.dtype | None, scaler: Any, batches: Sequence[Batch]) -> None:
    for x, y in batches:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype) if dtype else nullcontext():
                output = optimizer.model(x)
            loss = optimizer.likelihood(output.float(), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # a power of two changes no digit where the exponent has room for it; half precision's has not always
    [(None, 0.0), (torch.bfloat16, 0.0), (torch.float16, 1e-4)],
    ids=["float32", "bfloat16", "float16"],
)
def test_a_gradient_scaler_is_taken_out_again(dtype, tolerance):
    scaled, plain = make(float_net(), gaussian().float()), make(float_net(), gaussian().float())
    train_mixed(scaled, dtype, torch.amp.GradScaler("cpu", init_scale=2.0**10), float_batches())
    train_mixed(plain, dtype, None, float_batches())
    assert_same(scaled, plain, rtol=tolerance, atol=tolerance)
    for state in scaled.blocks.values():
        assert {value.dtype for value in state.statistics.sums.values()} == {torch.float32}


def test_autocast_measures_what_float32_does_to_its_precision():
    """Statistics of a bfloat16 forward pass are those of the float32 one to about its three digits."""
    mixed, plain = make(float_net(), gaussian().float(), lr=0.0), make(float_net(), gaussian().float(), lr=0.0)
    train_mixed(mixed, torch.bfloat16, None, float_batches(3))
    train_mixed(plain, None, None, float_batches(3))
    for name, state in plain.blocks.items():
        for key in state.statistics.sums:
            mine, reference = mixed.blocks[name].statistics.mean(key), state.statistics.mean(key)
            # the noise of the second step comes from the first one's statistics: a few roundings of 2⁻⁸ add up
            assert torch.linalg.norm(mine - reference) < 0.03 * torch.linalg.norm(reference)
    gradients = [optimizer.blocks["body"].statistics.mean("gradient") for optimizer in (mixed, plain)]
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("clear", ["inside", "outside", "outside, to zero"])
def test_a_step_that_the_scaler_skips_leaves_nothing_behind(clear):
    """The loss overflows on one batch; afterwards all is as if the batch had never come."""
    optimizer, expected = make(float_net(), gaussian().float()), make(float_net(), gaussian().float())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def one(batch: Batch, factor: float) -> None:
        x, y = batch
        with optimizer.sampled_params():
            if clear == "inside":
                optimizer.zero_grad()
            scaler.scale(optimizer.likelihood(optimizer.model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if clear != "inside":
            optimizer.zero_grad(set_to_none=clear == "outside")

    batches = float_batches()
    for batch in batches[:2]:
        one(batch, 1.0)
    before = optimizer.generator.get_state()
    one(batches[2], torch.finfo(torch.float32).max)
    assert optimizer.steps == 2
    optimizer.generator.set_state(before)  # the noise that was drawn for it is spent
    for batch in batches[3:]:
        one(batch, 1.0)
    train(expected, batches[:2] + batches[3:])
    assert_identical(optimizer, expected)


def test_one_autocast_region_around_the_whole_loop_serves_no_stale_weights():
    """Autocast keeps the casts of weights; each sample, and the mean after each step, is cast anew."""
    inside, outside = make(float_net(), gaussian().float()), make(float_net(), gaussian().float())
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in float_batches():
            with inside.sampled_params():
                inside.zero_grad()
                inside.likelihood(inside.model(x).float(), y).backward()
                body = inside.model.body
                perturbed = functional.linear(x.bfloat16(), body.weight.bfloat16(), body.bias.bfloat16())
                assert torch.equal(body(x), perturbed)
            at_mean = functional.linear(x.bfloat16(), body.weight.bfloat16(), body.bias.bfloat16())
            assert torch.equal(body(x), at_mean)
            assert not torch.equal(at_mean, perturbed)
            inside.step()
            moved = functional.linear(x.bfloat16(), body.weight.bfloat16(), body.bias.bfloat16())
            assert torch.equal(body(x), moved)
            assert not torch.equal(at_mean, moved)
    train_mixed(outside, torch.bfloat16, None, float_batches())
    assert_identical(inside, outside)


# Memory formats, checkpointing, changes in place


def image_batches() -> list[Batch]:
    return [(randn(6, 3, 5, 5, seed=i), randn(6, 2, seed=50 + i)) for i in range(3)]


def test_channels_last_changes_nothing():
    model = ImageNet().to(memory_format=torch.channels_last)
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in image_batches()]
    optimizer = train(make(model), batches)
    assert model.layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(optimizer, train(make(ImageNet()), image_batches()))


class Checkpointed(Net):
    """A net that runs all of it, or only its body, under activation checkpointing."""

    def __init__(self, *, whole: bool, use_reentrant: bool) -> None:
        super().__init__()
        self.whole, self.use_reentrant = whole, use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        run = partial(checkpoint, use_reentrant=self.use_reentrant)
        inputs = inputs.requires_grad_(self.use_reentrant)  # without this torch itself would refuse
        if self.whole:
            return run(super().forward, inputs)
        return self.head(run(lambda x: self.act(self.body(x)), inputs))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("whole", [True, False])
def test_activation_checkpointing_changes_nothing(whole, fisher):
    optimizer = train(make(Checkpointed(whole=whole, use_reentrant=False), fisher=fisher))
    assert_same(optimizer, train(make(Net(), fisher=fisher)))


@pytest.mark.parametrize("whole", [True, False])
def test_reentrant_checkpointing_is_an_error_that_names_the_way_round(whole):
    batches = [(x.clone(), y) for x, y in BATCHES]
    with pytest.raises(UsageError, match="use_reentrant=False"):
        train(make(Checkpointed(whole=whole, use_reentrant=True)), batches)


@pytest.mark.parametrize("positions", [(), (3,), (2, 2)])
def test_activations_in_place_change_nothing(positions):
    """Over positions a layer's output is a view, which autograd takes out of the graph when it is written to."""
    batches = [(randn(EXAMPLES, *positions, 3, seed=i), randn(EXAMPLES, *positions, 2, seed=50 + i)) for i in range(4)]
    optimizer = train(make(Net(activation=nn.ReLU(inplace=True))), batches)
    assert_same(optimizer, train(make(Net(activation=nn.ReLU())), batches))


class ChangesInput(Net):
    """A model that writes into the input of a layer after the layer has read it."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.act(self.body(inputs))
        output = self.head(hidden)
        hidden.add_(1.0)
        return output


def test_an_input_that_is_changed_after_the_call_is_an_error_that_names_the_layer():
    with pytest.raises(UsageError, match="input of layer 'head' was changed in place"):
        train(make(ChangesInput()))
