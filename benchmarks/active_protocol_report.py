"""The page's section and picture of ``active_protocol.py``, from its committed results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from uci import HERE, standard_error

FOLDER = HERE / "results" / "active_protocol"
IMAGE = HERE.parent / "docs" / "images" / "evidence" / "active_protocol.png"
ORDER = ("boston", "concrete", "energy", "kin8nm", "power", "wine_red", "yacht")
METHODS = ("noisy K-FAC", "noisy Adam", "Laplace", "HMC")

#: Random and active in the noisy K-FAC paper, as recalled; the noise and the network differ from ours.
RECALLED = {
    "boston": {"noisy Adam": (5.911, 5.435), "noisy K-FAC": (5.831, 5.220), "HMC": (5.750, 5.156)},
    "concrete": {"noisy Adam": (12.583, 12.563), "noisy K-FAC": (12.301, 11.671), "HMC": (10.564, 11.484)},
    "energy": {"noisy Adam": (4.011, 3.761), "noisy K-FAC": (3.635, 3.211), "HMC": (3.264, 3.118)},
    "kin8nm": {"noisy Adam": (0.246, 0.252), "noisy K-FAC": (0.243, 0.244), "HMC": (0.226, 0.223)},
    "power": {"noisy Adam": (5.812, 5.423), "noisy K-FAC": (5.377, 4.974), "HMC": (5.229, 4.800)},
    "wine_red": {"noisy Adam": (0.730, 0.748), "noisy K-FAC": (0.752, 0.746), "HMC": (0.740, 0.749)},
    "yacht": {"noisy Adam": (7.381, 6.583), "noisy K-FAC": (7.192, 6.371), "HMC": (4.644, 3.211)},
}


def stem(method: str) -> str:
    """A method's name in names of files."""
    return method.lower().replace(" ", "_")


def read(data: str, method: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """One result, if it is there."""
    path = folder / data / f"{stem(method)}.json"
    return json.loads(path.read_text()) if path.exists() else None


def errors(result: dict[str, Any], acquisition: str, figure: str = "rmse") -> np.ndarray:
    """Figures, ``[rounds, seeds]``."""
    return np.asarray(result["acquisitions"][acquisition][figure])


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(standard_error(values))


def number(value: float, scale: float, sign: str = "") -> str:
    """A figure with four digits at the size of a column's errors."""
    return f"{value:{sign}.{max(1, 3 - math.floor(math.log10(scale)))}f}"


def cell(values: np.ndarray, scale: float, sign: str = "") -> str:
    """Mean ± standard error."""
    mean, error = mean_and_error(values)
    return f"{number(mean, scale, sign)}±{number(error, scale)}"


def tables(folder: Path = FOLDER) -> str:
    """All tables, one part for each method."""
    text = ""
    for method in METHODS:
        found = {data: result for data in ORDER if (result := read(data, method, folder))}
        if not found:
            continue
        names = list(next(iter(found.values()))["acquisitions"])
        text += f"\n### {method}\n\n" + last_table(method, names, found) + "\n" + paired_table(names, found)
    return text


def last_table(method: str, names: list[str], found: dict[str, dict[str, Any]]) -> str:
    """Errors at the start and after the last acquisition; recalled ones beside them."""
    recalled = any(method in marks for marks in RECALLED.values())
    head = ["data", "20 labels", *names] + (["recalled: random", "recalled: active"] if recalled else [])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for data, result in found.items():
        first = errors(result, names[0])
        scale = first[-1].mean()
        cells = [cell(first[0], scale), *(cell(errors(result, name)[-1], scale) for name in names)]
        cells += [f"{mark:g}" for mark in RECALLED[data].get(method, ())]
        lines.append(f"| {data} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def paired_table(names: list[str], found: dict[str, dict[str, Any]]) -> str:
    """Differences from random, paired by seed: after the last acquisition, and the mean over rounds after the first."""
    others = names[1:]
    head = [f"{name} − random, {when}" for when in ("last", "all rounds") for name in others]
    lines = ["| data | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for data, result in found.items():
        base = errors(result, names[0])
        cells = []
        for over in (slice(-1, None), slice(1, None)):
            for name in others:
                difference = (errors(result, name) - base)[over].mean(0)
                wins = int((difference < 0).sum())
                cells.append(f"{cell(difference, base[-1].mean(), '+')} ({wins}/{len(difference)})")
        lines.append(f"| {data} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def where_table(folder: Path = FOLDER) -> str:
    """How far out picked points are, and what that does to the inner and the outer half of the test inputs."""
    lines = [
        "| data | mean square of inputs picked: random | variance | BALD | EPIG | inner half: variance − random | "
        "outer half: variance − random |",
        "|---" * 7 + "|",
    ]
    for data in ORDER:
        if (result := read(data, "noisy K-FAC", folder)) is None:
            continue
        cells = [f"{errors(result, name, 'picked_norm').mean():.2f}" for name in result["acquisitions"]]
        for figure in ("inner_rmse", "outer_rmse"):
            base = errors(result, "random", figure)[-1]
            cells.append(cell(errors(result, "variance", figure)[-1] - base, base.mean(), "+"))
        lines.append(f"| {data} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def nuts_table(folder: Path = FOLDER) -> str:
    """Hamiltonian Monte Carlo beside NUTS, and NUTS beside itself, by functions at the pool's inputs."""
    lines = [
        "| data | | means apart, in standard deviations | standard deviations: r | their ratio | seconds |",
        "|---" * 6 + "|",
    ]
    for path in sorted((folder / "nuts").glob("*.json")):
        result = json.loads(path.read_text())
        times = result["processor_seconds"].values()
        for name, seconds in zip(("HMC against NUTS", "NUTS against NUTS"), times, strict=True):
            own = result[name]
            cells = [f"{own['mean_difference']:.2f}", f"{own['std_correlation']:.2f}", f"{own['std_ratio']:.2f}"]
            lines.append(f"| {path.stem} | {name} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def draw(folder: Path = FOLDER, image: Path = IMAGE) -> None:
    """Errors against labels: a row for each method, a panel for each data set."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    from bayes_kfac.plotting.style import PALETTE

    colors = dict(zip(("variance", "EPIG", "BALD"), PALETTE, strict=False)) | {"random": "#777777"}
    figure, axes = plt.subplots(
        len(METHODS), len(ORDER), figsize=(17, 9), sharex=True, squeeze=False, layout="constrained"
    )
    for row, method in zip(axes, METHODS, strict=True):
        for axis, data in zip(row, ORDER, strict=True):
            axis.set_title(f"{data}, {method}", fontsize=9)
            axis.tick_params(labelsize=7)
            if (result := read(data, method, folder)) is None:
                continue
            for name in result["acquisitions"]:
                values = errors(result, name)
                labels = 20 + np.arange(len(values))
                mean, error = values.mean(1), standard_error(values)
                dashes = "--" if name == "random" else "-"
                axis.plot(labels, mean, dashes, color=colors[name], label=name, linewidth=1.5)
                axis.fill_between(labels, mean - error, mean + error, color=colors[name], alpha=0.12, linewidth=0)
    handles = [
        Line2D([], [], color=color, linestyle="--" if name == "random" else "-") for name, color in colors.items()
    ]
    figure.legend(handles, list(colors), loc="outside upper center", ncols=len(colors), frameon=False)
    figure.supxlabel("labels")
    figure.supylabel("test RMSE")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=110)
    plt.close(figure)
