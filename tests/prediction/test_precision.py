"""Predictions of models in 16 bits: the model computes in its own precision, everything after it in single."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac.likelihoods import (
    Bernoulli,
    Categorical,
    GammaNoise,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
)
from bayes_kfac.prediction import Draws, Prediction
from tests.helpers import randn, rng, seeded
from tests.posteriors import random_posterior

CASES = {
    "fixed": (Gaussian(0.5), 2),
    "gamma": (Gaussian(GammaNoise(6.0, 6.0)), 2),
    "heteroscedastic": (HeteroscedasticGaussian(), 4),
    "heteroscedastic alone": (HeteroscedasticGaussian(), 2),
    "counts": (Poisson(), 2),
    "binary": (Bernoulli(), 2),
    "classes": (Categorical(), 3),
}
PROPERTIES = ("mean", "variance", "covariance", "probs", "entropy", "expected_entropy", "mutual_information")


def told(prediction: Prediction, target: Tensor) -> dict[str, Tensor]:
    """What a prediction knows, as far as its kind does."""
    found = {name: getattr(prediction, name) for name in PROPERTIES if hasattr(prediction, name)}
    found["log_prob"] = prediction.log_prob(target)
    if hasattr(prediction, "quantile"):
        found["quantile"] = prediction.quantile(0.8)
        found["cdf"] = prediction.cdf(target.to(found["quantile"].dtype))
        found["density"] = prediction.distribution.log_prob(target.reshape(-1, *prediction.distribution.event_shape))
        prediction.distribution.sample()
    return found


@pytest.mark.parametrize("method", ["linearized", "sampling"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_is_told_in_single_precision(dtype: torch.dtype, name: str, method: str) -> None:
    """In float32, and near what the same weights predict in float64."""
    likelihood, outputs = CASES[name]
    model = seeded(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))).to(dtype)
    low = random_posterior(model, copy.deepcopy(likelihood))
    high = copy.deepcopy(low).to(torch.float64)
    x, draws = randn(5, 3, seed=1).to(dtype), low.sample(8, generator=rng(0)) if method == "sampling" else None
    again = None if draws is None else Draws({key: value.double() for key, value in draws.values.items()})
    prediction = low.predict(x, draws=draws, generator=rng(0))
    target = target_of(likelihood, prediction)
    found = told(prediction, target)
    expected = told(high.predict(x.double(), draws=again, generator=rng(0)), target)
    for key, value in found.items():
        assert value.dtype == torch.float32, key
        if key != "quantile" or not isinstance(likelihood, Poisson):  # one count more or less
            assert_close(value.double(), expected[key].double(), rtol=0.1, atol=0.1, msg=key)


def target_of(likelihood: Likelihood, prediction: Prediction) -> Tensor:
    if isinstance(likelihood, Categorical):
        return torch.arange(5) % 3
    return torch.ones_like(prediction.mean)
