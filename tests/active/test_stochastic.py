"""The stochastic family: draws without replacement in proportion to what the paper says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from bayes_kfac.active import BALD, EPIG, Entropy, Power, PowerBALD, Softmax, Softrank, get
from bayes_kfac.errors import ArgumentError, NonFiniteError
from tests.active.pools import certain, classes, pool, posterior
from tests.active.test_base import Given
from tests.helpers import rng

SCORES = torch.tensor([0.2, 1.5, 0.7], dtype=torch.float64)
#: Of each score at coldness 2: its weight in the draw.
WEIGHTS = {Power: SCORES**2, Softmax: (2 * SCORES).exp(), Softrank: torch.tensor([3.0, 1.0, 2.0]).double() ** -2}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_ordered_batches_have_the_probabilities_of_draws_without_replacement(kind):
    """Against the product formula for each ordered pair, within five standard errors."""
    acquisition, generator, runs = kind(Given(), coldness=2.0), rng(0), 4000
    drawn = [tuple(acquisition.select(SCORES, 2, generator=generator).tolist()) for _ in range(runs)]
    weights = WEIGHTS[kind]
    for first, second in itertools.permutations(range(3), 2):
        p = float(weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first]))
        assert abs(drawn.count((first, second)) / runs - p) < 5 * (p * (1 - p) / runs) ** 0.5


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_colder_the_nearer_to_the_top(kind):
    assert kind(Given(), coldness=1e6).select(SCORES, 3, generator=rng(0)).tolist() == [1, 2, 0]


def test_scores_are_those_of_the_acquisition():
    prediction = classes(5, 6, 3)
    assert_close(PowerBALD().scores(prediction), BALD().scores(prediction))
    view = PowerBALD(num_samples=7).look(posterior(), pool())
    assert view.source.num_samples == 7


def test_zero_power_is_drawn_last_and_in_any_order():
    prediction = certain([[0, 0, 0, 0], [0, 0, 1, 0]], 2)
    batches = {tuple(PowerBALD().select(prediction, 4, generator=rng(seed)).tolist()) for seed in range(20)}
    assert {batch[0] for batch in batches} == {2}
    assert len(batches) > 3


def test_power_needs_scores_that_are_not_negative():
    with pytest.raises(ArgumentError, match=r"A score of -1.0 has no power.*Softmax or Softrank"):
        Power(Given()).select(torch.tensor([1.0, -1.0]), 1)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_is_no_number_has_no_rank(kind):
    with pytest.raises(NonFiniteError, match="1 of 3 scores are NaN, the first that of candidate 1"):
        kind(Given()).select(torch.tensor([1.0, torch.nan, 2.0]), 1)


def test_names_and_wrong_options():
    assert repr(Softmax("entropy", 2)) == f"Softmax({Entropy()!r}, coldness=2.0)"
    assert isinstance(get("softmax_bald").acquisition, BALD)
    assert isinstance(get("softrank_bald").acquisition, BALD)
    with pytest.raises(ArgumentError, match="coldness=-1"):
        PowerBALD(-1)


def test_joint_acquisitions_lend_their_first_scores():
    acquisition = Power(EPIG(pool(3)))
    assert len(acquisition.select(acquisition.look(posterior(), pool()), 4, generator=rng(0)).unique()) == 4
