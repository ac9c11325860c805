"""Linearised against sampled predictions, of a Laplace posterior and of one that noisy K-FAC trained.

Laplace's curvature is the generalised Gauss-Newton: that of the model which is affine in its weights. Linearised
predictions are of that model. Weights drawn from the same Gaussian and run through the network itself are far from the
weights that fit the data. Noisy K-FAC was trained under such draws, so that they are its own predictions.

``python examples/laplace_sampling.py`` takes Snelson's one-dimensional set, or a noisy sine where it is missing, trains
on 150 points of several random splits, prints mean ± standard error over them, and draws the bands of the first.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

import bayes_kfac as bk

mpl.use("Agg")
torch.set_num_threads(1)  # the network is small: a second thread only waits
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
METHODS = ("linearized", "sampling")


def data() -> tuple[Tensor, Tensor]:
    """Standardised inputs and targets, ``[200, 1]`` each."""
    folder = Path(os.environ.get("BAYES_KFAC_DATA") or HERE.parents[1] / "shared" / "data")
    if (folder / "snelson1d" / "snelson1d.npz").exists():
        with np.load(folder / "snelson1d" / "snelson1d.npz", allow_pickle=False) as file:
            x, y = (torch.as_tensor(file[name], dtype=torch.float32).reshape(-1, 1) for name in "Xy")
    else:
        print("Snelson's set is not in the folder that BAYES_KFAC_DATA names: a noisy sine stands in for it.")
        generator = torch.Generator().manual_seed(0)
        x = 6 * torch.rand(200, 1, generator=generator)
        y = (2 * x).sin() + 0.3 * torch.randn(200, 1, generator=generator)
    return (x - x.mean()) / x.std(), (y - y.mean()) / y.std()


def network(seed: int) -> nn.Sequential:
    """The same initial weights for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))


def laplace(loader: DataLoader, seed: int, steps: int) -> bk.Posterior:
    """Adam, then a Laplace fit whose prior and noise are where the evidence is greatest."""
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, y = loader.dataset.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    fitted = bk.Laplace(model, bk.likelihoods.Gaussian("learned")).fit(loader, progress=False)
    return fitted.optimize_prior_precision(noise=True).posterior()


def noisy_kfac(loader: DataLoader, seed: int, steps: int) -> bk.Posterior:
    """The same network trained under draws of its weights."""
    options = {"num_samples": 4, "statistics_every": 1, "inverse_every": 5, "kl_clip": None}
    generator = torch.Generator().manual_seed(seed)
    epochs = max(1, steps // len(loader))
    likelihood = bk.likelihoods.Gaussian("learned")
    return bk.fit(
        network(seed),
        likelihood,
        loader,
        epochs=epochs,
        lr=0.05,
        prior_precision=0.1,
        generator=generator,
        progress=False,
        **options,
    )


POSTERIORS = {"Laplace": laplace, "noisy K-FAC": noisy_kfac}


def cell(values: np.ndarray) -> str:
    """Mean ± standard error; the mean alone of one split."""
    error = f" ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"


def main() -> None:
    """Train, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000, help="of training (default 2000)")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "laplace_sampling.png")
    arguments = parser.parse_args()
    x, y = data()
    grid = torch.linspace(-2.6, 2.6, 261).unsqueeze(1)
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex=True, sharey=True, layout="constrained")
    rows: dict[tuple[str, str], list[list[float]]] = {(name, method): [] for name in POSTERIORS for method in METHODS}
    for split in tqdm(range(arguments.splits), unit="split"):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
        train, test = order[:150], order[150:]
        batches = DataLoader(
            TensorDataset(x[train], y[train]), 50, shuffle=True, generator=torch.Generator().manual_seed(split)
        )
        for name, make in POSTERIORS.items():
            posterior = make(batches, split, arguments.steps)
            for method in METHODS:
                options = {"num_samples": 200, "generator": torch.Generator().manual_seed(split)}
                result = posterior.predict(x[test], method, **options)
                low, high = result.interval(0.9)
                rows[name, method].append(
                    [
                        float(result.log_prob(y[test]).mean()),
                        float(bk.metrics.root_mean_squared_error(result.mean, y[test])),
                        float(bk.metrics.coverage(low, high, y[test])),
                        float(result.epistemic_variance.sqrt().mean()),
                    ]
                )
                if not split:
                    ax = axes[METHODS.index(method), list(POSTERIORS).index(name)]
                    bk.plotting.plot_predictive_band(
                        grid, posterior.predict(grid, method, **options), data=(x[train], y[train]), ax=ax
                    )
                    ax.set(
                        title=f"{name}, {'linearised' if method == 'linearized' else 'sampled weights'}", ylim=(-4, 4)
                    )
                    if ax is not axes[0, 0]:
                        ax.get_legend().remove()
    print("| posterior | predictions | log-likelihood | RMSE | 90 % coverage | epistemic standard deviation |")
    print("|---|---|---|---|---|---|")
    for (name, method), values in rows.items():
        array = np.asarray(values)
        cells = " | ".join(cell(values) for values in array.T)
        print(f"| {name} | {'linearised' if method == 'linearized' else 'sampled weights'} | {cells} |")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=90)
    with Image.open(arguments.output) as picture:  # few colours: a third of the size
        small = picture.convert("RGB").quantize(64)
    small.save(arguments.output, optimize=True)
    print(f"Picture: {arguments.output}")


if __name__ == "__main__":
    main()
