"""Writes ``docs/uci.md`` from the committed results: ``python benchmarks/report.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laplace_uci import section
from uci import DATA_SETS, HERE, summary

PAGE = HERE.parent / "docs" / "uci.md"

#: Noisy K-FAC in the paper (Table 1, recalled) and in a re-run of its code on splits of its own: RMSE, log-likelihood.
PUBLISHED = {
    "boston": ("2.742±.125", "−2.446±.029", "2.648±.183", "−2.425±.054"),
    "concrete": ("5.019±.127", "−3.039±.025", "5.032±.181", "−3.033±.038"),
    "energy": (".485±.023", "−1.421±.005", ".492±.020", "−1.420±.005"),
    "wine_red": (".637±.011", "−.969±.014", ".646±.012", "−.978±.019"),
    "yacht": (".979±.077", "−2.316±.006", "1.078±.113", "−2.295±.007"),
}

HEAD = """# UCI regression, the paper's recipe

One hidden layer of 50 ReLU units, factored damping, temperature 1, a Gamma(6, 6) posterior over the noise's precision,
ten weight samples a step, 1000 epochs in batches of ten, the last epoch's result with 100 weight samples; mean ±
standard error over ten 90/10 splits (Gal's, 0 to 9). `python benchmarks/uci.py --mode paper` gives the column
*bayes_kfac*; `python benchmarks/uci_reference.py` the *plain recipe*: the paper's code written out without the library,
on the same splits. The *re-run* is an earlier one of the same recipe on splits of its own; the paper's figures are
quoted from memory and were not checked against it. Both differ from ours by the splits as well: compare with the plain
recipe first.

This page is written by `python benchmarks/report.py` from the files in `benchmarks/results/uci`.

"""

TAIL = """
Ten splits train at once, as ten independent blocks of one stacked network (`benchmarks/replicas.py`). Times are those
of one core of a two-core machine that also ran other work, so that they are upper bounds.
"""

PROFILE = """
`python benchmarks/uci_profile.py`. A network of this size is all overhead of small operations: ten splits cost hardly
more than one, so that a split's share of a step is a tenth.
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
    for name in DATA_SETS:
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
    results = [(name, read("paper", name)) for name in DATA_SETS]
    lines += [
        f"| {name} | {result['seconds_per_split']:.0f} | {result['milliseconds_per_step']:.1f} |"
        for name, result in results
        if result
    ]
    return "\n".join(lines) + "\n"


def notes() -> str:
    """What is to be known of single results."""
    found = [(name, read("paper", name)) for name in DATA_SETS]
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


def write() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    write()
