"""Class probabilities from Laplace posteriors by every link and by sampled weights: quality, cost and error.

``python benchmarks/links.py`` trains 64-100-10 networks on 400 of scikit-learn's digits for several random splits, fits
Laplace approximations (Kronecker, exact damping), predicts 1297 other images in every way, writes
``benchmarks/results/links.json`` and prints the tables of ``docs/predicting.md``. A result that exists is shown; delete
it to take it anew. There are four posteriors of each network:

- evidence: the precision of each layer's prior where the evidence is greatest.
- last layer: the same with a posterior over the last layer only.
- temperature: that of *evidence* at the temperature with the best log-likelihood of 100 further images.
- validation: one precision for all layers with the best log-likelihood of these.

The error of a link is its total variation distance from ``E[softmax(f)]`` by 20 000 draws of the logits, a mean over
200 test images.
"""

from __future__ import annotations

import argparse
import json
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
from uci import HERE, commit, with_error

import bayes_kfac as bk
from bayes_kfac.prediction import LINKS

RESULTS = HERE / "results" / "links.json"
TRAINING, EPOCHS, DRAWS, REFERENCE_DRAWS, REFERENCE_IMAGES = 400, 60, 64, 20_000, 200
VALIDATION, WEIGHT_DECAY = 100, 1 / 400  # the mode of a prior of precision 1
POSTERIORS = ("evidence", "last layer", "temperature", "validation")
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
    """Figures of every way to predict, from each posterior."""
    training, validation, test = digits(split)
    model, loader = trained(*training, split, epochs)
    found = {}
    for name in POSTERIORS:
        subset = "last_layer" if name == "last layer" else "all"
        laplace = bk.Laplace(model, bk.likelihoods.Categorical(), subset=subset).fit(loader, progress=False)
        if name != "validation":
            laplace.optimize_prior_precision()
        options = {"generator": torch.Generator().manual_seed(split), "progress": False}
        if name == "validation":
            laplace.optimize_prior_precision("validation", loader=[validation], **options)
        if name == "temperature":
            laplace.optimize_temperature([validation], **options)
        found[name] = of_posterior(laplace.posterior(), *test, split, reference_draws)
        found[name]["MAP"]["precision"] = [float(value) for value in laplace.prior_precision.values()]
        found[name]["MAP"]["temperature"] = laplace.temperature
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
        output = posterior.output(x[:REFERENCE_IMAGES])
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


def cell(result: dict[str, Any], posterior: str, way: str, figure: str) -> str:
    """Mean ± standard error over splits; of milliseconds the median."""
    values = np.asarray([own[posterior][way][figure] for own in result["splits"]])
    if figure == "milliseconds":
        return f"{np.median(values):.0f}"
    return with_error(values, 3)


def show(result: dict[str, Any]) -> None:
    """Print the first posterior's figures, and the others' beside it."""
    columns = ("NLL", "accuracy", "ECE", "error", "milliseconds")
    print("| evidence | " + " | ".join(columns) + " |\n" + "|---" * 6 + "|")
    for way in WAYS:
        print(f"| {way} | " + " | ".join(cell(result, "evidence", way, figure) for figure in columns) + " |")
    for figure in ("NLL", "error"):
        print(f"\n| {figure} | " + " | ".join(POSTERIORS) + " |\n" + "|---" * (1 + len(POSTERIORS)) + "|")
        for way in WAYS:
            print(f"| {way} | " + " | ".join(cell(result, name, way, figure) for name in POSTERIORS) + " |")
    print("\nMedians: the logits' standard deviation; the precisions; the temperature")
    for name in POSTERIORS:
        rows = [own[name]["MAP"] for own in result["splits"]]
        deviation = np.median([row["logit standard deviation"] for row in rows])
        precision = " ".join(f"{value:.3g}" for value in np.median([row["precision"] for row in rows], axis=0))
        print(f"{name}: {deviation:.2f}; {precision}; {np.median([row['temperature'] for row in rows]):.2g}")


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
