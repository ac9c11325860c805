"""The examples run without data, and stay short enough to be read in one go."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = ["autoencoder", "gcn", "gpt", "lstm", "resnet_batchnorm", "resnet_groupnorm", "vit"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example as a script, in this process and without data; returns what it prints."""
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path))
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_smoke_run_needs_no_data_and_stays_finite(name, run):
    printed = run(name, "--smoke")
    bounds = [float(value) for value in re.findall(r"negative ELBO (\S+) nats", printed)]
    assert bounds, printed
    assert all(math.isfinite(bound) for bound in bounds)
    assert "random numbers of its shape stand in" in printed


def test_steps_and_seed_are_what_was_asked_for(run):
    printed = run("gcn", "--smoke", "--steps", "5", "--seed", "1")
    assert "step    5 of 5" in printed
    assert _figures(printed) == _figures(run("gcn", "--smoke", "--steps", "5", "--seed", "1"))
    assert _figures(printed) != _figures(run("gcn", "--smoke", "--steps", "5", "--seed", "2"))


def _figures(printed: str) -> list[str]:
    return re.findall(r"negative ELBO \S+ nats|test \S+ +\S+", printed)


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_data_are_one_clear_sentence(name, run):
    with pytest.raises(SystemExit) as stop:
        run(name)
    message = str(stop.value)
    assert "is missing from the folder that the environment variable BAYES_KFAC_DATA names; it is" in message
    assert "\n" not in message


def test_sampled_laplace_is_drawn_and_printed(run, tmp_path):
    output = tmp_path / "figures" / "laplace_sampling.png"
    printed = run("laplace_sampling", "--splits", "1", "--steps", "6", "--output", str(output))
    assert "a noisy sine stands in for it" in printed
    assert printed.count("| sampled weights |") == printed.count("| linearised |") == 2
    assert "nan" not in printed
    assert output.stat().st_size < 100_000


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_under_eighty_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80
