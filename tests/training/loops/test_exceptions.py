"""An exception anywhere in a step leaves everything as it was."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import bayes_kfac as bk
from bayes_kfac.errors import UsageError
from tests.training.loops.plain import (
    BATCHES,
    Batch,
    Net,
    assert_identical,
    bare_of_hooks,
    make,
)


class StopError(Exception):
    """What goes wrong."""


@pytest.mark.parametrize("place", ["before", "forward", "between", "backward", "after"])
@pytest.mark.parametrize("second", [False, True], ids=["first context", "second context"])
def test_an_exception_leaves_everything_as_it_was(place, second):
    """Wherever it comes, the step is then taken as if the failed context had never been entered."""
    optimizer, expected = make(Net(), num_samples=2), make(Net(), num_samples=2)
    model = optimizer.model

    def stop(*_: Any) -> None:
        raise StopError

    def context(optimizer: bk.NoisyKFAC, batch: Batch, fails: str = "") -> None:
        handle = optimizer.model.head.register_forward_hook(stop) if fails == "forward" else None
        try:
            with optimizer.sampled_params():
                if fails == "before":
                    stop()
                loss = optimizer.likelihood(optimizer.model(batch[0]), batch[1])
                if fails == "backward":
                    loss.grad_fn.next_functions[0][0].register_hook(stop)
                if fails == "between":
                    stop()
                loss.backward()
                if fails == "after":
                    stop()
        finally:
            if handle:
                handle.remove()

    for batch in BATCHES[:2]:
        for each in (optimizer, expected):
            each.zero_grad()
            context(each, batch)
            context(each, batch)
            each.step()
    for each in (optimizer, expected):
        each.zero_grad()
        if second:
            context(each, BATCHES[2])
    before = optimizer.generator.get_state()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    blocks = optimizer.blocks
    with pytest.raises(StopError):
        context(optimizer, BATCHES[3], place)
    optimizer.generator.set_state(before)
    assert optimizer.blocks is blocks
    assert bare_of_hooks(model, optimizer.likelihood)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
    for each in (optimizer, expected):
        for _ in range(2 - second):
            context(each, BATCHES[2])
        each.step()
    assert_identical(optimizer, expected)


def test_a_closure_that_raises_leaves_the_next_step_as_it_would_have_been():
    optimizer, expected = make(Net(), num_samples=2), make(Net(), num_samples=2)

    def closure(optimizer: bk.NoisyKFAC, batch: Batch, failures: list[bool]) -> Tensor:
        optimizer.zero_grad()
        loss = optimizer.likelihood(optimizer.model(batch[0]), batch[1])
        loss.backward()
        if failures.pop():
            raise StopError
        return loss

    before = optimizer.generator.get_state()
    with pytest.raises(StopError):
        optimizer.step(partial(closure, optimizer, BATCHES[0], [True, False]))
    optimizer.generator.set_state(before)
    for each in (optimizer, expected):
        for batch in BATCHES:
            each.step(partial(closure, each, batch, [False, False]))
    assert_identical(optimizer, expected)


def test_misuse_inside_the_context_does_not_end_the_step():
    """``step()``, ``posterior()`` and ``kl()`` inside are refused; those outside are then what they would have been."""
    optimizer, expected = make(Net(), num_samples=2), make(Net(), num_samples=2)
    for x, y in BATCHES:
        for _ in range(2):
            with optimizer.sampled_params():
                optimizer.likelihood(optimizer.model(x), y).backward()
                for misuse in (optimizer.step, optimizer.posterior, optimizer.kl):
                    with pytest.raises(UsageError, match=r"inside sampled_params\(\)"):
                        misuse()
            with expected.sampled_params():
                expected.likelihood(expected.model(x), y).backward()
        for each in (optimizer, expected):
            each.step()
            each.zero_grad()
    assert_identical(optimizer, expected)
