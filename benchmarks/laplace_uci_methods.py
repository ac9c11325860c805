"""What ``laplace_uci.py`` compares: the trained networks, and every Laplace fit and prediction around their weights.

Ours are one :class:`Fit` for each structure and tuning; laplace-torch's are named in ``PEERS``. Shapes: inputs
``[examples, features]`` of one split, standardised; targets ``[examples, 1]``; figures are in the target's units.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import libraries
import torch
from measure import resident_bytes
from replicas import ReplicatedMLP
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset
from uci import Splits

import bayes_kfac as bk

PEER_STEPS = 1000
SAMPLES = 100


@dataclass(frozen=True)
class Recipe:
    """How the networks are trained: Adam on half the mean squared error, the step size falling along a cosine."""

    hidden: int = 50
    epochs: int = 100
    batch_size: int = 32
    lr: float = 1e-2
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class Fit:
    """One of our fits. Predictions of one fit and tuning differ in damping and method only.

    Attributes:
        structure: The structure of the blocks.
        per: What has a precision of its own.
        predictions: Name, damping and method of each.
        tunes_noise: Whether the evidence chooses the noise; else it is that of the training residuals.
    """

    structure: str
    per: str
    predictions: tuple[tuple[str, str, str], ...]
    tunes_noise: bool = True


LINEARIZED, SAMPLED = "linearized", "sampling"
FITS = (
    Fit(
        "kron",
        "layer",
        (
            ("kron exact", "exact", LINEARIZED),
            ("kron factored", "factored", LINEARIZED),
            ("kron optimal", "optimal", LINEARIZED),
            ("kron exact, sampled weights", "exact", SAMPLED),
            ("kron factored, sampled weights", "factored", SAMPLED),
        ),
    ),
    Fit("kron", "model", (("kron exact, one precision", "exact", LINEARIZED),)),
    Fit("kron", "parameter", (("kron exact, by parameter", "exact", LINEARIZED),)),
    Fit("kron", "layer", (("kron exact, noise of residuals", "exact", LINEARIZED),), tunes_noise=False),
    Fit("dense", "layer", (("dense", "exact", LINEARIZED),)),
    Fit("diagonal", "layer", (("diagonal", "exact", LINEARIZED),)),
)
FULL = "full"
#: How many precisions, weights and biases of two layers or one; and whether the gradient in the noise is repaired.
PEERS = {
    "laplace-torch layerwise": (4, False),
    "laplace-torch scalar": (1, False),
    "laplace-torch layerwise, repaired": (4, True),
}


def laplace_torch() -> ModuleType | None:
    """The package ``laplace``; ``None`` where it is not installed."""
    try:
        return libraries.laplace_torch()
    except ImportError:
        return None


# -- the networks -----------------------------------------------------------------------------------------------------


def train(splits: Splits, recipe: Recipe, seed: int) -> dict[str, Tensor]:
    """The trained weights of all splits, stacked."""
    num_data, replicas, features = splits.train_x.shape
    generator = torch.Generator().manual_seed(seed)
    model = ReplicatedMLP(replicas, features, recipe.hidden, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    steps = recipe.epochs * math.ceil(num_data / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    columns = torch.arange(replicas)
    for _ in range(recipe.epochs):
        order = torch.rand(num_data, replicas, generator=generator).argsort(0)
        for rows in order.split(recipe.batch_size):
            optimizer.zero_grad()
            errors = model(splits.train_x[rows, columns]) - splits.train_y[rows, columns]
            (0.5 * errors.square().mean(0).sum()).backward()
            optimizer.step()
            schedule.step()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def network(weights: dict[str, Tensor], split: int) -> nn.Sequential:
    """The network of one split by itself."""
    hidden, features = weights["hidden.weight"].shape[1:]
    model = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    with torch.no_grad():
        for layer, name in ((model[0], "hidden"), (model[2], "output")):
            layer.weight.copy_(weights[f"{name}.weight"][split])
            layer.bias.copy_(weights[f"{name}.bias"][split])
    return model


# -- one split --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Test:
    """The test part of a split; inputs standardised, targets centred and in their own units."""

    x: Tensor
    y: Tensor
    scale: Tensor

    def figures(self, mean: Tensor, log_density: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Error and log-likelihood in the target's units, of a prediction of standardised targets."""
        return {
            "rmse": float((mean * self.scale - self.y).square().mean().sqrt()),
            "log_likelihood": float(log_density(self.y / self.scale).mean() - self.scale.log()),
        }


