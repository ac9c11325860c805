"""Made-up predictions for the tests of metrics."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

finite = st.floats(-1e3, 1e3)
seeds = st.integers(0, 2**32 - 1)


def random_classification(seed: int, n: int, num_classes: int, *, decimals: int | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities in float64, rounded to make confidences tie if ``decimals`` is given, and labels."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.softmax(2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64), -1)
    if decimals is not None:
        probs = probs.round(decimals=decimals)
        probs[:, -1] += 1 - probs.sum(-1)
        probs = probs.clamp(min=0)
        probs /= probs.sum(-1, keepdim=True)
    labels = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
    return probs, labels
