"""The peers' stacks are independent networks, their figures are what they are called, and the command keeps them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def available(methods) -> list[str]:
    return [name for name in methods if name != "ivon" or find_spec("ivon")]


def folder_of_data(tmp_path: Path, monkeypatch, name: str = "yacht", *, changed: bool = False) -> None:
    """Two splits of a small set; changed: other targets where the first split tests, of which the second learns."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 3))
    y = x[:, 0] * 3 + 1 + 0.3 * generator.normal(size=60)
    x[:, 2] = 1.0  # a constant column, as naval has
    order = np.stack([np.arange(60), np.roll(np.arange(60), 30)])
    if changed:
        y[50:] = 100 * generator.normal(size=10)
    folder = tmp_path / "data" / "uci"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{name}.npz", X=x, y=y, train_idx=order[:, :50], test_idx=order[:, 50:])
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path / "data"))


def test_neither_test_data_nor_other_splits_change_what_is_chosen_and_learned(tmp_path, monkeypatch):
    """The first split's test rows, which the second learns from, are changed: the first split's choice is the same."""
    import peers

    for method in available(peers.METHODS):
        monkeypatch.setitem(peers.METHODS, method, replace(peers.METHODS[method], samples=3))
        found = []
        for changed in (False, True):
            folder_of_data(tmp_path, monkeypatch, changed=changed)
            own = peers.work(method, "yacht", 2, folds=2, steps=[30], seed=0)
            kept = own["predictions"][method]
            found.append((own["settings"][0], kept.get("noise", [0])[0]))
            rmse = kept["rmse"]
        assert found[0] == found[1], method
        assert rmse[0] > 10  # the test targets did change


def test_replicas_of_a_stack_do_not_touch_each_other(tmp_path, monkeypatch):
    """With the same random numbers, other data of the second replica leave the first as it is, to the last bit."""
    import peers
    import peers_networks
    from uci import load_splits

    folder_of_data(tmp_path, monkeypatch)
    data = load_splits("yacht", 2)
    for name in available(peers.METHODS):
        method, outputs = peers.METHODS[name], []
        for factor in (1.0, 50.0):
            torch.manual_seed(0)
            setting = peers_networks.Setting(20, decay=1e-3, rate=0.1 if name == "mc_dropout" else 0.0)
            units = [peers_networks.Replica(split, torch.arange(50), setting) for split in range(2)]
            own = peers_networks.Splits(
                data.train_x,
                data.train_y * torch.tensor([1.0, factor]).view(1, 2, 1),
                data.test_x,
                data.test_y,
                data.scale,
            )
            fitted = peers_networks.fit(method, own, units, 2, 50)
            outputs.append(fitted.predict(data.test_x, 3))
        assert outputs[0].shape == (6, 10, 2, 2 if name == "mean_variance_ensemble" else 1)
        assert torch.equal(outputs[0][:, :, 0], outputs[1][:, :, 0]), name
        assert not torch.allclose(outputs[0][:, :, 1], outputs[1][:, :, 1]), name


def test_outputs_are_those_of_their_unit_whatever_the_grouping(tmp_path, monkeypatch):
    """Units of different lengths are in different stacks; each prediction comes back at its unit's place."""
    import peers
    import peers_networks
    from uci import load_splits

    folder_of_data(tmp_path, monkeypatch)
    data = load_splits("yacht", 2)
    settings = [peers_networks.Setting(count, decay=decay) for count, decay in ((300, 0.0), (1, 0.0), (300, 10.0))]
    units = [peers_networks.Replica(index % 2, torch.arange(50), setting) for index, setting in enumerate(settings)]
    fitted = peers_networks.fit(peers.METHODS["ensemble"], data, units, 3, 50)
    outputs, targets = fitted.rows(data, [torch.arange(50)] * 3, 1)
    assert outputs.shape == (3, 50, 3, 1)
    errors = (outputs[..., 0] - targets).square().mean(1).sqrt()
    assert (errors[:, 0] < 0.3).all()
    assert (errors[:, 1] > 0.5).all()
    assert (outputs[:, :, 2].abs() < 0.1).all()  # its decay leaves nothing
    assert fitted.seconds > 0


def test_densities_are_those_of_mixture_and_moments():
    import peers

    generator = torch.Generator().manual_seed(0)
    means, targets = torch.randn(4, 6, 2, generator=generator), torch.randn(6, 2, generator=generator)
    noise = torch.tensor([0.3, 0.8])
    components = torch.distributions.Normal(means.movedim(0, -1), noise.view(1, 2, 1))
    weights = torch.distributions.Categorical(torch.ones(6, 2, 4))
    expected = torch.distributions.MixtureSameFamily(weights, components).log_prob(targets).mean(0)
    torch.testing.assert_close(peers.mixture(means, noise, targets), expected)
    outputs = torch.stack([means, torch.zeros_like(means)], dim=-1)
    spread = math.log(2) + 1e-6 + means.var(0, correction=0)
    expected = torch.distributions.Normal(means.mean(0), spread.sqrt()).log_prob(targets).mean(0)
    torch.testing.assert_close(peers.moments(outputs, targets), expected)


