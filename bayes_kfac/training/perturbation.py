"""The sample in the weights: puts ``mean + noise`` into a model's layers, and the mean back.

Weights are changed in place under ``no_grad`` with the version counters of autograd on, so that a backward pass that
comes after the mean is back fails instead of using the wrong weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bayes_kfac.curvature import Layer
from bayes_kfac.structures import BlockGaussian, standard_normal


class Perturbation:
    """Noise in the weights of layers, one matrix ``[*blocks, out, in]`` for each.

    Args:
        layers: The layers by name.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self.noise: dict[str, Tensor] = {}
        self._means: list[tuple[Tensor, Tensor]] = []

    def draw(self, gaussians: Mapping[str, BlockGaussian], generator: torch.Generator | None) -> None:
        """Draw the noise of every layer that has a Gaussian; the others stay at their mean."""
        self.noise = {
            name: gaussian.sample(standard_normal(gaussian, generator)) for name, gaussian in gaussians.items()
        }

    def negate(self) -> None:
        """Turn the noise into its antithetic counterpart."""
        self.noise = {name: -noise for name, noise in self.noise.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Add the noise to the weights, remembering the means exactly."""
        for name, noise in self.noise.items():
            layer = self.layers[name]
            tensors = layer.tensors(noise)
            for key, parameter in layer.parameters.items():
                self._means.append((parameter, parameter.clone()))
                parameter.add_(tensors[key])

    @torch.no_grad()
    def restore(self) -> None:
        """Put the means back, bit for bit."""
        for parameter, mean in self._means:
            parameter.copy_(mean)
        self._means.clear()
