"""Laplace on the UCI splits, beside laplace-torch 0.3: the same trained networks, the same splits.

``python benchmarks/laplace_uci.py`` trains one network of 50 ReLU units for each split, fits Laplace approximations
around its weights by both libraries, tunes prior and noise by the evidence, and writes
``benchmarks/results/uci/laplace/<data>.json`` with the figures of each split, versions, machine and seed. A run that
was stopped goes on where it was; a result that exists is shown, not computed again. ``--report`` writes the page
``docs/uci.md``.

The networks' recipe (``Recipe``) is one for all sets. Its epochs and weight decay were chosen on a tenth of the
training parts, never on test data. laplace-torch is tuned as its documentation's regression example does: a thousand
steps of Adam on the logarithms of prior precision and noise; with one precision for all weights, and with one for each
parameter, which it calls layerwise. Its Kronecker evidence takes the noise through ``math.pow``, so that the gradient
in the noise lacks the determinant; *repaired* is the same with that gradient in place. Without laplace-torch its
columns are left out.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import libraries
import numpy as np
import torch
from replicas import ReplicatedMLP
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from uci import HERE, Splits, commit, load_splits, summary

import bayes_kfac as bk

DATA_SETS = ("boston", "concrete", "energy", "kin8nm", "naval", "power", "protein", "wine_red", "yacht")
RESULTS = HERE / "results" / "uci" / "laplace"
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
PAIRS = (
    ("kron exact", "laplace-torch layerwise"),
    ("kron exact, noise of residuals", "laplace-torch layerwise"),
    ("kron exact, one precision", "laplace-torch scalar"),
    ("kron exact, by parameter", "laplace-torch layerwise, repaired"),
)


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


def resident_bytes(call: Callable[[], Any]) -> int | None:
    """How far the process's resident memory rises above where it was; ``None`` where Linux does not say."""

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = read("VmRSS")
        call()
        return read("VmHWM") - before
    except OSError:
        return None


