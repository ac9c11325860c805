"""Stochastic batches: the best scores after noise is added to them, a cheap way to batches that are diverse.

Kirsch, Farquhar, Atighehchian, Jesson, Branchaud-Charron & Gal (2023), "Stochastic batch acquisition: a simple baseline
for deep active learning". The top ``count`` of scores plus Gumbel noise are a draw without replacement in proportion to
the exponential of the scores, one after another (Gumbel top-k; Kool, van Hoof & Welling 2019).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from bayes_kfac.active.base import Acquisition, check_numbers, check_scores, get, highest, register
from bayes_kfac.active.pointwise import BALD
from bayes_kfac.errors import ArgumentError, check_generator, check_positive


class Stochastic(Acquisition):
    """An acquisition whose batches are drawn rather than taken from the top.

    Args:
        acquisition: The one whose scores they are, or its name.
        coldness: How strongly high scores are preferred: at 0 not at all, and the larger the nearer to the top.
    """

    def __init__(self, acquisition: Acquisition | str, coldness: float = 1.0) -> None:
        self.acquisition = get(acquisition)
        self.coldness = check_positive("coldness", coldness, allow_zero=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.acquisition!r}, coldness={self.coldness})"

    def look(self, predictor: Any, inputs: Any, *, generator: torch.Generator | None = None) -> Any:  # noqa: D102
        return self.acquisition.look(predictor, inputs, generator=generator)

    def scores(self, view: Any) -> Tensor:
        """The scores of the acquisition, ``[n]``, without noise.

        Args:
            view: Its view.

        Returns:
            The scores.
        """
        return self.acquisition.scores(view)

    def select(self, view: Any, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw candidates without replacement.

        Args:
            view: The acquisition's view.
            count: How many.
            generator: The source of randomness.

        Returns:
            Their indices, ``[count]``, in the order in which they were drawn.

        Raises:
            ArgumentError: If there are fewer candidates.
            NonFiniteError: If a score is not a number.
        """
        scores = check_numbers(check_scores(self.scores(view))).double().cpu()  # a rank would hide a NaN
        uniform = torch.rand(len(scores), generator=check_generator(generator), dtype=torch.float64)
        gumbel = -(-uniform.log()).log()
        return highest(self.coldness * self.potential(scores) + gumbel, count)

    @abstractmethod
    def potential(self, scores: Tensor) -> Tensor:
        """The log-odds of scores ``[n]`` at a coldness of 1."""


class Softmax(Stochastic):
    """Draws in proportion to ``exp(coldness · score)``."""

    def potential(self, scores: Tensor) -> Tensor:  # noqa: D102
        return scores


class Power(Stochastic):
    """Draws in proportion to ``score ** coldness``, for scores that are not negative: zeros are drawn last."""

    def potential(self, scores: Tensor) -> Tensor:
        """The logarithm of the scores.

        Args:
            scores: ``[n]``.

        Returns:
            The log-odds.

        Raises:
            ArgumentError: If a score is negative.
        """
        if bool((scores < 0).any()):
            raise ArgumentError(
                f"A score of {float(scores.min())} has no power. Allowed: scores >= 0, such as those of BALD. Use "
                "Softmax or Softrank for the others."
            )
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()  # zeros stay in the draw, behind all others


class Softrank(Stochastic):
    """Draws in proportion to ``rank ** −coldness``; the highest score has rank 1, and its scale has no effect."""

    def potential(self, scores: Tensor) -> Tensor:  # noqa: D102
        ranks = scores.argsort(descending=True, stable=True).argsort() + 1
        return -ranks.to(scores).log()


@register("power_bald")
class PowerBALD(Power):
    """:class:`Power` of :class:`BALD`, which the paper recommends.

    Args:
        coldness: As in :class:`Power`.
        options: Those of :class:`BALD`.
    """

    def __init__(self, coldness: float = 1.0, **options: Any) -> None:
        super().__init__(BALD(**options), coldness)


@register("softmax_bald")
def _softmax_bald() -> Softmax:
    return Softmax(BALD())


@register("softrank_bald")
def _softrank_bald() -> Softrank:
    return Softrank(BALD())
