"""What the labels of ``active_protocol.py`` are worth to other learners: are picked points bad, or bad for the network?

``python benchmarks/active_protocol_labels.py`` takes the rows that each method labelled with each acquisition, from its
results, and trains scikit-learn's Gaussian process (one length scale for each input, tuned by its evidence) and random
forest on them. It writes ``benchmarks/results/active_protocol/labels/<data>-<method>.json`` and prints the table.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from active_protocol import DATA_SETS, load
from active_protocol_report import FOLDER, METHODS, cell, read, stem
from jobs import Job, parser, run
from sklearn.base import RegressorMixin
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

LEARNERS = ("Gaussian process", "forest")


def learner(name: str, features: int) -> RegressorMixin:
    """A learner by its name."""
    if name == "forest":
        return RandomForestRegressor(50, random_state=0)
    scales = RBF(np.full(features, 2.0), (0.3, 30))
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * scales + WhiteKernel(0.1, (1e-4, 1))
    return GaussianProcessRegressor(kernel, normalize_y=True)


def work(data: str, method: str, first: int, picked: dict[str, list[list[int]]]) -> dict[str, Any]:
    """Test errors of both learners by acquisition: of each seed, with all labels."""
    began = time.process_time()
    seeds = len(picked["random"][0])
    problem = load(data, first, seeds)
    errors: dict[str, dict[str, list[float]]] = {}
    for name, rows in picked.items():
        labelled = torch.cat([problem.start, torch.tensor(rows).T], dim=1)
        every = torch.arange(seeds)
        x, test = (problem.inputs(rows, every).transpose(0, 1).numpy() for rows in (labelled, problem.test))
        y, target = problem.y[labelled].numpy(), problem.y[problem.test].numpy()
        errors[name] = {kind: [] for kind in LEARNERS}
        for seed in range(seeds):
            for kind in LEARNERS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is as good
                    predicted = learner(kind, x.shape[-1]).fit(x[seed], y[seed]).predict(test[seed])
                errors[name][kind].append(float(np.sqrt(np.square(predicted - target[seed]).mean())))
    return {"rmse": errors, "processor_seconds": time.process_time() - began}


def jobs(folder: Path) -> list[Job]:
    """A job for each result that is there."""
    found = []
    for data in DATA_SETS:
        for method in METHODS:
            if (result := read(data, method, folder)) is not None:
                picked = {name: own["picked"] for name, own in result["acquisitions"].items()}
                arguments = {"data": data, "method": method, "first": result["arguments"]["first"], "picked": picked}
                found.append(Job(folder / "labels" / f"{data}-{stem(method)}.json", work, arguments))
    return found


def table(folder: Path = FOLDER) -> str:
    """Differences from random labels, paired by seed."""
    names = ("random", *(f"{name} − random" for name in ("variance", "BALD", "EPIG")))
    head = ["data", "labels by", *(f"{kind}, {name}" for kind in LEARNERS for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for job in jobs(folder):
        if not job.path.exists():
            continue
        errors = json.loads(job.path.read_text())["rmse"]
        cells = []
        for kind in LEARNERS:
            base = np.asarray(errors["random"][kind])
            cells.append(cell(base, base.mean()))
            for name in ("variance", "BALD", "EPIG"):
                own = errors.get(name)
                cells.append(cell(np.asarray(own[kind]) - base, base.mean(), "+") if own else "")
        lines.append(f"| {job.arguments['data']} | {job.arguments['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


HEAD = """### What the labels are worth to other learners

The rows that each method labelled, and scikit-learn's Gaussian process and random forest trained on them: differences
from random labels in test error, paired by split, below zero where the picked labels are better.
`python benchmarks/active_protocol_labels.py`.

"""

NOTES = """
Labels that noisy K-FAC picked are worth more than random ones to other learners too, by more than two standard errors,
on yacht (by EPIG to the Gaussian process, by variance and EPIG to the forest), boston (by variance to the forest) and
power (by BALD to the process, by EPIG to the forest). On concrete they are worth no more to either, whoever picked them
and however: what noisy K-FAC gains there by its own labels is within the error as well. On energy and wine_red, where
its gain is clear, others gain nothing that can be told from none: probably these labels keep the network from going far
astray where it has none, which the table above says of the outer half, and learners that do not extrapolate so have no
need of them. On kin8nm a Gaussian process does better with random labels.
"""


def section(folder: Path = FOLDER) -> str:
    """The page's part on labels, in Markdown."""
    return HEAD + table(folder) + NOTES


def main() -> None:
    """Train where that was not done, and print."""
    arguments = parser(__doc__).parse_args()
    folder = arguments.results / "active_protocol"
    every = jobs(folder)
    if arguments.quick:
        print(every[0].work(**every[0].arguments))
        return
    run(every, arguments.processes)
    print(table(folder))


if __name__ == "__main__":
    main()
