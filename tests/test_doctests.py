"""The examples in the docstrings of the whole package: each runs as it is pasted, and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import bayes_kfac as bk

MODULES = sorted(module.name for module in pkgutil.walk_packages(bk.__path__, "bayes_kfac."))
#: What a stranger meets first; each shows its use.
CORE = [
    bk.AdaptiveNaturalGradient,
    bk.Laplace,
    bk.Laplace.from_trainer,
    bk.Laplace.log_marginal_likelihood,
    bk.Laplace.optimize_prior_precision,
    bk.Mixture,
    bk.Mixture.load,
    bk.Mixture.predict,
    bk.NaturalGradient,
    bk.NoisyAdam,
    bk.NoisyEKFAC,
    bk.NoisyKFAC,
    bk.NoisyNaturalGradient,
    bk.NoisyNaturalGradient.summary,
    bk.Posterior,
    bk.Posterior.function_covariance,
    bk.Posterior.load,
    bk.Posterior.predict,
    bk.Posterior.sample,
    bk.curvature.register,
    bk.distributions.MatrixNormal,
    bk.fit,
    bk.likelihoods.Bernoulli,
    bk.likelihoods.Categorical,
    bk.likelihoods.Gaussian,
    bk.prediction.concatenate,
    bk.prediction.pool,
    bk.structures.available,
    bk.structures.get,
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("public", CORE, ids=lambda public: public.__qualname__)
def test_core_names_have_an_example(public):
    assert ">>>" in inspect.getdoc(public)
