"""Information about weights and about other targets, for classes, over draws of the weights.

What was picked is known by *configurations*: the classes ``ŷ`` that the picked candidates may turn out to have
together. Each has a probability ``p(ŷ)``, and says how probable each draw is given it, ``p(s | ŷ)``. Information given
the picked candidates is the mean over configurations of information under those weights of the draws. All of them are
kept while there are few; beyond that they are drawn. Sums are in float64. ``S`` draws hold at most ``log S`` nats: as a
batch comes near it all gains go to zero, and more draws are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bayes_kfac.active.base import Gains
from bayes_kfac.active.pointwise import all_classes
from bayes_kfac.active.predictors import ask
from bayes_kfac.errors import ArgumentError, check_count, check_generator
from bayes_kfac.prediction import MEMORY_BUDGET

#: Tensors of the largest size that the entropies of a chunk hold at once.
COPIES = 4


class Configurations:
    """The classes that picked candidates may have together, and what each says of the draws.

    Attributes:
        probs: ``p(ŷ)``, ``[K]``; they sum to 1.
        weights: ``p(s | ŷ)``, ``[K, S]``; rows sum to 1.

    Args:
        num_samples: How many draws there are.
        limit: How many configurations are kept.
        generator: The source of randomness, where there are more.
        like: A tensor on the device to be on.
    """

    def __init__(self, num_samples: int, limit: int, generator: torch.Generator | None, like: Tensor) -> None:
        self.limit = check_count("num_configurations", limit)
        self.generator = check_generator(generator)
        self.probs = torch.ones(1, dtype=torch.float64, device=like.device)
        self.weights = torch.full((1, num_samples), 1 / num_samples, dtype=torch.float64, device=like.device)

    def add(self, probs: Tensor) -> None:
        """Make a configuration of each and every class of another candidate.

        Where that is more than the limit, as many as the limit are drawn systematically, each in proportion to its
        probability: any average over configurations stays unbiased.

        Args:
            probs: Its class probabilities under each draw, ``[S, classes]``.
        """
        joint = torch.einsum("ks,sc->kcs", self.weights, probs.double()).flatten(0, 1)
        given = joint.sum(1)
        self.probs = self.probs.repeat_interleave(probs.shape[1]) * given
        kept = (self.probs > 0).nonzero().squeeze(1)
        if len(kept) > self.limit:
            copies = _systematic(self.probs, self.limit, self.generator)
            kept = copies.nonzero().squeeze(1)
            self.probs = copies / self.limit
        self.probs = self.probs[kept] / self.probs[kept].sum()
        self.weights = joint[kept] / given[kept].unsqueeze(1)


class SampledGains(Gains):
    """Information about the weights in each candidate's class given those of the picked ones, in nats: BatchBALD.

    Kirsch, van Amersfoort & Gal (2019), "BatchBALD", section 3: ``H[y, ŷ] − H[ŷ] − E H[y | w]``. By the chain rule the
    gains of picked candidates add up to the joint information of the batch. The paper evaluates joint entropies; here
    ``H[y, ŷ] − H[ŷ]`` is the mean over configurations of ``H[y | ŷ]``, which stays accurate where both are large.

    Args:
        prediction: Of the candidates, with ``sampled_probs`` ``[S, n, classes]``, the same functions for all of them;
            or ``[S, n]`` of binary targets.
        num_configurations: Exact while the picked candidates have no more configurations than this, sampled beyond.
        generator: The source of randomness for that.
        memory_budget: The bytes that configurations by candidates may take up; more candidates go through in parts.
    """

    def __init__(
        self,
        prediction: Any,
        *,
        num_configurations: int = 1024,
        generator: torch.Generator | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        self.probs = class_draws(prediction)
        self.configurations = Configurations(len(self.probs), num_configurations, generator, self.probs)
        self.memory_budget = check_count("memory_budget", memory_budget)
        self._noise = torch.cat([_entropy(part) for part in self._parts()], dim=1)

    @property
    def scores(self) -> Tensor:
        """``H[y | ŷ] − E H[y | w]`` of each candidate, ``[n]``, both under the same configurations."""
        known = self.configurations
        entropy = [known.probs @ _entropy(torch.einsum("ks,snc->knc", known.weights, part)) for part in self._parts()]
        return (torch.cat(entropy) - known.probs @ known.weights @ self._noise).clamp(min=0)

    def add(self, index: int) -> None:  # noqa: D102
        self.configurations.add(self.probs[:, index])

    def _parts(self) -> Iterator[Tensor]:
        """The candidates in parts whose probabilities given all configurations fit into the budget."""
        rows = len(self.configurations.probs) + len(self.probs)
        return _in_parts(self.probs, rows * self.probs.shape[2], self.memory_budget)


class SampledPredictiveGains(Gains):
    """Expected information in each candidate's class about a target's elsewhere, in nats: EPIG.

    Bickford Smith, Kirsch, Farquhar, Gal, Foster & Rainforth (2023), "Prediction-oriented Bayesian active learning",
    equation 5: the mean over target inputs ``x*`` of ``I(y; y* | x, x*)``, from joint probabilities over draws. Given
    what was picked it is the mean over configurations, so that gains of picked candidates add up to the mean of
    ``I(ŷ; y* | x*)``. Other than information about the weights it is not submodular: the greedy choice has no bound.

    Args:
        prediction: Of the candidates, as in :class:`SampledGains`.
        target_prediction: Of the target inputs, by the same draws.
        num_configurations: Exact while the picked candidates have no more configurations than this, sampled beyond.
            Every configuration costs as much as scoring the whole pool once.
        generator: The source of randomness for that.
        memory_budget: The bytes that joint probabilities may take up; more candidates go through in parts.

    Raises:
        ArgumentError: If the two do not have the same number of draws.
    """

    def __init__(
        self,
        prediction: Any,
        target_prediction: Any,
        *,
        num_configurations: int = 16,
        generator: torch.Generator | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        self.probs, self.target_probs = class_draws(prediction), class_draws(target_prediction)
        if len(self.probs) != len(self.target_probs):
            raise ArgumentError(
                f"target_prediction has {len(self.target_probs)} draws and prediction {len(self.probs)}. Allowed: "
                "predictions by the same draws, posterior.predict(..., draws=draws)."
            )
        self.configurations = Configurations(len(self.probs), num_configurations, generator, self.probs)
        self.memory_budget = check_count("memory_budget", memory_budget)

    @property
    def scores(self) -> Tensor:
        """The mean over target inputs of ``H[y | ŷ] + H[y* | ŷ] − H[y, y* | ŷ]``, ``[n]``."""
        targets = self.target_probs.double()
        parts = _in_parts(self.probs, self.probs.shape[2] * (targets[0].numel() + len(targets)), self.memory_budget)
        return torch.cat([self._information(part, targets) for part in parts]).clamp(min=0)

    def _information(self, probs: Tensor, targets: Tensor) -> Tensor:
        total = probs.new_zeros(probs.shape[1])
        for probability, weights in zip(self.configurations.probs, self.configurations.weights, strict=True):
            weighted = weights.reshape(-1, 1, 1) * probs
            of_target = _entropy(torch.einsum("s,smd->md", weights, targets))
            of_both = torch.special.entr(torch.einsum("snc,smd->ncmd", weighted, targets)).sum((1, 3))
            total += probability * (_entropy(weighted.sum(0)) + of_target.mean() - of_both.mean(1))
        return total

    def add(self, index: int) -> None:  # noqa: D102
        self.configurations.add(self.probs[:, index])


def class_draws(prediction: Any) -> Tensor:
    """Class probabilities under each draw, ``[S, n, classes]``; of binary targets the two classes.

    Args:
        prediction: What knows ``sampled_probs``.

    Returns:
        The probabilities, in their own dtype.

    Raises:
        ArgumentError: If an example has several targets, or the draws are not of the same functions for all examples.
    """
    probs = all_classes(ask(prediction, "sampled_probs", "Information about several targets together"), prediction)
    if probs.ndim == 4 and probs.shape[2] == 1:
        probs = probs.squeeze(2)
    if probs.ndim != 3:
        raise ArgumentError(
            f"sampled_probs of shape {tuple(probs.shape)} have several targets for each example. Allowed: [draws, n, "
            "classes]. Acquisitions that judge each candidate by itself, such as BALD, sum over targets."
        )
    return probs


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)


def _in_parts(probs: Tensor, size: int, memory_budget: int) -> Iterator[Tensor]:
    """Parts of the candidates, in float64, where each candidate makes tensors of ``size`` elements."""
    for part in probs.split(max(1, memory_budget // (8 * COPIES * size)), dim=1):
        yield part.double()


def _systematic(probs: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """How often each of some outcomes is drawn, ``count`` in all, none by more than 1 off its expectation."""
    offset = torch.rand((), generator=generator, dtype=torch.float64).item()
    ends = (probs.cumsum(0) / probs.sum() * count - offset).ceil()
    ends[-1] = count
    return ends.diff(prepend=ends.new_zeros(1))
