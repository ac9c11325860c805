"""Predictions of discrete targets: probabilities under each draw, averaged as probabilities, never as logits.

The entropy of the average splits into the expected entropy, which is noise, and the mutual information between target
and weights, which more data would remove. All are in nats. Which class it is depends on two things: the target, one of
several classes or binary; and what is known of the probabilities, draws of them or only their mean.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from bayes_kfac import likelihoods
from bayes_kfac.errors import UsageError
from bayes_kfac.prediction.quadrature import log_mean_exp
from bayes_kfac.prediction.results import Prediction, Source, batch_dim, from_outputs


class ClassificationPrediction(Prediction):
    """What the predictions of discrete targets share.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> laplace = bk.Laplace(torch.nn.Linear(2, 3), bk.likelihoods.Categorical())
        >>> posterior = laplace.fit([(torch.eye(2), torch.tensor([0, 2]))], progress=False).posterior()
        >>> p = posterior.predict(torch.eye(2))
        >>> torch.allclose(p.entropy, p.expected_entropy + p.mutual_information)
        True
    """

    @property
    @abstractmethod
    def probs(self) -> Tensor:
        """The predictive probabilities."""

    @property
    def mean(self) -> Tensor:
        """The predictive probabilities."""
        return self.probs

    @property
    def entropy(self) -> Tensor:
        """The entropy of the predictive probabilities, ``[batch, ...]``."""
        return self._entropy(self.probs)

    @property
    @abstractmethod
    def expected_entropy(self) -> Tensor:
        """The mean over the weights of the entropy, ``[batch, ...]``: the part that is noise."""

    @property
    def mutual_information(self) -> Tensor:
        """The mutual information between target and weights: the part that more data would remove."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @staticmethod
    @abstractmethod
    def _entropy(probs: Tensor) -> Tensor:
        """The entropy of a target with the given probabilities."""


# What the target is


class OfClasses(ClassificationPrediction):
    """The target is one of several classes: probabilities are ``[batch, ..., classes]``."""

    @property
    def distribution(self) -> Distribution:
        """``Categorical`` over ``[batch, ...]`` class indices."""
        return Categorical(probs=self.probs)

    @staticmethod
    def _entropy(probs: Tensor) -> Tensor:
        return torch.special.entr(probs).sum(-1)


class OfBinaryTargets(ClassificationPrediction):
    """The targets are binary: the probabilities of 1 are ``[batch, ...]``."""

    @property
    def distribution(self) -> Distribution:
        """``Bernoulli`` over ``[batch, ...]``."""
        return Bernoulli(probs=self.probs)

    @staticmethod
    def _entropy(probs: Tensor) -> Tensor:
        return torch.special.entr(probs) + torch.special.entr(1 - probs)


# What is known of the probabilities


class ByDraws(ClassificationPrediction):
    """Draws of the probabilities are known, and with them everything else."""

    @property
    @abstractmethod
    def sampled_probs(self) -> Tensor:
        """Probabilities under each draw, ``[num_samples, batch, ...]``."""

    @property
    def probs(self) -> Tensor:
        """The predictive probabilities: the mean over draws."""
        return self.sampled_probs.mean(0)

    @property
    def epistemic_variance(self) -> Tensor:
        """The variance of each probability over draws."""
        return self.sampled_probs.var(0, correction=0)

    @property
    def aleatoric_variance(self) -> Tensor:
        """The expected ``p (1 − p)`` of each class."""
        return (self.sampled_probs * (1 - self.sampled_probs)).mean(0)

    @property
    def expected_entropy(self) -> Tensor:
        """The mean over draws of the entropy, ``[batch, ...]``: the part that is noise."""
        return self._entropy(self.sampled_probs).mean(0)


class ByMeans(ClassificationPrediction):
    """Only the mean probabilities are known: enough to score a target, not to tell noise from ignorance."""

    @property
    def variance(self) -> Tensor:
        """The variance of the target, one-hot or binary: ``p (1 − p)``, however it splits."""
        return self.probs * (1 - self.probs)

    @property
    def epistemic_variance(self) -> Tensor:
        """Unknown: a :class:`~bayes_kfac.errors.UsageError`."""
        raise self._unknown("epistemic_variance")

    @property
    def aleatoric_variance(self) -> Tensor:
        """Unknown: a :class:`~bayes_kfac.errors.UsageError`."""
        raise self._unknown("aleatoric_variance")

    @property
    def expected_entropy(self) -> Tensor:
        """Unknown: a :class:`~bayes_kfac.errors.UsageError`."""
        raise self._unknown("expected_entropy")

    @property
    def mutual_information(self) -> Tensor:
        """Unknown: a :class:`~bayes_kfac.errors.UsageError`."""
        raise self._unknown("mutual_information")

    def _unknown(self, name: str) -> UsageError:
        return UsageError(
            f"{name} is unknown: link={self.source.link!r} gives mean probabilities only, not how they vary with the "
            "weights. Predict with link='mc'."
        )


# The results


