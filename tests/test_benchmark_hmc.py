"""The comparison with HMC: the potential, the figures, and the whole command on little data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch.distributions import Normal

import bayes_kfac as bk

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import hmc  # noqa: E402
import hmc_posteriors  # noqa: E402
import hmc_report  # noqa: E402
from hmc_problems import Problem  # noqa: E402


@pytest.fixture
def problem():
    torch.manual_seed(0)
    x = torch.randn(20, 3).double()
    return Problem(x, x[:, :1] ** 2, torch.randn(7, 3).double())


def test_the_potential_is_that_of_the_generative_model(problem):
    """Up to a constant; and the gradient that is written out is autograd's."""
    potential = hmc.Potential(problem.x, problem.y, 0.3, hidden=5)
    weights = torch.randn(2, potential.size).double()
    found = []
    for vector in weights:
        network, likelihood = hmc_posteriors.as_network(vector, 3, hidden=5), bk.likelihoods.Gaussian(0.3).double()
        posterior = bk.Laplace(network, likelihood).fit([(problem.x, problem.y)], progress=False).posterior()
        model = pyro.condition(bk.pyro.generative_model(posterior), posterior.mean)
        log_density = poutine.trace(model).get_trace(problem.x, problem.y).log_prob_sum()
        found.append((potential({"weights": vector}), -log_density))
    (one, dense_one), (other, dense_other) = found
    torch.testing.assert_close(one - other, dense_one - dense_other)


def test_the_gradient_is_that_of_autograd_and_networks_give_the_same_outputs(problem):
    potential = hmc.Potential(problem.x, problem.y, 0.3, hidden=5)
    weights = torch.randn(potential.size).double().requires_grad_()
    outputs = hmc.functions(weights[None], problem.x, hidden=5)[0]
    expected = (outputs - problem.y[:, 0]).square().sum() / (2 * 0.3**2) + 0.5 * weights.square().sum()
    value, gradient = potential.value_and_gradient(weights.detach())
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weights)[0])
    own = potential({"weights": weights})
    torch.testing.assert_close(torch.autograd.grad(own, weights)[0], gradient)
    model = hmc_posteriors.as_network(weights.detach(), 3, hidden=5)
    torch.testing.assert_close(model(problem.x)[:, 0], outputs)


def test_figures_of_known_gaussians():
    torch.manual_seed(0)
    std = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
    reference = hmc.Marginals.of_draws(std * torch.special.ndtri((torch.arange(4000) + 0.5) / 4000).double()[:, None])
    levels = torch.special.ndtri(hmc.LEVELS)[:, None]

    def compare(mean, std):
        return hmc_posteriors.compare(hmc.Marginals(mean, std, mean + std * levels), reference, 0.1)

    same = compare(0 * std, std)
    assert same["r_std"] == pytest.approx(1)
    assert same["ratio"] == pytest.approx(1, abs=0.01)
    assert same["wasserstein"] == pytest.approx(0, abs=0.01)
    # a shift by one standard deviation is a distance of one; a width of twice that is E|z| = (2/π)^½
    assert compare(std, std)["wasserstein"] == pytest.approx(1, abs=0.01)
    wide = compare(0 * std, 2 * std)
    assert wide["wasserstein"] == pytest.approx((2 / np.pi) ** 0.5, abs=0.01)
    assert wide["ratio"] == pytest.approx(2, abs=0.01)


def test_a_mixture_has_the_moments_of_its_parts_drawn_together():
    torch.manual_seed(0)
    parts = [torch.randn(4000, 3) + shift for shift in (0.0, 2.0)]
    mixed = hmc_posteriors.mixture([hmc.Marginals.of_draws(part) for part in map(torch.Tensor.double, parts)])
    together = hmc.Marginals.of_draws(torch.cat(parts).double())
    torch.testing.assert_close(mixed.mean, together.mean)
    torch.testing.assert_close(mixed.std, together.std, rtol=1e-3, atol=0)
    inner = slice(10, -10)  # the ends are single draws
    torch.testing.assert_close(mixed.quantiles[inner], together.quantiles[inner], rtol=0, atol=0.1)


def test_mixing_tells_chains_that_agree_from_those_that_do_not():
    torch.manual_seed(0)
    values = Normal(0.0, 1.0).sample((4, 500, 3))
    good = hmc.mixing(values)
    assert good["r_hat_max"] < 1.02
    assert 1200 < good["ess_min"] < 3500
    values[0] += 2
    assert hmc.mixing(values)["r_hat_median"] > 1.2


def test_the_whole_command_on_the_cubic_and_its_section(tmp_path, monkeypatch):
    monkeypatch.setattr(hmc, "BUDGETS", {"cubic": (5, 8, 3)})
    monkeypatch.setattr(hmc, "START_STEPS", 20)
    monkeypatch.setattr(hmc_posteriors, "STEPS", 5)
    monkeypatch.setattr(hmc_posteriors.structures, "names", lambda: [("kron", "factored"), ("kron", "exact")])
    monkeypatch.setenv("BAYES_KFAC_CACHE", str(tmp_path / "cache"))
    hmc.run(["cubic"], tmp_path / "results", 1, ["kron"], quick=False)
    monkeypatch.setattr(hmc_report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(hmc_report, "IMAGES", tmp_path / "images")
    assert "cubic | 0.166" in hmc_report.section()
    kept = hmc_report.read("posteriors", "cubic", "noisy-kron-factored")
    assert set(hmc_report.KINDS) < set(kept)
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "results").rglob("*.json"))
    pytest.importorskip("matplotlib")
    hmc_report.plot_bands()
    hmc_report.plot_all_bands("cubic")
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"hmc_bands.png", "hmc_cubic.png"}


def test_a_training_that_diverges_is_a_result_and_said(problem, tmp_path, monkeypatch):
    def diverges(*_):
        raise bk.errors.NonFiniteError("no finite gradient")

    monkeypatch.setitem(hmc_posteriors.METHODS, "noisy", diverges)
    monkeypatch.setattr(hmc_posteriors, "load", lambda _: problem)
    monkeypatch.setattr(hmc, "marginals", lambda _: None)
    kept = hmc_posteriors.job("cubic", 0.1, "noisy", "kron", "exact", [0], 5)
    assert kept == {"diverged": "no finite gradient"}
    folder = tmp_path / "posteriors" / "yacht"
    folder.mkdir(parents=True)
    (folder / "noisy-kron-exact.json").write_text(json.dumps(kept))
    monkeypatch.setattr(hmc_report, "RESULTS", tmp_path)
    assert hmc_report.found(["yacht"]) == {}
    assert hmc_report.diverged(["yacht"]) == " Training diverged on 1 of 1 sets: noisy kron exact."
