"""Predictions of a mixture of posteriors: the equal mixture of its members' predictive distributions.

The mean is the mean of the members' means. The variance follows the law of total variance: that between the members'
means is epistemic, as their own is. Densities and distribution functions are averaged, never their logarithms.

A new kind of result gets its pooled one by one small class and one line, ``from_members.register``; without it there
are still mean, variances and density.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import singledispatch

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayes_kfac.errors import ArgumentError
from bayes_kfac.prediction.classification import ClassificationPrediction, OfBinaryTargets, OfClasses
from bayes_kfac.prediction.counts import CountPrediction
from bayes_kfac.prediction.mixtures import equal_mixture
from bayes_kfac.prediction.quadrature import log_mean_exp
from bayes_kfac.prediction.regression import RegressionPrediction, covariance_over_draws
from bayes_kfac.prediction.results import Prediction, Source, batch_dim, common_kind
from bayes_kfac.provenance import Provenance


@dataclass(frozen=True, repr=False)
class Pooled(Prediction):
    """What pooled predictions share.

    Attributes:
        members: The predictions of the members, at the same inputs.
        source: Where they came from.
    """

    members: tuple[Prediction, ...] = field(metadata=batch_dim(0))
    source: Source

    @property
    def mean(self) -> Tensor:
        """The mean over the members, ``[batch, ...]``."""
        return self._average("mean")

    @property
    def epistemic_variance(self) -> Tensor:
        """The members' own, on average, and the variance of their means, shaped like the mean."""
        return self._average("epistemic_variance") + self._between

    @property
    def aleatoric_variance(self) -> Tensor:
        """The mean over the members, shaped like the mean."""
        return self._average("aleatoric_variance")

    @property
    def variance(self) -> Tensor:
        """The variance of the target: known also where the members do not know how theirs splits."""
        return self._average("variance") + self._between

    def log_prob(self, target: Tensor) -> Tensor:
        """The log of the mean over members of each example's joint density, ``[batch]``."""
        return log_mean_exp(torch.stack([member.log_prob(target) for member in self.members]))

    @property
    def _between(self) -> Tensor:
        """The variance of the members' means, shaped like the mean."""
        return self._each("mean").var(0, correction=0)

    def _each(self, name: str) -> Tensor:
        """What each member says, ``[members, batch, ...]``."""
        return torch.stack([getattr(member, name) for member in self.members])

    def _average(self, name: str) -> Tensor:
        return self._each(name).mean(0)


class PooledPrediction(Pooled):
    """The pooled prediction of any kind of target."""

    @property
    def distribution(self) -> Distribution:
        """``MixtureSameFamily`` of the members' distributions, over what these are over.

        Where the members are mixtures, it has all of their components.
        """
        return equal_mixture([member.distribution for member in self.members])


class PooledRegression(PooledPrediction, RegressionPrediction):
    """The pooled prediction of real-valued targets.

    ``entropy`` and ``mutual_information`` are bounds from above: those of a Gaussian with the same covariance. The
    information is about the member and its weights together.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> laplace = bk.Laplace(torch.nn.Linear(1, 1, bias=False), bk.likelihoods.Gaussian(1.0))
        >>> def posterior(n):
        ...     return laplace.fit([(torch.ones(n, 1), torch.ones(n, 1))], progress=False).posterior()
        >>> p = bk.Mixture([posterior(1), posterior(3)]).predict(torch.ones(1, 1))
        >>> p.epistemic_variance  # of 1 / (1 + 1) and 1 / (3 + 1), with the same mean
        tensor([[0.3750]])
    """

    members: tuple[RegressionPrediction, ...]

    @property
    def epistemic_covariance(self) -> Tensor:
        """The members' own, on average, and the covariance of their means, ``[batch, outputs, outputs]``."""
        return self._average("epistemic_covariance") + covariance_over_draws(self._each("mean"))

    @property
    def expected_entropy(self) -> Tensor:
        """The expected entropy of the noise: the mean over the members, ``[batch]``."""
        return self._average("expected_entropy")

    @property
    def mutual_information(self) -> Tensor:
        """A bound on the information about member and weights in each example's target, ``[batch]``, in nats.

        ``½ log det 2πe cov(y) − E[H]``: of all targets with this covariance the Gaussian has the greatest entropy.
        """
        gaussian_entropy = super().expected_entropy + super().mutual_information
        return gaussian_entropy - self.expected_entropy

    @property
    def _width(self) -> Tensor:
        return self._each("_width").amax(0) + self._between.sqrt()

    def _cdf(self, value: Tensor) -> Tensor:
        return torch.stack([member.cdf(value) for member in self.members]).mean(0)


