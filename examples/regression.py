"""The recipe that this library recommends for regression, on a table of your own.

Five posteriors from different initial weights, each trained by noisy natural gradient with a noise that is learned, are
one mixture. Which temperature they are trained at is where a held-out tenth of the training rows is best predicted, by
networks that learn from the other nine. The noise of colder ones is no smaller than what was learned at temperature 1:
free, it would be learned too small. What the recipe is worth on nine published sets is on the page of evidence in the
documentation.

``python examples/regression.py table.csv`` reads numbers with the target in the last column, or takes scikit-learn's
diabetes; sets a tenth aside as the test, and prints what the mixture predicts there with nothing tuned and tuned.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk

torch.set_num_threads(1)  # the networks are small: a second thread only waits
TEMPERATURES = (1.0, 0.3, 0.1)
MEMBERS, EPOCHS, STEPS, BATCH_SIZE = 5, 100, 10_000, 32
#: How steps are taken; the damping is theirs, not the posterior's: without it some networks diverge when it is cold.
OPTIONS = {"lr": 3e-2, "extrinsic_damping": 1e-3, "statistics_every": 5, "inverse_every": 20}


def read(path: Path | None, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Inputs and targets to learn from and to test by, in standard units, and the target's unit."""
    x, y = load_diabetes(return_X_y=True)
    if path is not None:
        if not path.is_file():
            raise SystemExit(f"There is no file {path}.")
        try:
            table = np.genfromtxt(path, delimiter=",", ndmin=2)
        except ValueError as error:
            raise SystemExit(f"{path} is no table: its rows are not of one length.") from error
        table = table[~np.isnan(table).any(1)]  # a head, and rows with gaps
        if len(table) < 20 or table.shape[1] < 2:
            raise SystemExit(f"{path} has no 20 rows of at least two numbers, separated by commas.")
        if np.ptp(table[:, -1]) == 0:
            raise SystemExit(f"The last column of {path}, the target, is constant: there is nothing to learn.")
        x, y = table[:, :-1], table[:, -1]
    order = np.random.default_rng(seed).permutation(len(x))
    test, learned = np.split(order, [len(x) // 10])
    scale = x[learned].std(0)
    x = (x - x[learned].mean(0)) / np.where(scale > 0, scale, 1)
    unit = y[learned].std()
    y = (y - y[learned].mean())[:, None] / unit
    parts = (torch.as_tensor(values[rows], dtype=torch.float32) for rows in (learned, test) for values in (x, y))
    return *parts, float(unit)


def train(
    x: Tensor, y: Tensor, *, temperature: float, members: int, steps: int | None, seed: int, bound: float | None = None
) -> bk.Mixture:
    """Posteriors from different initial weights; the noise is learned, and no smaller than the bound."""
    loader = DataLoader(TensorDataset(x, y), BATCH_SIZE, shuffle=True)
    epochs = max(EPOCHS, math.ceil(STEPS / len(loader))) if steps is None else math.ceil(steps / len(loader))
    noise = "learned" if bound is None else bk.likelihoods.BoundedNoise(bound)
    found = []
    for member in range(members):
        torch.manual_seed(seed + member)
        model = nn.Sequential(nn.Linear(x.shape[1], 50), nn.ReLU(), nn.Linear(50, 1))
        likelihood = bk.likelihoods.Gaussian(copy.deepcopy(noise))
        found.append(bk.fit(model, likelihood, loader, epochs=epochs, temperature=temperature, **OPTIONS))
    return bk.Mixture(found)


def learned_noise(mixture: bk.Mixture) -> float:
    """The mean of the members' noise, a standard deviation."""
    return float(torch.stack([member.likelihood.noise_scale for member in mixture.members]).mean())


def log_likelihood(mixture: bk.Mixture, x: Tensor, y: Tensor) -> float:
    """The mean log-density of targets, in standard units."""
    generator = torch.Generator().manual_seed(0)
    return float(mixture.predict(x, "sampling", num_samples=100, generator=generator).log_prob(y).mean())


def choose(x: Tensor, y: Tensor, **size: int | None) -> float:
    """The temperature whose mixture predicts a held-out tenth best."""
    tenth = len(x) // 10  # the rows are in random order
    rows = x[tenth:], y[tenth:]
    warm = train(*rows, temperature=1.0, members=2, **size)
    colder = {
        temperature: train(*rows, temperature=temperature, members=2, bound=learned_noise(warm), **size)
        for temperature in TEMPERATURES[1:]
    }
    scores = {tau: log_likelihood(own, x[:tenth], y[:tenth]) for tau, own in {1.0: warm, **colder}.items()}
    return max(scores, key=lambda tau: scores[tau])


def main() -> None:
    """Choose, train, and print figures of the test part in the target's units."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, nargs="?", help="numbers separated by commas, the target last")
    parser.add_argument("--steps", type=int, help="of each training; by default 10 000 or 100 epochs, if that is more")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    x, y, test_x, test_y, unit = read(arguments.table, arguments.seed)
    size = {"steps": arguments.steps, "seed": arguments.seed}
    plain = train(x, y, temperature=1.0, members=MEMBERS, **size)
    temperature = choose(x, y, **size)
    tuned = plain
    if temperature != 1:
        tuned = train(x, y, temperature=temperature, members=MEMBERS, bound=learned_noise(plain), **size)
    print(f"the held-out tenth chooses temperature {temperature:g}")
    for name, mixture in (("nothing tuned", plain), ("tuned", tuned)):
        error = (mixture.predict(test_x).mean - test_y).square().mean().sqrt() * unit
        density = log_likelihood(mixture, test_x, test_y) - math.log(unit)
        print(f"{name:14s} test RMSE {error:.4g}, log-likelihood {density:.3f}, of {len(test_y)} rows")


if __name__ == "__main__":
    main()
