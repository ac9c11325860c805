"""The plain training loop, the networks and data it runs on, and what makes two trainings the same.

The plain loop is ``with sampled_params(): zero_grad(); likelihood(model(x), y).backward()`` and ``step()``. A loop of
another shape is right if mean, statistics and posterior after some steps are those of the plain one from equal seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.structures import BlockGaussian
from bayes_kfac.training.state import BlockState
from tests.helpers import randn, rng, seeded

N, SIGMA, EXAMPLES = 64, 0.5, 8
#: Float64 numbers that differ in the order of their sums only.
SAME = {"rtol": 1e-9, "atol": 1e-9}

Batch = tuple[Tensor, Tensor]
BATCHES: list[Batch] = [(randn(EXAMPLES, 3, seed=i), randn(EXAMPLES, 2, seed=50 + i)) for i in range(5)]
X = randn(4, 3, seed=99)
MASK = torch.tensor([True, False, True, True, False, True, True, True])


class Net(nn.Module):
    """Two layers, whose output may be wrapped and whose activation may be another module."""

    def __init__(
        self, wrap: Callable[[Tensor], Any] | None = None, activation: nn.Module | None = None, hidden: int = 5
    ) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(3, hidden), activation or nn.Tanh(), nn.Linear(hidden, 2)
        self.wrap = wrap
        seeded(self)

    def forward(self, inputs: Tensor) -> Any:
        output = self.head(self.act(self.body(inputs)))
        return output if self.wrap is None else self.wrap(output)


class ImageNet(nn.Module):
    """Convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2), nn.Flatten(), nn.Linear(8, 2)
        )
        seeded(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Sequences(nn.Module):
    """A recurrence and attention, whose forward passes are written out while they are watched."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.LSTM(3, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)
        seeded(self)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.recurrence(inputs)
        return self.head(self.attention(hidden, hidden, hidden)[0])


def gaussian(scale: Any = SIGMA) -> bk.likelihoods.Gaussian:
    return bk.likelihoods.Gaussian(scale).double()


def float_net() -> nn.Module:
    return Net().float()


def float_batches(count: int = len(BATCHES)) -> list[Batch]:
    return [(x.float(), y.float()) for x, y in BATCHES[:count]]


def make(model: nn.Module, likelihood: bk.likelihoods.Likelihood | None = None, **options: Any) -> bk.NoisyKFAC:
    """An optimizer that is random in its weight samples only, by its generator."""
    defaults = {"num_data": N, "lr": 0.05, "fisher": "exact", "statistics_every": 3, "inverse_every": 3}
    options = {**defaults, "generator": rng(7), **options}
    return bk.NoisyKFAC(model, gaussian() if likelihood is None else likelihood, **options)


def train(optimizer: bk.NoisyKFAC, batches: Iterable[Batch] = BATCHES, model: Any = None) -> bk.NoisyKFAC:
    """The plain loop."""
    model = optimizer.model if model is None else model
    for x, y in batches:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            optimizer.likelihood(model(x), y).backward()
        optimizer.step()
    return optimizer


def assert_means(actual: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    pairs = zip(actual.named_parameters(), expected.named_parameters(), strict=True)
    for (name, mean), (_, reference) in pairs:
        assert_close(mean, reference, **tolerance or SAME, msg=lambda text, name=name: f"{name}: {text}")


def assert_blocks(actual: Mapping[str, BlockState], expected: Mapping[str, BlockState], **tolerance: float) -> None:
    """Statistics and the Gaussians that are sampled from are the same."""
    assert list(actual) == list(expected)
    for name, state in expected.items():
        mine = actual[name].statistics
        assert dict(mine.counts) == pytest.approx(dict(state.statistics.counts), rel=1e-9), name
        for key in state.statistics.sums:
            assert_close(mine.mean(key), state.statistics.mean(key), **tolerance or SAME)
        assert_gaussians(actual[name].posterior, state.posterior, **tolerance)


def assert_gaussians(actual: BlockGaussian, expected: BlockGaussian, **tolerance: float) -> None:
    for key, value in expected.state.items():
        assert_close(actual.state[key], value, **tolerance or SAME)


def assert_same(actual: bk.NoisyKFAC, expected: bk.NoisyKFAC, **tolerance: float) -> None:
    """Mean, statistics and posterior are the same, block for block."""
    assert actual.steps == expected.steps
    assert_means(actual.model, expected.model, **tolerance)
    assert_blocks(actual.blocks, expected.blocks, **tolerance)
    posterior = actual.posterior()
    for name, block in expected.posterior().blocks.items():
        assert_gaussians(posterior.blocks[name], block, **tolerance)


def assert_identical(actual: bk.NoisyKFAC, expected: bk.NoisyKFAC) -> None:
    """The same to the last bit."""
    assert_same(actual, expected, rtol=0, atol=0)


def bare_of_hooks(*modules: nn.Module) -> bool:
    parts = [part for module in modules for part in module.modules()]
    return not any(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in parts)
