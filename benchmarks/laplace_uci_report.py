"""The section of ``docs/uci.md`` on Laplace, from the committed results of ``laplace_uci.py``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
from laplace_uci_methods import FULL
from uci import HERE, standard_error, summary

DATA_SETS = ("boston", "concrete", "energy", "kin8nm", "naval", "power", "protein", "wine_red", "yacht")
RESULTS = HERE / "results" / "uci" / "laplace"
PAIRS = (
    ("kron exact", "laplace-torch layerwise"),
    ("kron exact, noise of residuals", "laplace-torch layerwise"),
    ("kron exact, one precision", "laplace-torch scalar"),
    ("kron exact, by parameter", "laplace-torch layerwise, repaired"),
)
COLUMNS = {
    "MAP": "MAP",
    "kron exact": "kron exact",
    "kron factored": "factored",
    "kron optimal": "optimal",
    "dense": "dense",
    "full": "full",
    "diagonal": "diagonal",
    "kron exact, noise of residuals": "kron exact, noise of residuals",
    "laplace-torch layerwise": "laplace-torch, layerwise",
    "laplace-torch scalar": "laplace-torch, scalar",
    "laplace-torch layerwise, repaired": "laplace-torch, layerwise, repaired",
}
SAMPLED_COLUMNS = {
    "kron exact": "kron exact, linearised",
    "kron exact, sampled weights": "kron exact, sampled",
    "kron factored, sampled weights": "factored, sampled",
}


def table(results: list[dict[str, Any]], heads: list[str], row: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """Lines of a table with a row for each data set."""
    lines = ["| " + " | ".join(["data", *heads]) + " |", "|---" * (1 + len(heads)) + "|"]
    return [*lines, *("| " + " | ".join([own["data"], *row(own)]) + " |" for own in results), ""]


def figures(result: dict[str, Any], name: str, key: str) -> str:
    """Mean ± standard error over splits."""
    return summary(result["methods"][name][key]) if name in result["methods"] else "–"


def paired(result: dict[str, Any], pair: tuple[str, str], key: str) -> str:
    """The mean difference of two methods and its standard error over splits."""
    if any(name not in result["methods"] for name in pair):
        return "–"
    left, right = (np.asarray(result["methods"][name][key]) for name in pair)
    difference = left - right
    return f"{difference.mean():+.4f}±{standard_error(difference):.4f}"


def medians(result: dict[str, Any], name: str, key: str) -> list[float]:
    """Medians over splits, of each number of a list."""
    if name not in result["methods"]:
        return []
    values = np.asarray(result["methods"][name][key], dtype=float)
    return np.median(values.reshape(result["splits"], -1), axis=0).tolist()


def chosen(result: dict[str, Any], name: str) -> str:
    """What the evidence chose: noise (of standardised targets) and precisions."""
    own = result["methods"].get(name)
    if own is None:
        return "–"
    parts = [f"{medians(result, name, 'noise')[0]:.3f}"]
    if "precision" in own:
        parts.append(" ".join(f"{value:.3g}" for value in medians(result, name, "precision")))
    return "; ".join(parts)


def determined(result: dict[str, Any], name: str) -> str:
    """The noise, and how many parameters the data determine: where the evidence is greatest, one gives the other.

    ``σ² = (squares of the residuals) / (N − count)`` (MacKay 1992).
    """
    noise, count = result["methods"][name]["noise"], result["examples"]
    residual = np.asarray(result["methods"]["MAP"]["noise"])
    return f"{np.median(noise):.3f}; {np.median(count * (1 - (residual / np.asarray(noise)) ** 2)):.0f}"


def cost(result: dict[str, Any], name: str) -> str:
    """Milliseconds of fitting, tuning and predicting, and the memory of the first two."""
    milliseconds = [f"{1e3 * value:.0f}" for value in medians(result, name, "seconds")]
    if not milliseconds:
        return "–"
    memory = result["methods"][name].get("memory")
    return " + ".join(milliseconds) + ("" if memory is None else f"; {memory / 2**20:.1f} MB")


def tables(results: list[dict[str, Any]]) -> list[str]:
    """All tables."""
    pairs = [f"{left} − {right}" for left, right in PAIRS]
    rmse = ["MAP", "kron exact, sampled weights", "kron factored, sampled weights"]
    priors = ["kron exact", "kron exact, by parameter", "laplace-torch layerwise", "laplace-torch layerwise, repaired"]
    scalars = ["MAP", "kron exact, one precision", "laplace-torch scalar"]
    counts = ["diagonal", "kron exact, one precision", "dense", FULL]
    costs = ["kron exact", "laplace-torch layerwise", "laplace-torch scalar"]
    return [
        "### Log-likelihood\n",
        *table(results, list(COLUMNS.values()), lambda own: [figures(own, name, "log_likelihood") for name in COLUMNS]),
        "Ours minus laplace-torch's, paired by split:\n",
        *table(results, pairs, lambda own: [paired(own, pair, "log_likelihood") for pair in PAIRS]),
        "### Linearised against sampled\n",
        *table(
            results,
            [f"log-likelihood, {head}" for head in SAMPLED_COLUMNS.values()],
            lambda own: [figures(own, name, "log_likelihood") for name in SAMPLED_COLUMNS],
        ),
        *table(
            results,
            ["RMSE, MAP and all linearised", "RMSE, kron exact, sampled", "RMSE, factored, sampled"],
            lambda own: [figures(own, name, "rmse") for name in rmse],
        ),
        "### What the evidence chose\n",
        *table(results, priors, lambda own: [chosen(own, name) for name in priors]),
        *table(results, scalars, lambda own: [chosen(own, name) for name in scalars]),
        "Noise, and parameters that the training examples determine:\n",
        *table(
            results,
            ["examples", *counts],
            lambda own: [str(own["examples"]), *(determined(own, name) for name in counts)],
        ),
        "### Cost of fit, tuning and prediction\n",
        *table(results, costs, lambda own: [cost(own, name) for name in costs]),
    ]


HEAD = """## Laplace on the same splits

