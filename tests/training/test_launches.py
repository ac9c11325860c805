"""What a step between measurements asks of a device: a few operations for each layer, and the rest for all at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bayes_kfac as bk

#: They start no work on a device.
VIEWS = {"as_strided", "detach", "empty", "expand", "promote_types", "select", "slice", "split", "split_with_sizes"}
VIEWS |= {"squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view"}


class Counting(TorchDispatchMode):
    """Counts the operations that start work."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches(depth: int) -> Counter[str]:
    """The operations of a step without those of the model's forward and backward passes."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    optimizer = bk.NoisyKFAC(model, bk.likelihoods.Gaussian(1.0), num_data=32, warmup=False)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    counts: Counter[str] = Counter()
    for step in range(13):
        context = optimizer.sampled_params()
        with Counting(counts):
            context.__enter__()
        optimizer.likelihood(model(x), y).backward()
        with Counting(counts):
            context.__exit__(None, None, None)
            optimizer.step()
        optimizer.zero_grad()
        if step < 12:
            counts.clear()
    return counts


def test_a_layer_adds_its_products_and_little_else():
    """Two products draw its weights and two precondition its gradient; the sum is the CPU's look for NaN."""
    three, five = launches(3), launches(5)
    grown = {name: (five[name] - three[name]) / 2 for name in five if five[name] != three[name]}
    assert grown == {"randn": 1, "mm": 4, "cat": 2, "dot": 1, "sum": 1}
