"""Predictions and posteriors for tests of acquisitions. All float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayes_kfac import Posterior
from bayes_kfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from bayes_kfac.prediction import BernoulliPrediction, CategoricalPrediction, Source
from bayes_kfac.provenance import Provenance
from tests.helpers import randn, seeded
from tests.posteriors import random_posterior

PROVENANCE = Provenance("a test", "kron", "factored", "mc", "expand", temperature=1.0, num_data=20)
SOURCE = Source("sampling", 7, PROVENANCE)


def classes(draws: int, n: int, num_classes: int, *, seed: int = 0, scale: float = 2.0) -> CategoricalPrediction:
    """Class probabilities that differ much between draws."""
    return CategoricalPrediction(scale * randn(draws, n, num_classes, seed=seed), SOURCE)


def binary(draws: int, *shape: int, seed: int = 0) -> BernoulliPrediction:
    return BernoulliPrediction(2 * randn(draws, *shape, seed=seed), SOURCE)


def certain(labels: list[list[int]], num_classes: int) -> CategoricalPrediction:
    """Draws that are all sure of a class: ``labels[draw][example]``."""
    one_hot = nn.functional.one_hot(torch.tensor(labels), num_classes)
    return CategoricalPrediction(torch.where(one_hot.bool(), 0.0, -torch.inf).double(), SOURCE)


def posterior(likelihood: Likelihood | None = None, *, inputs: int = 3, outputs: int = 3, seed: int = 0) -> Posterior:
    """Of a small network with a broad posterior."""
    model = seeded(nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)), seed)
    return random_posterior(model, Categorical() if likelihood is None else likelihood, num_data=5, seed=seed)


def regression(outputs: int = 1) -> Posterior:
    return posterior(Gaussian(torch.tensor(0.3, dtype=torch.float64)), outputs=outputs)


def binary_posterior() -> Posterior:
    return posterior(Bernoulli(), outputs=1)


def pool(n: int = 12, *, seed: int = 7) -> Tensor:
    return randn(n, 3, seed=seed)
