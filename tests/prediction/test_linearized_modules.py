"""Linearised predictions through every kind of module and every structure, against dense Jacobians and covariances."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayes_kfac as bk
from bayes_kfac.likelihoods import Gaussian
from tests.curvature.modules.cases import CASES
from tests.helpers import TIGHT, randn, record, rng, seeded
from tests.posteriors import (
    FAMILIES,
    dense_derivatives,
    dense_function_covariance,
    dense_function_samples,
    dense_output_covariance,
    random_posterior,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-9}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


@pytest.mark.parametrize(("structure", "damping"), FAMILIES, ids=["-".join(names) for names in FAMILIES])
@pytest.mark.parametrize("name", CASES)
def test_mean_and_covariance_are_the_dense_ones(name, structure, damping):
    """``f(x)`` and ``J P⁻¹ Jᵀ`` of a posterior that was measured on the model's own rows."""
    build, inputs = CASES[name]
    model = seeded(build())
    rows = record(model, inputs)
    posterior = random_posterior(model, Gaussian(0.5), structure=structure, damping=damping, rows=rows)
    mean, covariance = dense_output_covariance(posterior, inputs)
    prediction = posterior.predict(inputs)
    assert_close(prediction.mean, mean, rtol=1e-9, atol=1e-9)
    assert_close(prediction.epistemic_covariance, covariance, rtol=1e-9, atol=1e-9)
    assert covariance.diagonal(dim1=-2, dim2=-1).mean() > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_joint_covariances_and_affine_draws_are_the_dense_ones(name):
    """``J P⁻¹ J'ᵀ`` between all examples, and ``f(x) + J (w − M)``, by every structure; example by example too."""
    build, inputs = CASES[name]
    model = seeded(build())
    rows = record(model, inputs)
    derivatives = None
    for structure, damping in FAMILIES:
        if damping == "optimal":
            continue  # as factored, another matrix normal
        posterior = random_posterior(model, Gaussian(0.5), structure=structure, damping=damping, rows=rows)
        derivatives = derivatives or dense_derivatives(posterior, inputs)
        joint = dense_function_covariance(posterior, inputs, inputs, derivatives)
        assert_close(posterior.function_covariance(inputs), joint, **CLOSE)
        draws = posterior.sample(3, generator=rng(0))
        functions = dense_function_samples(posterior, inputs, draws, derivatives)
        assert_close(posterior.function_samples(inputs, draws=draws), functions, **CLOSE)
    assert_close(posterior.function_covariance(inputs, memory_budget=1), joint, **CLOSE)
    assert_close(posterior.function_samples(inputs, draws=draws, memory_budget=1), functions, **CLOSE)


class Blocks(nn.Module):
    """Two layers, the first of which may run under activation checkpointing."""

    def __init__(self, *, checkpoints: bool) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.run = partial(checkpoint, use_reentrant=False) if checkpoints else lambda function, x: function(x)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.run(lambda x: self.norm(self.body(x)).tanh(), inputs))


def test_activation_checkpoints_run_again_with_the_posteriors_weights() -> None:
    """In the backward pass, wherever the model's own weights have gone since."""
    inputs, outputs = randn(5, 3, seed=1), []
    for checkpoints in (False, True):
        model = seeded(Blocks(checkpoints=checkpoints))
        laplace = bk.Laplace(model, Gaussian(0.5)).fit([(inputs, randn(5, 2, seed=2))], progress=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        outputs.append(laplace.posterior().output(inputs))
    assert_close(outputs[1].mean, outputs[0].mean, **TIGHT)
    assert_close(outputs[1].covariance, outputs[0].covariance, **TIGHT)
