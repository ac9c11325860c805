"""The problems that posteriors are compared with Hamiltonian Monte Carlo on: six UCI sets and two functions on a line.

Inputs are ``[examples, features]`` and targets ``[examples, 1]``, both standardised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from uci import data_folder, load_splits

UCI = ("boston", "concrete", "energy", "power", "wine_red", "yacht")
POWER_EXAMPLES = 1000
#: More test inputs than these are left out; it is power that has more.
TEST_EXAMPLES = 200


@dataclass(frozen=True)
class Problem:
    """Standardised data, and the inputs at which functions are compared.

    Attributes:
        x: Training inputs, ``[examples, features]``.
        y: Training targets, ``[examples, 1]``.
        test_x: The inputs at which functions are compared; a grid where there is one input.
        noise: The noise's standard deviation where no network has to find it.
        shift: What is to be added to inputs and targets, after ``scale``, for the data's units; of data on a line.
        scale: What they are to be multiplied by.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    noise: float | None = None
    shift: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def on_a_line(cls, x: Tensor, y: Tensor, margin: float, noise: float | None = None) -> Problem:
        """Standardise one-dimensional data; the grid reaches a margin beyond them."""
        shift, scale = (float(x.mean()), float(y.mean())), (float(x.std()), float(y.std()))
        grid = torch.linspace(float(x.min()) - margin, float(x.max()) + margin, 150)
        x, y, grid = (x - shift[0]) / scale[0], (y - shift[1]) / scale[1], (grid - shift[0]) / scale[0]
        return cls(x[:, None], y[:, None], grid[:, None], noise and noise / scale[1], shift, scale)


def uci(name: str) -> Problem:
    """The first split of a set."""
    splits = load_splits(name, 1)
    x, y = splits.train_x[:, 0], splits.train_y[:, 0]
    if name == "power":
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:POWER_EXAMPLES]
        x, y = x[rows], y[rows]
    return Problem(x, y, splits.test_x[:TEST_EXAMPLES, 0])


def snelson() -> Problem:
    """Snelson and Ghahramani's 200 points."""
    with np.load(next((data_folder().parent / "snelson1d").glob("*.npz")), allow_pickle=False) as file:
        x, y = (torch.as_tensor(file[key], dtype=torch.float32).flatten() for key in ("X", "y"))
    # half the mean square of differences between neighbours: no model of the function enters
    noise = float(y[x.argsort()].diff().square().mean().div(2).sqrt())
    return Problem.on_a_line(x, y, margin=2.0, noise=noise)


def cubic() -> Problem:
    """Twenty points of a cubic with noise of standard deviation 3 (Hernández-Lobato and Adams 2015)."""
    generator = torch.Generator().manual_seed(0)
    x = 8 * torch.rand(20, generator=generator) - 4
    return Problem.on_a_line(x, x**3 + 3 * torch.randn(20, generator=generator), margin=2.0, noise=3.0)


LINES: dict[str, Callable[[], Problem]] = {"cubic": cubic, "snelson": snelson}


def load(name: str) -> Problem:
    """A problem by its name."""
    return LINES[name]() if name in LINES else uci(name)
