"""Pictures of the documentation: ``python docs/make_images.py`` writes them to ``docs/images``.

One network of 50 tanh units on 60 points of a made-up curve, trained by Adam with the prior in its loss; around it
Laplace posteriors that differ in one number each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn

import bayes_kfac as bk

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

IMAGES = Path(__file__).resolve().parent / "images"
NOISE = 0.2
BLUE, ORANGE, GREY = "#2a6f97", "#e07a2f", "#444444"


def curve(x: Tensor) -> Tensor:
    """The truth."""
    return torch.sin(2 * x) + 0.3 * x


def data() -> tuple[Tensor, Tensor]:
    """Sixty points in two clumps, with a gap between them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(40, generator=generator) * 1.6 - 2.4, torch.rand(20, generator=generator) + 1.0])[:, None]
    return x, curve(x) + NOISE * torch.randn(x.shape, generator=generator)


def network(x: Tensor, y: Tensor) -> nn.Module:
    """A network at the mode under a prior of precision 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    likelihood = bk.likelihoods.Gaussian(NOISE)
    for _ in range(3000):
        optimizer.zero_grad()
        prior = 0.5 * sum((parameter**2).sum() for parameter in model.parameters()) / len(x)
        (likelihood(model(x), y) + prior).backward()
        optimizer.step()
        schedule.step()
    return model


def posterior(model: nn.Module, x: Tensor, y: Tensor, noise: float = NOISE, **options: Any) -> bk.Posterior:
    """A Laplace fit with some options."""
    laplace = bk.Laplace(model, bk.likelihoods.Gaussian(noise), **options)
    return laplace.fit([(x, y)], progress=False).posterior()


def points(axes: Axes, x: Tensor, y: Tensor) -> None:
    """The training points."""
    axes.plot(x, y, ".", color=GREY, markersize=4, zorder=3)


def bands(path: Path) -> None:
    """One prediction: its mean, and its noise and ignorance as two bands."""
    x, y = data()
    grid = torch.linspace(-3.6, 3.6, 300)[:, None]
    p = posterior(network(x, y), x, y).predict(grid)
    mean, total, known = p.mean.flatten(), 2 * p.stddev.flatten(), 2 * p.epistemic_variance.sqrt().flatten()
    figure, axes = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
    line = grid.flatten()
    axes.plot(line, mean, color=BLUE, lw=1.5, label="mean")
    axes.fill_between(line, mean - total, mean + total, color="#f6d7c3", lw=0)
    axes.fill_between(line, mean - known, mean + known, color="#a9c6d8", lw=0, label="not known (epistemic)")
    axes.fill_between([], [], color="#f6d7c3", label="+ noise (aleatoric)")
    points(axes, x, y)
    axes.set(xlim=(-3.6, 3.6), ylim=(-3.2, 2.6), xlabel="input", ylabel="target")
    axes.legend(loc="lower right", frameon=False, ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def scale(path: Path) -> None:
    """What each number does to the standard deviation of the function, all else equal."""
    x, y = data()
    model = network(x, y)
    grid = torch.linspace(-3.6, 3.6, 300)[:, None]
    panels: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = [
        ("num_data", [("6", {"num_data": 6}), ("60, right", {}), ("600", {"num_data": 600})]),
        ("prior_precision", [(f"{d:g}", {"prior_precision": d}) for d in (0.1, 1.0, 10.0)]),
        ("temperature", [(f"{t:g}", {"temperature": t}) for t in (10.0, 1.0, 0.1)]),
        ("noise_scale", [(f"{s:g}", {"noise": s}) for s in (0.6, 0.2, 0.07)]),
        ("damping", [(d, {"damping": d}) for d in ("exact", "optimal", "factored")]),
        ("subset", [(s, {"subset": s}) for s in ("all", "last_layer")]),
    ]
    figure, grid_of_axes = plt.subplots(2, 3, figsize=(9, 5.2), sharex=True, sharey=True, layout="constrained")
    for axes, (name, fits) in zip(grid_of_axes.flat, panels, strict=True):
        for (label, options), color in zip(fits, (ORANGE, BLUE, "#6a4c93"), strict=False):
            deviation = posterior(model, x, y, **options).predict(grid).epistemic_variance.sqrt()
            axes.plot(grid, deviation, color=color, lw=1.6, label=label)
        axes.plot(x, torch.full_like(x, 0.013), "|", color=GREY, markersize=6)
        axes.set(title=name, yscale="log", ylim=(0.011, 6))
        axes.legend(frameon=False, loc="upper center", ncols=3, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("input; ticks are training points")
    figure.supylabel("epistemic standard deviation")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    torch.set_num_threads(1)
    bands(IMAGES / "bands.png")
    scale(IMAGES / "scale.png")