# -- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One data set.

    Attributes:
        name: The data set.
        splits: How many splits, from the first.
        seed: The seed of initial weights, batches and samples.
        recipe: How the networks are trained.
        cache: Where what is done so far is kept.
    """

    name: str
    splits: int
    seed: int
    recipe: Recipe
    cache: Path

    def path(self, part: str) -> Path:
        """The file of a part of the work."""
        return self.cache / f"{self.name}-{self.seed}-{self.splits}-{part}"


_IS_WARM: list[bool] = []


def methods() -> set[str]:
    """The names of all methods that can be run here."""
    own = {name for fit in FITS for name, _, _ in fit.predictions}
    return {"MAP", FULL, *own, *(PEERS if laplace_torch() is not None else ())}


def work(job: Job, split: int | None) -> None:
    """Train the networks of a data set, or evaluate one of its splits, as far as that was not done."""
    torch.set_num_threads(1)  # the matrices are small: a second thread only waits
    path = job.path("weights.pt" if split is None else f"{split}.json")
    known = {} if split is None or not path.exists() else json.loads(path.read_text())
    if path.exists() and (split is None or methods() <= set(known)):
        return
    job.cache.mkdir(parents=True, exist_ok=True)
    splits = load_splits(job.name, job.splits)
    part = path.with_suffix(".part")
    if split is None:
        start = time.perf_counter()
        trained = train(splits, job.recipe, job.seed)
        torch.save({"weights": trained, "seconds": time.perf_counter() - start}, part)
    else:
        trained = torch.load(job.path("weights.pt"), weights_only=True)["weights"]
        if not _IS_WARM:  # the first call of everything is slower
            evaluate_split(splits, trained, split, job.seed, known)
            _IS_WARM.append(True)
        found = evaluate_split(splits, trained, split, job.seed, known)
        for name in found.keys() - known.keys():  # what is kept says what made it, not what put it together
            found[name]["commit"] = commit()
        part.write_text(json.dumps(found))
    part.rename(path)


def result(job: Job) -> dict[str, Any]:
    """What is kept of a data set."""
    parts = [json.loads(job.path(f"{split}.json").read_text()) for split in range(job.splits)]
    names = ["MAP", *(name for fit in FITS for name, _, _ in fit.predictions), FULL, *PEERS]
    found = {
        name: {key: [part[name][key] for part in parts] for key in parts[0][name] if key not in {"memory", "commit"}}
        for name in names
        if all(name in part for part in parts)
    }
    for name, method in found.items():
        method["commits"] = sorted({str(part[name]["commit"]) for part in parts})
        if "memory" in parts[0][name]:
            method["memory"] = parts[0][name]["memory"]
    versions = {"bayes_kfac": bk.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("laplace-torch", "curvlinops-for-pytorch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "data": job.name,
        "splits": job.splits,
        "examples": len(load_splits(job.name, 1).train_x),
        "seed": job.seed,
        "recipe": asdict(job.recipe),
        "training_seconds": torch.load(job.path("weights.pt"), weights_only=True)["seconds"],
        "samples": SAMPLES,
        "peer_steps": PEER_STEPS,
        "methods": found,
        "versions": versions,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
    }


def run(jobs: list[Job], processes: int) -> Iterator[Job]:
    """Do what is to be done, at most two things at a time; yields each data set when it is complete."""
    left = {job.name: job.splits for job in jobs}
    with tqdm(total=sum(1 + job.splits for job in jobs), unit="split") as bar:

        def done(job: Job, split: int | None) -> bool:
            bar.set_postfix_str(f"{job.name} {'trained' if split is None else split}")
            bar.update()
            left[job.name] -= split is not None
            return split is not None and not left[job.name]

        if processes == 1:
            for job in jobs:
                for split in (None, *range(job.splits)):
                    work(job, split)
                    if done(job, split):
                        yield job
            return
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as executor:
            training = {executor.submit(work, job, None): job for job in jobs}
            for future in as_completed(training):
                future.result()
                done(training[future], None)
            tasks = {executor.submit(work, job, split): (job, split) for job in jobs for split in range(job.splits)}
            for future in as_completed(tasks):
                future.result()
                if done(*tasks[future]):
                    yield tasks[future][0]


# -- what is shown ----------------------------------------------------------------------------------------------------

COLUMNS = {
    "MAP": "MAP",
    "kron exact": "kron exact",
    "kron factored": "factored",
    "kron optimal": "optimal",
    "dense": "dense",
    "full": "full",
    "diagonal": "diagonal",
    "kron exact, noise of residuals": "kron exact, noise of residuals",
    "laplace-torch layerwise": "laplace-torch, layerwise",
    "laplace-torch scalar": "laplace-torch, scalar",
    "laplace-torch layerwise, repaired": "laplace-torch, layerwise, repaired",
}
SAMPLED_COLUMNS = {
    "kron exact": "kron exact, linearised",
    "kron exact, sampled weights": "kron exact, sampled",
    "kron factored, sampled weights": "factored, sampled",
}


def table(results: list[dict[str, Any]], heads: list[str], row: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """Lines of a table with a row for each data set."""
    lines = ["| " + " | ".join(["data", *heads]) + " |", "|---" * (1 + len(heads)) + "|"]
    return [*lines, *("| " + " | ".join([own["data"], *row(own)]) + " |" for own in results), ""]


def figures(result: dict[str, Any], name: str, key: str) -> str:
    """Mean ± standard error over splits."""
    return summary(result["methods"][name][key]) if name in result["methods"] else "–"


def paired(result: dict[str, Any], pair: tuple[str, str], key: str) -> str:
    """The mean difference of two methods and its standard error over splits."""
    if any(name not in result["methods"] for name in pair):
        return "–"
    left, right = (np.asarray(result["methods"][name][key]) for name in pair)
    difference = left - right
    return f"{difference.mean():+.4f}±{difference.std() / math.sqrt(len(difference)):.4f}"


def medians(result: dict[str, Any], name: str, key: str) -> list[float]:
    """Medians over splits, of each number of a list."""
    if name not in result["methods"]:
        return []
    values = np.asarray(result["methods"][name][key], dtype=float)
    return np.median(values.reshape(result["splits"], -1), axis=0).tolist()


def chosen(result: dict[str, Any], name: str) -> str:
    """What the evidence chose: noise (of standardised targets) and precisions."""
    own = result["methods"].get(name)
    if own is None:
        return "–"
    parts = [f"{medians(result, name, 'noise')[0]:.3f}"]
    if "precision" in own:
        parts.append(" ".join(f"{value:.3g}" for value in medians(result, name, "precision")))
    return "; ".join(parts)


def determined(result: dict[str, Any], name: str) -> str:
    """The noise, and how many parameters the data determine: where the evidence is greatest, one gives the other.

    ``σ² = (squares of the residuals) / (N − count)`` (MacKay 1992).
    """
    noise, count = result["methods"][name]["noise"], result["examples"]
    residual = np.asarray(result["methods"]["MAP"]["noise"])
    return f"{np.median(noise):.3f}; {np.median(count * (1 - (residual / np.asarray(noise)) ** 2)):.0f}"


def cost(result: dict[str, Any], name: str) -> str:
    """Milliseconds of fitting, tuning and predicting, and the memory of the first two."""
    milliseconds = [f"{1e3 * value:.0f}" for value in medians(result, name, "seconds")]
    if not milliseconds:
        return "–"
    memory = result["methods"][name].get("memory")
    return " + ".join(milliseconds) + ("" if memory is None else f"; {memory / 2**20:.1f} MB")


def tables(results: list[dict[str, Any]]) -> list[str]:
    """All tables."""
    pairs = [f"{left} − {right}" for left, right in PAIRS]
    rmse = ["MAP", "kron exact, sampled weights", "kron factored, sampled weights"]
    priors = ["kron exact", "kron exact, by parameter", "laplace-torch layerwise", "laplace-torch layerwise, repaired"]
    scalars = ["MAP", "kron exact, one precision", "laplace-torch scalar"]
    counts = ["diagonal", "kron exact, one precision", "dense", FULL]
    costs = ["kron exact", "laplace-torch layerwise", "laplace-torch scalar"]
    return [
        "### Log-likelihood\n",
        *table(results, list(COLUMNS.values()), lambda own: [figures(own, name, "log_likelihood") for name in COLUMNS]),
        "Ours minus laplace-torch's, paired by split:\n",
        *table(results, pairs, lambda own: [paired(own, pair, "log_likelihood") for pair in PAIRS]),
        "### Linearised against sampled\n",
        *table(
            results,
            [f"log-likelihood, {head}" for head in SAMPLED_COLUMNS.values()],
            lambda own: [figures(own, name, "log_likelihood") for name in SAMPLED_COLUMNS],
        ),
        *table(
            results,
            ["RMSE, MAP and all linearised", "RMSE, kron exact, sampled", "RMSE, factored, sampled"],
            lambda own: [figures(own, name, "rmse") for name in rmse],
        ),
        "### What the evidence chose\n",
        *table(results, priors, lambda own: [chosen(own, name) for name in priors]),
        *table(results, scalars, lambda own: [chosen(own, name) for name in scalars]),
        "Noise, and parameters that the training examples determine:\n",
        *table(
            results,
            ["examples", *counts],
            lambda own: [str(own["examples"]), *(determined(own, name) for name in counts)],
        ),
        "### Cost of fit, tuning and prediction\n",
        *table(results, costs, lambda own: [cost(own, name) for name in costs]),
    ]


HEAD = """## Laplace on the same splits

