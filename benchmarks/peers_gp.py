"""Exact Gaussian processes on the UCI splits, by ``gpytorch`` and BoTorch's optimizer: see ``peers.py``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from uci import Splits

ITERATIONS = 50
#: For inputs and targets of variance 1.
BOUNDS = {"lengthscale": (1e-2, 1e3), "height": (1e-3, 1e3)}


@dataclass(frozen=True)
class Fit:
    """A process where its evidence is greatest, and what it predicts.

    Attributes:
        evidence: The log-density of the training targets.
        mean: Of targets, ``[points, 1]``.
        scale: Their standard deviation.
        noise: The standard deviation of the noise.
        lengthscales: One for each input.
        height: The variance of the function.
        constant: The function's mean.
    """

    evidence: float
    mean: Tensor
    scale: Tensor
    noise: float
    lengthscales: Tensor
    height: float
    constant: float


def fit(x: Tensor, y: Tensor, points: Tensor, iterations: int = ITERATIONS) -> Fit:
    """Fit length scales, variance, noise and mean by the evidence, and predict.

    The optimizer is run freely and within bounds, as either may end in a lesser maximum, or, freely, where no Cholesky
    factor exists; the greater evidence counts.
    """
    from linear_operator.utils.errors import NotPSDError

    found = [_fit(x, y, points, iterations, BOUNDS)]
    with suppress(NotPSDError):
        found.append(_fit(x, y, points, iterations, {}))
    return max(found, key=lambda own: own.evidence)


def _fit(x: Tensor, y: Tensor, points: Tensor, iterations: int, bounds: Mapping[str, tuple[float, float]]) -> Fit:
    import gpytorch
    from botorch.models import SingleTaskGP
    from botorch.optim.fit import fit_gpytorch_mll_scipy

    features = x.shape[-1]
    within = {name: gpytorch.constraints.Interval(*ends) for name, ends in bounds.items()}
    own = gpytorch.kernels.MaternKernel(2.5, ard_num_dims=features, lengthscale_constraint=within.get("lengthscale"))
    kernel = gpytorch.kernels.ScaleKernel(own, outputscale_constraint=within.get("height"))
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of targets not quite of variance 1, and of an optimizer stopped at its end
        model = SingleTaskGP(x, y, likelihood=likelihood, covar_module=kernel, outcome_transform=None)
        own.lengthscale, likelihood.noise = features**0.5, 0.1
        evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
        with gpytorch.settings.fast_computations(False, False, False):  # Cholesky factors, not conjugate gradients
            fit_gpytorch_mll_scipy(evidence, options={"maxiter": iterations})
            with torch.no_grad():
                model.train()
                value = float(evidence(model(*model.train_inputs), model.train_targets)) * len(x)
                model.eval()
                prediction = model.posterior(points, observation_noise=True)
                return Fit(
                    value,
                    prediction.mean,
                    prediction.variance.sqrt(),
                    float(likelihood.noise.sqrt()),
                    own.lengthscale[0].clone(),
                    float(model.covar_module.outputscale),
                    float(model.mean_module.constant),
                )


def work(splits: Splits) -> dict[str, Any]:
    """The figures of each split."""
    found: dict[str, list[Any]] = {"rmse": [], "log_likelihood": [], "noise": [], "evidence": []}
    start = time.process_time()
    for split in range(splits.train_x.shape[1]):
        x, y, points = (own[:, split].double() for own in (splits.train_x, splits.train_y, splits.test_x))
        best, scale, target = fit(x, y, points), splits.scale[split].double(), splits.test_y[:, split].double()
        density = torch.distributions.Normal(best.mean * scale, best.scale * scale).log_prob(target)
        found["rmse"].append(float((best.mean * scale - target).square().mean().sqrt()))
        found["log_likelihood"].append(float(density.mean()))
        found["noise"].append(best.noise)
        found["evidence"].append(best.evidence)
    return {
        "predictions": {"gp": found},
        "training_seconds": time.process_time() - start,
        "choice_seconds": 0.0,
        "packages": {name: version(name) for name in ("gpytorch", "botorch")},
    }
