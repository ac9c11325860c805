"""Predictions of real-valued targets: a Gaussian in closed form, or an equal mixture over weight draws."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from typing import cast

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.distributions import StudentT as TorchStudentT

from bayes_kfac import linalg
from bayes_kfac.errors import TargetError, check_probability
from bayes_kfac.likelihoods import Gaussian
from bayes_kfac.likelihoods.base import check_same_shape
from bayes_kfac.prediction.output import GaussianOutput
from bayes_kfac.prediction.quadrature import normal_cdf
from bayes_kfac.prediction.results import Prediction, Source, batch_dim, from_gaussian, from_outputs, refuse_link

#: Evaluations of a distribution function that are enough for a quantile, by far.
STEPS = 120


class RegressionPrediction(Prediction):
    """What the predictions of real-valued targets share.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> laplace = bk.Laplace(torch.nn.Linear(1, 1, bias=False), bk.likelihoods.Gaussian(1.0))
        >>> posterior = laplace.fit([(torch.ones(3, 1), torch.ones(3, 1))], progress=False).posterior()
        >>> p = posterior.predict(torch.ones(1, 1))
        >>> p.aleatoric_variance, p.epistemic_variance, p.variance  # 1, 1 / (3 + 1), their sum
        (tensor([[1.]]), tensor([[0.2500]]), tensor([[1.2500]]))
        >>> lower, upper = p.interval(0.95)  # of a new target: noise included
        >>> torch.allclose(upper - lower, 2 * 1.96 * p.stddev, rtol=1e-4)
        True
    """

    @property
    def covariance(self) -> Tensor:
        """The covariance of one example's target, ``[batch, outputs, outputs]``; its diagonal is :attr:`variance`."""
        return self.epistemic_covariance + torch.diag_embed(self._noise())

    @property
    @abstractmethod
    def epistemic_covariance(self) -> Tensor:
        """The part of the covariance that comes from the weights."""

    @property
    def entropy(self) -> Tensor:
        """The differential entropy of each example's target, ``[batch]``, in nats; it may be negative.

        As with classes, it is :attr:`expected_entropy` plus :attr:`mutual_information`.
        """
        return self.expected_entropy + self.mutual_information

    @property
    def expected_entropy(self) -> Tensor:
        """The entropy of the noise alone, ``½ Σ log 2πe·aleatoric_variance``, ``[batch]``."""
        return 0.5 * (2 * math.pi * math.e * self._noise()).log().sum(1)

    @property
    def mutual_information(self) -> Tensor:
        """The information about the weights in each example's target, ``[batch]``, in nats: what more data removes.

        ``½ log det(I + R⁻¹ S)`` with the epistemic covariance ``S`` and the noise's variances ``R``. Of a mixture it is
        that of a Gaussian with the same covariance, which is an upper bound.
        """
        scale = self._noise().double().rsqrt()
        ratio = scale.unsqueeze(-1) * self.epistemic_covariance.double() * scale.unsqueeze(-2)
        root = linalg.cholesky(torch.eye(ratio.shape[-1]).to(ratio) + ratio, ["predictive covariance"])
        return root.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(self.mean.dtype)

    def _noise(self) -> Tensor:
        """The noise's variances, ``[batch, outputs]``."""
        return self.aleatoric_variance.unsqueeze(-1).flatten(1)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The central interval that holds each target with probability ``level``, noise included.

        Args:
            level: The probability, between 0 and 1.

        Returns:
            Lower and upper ends, shaped like the mean.

        Raises:
            ArgumentError: If ``level`` is not between 0 and 1.
        """
        level = check_probability("level", level)
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def quantile(self, probability: float) -> Tensor:
        """The quantile of each target on its own, by root finding where it has no closed form, shaped like the mean.

        Args:
            probability: The probability, between 0 and 1.

        Returns:
            The quantiles.

        Raises:
            ArgumentError: If ``probability`` is not between 0 and 1.
        """
        probability = check_probability("probability", probability)
        # in float64, which tells upper probabilities from 1
        found = inverted(self._cdf, probability, self.mean.double(), self._width.double())
        return found.to(self.mean.dtype)

    @property
    def _width(self) -> Tensor:
        """A distance in which to look for quantiles, shaped like the mean; any positive one will do."""
        return self.stddev

    def cdf(self, target: Tensor) -> Tensor:
        """The probability that each target on its own is at most so large, shaped like the mean.

        At the observed targets these are the probability integral transforms, which are uniform where the prediction
        is calibrated: see :mod:`bayes_kfac.metrics`.

        Args:
            target: Values, shaped like the mean.

        Returns:
            The probabilities.
        """
        check_same_shape(self.mean, target)
        return self._cdf(target)

    @abstractmethod
    def _cdf(self, value: Tensor) -> Tensor:
        """The distribution function of each target on its own."""


@dataclass(frozen=True, repr=False)
class GaussianPrediction(RegressionPrediction):
    """A Gaussian predictive distribution.

    Attributes:
        output: The model's output. Where it holds variances only, the outputs of an example are taken as independent.
        noise_variance: The noise's expected variance; broadcasts against the mean.
        source: Where the prediction came from.
    """

    output: GaussianOutput = field(metadata=batch_dim(0))
    noise_variance: Tensor
    source: Source

    @property
    def mean(self) -> Tensor:
        """The mean of the target, ``[batch, ...]``."""
        return self.output.mean

    @property
    def epistemic_covariance(self) -> Tensor:
        """The covariance that comes from the weights, ``[batch, outputs, outputs]``."""
        return self.output.covariance

    @property
    def epistemic_variance(self) -> Tensor:
        """The variance that comes from the weights, shaped like the mean."""
        return self.output.variance

    @property
    def aleatoric_variance(self) -> Tensor:
        """The noise's variance, shaped like the mean."""
        return self.noise_variance.to(self.mean).expand_as(self.mean)

    @property
    def mutual_information(self) -> Tensor:
        """The information about the weights in each target, ``½ log det(I + R⁻¹ S)``, ``[batch]``, in nats."""
        if self.output.is_diagonal:  # no matrix of thousands of outputs
            return 0.5 * (self.output.spread / self._noise()).log1p().sum(1)
        return super().mutual_information

    @property
    def distribution(self) -> Distribution:
        """``Normal`` for one output per example, else joint over ``[batch, outputs]``.

        That is ``MultivariateNormal``, or ``Independent(Normal)`` where only variances are known.
        """
        if self.mean.shape[1:].numel() == 1:
            return Normal(self.mean, self.stddev)
        if self.output.is_diagonal:
            return Independent(Normal(self.mean.flatten(1), self.stddev.flatten(1)), 1)
        return MultivariateNormal(self.mean.flatten(1), self.covariance)

    def log_prob(self, target: Tensor) -> Tensor:
        """The joint log-density of each example's target, ``[batch]``."""
        _check_target(self.mean, target)
        distribution = self.distribution
        if isinstance(distribution, Normal):
            return distribution.log_prob(target).reshape(len(target))
        return distribution.log_prob(target.flatten(1))

    def quantile(self, probability: float) -> Tensor:
        """The quantile of each target on its own, shaped like the mean."""
        probability = check_probability("probability", probability)
        return self.mean + NormalDist().inv_cdf(probability) * self.stddev

    def _cdf(self, value: Tensor) -> Tensor:
        return normal_cdf((value - self.mean) / self.stddev)


