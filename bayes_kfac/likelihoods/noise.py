"""Observation noise of a regression: what is believed about its precision ``1 / noise_scale²``.

Four beliefs, one contract: a known scale, a maximum-likelihood estimate, one that is bounded below, and the Gamma
posterior of the noisy K-FAC paper. Scales are in the units of the target and of any shape that broadcasts against one
example's output.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Gamma, Normal, StudentT, kl_divergence

from bayes_kfac.errors import ArgumentError, check_positive

Scale = float | Tensor | list[float]


class Noise(nn.Module, ABC):
    """A belief about the precision of additive Gaussian noise."""

    @abstractmethod
    def precision(self) -> Tensor:
        """The expected precision, ``E[1 / scale²]``."""

    @abstractmethod
    def log_precision(self) -> Tensor:
        """The expected logarithm of the precision."""

    @abstractmethod
    def variance(self) -> Tensor:
        """The expected variance of the noise, which is the aleatoric variance of a prediction."""

    @abstractmethod
    def distribution(self, mean: Tensor) -> Distribution:
        """The distribution of a target around ``mean``, the precision integrated out."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What rebuilds this belief through :func:`noise_from`."""

    def expectations(self) -> tuple[Tensor, Tensor]:
        """The expected precision and the expected logarithm, of one look at the parameters."""
        return self.precision(), self.log_precision()

    def kl(self) -> Tensor:
        """KL of the belief from its prior; 0 where there is no prior."""
        return torch.zeros(())

    def set_scale(self, scale: float) -> None:
        """Change the scale in place, where the belief is one scale.

        Args:
            scale: The standard deviation, in the target's units.

        Raises:
            ArgumentError: If the belief is more than one scale, or not any.
        """
        raise ArgumentError(
            f"{type(self).__name__} cannot be set to a scale. Use likelihoods.Gaussian('learned') to have it tuned."
        )


class FixedNoise(Noise):
    """Noise of a known scale.

    Args:
        scale: The standard deviation, in the target's units.
    """

    scale: Tensor

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.register_buffer("scale", _positive("noise_scale", scale))

    def precision(self) -> Tensor:  # noqa: D102
        return self.scale**-2

    def extra_repr(self) -> str:  # noqa: D102
        return f"scale={self.scale!r}"

    def log_precision(self) -> Tensor:  # noqa: D102
        return -2 * self.scale.log()

    def variance(self) -> Tensor:  # noqa: D102
        return self.scale**2

    def set_scale(self, scale: float) -> None:  # noqa: D102
        self.scale.fill_(check_positive("noise_scale", scale))

    def distribution(self, mean: Tensor) -> Distribution:  # noqa: D102
        return Normal(mean, self.scale.to(mean).expand_as(mean))

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {"kind": "fixed", "scale": self.scale.tolist()}


class _ScaleNoise(Noise):
    """Noise of one scale for each entry, which is a parameter."""

    @abstractmethod
    def _log_scale(self) -> Tensor: ...

    def precision(self) -> Tensor:
        return (-2 * self._log_scale()).exp()

    def log_precision(self) -> Tensor:
        return -2 * self._log_scale()

    def variance(self) -> Tensor:
        return (2 * self._log_scale()).exp()

    def distribution(self, mean: Tensor) -> Distribution:
        return Normal(mean, self._log_scale().exp().to(mean).expand_as(mean))


