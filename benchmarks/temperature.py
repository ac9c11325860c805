"""What temperature and damping do to a posterior trained by noisy K-FAC: four UCI sets, every pair of the two.

``python benchmarks/temperature.py --processes 2`` trains each data set at each temperature with each damping, all
splits at once, and keeps one file for each in ``benchmarks/results/temperature``. Network, prior and noise are the
paper's: 50 ReLU units, prior precision 1, a Gamma(6, 6) posterior over the noise's precision. ``report.py`` draws the
picture.

The question is whether factored damping (the paper's) predicts better than the exact one because its posterior is
nearer to the truth, or because it is narrower, as a lower temperature would make it. The evidence lower bound at
temperature 1 judges the first, test log-likelihood and calibration the second.
"""

from __future__ import annotations

import json
import math
import textwrap
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from jobs import Job, cache, parser, results_folder, run
from uci import HERE, Recipe, Splits, load_splits, standard_error, summary, train

import bayes_kfac as bk
from bayes_kfac.metrics import miscalibration_area

DATA_SETS = ("boston", "concrete", "energy", "yacht")
TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01)
DAMPINGS = ("factored", "optimal", "exact")
PAIRS = tuple(product(DAMPINGS, TEMPERATURES))
STEPS, BATCH_SIZE, SPLITS, SEED = 5000, 32, 10, 1
#: Without it, and with longer steps than the clip allows, networks diverge at the lowest temperatures: there exact and
#: optimal damping leave directions of no curvature to themselves, as the factored one does not.
EXTRINSIC_DAMPING = 1e-2
PICTURE = HERE.parent / "docs" / "images" / "evidence" / "temperature.png"


def measure(data: str, temperature: float, damping: str, steps: int, splits: int, seed: int) -> dict[str, Any]:
    """Train one pair on all splits and say how good a posterior and how good a predictive it is."""
    parts = load_splits(data, splits)
    recipe = Recipe(
        damping=damping,
        temperature=temperature,
        epochs=math.ceil(steps / math.ceil(len(parts.train_x) / BATCH_SIZE)),
        lr=3e-2,
        decay="cosine",
        kl_clip=2e-3,
        extrinsic_damping=EXTRINSIC_DAMPING,
        statistics_rate=1e-2,
        statistics_every=5,
        inverse_every=20,
        num_samples=2,
        batch_size=BATCH_SIZE,
    )
    checkpoint = cache() / "temperature" / f"{data}-{temperature}-{damping}-{steps}.pt"
    posterior, seconds = train(data, recipe, parts, seed, checkpoint, shown=False)
    checkpoint.unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(seed)
    return {**judge(posterior, parts, generator), "seconds": seconds}


def judge(
    posterior: bk.Posterior, splits: Splits, generator: torch.Generator, num_samples: int = 100
) -> dict[str, Any]:
    """The bound per example over all splits; figures of the test part for each split, in the target's units."""
    draws = posterior.sample(num_samples, generator=generator)
    fitted = posterior.predict(splits.train_x, draws=draws).outputs
    nll = torch.stack([posterior.likelihood(outputs, splits.train_y) for outputs in fitted]).mean()
    num_data, replicas, _ = splits.train_x.shape
    kl = posterior.kl() / replicas
    prediction = posterior.predict(splits.test_x, draws=draws)
    target = splits.test_y / splits.scale
    density = posterior.likelihood.distribution(prediction.outputs).log_prob(target)
    log_likelihood = (density.logsumexp(0) - math.log(num_samples)).mean(0) - splits.scale.log()
    errors = ((prediction.mean - target) * splits.scale).square().mean(0).sqrt()
    pit = prediction.cdf(target).squeeze(-1)
    return {
        "elbo": float(-nll / replicas - kl / num_data),
        "kl": float(kl / num_data),
        "rmse": errors.squeeze(-1).tolist(),
        "log_likelihood": log_likelihood.squeeze(-1).tolist(),
        "miscalibration": [float(miscalibration_area(own)) for own in pit.T],
        "epistemic_stddev": prediction.epistemic_variance.mean(0).sqrt().squeeze(-1).tolist(),
        "noise": prediction.aleatoric_variance.mean(0).sqrt().squeeze(-1).tolist(),
    }


def jobs(folder: Path, data: list[str], *, quick: bool) -> list[Job]:
    """A job for every data set, temperature and damping."""
    size = {"steps": 30, "splits": 2} if quick else {"steps": STEPS, "splits": SPLITS}
    return [
        Job(
            folder / "temperature" / f"{name}-{damping}-{temperature}.json",
            measure,
            {"data": name, "temperature": temperature, "damping": damping, "seed": SEED, **size},
        )
        for name in data
        for damping, temperature in PAIRS
    ]


# -- what is shown ----------------------------------------------------------------------------------------------------


def load(folder: Path = HERE / "results") -> dict[tuple[str, str, float], dict[str, Any]]:
    """All results, by data set, damping and temperature."""
    found = [json.loads(path.read_text()) for path in sorted((folder / "temperature").glob("*.json"))]
    return {tuple(own["arguments"][key] for key in ("data", "damping", "temperature")): own for own in found}


