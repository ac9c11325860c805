"""Unlabelled examples, selections and tokens as examples: which of them the Fisher and the gradient see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.errors import UnsupportedModelError, UsageError
from tests.helpers import randn
from tests.training.loops.plain import (
    BATCHES,
    MASK,
    SAME,
    SIGMA,
    N,
    Net,
    Sequences,
    assert_same,
    gaussian,
    make,
    train,
)


def hand_statistics(model: Net, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """``A`` and the exact ``G`` of the two layers at the weights of the moment."""
    with torch.no_grad():
        hidden = model.act(model.body(x))
        rows = {name: functional.pad(a, (0, 1), value=1.0) for name, a in {"body": x, "head": hidden}.items()}
        back = ((1 - hidden**2).unsqueeze(1) * model.head.weight) / SIGMA
    identity = torch.eye(2).double() / SIGMA**2
    grams = {"body": torch.einsum("nci,ncj->ij", back, back) / len(x), "head": identity}
    return {name: (a.mT @ a / len(x), grams[name]) for name, a in rows.items()}


def assert_hand_statistics(optimizer: bk.NoisyKFAC, expected: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (A, G) in expected.items():
        assert_close(optimizer.blocks[name].statistics.mean("input"), A, **SAME)
        assert_close(optimizer.blocks[name].statistics.mean("gradient"), G, **SAME)


def test_unlabelled_examples_enter_the_fisher_and_nothing_else():
    """The Fisher is of both batches together, the gradient of the labelled one; where none is due none is measured."""
    optimizer, expected = make(Net(), statistics_every=100, warmup=False), make(Net())
    x, y = BATCHES[0]
    more = randn(20, 3, seed=5)
    for step in range(4):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            assert optimizer.is_measuring == (step < 3)
            if optimizer.is_measuring:
                optimizer.model(more)
                hand = hand_statistics(optimizer.model, torch.cat([more, x]))
            optimizer.likelihood(optimizer.model(x), y).backward()
            gradients = [parameter.grad.clone() for parameter in optimizer.model.parameters()]
            expected.model.load_state_dict(optimizer.model.state_dict())
            expected.model.zero_grad()
            expected.likelihood(expected.model(x), y).backward()
            for gradient, parameter in zip(gradients, expected.model.parameters(), strict=True):
                assert_close(gradient, parameter.grad, rtol=0, atol=0)
        optimizer.step()
        if step == 0:
            assert_hand_statistics(optimizer, hand)
    assert optimizer.blocks["body"].statistics.counts["input"] == pytest.approx((1 - 0.99**3) * 28)


def test_the_fisher_may_be_of_another_batch_than_the_gradient():
    optimizer = make(Net(), warmup=False)
    x, y = BATCHES[0]
    other = randn(3, 3, seed=5)
    with optimizer.sampled_params():
        optimizer.model(other)
        with optimizer.unmeasured():
            optimizer.likelihood(optimizer.model(x), y).backward()
        hand = hand_statistics(optimizer.model, other)
    optimizer.step()
    assert_hand_statistics(optimizer, hand)
    with optimizer.sampled_params(), optimizer.unmeasured():
        optimizer.likelihood(optimizer.model(x), y).backward()
    with pytest.raises(UsageError, match="No curvature statistics were measured"):
        optimizer.step()


def test_a_loss_on_a_selection_of_the_examples_leaves_the_fisher_to_all_of_them():
    optimizer = make(Net(), warmup=False)
    x, y = BATCHES[0]
    with optimizer.sampled_params():
        optimizer.likelihood(optimizer.model(x)[MASK], y[MASK]).backward()
        hand = hand_statistics(optimizer.model, x)
    optimizer.step()
    assert_hand_statistics(optimizer, hand)


def test_a_loss_on_some_of_the_outputs_is_the_smaller_model():
    """The columns of the output that are in no loss are not in the Fisher either."""
    optimizer = make(Net(), warmup=False)
    x, y = BATCHES[0]
    with optimizer.sampled_params():
        optimizer.likelihood(optimizer.model(x)[:, :1], y[:, :1]).backward()
    optimizer.step()
    assert_close(optimizer.blocks["head"].statistics.mean("gradient"), torch.diag(torch.tensor([4.0, 0.0]).double()))


@pytest.mark.parametrize("count", [5, 6, 16])
def test_a_selection_of_tokens_is_refused_with_the_way_round(count):
    """Which example a selected token belongs to cannot be known, whether or not numbers happen to divide."""
    optimizer = make(Net())
    x, y = randn(8, 4, 3, seed=0), randn(8, 4, 2, seed=1)
    chosen = (torch.arange(32) < count).reshape(8, 4)
    way_round = "a mask to the likelihood rather than a selection"
    with optimizer.sampled_params(), pytest.raises(UnsupportedModelError, match=way_round):
        optimizer.likelihood(optimizer.model(x)[chosen], y[chosen])


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_tokens_as_examples_are_a_batch_of_tokens(fisher):
    """Without interaction of positions: mean, counts, ``A`` and ``G`` of the flattened data set."""
    sequences = [(randn(2, 4, 3, seed=i), randn(2, 4, 2, seed=50 + i)) for i in range(4)]
    optimizer = make(Net(), fisher=fisher)
    for x, y in sequences:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            optimizer.likelihood(optimizer.model(x).flatten(0, 1), y.flatten(0, 1)).backward()
        optimizer.step()
    flat = [(x.flatten(0, 1), y.flatten(0, 1)) for x, y in sequences]
    assert_same(optimizer, train(make(Net(), fisher=fisher), flat))


def of_sequences_and_tokens(build: Callable[[], bk.NoisyNaturalGradient], x: Tensor, y: Tensor) -> list[Any]:
    """The blocks after a step whose examples are sequences, and after one whose examples are their tokens."""
    found = []
    for flat in (False, True):
        optimizer = build()
        with optimizer.sampled_params():
            output, target = optimizer.model(x), y
            if flat:
                output, target = output.flatten(0, 1), y.flatten(0, 1)
            optimizer.likelihood(output, target).backward()
        optimizer.step()
        found.append(optimizer.blocks)
    return found


def test_tokens_as_examples_have_the_sequences_factors_but_for_the_count():
    """One sequence's ``G`` sums over its tokens, one token's does not: the same sums, over ``T`` times as many."""
    x, y = randn(2, 4, 3, seed=0), randn(2, 4, 2, seed=1)
    blocks = of_sequences_and_tokens(lambda: make(Net(), warmup=False), x, y)
    sequence, token = (own["body"].statistics for own in blocks)
    assert_close(token.mean("input"), sequence.mean("input"), **SAME)
    assert_close(token.mean("gradient"), sequence.mean("gradient") / 4, **SAME)


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_tokens_that_see_each_other_share_the_fisher_of_their_sequence(structure):
    """Given the weights tokens are independent, so that the sequence's Fisher is the sum of its tokens'."""
    x, y = randn(2, 3, 3, seed=0), randn(2, 3, 2, seed=1)
    options = {"num_data": N, "fisher": "exact", "structure": structure, "warmup": False}
    sequence, token = of_sequences_and_tokens(lambda: bk.NoisyNaturalGradient(Sequences(), gaussian(), **options), x, y)
    assert len(token) == 5
    for name, state in token.items():
        assert_close(state.statistics.mean("fisher"), sequence[name].statistics.mean("fisher") / 3, **SAME)
