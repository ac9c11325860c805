"""The benchmark of a step's time runs on every method, keeps its figures, and its phases add up to a step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import step_time  # noqa: E402


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(step_time, "PERIOD", 3)
    monkeypatch.setattr(step_time, "WARM", 2)
    monkeypatch.setattr(step_time, "TIMED", 5)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def test_the_command_keeps_the_figures_of_every_method_and_measures_them_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step_time.py", "1x50", "--results", str(tmp_path)])
    step_time.main()
    path = tmp_path / "step_time" / "cpu" / "1x50.json"
    kept = json.loads(path.read_text())
    own = {"sgd", "adamw", "noisy K-FAC", "noisy EK-FAC", "noisy diagonal"}
    assert own <= kept["rows"].keys()
    assert kept["rows"]["adamw"]["ratios"] == [1.0] * len(kept["rows"]["adamw"]["ratios"])
    assert all(row["milliseconds"] > 0 for row in kept["rows"].values())
    assert set(kept["phases"]) == {"forward and back", "sampling", "direction and update", "statistics", "refresh"}
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in own)
    before = path.stat().st_mtime_ns
    step_time.main()
    assert path.stat().st_mtime_ns == before


def test_exponents_are_those_of_the_upper_sizes(monkeypatch):
    """With a time that is a constant and the square of the size, the upper half tells the square."""

    def periods(problem, device, rounds, methods):
        (size,) = problem.shape
        return {name: {"milliseconds": 1e-9 + size**2} for name in methods}

    monkeypatch.setattr(step_time, "periods", periods)
    found = step_time.sweep("width", torch.device("cpu"), 1)
    assert found["exponents"] == pytest.approx({"adamw": 2.0, "noisy K-FAC": 2.0})
    assert list(found["rows"]) == ["32", "64", "128", "256", "512", "1024"]


def test_the_network_of_the_gpu_is_covered_by_blocks():
    """A small stack of its kind has one block for each of its weights, and trains a step."""
    problem = step_time.Problem(lambda: step_time.networks.Gpt(layers=1, width=8, heads=2), (5, 8), batch=4)
    optimizer, closure = step_time.noisy(problem, torch.device("cpu"))
    assert len(optimizer.layers) == 5
    assert optimizer.step(closure).isfinite()