One network of 50 ReLU units for each of Gal's splits SPLITS, trained by Adam on standardised data: 100 epochs in
batches of 32, step size 0.01 falling along a cosine, weight decay 1e-4; one recipe for all sets, whose epochs and
decay were chosen on a tenth of the training parts. Around the same trained weights this library and laplace-torch 0.3
fit Laplace approximations, so that nothing else differs. Figures are in the target's units, mean ± standard error
over splits. `python benchmarks/laplace_uci.py`, results in `benchmarks/results/uci/laplace`.

- *MAP*: the network, with the noise of its training residuals.
- *kron exact*, *factored*, *optimal*: Kronecker blocks with the three dampings of [](scale.md); the precision of each
  layer's prior and the noise where the evidence is greatest; linearised predictions. *dense*, *diagonal*: other blocks,
  tuned by their own evidence. *full*: the Gauss-Newton matrix of all weights together, written out without the library.
  *Noise of residuals*: the noise is MAP's, and only the precisions are by the evidence.
- *laplace-torch*: `hessian_structure="kron"`, tuned as in its documentation's regression example, by 1000 steps of Adam
  on the logarithms of precision (one, or *layerwise*: one for each parameter) and noise; linearised predictions.
  *Repaired*: the same with the gradient described below.

"""

TAIL = """
*What the evidence chose*: medians over splits of the noise's standard deviation, for targets of variance 1, and of the
precisions, by layer or in the order weight, bias, weight, bias. *Cost*: medians over splits of milliseconds of fit +
tuning + prediction of the test part, on one core of a two-core machine that also ran other work, and by how much the
process's memory grew in the first split's fit and tuning.

