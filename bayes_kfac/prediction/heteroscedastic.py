"""Predictions of real-valued targets whose noise is predicted too: mixtures of Gaussians over what the scale may be.

The linearised output is a Gaussian over means ``m`` and log-scales ``l``. Its moments are closed: the expected noise
variance is that of a lognormal scale, ``E[exp(2 l)] = exp(2 E[l] + 2 var[l])``. So is the density of a target *given*
``l``, a Gaussian of variance ``var[m | l] + exp(2 l)``; what is left is the integral over ``l`` alone, by quadrature.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from bayes_kfac import linalg
from bayes_kfac.likelihoods import HeteroscedasticGaussian
from bayes_kfac.likelihoods.base import check_same_shape
from bayes_kfac.prediction.gaussian_lognormal import GaussianLogNormal, marginal_cdf
from bayes_kfac.prediction.output import GaussianOutput
from bayes_kfac.prediction.quadrature import JOINT_NODES, equal_log_weights, mixture, normal_cdf
from bayes_kfac.prediction.regression import RegressionPrediction, covariance_over_draws
from bayes_kfac.prediction.results import Source, batch_dim, from_gaussian, from_outputs, refuse_link

#: How many numbers a joint density may hold at a time.
DENSITY_SIZE = 1 << 23


class ScalePrediction(RegressionPrediction):
    """What predictions share where the noise's scale differs from input to input, and is itself uncertain.

    ``entropy`` and ``mutual_information`` are bounds from above: those of a Gaussian with the same covariance. The
    information is about mean and scale together; to first order in the weights' covariance the bound is exact.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> laplace = bk.Laplace(torch.nn.Linear(1, 2), bk.likelihoods.HeteroscedasticGaussian())
        >>> posterior = laplace.fit([(torch.ones(3, 1), torch.ones(3, 1))], progress=False).posterior()
        >>> p = posterior.predict(torch.ones(5, 1))
        >>> p.mean.shape, p.aleatoric_variance.shape  # of one target: two outputs of the network
        (torch.Size([5, 1]), torch.Size([5, 1]))
        >>> torch.allclose(p.variance, p.epistemic_variance + p.aleatoric_variance)
        True
    """

    @property
    @abstractmethod
    def expected_log_scale(self) -> Tensor:
        """The expected logarithm of the noise's standard deviation, shaped like the mean."""

    @property
    def expected_entropy(self) -> Tensor:
        """The expected entropy of the noise, ``Σ E[l] + ½ log 2πe``, ``[batch]``."""
        return (_flat(self.expected_log_scale) + 0.5 * math.log(2 * math.pi * math.e)).sum(1)

    @property
    def mutual_information(self) -> Tensor:
        """A bound on the information about the weights in each example's target, ``[batch]``, in nats.

        ``½ log det cov(y) − Σ E[l]``: of all targets with this covariance the Gaussian has the greatest entropy.
        """
        of_scale = 0.5 * self._noise().log() - _flat(self.expected_log_scale)
        return super().mutual_information + of_scale.sum(1)

    def log_prob(self, target: Tensor) -> Tensor:
        """The joint log-density of each example's target, ``[batch]``."""
        check_same_shape(self.mean, target)
        return self.distribution.log_prob(target)

    @property
    def _width(self) -> Tensor:
        # the variance of a lognormal scale may be far beyond the quantiles, or infinite
        return self.epistemic_variance.sqrt() + self.expected_log_scale.exp()


