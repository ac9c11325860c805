"""Masked examples and steps are as if they were not there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bayes_kfac as bk
from bayes_kfac.errors import TargetError
from tests.helpers import randn, rng, seeded
from tests.training.loops.plain import (
    BATCHES,
    EXAMPLES,
    MASK,
    Net,
    assert_same,
    gaussian,
    make,
    train,
)


class PerToken(Net):
    """The same two layers at each position, one by one."""

    def forward(self, inputs: Tensor, valid: Tensor) -> Tensor:
        return super().forward(inputs)


class Recurrent(nn.Module):
    """A recurrence from left to right: what comes after the end of a sequence reaches none of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
        seeded(self)

    def forward(self, inputs: Tensor, valid: Tensor) -> Tensor:
        return self.head(self.recurrence(inputs)[0])


class Attentive(nn.Module):
    """Attention to the valid steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)
        seeded(self)

    def forward(self, inputs: Tensor, valid: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        attended, _ = self.attention(hidden, hidden, hidden, key_padding_mask=~valid)
        return self.head(self.norm(hidden + attended))


LENGTHS = (4, 1, 3, 2)
VALID = torch.arange(4) < torch.tensor(LENGTHS).unsqueeze(1)
LIKELIHOODS = {
    "NaN": (gaussian, lambda seed: randn(4, 4, 2, seed=seed), float("nan")),
    "-100": (bk.likelihoods.Categorical, lambda seed: torch.randint(2, (4, 4), generator=rng(seed)), -100),
    "NaN, Bernoulli": (
        bk.likelihoods.Bernoulli,
        lambda seed: torch.randint(2, (4, 4, 2), generator=rng(seed)).double(),
        float("nan"),
    ),
}


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("filler", LIKELIHOODS)
@pytest.mark.parametrize("kind", [PerToken, Recurrent, Attentive])
def test_padded_sequences_are_their_valid_steps_one_sequence_at_a_time(kind, filler, sharing, fisher):
    """What fills the padding is in no loss and no statistic: neither inputs of 100 nor targets that are no numbers."""
    likelihood, draw, nothing = LIKELIHOODS[filler]
    padded, apart = (make(kind(), likelihood(), sharing=sharing, fisher=fisher) for _ in range(2))
    for seed in range(3):
        x, y = randn(4, 4, 3, seed=seed), draw(seed)
        with apart.sampled_params():
            apart.zero_grad()
            for sequence, target, length in zip(x, y, LENGTHS, strict=True):
                valid = torch.ones(1, length, dtype=torch.bool)
                output = apart.model(sequence[None, :length], valid)
                (apart.likelihood(output, target[None, :length]) / len(LENGTHS)).backward()
        apart.step()
        x[~VALID], y[~VALID] = 100.0, nothing
        with padded.sampled_params():
            padded.zero_grad()
            padded.likelihood(padded.model(x, VALID), y, VALID).backward()
        padded.step()
    assert_same(padded, apart)


def test_labelled_nodes_are_the_examples_and_num_data_counts_them():
    """Of a graph's nodes only some have labels; without edges they alone are the batch."""
    optimizer = make(Net(), num_data=5)
    x, y = BATCHES[0]
    labelled = torch.tensor([True, False, True, False, True, False, False, True])
    for _ in range(3):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            targets = torch.where(labelled.unsqueeze(1), y, torch.nan)
            optimizer.likelihood(optimizer.model(x), targets, labelled).backward()
        optimizer.step()
    assert_same(optimizer, train(make(Net(), num_data=5), [(x[labelled], y[labelled])] * 3))


def test_a_batch_without_any_label_moves_the_mean_towards_the_prior_and_measures_nothing():
    optimizer = train(make(Net(), statistics_every=1, momentum=0.0), BATCHES[:2])
    statistics = {name: state.statistics for name, state in optimizer.blocks.items()}
    x, y = BATCHES[2]
    with optimizer.sampled_params():
        optimizer.zero_grad()
        optimizer.likelihood(optimizer.model(x), y * torch.nan, torch.zeros(EXAMPLES, dtype=torch.bool)).backward()
        assert all(not parameter.grad.any() for parameter in optimizer.model.parameters())
    optimizer.step()
    assert all(state.statistics is statistics[name] for name, state in optimizer.blocks.items())
    # and the next average is the one after a step without a measurement
    twin = train(make(Net(), statistics_every=1, momentum=0.0), BATCHES[:2])
    counts = twin.blocks["head"].statistics.counts["gradient"]
    train(optimizer, BATCHES[3:4])
    now = optimizer.blocks["head"].statistics.counts["gradient"]
    assert now == pytest.approx(counts * 0.99**2 + EXAMPLES * (1 - 0.99**2))


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (MASK.double(), "must be boolean"),
        (MASK[:3], "must have the leading dimensions"),
        (MASK.expand(3, EXAMPLES), "must have the leading dimensions"),
        (torch.ones(EXAMPLES, 2, 1, dtype=torch.bool), "must have the leading dimensions"),
    ],
)
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_masks_that_do_not_fit_are_named(fisher, mask, match):
    optimizer = make(Net(), fisher=fisher)
    x, y = BATCHES[0]
    with optimizer.sampled_params(), pytest.raises(TargetError, match=match):
        optimizer.likelihood(optimizer.model(x), y, mask)
