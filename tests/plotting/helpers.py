"""What tests of plots read back."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from matplotlib.axes import Axes
from torch import Tensor


@dataclass
class GaussianPrediction:
    """A stand-in with the attributes that the band needs."""

    mean: Tensor
    epistemic_variance: Tensor
    noise_variance: float = 0.25

    @property
    def stddev(self) -> Tensor:
        return (self.epistemic_variance + self.noise_variance).sqrt()

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        half_width = NormalDist().inv_cdf((1 + level) / 2) * self.stddev
        return self.mean - half_width, self.mean + half_width


def predict(x: Tensor) -> GaussianPrediction:
    return GaussianPrediction(mean=torch.sin(x), epistemic_variance=0.1 + 0.05 * x.square())


def legend_texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]
