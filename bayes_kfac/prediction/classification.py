"""Predictions of discrete targets: probabilities under each draw, averaged as probabilities, never as logits.

The entropy of the average splits into the expected entropy, which is noise, and the mutual information between target
and weights, which more data would remove. All are in nats.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from bayes_kfac import likelihoods, linalg
from bayes_kfac.prediction.results import Prediction, Source, from_gaussian, from_outputs


class ClassificationPrediction(Prediction):
    """What the predictions of discrete targets share."""

    @cached_property
    @abstractmethod
    def sampled_probs(self) -> Tensor:
        """Probabilities under each draw, ``[num_samples, batch, ...]``."""

    @property
    def probs(self) -> Tensor:
        """The predictive probabilities."""
        return self.sampled_probs.mean(0)

    @property
    def mean(self) -> Tensor:
        """The predictive probabilities."""
        return self.probs

    @property
    def epistemic_variance(self) -> Tensor:
        """The variance of each probability over draws."""
        return self.sampled_probs.var(0, correction=0)

    @property
    def aleatoric_variance(self) -> Tensor:
        """The expected ``p (1 − p)`` of each class."""
        return (self.sampled_probs * (1 - self.sampled_probs)).mean(0)

    @property
    @abstractmethod
    def entropy(self) -> Tensor:
        """The entropy of the predictive probabilities."""

    @property
    @abstractmethod
    def expected_entropy(self) -> Tensor:
        """The mean over draws of the entropy: the part that is noise."""

    @property
    def mutual_information(self) -> Tensor:
        """The mutual information between target and weights: the part that more data would remove."""
        return (self.entropy - self.expected_entropy).clamp(min=0)


@dataclass(frozen=True)
class CategoricalPrediction(ClassificationPrediction):
    """A prediction of one of several classes.

    Attributes:
        logits: ``[num_samples, batch, ..., classes]``.
        source: Where the prediction came from.
    """

    logits: Tensor
    source: Source

    @cached_property
    def sampled_probs(self) -> Tensor:
        """Class probabilities under each draw, ``[num_samples, batch, ..., classes]``."""
        return self.logits.softmax(-1)

    @property
    def entropy(self) -> Tensor:
        """The entropy of the predictive probabilities, ``[batch, ...]``."""
        return torch.special.entr(self.probs).sum(-1)

    @property
    def expected_entropy(self) -> Tensor:
        """The mean over draws of the entropy, ``[batch, ...]``."""
        return torch.special.entr(self.sampled_probs).sum(-1).mean(0)

    @property
    def distribution(self) -> Distribution:
        """``Categorical`` over ``[batch, ...]`` class indices."""
        return Categorical(probs=self.probs)

    def log_prob(self, target: Tensor) -> Tensor:
        """The log-probability of each example's classes, ``[batch]``: the mean over draws is of joint probabilities."""
        likelihoods.Categorical().check(self.logits[0], target)
        index = target.expand(self.logits.shape[:-1]).unsqueeze(-1)
        chosen = self.logits.log_softmax(-1).gather(-1, index.long()).squeeze(-1)
        return _log_mean_exp(_sum_events(chosen))


@dataclass(frozen=True)
class BernoulliPrediction(ClassificationPrediction):
    """A prediction of binary targets.

    Attributes:
        logits: ``[num_samples, batch, ...]``.
        source: Where the prediction came from.
    """

    logits: Tensor
    source: Source

    @cached_property
    def sampled_probs(self) -> Tensor:
        """The probability of 1 under each draw, ``[num_samples, batch, ...]``."""
        return self.logits.sigmoid()

    @property
    def entropy(self) -> Tensor:
        """The entropy of each binary target, ``[batch, ...]``."""
        return _binary_entropy(self.probs)

    @property
    def expected_entropy(self) -> Tensor:
        """The mean over draws of the entropy, ``[batch, ...]``."""
        return _binary_entropy(self.sampled_probs).mean(0)

    @property
    def distribution(self) -> Distribution:
        """``Bernoulli`` over ``[batch, ...]``."""
        return Bernoulli(probs=self.probs)

    def log_prob(self, target: Tensor) -> Tensor:
        """The log-probability of each example's targets, ``[batch]``."""
        likelihoods.Bernoulli().check(self.logits[0], target)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            self.logits, target.to(self.logits).expand_as(self.logits), reduction="none"
        )
        return _log_mean_exp(_sum_events(-losses))


def _binary_entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs) + torch.special.entr(1 - probs)


def _sum_events(log_probs: Tensor) -> Tensor:
    return log_probs.flatten(2).sum(2) if log_probs.ndim > 2 else log_probs


def _log_mean_exp(log_probs: Tensor) -> Tensor:
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def _gaussian_draws(mean: Tensor, covariance: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draws of a Gaussian output, ``[num_samples, *mean.shape]``."""
    values, vectors = linalg.eigh(covariance, ["output covariance"])
    root = vectors * values.sqrt().unsqueeze(-2)
    shape = (num_samples, *root.shape[:-1])
    noise = torch.randn(shape, dtype=root.dtype, device=root.device, generator=generator)
    return mean + torch.einsum("bij,sbj->sbi", root, noise).reshape(num_samples, *mean.shape)


@from_gaussian.register
def _(
    likelihood: likelihoods.Categorical | likelihoods.Bernoulli,
    mean: Tensor,
    covariance: Tensor,
    source: Source,
    *,
    num_samples: int,
    generator: torch.Generator | None,
) -> Prediction:
    logits = _gaussian_draws(mean, covariance, num_samples, generator)
    return from_outputs(likelihood, logits, replace(source, num_samples=num_samples))


@from_outputs.register
def _(likelihood: likelihoods.Categorical, outputs: Tensor, source: Source) -> CategoricalPrediction:
    return CategoricalPrediction(outputs, source)


@from_outputs.register
def _(likelihood: likelihoods.Bernoulli, outputs: Tensor, source: Source) -> BernoulliPrediction:
    return BernoulliPrediction(outputs, source)