@dataclass(frozen=True, repr=False)
class HeteroscedasticPrediction(ScalePrediction):
    """The prediction of a linearised model that puts out means and log-scales.

    Moments are in closed form. Densities, distribution functions and quantiles of single targets are by quadrature
    over the log-scale. The joint density of several targets whose outputs are correlated is by quasi-Monte
    Carlo over their log-scales, always with the same nodes.

    Attributes:
        output: The model's output: means, then log-scales, along the last dimension.
        source: Where the prediction came from.
    """

    output: GaussianOutput = field(metadata=batch_dim(0))
    source: Source

    @property
    def mean(self) -> Tensor:
        """The mean of the target, ``[batch, ...]``."""
        return self.output.mean.chunk(2, -1)[0]

    @property
    def epistemic_variance(self) -> Tensor:
        """The variance of the mean over the weights, shaped like the mean."""
        return self.output.variance.chunk(2, -1)[0]

    @property
    def epistemic_covariance(self) -> Tensor:
        """The covariance of the means over the weights, ``[batch, outputs, outputs]``."""
        means = self._indices[0]
        return self.output.covariance[:, means][:, :, means]

    @property
    def aleatoric_variance(self) -> Tensor:
        """The expected variance of the noise, ``exp(2 E[l] + 2 var[l])``, shaped like the mean."""
        return (2 * self.expected_log_scale + 2 * self.output.variance.chunk(2, -1)[1]).exp()

    @property
    def expected_log_scale(self) -> Tensor:
        """The expected logarithm of the noise's standard deviation, shaped like the mean."""
        return self.output.mean.chunk(2, -1)[1]

    @property
    def distribution(self) -> Distribution:
        """``GaussianLogNormal`` over the flattened targets of an example, ``[batch, outputs]``, or each by itself.

        Each by itself, ``[batch, outputs, 1]``, where there is one or only variances are known. Several at once have a
        covariance matrix for each of 2048 nodes; ``log_prob`` takes them for a part of the batch at a time.
        """
        if self.output.is_diagonal or self.mean.shape[1:].numel() == 1:
            loc, scale_tril = self._marginals
            return Independent(GaussianLogNormal(loc.flatten(1, -2), scale_tril.flatten(1, -3)), 1)
        return self._joint(slice(None))

    def log_prob(self, target: Tensor) -> Tensor:
        """The joint log-density of each example's target, ``[batch]``."""
        check_same_shape(self.mean, target)
        count = self.mean.shape[1:].numel()
        if self.output.is_diagonal or count == 1:
            return self.distribution.log_prob(target.reshape(len(target), count, 1))
        step = max(1, DENSITY_SIZE // (2 * JOINT_NODES * count**2))
        parts = [slice(start, start + step) for start in range(0, len(target), step)]
        return torch.cat([self._joint(part).log_prob(target[part].flatten(1)) for part in parts])

    @property
    def _indices(self) -> tuple[Tensor, Tensor]:
        """Where means and log-scales are among the flattened outputs."""
        shape = self.output.mean.shape[1:]
        means, log_scales = torch.arange(shape.numel(), device=self.output.mean.device).reshape(shape).chunk(2, -1)
        return means.flatten(), log_scales.flatten()

    @property
    def _marginals(self) -> tuple[Tensor, Tensor]:
        """Each target's log-scale and mean by themselves, ``[batch, ..., 2]``, and the root of their covariance."""
        of_mean, of_scale = self.output.variance.clamp(min=0).chunk(2, -1)
        root = of_scale.clamp(min=torch.finfo(of_scale.dtype).tiny).sqrt()  # a scale that is certain is one
        slope = torch.zeros_like(root)  # how far the mean moves with the scale, per standard deviation of that
        if not self.output.is_diagonal:
            means, log_scales = self._indices
            limit = of_mean.sqrt().detach()  # rounding may leave a covariance with what does not vary
            slope = self.output.spread[:, means, log_scales].reshape(root.shape) / root
            slope = torch.minimum(torch.maximum(slope, -limit), limit)
        tiny = torch.finfo(of_scale.dtype).tiny
        rest = (of_mean - slope.square()).clamp(min=tiny).sqrt()
        scale_tril = torch.stack([root, torch.zeros_like(root), slope, rest], -1).unflatten(-1, (2, 2))
        return torch.stack([self.expected_log_scale, self.mean], -1), scale_tril

    def _cdf(self, value: Tensor) -> Tensor:
        return marginal_cdf(*self._marginals, value).to(value.dtype)

    def _joint(self, part: slice) -> Distribution:
        """The targets of some examples, flattened, ``[batch, targets]``."""
        order = torch.cat(self._indices[::-1])  # log-scales, then means
        covariance = self.output.spread[part][:, order][:, :, order].double()
        # of correlations: targets may have any unit; what is certain has no factor
        accuracy = torch.finfo(self.mean.dtype)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        deviation = variance.clamp(min=accuracy.tiny).sqrt()
        varies = (variance > accuracy.tiny).to(variance)
        share = varies / deviation
        correlation = share.unsqueeze(-1) * covariance * share.unsqueeze(-2)
        floor = correlation.new_full(correlation.shape[:1], max(1e-12, 2 * accuracy.eps))
        root = linalg.cholesky(linalg.add_to_diagonal(correlation, floor), ["output covariance"])
        loc = self.output.mean[part].flatten(1)[:, order]
        return GaussianLogNormal(loc, (deviation.unsqueeze(-1) * root).to(loc))


@dataclass(frozen=True, repr=False)
class HeteroscedasticMixturePrediction(ScalePrediction):
    """An equal mixture of Gaussians over draws of means and log-scales.

    Attributes:
        outputs: The model's outputs, ``[num_samples, batch, ...]``: means, then log-scales, along the last dimension.
        source: Where the prediction came from.
    """

    outputs: Tensor = field(metadata=batch_dim(1))
    source: Source

    @property
    def mean(self) -> Tensor:
        """The mean over draws, ``[batch, ...]``."""
        return self._means.mean(0)

    @property
    def epistemic_variance(self) -> Tensor:
        """The variance of the mean over draws, shaped like the mean."""
        return self._means.var(0, correction=0)

    @property
    def epistemic_covariance(self) -> Tensor:
        """The covariance of the means over draws, ``[batch, outputs, outputs]``."""
        return covariance_over_draws(self._means)

    @property
    def aleatoric_variance(self) -> Tensor:
        """The mean over draws of the noise's variance, shaped like the mean."""
        return (2 * self._log_scales).exp().mean(0)

    @property
    def expected_log_scale(self) -> Tensor:
        """The mean over draws of the logarithm of the noise's standard deviation, shaped like the mean."""
        return self._log_scales.mean(0)

    @property
    def distribution(self) -> Distribution:
        """``MixtureSameFamily`` over targets ``[batch, ...]``, joint over all but the first dimension."""
        draws = Normal(self._means.movedim(0, 1), self._log_scales.exp().movedim(0, 1))
        log_weights = equal_log_weights(len(self.outputs), self.outputs)
        return mixture(Independent(draws, self.mean.ndim - 1), log_weights)

    @property
    def _means(self) -> Tensor:
        return self.outputs.chunk(2, -1)[0]

    @property
    def _log_scales(self) -> Tensor:
        return self.outputs.chunk(2, -1)[1]

    def _cdf(self, value: Tensor) -> Tensor:
        return normal_cdf((value - self._means) * (-self._log_scales).exp()).mean(0)


def _flat(values: Tensor) -> Tensor:
    return values.unsqueeze(-1).flatten(1)


@from_gaussian.register
def _(
    likelihood: HeteroscedasticGaussian,
    output: GaussianOutput,
    source: Source,
    *,
    link: str | None,
    num_samples: int,
    generator: torch.Generator | None,
) -> HeteroscedasticPrediction:
    refuse_link(likelihood, link)
    return HeteroscedasticPrediction(output, source)


@from_outputs.register
def _(likelihood: HeteroscedasticGaussian, outputs: Tensor, source: Source) -> HeteroscedasticMixturePrediction:
    return HeteroscedasticMixturePrediction(outputs, source)