class LearnedNoise(_ScaleNoise):
    """Noise whose scale is a parameter, fitted by maximum likelihood.

    Args:
        scale: Where the fit starts, in the target's units.
    """

    def __init__(self, scale: Scale = 1.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(_positive("noise_scale", scale).log())

    def extra_repr(self) -> str:  # noqa: D102
        return f"scale={self.log_scale.detach().exp()!r}"

    def set_scale(self, scale: float) -> None:  # noqa: D102
        with torch.no_grad():
            self.log_scale.fill_(math.log(check_positive("noise_scale", scale)))

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {"kind": "learned", "scale": self.log_scale.exp().tolist()}

    def _log_scale(self) -> Tensor:
        return self.log_scale


class BoundedNoise(_ScaleNoise):
    """Noise whose scale is fitted by maximum likelihood and is no smaller than a bound.

    For training at a temperature below 1, beside which a noise is learned too small: with the noise that was learned at
    temperature 1 as its bound, it begins as large as any and ends no smaller.

    Args:
        minimum: The bound, in the target's units.
        scale: Where the fit starts, in the target's units: a number, or one for each bound.

    Raises:
        ArgumentError: If either is not positive, or they have different shapes.

    Example:
        >>> from bayes_kfac.likelihoods import BoundedNoise, Gaussian
        >>> Gaussian(BoundedNoise(0.5)).noise_scale, Gaussian(BoundedNoise(0.5, scale=0.1)).noise_scale
        (tensor(1.), tensor(0.5000))
    """

    minimum: Tensor

    def __init__(self, minimum: Scale, scale: Scale = 1.0) -> None:
        super().__init__()
        self.register_buffer("minimum", _positive("minimum", minimum))
        start = _positive("scale", scale).to(self.minimum)
        if start.shape not in {(), self.minimum.shape}:
            raise ArgumentError(
                f"scale has shape {tuple(start.shape)} and minimum {tuple(self.minimum.shape)}. Allowed: one number, "
                "or the same shape."
            )
        self.log_scale = nn.Parameter(start.expand_as(self.minimum).log())

    def expectations(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        log_precision = self.log_precision()  # whose gradient is of the whole loss, so that the bound sees its sign
        return log_precision.exp(), log_precision

    def extra_repr(self) -> str:  # noqa: D102
        return f"minimum={self.minimum!r}, scale={self._log_scale().detach().exp()!r}"

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {"kind": "bounded", "minimum": self.minimum.tolist(), "scale": self._log_scale().exp().tolist()}

    def _log_scale(self) -> Tensor:
        return cast(Tensor, _AtLeast.apply(self.log_scale, self.minimum.log()))  # type: ignore[no-untyped-call]


class _AtLeast(torch.autograd.Function):
    """``max(value, low)``, whose gradient vanishes only where a descent would go further below.

    That of ``clamp`` vanishes wherever the value is below, so that it never comes back.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, low: Tensor) -> Tensor:
        return torch.maximum(value, low)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        value, low = ctx.saved_tensors
        (gradient,) = gradients
        return torch.where((value > low) | (gradient < 0), gradient, 0), None


class GammaNoise(Noise):
    """A Gamma posterior over the noise's precision, under a Gamma prior (Zhang et al. 2018, regression experiments).

    The expectation over the precision is taken exactly where the paper's code samples it: the same gradient in
    expectation, with less variance.

    Args:
        concentration: The prior's shape parameter.
        rate: The prior's rate parameter, in squared units of the target.
        shape: The shape of independent precisions, broadcast against one example's output.
    """

    prior_concentration: Tensor
    prior_rate: Tensor

    def __init__(self, concentration: float = 6.0, rate: float = 6.0, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("prior_concentration", torch.tensor(check_positive("concentration", concentration)))
        self.register_buffer("prior_rate", torch.tensor(check_positive("rate", rate)))
        self.log_concentration = nn.Parameter(torch.full(tuple(shape), math.log(concentration)))
        self.log_rate = nn.Parameter(torch.full(tuple(shape), math.log(rate)))

    def extra_repr(self) -> str:  # noqa: D102
        concentration, rate = (log.detach().exp() for log in (self.log_concentration, self.log_rate))
        return f"concentration={concentration!r}, rate={rate!r}"

    def posterior(self) -> Gamma:
        """The posterior of the precision."""
        return Gamma(self.log_concentration.exp(), self.log_rate.exp(), validate_args=False)

    def precision(self) -> Tensor:  # noqa: D102
        return (self.log_concentration - self.log_rate).exp()

    def log_precision(self) -> Tensor:  # noqa: D102
        return torch.digamma(self.log_concentration.exp()) - self.log_rate

    def variance(self) -> Tensor:
        """The expected variance, ``rate / (concentration − 1)``.

        Returns:
            The variance, in squared units of the target.

        Raises:
            ArgumentError: If the concentration is at most 1, where the expectation is infinite.
        """
        concentration = self.log_concentration.exp()
        if bool((concentration <= 1).any()):
            raise ArgumentError(
                f"The posterior's concentration {concentration.tolist()} is at most 1: the noise has no finite "
                "variance. Train longer, or choose a prior with a larger concentration."
            )
        return self.log_rate.exp() / (concentration - 1)

    def distribution(self, mean: Tensor) -> Distribution:  # noqa: D102
        scale = (0.5 * (self.log_rate - self.log_concentration)).exp()
        return StudentT((2 * self.log_concentration.exp()).to(mean), mean, scale.to(mean).expand_as(mean))

    def kl(self) -> Tensor:  # noqa: D102
        prior = Gamma(self.prior_concentration, self.prior_rate, validate_args=False)
        return kl_divergence(self.posterior(), prior).sum()

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {
            "kind": "gamma",
            "concentration": self.prior_concentration.item(),
            "rate": self.prior_rate.item(),
            "shape": list(self.log_concentration.shape),
        }


def noise_from(noise_scale: Scale | str | Noise | dict[str, Any]) -> Noise:
    """Make a belief about the noise from what a user writes for ``noise_scale``.

    Args:
        noise_scale: A number, tensor or array (a known scale), ``"learned"``, a :class:`Noise`, or a ``config()``.

    Returns:
        The belief.

    Raises:
        ArgumentError: If it is none of these.
    """
    if isinstance(noise_scale, Noise):
        return noise_scale
    if isinstance(noise_scale, dict):
        kinds = {"fixed": FixedNoise, "learned": LearnedNoise, "bounded": BoundedNoise, "gamma": GammaNoise}
        arguments = {name: value for name, value in noise_scale.items() if name != "kind"}
        return kinds[noise_scale["kind"]](**arguments)
    if isinstance(noise_scale, str):
        if noise_scale == "learned":
            return LearnedNoise()
        raise ArgumentError(
            f"noise_scale={noise_scale!r} is unknown. Allowed: a positive number or tensor, 'learned', or a Noise such "
            "as GammaNoise(6.0, 6.0)."
        )
    return FixedNoise(noise_scale)


def _positive(name: str, value: Scale) -> Tensor:
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    try:
        tensor = torch.as_tensor(value, dtype=None if is_floating else torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name}={value!r} is not a number. Allowed: finite numbers > 0.") from error
    if tensor.numel() == 0 or not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise ArgumentError(f"{name}={value!r} is out of range. Allowed: finite numbers > 0.")
    return tensor.detach().clone()
