"""What a step between measurements asks of a device: a few operations for each layer, and the rest for all at once."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import launches  # noqa: E402
from step_time import Problem  # noqa: E402


def operations(method: str, depth: int) -> dict[str, int]:
    """What a step of a network of so many layers starts."""
    problem = Problem(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth))), (4,), classes=4, batch=8)
    return launches.count(problem, method)


def grown(method: str) -> dict[str, float]:
    """How many more operations a layer more is."""
    three, five = operations(method, 3), operations(method, 5)
    return {name: (five[name] - three.get(name, 0)) / 2 for name in five if five[name] != three.get(name, 0)}


def test_a_layer_adds_its_products_and_little_else():
    """Two products draw its weights and two precondition its gradient; the look for NaN is one for all layers."""
    assert grown("noisy K-FAC") == {"randn": 1, "mm": 4, "cat": 2, "dot": 1}


def test_a_fused_optimizer_adds_nothing():
    assert grown("adamw") == {}
