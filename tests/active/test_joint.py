"""Acquisitions of whole batches: which gains they look through, and that draws are the same functions everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from bayes_kfac.active import BALD, EPIG, BatchBALD, SampledGains, SampledPredictiveGains
from bayes_kfac.active.gaussian import GaussianGains, GaussianPredictiveGains
from bayes_kfac.errors import ArgumentError, UsageError
from tests.active.pools import binary_posterior, pool, posterior, regression
from tests.helpers import TIGHT, rng

BOTH = [(BatchBALD(num_samples=20), SampledGains), (EPIG(pool(5, seed=1), num_samples=20), SampledPredictiveGains)]
IDS = ["BatchBALD", "EPIG"]


@pytest.mark.parametrize(("acquisition", "kind"), BOTH, ids=IDS)
@pytest.mark.parametrize("make", [posterior, binary_posterior], ids=["categorical", "bernoulli"])
def test_classes_are_looked_at_over_draws(acquisition, kind, make):
    net = make()
    view = acquisition.look(net, pool(), generator=rng(0))
    assert type(view) is kind
    again = acquisition.look(net, pool(), generator=rng(0))
    assert torch.equal(acquisition.scores(view), acquisition.scores(again))
    picked = acquisition.select(view, 3)
    assert len(picked.unique()) == 3
    assert torch.equal(picked, acquisition.select(again, 3))


@pytest.mark.parametrize(
    ("acquisition", "kind"), [(BatchBALD(), GaussianGains), (EPIG(pool(5, seed=1)), GaussianPredictiveGains)], ids=IDS
)
def test_real_values_are_looked_at_in_closed_form(acquisition, kind):
    view = acquisition.look(regression(), pool())
    assert type(view) is kind
    assert acquisition.select(view, 3).shape == (3,)


def test_the_first_pick_of_real_values_is_that_of_bald():
    net = regression(2)
    assert_close(BatchBALD().look(net, pool()).scores, BALD().scores(BALD().look(net, pool())), rtol=1e-8, atol=1e-10)


def test_draws_are_functions_of_the_linearised_model_by_default():
    net = posterior()
    draws = net.sample(20, generator=rng(0))
    expected = SampledGains(net.predict(pool(), "linearized", draws=draws))
    assert_close(BatchBALD(num_samples=20).look(net, pool(), generator=rng(0)).scores, expected.scores, **TIGHT)
    sampled = SampledGains(net.predict(pool(), "sampling", draws=draws))
    view = BatchBALD(method="sampling", num_samples=20).look(net, pool(), generator=rng(0))
    assert_close(view.scores, sampled.scores, **TIGHT)


def test_candidates_and_targets_are_predicted_by_the_same_draws():
    """At its own input a target is as dependent as can be: more so than by independent draws, where nothing is."""
    net = posterior()
    draws = net.sample(200, generator=rng(0))
    prediction = net.predict(pool(), "linearized", draws=draws)
    expected = SampledPredictiveGains(prediction, net.predict(pool(3), "linearized", draws=draws)).scores
    view = EPIG(pool(3), num_samples=200).look(net, pool(), generator=rng(0))
    assert_close(view.scores, expected, **TIGHT)
    others = net.predict(pool(3), "linearized", draws=net.sample(200, generator=rng(1)))
    assert (expected > 2 * SampledPredictiveGains(prediction, others).scores).all()


@pytest.mark.parametrize("make", [posterior, regression], ids=["classes", "real values"])
@pytest.mark.parametrize(
    "acquisition", [BatchBALD(), EPIG(), EPIG(DataLoader(pool(5, seed=1), batch_size=2))], ids=repr
)
def test_a_loader_is_its_pool(acquisition, make):
    net, x = make(), pool()
    loader = DataLoader(TensorDataset(x, torch.zeros(12)), batch_size=5)
    views = [acquisition.look(net, inputs, generator=rng(0)) for inputs in (loader, x, x.numpy())]
    for view in views[1:]:
        assert_close(view.scores, views[0].scores, **TIGHT)


def test_targets_are_some_of_the_candidates_by_default():
    net = posterior()
    view = EPIG(num_targets=4, num_samples=10).look(net, pool(), generator=rng(0))
    generator = rng(0)
    targets = pool()[torch.randperm(12, generator=generator)[:4]]
    assert_close(view.scores, EPIG(targets, num_samples=10).look(net, pool(), generator=generator).scores, **TIGHT)


def test_targets_of_a_loader_are_collated_as_its_candidates():
    """All of them as targets: those that the loader's own function makes of its items."""

    def scaled(rows: list[torch.Tensor]) -> torch.Tensor:
        return 10 * torch.stack(rows)

    net, x = regression(), pool()
    loader = DataLoader(x, batch_size=5, collate_fn=scaled)
    own = EPIG(num_targets=12).look(net, loader, generator=rng(0)).scores
    assert_close(own, EPIG(10 * x).look(net, loader).scores, **TIGHT)


@pytest.mark.parametrize("option", [{"method": "sampling"}, {"num_samples": 5}, {"num_configurations": 5}], ids=repr)
@pytest.mark.parametrize("kind", [BatchBALD, EPIG])
def test_options_of_draws_are_refused_in_closed_form(kind, option):
    (name,) = option
    with pytest.raises(ArgumentError, match=f"{name}=.* is for classes"):
        kind(**option).look(regression(), pool())


def test_no_targets_are_refused():
    with pytest.raises(ArgumentError, match="num_targets=0"):
        EPIG(num_targets=0)


def test_options_bound_configurations_and_memory():
    view = BatchBALD(num_configurations=4, memory_budget=1).look(posterior(), pool(), generator=rng(0))
    whole = BatchBALD(num_configurations=4).look(posterior(), pool(), generator=rng(0))
    for index in (0, 1, 2):
        view.add(index)
        whole.add(index)
    assert len(view.configurations.probs) <= 4
    assert_close(view.scores, whole.scores, **TIGHT)


def test_a_predictor_without_draws_is_refused():
    class Classifier:
        def predict_proba(self, inputs):
            return np.full((len(inputs), 2), 0.5)

    with pytest.raises(UsageError, match="needs sampled_probs, which predict_proba does not tell"):
        BatchBALD().look(Classifier(), pool())
