"""The contract of an acquisition: it looks at a pool through a predictor, and selects the examples to label.

What it looks at, its *view*, is a prediction of the whole pool where every candidate is judged by itself, and a
:class:`Gains` where it matters what else is picked. Scores are ``[n]``, one for each candidate, and the higher is the
better; information is in nats. Selections are indices into the pool, ``[count]``, distinct, best first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from bayes_kfac.errors import ArgumentError, check_count


class Gains(ABC):
    """What each candidate would add to those that were picked so far."""

    @property
    @abstractmethod
    def scores(self) -> Tensor:
        """The gain of each candidate given the picked ones, ``[n]``."""

    @abstractmethod
    def add(self, index: int) -> None:
        """Pick a candidate.

        Args:
            index: Which.
        """


class Acquisition(ABC):
    """Judges the candidates of a pool."""

    @abstractmethod
    def look(self, predictor: Any, inputs: Any, *, generator: torch.Generator | None = None) -> Any:
        """What this acquisition needs to know of the candidates.

        Args:
            predictor: A posterior, or anything that predicts.
            inputs: The candidates.
            generator: The source of randomness.

        Returns:
            The view, for :meth:`scores` and :meth:`select`.
        """

    @abstractmethod
    def scores(self, view: Any) -> Tensor:
        """How good each candidate is by itself, ``[n]``; the higher the better."""

    def select(self, view: Any, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """The candidates to label: here those with the highest scores.

        Args:
            view: From :meth:`look`.
            count: How many.
            generator: The source of randomness, for acquisitions that draw.

        Returns:
            Their indices, ``[count]``, distinct, best first.

        Raises:
            ArgumentError: If there are fewer candidates.
        """
        scores = self.scores(view)
        check_enough(count, len(scores))
        return scores.topk(count).indices


def greedy(gains: Gains, count: int) -> Tensor:
    """Pick the candidate with the greatest gain, again and again.

    For a monotone submodular gain, such as information about the weights, the result is at least ``1 − 1/e`` of the
    best (Nemhauser, Wolsey and Fisher, 1978).

    Args:
        gains: The gains; the picked candidates are added to it.
        count: How many.

    Returns:
        Their indices, ``[count]``, in the order in which they were picked.

    Raises:
        ArgumentError: If there are fewer candidates.
    """
    picked: list[int] = []
    for _ in range(check_count("count", count)):
        scores = gains.scores.clone()
        check_enough(count, len(scores))
        scores[picked] = -torch.inf
        picked.append(int(scores.argmax()))
        gains.add(picked[-1])
    return torch.tensor(picked)


def check_enough(count: int, candidates: int) -> None:
    """See that there are as many candidates as shall be picked.

    Args:
        count: How many to pick.
        candidates: How many there are.

    Raises:
        ArgumentError: If there are fewer.
    """
    if check_count("count", count) > candidates:
        raise ArgumentError(f"count={count} is more than the {candidates} candidates. Allowed: 1 to {candidates}.")
