"""The active-learning benchmark: its sampler, its stacks, its splits and its command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import active_learners  # noqa: E402
import active_protocol  # noqa: E402
from active_learners import METHODS, NOISE, Setting, forward, log_density, unpack  # noqa: E402
from stacked_hmc import hmc, split_rhat  # noqa: E402

from bayes_kfac.active import GaussianGains  # noqa: E402

SETTING = Setting(temperature=0.5, steps=20)


def toy(number: int, replicas: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(number, replicas, 3, generator=torch.Generator().manual_seed(0))
    return inputs, inputs[..., :1] - inputs[..., 1:2].abs()


def test_each_row_is_drawn_from_its_own_gaussian():
    scale = torch.tensor([[0.5, 1.0], [2.0, 1.0], [0.1, 0.3]])
    mean = torch.tensor([[0.0, 1.0], [-2.0, 3.0], [0.5, 0.0]])
    chains = hmc(
        lambda at: -0.5 * ((at - mean) / scale).square().sum(1),
        torch.zeros(3, 2),
        warmup=200,
        iterations=1500,
        keep=1500,
        leapfrogs=(3, 10),
        generator=torch.Generator().manual_seed(0),
    )
    assert ((chains.acceptance > 0.6) & (chains.acceptance < 0.95)).all()
    assert (split_rhat(chains.draws) < 1.03).all()
    torch.testing.assert_close((chains.draws.mean(0) - mean) / scale, torch.zeros(3, 2), atol=0.12, rtol=0)
    torch.testing.assert_close(chains.draws.std(0) / scale, torch.ones(3, 2), atol=0.12, rtol=0)


def test_the_noise_is_integrated_out():
    """Differences of the log density are those of a sum over a fine grid of precisions."""
    inputs, targets = toy(6, 2)
    features = inputs.shape[-1]
    places = 0.5 * torch.randn(2, 2, 50 * (features + 2) + 1, generator=torch.Generator().manual_seed(1)).double()
    x, y = inputs.double(), targets.double()
    precisions = torch.linspace(1e-4, 30, 30_000, dtype=torch.float64)
    summed = []
    for place in places:
        squares = (forward(unpack(place, features), x) - y[..., 0]).square().sum(0)
        tempered = (0.5 * len(x) * precisions.log() - 0.5 * precisions * squares.unsqueeze(1)) / SETTING.temperature
        prior = (NOISE[0] - 1) * precisions.log() - NOISE[1] * precisions
        summed.append((prior + tempered).logsumexp(1) - 0.5 * place.square().sum(1))
    exact = [log_density(place, x, y, SETTING) for place in places]
    torch.testing.assert_close(exact[0] - exact[1], summed[0] - summed[1], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("method", ["noisy K-FAC", "noisy Adam"])
def test_a_networks_posterior_is_its_part_of_the_stacks(method):
    inputs, targets = toy(10, 3)
    stack = METHODS[method](inputs, targets, SETTING, torch.Generator().manual_seed(0))
    whole = stack._posterior
    expected = whole.predict(inputs).mean[:, 1]
    own = stack.posterior(1)
    torch.testing.assert_close(own.predict(inputs[:, 1]).mean, expected)
    variances, parts = whole.blocks.marginal_variance(), own.blocks.marginal_variance()
    for name, variance in variances.items():
        torch.testing.assert_close(parts[name], variance[1])
    draws = {name: value[:, 1].std(0) for name, value in stack.draws.items()}
    ratio = draws["hidden.weight"] / parts["hidden"][:, :-1].sqrt()
    assert abs(float(ratio.mean()) - 1) < 0.1


@pytest.mark.parametrize("method", ["noisy K-FAC", "noisy Adam", "Laplace"])
def test_bald_ranks_as_the_linearised_variance(method):
    inputs, targets = toy(10, 2)
    stack = METHODS[method](inputs, targets, SETTING, torch.Generator().manual_seed(0))
    posterior, pool = stack.posterior(0), torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    variance = posterior.predict(pool).epistemic_variance[:, 0]
    information = GaussianGains(posterior, pool).scores
    torch.testing.assert_close(information, 0.5 * (variance / posterior.likelihood.noise_scale**2).double().log1p())
    assert int(information.argmax()) == int(variance.argmax())


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_learns(method):
    inputs, targets = toy(20, 2)
    setting = Setting(temperature=0.1, steps=100 if method == "HMC" else 300)
    active_learners_draws = active_learners.DRAWS
    try:
        active_learners.DRAWS = 20
        stack = METHODS[method](inputs, targets, setting, torch.Generator().manual_seed(0))
    finally:
        active_learners.DRAWS = active_learners_draws
    assert (stack.mean(inputs) - targets[..., 0]).square().mean() < 0.3 * targets.var()


@pytest.fixture
def data(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(150, 3))
    x[:, 2] = 1.0  # a constant column, as naval has
    folder = tmp_path / "data" / "uci"
    folder.mkdir(parents=True)
    np.savez(folder / "toy.npz", X=x, y=x[:, 0] * 3 + 1)
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(active_learners, "DRAWS", 5)
    short = {name: Setting(steps=20) for name in METHODS}
    monkeypatch.setattr(active_protocol, "SETTINGS", short)


def test_parts_of_a_split_have_no_row_in_common(data):
    problem = active_protocol.load("toy", 3, 2)
    for seed in range(2):
        rows = torch.cat([problem.test[seed], problem.start[seed], problem.pool[seed]])
        assert sorted(rows.tolist()) == list(range(150))
    again = active_protocol.load("toy", 4, 1)
    assert torch.equal(again.pool[0], problem.pool[1]), "a seed's split does not depend on the others"
    known = torch.cat([problem.start, problem.pool], dim=1)
    inputs = problem.inputs(known, torch.arange(2))
    torch.testing.assert_close(inputs.mean(0), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs[..., :2].std(0, correction=0), torch.ones(2, 2))


@pytest.mark.parametrize("method", METHODS)
def test_picks_are_new_rows_of_the_pool(data, method):
    setting = {"temperature": 1.0, "steps": 20}
    figures = active_protocol.work("toy", method, seeds=2, acquired=2, setting=setting, first=0)["acquisitions"]
    problem = active_protocol.load("toy", 0, 2)
    assert tuple(figures) == active_protocol.ACQUISITIONS[method]
    for name, own in figures.items():
        assert np.shape(own["rmse"]) == (3, 2)
        assert own["rmse"][0] == figures["random"]["rmse"][0], "the first round is shared"
        for seed in range(2):
            picked = [chosen[seed] for chosen in own["picked"]]
            assert len(set(picked)) == 2
            assert set(picked) <= set(problem.pool[seed].tolist())
            if name == "random":
                assert picked == problem.pool[seed, :2].tolist()
        whole = np.square(own["rmse"])
        halves = (np.square(own["inner_rmse"]) + np.square(own["outer_rmse"])) / 2
        np.testing.assert_allclose(whole, halves, rtol=1e-5)


def test_the_command_prints_keeps_and_shows(data, tmp_path, monkeypatch, capsys):
    import active_protocol_report as report

    monkeypatch.setattr(report, "ORDER", ("toy",))
    monkeypatch.setitem(report.RECALLED, "toy", {})
    base = ["active_protocol.py", "--data", "toy", "--results", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", [*base, "--quick"])
    active_protocol.main()
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr("sys.argv", [*base, "--seeds", "2", "--acquired", "1"])
    active_protocol.main()
    printed = capsys.readouterr().out
    assert printed.count("| toy |") == 17
    assert "nan" not in printed
    path = tmp_path / "results" / "active_protocol" / "toy" / "laplace.json"
    kept = json.loads(path.read_text())
    assert kept["arguments"]["seeds"] == 2
    path.write_text(json.dumps({**kept, "mark": 1}))
    active_protocol.main()
    assert "mark" in json.loads(path.read_text()), "a result that is there is not computed again"
    import active_protocol_labels as labels

    monkeypatch.setattr(labels, "DATA_SETS", ("toy",))
    monkeypatch.setattr("sys.argv", ["active_protocol_labels.py", "--results", str(tmp_path / "results")])
    capsys.readouterr()
    labels.main()
    assert capsys.readouterr().out.count("| toy |") == 4
    report.draw(tmp_path / "results" / "active_protocol", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_held_out_labels_are_no_training_labels(data, monkeypatch):
    seen = {}

    def learn(problem, method, setting, labelled, test, generator):
        seen.update(labelled=labelled, test=test)
        seeds = torch.arange(len(labelled)) % len(problem.pool)
        return active_protocol.Round(None, problem.y[test].std(1) + 0 * seeds, None, None)

    monkeypatch.setattr(active_protocol, "learn", learn)
    found = active_protocol.tune_work("toy", "Laplace", 0.3)
    start = active_protocol.load("toy", active_protocol.TUNING_FIRST, active_protocol.TUNING_SEEDS).start
    both = torch.cat([seen["labelled"], seen["test"]], dim=1)
    for replica, rows in enumerate(both.tolist()):
        assert sorted(rows) == sorted(start[replica % len(start)].tolist())
    for seed in range(len(start)):
        assert sorted(seen["test"][seed :: len(start)].flatten().tolist()) == sorted(start[seed].tolist())
    assert len(found["relative_rmse"]) == 25
