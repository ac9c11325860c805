"""The recommended recipe's folds, scores and choices are what they are called; temperatures, dampings and units run."""

from __future__ import annotations

import inspect
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture
def yacht(tmp_path, monkeypatch):
    """A small data set by the name of a real one, with two splits."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 3))
    folder = tmp_path / "data" / "uci"
    folder.mkdir(parents=True)
    order = np.stack([generator.permutation(40) for _ in range(2)])
    np.savez(folder / "yacht.npz", X=x, y=x[:, 0] * 3 + 1, train_idx=order[:, :31], test_idx=order[:, 31:])
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def test_each_fold_holds_out_a_tenth_of_its_own_and_learns_from_all_others(yacht):
    import regression

    splits = regression.load_splits("yacht", 2)
    parts = regression.folds(splits, 3, seed=3)
    assert parts.train_x.shape == (28, 6, 3)
    assert parts.test_x.shape == (3, 6, 3)
    for split in range(2):
        everything = {tuple(row) for row in splits.train_x[:, split].tolist()}
        held_out = []
        for fold in range(3):
            column = 2 * fold + split
            learned = {tuple(row) for row in parts.train_x[:, column].tolist()}
            own = {tuple(row) for row in parts.test_x[:, column].tolist()}
            assert learned | own == everything
            assert not learned & own
            held_out += own
        assert len(set(held_out)) == 9
    target = (parts.test_y / parts.scale)[0, 3]  # still that of its input
    row = (splits.train_x[:, 1] == parts.test_x[0, 3]).all(-1)
    torch.testing.assert_close(target, splits.train_y[row, 1][0])


def test_the_variant_of_defaults_takes_nothing_but_what_the_optimizer_does_by_default():
    import regression

    import bayes_kfac as bk

    changed = regression.replace(regression.recipe("kron", temperature=1.0, epochs=1), **regression.DEFAULTS)
    known = inspect.signature(bk.NoisyNaturalGradient).parameters
    assert changed.options() == {name: known[name].default for name in changed.options()}


@pytest.mark.parametrize("variant", ["kron", "varying"])
def test_scores_are_those_of_the_mixture_and_of_its_members_written_out(yacht, variant):
    """Of one noise for all inputs, and of multiples of those that draws predict."""
    import regression

    splits = regression.load_splits("yacht", 2)
    grid = regression.grid(variant)
    together = torch.randn(4, 9, 6, 2, generator=torch.Generator().manual_seed(0))  # of three members
    found = regression.judge(together if variant == "varying" else together[..., :1], splits, 3)
    outputs, log_scales = together.unbind(-1)
    noises = grid[16] * (log_scales.exp() if variant == "varying" else torch.ones_like(outputs))
    for split in range(2):
        scale = float(splits.scale[split])
        target = splits.test_y[:, split, 0] / scale
        own, own_noise = ([values[:, :, 2 * member + split] for member in range(3)] for values in (outputs, noises))
        pooled = torch.cat(own)
        assert found["mixture"]["rmse"][split] == pytest.approx(
            float((pooled.mean(0) - target).square().mean().sqrt() * scale), rel=1e-5
        )
        errors = [float((one.mean(0) - target).square().mean().sqrt() * scale) for one in own]
        assert found["single"]["rmse"][split] == pytest.approx(np.mean(errors), rel=1e-5)

        def density(draws, noise, target=target, scale=scale):
            draws, noise = draws.double(), noise.double()
            each = -0.5 * ((draws - target) / noise) ** 2 - (noise * scale).log() - 0.5 * math.log(2 * math.pi)
            return float(each.exp().mean(0).log().mean())

        pooled_density = density(pooled, torch.cat(own_noise))
        assert found["mixture"]["log_likelihood"][16][split] == pytest.approx(pooled_density, rel=1e-4)
        members = np.mean([density(*one) for one in zip(own, own_noise, strict=True)])
        assert found["single"]["log_likelihood"][16][split] == pytest.approx(members, rel=1e-4)


@pytest.mark.parametrize("variant", ["kron", "varying"])
def test_folds_alone_choose(tmp_path, variant):
    """Temperature and noise of each split are where its folds are best predicted, whatever the test part says."""
    import regression

    rng = np.random.default_rng(0)
    noises = regression.grid(variant)
    shape = (len(noises), 2)
    folder = tmp_path / "uci" / "recommended" / variant / "yacht"
    folder.mkdir(parents=True)
    for place, tau in enumerate(regression.TEMPERATURES):
        own = rng.normal(size=(len(noises), 6)) - 10
        own[7, 1::2] += 10 * place  # the second split's folds: best at the lowest temperature
        own[9, 0::2] += 10 * (place == 0)  # the first split's: best at the highest
        test = rng.normal(size=shape)
        for part, values in (("folds", own), ("full", test)):
            figures = {"rmse": [float(place)] * values.shape[1], "log_likelihood": values.tolist()}
            (folder / f"{part}-{tau}.json").write_text(
                json.dumps({"mixture": figures, "single": figures, "learned_noise": [1.0, 1.0]})
            )
        if place == 0:
            first = test[9, 0]
    untuned = regression.load_untuned("yacht", variant, folder=tmp_path)
    assert untuned["noise"] == pytest.approx([1.0, 1.0])
    assert untuned["temperature"] == [1.0, 1.0]
    found = regression.load("yacht", variant, folder=tmp_path)
    assert found["temperature"] == [regression.TEMPERATURES[0], regression.TEMPERATURES[-1]]
    assert found["noise"] == pytest.approx([float(noises[9]), float(noises[7])])
    assert found["rmse"] == [0.0, len(regression.TEMPERATURES) - 1]
    assert found["log_likelihood"] == pytest.approx([first, test[7, 1]])


def test_tenths_are_judged_by_what_the_others_choose(tmp_path):
    import regression

    rng = np.random.default_rng(1)
    held_out = rng.normal(size=(len(regression.TEMPERATURES), len(regression.NOISES), 3, 2))
    for tau, density in zip(regression.TEMPERATURES, held_out, strict=True):
        path = regression.path("yacht", "kron", "folds", tau, tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = {"rmse": [0.0] * 6, "log_likelihood": density.reshape(-1, 6).tolist()}
        path.write_text(json.dumps({"mixture": figures, "single": figures}))
    flat, expected = held_out.reshape(-1, 3, 2), []
    for split in range(2):
        own = [np.delete(flat, fold, axis=1)[:, :, split].mean(1).argmax() for fold in range(3)]
        expected.append(np.mean([flat[choice, fold, split] for fold, choice in enumerate(own)]))
    assert regression.by_tenths("yacht", "kron", folder=tmp_path) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("variant", "bounding"), [("bounded", "kron"), ("diagonal-bounded", "diagonal")])
def test_a_noise_that_was_bounded_is_not_chosen(tmp_path, variant, bounding):
    """The folds choose the temperature by what was learned, though another noise would predict them better."""
    import regression

    rng = np.random.default_rng(0)
    noises, learned = regression.NOISES.tolist(), {1.0: 20, 0.3: 18, 0.1: 16}
    expected = {}
    for tau, place in learned.items():
        for part, count in (("folds", 6), ("full", 2)):
            path = regression.path("yacht", variant, part, tau, tmp_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            density = rng.normal(size=(len(noises), count)) - 10
            density[2] = 5.0  # the best of all, were it chosen
            if part == "folds":
                density[place] = 1.0 if tau == 0.3 else 0.0
            else:
                expected[tau] = density[place].tolist()
            figures = {"rmse": [tau] * count, "log_likelihood": density.tolist()}
            found = {"mixture": figures, "single": figures, "learned_noise": [1.01 * noises[place]] * count}
            path.write_text(json.dumps(found))
    assert {path.parent.parent.name for path in tmp_path.rglob("*-1.0.json")} == {bounding}
    found = regression.load("yacht", variant, folder=tmp_path)
    assert found["temperature"] == [0.3, 0.3]
    assert found["rmse"] == pytest.approx([0.3, 0.3])
    assert found["log_likelihood"] == pytest.approx(expected[0.3])
    assert found["noise"] == pytest.approx([noises[18]] * 2)


@pytest.mark.parametrize("variant", ["bounded", "ekfac-bounded"])
def test_colder_networks_learn_no_smaller_noise_than_temperature_1(yacht, tmp_path, variant):
    import regression

    for temperatures in ((1.0,), (0.1,)):
        found = regression.run(regression.jobs(tmp_path, ["yacht"], variant, temperatures, quick=True))
    warm = [regression.read("yacht", variant, part, 1.0, tmp_path)["learned_noise"] for part in regression.PARTS]
    assert [own["arguments"]["minimum"] for own in found] == warm
    for own, bound in zip(found, warm, strict=True):
        assert np.all(np.array(own["learned_noise"]) >= np.array(bound) - 1e-6)
        assert own["arguments"]["temperature"] == own["recipe"]["temperature"] == 0.1


@pytest.mark.parametrize(
    ("script", "further"),
    [("regression", []), ("regression", ["--variant", "varying", "--untuned"]), ("temperature", [])],
)
def test_a_quick_look_prints_its_table_and_keeps_nothing(yacht, script, further, tmp_path, monkeypatch, capsys):
    module = __import__(script)
    monkeypatch.setattr(module, "TEMPERATURES", (1.0, 0.1))
    if script == "temperature":
        monkeypatch.setattr(module, "PAIRS", tuple((own, tau) for own in module.DAMPINGS for tau in (1.0, 0.1)))
    arguments = ["--data", "yacht", "--quick", "--results", str(tmp_path / "results"), *further]
    monkeypatch.setattr("sys.argv", [f"{script}.py", *arguments])
    module.main()
    printed = capsys.readouterr().out
    assert "| yacht" in printed
    assert "nan" not in printed
    assert not (tmp_path / "results").exists()


def test_units_in_use_are_those_that_move_the_output(yacht, tmp_path, monkeypatch, capsys):
    import units

    model = units.ReplicatedMLP(2, 1, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.hidden.weight.copy_(torch.tensor([1.0, 1.0, -1.0, 0.0])[:, None].expand(2, 4, 1))
        model.hidden.bias.copy_(torch.tensor([0.0, 0.0, -9.0, 5.0]).expand(2, 4))  # one is off, one constant
        model.output.weight.copy_(torch.tensor([[1.0, 1e-3, 1.0, 1.0], [1.0, -1.0, 1.0, 1.0]])[:, None])
    inputs = torch.linspace(-1, 1, 11)[:, None, None].expand(11, 2, 1)
    assert units.used(model, inputs) == [1, 2]

    monkeypatch.setattr(units, "DATA_SETS", ("yacht",))
    monkeypatch.setattr("sys.argv", ["units.py", "--quick", "--results", str(tmp_path / "results")])
    units.main()
    printed = capsys.readouterr().out
    assert all(row in printed for row in units.ROWS)
    assert "| yacht |" in printed
    assert not (tmp_path / "results").exists()