def test_held_out_tenths_are_disjoint_and_not_learned_from():
    import peers

    parts = peers.tenths(57, split=3, folds=3, seed=1)
    held = torch.cat([own for _, own in parts])
    assert len(held) == len(held.unique()) == 15
    for rows, own in parts:
        assert torch.cat([rows, own]).sort().values.equal(torch.arange(57))
    assert not torch.equal(parts[0][1], peers.tenths(57, split=4, folds=3, seed=1)[0][1])


def test_dropout_keeps_the_mean_and_its_rate():
    import peers_networks

    torch.manual_seed(0)
    values = peers_networks.dropped(torch.ones(2, 1000, 50), torch.tensor([0.1, 0.5]))
    torch.testing.assert_close((values == 0).float().mean((1, 2)), torch.tensor([0.1, 0.5]), atol=0.01, rtol=0)
    torch.testing.assert_close(values.mean((1, 2)), torch.ones(2), atol=0.01, rtol=0)


def test_a_gaussian_process_is_that_of_its_formula(tmp_path, monkeypatch):
    pytest.importorskip("botorch")
    import peers_gp

    folder_of_data(tmp_path, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=generator).double()
    y = x[:, :1].sin() + 0.1 * torch.randn(30, 1, generator=generator).double()
    points = torch.randn(5, 2, generator=generator).double()
    own = peers_gp.fit(x, y, points)
    scales, height, noise, mean = own.lengthscales, own.height, own.noise**2, own.constant

    def kernel(left, right):
        distance = 5**0.5 * torch.cdist(left / scales, right / scales)
        return height * (1 + distance + distance**2 / 3) * (-distance).exp()

    K = kernel(x, x) + noise * torch.eye(30).double()
    density = torch.distributions.MultivariateNormal(torch.full((30,), mean).double(), K)
    assert own.evidence == pytest.approx(float(density.log_prob(y[:, 0])), abs=1e-5)
    cross = kernel(points, x)
    torch.testing.assert_close(own.mean[:, 0], mean + cross @ torch.linalg.solve(K, y[:, 0] - mean))
    spread = height + noise - (cross * torch.linalg.solve(K, cross.T).T).sum(1)
    torch.testing.assert_close(own.scale[:, 0], spread.sqrt())


def test_the_process_with_the_greater_evidence_counts_and_a_free_one_may_fail(monkeypatch):
    pytest.importorskip("botorch")
    import peers_gp
    from linear_operator.utils.errors import NotPSDError

    def fits(free):
        def fit(x, y, points, iterations, bounds):
            if not bounds and free is None:
                raise NotPSDError
            return peers_gp.Fit(1.0 if bounds else free, *[None] * 6)

        return fit

    for free, expected in ((None, 1.0), (0.5, 1.0), (2.0, 2.0)):
        monkeypatch.setattr(peers_gp, "_fit", fits(free))
        assert peers_gp.fit(None, None, None).evidence == expected


def test_a_gaussian_process_is_left_to_sets_where_its_evidence_has_a_maximum(tmp_path):
    import peers

    jobs = peers.all_jobs(["gp"], ["wine_red", "kin8nm", "concrete"], 2, 1, tmp_path, quick=True)
    assert [job.arguments["data"] for job in jobs] == ["concrete"]


def test_the_command_keeps_figures_that_load_reads(tmp_path, monkeypatch, capsys):
    import peers

    folder_of_data(tmp_path, monkeypatch)
    results = tmp_path / "results"
    job = peers.all_jobs(["mc_dropout"], ["yacht"], 2, 1, results, quick=True)[0]
    kept = job.do()
    assert kept["arguments"]["method"] == "mc_dropout"
    found = peers.load("mc_dropout", "yacht", results)
    assert len(found["rmse"]) == len(found["log_likelihood"]) == 2
    assert found["seconds"] > 0
    assert peers.load("ivon", "yacht", results) is None
    assert f"| yacht | – | – | – | – | – | {peers.summary(found['rmse'])} | – |" in peers.section(results)
    monkeypatch.setattr(
        "sys.argv", ["peers.py", "--results", str(results), "--data", "yacht", "--methods", "mc_dropout"]
    )
    peers.main()  # is there already, so nothing is computed
    assert json.loads(job.path.read_text()) == kept
    assert peers.summary(found["log_likelihood"]) in capsys.readouterr().out
    assert peers.section(tmp_path / "elsewhere") == ""


def test_a_network_that_diverged_is_not_chosen():
    import peers

    outputs, targets = torch.zeros(2, 5, 3, 1), torch.zeros(5, 3)
    outputs[0, 2, 1] = math.nan
    found = peers.scores(peers.METHODS["ensemble"], outputs, targets)
    assert found.shape == (len(peers.NOISES), 3)
    assert (found[:, 1] == -math.inf).all()
    assert found[:, [0, 2]].isfinite().all()


def test_a_method_whose_package_is_absent_is_left_out_with_a_sentence(tmp_path, monkeypatch, capsys):
    import peers

    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    arguments = ["--results", str(tmp_path), "--data", "yacht", "--methods", "ivon"]
    monkeypatch.setattr("sys.argv", ["peers.py", *arguments])
    peers.main()
    assert "ivon is left out, as it needs the modules ivon." in capsys.readouterr().out
