"""Regression with Gaussian noise: the output is the target's mean, ``[batch, ...]``, in the target's units."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayes_kfac.errors import TargetError
from bayes_kfac.likelihoods.base import Likelihood, check_same_shape, register
from bayes_kfac.likelihoods.noise import Noise, Scale, noise_from


@register
class Gaussian(Likelihood):
    """``target ~ N(output, noise_scale²)``, independent over an example's dimensions.

    Args:
        noise_scale: The noise's standard deviation in the target's units: a number or tensor where it is known,
            ``"learned"`` for maximum likelihood, or a belief such as ``GammaNoise(6.0, 6.0)``.

    Example:
        >>> from bayes_kfac.likelihoods import GammaNoise, Gaussian
        >>> import torch
        >>> Gaussian(2.0)(torch.zeros(5, 1), torch.zeros(5, 1))  # log 2 + ½ log 2π
        tensor(1.6121)
        >>> Gaussian("learned").noise_scale, Gaussian(GammaNoise(6.0, 6.0)).noise_scale  # where they start
        (tensor(1.), tensor(1.0954))
        >>> Gaussian(torch.tensor([0.1, 5.0])).noise_scale  # of two outputs, each in its units
        tensor([0.1000, 5.0000])
    """

    def __init__(self, noise_scale: Scale | str | Noise | dict[str, Any] = "learned") -> None:
        super().__init__()
        self.noise = noise_from(noise_scale)

    @property
    def noise_scale(self) -> Tensor:
        """The root of the expected noise variance, in the target's units."""
        return self.noise.variance().detach().sqrt()

    def check(self, output: Tensor, target: Tensor) -> None:  # noqa: D102
        check_same_shape(output, target)
        precision = self._precision(output)
        # a number on the CPU goes with tensors of any device
        if precision.device != output.device and (precision.ndim or precision.device.type != "cpu"):
            raise TargetError(
                f"likelihood=Gaussian({self.noise!r}) is on {precision.device}, and the model's output on "
                f"{output.device}. Move the likelihood with the model: likelihood.to({str(output.device)!r})."
            )

    def sample_gradient(self, output: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:  # noqa: D102
        # a target sampled at scale σ gives the gradient (f − y) / σ² = −ε / σ
        shape = (num_samples, *output.shape)
        normal = torch.randn(shape, dtype=output.dtype, device=output.device, generator=generator)
        return normal * self._precision(output).detach().to(output).sqrt()

    def fisher_root(self, output: Tensor) -> Tensor:  # noqa: D102
        size = output[0].numel()
        basis = torch.eye(size, dtype=output.dtype, device=output.device).reshape(size, 1, *output.shape[1:])
        return (basis * self._precision(output).detach().to(output).sqrt()).expand(size, *output.shape)

    def distribution(self, output: Tensor) -> Distribution:  # noqa: D102
        return self.noise.distribution(output)

    def at_noise_scale(self, nll: Tensor, num_targets: float, noise_scale: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        precision, log_precision = (own.detach().double() for own in self.noise.expectations())
        if precision.numel() != 1 or type(self.noise).set_scale is Noise.set_scale:  # a belief is more than one scale
            return super().at_noise_scale(nll, num_targets, noise_scale)
        constant = num_targets * math.log(2 * math.pi)
        squares = (2 * nll - constant + num_targets * log_precision) / precision  # of all residuals
        changed = 0.5 * (squares / noise_scale**2 + 2 * num_targets * noise_scale.log() + constant)
        return changed, noise_scale**-2 / precision

    def set_noise_scale(self, noise_scale: float) -> None:  # noqa: D102
        self.noise.set_scale(noise_scale)

    def kl(self) -> Tensor:  # noqa: D102
        return self.noise.kl()

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {"noise_scale": self.noise.config()}

    def _elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        # E over the belief about the precision; for a known scale, the log-density itself
        precision, log_precision = self.noise.expectations()
        return 0.5 * (precision * (output - target) ** 2 - log_precision + math.log(2 * math.pi))

    def _precision(self, output: Tensor) -> Tensor:
        """The expected precision; refuses a shape that would widen the output, or differ between examples."""
        precision = self.noise.precision()
        widest = (1, *output.shape[1:])
        # by hand: on a small network torch.broadcast_shapes takes longer than the loss
        pairs = zip(reversed(precision.shape), reversed(widest), strict=False)
        fits = precision.ndim <= len(widest) and all(own in (1, size) for own, size in pairs)
        if not fits:
            raise TargetError(
                f"noise of shape {tuple(precision.shape)} does not broadcast to one example's output of shape "
                f"{widest[1:]} (outputs are {tuple(output.shape)}). Give noise_scale a number, or a shape that does."
            )
        return precision
