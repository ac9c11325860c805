"""The page's section on images, from the committed results of ``images.py``: tables and three pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from uci import HERE, with_error

RESULTS = HERE / "results" / "images"
PICTURES = HERE.parent / "docs" / "images" / "evidence"

HEAD = """## Images

`python benchmarks/images.py`. All methods start at the same weights and see the same batches for the same number of
epochs, the step size falling along half a cosine. Test images had no part in the choice of settings. Draws are 30, and
their probabilities are averaged; Laplace is linearised, with the prior's precision of each layer where the evidence is
greatest; the ensemble is of five runs of AdamW; `adamw_long` is AdamW for as many more epochs as noisy K-FAC's seconds
allow. AUROC is that of the predictive entropy, for images of another data set against test images. *Corrupted* figures
are means over six kinds (noise, blur, contrast, rotation, translation, pixelation) and five severities, made by the
script. Figures are means ± standard errors over seeds. Seconds are of training and fitting alone, of one thread's
processor time on a CPU.

"""

TUNING = """Settings: `python benchmarks/images_tuning.py`, by the loss on the last 10 000 training images, which
training did not see: the grid's after 3 epochs of the MLP and 2 of the CNN; then, as so short a training needs less
regularisation, the best of each weight decay or temperature after as many epochs as the problem has. MNIST has what
Fashion-MNIST chose. On CIFAR-10 grids are smaller, after 4 epochs (with both, of noisy K-FAC, 5), and the loss is that
of the first 2000 of these images (`--epochs 4 --grid-only`); where the best was at a grid's edge, of AdamW, IVON and
noisy EK-FAC, and of noisy K-FAC with batch normalisation, it was moved on. Then came runs of the problem's length
(`--long`), for the weight decays of SGD and AdamW, and for one to five settings of noisy K-FAC, whose factors they
refresh every 20 steps in the place of 100. Noisy K-FAC had been run with what the grids had chosen, a step size of 0.1;
when these runs were made, its figures on test images had been seen: [more](#cifar-10-in-the-size-of-a-cpu). All that
was tried is counted, but for one short run with both, which refreshed every 100 steps (1.580 after 5 epochs).

"""

MARKS = """VGG16 (32-64-128-256-256) in the noisy K-FAC paper, recalled and not checked: accuracies of noisy K-FAC
85.5 % plain, 89.4 % augmented, 88.2 % with batch normalisation, 92.0 % with both, after 150 epochs; its ECE .089 plain
and .025 with batch normalisation, as read off the figure in the authors' repository. That is all of CIFAR-10 and a
network twice as wide: a GPU's work, for which `images.py` has the problems, as for ResNet-18, and which was not run.

"""

TITLES = {
    "mnist-mlp": "MNIST, MLP 784-256-256-10",
    "fashion-mlp": "Fashion-MNIST, MLP 784-256-256-10",
    "mnist-cnn": "MNIST, CNN of 16 and 32 channels",
    "fashion-cnn": "Fashion-MNIST, CNN of 16 and 32 channels",
    "cifar10-vgg16-narrow": "CIFAR-10, the first 10 000 images, narrow VGG16",
    "cifar10-vgg16-narrow-augmented": "CIFAR-10, narrow VGG16, augmented",
    "cifar10-vgg16-narrow-bn": "CIFAR-10, narrow VGG16 with batch normalisation",
    "cifar10-vgg16-narrow-bn-augmented": "CIFAR-10, narrow VGG16 with both",
    "cifar10-resnet18-narrow": "CIFAR-10, narrow ResNet-18, augmented",
    "cifar10-vgg16": "CIFAR-10, VGG16",
    "cifar10-vgg16-augmented": "CIFAR-10, VGG16, augmented",
    "cifar10-vgg16-bn": "CIFAR-10, VGG16 with batch normalisation",
    "cifar10-vgg16-bn-augmented": "CIFAR-10, VGG16 with batch normalisation, augmented",
    "cifar10-resnet18": "CIFAR-10, ResNet-18, augmented",
}
METHODS = (
    "sgd",
    "adamw",
    "adamw_long",
    "ivon",
    "ensemble",
    "laplace_last_layer",
    "laplace",
    "noisy_kfac",
    "noisy_ekfac",
)
SCORES = {"accuracy": "accuracy, %", "nll": "NLL", "ece": "ECE", "brier": "Brier"}
#: How near to the least loss.
NEAR = (0.08, 0.04, 0.02, 0.01)
CURVES = ("sgd", "adamw", "adamw_long", "ivon", "noisy_kfac", "noisy_ekfac")

Results = dict[str, list[dict[str, Any]]]


def results(problem: str) -> Results:
    """What is committed of a problem: by method, one of each seed."""
    found: Results = {}
    for method in METHODS:
        paths = sorted((RESULTS / problem).glob(f"{method}-[0-9]*.json"))
        if paths:
            found[method] = [json.loads(path.read_text()) for path in paths]
    return found


def score_cells(tests: list[dict[str, float]]) -> list[str]:
    """Accuracy in per cent, and the other scores."""
    return [
        with_error([test[name] for test in tests], 2 if name == "accuracy" else 4, 100 if name == "accuracy" else 1)
        for name in SCORES
    ]


def mean_corrupted(result: dict[str, Any], name: str) -> float:
    """A score's mean over all kinds and severities."""
    return float(np.mean([one[name] for kind in result["corrupted"].values() for one in kind]))


def table(found: Results) -> str:
    """Every method's own predictions."""
    strange = list(next(iter(found.values()))[0]["test"]["auroc"])
    head = [*SCORES.values(), *(f"AUROC {name}" for name in strange)]
    head += ["corrupted: accuracy, %", "NLL", "ECE", "epochs", "seconds", "seeds"]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for method, own in found.items():
        cells = score_cells([one["test"] for one in own])
        cells += [with_error([one["test"]["auroc"][name] for one in own], 3) for name in strange]
        cells += [with_error([mean_corrupted(one, "accuracy") for one in own], 1, 100)]
        cells += [with_error([mean_corrupted(one, name) for one in own], 3) for name in ("nll", "ece")]
        cells += [with_error([one["arguments"]["epochs"] for one in own], 0).split("±")[0]]
        cells += [with_error([one["seconds"] for one in own], 0), str(len(own))]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def further_table(found: Results) -> str:
    """Other predictions with the same posteriors."""
    lines = [
        "Other predictions with the same posteriors:\n",
        f"| | {' | '.join(SCORES.values())} |",
        "|---|---|---|---|---|",
    ]
    for method, own in found.items():
        lines += [
            f"| {method}, {name} | {' | '.join(score_cells([one['further'][name] for one in own]))} |"
            for name in own[0]["further"]
        ]
    return "\n".join(lines) + "\n\n" if len(lines) > 3 else ""


def seconds_table(found: Results) -> str:
    """Seconds until a method's own prediction comes near the least test loss that any has, the median over seeds."""
    own = {method: [one["curve"] for one in runs] for method, runs in found.items() if method in CURVES}
    least = min(float(np.mean([min(at["nll"] for at in curve) for curve in curves])) for curves in own.values())
    heads = [f"{least + gap:.3f}" for gap in NEAR]
    lines = ["Seconds of training until the test loss after an epoch is at most:\n"]
    lines += [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for method, curves in own.items():
        cells = []
        for gap in NEAR:
            reached = [[at["seconds"] for at in curve if at["nll"] <= least + gap] for curve in curves]
            median = float(np.median([min(seconds, default=np.inf) for seconds in reached]))
            cells.append(f"{median:.0f}" if np.isfinite(median) else "–")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def tuning_table() -> str:
    """What the grids chose, by the loss on held-out training images; empty where no grid was run."""
    lines = []
    for folder in sorted((RESULTS / "tuning").glob("*/*")):
        grid, finals = (
            [json.loads(path.read_text()) for path in sorted(where.glob("*.json"))]
            for where in (folder, folder / "full")
        )
        ended = sorted(one["curve"][-1]["nll"] for one in grid if "curve" in one)
        best = min((one for one in finals or grid if "curve" in one), key=lambda one: one["curve"][-1]["nll"])
        chosen = ", ".join(f"{name} {value:g}" for name, value in best["arguments"]["settings"].items())
        tried = ["long runs alone", "–", "–"]
        if grid:
            tried = [f"{len(grid)}, {len(grid) - len(ended)}", f"{ended[0]:.3f}", f"{ended[len(ended) // 2]:.3f}"]
        end = f"{best['curve'][-1]['nll']:.3f}" if finals else "–"
        lines.append(f"| {' | '.join([folder.parent.name, folder.name, *tried, chosen, end])} |")
    if not lines:
        return ""
    head = "| | | settings tried, diverged | best NLL | median | chosen | NLL at the end |"
    return TUNING + "\n".join([head, "|---|---|---|---|---|---|---|", *lines]) + "\n\n"


# -- pictures ---------------------------------------------------------------------------------------------------------


def plot_curves(everything: dict[str, Results]) -> None:
    """Test loss after each epoch, against epochs and seconds; means over seeds."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(everything), 2, figsize=(10, 3.2 * len(everything)), layout="constrained", squeeze=False
    )
    for row, (problem, found) in zip(axes, everything.items(), strict=True):
        for method in (name for name in CURVES if name in found):
            for axis, against in zip(row, ("epoch", "seconds"), strict=True):
                length = min(len(one["curve"]) for one in found[method])
                x, y = (
                    np.mean([[at[key] for at in one["curve"][:length]] for one in found[method]], axis=0)
                    for key in (against, "nll")
                )
                axis.plot(x, y, ".-", label=method, color=_color(method))
                axis.set_xlabel({"epoch": "epochs", "seconds": "seconds of training"}[against])
        for axis in row:
            axis.set_yscale("log")
            axis.set_ylabel("test NLL")
            axis.set_title(TITLES[problem], fontsize=9)
        row[0].legend(fontsize=7)
    _save(figure, "images_curves.png")


def plot_reliability(everything: dict[str, Results]) -> None:
    """Accuracy less confidence in each bin, all seeds together."""
    plt = _pyplot()
    rows = math.ceil(len(everything) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(14.4, 3.4 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(everything) :]:
        axis.remove()
    for axis, (problem, found) in zip(axes.flat, everything.items(), strict=False):
        for method, own in found.items():
            points = pooled_reliability(own)
            axis.plot(points[:, 0], points[:, 1] - points[:, 0], ".-", label=method, color=_color(method), linewidth=1)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_ylim(-0.25, 0.25)
        axis.set_xlabel("confidence")
        axis.set_title(TITLES[problem], fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy − confidence")
    axes[0, 0].legend(fontsize=6, ncols=3, loc="lower right")
    _save(figure, "images_reliability.png")


def pooled_reliability(own: list[dict[str, Any]], bins: int = 15, fewest: int = 20) -> np.ndarray:
    """Confidence and accuracy by bin, of all seeds' predictions together; bins of few predictions are left out."""
    curves = [one["test"]["reliability"] for one in own]
    confidence, accuracy, count = (
        np.concatenate([np.asarray(curve[name], float) for curve in curves])
        for name in ("confidence", "accuracy", "count")
    )
    place = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)
    rows = []
    for number in range(bins):
        inside = place == number
        if count[inside].sum() >= fewest:
            rows.append([np.average(values[inside], weights=count[inside]) for values in (confidence, accuracy)])
    return np.asarray(rows).reshape(-1, 2)


def plot_corruption(everything: dict[str, Results]) -> None:
    """Accuracy, loss and calibration against severity; means over kinds and seeds."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(everything), 3, figsize=(11, 3 * len(everything)), layout="constrained", squeeze=False
    )
    for row, (problem, found) in zip(axes, everything.items(), strict=True):
        for axis, name in zip(row, ("accuracy", "nll", "ece"), strict=True):
            for method, own in found.items():
                clean = np.mean([one["test"][name] for one in own])
                values = np.mean(
                    [[at[name] for at in kind] for one in own for kind in one["corrupted"].values()], axis=0
                )
                axis.plot(range(6), [clean, *values], ".-", label=method, color=_color(method), linewidth=1)
            axis.set_xlabel("severity")
            axis.set_title(f"{TITLES[problem]}: {SCORES[name].split(',')[0]}", fontsize=8)
        row[0].legend(fontsize=6)
    _save(figure, "images_corruption.png")


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _color(method: str) -> str:
    return f"C{METHODS.index(method)}"


def _save(figure: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / name, dpi=90)
    _pyplot().close(figure)


# -- the section ------------------------------------------------------------------------------------------------------


def done() -> dict[str, Any]:
    """All results, by problem."""
    return {problem: found for problem in TITLES if (found := results(problem))}


def draw() -> None:
    """The section's pictures, of the committed results; none where there are none."""
    everything = done()
    if everything:
        plot_curves(everything)
        plot_reliability(everything)
        plot_corruption(everything)


def section() -> str:
    """The section; empty where nothing is committed."""
    everything = done()
    if not everything:
        return ""
    text = HEAD + tuning_table()
    for problem, found in everything.items():
        text += f"### {TITLES[problem]}\n\n{table(found)}{further_table(found)}{seconds_table(found)}"
    if any(problem.startswith("cifar10") for problem in everything):
        text += MARKS
    text += "![Test loss against epochs and seconds](images/evidence/images_curves.png)\n\n"
    text += "![Accuracy less confidence, by confidence](images/evidence/images_reliability.png)\n\n"
    text += "![Scores against the severity of corruption](images/evidence/images_corruption.png)\n\n"
    return text + notes()


def notes() -> str:
    """What is to be known of these results, written beside them."""
    path: Path = RESULTS / "notes.md"
    return path.read_text() if path.exists() else ""
