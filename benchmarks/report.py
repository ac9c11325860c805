"""Writes the pages of ``docs`` that are made of committed results: ``python benchmarks/report.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evidence
import structures_report
from laplace_uci_report import section
from uci import DATA_SETS, HERE, LARGE, summary

PAGE = HERE.parent / "docs" / "uci.md"
LAPLACE_PAGE = HERE.parent / "docs" / "laplace_torch.md"

#: Noisy K-FAC in the paper (Table 1, recalled) and in a re-run of its code on splits of its own: RMSE, log-likelihood.
#: Large sets were not run again.
PUBLISHED = {
    "boston": ("2.742±.125", "−2.446±.029", "2.648±.183", "−2.425±.054"),
    "concrete": ("5.019±.127", "−3.039±.025", "5.032±.181", "−3.033±.038"),
    "energy": (".485±.023", "−1.421±.005", ".492±.020", "−1.420±.005"),
    "wine_red": (".637±.011", "−.969±.014", ".646±.012", "−.978±.019"),
    "yacht": (".979±.077", "−2.316±.006", "1.078±.113", "−2.295±.007"),
    "kin8nm": (".076±.001", "1.148±.007", "–", "–"),
    "naval": (".000±.000", "7.079±.034", "–", "–"),
    "power": ("3.886±.041", "−2.776±.011", "–", "–"),
    "protein": ("4.097±.009", "−2.836±.002", "–", "–"),
}
ALL = (*DATA_SETS, *LARGE)

HEAD = """# UCI regression, the paper's recipe

