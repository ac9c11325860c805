"""The contract of a likelihood.

The first dimension of outputs and targets is the batch; one example is everything at one index of it. The negative
log-likelihood of an example *sums* over all its further dimensions (outputs, time steps, pixels), and the criterion is
the mean over the batch, so that ``num_data`` times the criterion is the data's negative log-likelihood. All gradients
here are of one example's negative log-likelihood, never of the batch mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bayes_kfac.batches import weighing_examples, widened
from bayes_kfac.errors import ArgumentError, TargetError, check_choice

_REGISTRY: dict[str, type[Likelihood]] = {}


class Likelihood(nn.Module, ABC):
    """What a model's output says about the target; a criterion, and the Fisher of its output."""

    def forward(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean over the batch of the negative log-likelihood, in nats.

        Args:
            output: The model's output, ``[batch, ...]``.
            target: The targets.
            mask: Which targets there are, boolean, ``[batch]`` or with further leading dimensions of the target:
                padded steps, unlabelled nodes. What the others hold does not matter. Examples without any are not in
                the mean.

        Returns:
            A scalar.

        Raises:
            TargetError: If outputs and targets do not fit each other, or hold no example.
        """
        check_examples(output)
        losses = self.negative_log_likelihood(output, target, mask)
        if mask is None:
            return losses.mean()
        return losses.sum() / weighing_examples(mask).sum().clamp(min=1)

    def negative_log_likelihood(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The negative log-likelihood of each example, ``[batch]``; masked targets add nothing."""
        if mask is not None:
            check_mask(mask, target)
            # zeros in their place: what their losses are does not matter, but NaN would get into the gradient
            target = torch.where(widened(mask, target), target, torch.zeros_like(target))
        self.check(output, target)
        if mask is not None:
            output = torch.where(self.output_mask(mask, output), output, torch.zeros_like(output))
        losses = self._elementwise(output, target)
        if mask is not None:
            losses = torch.where(widened(mask, losses), losses, torch.zeros_like(losses))
        return losses.flatten(1).sum(1) if losses.ndim > 1 else losses

    def target_gradient(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The gradient of each example's negative log-likelihood with respect to its output, shaped like ``output``."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.negative_log_likelihood(leaf, target, mask).sum(), leaf)
        return gradient

    @abstractmethod
    def check(self, output: Tensor, target: Tensor) -> None:
        """Check that outputs and targets fit each other.

        Raises:
            TargetError: If they do not.
        """

    @abstractmethod
    def sample_gradient(self, output: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Output gradients for targets sampled from the model, ``[num_samples, *output.shape]``."""

    @abstractmethod
    def fisher_root(self, output: Tensor) -> Tensor:
        """Vectors whose outer products sum to each example's output Fisher, ``[columns, *output.shape]``."""

    @abstractmethod
    def distribution(self, output: Tensor) -> Distribution:
        """The distribution of the target given the output: the predictive density of one draw of the weights."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What rebuilds this likelihood through :func:`from_config`, in numbers, strings, lists and dictionaries."""

    def output_mask(self, mask: Tensor, output: Tensor) -> Tensor:
        """Which elements of the output a mask of the targets leaves, boolean, broadcasting against ``output``."""
        return widened(mask, output)

    def at_noise_scale(self, nll: Tensor, num_targets: float, noise_scale: Tensor) -> tuple[Tensor, Tensor]:
        """What another scale of the noise makes of a negative log-likelihood, and the factor on the Fisher.

        Both are differentiable in ``noise_scale``.

        Args:
            nll: The negative log-likelihood of a data set, summed, at the present noise.
            num_targets: How many numbers its targets hold.
            noise_scale: The other scale, in the target's units.

        Raises:
            ArgumentError: If the likelihood has no noise with one scale.
        """
        raise ArgumentError(
            f"noise_scale= and noise=True are for likelihoods.Gaussian with one scale, but this is {self!r}. Leave "
            "them out."
        )

    def set_noise_scale(self, noise_scale: float) -> None:
        """Change the scale of the noise in place.

        Args:
            noise_scale: The scale, in the target's units.

        Raises:
            ArgumentError: If the likelihood has no noise with one scale.
        """
        raise ArgumentError(f"{self!r} has no noise with one scale to be set.")

    def kl(self) -> Tensor:
        """KL of the posterior of the likelihood's own parameters from their prior; 0 where they have none."""
        return torch.zeros(())

    @abstractmethod
    def _elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihoods before the sum over an example's dimensions."""


def register(likelihood: type[Likelihood]) -> type[Likelihood]:
    """Class decorator that makes a likelihood known by its class name, for saving and loading.

    Args:
        likelihood: The class.

    Returns:
        The class.

    Raises:
        ArgumentError: If the library has a likelihood of this name.
    """
    name, known = likelihood.__name__, _REGISTRY.get(likelihood.__name__)
    if known is not None and known.__module__.startswith(__package__) and known.__module__ != likelihood.__module__:
        raise ArgumentError(
            f"The library has a likelihood named {name!r}: files would not tell yours from it. Rename it."
        )
    _REGISTRY[name] = likelihood
    return likelihood


def available() -> tuple[str, ...]:
    """The names of the registered likelihoods."""
    return tuple(sorted(_REGISTRY))


def from_config(name: str, config: Mapping[str, Any]) -> Likelihood:
    """Rebuild a likelihood from its class name and :meth:`Likelihood.config`.

    Args:
        name: The registered class name.
        config: The keyword arguments that the class's ``config()`` gave.

    Returns:
        The likelihood.
    """
    check_choice("likelihood", name, available())
    build: Callable[..., Likelihood] = _REGISTRY[name]
    return build(**config)


def check_mask(mask: Tensor, target: Tensor) -> None:
    """Refuse masks that do not say of each target whether it is there.

    Args:
        mask: The mask.
        target: The targets.

    Raises:
        TargetError: If the targets are no tensor, the mask is not boolean, or its shape is not that of the target's
            leading dimensions.
    """
    check_tensor(target)
    if not isinstance(mask, Tensor):
        raise TargetError(
            f"mask of type {type(mask).__name__} must be a boolean tensor, True for the targets that count: "
            "torch.as_tensor(mask)."
        )
    if mask.dtype != torch.bool:
        raise TargetError(f"mask of dtype {mask.dtype} must be boolean, True for the targets that count: mask.bool().")
    if mask.ndim == 0 or mask.shape != target.shape[: mask.ndim]:
        raise TargetError(
            f"mask of shape {tuple(mask.shape)} must have the leading dimensions of the target's shape "
            f"{tuple(target.shape)}: [batch], [batch, time], ..."
        )


def check_examples(output: object) -> None:
    """Refuse outputs that are no tensors, and a batch without examples: it has no mean loss, and no curvature.

    Args:
        output: The model's output.

    Raises:
        TargetError: If it is no tensor, or holds no example.
    """
    if not isinstance(output, Tensor):
        raise TargetError(
            f"output of type {type(output).__name__} must be a tensor: the one in it that the targets are of, such as "
            "model(x).logits."
        )
    if output.shape[:1] == (0,):
        raise TargetError(
            f"output of shape {tuple(output.shape)} holds no example. Allowed: at least one. Skip batches that are "
            "empty: if len(target) == 0: continue."
        )


def check_tensor(target: object) -> None:
    """Refuse targets that are no tensors: arrays, data frames, lists.

    Args:
        target: The targets.

    Raises:
        TargetError: If they are no tensor.
    """
    if not isinstance(target, Tensor):
        raise TargetError(f"target of type {type(target).__name__} must be a tensor: torch.as_tensor(target).")


def check_same_shape(output: Tensor, target: Tensor) -> None:
    """Refuse targets that would broadcast against outputs: the silent bug behind many wrong losses.

    Args:
        output: The model's output.
        target: The targets.

    Raises:
        TargetError: If the target is no tensor, shapes differ, or its dtype is not floating-point.
    """
    check_tensor(target)
    if output.shape != target.shape:
        hint = ""
        if output.numel() == target.numel():
            hint = f" Reshape one of them: target.reshape({tuple(output.shape)})."
        raise TargetError(
            f"output of shape {tuple(output.shape)} and target of shape {tuple(target.shape)} must be equal.{hint}"
        )
    if not target.is_floating_point():
        raise TargetError(f"target of dtype {target.dtype} must be floating point: target.to({output.dtype}).")