@dataclass(frozen=True, repr=False)
class MixturePrediction(RegressionPrediction):
    """An equal mixture of the likelihood's densities over weight draws.

    Attributes:
        outputs: The model's outputs, ``[num_samples, batch, ...]``.
        likelihood: What they mean.
        source: Where the prediction came from.
    """

    outputs: Tensor = field(metadata=batch_dim(1))
    likelihood: Gaussian
    source: Source

    @property
    def mean(self) -> Tensor:
        """The mean over draws, ``[batch, ...]``."""
        return self.outputs.mean(0)

    @property
    def epistemic_variance(self) -> Tensor:
        """The variance of the output over draws, shaped like the mean."""
        return self.outputs.var(0, correction=0)

    @property
    def epistemic_covariance(self) -> Tensor:
        """The covariance of the output over draws, ``[batch, outputs, outputs]``."""
        return covariance_over_draws(self.outputs)

    @property
    def aleatoric_variance(self) -> Tensor:
        """The noise's variance, shaped like the mean."""
        return self.likelihood.noise.variance().detach().to(self.outputs).expand(self.outputs.shape[1:])

    @cached_property
    def _components(self) -> Normal | TorchStudentT:
        return cast("Normal | TorchStudentT", self.likelihood.distribution(self.outputs))

    @property
    def distribution(self) -> Distribution:
        """``MixtureSameFamily`` over targets ``[batch, ...]``."""
        components = self.likelihood.distribution(self.outputs.movedim(0, 1))
        weights = Categorical(logits=self.outputs.new_zeros(self.outputs.shape[1], self.outputs.shape[0]))
        return MixtureSameFamily(weights, Independent(components, self.outputs.ndim - 2))

    def log_prob(self, target: Tensor) -> Tensor:
        """The log of the mean over draws of each example's density, ``[batch]``."""
        _check_target(self.mean, target)
        return self.distribution.log_prob(target)

    def _cdf(self, value: Tensor) -> Tensor:
        components = self._components
        standard = (value - components.loc) / components.scale
        if isinstance(components, TorchStudentT):  # torch has no distribution function for it
            from scipy.special import stdtr

            at = standard.detach()
            df = components.df.detach()
            probabilities = torch.as_tensor(stdtr(df.cpu().numpy(), at.cpu().numpy())).to(at)
            return (probabilities + TorchStudentT(df).log_prob(at).exp() * (standard - at)).mean(
                0
            )  # with its derivative
        return normal_cdf(standard).mean(0)


