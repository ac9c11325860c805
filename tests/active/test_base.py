"""The contract: the best first, greedy picks, names, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac import active
from bayes_kfac.active import BALD, Acquisition, Gains, get, greedy, register
from bayes_kfac.active.base import _ACQUISITIONS
from bayes_kfac.errors import ArgumentError, NonFiniteError


class Given(Acquisition):
    """Scores that are the view."""

    def look(self, predictor, inputs, *, generator=None):
        return inputs

    def scores(self, view: Tensor) -> Tensor:
        return view


class Coverage(Gains):
    """How many new elements a set adds to those of the picked sets."""

    def __init__(self, sets: list[set[int]]) -> None:
        self.sets, self.covered = sets, set()

    @property
    def scores(self) -> Tensor:
        return torch.tensor([len(own - self.covered) for own in self.sets])

    def add(self, index: int) -> None:
        self.covered |= self.sets[index]


def test_the_highest_scores_are_selected_best_first():
    assert Given().select(torch.tensor([0.1, 3.0, -1.0, 2.0]), 3).tolist() == [1, 3, 0]


@pytest.mark.parametrize("scores", [torch.tensor([1, 2**53, 2**53 - 1]), torch.tensor([False, True, False])], ids=str)
def test_scores_may_be_counts_or_marks(scores):
    assert Given().select(scores, 1).tolist() == [1]


def test_greedy_takes_what_is_new_and_nothing_twice():
    sets = [{1, 2, 3}, {1, 2, 3}, {4, 5}, {3, 4}]
    assert greedy(Coverage(sets), 4).tolist() == [0, 2, 1, 3]


def test_a_name_is_one_line():
    register("given")(Given)
    try:
        assert "given" in active.available()
        assert isinstance(get("given"), Given)
    finally:
        del _ACQUISITIONS["given"]


def test_a_name_in_use_is_not_taken_but_by_the_same_class_defined_again():
    with pytest.raises(ArgumentError, match=r"name='bald' is that of bayes_kfac.active.pointwise.BALD"):
        register("bald")(Given)
    assert isinstance(get("bald"), BALD)
    register("bald")(BALD)
    with pytest.raises(ArgumentError, match="is not a string"):
        register(Given)


@pytest.mark.parametrize(
    ("scores", "message"),
    [(np.zeros(3), r"ndarray.*torch\.as_tensor"), (torch.zeros(3, 1), r"shape \(3, 1\).*\(n,\), one for each")],
)
def test_scores_are_one_number_for_each_candidate(scores, message):
    with pytest.raises(ArgumentError, match=message):
        Given().select(scores, 1)


@pytest.mark.parametrize("name", active.available())
def test_every_name_makes_an_acquisition(name):
    assert isinstance(get(name), Acquisition)


def test_an_acquisition_stays_itself():
    acquisition = BALD(num_samples=3)
    assert get(acquisition) is acquisition


@pytest.mark.parametrize("wrong", ["bold", None, BALD])
def test_no_acquisition_is_an_error_that_lists_them(wrong):
    with pytest.raises(ArgumentError, match="'bald', 'batch_bald'"):
        get(wrong)


@pytest.mark.parametrize("count", [0, 4, 1.5, True])
def test_counts_are_between_one_and_all(count):
    with pytest.raises(ArgumentError, match="count="):
        Given().select(torch.zeros(3), count)
    with pytest.raises(ArgumentError, match="count="):
        greedy(Coverage([{1}, {2}, {3}]), count)


def test_nan_is_not_the_highest_score():
    with pytest.raises(NonFiniteError, match="2 of 3 scores are NaN, the first that of candidate 1"):
        Given().select(torch.tensor([1.0, torch.nan, torch.nan]), 1)


def test_minus_infinity_is_selected_last():
    assert_close(Given().select(torch.tensor([-torch.inf, 1.0]), 2), torch.tensor([1, 0]))