One network of 50 ReLU units for each of Gal's splits SPLITS, trained by Adam on standardised data: 100 epochs in
batches of 32, step size 0.01 falling along a cosine, weight decay 1e-4; one recipe for all sets, whose epochs and
decay were chosen on a tenth of the training parts. Around the same trained weights this library and laplace-torch 0.3
fit Laplace approximations, so that nothing else differs. Figures are in the target's units, mean ± standard error
over splits. `python benchmarks/laplace_uci.py`, results in `benchmarks/results/uci/laplace`.

- *MAP*: the network, with the noise of its training residuals.
- *kron exact*, *factored*, *optimal*: Kronecker blocks with the three dampings of [](scale.md); the precision of each
  layer's prior and the noise where the evidence is greatest; linearised predictions. *dense*, *diagonal*: other blocks,
  tuned by their own evidence. *full*: the Gauss-Newton matrix of all weights together, written out without the library.
  *Noise of residuals*: the noise is MAP's, and only the precisions are by the evidence.
- *laplace-torch*: `hessian_structure="kron"`, tuned as in its documentation's regression example, by 1000 steps of Adam
  on the logarithms of precision (one, or *layerwise*: one for each parameter) and noise; linearised predictions.
  *Repaired*: the same with the gradient described below.

"""

TAIL = """
*What the evidence chose*: medians over splits of the noise's standard deviation, for targets of variance 1, and of the
precisions, by layer or in the order weight, bias, weight, bias. *Cost*: medians over splits of milliseconds of fit +
tuning + prediction of the test part, on one core of a two-core machine that also ran other work, and by how much the
process's memory grew in the first split's fit and tuning.

**Where laplace-torch scores otherwise.** Its Kronecker factors are multiplied by the noise through `math.pow`
(`laplace/utils/matrix.py`), which takes the noise out of the graph: the gradient of its evidence in the noise lacks
the determinant, and torch warns that a tensor that requires gradients became a number. What its example finds is not
the greatest evidence, but the noise of the training residuals. In nats of evidence it is away by {gaps} (medians by
set): least where examples are many. With the gradient repaired its noise and predictions are those of *kron exact, by
parameter*, and so are all precisions but that of the output's bias; and with the noise of residuals, ours are those of
laplace-torch as documented. What is left is that its biases are blocks of their own.