**Where laplace-torch scores otherwise.** Its Kronecker factors are multiplied by the noise through `math.pow`
(`laplace/utils/matrix.py`), which takes the noise out of the graph: the gradient of its evidence in the noise lacks
the determinant, and torch warns that a tensor that requires gradients became a number. What its example finds is not
the greatest evidence, from which it is 48 to 156 nats away (medians by set; on power, with 8611 examples for 301
parameters, 0.4), but the noise of the training residuals. With the gradient repaired its noise, precisions and
predictions are those of *kron exact, by parameter*; and with the noise of residuals, ours are those of laplace-torch
as documented. What is left, in our favour, is that its biases are blocks of their own.

**Which noise is better depends on the set.** These networks nearly interpolate boston and yacht: the noise of
residuals is far below the test error, and *MAP* shows it. Linearised predictions make up for that with the variance of
the weights, and are better with this small noise on boston, yacht and energy, though single splits of boston cost most
by it (-3.47 against -2.89). On concrete and wine_red the evidence's noise is better. The evidence estimates the noise's
variance as the squares of the residuals over `examples − determined parameters`. Kronecker blocks count too many as
determined, because a product `G ⊗ A` has curvature in directions that the sum over examples leaves flat; the last table
of that section has the counts, down to those of the full matrix. On boston that is most of the difference (-0.198; with
the full matrix -0.049±0.051); on yacht it is the larger part (-0.517; -0.184±0.046), and the rest is the evidence's
own.

So for networks of this size take `structure="dense"`, which is better than Kronecker blocks on five sets and equal on
power; and where a Kronecker fit is tuned with `noise=True`, compare with the noise of the residuals on validation
data: `bk.likelihoods.Gaussian(residual_scale)` and `optimize_prior_precision()` without `noise`. Sampled weights lose
0.03 to 1.0 nats by exact damping; factored damping, whose cross terms make the posterior narrower, loses 0.06 at
most.
"""


def section() -> str:
    """The section of ``docs/uci.md``, where there are results."""
    paths = [RESULTS / f"{name}.json" for name in DATA_SETS]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not results:
        return ""
    counts = sorted({own["splits"] for own in results}, reverse=True)
    named = [", ".join(own["data"] for own in results if own["splits"] == count) for count in counts]
    splits = "; ".join(f"0 to {count - 1} of {names}" for count, names in zip(counts, named, strict=True))
    return "\n" + HEAD.replace("SPLITS", f"({splits})") + "\n".join(tables(results)) + TAIL


def main() -> None:
    """Run what is asked for and not yet there; print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA_SETS), metavar="NAME", help=f"default: {DATA_SETS}")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2)
    parser.add_argument("--epochs", type=int, help="fewer epochs, for a quick look; the result is not kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="write docs/uci.md from the results and end")
    arguments = parser.parse_args()
    if arguments.report:
        import report

        report.write()
        return
    torch.set_num_threads(1)
    if laplace_torch() is None:
        print("laplace-torch is not installed, so its columns are left out: pip install laplace-torch==0.3 brings it.")
    recipe = Recipe(epochs=arguments.epochs or Recipe.epochs)
    with tempfile.TemporaryDirectory() as quick:
        cache = Path(quick) if arguments.epochs else HERE.parent / ".cache" / "laplace_uci"
        paths = {name: arguments.results / f"{name}.json" for name in arguments.data}
        jobs = [Job(name, arguments.splits, arguments.seed, recipe, cache) for name in arguments.data]
        results = {
            name: json.loads(path.read_text()) for name, path in paths.items() if path.exists() and not arguments.epochs
        }
        for job in run([job for job in jobs if job.name not in results], arguments.processes):
            results[job.name] = result(job)
            if not arguments.epochs:
                arguments.results.mkdir(parents=True, exist_ok=True)
                paths[job.name].write_text(json.dumps(results[job.name], indent=1) + "\n")
        print("\n".join(tables([results[name] for name in arguments.data])))


if __name__ == "__main__":
    main()
