"""Targets whose noise has Gaussian log-scales: mixtures of Gaussians over lognormal standard deviations.

The density of targets ``y`` is ``∫ Π_i N(y_i; m_i, exp(2 l_i)) N(l, m) d(l, m)``. The integral over the means ``m`` is
in closed form: with ``l = μ_l + A u`` and ``m = μ_m + B u + C w`` targets are jointly Gaussian given ``u``. That over
``u`` is not. An outlier is where scales are large, far out in what was believed of them, so that nodes placed by the
belief alone would miss it: they are placed around the integrand's mode and by its curvature there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bayes_kfac import linalg
from bayes_kfac.prediction.quadrature import cloud, line, log_normal, normal_cdf

#: Newton's steps to the mode; it need not be exact, since nodes around a point nearby are as good.
STEPS = 25
#: Log-scales beyond are taken for it: their squares' exponentials stay finite.
LARGEST = 150.0


class GaussianLogNormal(Distribution):
    """``y_i ~ N(m_i, exp(2 l_i))`` with ``(l, m) ~ N(loc, scale_tril scale_trilᵀ)``; ``d`` targets are one event.

    One target is integrated by the trapezoidal rule, several by quasi-Monte Carlo, importance weighted. All is computed
    in float64.

    Args:
        loc: The expected log-scales, then means, ``[..., 2 d]``.
        scale_tril: The lower triangular root of their covariance, ``[..., 2 d, 2 d]``.
        validate_args: Whether arguments are checked.
    """

    arg_constraints = {"loc": constraints.real_vector}  # noqa: RUF012, as in torch
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale_tril = loc, scale_tril
        super().__init__(loc.shape[:-1], torch.Size([loc.shape[-1] // 2]), validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """The expected means, ``[..., d]``."""
        return self.loc.chunk(2, -1)[1]

    @property
    def variance(self) -> Tensor:
        """That of the means, plus the expected square of the scale, ``exp(2 E[l] + 2 var[l])``, ``[..., d]``."""
        of_log_scale, of_mean = self.scale_tril.square().sum(-1).chunk(2, -1)
        return of_mean + (2 * self.loc.chunk(2, -1)[0] + 2 * of_log_scale).exp()

    def sample(self, sample_shape: Any = ()) -> Tensor:  # noqa: D102
        shape = torch.Size(sample_shape) + self.loc.shape
        with torch.no_grad():
            noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
            log_scale, mean = (self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)).chunk(2, -1)
            return torch.normal(mean, log_scale.exp())

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of targets, ``[...]``."""
        if self._validate_args:
            self._validate_sample(value)
        loc, root = self.loc.double(), self.scale_tril.double()
        # a mixture asks all of its components for one value
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = value.double().expand(*batch, -1)
        mode, factor = _mode(loc.detach(), root.detach(), value.detach())
        u, log_weights = (line if value.shape[-1] == 1 else cloud)(mode, factor)
        _, _, given_root, whitened = _given(loc.unsqueeze(-2), root.unsqueeze(-3), value.unsqueeze(-2), u)
        return torch.logsumexp(_log_density(given_root, whitened) + log_normal(u) + log_weights, -1).to(self.loc.dtype)


def marginal_cdf(loc: Tensor, scale_tril: Tensor, value: Tensor) -> Tensor:
    """The probability that one target is at most ``value``.

    Args:
        loc: The expected log-scale and mean, ``[..., 2]``.
        scale_tril: The lower triangular root of their covariance, ``[..., 2, 2]``.
        value: Where, ``[...]``.

    Returns:
        The probabilities, in float64.
    """
    log_scale, mean = loc.double().unbind(-1)
    root, slope, rest = (scale_tril.double()[..., i, j] for i, j in ((0, 0), (1, 0), (1, 1)))
    away = value.double() - mean
    # where the probability changes with the scale: as that begins to count beside the distance, or the mean's variance
    change = torch.maximum(away.abs(), rest).clamp(min=math.exp(-LARGEST)).log()
    centre = ((change - log_scale) / root).clamp(-2, 2).detach().unsqueeze(-1)
    u, log_weights = line(centre, (1 + root.detach())[..., None, None])
    weights = (log_normal(u) + log_weights).softmax(-1)
    nodes = u.squeeze(-1)
    scale = (log_scale.unsqueeze(-1) + root.unsqueeze(-1) * nodes).clamp(-LARGEST, LARGEST).exp()
    standard = (away.unsqueeze(-1) - slope.unsqueeze(-1) * nodes) / torch.hypot(rest.unsqueeze(-1), scale)
    return (weights * normal_cdf(standard)).sum(-1)


