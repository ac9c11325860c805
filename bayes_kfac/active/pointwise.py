"""Acquisitions that judge every candidate by itself, from its prediction.

Each is a formula in what a prediction knows. Several outputs or positions of one example are summed, as everywhere.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bayes_kfac.active.base import Acquisition, check_scores, register
from bayes_kfac.active.predictors import ask, count, parts, predict
from bayes_kfac.prediction.classification import OfBinaryTargets


@dataclass(frozen=True, kw_only=True)
class Pointwise(Acquisition):
    """Judges every candidate by its own prediction.

    Its view is the prediction; or, where the candidates come from a ``DataLoader`` and may be more than memory holds,
    the scores of its batches alone.

    Args:
        method: How a posterior predicts, ``"linearized"`` or ``"sampling"``; by default its own choice.
        link: How class probabilities come from linearised logits, as in :meth:`bayes_kfac.Posterior.predict`.
        num_samples: The number of draws, likewise.
        memory_budget: The bytes that a linearised prediction may use, likewise.
    """

    method: str | None = None
    link: str | None = None
    num_samples: int | None = None
    memory_budget: int | None = None

    def look(self, predictor: Any, inputs: Any, *, generator: torch.Generator | None = None) -> Any:  # noqa: D102
        options = {field.name: getattr(self, field.name) for field in fields(Pointwise)}
        views = (predict(predictor, part, options, generator=generator) for part in parts(predictor, inputs))
        return torch.cat([self.judge(view) for view in views]) if isinstance(inputs, DataLoader) else next(views)

    def scores(self, view: Any) -> Tensor:
        """How good each candidate is, ``[n]``; the higher the better.

        Args:
            view: A prediction, or the scores themselves.

        Returns:
            The scores.

        Raises:
            ArgumentError: If they are not one for each candidate.
        """
        return check_scores(view if isinstance(view, Tensor) else self.judge(view))

    @abstractmethod
    def judge(self, prediction: Any) -> Tensor:
        """The scores of the examples of a prediction, ``[n]``."""


@register("variance")
class Variance(Pointwise):
    """The epistemic variance of the target's mean, summed over outputs: the trace of the function's covariance.

    For regression: MacKay (1992), "Information-based objective functions for active data selection", and Cohn,
    Ghahramani & Jordan (1996), who take the predictor's variance. In units of the target squared; outputs of different
    scales are better judged by :class:`BALD`. For classes it is the variance of the probabilities.
    """

    def judge(self, prediction: Any) -> Tensor:  # noqa: D102
        return _per_example(ask(prediction, "epistemic_variance", type(self).__name__))


@register("entropy")
class Entropy(Pointwise):
    """The entropy of the target in nats, noise and ignorance together (Shannon 1948; uncertainty sampling).

    It seeks out what is noisy as well as what is unknown; :class:`BALD` leaves the noise aside. Positions of one
    example are summed as if independent; of several real-valued outputs it is the joint differential entropy.
    """

    def judge(self, prediction: Any) -> Tensor:  # noqa: D102
        return _per_example(ask(prediction, "entropy", type(self).__name__))


@register("bald")
class BALD(Pointwise):
    """The information about the weights in one target, in nats: Bayesian active learning by disagreement.

    Houlsby, Huszár, Ghahramani & Lengyel (2011), equation 2; Lindley (1956). For classes ``H[y] − E H[y | w]`` over
    draws. For real-valued targets with noise ``R`` and epistemic covariance ``S`` it is ``½ log det(I + R⁻¹ S)``, exact
    for the linearised model, and a bound with ``method="sampling"``.
    """

    def judge(self, prediction: Any) -> Tensor:  # noqa: D102
        return _per_example(ask(prediction, "mutual_information", type(self).__name__))


@register("margin")
class Margin(Pointwise):
    """Minus the difference between the two highest class probabilities, in ``[−1, 0]``.

    Scheffer, Decomain & Wrobel (2001), "Active hidden Markov models for information extraction".
    """

    def judge(self, prediction: Any) -> Tensor:  # noqa: D102
        first, second = _class_probs(prediction, type(self).__name__).topk(2).values.unbind(-1)
        return _per_example(second - first)


@register("least_confidence")
class LeastConfidence(Pointwise):
    """One minus the highest class probability, in ``[0, 1]``. Lewis & Gale (1994)."""

    def judge(self, prediction: Any) -> Tensor:  # noqa: D102
        return _per_example(1 - _class_probs(prediction, type(self).__name__).amax(-1))


@register("variation_ratio")
class VariationRatio(Pointwise):
    """The share of the draws that do not vote for the class with the most votes, in ``[0, 1]``.

    Freeman (1965); by draws of the weights Gal, Islam & Ghahramani (2017), "Deep Bayesian active learning with image
    data". Each draw votes for its most probable class.
    """

    def judge(self, prediction: Any) -> Tensor:  # noqa: D102
        probs = all_classes(ask(prediction, "sampled_probs", type(self).__name__), prediction)
        votes = torch.nn.functional.one_hot(probs.argmax(-1), probs.shape[-1])
        return _per_example(1 - votes.sum(0).amax(-1) / len(votes))


@register("random")
class Random(Acquisition):
    """Numbers drawn at random: what every other acquisition has to beat. The predictor is not asked."""

    def look(self, predictor: Any, inputs: Any, *, generator: torch.Generator | None = None) -> Any:  # noqa: D102
        return torch.rand(count(inputs), generator=generator, dtype=torch.float64)

    def scores(self, view: Any) -> Tensor:  # noqa: D102
        return view


def all_classes(probs: Tensor, prediction: Any) -> Tensor:
    """Probabilities of all classes along the last dimension: of both, where a prediction's targets are binary."""
    return torch.stack([1 - probs, probs], -1) if isinstance(prediction, OfBinaryTargets) else probs


def _class_probs(prediction: Any, who: str) -> Tensor:
    return all_classes(ask(prediction, "probs", who), prediction)


def _per_example(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(1)
