"""Every test of plots closes its figures, and leaves Matplotlib's global style as it was."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor

mpl.use("Agg")


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    """Close all figures, and check that no plot touched the global style."""
    before = mpl.rcParams.copy()
    yield
    plt.close("all")
    assert mpl.rcParams == before


@pytest.fixture
def classification() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(2 * torch.randn(300, 4, generator=generator), -1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(-1)
