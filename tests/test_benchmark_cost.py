"""The benchmark of cost times every method, tells when a level is reached, and shows nothing where results miss."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cost  # noqa: E402


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two splits of a small set under the names of both."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 3))
    y = 5 + 2 * x[:, 0] + 0.3 * generator.normal(size=60)
    order = np.stack([np.arange(60), np.roll(np.arange(60), 30)])
    folder = tmp_path / "data" / "uci"
    folder.mkdir(parents=True)
    for name in cost.DATA_SETS:
        np.savez(folder / f"{name}.npz", X=x, y=y, train_idx=order[:, :50], test_idx=order[:, 50:])
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return x, y


def test_parts_are_disjoint_and_the_density_is_of_the_targets_in_their_units(data):
    _, y = data
    problem = cost.Problem.of("energy", 1)
    assert [len(part) for part in (problem.x, problem.held_x, problem.test_x)] == [45, 5, 10]
    rows = [tuple(row) for part in (problem.x, problem.held_x) for row in part.tolist()]
    assert len(set(rows)) == 50
    assert problem.scale == pytest.approx(np.roll(y, -30)[:50].std())
    # the truth, predicted: the best noise is chosen where it is held out, and is that of the data
    found = cost.log_likelihood(problem, lambda inputs: truth(inputs, *data)[None])
    assert found == pytest.approx(-0.5 * math.log(2 * math.pi * 0.3**2) - 0.5, abs=0.6)


def truth(inputs, x, y):
    x, y = (np.roll(own, -30, 0)[:50] for own in (x, y))
    first = inputs[:, :1].double() * x[:, 0].std() + x[:, 0].mean()
    return ((5 + 2 * first - y.mean()) / y.std()).float()


def test_every_method_runs_and_the_table_names_it(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost.py", "--quick", "--data", "energy"])
    cost.main()
    printed = capsys.readouterr().out
    methods = [name for name in cost.METHODS if name != "IVON" or find_spec("ivon")]
    for name in methods:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"| {name} |")]
        assert "nan" not in line
    assert cost.section(tmp_path) == ""


def test_a_level_costs_the_smallest_budget_that_reaches_it():
    run = {"seconds": [1.0, 2.0, 4.0], "log_likelihood": [-3.0, -1.0, -2.0]}
    assert cost.seconds_to(-3.0, run) == 1.0
    assert cost.seconds_to(-1.5, run) == 2.0
    assert cost.seconds_to(-0.5, run) == math.inf
    other = {"seconds": [9.0, 10.0, 11.0], "log_likelihood": [-4.0, -1.2, -0.9]}
    lines = cost.table({"energy": {"Adam": [run], "IVON": [other]}}).splitlines()
    assert "| Adam | 2 s | 2 s | -1.000 |" in lines
    assert "| IVON | 10 s | 11 s | -0.900 |" in lines
