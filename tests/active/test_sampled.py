"""Joint information over draws, against sums over all configurations written out in numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bayes_kfac.active import BALD, SampledGains, SampledPredictiveGains, greedy
from bayes_kfac.active.sampled import _systematic
from bayes_kfac.errors import ArgumentError, UsageError
from bayes_kfac.prediction import CategoricalPrediction
from tests.active.pools import SOURCE, binary, certain, classes
from tests.helpers import TIGHT, randn, rng


def entropy(probs: np.ndarray) -> float:
    probs = probs[probs > 0]
    return float(-(probs * np.log(probs)).sum())


def joint(probs: np.ndarray, indices: list[int]) -> np.ndarray:
    """The probability of every configuration of some candidates: a mean over draws of products."""
    draws, _, num_classes = probs.shape
    table = np.zeros([num_classes] * len(indices))
    for configuration in itertools.product(range(num_classes), repeat=len(indices)):
        table[configuration] = np.mean(
            [np.prod([probs[s, i, c] for i, c in zip(indices, configuration, strict=True)]) for s in range(draws)]
        )
    return table


def information(probs: np.ndarray, indices: list[int]) -> float:
    """BatchBALD: the entropy of all configurations less the mean entropy under each draw."""
    noise = sum(np.mean([entropy(draw) for draw in probs[:, i]]) for i in indices)
    return entropy(joint(probs, indices)) - noise if indices else 0.0


def predictive_information(probs: np.ndarray, targets: np.ndarray, indices: list[int]) -> float:
    """The mean over targets of ``I(batch; y*)``."""
    both = np.concatenate([probs, targets], 1)
    n = probs.shape[1]
    return float(
        np.mean(
            [
                entropy(joint(both, indices)) + entropy(joint(both, [n + m])) - entropy(joint(both, [*indices, n + m]))
                for m in range(targets.shape[1])
            ]
        )
    )


def test_scores_before_a_pick_are_bald():
    prediction = classes(6, 8, 3)
    assert_close(SampledGains(prediction).scores, BALD().scores(prediction), **TIGHT)


@given(st.integers(2, 5), st.integers(2, 3), st.integers(0, 100))
def test_gains_are_differences_of_joint_information_over_all_configurations(draws, num_classes, seed):
    prediction = classes(draws, 4, num_classes, seed=seed)
    probs = prediction.sampled_probs.numpy()
    gains, picked = SampledGains(prediction), []
    for index in (2, 0, 2):
        gains.add(index)
        picked.append(index)
        expected = [information(probs, [*picked, i]) - information(probs, picked) for i in range(4)]
        assert_close(gains.scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@given(st.integers(2, 4), st.integers(0, 100))
def test_predictive_gains_are_differences_over_all_configurations(draws, seed):
    prediction, targets = classes(draws, 3, 3, seed=seed), classes(draws, 2, 2, seed=seed + 1)
    probs, at_targets = prediction.sampled_probs.numpy(), targets.sampled_probs.numpy()
    at_targets = np.concatenate([at_targets, np.zeros_like(at_targets[..., :1])], -1)  # as many classes, for the oracle
    gains, picked = SampledPredictiveGains(prediction, targets), []
    for index in (1, 2):
        before = predictive_information(probs, at_targets, picked) if picked else 0.0
        expected = [predictive_information(probs, at_targets, [*picked, i]) - before for i in range(3)]
        assert_close(gains.scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        gains.add(index)
        picked.append(index)


def test_binary_targets_are_two_classes():
    prediction = binary(5, 6)
    two = CategoricalPrediction(torch.stack([torch.zeros_like(prediction.logits), prediction.logits], -1), SOURCE)
    for own in (prediction, binary(5, 6, 1)):
        gains, others = SampledGains(own), SampledGains(two)
        if own.logits.ndim == 2:
            gains.add(3)
            others.add(3)
            assert_close(gains.scores, others.scores, **TIGHT)
        assert gains.scores.shape == (6,)


def test_a_copy_of_a_noiseless_candidate_has_nothing_to_add():
    """Top-k takes both copies of the best, BatchBALD takes one of each pair."""
    prediction = certain([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]], 2)
    assert_close(SampledGains(prediction).scores, torch.full((4,), math.log(2), dtype=torch.float64), **TIGHT)
    picked = greedy(SampledGains(prediction), 2)
    assert {int(index) // 2 for index in picked} == {0, 1}
    gains = SampledGains(prediction)
    gains.add(0)
    assert gains.scores[1] == 0


def test_the_greedy_batch_is_the_best_of_all_batches_here():
    """Greedy reaches the optimum of an easy case, found by trying all pairs."""
    prediction = classes(6, 6, 3, scale=3)
    probs = prediction.sampled_probs.numpy()
    best = max(itertools.combinations(range(6), 2), key=lambda pair: information(probs, list(pair)))
    picked = greedy(SampledGains(prediction), 2)
    assert information(probs, picked.tolist()) >= (1 - 1 / math.e) * information(probs, list(best))
    assert sorted(picked.tolist()) == list(best)


@pytest.mark.parametrize("kind", ["weights", "predictions"])
def test_the_order_of_the_pool_does_not_matter(kind):
    logits, order = 3 * randn(6, 7, 3, seed=1), torch.randperm(7, generator=rng(0))

    def picked(own):
        prediction = CategoricalPrediction(own, SOURCE)
        gains = SampledGains(prediction) if kind == "weights" else SampledPredictiveGains(prediction, classes(6, 4, 3))
        return greedy(gains, 3)

    assert torch.equal(order[picked(logits[:, order])], picked(logits))


def test_parts_of_the_pool_give_the_same_scores():
    prediction, targets = classes(6, 20, 3), classes(6, 5, 3, seed=1)
    for make in (SampledGains, lambda own, **options: SampledPredictiveGains(own, targets, **options)):
        whole, parts = make(prediction), make(prediction, memory_budget=1)
        for gains in (whole, parts):
            gains.add(3)
        assert_close(parts.scores, whole.scores, **TIGHT)


def test_sampled_configurations_are_unbiased():
    """The mean over many runs with few configurations is the exact gain, to five standard errors."""
    prediction = classes(5, 6, 3)
    exact = SampledGains(prediction)
    runs = [SampledGains(prediction, num_configurations=4, generator=rng(seed)) for seed in range(300)]
    for index in (0, 1, 2):
        for gains in (exact, *runs):
            gains.add(index)
    assert len(exact.configurations.probs) == 27
    scores = torch.stack([gains.scores for gains in runs])
    error = scores.std(0) / math.sqrt(len(runs))
    assert ((scores.mean(0) - exact.scores).abs() < 5 * error + 1e-12).all()


def test_many_picks_stay_close_to_exact_ones():
    prediction = classes(20, 30, 2)
    exact = SampledGains(prediction, num_configurations=2**8)
    sampled = SampledGains(prediction, num_configurations=2**6, generator=rng(0))
    for index in range(8):
        exact.add(index)
        sampled.add(index)
    assert len(sampled.configurations.probs) <= 2**6
    assert_close(sampled.scores, exact.scores, rtol=0, atol=0.02)


def test_draws_hold_no_more_than_their_logarithm():
    """Gains of a long batch add up to at most ``log S``, and the last ones are nothing."""
    gains, total = SampledGains(classes(4, 12, 3, scale=6), generator=rng(0)), 0.0
    for index in range(12):
        total += float(gains.scores[index])
        gains.add(index)
    assert total <= math.log(4) + 1e-9
    assert gains.scores.max() < 0.02


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(1, 20), st.integers(0, 50))
def test_systematic_draws_are_within_one_of_their_expectation(weights, count, seed):
    probs = torch.tensor(weights, dtype=torch.float64)
    if probs.sum() < 1e-3:
        probs = probs + 1
    copies = _systematic(probs, count, rng(seed))
    assert copies.sum() == count
    assert (copies >= 0).all()
    assert ((copies - count * probs / probs.sum()).abs() < 1 + 1e-6).all()


def test_what_is_no_set_of_joint_draws_is_refused():
    with pytest.raises(ArgumentError, match="several targets"):
        SampledGains(CategoricalPrediction(randn(4, 5, 2, 3, seed=0), SOURCE))
    with pytest.raises(ArgumentError, match="5 draws and prediction 4"):
        SampledPredictiveGains(classes(4, 3, 2), classes(5, 3, 2))
    with pytest.raises(ArgumentError, match="num_configurations=0"):
        SampledGains(classes(4, 3, 2), num_configurations=0)
    with pytest.raises(UsageError, match="sampled_probs"):
        SampledGains(object())
