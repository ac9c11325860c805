"""How many hidden units a posterior uses: what temperature 1 switches off, and whether a lower one brings it back.

``python benchmarks/units.py --processes 2`` trains the networks of ``regression.py`` on five splits, at temperature 1
and at 0.1, and goes on at 0.1 from the weights of temperature 1; it keeps one file for each data set in
``benchmarks/results/uci/units``.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import regression
import torch
from jobs import Job, cache, parser, results_folder, run
from replicas import ReplicatedMLP
from torch import Tensor
from uci import HERE, Recipe, load_splits, summary, train

import bayes_kfac as bk

DATA_SETS = ("boston", "concrete")
ROWS = ("τ = 1", "τ = 0.1, from a fresh start", "τ = 0.1, going on from τ = 1")
#: A unit is used if it moves the output by more, a standard deviation over the data, of targets of variance 1.
LEAST = 0.02


def used(model: ReplicatedMLP, inputs: Tensor) -> list[int]:
    """How many hidden units move the output of each network, for inputs ``[examples, replicas, features]``."""
    with torch.no_grad():
        hidden = model.hidden(inputs.transpose(0, 1)).relu()  # [replicas, examples, units]
        moved = hidden.std(1) * model.output.weight[:, 0].abs()
    found: list[int] = (moved > LEAST).sum(1).tolist()
    return found


def measure(data: str, splits: int, steps: int, seed: int) -> dict[str, Any]:
    """Units in use in each row of the table."""
    parts = load_splits(data, splits)
    warm = regression.recipe("kron", 1.0, regression.num_epochs(len(parts.train_x), steps))
    cold = replace(warm, temperature=0.1)

    def trained(row: str, recipe: Recipe, **options: Any) -> bk.Posterior:
        checkpoint = cache() / "units" / f"{data}-{ROWS.index(row)}-{steps}-{seed}.pt"
        posterior, _ = train(data, recipe, parts, seed, checkpoint, shown=False, **options)
        checkpoint.unlink(missing_ok=True)
        return posterior

    first = trained(ROWS[0], warm)
    noise = first.likelihood.noise_scale
    bounded = bk.likelihoods.Gaussian(bk.likelihoods.BoundedNoise(noise))
    going_on = {"likelihood": bk.likelihoods.Gaussian(noise), "model": copy.deepcopy(first.model)}
    found = [first, trained(ROWS[1], cold, likelihood=bounded), trained(ROWS[2], cold, **going_on)]
    return {"used": {row: used(own.model, parts.train_x) for row, own in zip(ROWS, found, strict=True)}}


def path(folder: Path, data: str) -> Path:
    """The file of a data set."""
    return folder / "uci" / "units" / f"{data}.json"


def table(folder: Path = HERE / "results") -> str:
    """Units in use, mean ± standard error over splits; empty where nothing was measured."""
    found = {data: json.loads(path(folder, data).read_text()) for data in DATA_SETS if path(folder, data).exists()}
    lines = ["| units in use, of 50 | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    lines += [f"| {row} | " + " | ".join(summary(own["used"][row]) for own in found.values()) + " |" for row in ROWS]
    return "\n".join(lines) + "\n" if found else ""


def main() -> None:
    """Run what is not yet there; print the table."""
    arguments = parser(__doc__).parse_args()
    size = {"splits": 2, "steps": 30} if arguments.quick else {"splits": 5, "steps": regression.STEPS}
    with results_folder(arguments) as folder:
        jobs = [Job(path(folder, data), measure, {"data": data, **size, "seed": regression.SEED}) for data in DATA_SETS]
        run(jobs, arguments.processes)
        print(table(folder))


if __name__ == "__main__":
    main()
