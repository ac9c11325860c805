"""Exact Gaussian processes on the UCI splits, by ``gpytorch`` and BoTorch's optimizer: see ``peers.py``."""

from __future__ import annotations

import time
import warnings
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from uci import Splits

KERNELS = ("matern", "squared exponential")
EVALUATIONS = 100


def evidence_and_prediction(kernel: str, x: Tensor, y: Tensor, points: Tensor) -> tuple[float, Tensor, Tensor, float]:
    """Fit hyperparameters by the evidence; the evidence, the mean and standard deviation of targets, and the noise."""
    import gpytorch
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP

    features = x.shape[-1]
    own = (
        gpytorch.kernels.MaternKernel(2.5, ard_num_dims=features)
        if kernel == "matern"
        else gpytorch.kernels.RBFKernel(ard_num_dims=features)
    )
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-6))
    likelihood.noise = 0.1
    model = SingleTaskGP(
        x, y, likelihood=likelihood, covar_module=gpytorch.kernels.ScaleKernel(own), outcome_transform=None
    )
    own.lengthscale = features**0.5
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    with (
        gpytorch.settings.fast_computations(False, False, False),  # Cholesky factors, not conjugate gradients
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of an optimizer that is stopped at its last evaluation
        fit_gpytorch_mll(evidence, optimizer_kwargs={"options": {"maxiter": EVALUATIONS}}, max_attempts=1)
        model.train()
        with torch.no_grad():
            value = float(evidence(model(*model.train_inputs), model.train_targets)) * len(x)
        model.eval()
        with torch.no_grad():
            prediction = model.posterior(points, observation_noise=True)
            return value, prediction.mean, prediction.variance.sqrt(), float(model.likelihood.noise.sqrt())


def work(splits: Splits, evaluations: int = EVALUATIONS) -> dict[str, Any]:
    """The figures of each split."""
    found: dict[str, list[Any]] = {"rmse": [], "log_likelihood": [], "noise": [], "kernel": []}
    start = time.process_time()
    for split in range(splits.train_x.shape[1]):
        x, y, points = (own[:, split].double() for own in (splits.train_x, splits.train_y, splits.test_x))
        fits = {kernel: evidence_and_prediction(kernel, x, y, points) for kernel in KERNELS}
        kernel = max(fits, key=lambda own: fits[own][0])
        _, mean, spread, noise = fits[kernel]
        scale, target = splits.scale[split].double(), splits.test_y[:, split].double()
        density = torch.distributions.Normal(mean * scale, spread * scale).log_prob(target)
        found["rmse"].append(float((mean * scale - target).square().mean().sqrt()))
        found["log_likelihood"].append(float(density.mean()))
        found["noise"].append(noise)
        found["kernel"].append(kernel)
    return {
        "predictions": {"gp": found},
        "training_seconds": time.process_time() - start,
        "choice_seconds": 0.0,
        "packages": {"gpytorch": version("gpytorch"), "botorch": version("botorch")},
    }