def evaluate_split(
    splits: Splits, weights: dict[str, Tensor], split: int, seed: int, known: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Figures of every method on one split, those that are known already included."""
    model = network(weights, split)
    x, y = splits.train_x[:, split].contiguous(), splits.train_y[:, split].contiguous()
    test = Test(splits.test_x[:, split].contiguous(), splits.test_y[:, split].contiguous(), splits.scale[split])
    with torch.no_grad():
        mean, noise = model(test.x), (model(x) - y).square().mean().sqrt()
    found = {"MAP": {**test.figures(mean, torch.distributions.Normal(mean, noise).log_prob), "noise": float(noise)}}
    found |= known
    loader = DataLoader(TensorDataset(x, y), batch_size=256)
    for fit in FITS:
        scale = 1.0 if fit.tunes_noise else float(noise)
        for name, damping, method in fit.predictions:
            if name not in found:
                found[name] = ours(model, loader, test, seed, fit, scale, damping, method)
    if FULL not in found:
        found[FULL] = full(model, x, y, test)
    peers = {name: kind for name, kind in PEERS.items() if name not in found and laplace_torch() is not None}
    for name, kind in peers.items():
        found[name] = theirs(model, loader, test, kind)
    if split == 0 and not known:
        found["kron exact"]["memory"] = resident_bytes(lambda: our_fit(model, loader, FITS[0]))
        for name, kind in peers.items():
            found[name]["memory"] = resident_bytes(lambda kind=kind: their_fit(model, loader, *kind))
    return found


def our_fit(
    model: nn.Module, loader: DataLoader, fit: Fit, noise: float = 1.0, damping: str = "exact"
) -> tuple[bk.Laplace, list[float]]:
    """A tuned fit, and the seconds of measuring and of tuning."""
    start = time.perf_counter()
    laplace = bk.Laplace(model, bk.likelihoods.Gaussian(noise), structure=fit.structure, damping=damping)
    laplace.fit(loader, progress=False)
    middle = time.perf_counter()
    laplace.optimize_prior_precision(per=fit.per, noise=fit.tunes_noise)
    return laplace, [middle - start, time.perf_counter() - middle]


def ours(
    model: nn.Module, loader: DataLoader, test: Test, seed: int, fit: Fit, noise: float, damping: str, method: str
) -> dict[str, Any]:
    """One of our methods."""
    laplace, seconds = our_fit(model, loader, fit, noise, damping)
    posterior = laplace.posterior()
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    prediction = posterior.predict(test.x, method, num_samples=SAMPLES, generator=generator)
    mean = prediction.mean
    stop = time.perf_counter()
    return {
        **test.figures(mean, prediction.log_prob),
        "noise": float(posterior.likelihood.noise_scale),
        "precision": precisions(laplace, fit.per),
        "evidence": float(laplace.log_marginal_likelihood()),
        "seconds": [*seconds, stop - start],
    }


def full(model: nn.Module, x: Tensor, y: Tensor, test: Test) -> dict[str, Any]:
    """The Gauss-Newton matrix of all weights together, one prior precision: what all blocks approximate."""
    values = {name: value.detach().double() for name, value in model.named_parameters()}
    gradient = vmap(grad(lambda own, point: functional_call(model, own, point.unsqueeze(0)).squeeze()), (None, 0))

    def jacobian(points: Tensor) -> Tensor:
        return torch.cat([own.flatten(1) for own in gradient(values, points.double()).values()], dim=1)

    J = jacobian(x)
    spectrum, basis = torch.linalg.eigh(J.T @ J)
    spectrum, norm = spectrum.clamp(min=0), sum(own.square().sum() for own in values.values())
    squares = (functional_call(model, values, x.double()) - y).square().sum()
    logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def negative_evidence() -> Tensor:
        optimizer.zero_grad()
        precision, variance = logs.exp()
        likelihood = squares / variance + len(x) * (2 * math.pi * variance).log()
        loss = 0.5 * (likelihood + precision * norm + torch.log1p(spectrum / (variance * precision)).sum())
        loss.backward()
        return loss.detach()

    optimizer.step(negative_evidence)
    precision, variance = logs.detach().exp()
    spread = ((jacobian(test.x) @ basis).square() / (spectrum / variance + precision)).sum(1, keepdim=True)
    with torch.no_grad():
        mean = model(test.x)
    density = torch.distributions.Normal(mean, (spread + variance).sqrt().to(mean))
    return {
        **test.figures(mean, density.log_prob),
        "noise": float(variance.sqrt()),
        "precision": [float(precision)],
        "evidence": -float(negative_evidence()),
    }


def precisions(laplace: bk.Laplace, per: str) -> list[float]:
    """The prior's precisions, by layer or parameter: weights before biases, as in ``model.parameters()``."""
    values = laplace.prior_precision.values()
    if per == "parameter":
        return [float(own) for value in values for own in (value[0, 0], value[0, -1])]
    return [float(value) for value in values][: 1 if per == "model" else None]


@contextmanager
def differentiable_noise(is_wanted: bool) -> Iterator[None]:
    """Let laplace-torch's Kronecker factors keep the graph of what they are multiplied with, inside."""
    from laplace.utils import matrix

    original = matrix.pow
    if is_wanted:
        matrix.pow = lambda value, exponent: value**exponent
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")
            yield
    finally:
        matrix.pow = original


def their_fit(model: nn.Module, loader: DataLoader, count: int, is_repaired: bool) -> tuple[Any, list[float]]:
    """laplace-torch's Kronecker fit, tuned as in its regression example, and the seconds of both."""
    start = time.perf_counter()
    laplace = laplace_torch().Laplace(
        copy.deepcopy(model), "regression", subset_of_weights="all", hessian_structure="kron"
    )
    laplace.fit(loader)
    middle = time.perf_counter()
    log_prior, log_sigma = torch.ones(count, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
    with differentiable_noise(is_repaired):
        for _ in range(PEER_STEPS):
            optimizer.zero_grad()
            loss = -laplace.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
            loss.backward()
            optimizer.step()
    laplace.prior_precision, laplace.sigma_noise = log_prior.detach().exp(), log_sigma.detach().exp()
    return laplace, [middle - start, time.perf_counter() - middle]


def theirs(model: nn.Module, loader: DataLoader, test: Test, kind: tuple[int, bool]) -> dict[str, Any]:
    """laplace-torch, by its linearised prediction."""
    laplace, seconds = their_fit(model, loader, *kind)
    start = time.perf_counter()
    mean, variance = laplace(test.x, pred_type="glm")
    stop = time.perf_counter()
    scale = (variance.squeeze(-1) + laplace.sigma_noise.square()).sqrt()
    return {
        **test.figures(mean, torch.distributions.Normal(mean, scale).log_prob),
        "noise": float(laplace.sigma_noise),
        "precision": laplace.prior_precision.tolist(),
        "evidence": float(laplace.log_marginal_likelihood()),
        "seconds": [*seconds, stop - start],
    }


def names() -> set[str]:
    """The names of all methods that can be run here."""
    own = {name for fit in FITS for name, _, _ in fit.predictions}
    return {"MAP", FULL, *own, *(PEERS if laplace_torch() is not None else ())}
