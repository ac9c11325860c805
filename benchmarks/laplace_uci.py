"""Laplace on the UCI splits, beside laplace-torch 0.3: the same trained networks, the same splits.

``python benchmarks/laplace_uci.py`` trains one network of 50 ReLU units for each split, fits Laplace approximations
around its weights by both libraries, tunes prior and noise by the evidence, and writes
``benchmarks/results/uci/laplace/<data>.json`` with the figures of each split, versions, machine and seed. A run that
was stopped goes on where it was; a result that exists is shown, not computed again. ``report.py`` writes the page.

The networks' recipe (``Recipe``) is one for all sets. Its epochs and weight decay were chosen on a tenth of the
training parts, never on test data. laplace-torch is tuned as its documentation's regression example does: a thousand
steps of Adam on the logarithms of prior precision and noise; with one precision for all weights, and with one for each
parameter, which it calls layerwise. Its Kronecker evidence takes the noise through ``math.pow``, so that the gradient
in the noise lacks the determinant; *repaired* is the same with that gradient in place. Without laplace-torch its
columns are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import laplace_uci_methods as methods
import torch
from laplace_uci_report import DATA_SETS, RESULTS, tables
from tqdm import tqdm
from uci import HERE, commit, load_splits

import bayes_kfac as bk


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
    recipe: methods.Recipe
    cache: Path

    def path(self, part: str) -> Path:
        """The file of a part of the work."""
        return self.cache / f"{self.name}-{self.seed}-{self.splits}-{part}"


_IS_WARM: list[bool] = []


def work(job: Job, split: int | None) -> None:
    """Train the networks of a data set, or evaluate one of its splits, as far as that was not done."""
    torch.set_num_threads(1)  # the matrices are small: a second thread only waits
    path = job.path("weights.pt" if split is None else f"{split}.json")
    known = {} if split is None or not path.exists() else json.loads(path.read_text())
    if path.exists() and (split is None or methods.names() <= set(known)):
        return
    job.cache.mkdir(parents=True, exist_ok=True)
    splits = load_splits(job.name, job.splits)
    part = path.with_suffix(".part")
    if split is None:
        start = time.perf_counter()
        trained = methods.train(splits, job.recipe, job.seed)
        torch.save({"weights": trained, "seconds": time.perf_counter() - start}, part)
    else:
        trained = torch.load(job.path("weights.pt"), weights_only=True)["weights"]
        if not _IS_WARM:  # the first call of everything is slower
            methods.evaluate_split(splits, trained, split, job.seed, known)
            _IS_WARM.append(True)
        found = methods.evaluate_split(splits, trained, split, job.seed, known)
        for name in found.keys() - known.keys():  # what is kept says what made it, not what put it together
            found[name]["commit"] = commit()
        part.write_text(json.dumps(found))
    part.rename(path)


def result(job: Job) -> dict[str, Any]:
    """What is kept of a data set."""
    parts = [json.loads(job.path(f"{split}.json").read_text()) for split in range(job.splits)]
    names = ["MAP", *(name for fit in methods.FITS for name, _, _ in fit.predictions), methods.FULL, *methods.PEERS]
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
        "samples": methods.SAMPLES,
        "peer_steps": methods.PEER_STEPS,
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


def main() -> None:
    """Run what is asked for and not yet there; print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA_SETS), metavar="NAME", help=f"default: {DATA_SETS}")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2)
    parser.add_argument("--epochs", type=int, help="fewer epochs, for a quick look; the result is not kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if methods.laplace_torch() is None:
        print("laplace-torch is not installed, so its columns are left out: pip install laplace-torch==0.3 brings it.")
    recipe = methods.Recipe(epochs=arguments.epochs or methods.Recipe.epochs)
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
