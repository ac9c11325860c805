"""Noisy K-FAC on real data, beside the same networks trained by Adam: a table and a picture.

``python examples/demo.py`` trains on scikit-learn's diabetes (regression) and digits (classification) over several
random splits, prints mean ± standard error over them, and writes ``examples/output/demo.png``. Well under a minute
on two cores; ``--splits 1`` for a quick look.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

import bayes_kfac as bk

mpl.use("Agg")
torch.set_num_threads(1)  # these networks are small: a second thread only waits
from matplotlib import pyplot as plt

OUTPUT = Path(__file__).resolve().parent / "output"
Row = dict[str, float]


def diabetes() -> tuple[Tensor, Tensor, list[str]]:
    """Standardised inputs ``[442, 10]``, targets ``[442, 1]`` in the original units, and the inputs' names."""
    data = load_diabetes()
    x, y = (torch.as_tensor(array, dtype=torch.float32) for array in (data.data, data.target))
    return (x - x.mean(0)) / x.std(0), y.unsqueeze(1), list(data.feature_names)


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 64]`` in [0, 1] and class indices."""
    x, y = load_digits(return_X_y=True)
    return torch.as_tensor(x, dtype=torch.float32) / 16, torch.as_tensor(y)


def loader(x: Tensor, y: Tensor, seed: int) -> DataLoader:
    """Shuffled batches of 32."""
    return DataLoader(TensorDataset(x, y), 32, shuffle=True, generator=torch.Generator().manual_seed(seed))


def network(inputs: int, hidden: int, outputs: int, seed: int) -> nn.Sequential:
    """One hidden layer; the same initial weights for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def train_adam(model: nn.Module, likelihood: bk.likelihoods.Likelihood, batches: DataLoader, epochs: int) -> None:
    """The same loss by Adam, the step size decaying in the same way."""
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            likelihood(model(x), y).backward()
            optimizer.step()
        schedule.step()


def regression(split: int) -> tuple[Row, Row, bk.Posterior]:
    """Test figures on diabetes of noisy K-FAC and of Adam, in the target's units."""
    x, y, _ = diabetes()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    train, test = order[:350], order[350:]
    location, scale = y[train].mean(), y[train].std()
    target = (y - location) / scale

    def figures(mean: Tensor, log_prob: Tensor, interval: tuple[Tensor, Tensor]) -> Row:
        return {
            "RMSE": float(bk.metrics.root_mean_squared_error(mean * scale, target[test] * scale)),
            "log-likelihood": float(log_prob.mean() - scale.log()),
            "90 % coverage": float(bk.metrics.coverage(*interval, target[test])),
        }

    model, likelihood = network(10, 50, 1, split), bk.likelihoods.Gaussian("learned")
    posterior = bk.fit(
        model,
        likelihood,
        loader(x[train], target[train], split),
        epochs=40,
        lr=0.03,
        prior_precision=10.0,
        generator=torch.Generator().manual_seed(split),
        progress=False,
    )
    prediction = posterior.predict(x[test])
    ours = figures(prediction.mean, prediction.log_prob(target[test]), prediction.interval(0.9))

    model, likelihood = network(10, 50, 1, split), bk.likelihoods.Gaussian("learned")
    train_adam(model, likelihood, loader(x[train], target[train], split), epochs=40)
    with torch.no_grad():
        density = likelihood.distribution(model(x[test]))
        half = 1.6449 * density.stddev
        interval = (density.mean - half, density.mean + half)
        theirs = figures(density.mean, density.log_prob(target[test]), interval)
    return ours, theirs, posterior


def classification(split: int) -> tuple[Row, Row, tuple[Tensor, Tensor, Tensor]]:
    """Test figures on digits, from 400 training images, and the probabilities and labels behind them."""
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    train, test = order[:400], order[400:]

    def figures(probs: Tensor) -> Row:
        return {
            "accuracy": float(bk.metrics.accuracy(probs, y[test])),
            "NLL": float(bk.metrics.categorical_nll(probs, y[test])),
            "ECE": float(bk.metrics.expected_calibration_error(probs, y[test])),
        }

    likelihood = bk.likelihoods.Categorical()
    model, generator = network(64, 100, 10, split), torch.Generator().manual_seed(split)
    posterior = bk.fit(
        model,
        likelihood,
        loader(x[train], y[train], split),
        epochs=60,
        lr=0.1,
        temperature=0.1,
        statistics_every=2,
        inverse_every=20,
        generator=generator,
        progress=False,
    )
    ours = posterior.predict(x[test], generator=generator).probs

    model = network(64, 100, 10, split)
    train_adam(model, likelihood, loader(x[train], y[train], split), epochs=60)
    with torch.no_grad():
        theirs = model(x[test]).softmax(-1)
    return figures(ours), figures(theirs), (ours, theirs, y[test])


def table(title: str, ours: list[Row], theirs: list[Row]) -> str:
    """Mean ± standard error over splits (of one the value), one line for each figure."""

    def cell(rows: list[Row], name: str) -> str:
        values = torch.tensor([row[name] for row in rows])
        error = f" ± {values.std() / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
        return f"{values.mean():9.3f}{error}"

    lines = [f"{title:24s}{'noisy K-FAC':>17s}{'Adam':>19s}"]
    lines += [f"  {name:22s}{cell(ours, name):>17s}{cell(theirs, name):>19s}" for name in ours[0]]
    return "\n".join(lines)


def picture(posterior: bk.Posterior, probabilities: tuple[Tensor, Tensor, Tensor], path: Path) -> None:
    """Predictive bands along one input, and the reliability diagram."""
    x, y, names = diabetes()
    column = names.index("bmi")
    grid = torch.zeros(200, 10)
    grid[:, column] = torch.linspace(-4, 6, 200)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    data = (x[:, column], ((y - y.mean()) / y.std()).squeeze(1))
    bk.plotting.plot_predictive_band(grid[:, column], posterior.predict(grid), data=data, ax=left)
    left.set(title="Diabetes: along the body mass index", xlabel="body mass index (standardised)")
    left.set_ylabel("disease progression (standardised)")
    ours, theirs, labels = probabilities
    bk.plotting.plot_reliability(ours, labels, label="noisy K-FAC", ax=right)
    bk.plotting.plot_reliability(theirs, labels, label="Adam", ax=right)
    right.set_title("Digits, 400 training images: reliability")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(splits: int, title: str, once: Callable[[int], tuple]) -> tuple[list[Row], list[Row], list]:
    """The figures and extras of all splits, behind a progress bar."""
    ours, theirs, extras = zip(*(once(split) for split in tqdm(range(splits), desc=title, unit="split")), strict=True)
    return list(ours), list(theirs), list(extras)


def main() -> None:
    """Train, print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=5, help="random splits of each data set (default 5)")
    parser.add_argument("--output", type=Path, default=OUTPUT / "demo.png", help="where the picture goes")
    arguments = parser.parse_args()
    start = time.perf_counter()
    *regression_rows, posteriors = run(arguments.splits, "diabetes", regression)
    *classification_rows, probabilities = run(arguments.splits, "digits  ", classification)
    print()
    print(table("diabetes (regression)", *regression_rows))
    print(table("digits (classification)", *classification_rows))
    picture(posteriors[0], probabilities[0], arguments.output)
    print(f"\n{arguments.splits} splits in {time.perf_counter() - start:.0f} s. Picture: {arguments.output}")


if __name__ == "__main__":
    main()
