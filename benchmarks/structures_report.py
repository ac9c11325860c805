"""The page of structures, ``docs/structures.md``, from their cards and from what ``structures.py`` measured."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from structures import COST_BATCH, RESULTS
from uci import HERE

from bayes_kfac import structures

PAGE = HERE.parent / "docs" / "structures.md"
PLOT = HERE.parent / "docs" / "images" / "structures.png"

HEAD = """# Structures

A structure is an approximation to the Fisher of a layer, and with it a posterior, a Laplace fit, a noisy trainer and a
preconditioner: `structure=` takes its name in `NoisyNaturalGradient`, `fit` and `Laplace`, or, where it has options of
its own, an object of its class in `bayes_kfac.structures`. `F` is the Fisher of one example for a block `out × in`;
`a` are a layer's inputs with a 1 for the bias, `g` the gradients at its outputs, `J = Σ_t g_t a_tᵀ` over the positions
that share the weights.

This page is written by `python benchmarks/report.py` from the classes themselves and from
`benchmarks/results/structures`.

"""

TABLE = {
    "energy": """## On UCI energy

An 8-50-1 network; means over three of Gal's splits. Around the mode, exact Fisher, prior precision 1: the relative
Frobenius error of the blocks, and the divergence of the posterior in nats from that of the exact blocks and from that
of the Fisher of the whole network. Then noisy training, 2200 steps at noise .1, temperature 1, one recipe for all: the
evidence lower bound and the log-likelihood of test data for each example, processor milliseconds a step, and kilobytes
of state.

""",
    "mnist": """## On images

The same on a CNN of 730 weights for 2000 images of MNIST, 1600 steps; means over three draws of the images.

""",
}

TIME = """## Along time

`python benchmarks/rnn.py`: the next character of Tiny Shakespeare. `kron` is K-FAC with independent time, the two
chains are options 1 and 2 of Martens, Ba & Johnson (2018), all as noisy trainers at temperature .1; Adam beside them.
Losses in nats a character.

