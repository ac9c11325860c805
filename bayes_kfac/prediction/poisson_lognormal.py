"""Counts whose log-rates are Gaussian: the Poisson-lognormal distribution (Aitchison & Ho 1989).

The probability of counts ``y`` is ``∫ Π_i Poisson(y_i | exp f_i) N(f; μ, R Rᵀ) df``. Where counts are large, what they
say of ``f`` is far narrower than what was known before, so that nodes placed by ``N(f; μ, R Rᵀ)`` would miss it. With
``f = μ + R u`` the integrand is log-concave in ``u``: nodes are placed around its mode and by its curvature there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bayes_kfac import linalg
from bayes_kfac.prediction.quadrature import NODES, cloud, line, log_normal, normal_rule

#: Newton's steps to the mode. From the start of a generalised linear model's fit a handful is enough; it need not be
#: exact, since nodes around a point nearby are as good.
STEPS = 25
#: How far nodes of a log-gamma variable go: its left tail is exponential at a count of 0, its right one lighter than a
#: normal's.
GAMMA_ENDS = (-26.0, 9.0)


class PoissonLogNormal(Distribution):
    """``y_i ~ Poisson(exp f_i)`` with ``f ~ N(loc, scale_root scale_rootᵀ)``; ``d`` counts are one event.

    One count is integrated by the trapezoidal rule, several by quasi-Monte Carlo, importance weighted. All is computed
    in float64.

    Args:
        loc: The means of the log-rates, ``[..., d]``.
        scale_root: A root of their covariance, ``[..., d, d]``; it may be singular.
        validate_args: Whether arguments are checked.
    """

    arg_constraints = {"loc": constraints.real_vector}  # noqa: RUF012, as in torch
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(self, loc: Tensor, scale_root: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale_root = loc, scale_root
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """``exp(μ + s²/2)``, ``[..., d]``."""
        return (self.loc + 0.5 * self._log_variance).exp()

    @property
    def variance(self) -> Tensor:
        """That of the rates, ``(exp(s²) − 1) mean²``, plus their mean, ``[..., d]``."""
        return self.mean + self._log_variance.expm1() * self.mean.square()

    def sample(self, sample_shape: Any = ()) -> Tensor:  # noqa: D102
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        with torch.no_grad():
            return torch.poisson((self.loc + (self.scale_root @ noise.unsqueeze(-1)).squeeze(-1)).exp())

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of counts, ``[...]``."""
        if self._validate_args:
            self._validate_sample(value)
        loc, root, counts = self.loc.double(), self.scale_root.double(), value.double()
        mode, curvature = _mode(loc.detach(), root.detach(), counts)
        factor = linalg.cholesky(curvature, ["curvature at the mode"])  # L with L Lᵀ
        u, log_weights = (line if loc.shape[-1] == 1 else cloud)(mode, factor)
        log_rate = loc.unsqueeze(-2) + u @ root.mT
        counts = counts.unsqueeze(-2)
        of_counts = (counts * log_rate - log_rate.clamp(max=80.0).exp() - torch.lgamma(counts + 1)).sum(-1)
        log_prob = torch.logsumexp(of_counts + log_normal(u) + log_weights, -1)
        if loc.shape[-1] == 1:
            # a count of 0 is about as likely for all small rates: of broad ones there is as much far from the mode
            nothing = marginal_cdf(loc, self._log_variance.double().sqrt(), torch.zeros_like(loc)).squeeze(-1)
            is_level = (value.squeeze(-1) == 0) & (nothing > 1e-3)
            log_prob = torch.where(is_level, nothing.clamp(min=1e-3).log(), log_prob)
        return log_prob.to(self.loc.dtype)

    @property
    def _log_variance(self) -> Tensor:
        return self.scale_root.square().sum(-1)


def marginal_cdf(loc: Tensor, stddev: Tensor, value: Tensor) -> Tensor:
    """The probability of a count of at most ``value``.

    With ``k = ⌊value⌋`` and ``G ~ Gamma(k + 1)`` it is ``P(rate < G) = E Q(k + 1, exp f) = E Φ((log G − μ) / s)``: one
    integral over the log-rate ``f``, and one over ``log G``. Each is taken where its own variable is the one that
    varies less, so that what is averaged is smooth in it.

    Args:
        loc: The log-rate's mean.
        stddev: Its standard deviation, of the same shape.
        value: Where, of the same shape.

    Returns:
        The probabilities, in float64.
    """
    count = value.double().floor().clamp(min=0).unsqueeze(-1)
    mean, deviation = loc.double().unsqueeze(-1), stddev.double().unsqueeze(-1)
    nodes, log_weights = normal_rule(mean)
    rate = (mean + deviation * nodes).clamp(-300, 300).exp()
    by_rate = (log_weights.exp() * torch.special.gammaincc(count + 1, rate)).sum(-1)
    away = torch.linspace(*GAMMA_ENDS, NODES, dtype=mean.dtype, device=mean.device)
    log_gamma = (count + 1).log() + away * (count + 1).rsqrt()
    weights = ((count + 1) * log_gamma - log_gamma.exp()).softmax(-1)
    by_gamma = (weights * torch.special.ndtr((log_gamma - mean) / deviation.clamp(min=1e-300))).sum(-1)
    is_rate_narrower = (deviation.square() * (count + 1) < 1).squeeze(-1)
    probability = torch.where(is_rate_narrower, by_rate, by_gamma).clamp(0, 1)
    return torch.where(value < 0, 0.0, probability)


def _mode(loc: Tensor, root: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``½ |u|² + Σ exp(f) − y f`` with ``f = μ + R u`` is least, and about its curvature there.

    The first step is that of a generalised linear model's fit, from rates at the counts themselves.

    Returns:
        The mode, ``[..., d]``, and the curvature, ``[..., d, d]``.
    """
    identity = torch.eye(loc.shape[-1]).to(loc)
    weight = counts + 0.5
    working = weight * (weight.log() - loc)
    for _ in range(STEPS):
        curvature = identity + root.mT @ (weight.unsqueeze(-1) * root)
        factor = linalg.cholesky(curvature, ["curvature at the mode"])
        mode = torch.cholesky_solve(root.mT @ working.unsqueeze(-1), factor).squeeze(-1)
        away = (root @ mode.unsqueeze(-1)).squeeze(-1)
        weight = (loc + away).clamp(max=80.0).exp()
        working = weight * away + counts - weight
    return mode, identity + root.mT @ (weight.unsqueeze(-1) * root)
