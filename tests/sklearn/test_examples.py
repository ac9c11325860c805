"""Examples are a weighted set: rows, repetition and order do not matter, and batches hold them by their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayes_kfac.sklearn.examples import COPIES, Batches, Examples

WHOLE = st.lists(st.integers(0, 5), min_size=2, max_size=12).filter(any)
REAL = st.lists(st.floats(0.01, 10.0), min_size=2, max_size=12)


def examples(weights, seed=0):
    random = np.random.RandomState(seed)
    return Examples.of(random.randn(len(weights), 3), random.randn(len(weights), 1), np.asarray(weights, float))


@given(WHOLE, st.integers(0, 99))
def test_whole_weights_are_repeated_rows_in_any_order(weights, seed):
    random = np.random.RandomState(seed)
    x, y = random.randn(len(weights), 2), random.randn(len(weights), 2)
    order = random.permutation(np.repeat(np.arange(len(weights)), weights))
    weighted = Examples.of(x, y, np.asarray(weights, float))
    repeated = Examples.of(x[order], y[order], np.ones(len(order)))
    for name in ("inputs", "targets", "weights"):
        np.testing.assert_array_equal(getattr(weighted, name), getattr(repeated, name))
    assert weighted.total == sum(weights)


@given(REAL, st.integers(1, 40), st.integers(0, 99))
def test_draws_are_in_proportion_to_weights_as_nearly_as_whole_numbers_allow(weights, count, seed):
    own = examples(weights)
    drawn = np.bincount(own.drawn(count, np.random.RandomState(seed)), minlength=len(own))
    expected = own.weights / own.total * count
    assert drawn.sum() == count
    assert (drawn >= np.floor(expected - 1e-9)).all()
    assert (drawn <= np.ceil(expected + 1e-9)).all()


def test_draws_are_unbiased():
    own, random = examples([0.3, 1.0, 2.2, 0.1]), np.random.RandomState(0)
    counts = np.stack([np.bincount(own.drawn(5, random), minlength=4) for _ in range(4000)])
    np.testing.assert_allclose(counts.mean(0), own.weights / own.total * 5, atol=0.04)


@pytest.mark.parametrize("weight", [1.0, 0.1, 3.0])
def test_draws_of_equal_weights_are_permutations(weight):
    own = examples([weight] * 7)
    for seed in range(20):
        assert sorted(own.drawn(7, np.random.RandomState(seed))) == list(range(7))


@given(WHOLE)
def test_the_whole_has_whole_weights_exactly(weights):
    own = examples(weights)
    counts = np.bincount(own.whole(np.random.RandomState(0)))
    np.testing.assert_array_equal(counts * own.total, own.weights * counts.sum())  # equal weights need one copy only


def test_the_whole_has_equal_weights_once_and_others_to_a_tenth_of_their_mean():
    random = np.random.RandomState(0)
    assert list(examples([0.25] * 4).whole(random)) == [0, 1, 2, 3]
    own = examples([0.37, 1.0, np.pi, 2.0])
    counts = np.bincount(own.whole(random))
    np.testing.assert_allclose(counts / COPIES, own.weights / own.weights.mean(), atol=1 / COPIES)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_parts_of_a_split_are_disjoint_and_not_empty(fraction):
    own = examples(np.arange(1.0, 11.0))
    training, held = own.split(fraction, np.random.RandomState(0), stratified=False)
    both = np.concatenate([training.weights, held.weights])
    assert sorted(both) == sorted(own.weights)
    assert len(training)
    assert len(held) == min(max(round(fraction * 10), 1), 9)


def test_a_stratified_split_has_its_share_of_each_class():
    random = np.random.RandomState(0)
    own = Examples.of(random.randn(100, 2), np.repeat([0.0, 1.0, 2.0], [70, 20, 10])[:, None], np.ones(100))
    _, held = own.split(0.1, random, stratified=True)
    assert np.bincount(held.targets[:, 0].astype(int)).tolist() == [7, 2, 1]


@given(st.integers(1, 30), st.integers(1, 12))
def test_batches_of_nearly_equal_sizes_hold_everything_once(count, size):
    own = examples([1.0] * count)
    batches = Batches(
        own, size, np.random.RandomState(0), device=torch.device("cpu"), dtype=torch.float64, has_classes=False
    )
    parts = list(batches)
    sizes = [len(inputs) for inputs, _ in parts]
    assert len(parts) == len(batches)
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    everything = torch.cat([inputs for inputs, _ in parts])
    assert sorted(everything[:, 0].tolist()) == sorted(own.inputs[:, 0].tolist())
