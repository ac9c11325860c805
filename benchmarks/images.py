"""Image classifiers by every method: accuracy, calibration, what was never seen, corrupted images, cost.

``python benchmarks/images.py`` trains an MLP and a CNN on MNIST and Fashion-MNIST with SGD, AdamW, IVON, noisy K-FAC
and noisy EK-FAC, makes an ensemble and Laplace fits of the networks of AdamW, trains AdamW once more for the seconds of
noisy K-FAC, and writes ``benchmarks/results/images/<problem>/<method>-<seed>.json`` with figures, versions, machine and
seed. Problems ``cifar10-vgg16-narrow…`` are CIFAR-10 in the size of a CPU; the others of CIFAR-10 are for a GPU. A
result that exists is read; a training run that was stopped goes on from its last epoch, whose checkpoint is in
``.cache/images`` or in the folder that the environment variable ``BAYES_KFAC_CACHE`` names. IVON is left out where its
package is missing.

Nothing here looks at test images to choose anything: where settings come from is said in
``images_methods.py``.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import images_methods as methods
import images_report
import torch
from images_data import CORRUPTIONS, SEVERITIES, STRANGE, Images, as_format, corrupted, read
from images_methods import Predictor
from images_training import PROBLEMS, Batches, Parts, Problem, Trained, clock, parts, probabilities, train
from jobs import Job, parser, results_folder, run
from jobs import cache as jobs_cache
from torch import Tensor

import bayes_kfac as bk

CPU_PROBLEMS = ("mnist-mlp", "fashion-mlp", "mnist-cnn", "fashion-cnn")
LAPLACE = {"laplace_last_layer": "last_layer", "laplace": "all"}
LONG = "adamw_long"
TRAINER = {LONG: "adamw"}
METHODS = (*methods.TRAINERS, LONG, "ensemble", *LAPLACE)
MEMBERS = 5
STRANGE_IMAGES, CORRUPTED_IMAGES = 2000, 400
QUICK = 20  # images of each part, and one epoch


# -- figures ----------------------------------------------------------------------------------------------------------


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """The figures of predictions of one set of images."""
    return {
        "accuracy": float(bk.metrics.accuracy(probs, labels)),
        "nll": float(bk.metrics.categorical_nll(probs, labels)),
        "ece": float(bk.metrics.expected_calibration_error(probs, labels)),
        "brier": float(bk.metrics.brier_score(probs, labels)),
    }


def entropy(probs: Tensor) -> Tensor:
    """The entropy of each prediction: the score of strangeness."""
    return torch.special.entr(probs).sum(-1)


def figures(predict: Predictor, problem: Problem, test: Images, device: str) -> dict[str, Any]:
    """Scores on the test images, and how well the entropy tells strange images from them."""
    labels = test.labels.cpu()
    probs = probabilities(predict, test.pixels, problem.data)
    curve = bk.metrics.reliability_curve(probs, labels)
    found: dict[str, Any] = {**scores(probs, labels), "auroc": {}}
    found["reliability"] = {name: getattr(curve, name).tolist() for name in ("confidence", "accuracy", "count")}
    for name in STRANGE[problem.data]:
        strange = as_format(read(name, "test").pixels[: min(STRANGE_IMAGES, len(test))], test.pixels).to(device)
        found["auroc"][name] = float(
            bk.metrics.auroc(entropy(probabilities(predict, strange, problem.data)), entropy(probs))
        )
    return found


def under_corruption(predict: Predictor, problem: Problem, test: Images, device: str) -> dict[str, list[Any]]:
    """Scores of corrupted images, by kind of corruption and severity."""
    some = test[:CORRUPTED_IMAGES].to("cpu")
    return {
        kind: [
            scores(probabilities(predict, corrupted(some.pixels, kind, severity).to(device), problem.data), some.labels)
            for severity in SEVERITIES
        ]
        for kind in CORRUPTIONS
    }


def cache() -> Path:
    """The folder of checkpoints."""
    return jobs_cache() / "images"


# -- one job ----------------------------------------------------------------------------------------------------------


def work(problem: str, method: str, seed: int, epochs: int, device: str, limit: int | None = None) -> dict[str, Any]:
    """Train, or take what is trained, and evaluate.

    Args:
        problem: One of ``PROBLEMS``.
        method: One of :data:`METHODS`.
        seed: The seed; an ensemble's is that of its first member.
        epochs: Passes over the training part.
        device: Where.
        limit: Images of each part; all by default.

    Returns:
        The figures.
    """
    if device != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32; the library's own algebra is in full precision
        torch.backends.cudnn.allow_tf32 = True
    own = PROBLEMS[problem]
    data = parts(own, limit=limit)
    data = Parts(data.train.to(device), data.held_out.to(device))

    def trained(name: str, number: int) -> Trained:
        checkpoint = cache() / problem / f"{name}-{number}-{epochs}-{len(data.train)}.pt"
        return train(own, TRAINER.get(name, name), number, data, epochs=epochs, device=device, checkpoint=checkpoint)

    if method == "ensemble":
        found = ensemble([trained("adamw", seed + member) for member in range(MEMBERS)])
    elif method in LAPLACE:
        found = laplace(trained("adamw", seed), LAPLACE[method], Batches(data.train, own.data), device)
    else:
        found = alone(
            trained(method, seed), methods.settings(own.network, TRAINER.get(method, method), augment=own.augment)
        )
    predict, further, record = found
    torch.manual_seed(seed)
    start = clock(device)
    result = {"problem": asdict(own), **record, "test": figures(predict, own, data.held_out, device)}
    result["further"] = {name: figures(other, own, data.held_out, device) for name, other in further.items()}
    result["corrupted"] = under_corruption(predict, own, data.held_out[: limit and limit // 10], device)
    result["seconds_of_evaluation"] = clock(device) - start
    return result


Found = tuple[Predictor, dict[str, Predictor], dict[str, Any]]


def alone(run: Trained, settings: dict[str, Any]) -> Found:
    """The predictions of one training run."""
    record = {"settings": settings, "seconds": run.seconds, "curve": run.curve}
    own = methods.own_prediction(run.model, run.optimizer, methods.DRAWS)
    return own, methods.further_predictions(run.model, run.optimizer), record


def ensemble(runs: list[Trained]) -> Found:
    """The predictions of several runs together."""
    record = {"members": len(runs), "seconds": sum(run.seconds for run in runs)}
    return methods.of_members([run.model for run in runs]), {}, record


def laplace(run: Trained, subset: str, loader: Batches, device: str) -> Found:
    """The linearised predictions of a Laplace fit around one run."""
    start = clock(device)
    posterior, precision = methods.laplace(run.model, loader, subset)
    seconds = clock(device) - start
    record = {"prior_precision": precision, "seconds": run.seconds + seconds, "seconds_of_fit": seconds}
    return methods.linearized(posterior), {"probit": methods.linearized(posterior, "probit")}, record


# -- all jobs ---------------------------------------------------------------------------------------------------------


def jobs(options: argparse.Namespace, names: list[str]) -> list[Job]:
    """Jobs of some of the methods."""
    found = []
    for problem in options.problems:
        for name in names:
            for seed in seeds_of(name, options):
                epochs = 1 if options.quick else options.epochs or PROBLEMS[problem].epochs
                if name == LONG:
                    epochs = affordable(options, problem, seed, epochs)
                arguments = {"problem": problem, "method": name, "seed": seed, "epochs": epochs}
                arguments |= {"device": options.device, **({"limit": QUICK} if options.quick else {})}
                found.append(Job(path(options, problem, name, seed), work, arguments))
    return found


def seeds_of(name: str, options: argparse.Namespace) -> range:
    """The seeds of a method: one ensemble is made of the first members, which must all be there."""
    if name == "ensemble":
        return range(1)
    return range(max(MEMBERS, options.seeds) if name == "adamw" and "ensemble" in options.methods else options.seeds)


def path(options: argparse.Namespace, problem: str, name: str, seed: int) -> Path:
    """The file of a job's figures."""
    return options.results / "images" / problem / f"{name}-{seed}.json"