One hidden layer of 50 ReLU units, factored damping, temperature 1, a Gamma(6, 6) posterior over the noise's precision,
ten weight samples a step, 1000 epochs in batches of ten (large sets: of 100), the last epoch's result with 100 weight
samples; mean ± standard error over ten 90/10 splits (Gal's, 0 to 9). `python benchmarks/uci.py --mode paper` gives the
column *bayes_kfac*; `python benchmarks/uci_reference.py` the *plain recipe*: the paper's code written out without the
library, on the same splits, of the small sets alone. The *re-run* is an earlier one of the same recipe on splits of its
own; the paper's figures are quoted from memory and were not checked against it. Both differ from ours by the splits as
well: compare with the plain recipe first. Protein, which takes hours, was not run to its end.

Of naval the paper cannot have had this target: a Gamma(6, 6) prior holds the noise's precision below 896 on so many
standardised examples, so that no log-likelihood is above 6.70 with the target of these files, the compressor's decay
(standard deviation 0.0147). With the turbine's (0.0075) the cap is 7.37. Ours is 0.06 below its cap, the recalled
figure 0.29 below that. The run is the second: in the first, one of the ten networks diverged after 650 epochs, by the
rounding of long moving averages in float32, which the library has mended since; other sets were run before.

This page is written by `python benchmarks/report.py` from the files in `benchmarks/results/uci`.

"""

TAIL = """
Ten splits train at once, as ten independent blocks of one stacked network (`benchmarks/replicas.py`). Times are those
of one core of a two-core machine that also ran other work, so that they are upper bounds.
"""

PROFILE = """
`python benchmarks/uci_profile.py`. A network of this size is all overhead of small operations: ten splits cost a
quarter more than one, so that each split's share is an eighth of what it costs alone.
"""

LAPLACE_HEAD = """# Beside laplace-torch

`python benchmarks/laplace.py agreement speed scaling` runs this library and laplace-torch 0.3 side by side and keeps
figures, versions and machine in `benchmarks/results/laplace`; `python benchmarks/report.py` writes this page of them.

"""

AGREEMENT = """## The same numbers

Kronecker-factored exact GGN, the prior added in the eigenbasis, float64 or float32; the largest relative error of an
example's linearised mean and covariance. laplace-torch takes a bias as a block of its own, without its covariance with
the weights; so it is compared on layers without biases, and on an MLP whose biases are written as weights of a 1. Dense
Jacobians are by `torch.func`, the precision of each layer written out.

| network | ours against | mean | covariance |
|---|---|---|---|
"""

SPEED = """
## Their cost

Two threads of a two-core x86-64 CPU that did nothing else; medians over three processes, the libraries in turns.
`fit` is on 5000 images of MNIST, `predict` the mean and covariance of 64 inputs, both of an MLP 784-512-10;
`last_layer` those of one input for 1000 classes from 512 features.
Memory is what is added at the peak: of the process, and of tensors alone.

| | laplace-torch: seconds | ours | times as fast | MB added | ours | MB of tensors | ours |
|---|---|---|---|---|---|---|---|
"""

SCALING = """
## How ours grows

![Cost against inputs, classes and width](images/laplace_cost.png)

An MLP with two hidden layers, from 64 inputs (16 in the middle column), 10 classes and width 512; processor time of one
thread. The line is the count of operations, or of numbers held, that `benchmarks/scaling.py` derives, through the last
point; exponents are over the upper half.
"""


def read(mode: str, name: str) -> dict[str, Any] | None:
    """One committed result, if it is there."""
    path: Path = HERE / "results" / "uci" / mode / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def figures(result: dict[str, Any] | None) -> tuple[str, str]:
    """Errors and log-likelihoods as mean ± standard error."""
    if result is None:
        return "–", "–"
    return summary(result["rmse"]), summary(result["log_likelihood"])


def table(column: int) -> str:
    """One table: root mean squared errors (0) or log-likelihoods (1)."""
    lines = [
        f"## {('Root mean squared error', 'Log-likelihood')[column]}\n",
        "| data | bayes_kfac | plain recipe, same splits | re-run, other splits | paper, as recalled |",
        "|---|---|---|---|---|",
    ]
    for name in ALL:
        ours, plain = figures(read("paper", name))[column], figures(read("reference", name))[column]
        lines.append(f"| {name} | {ours} | {plain} | {PUBLISHED[name][2 + column]} | {PUBLISHED[name][column]} |")
    return "\n".join(lines) + "\n\n"


def cost() -> str:
    """Seconds for each split and milliseconds for each step of ten splits."""
    lines = [
        "## Cost\n",
        "| data | seconds a split | milliseconds a step of ten splits × ten samples |",
        "|---|---|---|",
    ]
    results = [(name, read("paper", name)) for name in ALL]
    lines += [
        f"| {name} | {result['seconds_per_split']:.0f} | {result['milliseconds_per_step']:.1f} |"
        for name, result in results
        if result
    ]
    return "\n".join(lines) + "\n"


def notes() -> str:
    """What is to be known of single results."""
    found = [(name, read("paper", name)) for name in ALL]
    return "".join(f"\n{name}: {result['note']}.\n" for name, result in found if result and "note" in result)


def profile() -> str:
    """Where a step goes, for one split and for ten."""
    path = HERE / "results" / "uci" / "profile.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    lines = [
        "\n## Where a step goes\n",
        "| milliseconds a step of ten samples | one split | ten splits |",
        "|---|---|---|",
    ]
    lines += [
        f"| {phase} | {value:.2f} | {result['ten splits'][phase]:.2f} |" for phase, value in result["one split"].items()
    ]
    return "\n".join(lines) + "\n" + PROFILE


def page() -> str:
    """The whole page."""
    return HEAD + table(0) + table(1) + cost() + TAIL + notes() + profile() + section()


def laplace(item: str) -> dict[str, Any]:
    """The rows of one committed comparison; none where it is not there."""
    path: Path = HERE / "results" / "laplace" / f"{item}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def laplace_page() -> str:
    """Agreement, cost and growth."""
    page = LAPLACE_HEAD + AGREEMENT
    for network in ("mlp", "cnn", "attention"):
        for row, errors in laplace(f"agreement/{network}").items():
            page += f"| {network} | {row} | {errors['mean']:.1e} | {errors['covariance']:.1e} |\n"
    page += SPEED
    for name in ("fit", "predict", "last_layer"):
        if rows := laplace(f"speed/{name}"):
            theirs, ours, ratio = rows.values()
            line = f"| {name} | {theirs['seconds']:.3g} | {ours['seconds']:.2g} | {ratio['seconds']:.0f} "
            for key in ("resident_bytes", "tensor_bytes"):
                line += f"| {theirs[key] / 1e6:.0f} | {ours[key] / 1e6:.1f} "
            page += line + "|\n"
    return page + SCALING


def write() -> None:
    """Write the pages of evidence, on UCI, laplace-torch and structures."""
    structures_report.write()
    evidence.PAGE.write_text(evidence.page())
    LAPLACE_PAGE.write_text(laplace_page())
    PAGE.write_text(page())


if __name__ == "__main__":
    write()
