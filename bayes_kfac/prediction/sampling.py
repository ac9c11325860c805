"""Sampled prediction: reusable weight draws, and the model's outputs under each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac.prediction.forward import call, evaluating


@dataclass(frozen=True)
class Draws:
    """Weights drawn from a posterior: the same functions at every call that they are passed to.

    Attributes:
        values: For each parameter with a posterior, the drawn values, ``[num_samples, *parameter.shape]``.
    """

    values: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.values.values())).shape[0]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The draws one by one, each a dictionary of parameters by name."""
        for index in range(len(self)):
            yield {name: value[index] for name, value in self.values.items()}


def sampled_outputs(model: nn.Module, state: Mapping[str, Tensor], draws: Draws, inputs: Any) -> Tensor:
    """The model's outputs under each draw.

    Args:
        model: The model; left as it was.
        state: All parameters and buffers at the mean.
        draws: The draws.
        inputs: The model's input.

    Returns:
        ``[num_samples, batch, ...]``.
    """
    with evaluating(model), torch.no_grad():
        return torch.stack([call(model, {**state, **draw}, inputs) for draw in draws])