class PooledCounts(PooledPrediction, CountPrediction):
    """The pooled prediction of counts."""

    members: tuple[CountPrediction, ...]

    def _cdf(self, value: Tensor) -> Tensor:
        return torch.stack([member._cdf(value) for member in self.members]).mean(0)


class PooledProbabilities(Pooled, ClassificationPrediction):
    """What pooled predictions of discrete targets share: probabilities are averaged, never logits.

    The mutual information is between the target and, together, the member and its weights. Where the members know mean
    probabilities only, it is unknown.
    """

    @property
    def probs(self) -> Tensor:
        """The predictive probabilities: the mean over the members."""
        return self.mean

    @property
    def expected_entropy(self) -> Tensor:
        """The mean over members and weights of the entropy, ``[batch, ...]``: the part that is noise."""
        return self._average("expected_entropy")

    @property
    def sampled_probs(self) -> Tensor:
        """Probabilities under each draw of each member, ``[members·num_samples, batch, ...]``; draws only."""
        return self._each("sampled_probs").flatten(0, 1)


class PooledCategorical(PooledProbabilities, OfClasses):
    """The pooled prediction of one of several classes."""


class PooledBernoulli(PooledProbabilities, OfBinaryTargets):
    """The pooled prediction of binary targets."""


def pool(predictions: Iterable[Prediction]) -> Prediction:
    """The equal mixture of several predictions of the same targets.

    Args:
        predictions: At least one, all of one kind, at the same inputs, by one method, link and number of draws.

    Returns:
        The pooled prediction; of one it is that one.

    Raises:
        ArgumentError: If there is none, or they differ in kind, shape or method.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> laplace = bk.Laplace(torch.nn.Linear(1, 1), bk.likelihoods.Gaussian(1.0))
        >>> posterior = laplace.fit([(torch.ones(3, 1), torch.ones(3, 1))], progress=False).posterior()
        >>> one = posterior.predict(torch.ones(2, 1))
        >>> two = bk.prediction.pool([one, one])
        >>> torch.equal(two.variance, one.variance)
        True
    """
    predictions = list(predictions)
    common_kind(predictions)
    first = predictions[0]
    for index, other in enumerate(predictions):
        if other.mean.shape != first.mean.shape:
            raise ArgumentError(
                f"predictions[{index}].mean has shape {tuple(other.mean.shape)} and predictions[0].mean "
                f"{tuple(first.mean.shape)}. Allowed: predictions at the same inputs."
            )
        if replace(other.source, posterior=first.source.posterior) != first.source:
            raise ArgumentError(
                f"predictions[{index}].source={other.source} differs from predictions[0].source={first.source}. "
                "Allowed: predictions by one method, link and number of draws; the posteriors may differ."
            )
    if len(predictions) == 1:
        return first
    provenances = tuple(own for prediction in predictions for own in _provenances(prediction.source))
    return from_members(first, tuple(predictions), replace(first.source, posterior=provenances))


@singledispatch
def from_members(first: Prediction, members: tuple[Prediction, ...], source: Source) -> Prediction:
    """The pooled prediction of members.

    Args:
        first: The first of them, whose kind is that of all.
        members: All of them.
        source: Where they came from.

    Returns:
        Its class goes by the kind of the first.
    """
    return PooledPrediction(members, source)


@from_members.register
def _(first: RegressionPrediction, members: tuple[Prediction, ...], source: Source) -> PooledRegression:
    return PooledRegression(members, source)


@from_members.register
def _(first: CountPrediction, members: tuple[Prediction, ...], source: Source) -> PooledCounts:
    return PooledCounts(members, source)


@from_members.register
def _(first: OfClasses, members: tuple[Prediction, ...], source: Source) -> PooledCategorical:
    return PooledCategorical(members, source)


@from_members.register
def _(first: OfBinaryTargets, members: tuple[Prediction, ...], source: Source) -> PooledBernoulli:
    return PooledBernoulli(members, source)


def _provenances(source: Source) -> tuple[Provenance, ...]:
    return source.posterior if isinstance(source.posterior, tuple) else (source.posterior,)