def _given(loc: Tensor, root: Tensor, value: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets given ``u``, ``[..., d]``, which are Gaussian.

    Returns:
        The scales' squares ``exp(2 l)`` and the residuals, ``[..., d]``, the Cholesky factor ``L`` of the targets'
        covariance, ``[..., d, d]``, and ``L⁻¹`` times the residuals.
    """
    count = u.shape[-1]
    (log_scale, mean), (_, rest) = loc.chunk(2, -1), root[..., count:, :].chunk(2, -1)
    away = (root[..., :count] @ u.unsqueeze(-1)).squeeze(-1)
    square = (2 * (log_scale + away[..., :count]).clamp(-LARGEST, LARGEST)).exp()
    residual = value - mean - away[..., count:]
    given_root = linalg.cholesky(rest @ rest.mT + torch.diag_embed(square), ["predictive covariance"])
    whitened = torch.linalg.solve_triangular(given_root, residual.unsqueeze(-1), upper=False).squeeze(-1)
    return square, residual, given_root, whitened


def _log_density(root: Tensor, whitened: Tensor) -> Tensor:
    """That of a Gaussian by its covariance's Cholesky factor ``L`` and ``L⁻¹`` times the residuals."""
    return log_normal(whitened) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _mode(loc: Tensor, root: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``½ |u|² − log N(y | u)`` is least, by Newton's method, and the root of its curvature there.

    Where the curvature of the second is negative, its absolute value is taken. A step that leads up is halved.

    Returns:
        The mode, ``[..., d]``, and the Cholesky factor of the curvature, ``[..., d, d]``.
    """
    count = value.shape[-1]
    of_scale, slope, rest = root[..., :count, :count], root[..., count:, :count], root[..., count:, count:]
    identity = torch.eye(count).to(loc)
    # from scales that explain the targets, as far as that is in accord with what was believed of them, or from these
    log_scale, mean = loc.chunk(2, -1)
    unexplained = ((value - mean).square() - rest.square().sum(-1)).clamp(min=math.exp(-LARGEST)).log() / 2
    short = (unexplained - log_scale).clamp(min=0)
    start = torch.linalg.solve(identity + 2 * of_scale.mT @ of_scale, (2 * of_scale.mT @ short.unsqueeze(-1)))
    starts = torch.stack([start.squeeze(-1), torch.zeros_like(value)])
    _, _, given_root, whitened = _given(loc, root, value, starts)
    energies = 0.5 * starts.square().sum(-1) - _log_density(given_root, whitened)
    trial = torch.where((energies[0] < energies[1]).unsqueeze(-1), starts[0], starts[1])
    mode, step = trial, torch.zeros_like(trial)
    energy, length = torch.full_like(value[..., 0], math.inf), torch.ones_like(value[..., 0])
    curvature = identity.expand(*value.shape, count)
    for _ in range(STEPS):
        square, _, given_root, whitened = _given(loc, root, value, trial)
        reached = 0.5 * trial.square().sum(-1) - _log_density(given_root, whitened)
        is_less = reached < energy
        inverse = torch.cholesky_inverse(given_root)
        pull = torch.linalg.solve_triangular(given_root.mT, whitened.unsqueeze(-1), upper=True)  # P r
        weighted = square.unsqueeze(-1) * pull
        variance = square * inverse.diagonal(dim1=-2, dim2=-1)
        by_scale = variance.unsqueeze(-1) - weighted * pull
        gradient = trial.unsqueeze(-1) + of_scale.mT @ by_scale - slope.mT @ pull
        outer = square.unsqueeze(-1) * square.unsqueeze(-2)
        of_scales = torch.diag_embed(2 * by_scale.squeeze(-1)) + outer * inverse * (4 * pull * pull.mT - 2 * inverse)
        cross = of_scale.mT @ (2 * weighted * inverse) @ slope
        hessian = of_scale.mT @ of_scales @ of_scale + slope.mT @ inverse @ slope + cross + cross.mT
        values, vectors = torch.linalg.eigh(hessian)
        values = 1 + values.abs()
        newton = (vectors @ (vectors.mT @ gradient / values.unsqueeze(-1))).squeeze(-1)
        keep = is_less.unsqueeze(-1)
        mode, step = torch.where(keep, trial, mode), torch.where(keep, newton, step)
        curvature = torch.where(keep.unsqueeze(-1), vectors * values.unsqueeze(-2) @ vectors.mT, curvature)
        energy = torch.where(is_less, reached, energy)
        length = torch.where(is_less, (2 * length).clamp(max=1), length / 2)
        trial = mode - length.unsqueeze(-1) * step
    return mode, linalg.cholesky(curvature, ["curvature at the mode"])
