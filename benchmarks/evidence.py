"""The page of evidence, ``docs/evidence.md``, joined from the committed results of all benchmarks.

``python benchmarks/report.py`` writes it with the other pages. Each benchmark brings its own section; here is what
stands before them, and UCI regression, to which several benchmarks contribute.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import active_protocol
import active_protocol_labels
import hmc_report
import images_report
import numpy as np
import peers
import regression
import temperature
from uci import HERE, summary

PAGE = HERE.parent / "docs" / "evidence.md"
DATA_SETS = ("boston", "concrete", "energy", "kin8nm", "naval", "power", "protein", "wine_red", "yacht")
#: Figures of a data set: ``rmse`` and ``log_likelihood``, lists over splits; ``None`` where they were not measured.
Figures = dict[str, Any] | None


def _laplace(method: str) -> Callable[[str], Figures]:
    def load(data: str) -> Figures:
        path = HERE / "results" / "uci" / "laplace" / f"{data}.json"
        return json.loads(path.read_text())["methods"].get(method) if path.exists() else None

    return load


def _paper(data: str) -> Figures:
    path = HERE / "results" / "uci" / "paper" / f"{data}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _recommended(structure: str, kind: str) -> Callable[[str], Figures]:
    def load(data: str) -> Figures:
        return regression.load(data, structure, kind) if regression.is_complete(data, structure) else None

    return load


def _peer(name: str) -> Callable[[str], Figures]:
    return lambda data: peers.load(name, data)


RECOMMENDED = "5 × noisy K-FAC"
#: The columns of the tables: this library's methods, then the others.
COLUMNS: dict[str, Callable[[str], Figures]] = {
    RECOMMENDED: _recommended("kron", "mixture"),
    "noisy K-FAC": _recommended("kron", "single"),
    "the paper's recipe": _paper,
    "Laplace, kron": _laplace("kron exact"),
    "Laplace, dense": _laplace("dense"),
    "laplace-torch": _laplace("laplace-torch layerwise"),
    "5-ensemble": _peer("ensemble"),
    "mean-variance 5-ensemble": _peer("mean_variance_ensemble"),
    "IVON": _peer("ivon"),
    "MC dropout": _peer("mc_dropout"),
    "GP": _peer("gp"),
}
#: What the recommended recipe is to be no worse than, on every set.
MARKS = ("the paper's recipe", "laplace-torch", "5-ensemble")


def table(key: str, best_of: Callable[..., str]) -> str:
    """Mean ± standard error over splits of every method, the best of each set in bold."""
    lines = ["| data | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for data in DATA_SETS:
        values = {name: own[key] for name, load in COLUMNS.items() if (own := load(data)) is not None}
        if not values:
            continue
        best = best_of(values, key=lambda name: np.mean(values[name]))
        cells = {name: f"**{summary(own)}**" if name == best else summary(own) for name, own in values.items()}
        lines.append("| " + " | ".join([data, *(cells.get(name, "–") for name in COLUMNS)]) + " |")
    return "\n".join(lines) + "\n"


def against_marks() -> str:
    """The recommended recipe minus each mark, paired by split: mean ± standard error; positive is better."""
    lines = ["| data | figure | " + " | ".join(MARKS) + " |", "|---" * (2 + len(MARKS)) + "|"]
    for data in DATA_SETS:
        ours = COLUMNS[RECOMMENDED](data)
        if ours is None:
            continue
        for key, label, sign in (("rmse", "RMSE saved", -1), ("log_likelihood", "log-likelihood gained", 1)):
            cells = [_difference(ours, COLUMNS[mark](data), key, sign) for mark in MARKS]
            lines.append("| " + " | ".join([data, label, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _difference(ours: dict[str, Any], theirs: Figures, key: str, sign: int) -> str:
    if theirs is None:
        return "–"
    count = min(len(ours[key]), len(theirs[key]))  # some were run on the first splits only
    gained = sign * (np.asarray(ours[key][:count]) - np.asarray(theirs[key][:count]))
    return f"{gained.mean():+.3f}±{gained.std() / count**0.5:.3f}"


def chosen() -> str:
    """How often the folds chose each temperature, and the median noise."""
    heads = [f"τ = {tau:g}" for tau in regression.TEMPERATURES]
    lines = ["| data | of | " + " | ".join(heads) + " | noise |", "|---" * (3 + len(heads)) + "|"]
    for data in DATA_SETS:
        for kind, name in (("mixture", RECOMMENDED), ("single", "noisy K-FAC")):
            if (own := _recommended("kron", kind)(data)) is not None:
                counts = [str(own["temperature"].count(tau)) for tau in regression.TEMPERATURES]
                lines.append("| " + " | ".join([data, name, *counts, f"{np.median(own['noise']):.3f}"]) + " |")
    return "\n".join(lines) + "\n"


HEAD = """# Evidence

What this library's posteriors are worth on real data, beside the alternatives of today, each in one run of one
command. Every table and picture is made by `python benchmarks/report.py` from files in `benchmarks/results`, which
hold figures of each split or seed, versions, machine and commit. Commands go on where they were stopped;
`--processes` says how many jobs run at once, `--quick` shows that they run. The data are read from the folder that
`BAYES_KFAC_DATA` names. What is worse than a peer stands here as plainly as what is better.

"""

UCI = """## UCI regression

One hidden layer of 50 ReLU units; Gal's splits 0 to 19 (the paper's recipe: 0 to 9); figures in the target's units,
mean ± standard error over splits, the best mean of each set in bold. All methods see the same splits, and choose what
they choose on each split's training part alone.

- *5 × noisy K-FAC*: the recommended recipe, `benchmarks/regression.py`. A [mixture](predicting.md) of five posteriors
  from different starts, each trained by noisy natural gradient with a learned noise. Temperature and noise of the
  predictions are chosen on three held-out tenths of the training part. *Noisy K-FAC* is one of the five, chosen for by
  itself.
- *The paper's recipe*: `benchmarks/uci.py`; [more on it and on Laplace](uci.md).
- *Laplace*, *laplace-torch*: `benchmarks/laplace_uci.py`.
- *5-ensemble*, *mean-variance 5-ensemble*, *IVON*, *MC dropout*, *GP*: `benchmarks/peers.py`. Lengths, decays, rates
  and noises are chosen as ours are, on three held-out tenths of each training part; the Gaussian process by its
  evidence.

### Log-likelihood

"""


def uci_section() -> str:
    """The tables of UCI regression."""
    return "".join(
        [
            UCI,
            table("log_likelihood", max),
            "\n### Root mean squared error\n\n",
            table("rmse", min),
            "\n### The recommended recipe against its marks\n\nPaired by split; positive is better for "
            f"*{RECOMMENDED}*.\n\n",
            against_marks(),
            "\n### What the held-out tenths chose\n\nHow many splits at each temperature τ, and the median noise, for "
            "targets of variance 1.\n\n",
            chosen(),
            UCI_NOTES,
        ]
    )


UCI_NOTES = ""


def page() -> str:
    """The whole page: a part of each benchmark that has results."""
    parts = [
        uci_section(),
        hmc_report.section(),
        active_protocol.section(),
        active_protocol_labels.section(),
        temperature.section(),
        images_report.section(),
    ]
    return HEAD + "\n".join(part.rstrip() + "\n" for part in parts if part)