@dataclass(frozen=True, repr=False)
class CategoricalPrediction(OfClasses, ByDraws):
    """A prediction of one of several classes, by draws.

    Attributes:
        logits: ``[num_samples, batch, ..., classes]``.
        source: Where the prediction came from.
    """

    logits: Tensor = field(metadata=batch_dim(1))
    source: Source

    @cached_property
    def sampled_probs(self) -> Tensor:
        """Class probabilities under each draw, ``[num_samples, batch, ..., classes]``."""
        return self.logits.softmax(-1)

    def log_prob(self, target: Tensor) -> Tensor:
        """The log-probability of each example's classes, ``[batch]``: the mean over draws is of joint probabilities."""
        nll = likelihoods.Categorical().negative_log_likelihood
        return log_mean_exp(torch.stack([-nll(logits, target) for logits in self.logits]))


@dataclass(frozen=True, repr=False)
class BernoulliPrediction(OfBinaryTargets, ByDraws):
    """A prediction of binary targets, by draws.

    Attributes:
        logits: ``[num_samples, batch, ...]``.
        source: Where the prediction came from.
    """

    logits: Tensor = field(metadata=batch_dim(1))
    source: Source

    @cached_property
    def sampled_probs(self) -> Tensor:
        """The probability of 1 under each draw, ``[num_samples, batch, ...]``."""
        return self.logits.sigmoid()

    def log_prob(self, target: Tensor) -> Tensor:
        """The log-probability of each example's targets, ``[batch]``."""
        likelihoods.Bernoulli().check(self.logits[0], target)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            self.logits, target.to(self.logits).expand_as(self.logits), reduction="none"
        )
        return log_mean_exp(_sum_events(-losses))


@dataclass(frozen=True, repr=False)
class MeanCategoricalPrediction(OfClasses, ByMeans):
    """A prediction of one of several classes of which only the mean probabilities are known.

    Attributes:
        logits: The logarithms of the mean probabilities up to a constant, ``[batch, ..., classes]``: not the mean of
            the model's logits.
        source: Where the prediction came from.
    """

    logits: Tensor = field(metadata=batch_dim(0))
    source: Source

    @property
    def probs(self) -> Tensor:
        """The predictive probabilities, ``[batch, ..., classes]``."""
        return self.logits.softmax(-1)

    def log_prob(self, target: Tensor) -> Tensor:
        """The log-probability of each example's classes, ``[batch]``, its positions taken as independent."""
        return -likelihoods.Categorical().negative_log_likelihood(self.logits, target)


@dataclass(frozen=True, repr=False)
class MeanBernoulliPrediction(OfBinaryTargets, ByMeans):
    """A prediction of binary targets of which only the mean probabilities are known.

    Attributes:
        logits: The log-odds of the mean probabilities, ``[batch, ...]``: not the mean of the model's logits.
        source: Where the prediction came from.
    """

    logits: Tensor = field(metadata=batch_dim(0))
    source: Source

    @property
    def probs(self) -> Tensor:
        """The predictive probability of 1, ``[batch, ...]``."""
        return self.logits.sigmoid()

    def log_prob(self, target: Tensor) -> Tensor:
        """The log-probability of each example's targets, ``[batch]``, which are taken as independent."""
        return -likelihoods.Bernoulli().negative_log_likelihood(self.logits, target)


@dataclass(frozen=True, repr=False)
class DirichletPrediction(OfClasses):
    """A prediction of one of several classes whose probabilities are Dirichlet distributed, in closed form.

    Attributes:
        alpha: The concentrations, ``[batch, ..., classes]``, all positive; positions of one example are independent.
        source: Where the prediction came from.
    """

    alpha: Tensor = field(metadata=batch_dim(0))
    source: Source

    @property
    def concentration(self) -> Tensor:
        """The sum of the concentrations, ``[batch, ..., 1]``: the number of observations that they are worth."""
        return self.alpha.sum(-1, keepdim=True)

    @property
    def probs(self) -> Tensor:
        """The predictive probabilities, ``[batch, ..., classes]``: the Dirichlet's mean."""
        return self.alpha / self.concentration

    @property
    def epistemic_variance(self) -> Tensor:
        """The Dirichlet's variance of each probability, ``p (1 − p) / (concentration + 1)``."""
        return self.probs * (1 - self.probs) / (self.concentration + 1)

    @property
    def aleatoric_variance(self) -> Tensor:
        """The Dirichlet's expectation of ``p (1 − p)`` of each class."""
        return self.epistemic_variance * self.concentration

    @property
    def expected_entropy(self) -> Tensor:
        """The Dirichlet's expectation of the entropy, ``[batch, ...]``: ``ψ(Σα + 1) − Σ p ψ(α + 1)``."""
        terms = torch.digamma(self.concentration + 1) - torch.digamma(self.alpha + 1)
        return (self.probs * terms).sum(-1)

    def log_prob(self, target: Tensor) -> Tensor:
        """The log-probability of each example's classes, ``[batch]``."""
        return -likelihoods.Categorical().negative_log_likelihood(self.alpha.log(), target)


def _sum_events(log_probs: Tensor) -> Tensor:
    return log_probs.flatten(2).sum(2) if log_probs.ndim > 2 else log_probs


@from_outputs.register
def _(likelihood: likelihoods.Categorical, outputs: Tensor, source: Source) -> CategoricalPrediction:
    return CategoricalPrediction(outputs, source)


@from_outputs.register
def _(likelihood: likelihoods.Bernoulli, outputs: Tensor, source: Source) -> BernoulliPrediction:
    return BernoulliPrediction(outputs, source)