def _check_target(mean: Tensor, target: Tensor) -> None:
    check_same_shape(mean, target)
    if bool(target.isnan().any()):
        raise TargetError("target holds NaN. Allowed: numbers. Leave examples without a target out.")


def covariance_over_draws(draws: Tensor) -> Tensor:
    """The covariance over the first dimension, of the elements of each example.

    Args:
        draws: ``[num_samples, batch, ...]``.

    Returns:
        ``[batch, elements, elements]``.
    """
    centred = (draws - draws.mean(0)).unsqueeze(-1).flatten(2)
    return torch.einsum("sbi,sbj->bij", centred, centred) / len(centred)


def inverted(cdf: Callable[[Tensor], Tensor], probability: float, centre: Tensor, spread: Tensor) -> Tensor:
    """The quantile of continuous distribution functions, by Chandrupatla's method (1997), as far as their digits tell.

    Each step is that of an inverse quadratic through the last three points, or halves what is between the last two
    where these lie on no such curve: some twenty evaluations where halving alone takes sixty.

    Args:
        cdf: The distribution functions, elementwise.
        probability: Of which probability.
        centre: Where to begin, in float64.
        spread: How far to go first; doubled until the quantile is inside.

    Returns:
        The quantiles, shaped like ``centre``.
    """
    fraction, eps, unit = torch.full_like(centre, 0.5), torch.finfo(centre.dtype).eps, spread
    while True:
        x, y = centre - spread, centre + spread
        f, g = cdf(x) - probability, cdf(y) - probability
        if not bool(((f >= 0) | (g < 0)).any()):  # where it is level, the quantile is where it begins to be
            break
        spread = 2 * spread
    for _ in range(STEPS):
        between = x + fraction * (y - x)
        h = cdf(between) - probability
        # the new point is x, that on its other side y, and z is left outside
        is_alike = (h < 0) == (f < 0)
        z, k = torch.where(is_alike, x, y), torch.where(is_alike, f, g)
        y, g = torch.where(is_alike, y, x), torch.where(is_alike, g, f)
        x, f = between, h
        least = (eps * (x.abs() + unit) / (y - x).abs()).clamp(max=0.5)
        if bool(((least == 0.5) | (torch.minimum(f.abs(), g.abs()) <= eps * probability)).all()):
            break
        place, height = (x - y) / (z - y), (f - g) / (k - g)
        is_curve = (1 - (1 - place).sqrt() < height) & (height < place.sqrt())
        curve = f / (f - g) * k / (k - g) - (z - x) / (y - x) * f / (k - f) * g / (g - k)
        fraction = torch.where(is_curve, curve, 0.5).maximum(least).minimum(1 - least)
    return torch.where(f.abs() < g.abs(), x, y)


@from_gaussian.register
def _(
    likelihood: Gaussian,
    output: GaussianOutput,
    source: Source,
    *,
    link: str | None,
    num_samples: int,
    generator: torch.Generator | None,
) -> GaussianPrediction:
    refuse_link(likelihood, link)
    return GaussianPrediction(output, likelihood.noise.variance().detach(), source)


@from_outputs.register
def _(likelihood: Gaussian, outputs: Tensor, source: Source) -> MixturePrediction:
    # its own: the posterior's noise may be changed later
    return MixturePrediction(outputs, copy.deepcopy(likelihood), source)
