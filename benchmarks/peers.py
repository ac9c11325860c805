"""Peers on the UCI splits: deep ensembles, IVON, MC dropout and Gaussian processes.

``python benchmarks/peers.py`` trains every method on Gal's splits and writes
``benchmarks/results/uci/peers/<method>/<data>.json`` with the figures of each split, what was chosen, seconds, versions
and machine. A result that exists is read, not computed again. ``load`` gives other scripts the figures.

All networks have one hidden layer of 50 ReLU units (100 for protein) and are trained in batches of 32, the step size
falling to zero along a cosine. How long, and the other values of a method's grid, are chosen for each split by itself,
by the log-likelihood of held-out tenths of its training part (three tenths on sets with fewer than 2000 rows, else
one). So is the noise of those methods that have one noise. Then the method is fitted to the whole training part. Test
data, and other splits, whose training parts hold this one's test data, choose nothing.

- ``ensemble``: five networks trained on squared errors (Lakshminarayanan et al. 2017). Their predictive distribution is
  the mixture of five Gaussians of one noise: that of held-out tenths, or that of the training residuals.
- ``mean_variance_ensemble``: five networks of mean and variance, trained on the log-likelihood and combined into one
  Gaussian as in that paper, without its adversarial examples.
- ``ivon``: a diagonal Gaussian posterior by ``ivon-opt`` (Shen et al. 2024); 100 weight samples. The noise is learned
  with the weights; in prediction it is this one or that of held-out tenths. Always of the greater length. Step size and
  the memory of the curvature were set on held-out tenths of boston's splits 0 to 9.
- ``mc_dropout``: dropout of inputs and hidden units in training and prediction (Gal & Ghahramani 2016); 1000 samples.
  No weight decay: with that paper's prior length scale, 0.01, it is below 1e-6.
- ``gp``: an exact Gaussian process of ``gpytorch``, a Matérn 5/2 kernel with a length scale for each input, tuned by
  the evidence, on sets with fewer than 2000 rows (``peers_gp.py``). Larger sets would need inducing points; wine_red's
  evidence has no maximum, as an eighth of its rows are copies of others, whose targets fit a noise of 0.

Seconds are those of the processor, of one thread.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import jobs
import peers_gp
import torch
from peers_networks import Method, Replica, Setting, fit, mean_variance_loss, squared_error, variance
from torch import Tensor
from uci import HERE, load_splits, summary

SMALL = ("boston", "yacht", "energy", "concrete", "wine_red")
LARGE = ("kin8nm", "power", "naval", "protein")
DATA_SETS = tuple(sorted(SMALL + LARGE))
#: Where an exact Gaussian process can be fitted by the evidence.
GP_SETS = ("boston", "yacht", "energy", "concrete")
RESULTS = HERE / "results"
MEMBERS = 5
HELD_OUT_SAMPLES = 50
#: Standard deviations of the noise that are tried on held-out tenths; targets have variance 1.
NOISES = torch.logspace(math.log10(2e-3), math.log10(2.0), 60)


# -- predictive distributions -----------------------------------------------------------------------------------------


def mixture(means: Tensor, noise: Tensor, targets: Tensor) -> Tensor:
    """The mean log-likelihood of a mixture of Gaussians of one noise.

    Args:
        means: The components' means, ``[components, examples, units]``.
        noise: Their standard deviation, ``[units]``.
        targets: ``[examples, units]``.

    Returns:
        The log-likelihood of each unit.
    """
    density = torch.distributions.Normal(means, noise, validate_args=False).log_prob(targets)
    return (density.logsumexp(0) - math.log(len(means))).mean(0)


def moments(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean log-likelihood of the Gaussian with a mixture's mean and variance, of mean-variance outputs."""
    means, spreads = outputs[..., 0], variance(outputs)[..., 0]
    mean = means.mean(0)
    spread = (spreads + (means - mean).square()).mean(0)
    return torch.distributions.Normal(mean, spread.sqrt(), validate_args=False).log_prob(targets).mean(0)


