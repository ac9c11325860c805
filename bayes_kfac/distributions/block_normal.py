"""The normal distribution of one block's weights, whatever the structure of its precision.

A sample is ``loc + B ε`` of shape ``[..., *blocks, out, in]``, with ``B Bᵀ = P⁻¹`` of a
:class:`~bayes_kfac.structures.BlockGaussian`, by whose algebra everything here is computed: nothing dense is formed.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from bayes_kfac.errors import ArgumentError
from bayes_kfac.structures.gaussian import BlockGaussian


class BlockNormal(TorchDistribution):
    """A block's Gaussian around a mean, for ``pyro.sample``.

    All of ``[*blocks, out, in]`` is one event. Samples are reparameterised, and gradients flow to ``loc``.

    Args:
        loc: Mean, ``[..., *blocks, out, in]``.
        gaussian: The zero-mean Gaussian of the block.
        validate_args: Whether to check values, here and in :meth:`log_prob`; by default what PyTorch is set to. The
            shape is always checked.

    Raises:
        ArgumentError: If ``loc`` does not end in the block's shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"loc": constraints.dependent}
    has_rsample = True

    loc: Tensor
    gaussian: BlockGaussian

    def __init__(self, loc: Tensor, gaussian: BlockGaussian, validate_args: bool | None = None) -> None:
        event_shape = torch.Size(gaussian.shape)
        batch_dim = loc.dim() - len(event_shape)
        if batch_dim < 0 or loc.shape[batch_dim:] != event_shape:
            raise ArgumentError(
                f"loc has shape {tuple(loc.shape)}, but the Gaussian is over blocks of {tuple(event_shape)}. Allowed: "
                "that shape, after any batch dimensions."
            )
        self.loc, self.gaussian = loc, gaussian
        super().__init__(loc.shape[:batch_dim], event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """All real blocks."""
        return constraints.independent(constraints.real, self.event_dim)

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the distribution with its batch dimensions expanded, sharing memory.

        Args:
            batch_shape: The new batch shape.
            _instance: The instance to fill in, where a subclass overrides this method.

        Returns:
            The expanded distribution.
        """
        new: Self = self._get_checked_instance(BlockNormal, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        new.loc, new.gaussian = self.loc.expand(batch_shape + self.event_shape), self.gaussian
        super(BlockNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: _size = ()) -> Tensor:
        """Draw reparameterised samples.

        Args:
            sample_shape: Shape of the independent draws.

        Returns:
            Samples, ``[*sample_shape, *batch_shape, *blocks, out, in]``.
        """
        shape = self._extended_shape(sample_shape)
        return self.loc + self.gaussian.sample(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of blocks.

        Args:
            value: Blocks, ``[..., *blocks, out, in]``, whose leading dimensions broadcast with the batch shape.

        Returns:
            Log densities, ``[...]``.
        """
        if self._validate_args:
            self._validate_sample(value)
        away = value - self.loc
        distance = (away * self.gaussian.multiply(away)).sum(tuple(range(-self.event_dim, 0)))
        return 0.5 * (self._log_det() - distance - self.event_shape.numel() * math.log(2 * math.pi))

    def entropy(self) -> Tensor:
        """Return the differential entropy in nats, ``[*batch_shape]``."""
        entropy = 0.5 * (self.event_shape.numel() * (1 + math.log(2 * math.pi)) - self._log_det())
        return entropy.expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Mean, ``[*batch_shape, *blocks, out, in]``."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """Mode, which is the mean, ``[*batch_shape, *blocks, out, in]``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each weight, ``[*batch_shape, *blocks, out, in]``."""
        return self.gaussian.marginal_variance().expand_as(self.loc)

    def _log_det(self) -> Tensor:
        """``log det P`` of all blocks together, a scalar."""
        return self.gaussian.logdet().sum()
