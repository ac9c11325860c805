"""The examples run without data, and stay short enough to be read in one go."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BENCHMARK = EXAMPLES.parent / "benchmarks" / "regression.py"
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


def test_the_recipe_for_regression_takes_a_table_and_prints_figures_in_its_units(run, tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 2))
    rows = np.column_stack([x, 1000 * x[:, 0] + 100 * generator.normal(size=60)])
    np.savetxt(tmp_path / "table.csv", rows, delimiter=",", header="a,b,target")
    printed = run("regression", str(tmp_path / "table.csv"), "--steps", "30")
    found = re.findall(r"test RMSE (\S+), log-likelihood (\S+), of 6 rows", printed)
    assert len(found) == 2
    assert all(100 < float(error) < 2000 and -12 < float(density) < -6 for error, density in found)
    assert "the held-out tenth chooses temperature" in printed


def test_the_recipe_for_regression_is_that_of_the_benchmark(monkeypatch):
    for folder in (EXAMPLES, EXAMPLES.parent / "benchmarks"):
        monkeypatch.syspath_prepend(folder)
    own, measured = runpy.run_path(str(EXAMPLES / "regression.py")), runpy.run_path(str(BENCHMARK))
    options = measured["recipe"]("kron", temperature=1.0, epochs=1).options()
    assert {name: options[name] for name in own["OPTIONS"]} == own["OPTIONS"]
    assert options["num_samples"] == 1  # the rest is the default of the library
    for name in ("TEMPERATURES", "MEMBERS", "EPOCHS", "STEPS", "BATCH_SIZE"):
        assert own[name] == measured[name]


TABLES = [
    (None, "There is no file"),
    ("1,2\n3,4\n", "has no 20 rows"),
    ("1\n" * 30, "has no 20 rows"),
    ("1,2\n3,4,5\n", "not of one length"),
    ("".join(f"{row},7\n" for row in range(30)), "is constant"),
]


@pytest.mark.parametrize(("text", "message"), TABLES)
def test_a_table_that_will_not_do_is_one_clear_sentence(run, tmp_path, text, message):
    if text is not None:
        (tmp_path / "table.csv").write_text(text)
    with pytest.raises(SystemExit, match=message):
        run("regression", str(tmp_path / "table.csv"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_under_eighty_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80
