"""A Gaussian model output: what linearised prediction gives, before the likelihood says what it means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kfac import linalg


@dataclass(frozen=True)
class GaussianOutput:
    """A model's output as a Gaussian, independent between examples.

    Attributes:
        mean: ``[batch, ...]``.
        spread: The covariance over all outputs of one example, ``[batch, outputs, outputs]``; or their variances,
            ``[batch, outputs]``, where the covariances between them were not asked for.
    """

    mean: Tensor
    spread: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether only variances are known."""
        return self.spread.ndim == 2

    @property
    def variance(self) -> Tensor:
        """The variance of each output, shaped like the mean."""
        variances = self.spread if self.is_diagonal else self.spread.diagonal(dim1=-2, dim2=-1)
        return variances.reshape(self.mean.shape)

    @property
    def covariance(self) -> Tensor:
        """``[batch, outputs, outputs]``; diagonal where only variances are known."""
        return torch.diag_embed(self.spread) if self.is_diagonal else self.spread

    def sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Draws, ``[num_samples, *mean.shape]``; those of different examples are independent."""
        shape = (num_samples, *self.spread.shape[:2])
        like = self.spread
        device = like.device if generator is None else generator.device
        noise = torch.randn(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)
        if self.is_diagonal:
            noise = noise * self.spread.clamp(min=0).sqrt()
        else:
            root = linalg.psd_root(self.spread, ["output covariance"])
            noise = torch.einsum("bij,sbj->sbi", root, noise)
        return self.mean + noise.reshape(num_samples, *self.mean.shape)
