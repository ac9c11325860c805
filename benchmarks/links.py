"""Class probabilities from one Laplace posterior by every link and by sampled weights: quality, cost and error.

``python benchmarks/links.py`` trains 64-100-10 networks on 400 of scikit-learn's digits for several random splits, fits
Laplace approximations (Kronecker, exact damping, prior by the evidence), predicts the other 1397 images in every way,
writes ``benchmarks/results/links.json`` and prints the tables of ``docs/predicting.md``. A result that exists is shown;
delete it to take it anew.

The error of a link is its total variation distance from ``E[softmax(f)]`` by 20 000 draws of the logits, a mean over
200 test images; also with all covariances of the logits divided and multiplied by 100.
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
from bayes_kfac.prediction import LINKS, GaussianOutput, Source, from_gaussian

RESULTS = HERE / "results" / "links.json"
TRAINING, EPOCHS, DRAWS, REFERENCE_DRAWS, REFERENCE_IMAGES = 400, 60, 64, 20_000, 200
SCALES = (0.01, 1.0, 100.0)
WAYS = ("MAP", *(f"linearised, {link}" for link in LINKS), "linearised, mc, variances only", "sampled weights")


def digits(split: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [0, 1] and labels: training, then test."""
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    x, y = x[order].float() / 16, y[order]
    return x[:TRAINING], y[:TRAINING], x[TRAINING:], y[TRAINING:]


def trained(x: Tensor, y: Tensor, split: int, epochs: int) -> tuple[nn.Module, DataLoader]:
    """The network, trained by Adam, and the loader of its data."""
    torch.manual_seed(split)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    loader = DataLoader(TensorDataset(x, y), 32, shuffle=True, generator=torch.Generator().manual_seed(split))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        schedule.step()
    return model, loader


def one_split(split: int, epochs: int, reference_draws: int) -> dict[str, dict[str, Any]]:
    """Figures of every way to predict, and the errors of the links."""
    train_x, train_y, x, y = digits(split)
    model, loader = trained(train_x, train_y, split, epochs)
    laplace = bk.Laplace(model, bk.likelihoods.Categorical()).fit(loader, progress=False)
    posterior = laplace.optimize_prior_precision().posterior()
    generator = torch.Generator().manual_seed(split)

    def call(way: str) -> Callable[[], Tensor]:
        options: dict[str, Any] = {"num_samples": DRAWS, "generator": generator}
        if way == "MAP":
            return lambda: model(x).softmax(-1)
        if way == "sampled weights":
            return lambda: posterior.predict(x, "sampling", **options).probs
        if way.endswith("variances only"):
            return lambda: posterior.predict(x, output_covariance="diagonal", **options).probs
        return lambda: posterior.predict(x, link=way.removeprefix("linearised, "), **options).probs

    found: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        with torch.no_grad():
            probs = call(way)()
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                call(way)()
                seconds.append(time.perf_counter() - start)
        found[way] = {
            "NLL": float(bk.metrics.categorical_nll(probs, y)),
            "accuracy": float(bk.metrics.accuracy(probs, y)),
            "ECE": float(bk.metrics.expected_calibration_error(probs, y)),
            "milliseconds": 1e3 * min(seconds),
        }
    with torch.no_grad():
        output = posterior._linearized.output(x[:REFERENCE_IMAGES])
        for scale in SCALES:
            errors(found, GaussianOutput(output.mean, scale * output.spread), scale, reference_draws, generator)
    found["MAP"]["logit standard deviation"] = float(output.variance.sqrt().median())
    return found


def errors(
    found: dict[str, dict[str, Any]], output: GaussianOutput, scale: float, draws: int, generator: torch.Generator
) -> None:
    """Add the links' total variation distance from many draws."""
    exact = torch.zeros_like(output.mean)
    for _ in range(draws // 500):
        exact += output.sample(500, generator).softmax(-1).mean(0) / (draws // 500)

    def add(way: str, probs: Tensor) -> None:
        found[way][f"error x{scale:g}"] = float((probs - exact).abs().sum(-1).mean() / 2)

    add("MAP", output.mean.softmax(-1))
    source = Source("linearized", None, None)  # type: ignore[arg-type]
    for link in LINKS:
        options = {"link": link, "num_samples": DRAWS, "generator": generator}
        prediction = from_gaussian(bk.likelihoods.Categorical(), output, source, **options)
        add(f"linearised, {link}", prediction.probs)


def table(result: dict[str, Any]) -> str:
    """Mean ± standard error over splits, a row for each way."""
    names = ["NLL", "accuracy", "ECE", "milliseconds", *(f"error x{scale:g}" for scale in SCALES)]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for way in WAYS:
        cells = []
        for name in names:
            values = np.asarray([own[way][name] for own in result["splits"] if name in own[way]])
            if not len(values):
                cells.append("–")
            elif name == "milliseconds":
                cells.append(f"{np.median(values):.0f}")
            else:
                error = "" if name.startswith("error") else f"±{values.std() / math.sqrt(len(values)):.3f}"
                cells.append(f"{values.mean():.3f}{error}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    deviation = np.mean([own["MAP"]["logit standard deviation"] for own in result["splits"]])
    return "\n".join([*lines, "", f"Median standard deviation of a logit: {deviation:.2f}"])


def main() -> None:
    """Measure, where that was not done, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="little of everything; the result is not kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.results.exists() and not arguments.smoke:
        print(table(json.loads(arguments.results.read_text())))
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
    print(table(result))


if __name__ == "__main__":
    main()
