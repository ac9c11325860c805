"""Draw the pictures of ``docs/plotting.md``: ``python docs/gallery.py`` writes ``docs/images/plot_*.png``.

Two posteriors are trained for it, on made-up numbers and on scikit-learn's digits; about half a minute on one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk

IMAGES = Path(__file__).resolve().parent / "images"
#: Pictures are read on a page: no need for more than these dots, and a palette of 256 colours is enough.
DPI, COLOURS = 100, 256


def save(ax: Any, name: str) -> None:
    """Write the figure of some axes as a small PNG."""
    from PIL import Image

    path = IMAGES / f"plot_{name}.png"
    ax.figure.savefig(path, dpi=DPI)
    plt.close(ax.figure)
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def wave(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy values of a sine, with a gap where there are none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, generator=generator) * 4 - 4
    x = torch.where(x > -2, x + 2, x)
    return x, torch.sin(2 * x) + 0.2 * torch.randn(n, 1, generator=generator)


def regression() -> None:
    """Bands, PIT, coverage, an acquisition, the ELBO."""
    torch.manual_seed(0)
    x, y = wave(120, seed=0)
    loader = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)
    model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    epochs: list[Any] = []
    bk.fit(
        model,
        bk.likelihoods.Gaussian("learned"),
        loader,
        epochs=150,
        lr=0.05,
        temperature=0.1,
        callbacks=[epochs.append],
        progress=False,
    )
    save(bk.plotting.plot_elbo(epochs), "elbo")

    likelihood = bk.likelihoods.Gaussian(0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1 / len(x))
    for _ in range(2000):
        optimizer.zero_grad()
        likelihood(model(x), y).backward()
        optimizer.step()
    laplace = bk.Laplace(model, likelihood).fit(loader, progress=False)
    laplace.optimize_prior_precision()
    posterior = laplace.posterior()
    grid = torch.linspace(-4.5, 2.5, 300)[:, None]
    prediction = posterior.predict(grid)
    save(bk.plotting.plot_predictive_band(grid, prediction, data=(x, y)), "predictive_band")

    _, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 5), sharex=True, height_ratios=[2, 1], layout="constrained")
    bk.plotting.plot_predictive_band(grid, prediction, data=(x, y), ax=top)
    pool = torch.linspace(-4.4, 2.4, 60)
    information = 0.5 * (prediction.variance / prediction.aleatoric_variance).log()
    candidates = posterior.predict(pool[:, None])
    best = (candidates.epistemic_variance / candidates.aleatoric_variance).squeeze(1).topk(1).indices
    bk.plotting.plot_acquisition(grid, information.squeeze(1), pool=pool, picked=pool[best], ax=bottom)
    bottom.set_ylabel("information / nats")
    top.label_outer()
    save(bottom, "acquisition")

    test_x, test_y = wave(400, seed=1)
    pit = posterior.predict(test_x).cdf(test_y)
    narrow = bk.metrics.pit_gaussian(
        posterior.predict(test_x).mean, 0.6 * posterior.predict(test_x).stddev, test_y
    )  # what a network that is too sure of itself would give
    ax = bk.plotting.plot_pit(pit, label="posterior")
    save(bk.plotting.plot_pit(narrow, label="0.6 × its width", ax=ax), "pit")
    ax = bk.plotting.plot_coverage(pit, label="posterior")
    save(bk.plotting.plot_coverage(narrow, label="0.6 × its width", ax=ax), "coverage")


def surface() -> None:
    """An acquisition over two inputs."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    x = torch.randn(80, 2, generator=generator) * torch.tensor([1.0, 0.5]) + torch.tensor([-0.5, 0.0])
    y = torch.sin(2 * x[:, :1]) * x[:, 1:] + 0.1 * torch.randn(80, 1, generator=generator)
    model = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 1))
    posterior = bk.fit(
        model,
        bk.likelihoods.Gaussian("learned"),
        DataLoader(TensorDataset(x, y), 20),
        epochs=150,
        lr=0.05,
        progress=False,
    )
    side = torch.linspace(-2.5, 2.5, 60)
    grid = torch.cartesian_prod(side, side)
    pool = torch.rand(60, 2, generator=generator) * 4.6 - 2.3

    def score(points: Tensor) -> Tensor:
        p = posterior.predict(points)
        return 0.5 * (p.variance / p.aleatoric_variance).log().squeeze(1)

    picked = pool[score(pool).topk(5).indices]
    ax = bk.plotting.plot_acquisition(grid, score(grid), pool=pool, picked=picked)
    save(ax, "acquisition_map")


def classification() -> None:
    """Reliability, risk and coverage, spectra, layers, learning curves."""
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].float() / 16, y[order]
    train, test = slice(0, 400), slice(400, None)

    def network(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))

    def adam(size: int, seed: int) -> nn.Sequential:
        model = network(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:size]
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[order]), y[order]).backward()
            optimizer.step()
        return model

    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=50, shuffle=True)
    options: dict[str, Any] = {"epochs": 60, "lr": 0.1, "temperature": 0.1, "inverse_every": 20, "progress": False}
    posterior = bk.fit(network(0), bk.likelihoods.Categorical(), loader, **options)
    ours = posterior.predict(x[test], generator=torch.Generator().manual_seed(0)).probs
    point = adam(400, 0)(x[test]).softmax(-1)
    labels = y[test]
    ax = None
    for name, probs in {"noisy K-FAC": ours, "Adam": point}.items():
        ax = bk.plotting.plot_reliability(probs, labels, num_bins=10, scheme="mass", label=name, ax=ax)
    save(ax, "reliability")
    ax = None
    for name, probs in {"noisy K-FAC": ours, "Adam": point}.items():
        ax = bk.plotting.plot_risk_coverage(probs.argmax(-1) != labels, probs.amax(-1), label=name, ax=ax)
    save(ax, "risk_coverage")

    torch.manual_seed(0)
    deeper = nn.Sequential(nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 10))
    posterior = bk.fit(deeper, bk.likelihoods.Categorical(), loader, **options)
    save(bk.plotting.plot_factor_spectra(posterior, layers=["0", "4"]), "factor_spectra")
    save(bk.plotting.plot_precision_spectrum(posterior), "precision_spectrum")
    for quantity in ("stddev", "signal_to_noise", "determined"):
        save(bk.plotting.plot_layer_summary(posterior, quantity), f"layers_{quantity}")

    sizes = torch.tensor([20, 40, 80, 160, 320])
    ax = None
    for name, depth in {"64-100-10": None, "logistic regression": 0}.items():
        scores = []
        for seed in range(5):
            if depth is None:
                models = [adam(int(size), seed) for size in sizes]
            else:
                models = [linear(x, y, int(size), seed) for size in sizes]
            with torch.no_grad():
                scores.append([bk.metrics.accuracy(m(x[1000:]).softmax(-1), y[1000:]) for m in models])
        ax = bk.plotting.plot_learning_curve(sizes, torch.tensor(scores), label=name, ax=ax)
    ax.set_ylabel("test accuracy (mean ± standard error of 5 seeds)")
    save(ax, "learning_curve")


def linear(x: Tensor, y: Tensor, size: int, seed: int) -> nn.Module:
    """A logistic regression on some of the first thousand digits."""
    torch.manual_seed(seed)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:size]
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[order]), y[order]).backward()
        optimizer.step()
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    IMAGES.mkdir(exist_ok=True)
    regression()
    surface()
    classification()