"""

COLUMNS = {
    "frobenius": ("Frobenius error", "{:.3f}"),
    "kl_blocks": ("KL, blocks", "{:.0f}"),
    "kl_network": ("KL, network", "{:.0f}"),
    "elbo": ("ELBO", "{:.3f}"),
    "test": ("test", "{:.3f}"),
    "milliseconds": ("ms a step", "{:.2f}"),
    "kilobytes": ("kB", "{:.0f}"),
}


def rows_of(item: str) -> dict[str, Any]:
    """The committed rows of an item; none where it was not run."""
    path = RESULTS / f"{item}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def cards() -> str:
    """What each structure is."""
    cost = rows_of("cost")
    page = ""
    for name in (*structures.available(), *structures.preconditioners()):
        card = structures.get(name, damping="exact", sharing="expand").card
        page += f"### `{name}`\n\n`{card.formula}`\n\n{card.captures}\n\n*When:* {card.use}\n\n*Cost:* {card.cost}"
        measured = [row for key, row in cost.items() if key.split("/")[0] == name]
        if measured:
            exponents = measured[0]["exponents"]
            words = ", ".join(f"{key} {exponents[key]:.1f}" for key in ("statistics", "refresh", "sample", "bytes"))
            page += f" Measured exponents of a square layer's width (batch {COST_BATCH}): {words}."
        refusal = structures.get(name, damping="exact", sharing="expand").refusal
        page += f"\n\n*No posterior:* {refusal}" if refusal else ""
        page += f"\n\n*Source:* {card.source}\n\n"
    return page


def table(item: str) -> str:
    """Every structure's figures on one problem."""
    rows = rows_of(item)
    if not rows:
        return ""
    lines = [
        TABLE[item] + "| structure/damping | " + " | ".join(label for label, _ in COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for name, row in rows.items():
        figures = [form.format(np.mean(row[key])) for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n\n"


def plot() -> None:
    """Each structure's Frobenius error, divergence and bound; a colour for each way in which the prior enters."""
    problems = [(item, rows) for item in TABLE if (rows := rows_of(item))]
    if not problems:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"exact": "C0", "optimal": "C1", "factored": "C2"}
    measures = {
        "frobenius": "Frobenius error",
        "kl_blocks": "KL from the exact blocks, nats",
        "elbo": "ELBO of an example",
    }
    first = problems[0][1]
    names = sorted({key.split("/")[0] for key in first}, key=lambda n: min(_of(first, n, "kl_blocks").values()))
    size = (11, 0.24 * len(names) * len(problems) + 1)
    figure, axes = plt.subplots(len(problems), 3, figsize=size, sharey=True, layout="constrained", squeeze=False)
    for row, (item, rows) in zip(axes, problems, strict=True):
        for axis, (measure, label) in zip(row, measures.items(), strict=True):
            # bounds far below that of a diagonal are at the edge
            least = np.mean(rows["diagonal/exact"]["elbo"]) - 0.1 if measure == "elbo" else 0.0
            for height, name in enumerate(names):
                for damping, value in _of(rows, name, measure).items():
                    is_left = measure == "elbo" and value < least
                    at = max(value, least if measure == "elbo" else 1e-3)
                    axis.plot(at, height, "<" if is_left else "o", color=colors[damping], markersize=5)
            axis.grid(axis="y", linewidth=0.3)
            axis.set_title(f"{item}: {label}", fontsize=9)
            if measure != "elbo":
                axis.set_xscale("log")
            if measure == "kl_blocks":
                axis.set_xlim(left=10)
        row[0].set_yticks(range(len(names)), names, fontsize=8)
        row[0].invert_yaxis()
    for damping, color in colors.items():
        axes[0, 0].plot([], [], "o", color=color, label=damping)
    axes[0, 0].legend(fontsize=8, loc="upper left")
    figure.savefig(PLOT, dpi=100)
    plt.close(figure)


def _of(rows: dict[str, Any], name: str, measure: str) -> dict[str, float]:
    """A structure's mean figure, by damping."""
    return {key.split("/")[1]: float(np.mean(row[measure])) for key, row in rows.items() if key.split("/")[0] == name}


def along_time() -> dict[str, list[dict[str, Any]]]:
    """The committed runs of ``rnn.py``, of each model one for each seed; none where it was not run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((HERE / "results" / "rnn").glob("*.json")):
        found.setdefault(path.stem.split("-")[0], []).append(json.loads(path.read_text()))
    return found


def time_table() -> str:
    """What each trainer of a recurrent network came to, by seed."""
    found = along_time()
    if not found:
        return ""
    text = TIME
    for model, results in found.items():
        settings = results[0]["settings"]
        lines = [
            f"{model.upper()} of {settings['hidden']} units, pieces of {settings['length']} characters in batches of "
            f"{settings['batch']}, {settings['steps']} steps; one figure for each of {len(results)} seeds:\n",
            "| trainer | training text | held-out text | ms a step |",
            "|---|---|---|---|",
        ]
        for method in results[0]["runs"]:
            last = [result["runs"][method][-1] for result in results]
            train, test = (", ".join(f"{own[key]:.3f}" for own in last) for key in ("train", "test"))
            pace = np.mean([1e3 * own["seconds"] / own["step"] for own in last])
            lines.append(f"| {method} | {train} | {test} | {pace:.0f} |")
        text += "\n".join(lines) + "\n\n"
    return text + "![Nats a character against steps and seconds](images/rnn.png)\n\n"


def plot_time() -> None:
    """Held-out losses against steps and seconds, means over seeds."""
    found = along_time()
    if not found:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(found), 2, figsize=(10, 4 * len(found)), layout="constrained", squeeze=False)
    for row, (model, results) in zip(axes, found.items(), strict=True):
        for axis, (against, label) in zip(row, (("step", "steps"), ("seconds", "seconds")), strict=True):
            for method in results[0]["runs"]:
                x, y = (
                    np.mean([[at[key] for at in result["runs"][method]] for result in results], axis=0)
                    for key in (against, "test")
                )
                axis.plot(x, y, label=method)
            axis.set_xlabel(label)
            axis.set_ylabel("nats a character, held-out text")
            axis.set_title(model.upper())
        row[0].legend(fontsize=8)
    figure.savefig(PLOT.with_name("rnn.png"), dpi=110)
    plt.close(figure)


def page() -> str:
    """The whole page."""
    picture = "![Errors, divergences and bounds](images/structures.png)\n\n" if rows_of("energy") else ""
    notes = RESULTS / "notes.md"
    return (
        HEAD
        + "## The structures\n\n"
        + cards()
        + table("energy")
        + table("mnist")
        + picture
        + time_table()
        + (notes.read_text() if notes.exists() else "")
    )


def write() -> None:
    """Write the picture and the page."""
    plot()
    plot_time()
    PAGE.write_text(page())
