"""A mode and what was measured there, as a function of prior, noise and temperature: the evidence, and the posterior.

The evidence is ``log p(D) ≈ log p(D | M)^(1/τ) + log p(M) − ½ log det P + ½ d log 2π``. With the prior ``N(M₀, P₀⁻¹)``
and the eigenvalues ``λ`` of the Fisher where the prior is white, this is
``−NLL/τ − ½ (M − M₀)ᵀ P₀ (M − M₀) − ½ Σ log(1 + (N/τ) λ)``: for a prior ``δ I`` the eigenvalues are those of the Fisher
over ``δ``, so that one decomposition serves every ``δ``, noise and temperature (MacKay 1992; Immer et al. 2021). In the
logarithms of ``δ`` and of the noise's scale it is concave. The prior enters exactly, whatever the posterior's damping:
the cross terms of factored damping would bias it. Layers that are linked add what their correlation takes from
``log det P``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bayes_kfac import linalg
from bayes_kfac.curvature import Layer
from bayes_kfac.laplace.measurement import Measurement
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.posterior import Posterior
from bayes_kfac.provenance import Provenance
from bayes_kfac.structures import BlockGaussian, BlockSpec, Information, Prior, Structure, build, correlation

#: The precision of each layer's prior, as a tensor, or as the Gaussian of an earlier posterior.
Priors = Mapping[str, Tensor | BlockGaussian]


@dataclass
class Fitted:
    """What a Laplace fit knows.

    Attributes:
        measurement: What was measured of the data.
        model: The model.
        mean: All parameters and buffers at the mode.
        layers: The layers by name.
        structures: Their structures.
        likelihood: The likelihood that the measurement was made with.
        provenance: How it was made.
        prior_mean: The prior's mean of all parameters; ``None`` for zero.
    """

    measurement: Measurement
    model: nn.Module
    mean: Mapping[str, Tensor]
    layers: Mapping[str, Layer]
    structures: Mapping[str, Structure]
    likelihood: Likelihood
    provenance: Provenance
    prior_mean: Mapping[str, Tensor] | None = None
    _under_unit_prior: dict[str, Information] = field(default_factory=dict, init=False, repr=False)

    def evidence(self, priors: Priors, temperature: Tensor, noise_scale: Tensor | None = None) -> Tensor:
        """The log marginal likelihood, differentiable in its arguments.

        Args:
            priors: The layers' priors.
            temperature: ``τ``, scalar.
            noise_scale: The noise of a Gaussian likelihood, or ``None`` for what it was when the data were measured.

        Returns:
            A scalar in nats.
        """
        nll, scale = self.measurement.nll, self.measurement.num_examples / temperature
        if noise_scale is not None:
            nll, factor = self.likelihood.at_noise_scale(nll, self.measurement.num_targets, noise_scale)
            scale = scale * factor
        total = -nll / temperature - self.likelihood.kl().detach()
        for name, prior in priors.items():
            total = total - 0.5 * (self.distance(name, prior) + self._information(name, prior, scale))
        with linalg.full_precision(self.measurement.nll.device):
            between = correlation(self.structures, self._specs(priors, 1.0))(torch.as_tensor(scale))
        return total - 0.5 * between

    def posterior(self, priors: Priors, temperature: float, noise_scale: Tensor | None = None) -> Posterior:
        """The posterior, of the arguments of :meth:`evidence`."""
        likelihood, scale = copy.deepcopy(self.likelihood), self.measurement.num_examples / temperature
        if noise_scale is not None:
            _, factor = self.likelihood.at_noise_scale(self.measurement.nll, self.measurement.num_targets, noise_scale)
            scale *= float(factor)
            likelihood.set_noise_scale(float(noise_scale))
        with torch.no_grad(), linalg.full_precision(self.measurement.nll.device):
            blocks = build(self.structures, self._specs(priors, scale))
        return Posterior(
            self.model,
            likelihood,
            blocks,
            layers=self.layers,
            mean=self.mean,
            prior_precision={name: _plain(prior) for name, prior in priors.items() if isinstance(prior, Tensor)},
            provenance=replace(self.provenance, temperature=temperature),
        )

    def distance(self, name: str, prior: Tensor | BlockGaussian) -> Tensor:
        """``(M − M₀)ᵀ P₀ (M − M₀)`` of a layer."""
        layer = self.layers[name]
        away = layer.matrix(self.mean)
        if self.prior_mean is not None:
            away = away - layer.matrix(self.prior_mean)
        if isinstance(prior, BlockGaussian):
            away = away.to(prior.like.dtype)
            return (away * prior.multiply(away)).double().sum()
        return (prior * away.double().square()).sum()

    def _specs(self, priors: Priors, scale: float) -> list[BlockSpec]:
        return [BlockSpec(name, self.measurement.statistics[name], scale, prior) for name, prior in priors.items()]

    def _information(self, name: str, prior: Tensor | BlockGaussian, scale: Tensor | float) -> Tensor:
        """``log det P − log det P₀`` of a layer."""
        if isinstance(prior, Tensor) and prior.ndim == 0:  # where it is white the data's scale is over it
            if name not in self._under_unit_prior:
                self._under_unit_prior[name] = self._decompose(name, 1.0)
            return self._under_unit_prior[name](scale / prior)
        return self._decompose(name, prior)(torch.as_tensor(scale))

    def _decompose(self, name: str, prior: Prior) -> Information:
        # in float32 the rounding of small eigenvalues leads the search for a maximum astray where priors are weak
        prior = prior.to(torch.float64) if isinstance(prior, Tensor | BlockGaussian) else prior
        spec = BlockSpec(name, self.measurement.statistics[name].map(Tensor.double), 1.0, prior)
        with linalg.full_precision(self.measurement.nll.device):
            return self.structures[name].information(spec)


def _plain(prior: Tensor) -> float | Tensor:
    """A prior's precision out of its graph; a scalar as a number."""
    return float(prior.detach()) if prior.ndim == 0 else prior.detach()
