"""The benchmark's stacked networks are independent networks, and its command runs, keeps results and resumes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bayes_kfac as bk

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from replicas import ReplicatedMLP, ReplicatedNoisyNaturalGradient  # noqa: E402


@pytest.mark.parametrize("kl_clip", [None, 1e-4])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_stack_has_the_statistics_of_its_networks_one_by_one(kl_clip, outputs):
    """Each replica's factors, and its whole step, are those of the same network trained alone, maybe with its noise."""
    torch.manual_seed(0)
    stack = ReplicatedMLP(3, 4, 5, torch.Generator().manual_seed(0), outputs).double()
    x, y = torch.randn(8, 3, 4).double(), torch.randn(8, 3, 1).double()
    options = {"num_data": 20, "fisher": "exact", "lr": 0.1, "statistics_every": 1, "kl_clip": kl_clip, "warmup": False}

    def step(model, inputs, targets, kind=bk.NoisyNaturalGradient):
        own = {1: bk.likelihoods.Gaussian(0.5), 2: bk.likelihoods.HeteroscedasticGaussian()}
        likelihood = own[outputs].double()
        optimizer = kind(model, likelihood, **options)
        with optimizer.sampled_params():
            likelihood(model(inputs), targets).backward()
        optimizer.step()
        return optimizer

    alone = []
    for index in range(3):
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, outputs)).double()
        with torch.no_grad():
            for layer, source in ((model[0], stack.hidden), (model[2], stack.output)):
                layer.weight.copy_(source.weight[index])
                layer.bias.copy_(source.bias[index])
        alone.append((model, step(model, x[:, index], y[:, index])))
    before = stack.hidden.weight.detach().clone()
    together = step(stack, x, y, ReplicatedNoisyNaturalGradient)
    assert not torch.equal(stack.hidden.weight, before)
    for index, (model, optimizer) in enumerate(alone):
        for mine, name in (("hidden", "0"), ("output", "2")):
            for statistic in ("input", "gradient"):
                torch.testing.assert_close(
                    together.blocks[mine].statistics.mean(statistic)[index],
                    optimizer.blocks[name].statistics.mean(statistic),
                )
        torch.testing.assert_close(stack.hidden.weight[index], model[0].weight)
        torch.testing.assert_close(stack.output.bias[index], model[2].bias)


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "uci.py"), "--results", str(tmp_path / "results"), *arguments]
    environment = {**os.environ, "BAYES_KFAC_DATA": str(tmp_path / "data")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_command_trains_prints_and_keeps_no_quick_result(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 3))
    x[:, 2] = 1.0  # a constant column, as naval has
    folder = tmp_path / "data" / "uci"
    folder.mkdir(parents=True)
    order = np.stack([generator.permutation(40) for _ in range(2)])
    np.savez(folder / "toy.npz", X=x, y=x[:, 0] * 3 + 1, train_idx=order[:, :30], test_idx=order[:, 30:])
    done = run(tmp_path, "--data", "toy", "--splits", "2", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert line.startswith("toy")
    assert "±" in line
    assert "nan" not in line
    assert not (tmp_path / "results").exists()
    kept = tmp_path / "results" / "paper"
    kept.mkdir(parents=True)
    result = {
        "rmse": [1.0, 3.0],
        "log_likelihood": [-1.0, -1.0],
        "seconds_per_split": 1.0,
        "milliseconds_per_step": 2.0,
    }
    (kept / "toy.json").write_text(json.dumps(result))
    assert "2.000±1.000" in run(tmp_path, "--data", "toy").stdout
    assert "No data set 'toys' in BAYES_KFAC_DATA's folder uci: it has toy." in run(tmp_path, "--data", "toys").stderr


def test_missing_data_is_one_clear_sentence(tmp_path):
    environment = tmp_path / "elsewhere" / "benchmarks"
    environment.mkdir(parents=True)
    for name in ("uci.py", "replicas.py"):
        (environment / name).write_text((BENCHMARKS / name).read_text())
    variables = {name: value for name, value in os.environ.items() if name != "BAYES_KFAC_DATA"}
    command = [sys.executable, str(environment / "uci.py"), "--data", "boston"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "set BAYES_KFAC_DATA" in done.stderr
    assert "Traceback" not in done.stderr


def toy(tmp_path: Path) -> None:
    """A small data set with two splits."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 3))
    folder = tmp_path / "data" / "uci"
    folder.mkdir(parents=True)
    order = np.stack([generator.permutation(40) for _ in range(2)])
    np.savez(folder / "toy.npz", X=x, y=x[:, 0] * 3 + 1, train_idx=order[:, :30], test_idx=order[:, 30:])


def test_laplace_on_the_splits_runs_prints_and_keeps_no_quick_result(tmp_path, monkeypatch, capsys):
    import laplace_uci

    toy(tmp_path)
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(laplace_uci.methods, "laplace_torch", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    arguments = ["--data", "toy", "--splits", "2", "--epochs", "3", "--processes", "1"]
    monkeypatch.setattr("sys.argv", ["laplace_uci.py", *arguments, "--results", str(tmp_path / "results")])
    laplace_uci.main()
    printed = capsys.readouterr().out
    assert printed.startswith("laplace-torch is not installed, so its columns are left out")
    rows = [line for line in printed.splitlines() if line.startswith("| toy")]
    assert len(rows) == printed.count("| data |")
    assert "±" in rows[0]
    assert "nan" not in printed
    assert not (tmp_path / "results").exists()


def test_laplace_on_the_splits_computes_only_what_is_missing(tmp_path, monkeypatch):
    import laplace_uci

    toy(tmp_path)
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(laplace_uci.methods, "laplace_torch", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    job = laplace_uci.Job("toy", 2, 1, laplace_uci.methods.Recipe(epochs=1), tmp_path / "cache")
    laplace_uci.work(job, None)
    laplace_uci.work(job, 0)
    path = job.path("0.json")
    found = json.loads(path.read_text())
    known = {name: {**own, "rmse": -1.0} for name, own in found.items() if name != "dense"}
    path.write_text(json.dumps(known))
    laplace_uci.work(job, 0)
    assert json.loads(path.read_text()).keys() == found.keys()
    assert json.loads(path.read_text())["dense"]["rmse"] == found["dense"]["rmse"]
    assert json.loads(path.read_text())["kron exact"]["rmse"] == -1.0


def test_the_page_is_what_the_results_make_it():
    import report

    assert report.PAGE.read_text() == report.page()
    assert report.evidence.PAGE.read_text() == report.evidence.page()


def test_what_sampled_laplace_loses_is_the_same_on_all_pages():
    import laplace_uci_report

    results = laplace_uci_report.load()
    exact, factored = (laplace_uci_report.losses(results, name).values() for name in ("kron exact", "kron factored"))
    for page in ("scale", "predicting"):
        text = " ".join((BENCHMARKS.parent / "docs" / f"{page}.md").read_text().split())
        assert f"{min(exact):.2f} to {max(exact):.2f}" in text
        assert re.search(rf"(lose|loses) {max(factored):.2f}( nats)? at most", text)


def test_tables_on_pages_written_by_hand_are_those_of_the_results(capsys):
    import links
    import sklearn_sets

    for name in (*sklearn_sets.REGRESSION, *sklearn_sets.CLASSIFICATION):
        sklearn_sets.show(name, json.loads((sklearn_sets.RESULTS / f"{name}.json").read_text()))
    links.show(json.loads(links.RESULTS.read_text()))
    pages = "".join((BENCHMARKS.parent / "docs" / name).read_text() for name in ("sklearn.md", "predicting.md"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows
    assert [row for row in rows if row not in pages] == []


def test_a_step_is_profiled_by_phases(monkeypatch):
    import uci_profile

    monkeypatch.setattr(uci_profile, "STEPS", 1)
    total, *phases = uci_profile.timed(2).values()
    assert len(phases) == 7
    assert total == pytest.approx(sum(phases), abs=0.01)


def test_links_are_measured(monkeypatch, capsys):
    import links

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr("sys.argv", ["links.py", "--smoke", "--splits", "1"])
    links.main()
    printed = capsys.readouterr().out
    assert printed.count("| linearised, mc |") == 3
    assert "nan" not in printed


def compare(tmp_path: Path, *parts: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "laplace.py"), "--results", str(tmp_path), *parts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_linearized_outputs_are_those_of_laplace_torch_and_of_dense_jacobians(tmp_path):
    try:
        version("laplace-torch")
    except PackageNotFoundError:
        pytest.skip("laplace-torch is not installed: pip install -e '.[peers]'")
    printed = compare(tmp_path, "agreement")
    for name in ("mlp", "cnn", "attention"):
        result = json.loads((tmp_path / "agreement" / f"{name}.json").read_text())
        assert len(result["rows"]) == (4 if name == "mlp" else 3)
        for row, errors in result["rows"].items():
            for figure, error in errors.items():
                assert error < (1e-4 if "float32" in row else 1e-9), f"{name}, {row}, {figure}: off by {error:.1e}"
    assert printed == compare(tmp_path, "agreement"), "a result that is there is shown, not computed again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_that_part_says_so(tmp_path):
    assert compare(tmp_path, "gpu/mlp") == "gpu: needs a CUDA device, which this machine does not have.\n"
    assert not list(tmp_path.iterdir())
