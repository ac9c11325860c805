"""Predictions of counts: mixtures of Poisson distributions over what the rate may be.

The linearised output is a Gaussian over log-rates: the rate is lognormal, its mean and variance in closed form, and the
probability of a count is the integral over the log-rate, by quadrature; see
:mod:`bayes_kfac.prediction.poisson_lognormal`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Poisson

from bayes_kfac import likelihoods, linalg
from bayes_kfac.errors import check_probability
from bayes_kfac.likelihoods.base import check_same_shape
from bayes_kfac.prediction.output import GaussianOutput
from bayes_kfac.prediction.poisson_lognormal import PoissonLogNormal, marginal_cdf
from bayes_kfac.prediction.quadrature import equal_log_weights, mixture
from bayes_kfac.prediction.results import Prediction, Source, batch_dim, from_gaussian, from_outputs, refuse_link


class CountPrediction(Prediction):
    """What predictions of counts share. The mean of the target is the mean of its rate.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> laplace = bk.Laplace(torch.nn.Linear(1, 1), bk.likelihoods.Poisson())
        >>> posterior = laplace.fit([(torch.ones(3, 1), torch.full((3, 1), 4.0))], progress=False).posterior()
        >>> p = posterior.predict(torch.ones(5, 1))
        >>> torch.equal(p.aleatoric_variance, p.mean)  # a Poisson's variance is its rate
        True
        >>> bool((p.cdf(p.quantile(0.9)) >= 0.9).all())
        True
    """

    @property
    def aleatoric_variance(self) -> Tensor:
        """The expected variance of the count given the weights: its expected rate, shaped like the mean."""
        return self.mean

    def log_prob(self, target: Tensor) -> Tensor:
        """The joint log-probability of each example's counts, ``[batch]``."""
        likelihoods.Poisson().check(self.mean, target)
        return self.distribution.log_prob(target)

    def cdf(self, target: Tensor) -> Tensor:
        """The probability that each count on its own is at most so large, shaped like the mean.

        Args:
            target: Values, shaped like the mean.

        Returns:
            The probabilities.
        """
        check_same_shape(self.mean, target)
        return self._cdf(target).to(self.mean.dtype)

    def quantile(self, probability: float) -> Tensor:
        """The least count that each target on its own does not pass with at least this probability.

        Args:
            probability: The probability, between 0 and 1.

        Returns:
            Whole numbers, shaped like the mean.

        Raises:
            ArgumentError: If ``probability`` is not between 0 and 1.
        """
        probability = check_probability("probability", probability)
        upper = torch.zeros_like(self.mean, dtype=torch.float64)  # which tells neighbouring counts apart up to 2⁵³
        lower = upper - 1
        while bool((short := (self._cdf(upper) < probability) & upper.isfinite()).any()):
            lower, upper = torch.where(short, upper, lower), torch.where(short, 2 * upper + 1, upper)
        while bool(((lower < (middle := ((lower + upper) / 2).floor())) & (middle < upper)).any()):
            below = self._cdf(middle) < probability
            lower, upper = torch.where(below, middle, lower), torch.where(below, upper, middle)
        return torch.where(self.mean.isnan(), self.mean, upper.to(self.mean.dtype))

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The central interval that holds each count with probability ``level`` or, since counts are whole, more.

        Args:
            level: The probability, between 0 and 1.

        Returns:
            Lower and upper ends, shaped like the mean; both are inside.

        Raises:
            ArgumentError: If ``level`` is not between 0 and 1.
        """
        level = check_probability("level", level)
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    @abstractmethod
    def _cdf(self, value: Tensor) -> Tensor:
        """The distribution function of each count on its own, in float64."""


@dataclass(frozen=True, repr=False)
class PoissonPrediction(CountPrediction):
    """The prediction of a linearised model that puts out log-rates.

    Moments are in closed form, probabilities by quadrature. The joint probability of several counts whose rates are
    correlated is by quasi-Monte Carlo, always with the same nodes.

    Attributes:
        output: The model's output: log-rates.
        source: Where the prediction came from.
    """

    output: GaussianOutput = field(metadata=batch_dim(0))
    source: Source

    @property
    def mean(self) -> Tensor:
        """The expected rate, ``exp(μ + s²/2)`` of a lognormal, ``[batch, ...]``."""
        return (self.output.mean + 0.5 * self.output.variance).exp()

    @property
    def epistemic_variance(self) -> Tensor:
        """The variance of the rate, ``(exp(s²) − 1) exp(2 μ + s²)``, shaped like the mean."""
        return self.output.variance.expm1() * self.mean.square()

    @property
    def distribution(self) -> Distribution:
        """``PoissonLogNormal`` over the flattened counts of an example, ``[batch, outputs]``, or each by itself.

        Each by itself, ``[batch, outputs, 1]``, where there is one or only variances are known.
        """
        mean = self.output.mean.unsqueeze(-1).flatten(1)
        if self.output.is_diagonal or mean.shape[1] == 1:
            stddev = self.output.variance.clamp(min=0).sqrt()
            return Independent(PoissonLogNormal(mean.unsqueeze(-1), stddev.reshape(*mean.shape, 1, 1)), 1)
        return PoissonLogNormal(mean, linalg.psd_root(self.output.spread, ["output covariance"]))

    def log_prob(self, target: Tensor) -> Tensor:
        """The joint log-probability of each example's counts, ``[batch]``."""
        likelihoods.Poisson().check(self.mean, target)
        distribution = self.distribution
        return distribution.log_prob(target.reshape(len(target), *distribution.event_shape))

    def _cdf(self, value: Tensor) -> Tensor:
        return marginal_cdf(self.output.mean, self.output.variance.clamp(min=0).sqrt(), value)


@dataclass(frozen=True, repr=False)
class PoissonMixturePrediction(CountPrediction):
    """An equal mixture of Poisson distributions over draws of the log-rates.

    Attributes:
        outputs: Log-rates, ``[num_samples, batch, ...]``.
        source: Where the prediction came from.
    """

    outputs: Tensor = field(metadata=batch_dim(1))
    source: Source

    @property
    def mean(self) -> Tensor:
        """The mean over draws of the rate, ``[batch, ...]``."""
        return self.outputs.exp().mean(0)

    @property
    def epistemic_variance(self) -> Tensor:
        """The variance of the rate over draws, shaped like the mean."""
        return self.outputs.exp().var(0, correction=0)

    @property
    def distribution(self) -> Distribution:
        """``MixtureSameFamily`` over counts ``[batch, ...]``, joint over all but the first dimension."""
        draws = Poisson(self.outputs.movedim(0, 1).exp())
        return mixture(Independent(draws, self.outputs.ndim - 2), equal_log_weights(len(self.outputs), self.outputs))

    def _cdf(self, value: Tensor) -> Tensor:
        # P(count ≤ k) is the regularised upper incomplete gamma function Q(k + 1, rate)
        below = torch.special.gammaincc(value.double().floor().clamp(min=0) + 1, self.outputs.double().exp()).mean(0)
        return torch.where(value < 0, 0.0, below)


@from_gaussian.register
def _(
    likelihood: likelihoods.Poisson,
    output: GaussianOutput,
    source: Source,
    *,
    link: str | None,
    num_samples: int,
    generator: torch.Generator | None,
) -> PoissonPrediction:
    refuse_link(likelihood, link)
    return PoissonPrediction(output, source)


@from_outputs.register
def _(likelihood: likelihoods.Poisson, outputs: Tensor, source: Source) -> PoissonMixturePrediction:
    return PoissonMixturePrediction(outputs, source)
