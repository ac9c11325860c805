"""Many small networks trained at once: a stack of independent linear layers, and its adapter.

A step of a 1×50 network is all overhead; ten splits of a data set in one stack cost what one does. The stack is also
what a module kind of one's own looks like: one adapter and one ``register`` line. Shapes: inputs ``[replicas, batch,
in]``, weights ``[replicas, out, in]``; the posterior has one block for each replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import bayes_kfac as bk
from bayes_kfac.curvature import ModuleAdapter, register


class ReplicatedLinear(nn.Module):
    """Independent linear layers, Xavier-uniform as in the paper's code.

    Args:
        replicas: How many.
        in_features: The inputs of each.
        out_features: The outputs of each.
        generator: The source of randomness of the initial weights.
    """

    def __init__(self, replicas: int, in_features: int, out_features: int, generator: torch.Generator) -> None:
        super().__init__()
        limit = (6 / (in_features + 1 + out_features)) ** 0.5
        values = torch.rand(replicas, out_features, in_features + 1, generator=generator)
        values = (2 * values - 1) * limit
        self.weight = nn.Parameter(values[..., :-1].clone())
        self.bias = nn.Parameter(values[..., -1].clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``[replicas, batch, in]`` to ``[replicas, batch, out]``."""
        return torch.baddbmm(self.bias.unsqueeze(1), inputs, self.weight.mT)


@register(ReplicatedLinear)
class ReplicatedLinearAdapter(ModuleAdapter):
    """One block for each replica."""

    def input_rows(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self._append_one(inputs.unsqueeze(-2))

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.unsqueeze(-2)

    def _weight_shape(self) -> tuple[int, ...]:
        return tuple(self.module.weight.shape)


class ReplicatedMLP(nn.Module):
    """Independent networks with one hidden ReLU layer: ``[batch, replicas, in]`` to ``[batch, replicas, outputs]``.

    Args:
        replicas: How many.
        in_features: The inputs of each.
        hidden: The hidden units of each.
        generator: The source of randomness of the initial weights.
        outputs: The outputs of each.
    """

    def __init__(
        self, replicas: int, in_features: int, hidden: int, generator: torch.Generator, outputs: int = 1
    ) -> None:
        super().__init__()
        self.hidden = ReplicatedLinear(replicas, in_features, hidden, generator)
        self.output = ReplicatedLinear(replicas, hidden, outputs, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """The regression functions' values."""
        return self.output(self.hidden(inputs.transpose(0, 1)).relu()).transpose(0, 1)


class ReplicatedNoisyNaturalGradient(bk.NoisyNaturalGradient):
    """Noisy natural gradient whose ``kl_clip`` is that of each replica: the step of one does not shorten the others'.

    All layers are those of a :class:`ReplicatedMLP`.
    """

    def _changes(
        self, states: Any, gradients: Mapping[str, Tensor], directions: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        clip: Tensor | float = 1.0
        if self.kl_clip is not None:
            lengths = [
                torch.linalg.vecdot(states[name].momentum.flatten(1), direction.flatten(1))
                * (self._group(name)["lr"] ** 2 / states[name].momentum_weight)
                for name, direction in directions.items()
            ]
            # for matrices [replicas, out, in]
            clip = (self.kl_clip / torch.stack(lengths).sum(0)).sqrt().clamp(max=1.0)[:, None, None]
        return {name: direction * (-self._group(name)["lr"] * clip) for name, direction in directions.items()}
