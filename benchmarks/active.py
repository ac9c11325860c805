"""What closed-form acquisitions of a regression cost against candidates, picks and targets.

``python benchmarks/active.py candidates picks targets`` writes ``benchmarks/results/active/<name>.json``: seconds of
the processor, and exponents over the upper half of each sweep. A result that exists is shown, not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from networks import mlp, random_data
from tqdm import tqdm
from uci import HERE

import bayes_kfac as bk
from bayes_kfac.active.base import Gains, greedy
from bayes_kfac.active.gaussian import GaussianGains, GaussianPredictiveGains

SEED = 0
FEATURES, WIDTH = 8, 50


@cache
def posterior() -> bk.Posterior:
    """A Laplace posterior of one hidden layer, in float32."""
    torch.manual_seed(SEED)
    x, _ = random_data(100, (FEATURES,), 2, SEED)
    return (
        bk.Laplace(mlp(FEATURES, WIDTH, 1), bk.likelihoods.Gaussian(0.3))
        .fit([(x, x[:, :1])], progress=False)
        .posterior()
    )


def inputs(count: int, seed: int) -> torch.Tensor:
    """Random inputs."""
    return random_data(count, (FEATURES,), 2, seed)[0]


def batch(make: Callable[[], Gains], picks: int) -> dict[str, float]:
    """Seconds to make the gains with their first scores, and to pick a batch greedily."""
    start = time.process_time()
    gains = make()
    gains.scores  # noqa: B018
    made = time.process_time()
    greedy(gains, picks)
    return {"first scores": made - start, "batch": time.process_time() - made}


#: For each sweep its sizes, and what is done at one of them.
SWEEPS: dict[str, tuple[list[int], Callable[[int], dict[str, float]]]] = {
    "candidates": (
        [2**k for k in range(10, 18)],
        lambda n: batch(lambda: GaussianGains(posterior(), inputs(n, 1)), 10),
    ),
    "picks": (
        [2**k for k in range(3, 11)],
        lambda b: batch(lambda: GaussianGains(posterior(), inputs(2000, 1)), b),
    ),
    "targets": (
        [2**k for k in range(5, 12)],
        lambda m: batch(lambda: GaussianPredictiveGains(posterior(), inputs(2000, 1), inputs(m, 2)), 10),
    ),
    "candidates_with_targets": (
        [2**k for k in range(9, 15)],
        lambda n: batch(lambda: GaussianPredictiveGains(posterior(), inputs(n, 1), inputs(200, 2)), 10),
    ),
    "picks_with_targets": (
        [2**k for k in range(3, 9)],
        lambda b: batch(lambda: GaussianPredictiveGains(posterior(), inputs(1000, 1), inputs(200, 2)), b),
    ),
}


def sweep(name: str, repeats: int = 3) -> dict[str, Any]:
    """The least of several runs at each size, the sizes in turns: other work on the machine adds little to it."""
    sizes, run = SWEEPS[name]
    run(sizes[0])
    taken: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for size in tqdm(sizes * repeats, desc=f"active/{name}"):
        taken[size].append(run(size))
    rows: dict[str, dict[str, float]] = {
        str(size): {key: min(one[key] for one in own) for key in own[0]} for size, own in taken.items()
    }
    upper = sizes[len(sizes) // 2 :]
    rows["exponent"] = {
        key: float(np.polyfit(np.log(upper), np.log([rows[str(size)][key] for size in upper]), 1)[0])
        for key in rows[str(upper[0])]
    }
    return {"rows": rows}


def main() -> None:
    """Run what is asked for and not yet there; print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", choices=tuple(SWEEPS), metavar="SWEEP", help=", ".join(SWEEPS))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "active")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.sweeps:
        path = arguments.results / f"{name}.json"
        result = json.loads(path.read_text()) if path.exists() else sweep(name)
        print(f"\n{name}")
        for size, figures in result["rows"].items():
            print(f"  {size:12s}", "  ".join(f"{key} {value:.3g}" for key, value in figures.items()))
        if not path.exists():
            measure.keep(path, {"seed": SEED, **result})


if __name__ == "__main__":
    main()