def scores(method: Method, outputs: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihoods of held-out data, ``[noises, units]``: a row for each of ``NOISES``, or one."""
    if method.loss is mean_variance_loss:
        found = moments(outputs, targets).unsqueeze(0)
    else:
        means = outputs[..., 0]
        found = torch.stack([mixture(means, noise.expand(means.shape[-1]), targets) for noise in NOISES])
    return found.nan_to_num(nan=-math.inf)  # where training diverged


# -- one method on one set --------------------------------------------------------------------------------------------


DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
METHODS = {
    "ensemble": Method({"decay": DECAYS}, members=MEMBERS),
    "mean_variance_ensemble": Method({"decay": DECAYS}, mean_variance_loss, members=MEMBERS),
    "ivon": Method(
        {"lr": (0.1,), "hess_init": (1.0, 10.0), "decay": (1e-3, 1e-2)},
        samples=100,
        stacks=False,
        is_length_chosen=False,
        package="ivon-opt",
    ),
    "mc_dropout": Method({"rate": (0.005, 0.01, 0.05, 0.1)}, samples=1000),
}
#: What must be installed for a method.
MODULES = {"ivon": ("ivon",), "gp": ("gpytorch", "botorch")}


def tenths(count: int, split: int, folds: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Rows to learn from and rows held out, for each of several disjoint random tenths of a training part."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + split))
    parts = order.split(count // 10)[:folds]
    return [(order[~torch.isin(order, part)], part) for part in parts]


def work(method: str, data: str, splits: int, folds: int, steps: list[int], seed: int) -> dict[str, Any]:
    """Choose, fit to the whole training part and evaluate; the figures of each split."""
    if method == "gp":
        return peers_gp.work(load_splits(data, splits))
    own, parts = METHODS[method], load_splits(data, splits)
    torch.manual_seed(seed)
    hidden = 100 if data == "protein" else 50
    count, splits = parts.train_x.shape[:2]
    settings = own.settings(steps, 1.0 if data in SMALL else 0.01)
    held = [tenths(count, split, folds, seed) for split in range(splits)]
    pairs = [(fold, split) for fold in range(folds) for split in range(splits)]

    def held_out(chosen: list[list[Setting]], members: int) -> tuple[Tensor, float]:
        """Log-likelihoods of held-out tenths, ``[noises, settings, splits]``, of settings of each split."""
        columns = list(zip(*chosen, strict=True))
        units = [Replica(split, held[split][fold][0], own[split]) for own in columns for fold, split in pairs]
        fitted = fit(own, parts, units, members, hidden)
        rows = [held[split][fold][1] for _ in columns for fold, split in pairs]
        outputs, targets = fitted.rows(parts, rows, min(own.samples, HELD_OUT_SAMPLES))
        return scores(own, outputs, targets).unflatten(1, (len(columns), folds, splits)).mean(2), fitted.seconds

    own_scores, choice_seconds = held_out([settings] * splits, 1)
    best = own_scores.amax(0).argmax(0)
    chosen = [settings[int(index)] for index in best]
    noise_scores = own_scores[:, best, torch.arange(splits)]
    if own.members > 1 and own.loss is squared_error:  # an ensemble's errors are less than a network's: so is its noise
        noise_scores, seconds = held_out([[setting] for setting in chosen], own.members)
        noise_scores, choice_seconds = noise_scores[:, 0], choice_seconds + seconds
    noise = NOISES[noise_scores.argmax(0)] if own.loss is squared_error else None

    units = [Replica(split, torch.arange(count), chosen[split]) for split in range(splits)]
    fitted = fit(own, parts, units, own.members, hidden)
    outputs, targets = fitted.predict(parts.test_x, own.samples), (parts.test_y / parts.scale)[..., 0]
    scale = parts.scale[:, 0]
    noises = {method: noise}
    if method == "ensemble":
        residuals = fitted.predict(parts.train_x, 1)[..., 0].mean(0) - parts.train_y[..., 0]
        noises["ensemble, noise of residuals"] = residuals.square().mean(0).sqrt()
    if method == "ivon":
        noises["ivon, learned noise"] = fitted.noise
    rmse = ((outputs[..., 0].mean(0) - targets).square().mean(0).sqrt() * scale).tolist()
    predictions = {}
    for name, value in noises.items():
        density = moments(outputs, targets) if value is None else mixture(outputs[..., 0], value, targets)
        predictions[name] = {"rmse": rmse, "log_likelihood": (density - scale.log()).tolist()}
        if value is not None:
            predictions[name]["noise"] = value.tolist()
    return {
        "settings": [asdict(setting) for setting in chosen],
        "predictions": predictions,
        "training_seconds": fitted.seconds,
        "choice_seconds": choice_seconds,
        "packages": {own.package: version(own.package)} if own.package else {},
    }


# -- what is kept and shown -------------------------------------------------------------------------------------------

#: Each way to predict: the method whose file it is in.
PREDICTIONS = {
    "ensemble": "ensemble",
    "ensemble, noise of residuals": "ensemble",
    "mean_variance_ensemble": "mean_variance_ensemble",
    "ivon": "ivon",
    "ivon, learned noise": "ivon",
    "mc_dropout": "mc_dropout",
    "gp": "gp",
}


def load(name: str, data: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """``rmse`` and ``log_likelihood`` of each split by one of ``PREDICTIONS``, and seconds; ``None`` if not there."""
    path = results / "uci" / "peers" / PREDICTIONS[name] / f"{data}.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return {**kept["predictions"][name], "seconds": kept["training_seconds"], "choice_seconds": kept["choice_seconds"]}


def table(key: str, results: Path = RESULTS) -> str:
    """A row for each set, a column for each way to predict: mean ± standard error over splits, or seconds a split."""
    lines = ["| data | " + " | ".join(PREDICTIONS) + " |", "|---" * (1 + len(PREDICTIONS)) + "|"]
    for data in DATA_SETS:
        found = [load(name, data, results) for name in PREDICTIONS]
        cells = ["–" if own is None else cell(own, key) for own in found]
        lines += ["| " + " | ".join([data, *cells]) + " |"] * any(own is not None for own in found)
    return "\n".join(lines) + "\n"


def cell(found: dict[str, Any], key: str) -> str:
    """One entry of a table."""
    if key == "seconds":
        return f"{found['seconds'] / len(found['rmse']):.2f}"
    return summary(found[key])


def section(results: Path = RESULTS) -> str:
    """Tables in Markdown, where there are results."""
    if not any((results / "uci" / "peers").glob("*/*.json")):
        return ""
    titles = {"rmse": "Root mean squared error", "log_likelihood": "Log-likelihood", "seconds": "Seconds of a split"}
    return "\n".join(f"### {title}\n\n{table(key, results)}" for key, title in titles.items())


def all_jobs(methods: list[str], data: list[str], splits: int, seed: int, results: Path, quick: bool) -> list[jobs.Job]:
    """A job for each method and set; small sets first."""
    found = []
    for names, method in product((SMALL, LARGE), methods):
        for name in (own for own in names if own in data and not (method == "gp" and own not in GP_SETS)):
            sizes = {"splits": min(splits, 5) if name == "protein" else splits, "seed": seed}
            plan = {"folds": 3, "steps": [1000, 5000]} if names is SMALL else {"folds": 1, "steps": [10000, 30000]}
            plan = {"folds": 1, "steps": [10, 20]} if quick else plan
            path = results / "uci" / "peers" / method / f"{name}.json"
            found.append(jobs.Job(path, work, {"method": method, "data": name, **sizes, **plan}))
    return found


def main() -> None:
    """Run what is not yet there; print tables."""
    parser = jobs.parser(__doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA_SETS), choices=DATA_SETS, metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "gp"], choices=[*METHODS, "gp"], metavar="NAME")
    parser.add_argument("--splits", type=int, default=20, help="of Gal's; protein has 5")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    methods = []
    for method in arguments.methods:
        if all(find_spec(name) for name in MODULES.get(method, ())):
            methods.append(method)
        else:
            print(f"{method} is left out, as it needs the modules {', '.join(MODULES[method])}.")
    with jobs.results_folder(arguments) as results:
        splits = 2 if arguments.quick else arguments.splits
        todo = all_jobs(methods, arguments.data, splits, arguments.seed, results, arguments.quick)
        try:
            jobs.run(todo, arguments.processes)
        finally:
            print(section(results))


if __name__ == "__main__":
    main()
