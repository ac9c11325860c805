"""Class probabilities from Laplace posteriors by every link and by sampled weights: quality, cost and error.

``python benchmarks/links.py`` trains 64-100-10 networks on 400 of scikit-learn's digits for several random splits, fits
Laplace approximations (Kronecker, exact damping), chooses the prior's precision by the evidence, and once more by the
log-likelihood of 100 other images, predicts the remaining 1297 in every way, writes ``benchmarks/results/links.json``
and prints the tables of ``docs/predicting.md``. A result that exists is shown; delete it to take it anew.

The error of a link is its total variation distance from ``E[softmax(f)]`` by 20 000 draws of the logits, a mean over
200 test images.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from uci import HERE, commit

import bayes_kfac as bk
from bayes_kfac.prediction import LINKS

RESULTS = HERE / "results" / "links.json"
TRAINING, EPOCHS, DRAWS, REFERENCE_DRAWS, REFERENCE_IMAGES = 400, 60, 64, 20_000, 200
VALIDATION, WEIGHT_DECAY = 100, 1 / 400  # the mode of a prior of precision 1
PRIORS = ("evidence", "validation")
WAYS = ("MAP", *(f"linearised, {link}" for link in LINKS), "linearised, mc, variances only", "sampled weights")


Part = tuple[Tensor, Tensor]


def digits(split: int) -> tuple[Part, Part, Part]:
    """Images in [0, 1] and labels: training, validation, test."""
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    parts = order.split([TRAINING, VALIDATION, len(x) - TRAINING - VALIDATION])
    training, validation, test = ((x[rows].float() / 16, y[rows]) for rows in parts)
    return training, validation, test


def trained(x: Tensor, y: Tensor, split: int, epochs: int) -> tuple[nn.Module, DataLoader]:
    """The network, trained by Adam, and the loader of its data."""
    torch.manual_seed(split)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    loader = DataLoader(TensorDataset(x, y), 32, shuffle=True, generator=torch.Generator().manual_seed(split))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        schedule.step()
    return model, loader


def one_split(split: int, epochs: int, reference_draws: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures of every way to predict, for each way to choose the prior."""
    training, validation, test = digits(split)
    model, loader = trained(*training, split, epochs)
    laplace = bk.Laplace(model, bk.likelihoods.Categorical()).fit(loader, progress=False)
    found = {}
    for prior in PRIORS:
        if prior == "evidence":
            laplace.optimize_prior_precision()
        else:
            options = {"link": "probit", "progress": False}
            laplace.optimize_prior_precision("validation", loader=[validation], **options)
        found[prior] = of_posterior(laplace.posterior(), *test, split, reference_draws)
        found[prior]["MAP"]["precision"] = [float(value) for value in laplace.prior_precision.values()]
    return found


def of_posterior(posterior: bk.Posterior, x: Tensor, y: Tensor, seed: int, draws: int) -> dict[str, dict[str, Any]]:
    """Figures of every way to predict from one posterior."""
    generator = torch.Generator().manual_seed(seed)

    def call(way: str) -> Callable[[], Tensor]:
        options: dict[str, Any] = {"num_samples": DRAWS, "generator": generator}
        if way == "MAP":
            return lambda: posterior.model(x).softmax(-1)
        if way == "sampled weights":
            return lambda: posterior.predict(x, "sampling", **options).probs
        if way.endswith("variances only"):
            return lambda: posterior.predict(x, output_covariance="diagonal", **options).probs
        return lambda: posterior.predict(x, link=way.removeprefix("linearised, "), **options).probs

    with torch.no_grad():
        output = posterior._linearized.output(x[:REFERENCE_IMAGES])
        exact = torch.zeros_like(output.mean)
        for _ in range(draws // 500):
            exact += output.sample(500, generator).softmax(-1).mean(0) / (draws // 500)
    found: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        with torch.no_grad():
            probs, seconds = call(way)(), []
            for _ in range(3):
                start = time.perf_counter()
                call(way)()
                seconds.append(time.perf_counter() - start)
        found[way] = {
            "NLL": float(bk.metrics.categorical_nll(probs, y)),
            "accuracy": float(bk.metrics.accuracy(probs, y)),
            "ECE": float(bk.metrics.expected_calibration_error(probs, y)),
            "error": float((probs[:REFERENCE_IMAGES] - exact).abs().sum(-1).mean() / 2),
            "milliseconds": 1e3 * min(seconds),
        }
    found["MAP"]["logit standard deviation"] = float(output.variance.sqrt().median())
    return found


def table(result: dict[str, Any], prior: str) -> str:
    """Mean ± standard error over splits, a row for each way."""
    names = ["NLL", "accuracy", "ECE", "error", "milliseconds"]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    rows = [own[prior] for own in result["splits"]]
    for way in WAYS:
        cells = []
        for name in names:
            values = np.asarray([own[way][name] for own in rows])
            error = f"±{values.std() / math.sqrt(len(values)):.3f}"
            cells.append(f"{np.median(values):.0f}" if name == "milliseconds" else f"{values.mean():.3f}{error}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    deviation = np.mean([own["MAP"]["logit standard deviation"] for own in rows])
    precision = " ".join(f"{value:.3g}" for value in np.median([own["MAP"]["precision"] for own in rows], axis=0))
    tail = f"Median standard deviation of a logit: {deviation:.2f}; median precisions of the layers: {precision}"
    return "\n".join([f"Prior by {prior}\n", *lines, "", tail, ""])


def show(result: dict[str, Any]) -> None:
    """Print a table for each prior."""
    for prior in PRIORS:
        print(table(result, prior))


def main() -> None:
    """Measure, where that was not done, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="little of everything; the result is not kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.results.exists() and not arguments.smoke:
        show(json.loads(arguments.results.read_text()))
        return
    sizes = (2, 500) if arguments.smoke else (EPOCHS, REFERENCE_DRAWS)
    rows = [one_split(split, *sizes) for split in tqdm(range(arguments.splits), unit="split")]
    result = {
        "splits": rows,
        "draws": DRAWS,
        "commit": commit(),
        "versions": {"bayes_kfac": bk.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
    }
    if not arguments.smoke:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