def draw(results: dict[tuple[str, str, float], dict[str, Any]], path: Path) -> None:
    """Bound, test log-likelihood and calibration against temperature, a line for each damping."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = {
        "elbo": "bound at temperature 1\n(nats an example)",
        "log_likelihood": "test log-likelihood",
        "miscalibration": "miscalibration area",
    }
    figure, axes = plt.subplots(3, len(DATA_SETS), figsize=(12, 7), sharex=True, layout="constrained")
    for column, name in zip(axes.T, DATA_SETS, strict=True):
        column[0].set_title(name)
        for axis, key in zip(column, rows, strict=True):
            for damping in DAMPINGS:
                own = [np.atleast_1d(results[name, damping, tau][key]) for tau in TEMPERATURES]
                means = np.asarray([values.mean() for values in own])
                errors = [standard_error(values) if len(values) > 1 else 0.0 for values in own]
                axis.errorbar(TEMPERATURES, means, errors, label=damping, marker="o", markersize=3, capsize=2)
            axis.set_xscale("log")
            if key != "miscalibration":
                values = [np.mean(results[name, damping, tau][key]) for damping in DAMPINGS for tau in TEMPERATURES]
                axis.set_ylim(bottom=max(min(values) - 0.1, max(values) - 3))
        column[-1].set_xlabel("temperature")
    for axis, label in zip(axes[:, 0], rows.values(), strict=True):
        axis.set_ylabel(label)
    axes[0, 0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(results: dict[tuple[str, str, float], dict[str, Any]]) -> list[str]:
    """The bound and the log-likelihood at every temperature, a row for each data set and damping."""
    lines = []
    for key, title in (("elbo", "Bound at temperature 1, nats an example"), ("log_likelihood", "Test log-likelihood")):
        lines += [f"{title}:\n", "| data, damping | " + " | ".join(f"{tau:g}" for tau in TEMPERATURES) + " |"]
        lines.append("|---" * (1 + len(TEMPERATURES)) + "|")
        for name in (one for one in DATA_SETS if all((one, damping, tau) in results for damping, tau in PAIRS)):
            for damping in DAMPINGS:
                own = [results[name, damping, tau][key] for tau in TEMPERATURES]
                cells = [summary(value) if isinstance(value, list) else f"{value:.3f}" for value in own]
                lines.append(f"| {name}, {damping} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


HEAD = """## What temperature and damping do

Noisy K-FAC on four sets at every temperature with every damping (`benchmarks/temperature.py`; ten of Gal's splits, a
Gamma(6, 6) posterior over the noise as in the paper). The bound is that of temperature 1, whatever the posterior was
trained at: it says how near a posterior is to the true one. Bars are standard errors over splits; the bound is a mean
of all. Steps have an extrinsic damping of 0.01 and a KL clip of 0.002 for each network: with longer steps networks
diverged at low temperatures, those with exact and optimal damping first.

![Bound, log-likelihood and calibration against temperature](images/evidence/temperature.png)

"""


NOTES = """
**The confounding, settled.** At temperature 1 exact damping has the best bound on every set, optimal damping comes near
it but on energy, and the factored one is by far the worst: its posterior is not nearer to the truth. That it predicts
better there is its narrowness, as a lower temperature would have it: its standard deviations are a tenth to a quarter
smaller than those of exact damping, and the noise learned beside it is smaller too. At temperature 0.3 the three
dampings predict nearly alike, within {mild:.2f} nats on every set. Below, none is ahead everywhere, and on boston,
whose density falls apart, they come to be {boston:.1f} nats apart, for {others:.2f} at most elsewhere. Temperature
moves the figures much further: the range of densities over temperatures is {least:.0f} to {most:.0f} times as wide as
that over dampings (means over the other, by set). On energy and yacht the best is 0.03, on boston and concrete it is 1
or 0.3, below which density and calibration are worse, on boston by far. Whoever wants the posterior takes exact or
optimal damping at temperature 1; whoever wants predictions chooses the temperature, not the damping.
"""


def notes(results: dict[tuple[str, str, float], dict[str, Any]]) -> str:
    """What the tables say, with how far apart dampings and temperatures are."""
    means = [
        [[np.mean(results[name, damping, tau]["log_likelihood"]) for damping in DAMPINGS] for tau in TEMPERATURES]
        for name in DATA_SETS
    ]
    apart = np.ptp(means, axis=2)
    ratios = np.ptp(np.mean(means, axis=2), axis=1) / apart.mean(1)
    boston, *others = apart[:, TEMPERATURES.index(0.3) + 1 :].max(1)
    text = NOTES.strip().format(
        mild=apart[:, TEMPERATURES.index(0.3)].max(),
        boston=boston,
        others=max(others),
        least=ratios.min(),
        most=ratios.max(),
    )
    return "\n" + textwrap.fill(text, 120, break_on_hyphens=False) + "\n"


def section(folder: Path = HERE / "results") -> str:
    """The page's part on temperature and damping, where all results are there."""
    results = load(folder)
    if any((name, *pair) not in results for name in DATA_SETS for pair in PAIRS):
        return ""
    return HEAD + "\n".join(table(results)) + notes(results)


def main() -> None:
    """Run what is asked for and not yet there; draw and print."""
    own = parser(__doc__)
    own.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), metavar="NAME")
    arguments = own.parse_args()
    with results_folder(arguments) as folder:
        run(jobs(folder, arguments.data, quick=arguments.quick), arguments.processes)
        print("\n".join(table(load(folder))))
    if not arguments.quick and section():
        draw(load(), PICTURE)


if __name__ == "__main__":
    main()
