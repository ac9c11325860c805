"""The likelihood is called with one output of a forward pass: often, in any layout, and never with two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayes_kfac as bk
from bayes_kfac.curvature import EXAMPLEWISE_KINDS
from bayes_kfac.errors import UnsupportedModelError, UsageError
from tests.helpers import randn, seeded
from tests.training.loops.plain import BATCHES, MASK, Net, assert_same, make, train


class Heads(nn.Module):
    """Two heads, in one layer or in a layer each."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any], *, apart: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2 if apart else 4)
        self.auxiliary = nn.Linear(5, 2) if apart else None
        self.wrap = wrap
        seeded(self)

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.body(inputs).tanh()
        output = self.head(hidden)
        return self.wrap(*output.chunk(2, 1) if self.auxiliary is None else (output, self.auxiliary(hidden)))


#: How a model returns two heads, and how a loop has them back.
WRAPPED = {
    "tuple": (lambda one, other: (one, other), lambda output: output),
    "dictionary": (lambda one, other: {"logits": one, "aux": other}, lambda output: tuple(output.values())),
    "tensor": (lambda one, other: torch.cat([one, other], 1), lambda output: output.split(2, 1)),
}


@pytest.mark.parametrize("fisher", EXAMPLEWISE_KINDS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("masks", [(None, None), (MASK, ~MASK), (None, MASK), (MASK, None)])
@pytest.mark.parametrize("order", [1, -1])
def test_two_heads_of_one_forward_pass_are_refused(fisher, apart, wrapped, masks, order):
    """Only one of them would be in the curvature, whether their shapes are equal or not."""
    wrap, unwrap = WRAPPED[wrapped]
    optimizer = make(Heads(wrap, apart=apart), fisher=fisher)
    x, y = BATCHES[0]
    with optimizer.sampled_params():
        first, second = unwrap(optimizer.model(x))[::order]
        optimizer.likelihood(first, y, masks[0])
        with pytest.raises(UsageError, match=r"\(8, 2\) and \(8, 2\) of one forward pass.*Concatenate"):
            optimizer.likelihood(second, y, masks[1])


def test_heads_that_are_equal_by_chance_are_two():
    """As where both start at zero."""
    model = Heads(WRAPPED["tuple"][0], apart=True)
    for parameter in (*model.head.parameters(), *model.auxiliary.parameters()):
        nn.init.zeros_(parameter)
    optimizer = bk.NaturalGradient(model, bk.likelihoods.Gaussian(0.5), num_data=64)
    x, y = BATCHES[0]
    with optimizer.sampled_params():
        first, second = model(x)
        assert torch.equal(first, second)
        optimizer.likelihood(first, y)
        with pytest.raises(UsageError, match="Concatenate"):
            optimizer.likelihood(second, y)


def test_a_loss_at_each_time_step_is_refused():
    """Its first step alone was measured."""
    optimizer = make(Net())
    with optimizer.sampled_params():
        output, target = optimizer.model(randn(8, 4, 3, seed=1)), randn(8, 4, 2, seed=2)
        optimizer.likelihood(output[:, 0], target[:, 0])
        with pytest.raises(UsageError, match="Concatenate"):
            optimizer.likelihood(output[:, 1], target[:, 1])


AGAIN = {
    "itself": lambda output: output,
    "view": lambda output: output.unflatten(0, (2, 4)).flatten(0, 1),
    "copy": lambda output: output.mT.contiguous().mT,
    "cast": lambda output: output.to(torch.float64, copy=True),
}


@pytest.mark.parametrize("wrap", [None, lambda output: (output, output)], ids=["tensor", "tuple"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("again", AGAIN)
def test_a_loss_that_is_computed_again_counts_once(wrap, fisher, again):
    """For the log, say, with the reshaping that the loop does."""
    optimizer = make(Net(wrap), fisher=fisher)
    for x, y in BATCHES:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            output = optimizer.model(x) if wrap is None else optimizer.model(x)[0]
            optimizer.likelihood(AGAIN[again](output), y)
            optimizer.likelihood(AGAIN[again](output), y).backward()
        optimizer.step()
    assert_same(optimizer, train(make(Net(), fisher=fisher)))


def test_tokens_that_are_flattened_again_are_the_same():
    """In a dictionary, where the likelihood's call tells what the examples are."""
    optimizer, expected = make(Net(lambda output: (output, output))), make(Net())
    for seed in range(3):
        x, y = randn(4, 2, 3, seed=seed), randn(8, 2, seed=50 + seed)
        with optimizer.sampled_params():
            optimizer.zero_grad()
            output, _ = optimizer.model(x)
            optimizer.likelihood(output.flatten(0, 1), y)
            optimizer.likelihood(output.flatten(0, 1), y).backward()
        optimizer.step()
        train(expected, [(x.flatten(0, 1), y)])
    assert_same(optimizer, expected)


def test_outputs_that_are_not_finite_are_the_same_again():
    optimizer = make(Net())
    x, y = BATCHES[0]
    with optimizer.sampled_params():
        output = optimizer.model(x * torch.inf)
        for _ in range(2):
            optimizer.likelihood(output.clone(), y)


def test_of_several_masks_on_one_output_the_last_counts():
    optimizer = make(Net())
    for x, y in BATCHES:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            output = optimizer.model(x)
            optimizer.likelihood(output, y, ~MASK)
            optimizer.likelihood(output, y, MASK).backward()
        optimizer.step()
    assert_same(optimizer, train(make(Net()), [(x[MASK], y[MASK]) for x, y in BATCHES]))


@pytest.mark.parametrize("whole_first", [True, False])
def test_losses_of_some_of_the_examples_leave_the_statistics_of_all(whole_first):
    """Where the model's output is plain, and so all of it is measured: losses by group."""
    optimizer = make(Net())
    for x, y in BATCHES:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            output = optimizer.model(x)
            if whole_first:
                optimizer.likelihood(output, y)
            parts = [optimizer.likelihood(output[part], y[part]) * part.sum() / len(x) for part in (MASK, ~MASK)]
            sum(parts).backward()
        optimizer.step()
    assert_same(optimizer, train(make(Net())))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_what_a_loop_makes_of_the_output_is_what_is_measured(fisher):
    """An output on another scale than the model's, of the same shape."""
    optimizer = make(Net(), fisher=fisher)
    train(optimizer, model=lambda x: optimizer.model(x) * 3)
    assert_same(optimizer, train(make(Net(lambda output: output * 3), fisher=fisher)))


def test_an_output_that_was_refused_is_in_nobodys_way():
    optimizer = make(Net(), fisher="empirical", statistics_every=1)
    for x, y in BATCHES:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            output = optimizer.model(x)
            with pytest.raises(UnsupportedModelError, match="selection"):
                optimizer.likelihood(output[MASK], y[MASK])
            optimizer.likelihood(output, y).backward()
        optimizer.step()
    assert_same(optimizer, train(make(Net(), fisher="empirical", statistics_every=1)))