def affordable(options: argparse.Namespace, problem: str, seed: int, epochs: int) -> int:
    """How many epochs of AdamW cost what noisy K-FAC has cost."""
    files = [path(options, problem, name, seed) for name in ("noisy_kfac", "adamw")]
    if not all(file.exists() for file in files):
        raise SystemExit(f"{LONG} takes the seconds of noisy_kfac and adamw: run these methods first, or with it.")
    noisy, plain = (json.loads(file.read_text())["seconds"] for file in files)
    return max(epochs, math.floor(epochs * noisy / plain))


def main() -> None:
    """Run what is asked for and not yet there."""
    own = parser(__doc__)
    own.add_argument("--problems", nargs="+", choices=tuple(PROBLEMS), default=list(CPU_PROBLEMS))
    own.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    own.add_argument("--seeds", type=int, default=3)
    own.add_argument("--epochs", type=int, default=None, help="by default each problem's own")
    own.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = own.parse_args()
    if "ivon" in options.methods and find_spec("ivon") is None:
        print("IVON is left out: its package, ivon-opt, is not installed.")
        options.methods.remove("ivon")
    with results_folder(options) as options.results:
        run_all(options)
        if options.results.resolve() / "images" == images_report.RESULTS:
            images_report.draw()


def run_all(options: argparse.Namespace) -> None:
    """Run the jobs and print a line of each."""
    # what is made of other methods' networks and seconds comes after them
    for chosen in (methods.TRAINERS, (LONG,), ("ensemble", *LAPLACE)):
        for result in run(jobs(options, [name for name in chosen if name in options.methods]), options.processes):
            show(result)


def show(result: dict[str, Any]) -> None:
    """One line of a result."""
    arguments, test = result["arguments"], result["test"]
    label = f"{arguments['problem']:16s} {arguments['method']:20s} seed {arguments['seed']}"
    words = "  ".join(f"{name} {test[name]:.4f}" for name in ("accuracy", "nll", "ece", "brier"))
    print(f"{label}  {words}  {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