**Which noise is better depends on the set.** These networks nearly interpolate boston and yacht: the noise of
residuals is far below the test error, and *MAP* shows it. Linearised predictions make up for that with the variance of
the weights, and are better with this small noise on boston, yacht and energy, though it costs most in single splits of
boston (the worst has {worst} with it, and {worst_tuned} with the evidence's). On wine_red the evidence's noise is
better, on concrete by no more than its standard error, and on the four large sets it hardly matters. The evidence
estimates the noise's variance as the squares of the residuals over `examples − determined parameters`. Kronecker blocks
count too many as determined, because a product `G ⊗ A` has curvature in directions that the sum over examples leaves
flat; the last table of that section has the counts, down to those of the full matrix. On boston that is most of the
difference ({boston}; with the full matrix {boston_full}); on yacht it is the larger part ({yacht}; {yacht_full}), and
the rest is the evidence's own.

So for networks of this size take `structure="dense"`, which is better than Kronecker blocks on {better}, and elsewhere
within a thousandth of a nat of them; and where a Kronecker fit is tuned with `noise=True`, compare with the noise of
the residuals on validation data: `bk.likelihoods.Gaussian(residual_scale)` and `optimize_prior_precision()` without
`noise`. Sampled weights lose {exact} nats by exact damping; factored damping, whose cross terms make the posterior
narrower, loses {factored} at most.
"""


def losses(results: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Nats that sampled weights lose against linearised predictions, means over splits by set."""
    return {
        own["data"]: float(
            np.mean(own["methods"][name]["log_likelihood"])
            - np.mean(own["methods"][f"{name}, sampled weights"]["log_likelihood"])
        )
        for own in results
    }


def tail(results: list[dict[str, Any]]) -> str:
    """What the tables say, with the figures of all sets."""
    by_set = {own["data"]: own for own in results}

    def differences(left: str, right: str, key: str) -> dict[str, Any]:
        return {
            name: np.subtract(own["methods"][left][key], own["methods"][right][key]) for name, own in by_set.items()
        }

    repaired = differences("laplace-torch layerwise, repaired", "laplace-torch layerwise", "evidence")
    gaps = sorted(((float(np.median(own)), name) for name, own in repaired.items()), reverse=True)
    dense = differences("dense", "kron exact", "log_likelihood")
    boston, yacht = by_set["boston"], by_set["yacht"]
    pairs = [(name, "laplace-torch layerwise") for name in ("kron exact", FULL)]
    (least, easy), *_, (most, hard) = sorted((own, name) for name, own in losses(results, "kron exact").items())
    text = TAIL.strip().format(
        gaps=", ".join(f"{name} {gap:.1f}" for gap, name in gaps),
        worst=f"{min(boston['methods']['kron exact, noise of residuals']['log_likelihood']):.2f}",
        worst_tuned=f"{min(boston['methods']['kron exact']['log_likelihood']):.2f}",
        boston=paired(boston, pairs[0], "log_likelihood"),
        boston_full=paired(boston, pairs[1], "log_likelihood"),
        yacht=paired(yacht, pairs[0], "log_likelihood"),
        yacht_full=paired(yacht, pairs[1], "log_likelihood"),
        better=", ".join(name for name, own in dense.items() if own.mean() > 1e-3),
        exact=f"{least:.2f} ({easy}) to {most:.2f} ({hard})",
        factored=f"{max(losses(results, 'kron factored').values()):.2f}",
    )
    return "\n\n".join(textwrap.fill(part, 120, break_on_hyphens=False) for part in text.split("\n\n")) + "\n"


def load() -> list[dict[str, Any]]:
    """The committed results, in the order of the sets."""
    paths = [RESULTS / f"{name}.json" for name in DATA_SETS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def section() -> str:
    """The section of ``docs/uci.md``, where there are results."""
    results = load()
    if not results:
        return ""
    counts = sorted({own["splits"] for own in results}, reverse=True)
    named = [", ".join(own["data"] for own in results if own["splits"] == count) for count in counts]
    splits = "; ".join(f"0 to {count - 1} of {names}" for count, names in zip(counts, named, strict=True))
    return "\n" + HEAD.replace("SPLITS", f"({splits})") + "\n".join([*tables(results), tail(results)])
