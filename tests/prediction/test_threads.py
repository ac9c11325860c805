"""Predictions from several threads on one model: each is what it is alone, and the model is left as it was."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

from bayes_kfac import Mixture, Posterior
from bayes_kfac.likelihoods import Gaussian
from bayes_kfac.prediction.forward import evaluating
from bayes_kfac.sklearn import BayesianMLPRegressor
from tests.helpers import randn, seeded
from tests.posteriors import random_posterior

INPUTS = [randn(3, 2, seed=seed) for seed in range(12)]


class Pause(nn.Module):
    """The identity, in which another thread has its turn."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(1e-3)
        return x


@pytest.fixture
def posterior() -> Posterior:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), Pause(), nn.Tanh(), nn.Dropout(), nn.Linear(3, 1))
    return random_posterior(seeded(model), Gaussian(0.1))


def moments(prediction: Any) -> Tensor:
    return torch.cat([prediction.mean, prediction.variance])


def sampled(posterior: Posterior) -> Callable[[Tensor], Tensor]:
    draws = posterior.sample(4)
    return lambda x: moments(posterior.predict(x, draws=draws))


def linearized(posterior: Posterior) -> Callable[[Tensor], Tensor]:
    return lambda x: moments(posterior.predict(x))


def differentiated(posterior: Posterior) -> Callable[[Tensor], Tensor]:
    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(posterior.predict(x).variance.sum(), x)[0]

    return gradient


def joint(posterior: Posterior) -> Callable[[Tensor], Tensor]:
    return posterior.function_covariance


def mixed(posterior: Posterior) -> Callable[[Tensor], Tensor]:
    """Two Gaussians around one model: what two threads ask for need not be one posterior's."""
    mixture = Mixture([posterior, random_posterior(posterior.model, Gaussian(0.1), seed=1)])
    return lambda x: moments(mixture.predict(x))


@pytest.mark.parametrize("predicting", [sampled, linearized, differentiated, joint, mixed])
def test_threads_predict_what_one_thread_does(
    posterior: Posterior, predicting: Callable[[Posterior], Callable[[Tensor], Tensor]]
) -> None:
    predict, model = predicting(posterior), posterior.model
    model.train()
    model[4].eval()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    alone = [predict(x) for x in INPUTS]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(predict, INPUTS))
    assert_close(together, alone, rtol=1e-12, atol=1e-12)
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_threads_on_an_estimator() -> None:
    """Means alone, too: they are of the posterior's weights, which the network need not have."""
    inputs = [x.numpy() for x in INPUTS]
    estimator = BayesianMLPRegressor(hidden_layer_sizes=(4,), max_iter=2, n_members=2, random_state=0)
    estimator.fit(np.concatenate(inputs), np.concatenate(inputs)[:, 0])
    for own in estimator.posteriors_:
        own.model.append(Pause())

    def predict(x: np.ndarray) -> np.ndarray:
        return np.concatenate([estimator.predict(x), *estimator.predict(x, return_std=True)])

    alone = [predict(x) for x in inputs]
    with ThreadPoolExecutor(3) as pool:
        np.testing.assert_allclose(list(pool.map(predict, inputs)), alone, rtol=1e-6)


def test_a_loader_may_wait_for_predictions_of_other_threads(posterior: Posterior) -> None:
    """Between batches the model is free."""

    class Asking(Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Tensor:
            return pool.submit(posterior.predict, INPUTS[index]).result(timeout=60).mean[0].expand(2)

    with ThreadPoolExecutor(1) as pool:
        assert len(posterior.predict(DataLoader(Asking()), progress=False)) == 2


def test_a_thread_may_predict_inside_its_own_predictions(posterior: Posterior) -> None:
    alone = posterior.predict(INPUTS[0]).mean
    with evaluating(posterior.model):
        assert_close(posterior.predict(INPUTS[0]).mean, alone)


def test_a_posterior_that_predicted_is_copied_and_pickled(posterior: Posterior) -> None:
    alone = posterior.predict(INPUTS[0]).mean
    for again in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        assert_close(again.predict(INPUTS[0]).mean, alone)
