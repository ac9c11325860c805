"""Grids of settings for ``images.py``, compared on the last 10 000 training images of a problem.

``python benchmarks/images_tuning.py --problem fashion-mlp --methods noisy_kfac --epochs 3`` trains with every setting
of the method's grid, without these images, and writes a file of its losses on them for each in
``benchmarks/results/images/tuning/<problem>/<method>``. Short runs favour too little regularisation: the best of each
value of what regularises is then trained for as many epochs as the problem has, in ``<method>/full``, and these are
printed, the best at the top; with ``--grid-only`` the grid's are. With ``--long`` all runs have that length, and are
few. A result that exists is shown, not computed again. No test image is looked at. Settings are not taken over by
themselves: they are written into ``images_methods.py``.
"""

from __future__ import annotations

import argparse
import math
from itertools import product
from typing import Any

import torch
from images_methods import TRAINERS
from images_methods import settings as settings_of
from images_training import PROBLEMS, parts, train
from jobs import Job, parser, run

import bayes_kfac as bk

HOLDOUT = 10_000

_NOISY: dict[str, list[Any]] = {
    "lr": [0.03, 0.1, 0.3],
    "extrinsic_damping": [1e-2, 3e-2],
    "temperature": [0.03, 0.1, 0.3, 1.0],
}
#: What is tried for each method, on top of its settings (a result says what they were then): all combinations, as many
#: of each method. The last one regularises.
GRIDS: dict[str, dict[str, list[Any]]] = {
    "sgd": {"lr": [0.03, 0.06, 0.1, 0.2, 0.4, 0.8], "weight_decay": [2e-5, 1e-4, 5e-4, 2e-3]},
    "adamw": {"lr": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "weight_decay": [1e-2, 0.1, 0.5, 2.0]},
    "ivon": {"lr": [0.3, 1.0], "hess_init": [0.1, 0.5, 1.0], "weight_decay": [2e-5, 1e-4, 5e-4, 2e-3]},
    "noisy_kfac": _NOISY,
    "noisy_ekfac": {**_NOISY, "extrinsic_damping": [3e-2, 0.1]},  # 1e-2 was too little in the first trials
}
#: For a network whose runs are dear: the noisy ones', which are the dearest, are fewer. IVON's is where it came to lie
#: after two others.
_NOISY_NARROW: dict[str, list[Any]] = {"kl_clip": [1e-3, 1e-2], "prior_precision": [100.0, 300.0]}
NARROW: dict[str, dict[str, list[Any]]] = {
    "sgd": {"lr": [0.01, 0.03, 0.06, 0.1], "weight_decay": [5e-4, 5e-3]},
    "adamw": {"lr": [5e-4, 1e-3, 2e-3, 4e-3], "weight_decay": [5e-2, 0.5, 5.0]},
    "ivon": {"lr": [0.2, 0.4], "hess_init": [1.0, 2.0, 4.0], "weight_decay": [2e-4]},
    "noisy_kfac": _NOISY_NARROW,
    # its own prediction, with the wider posterior of exact damping, asked for more
    "noisy_ekfac": {**_NOISY_NARROW, "prior_precision": [100.0, 300.0, 1000.0]},
}
NARROW_NORMALIZED: dict[str, dict[str, list[Any]]] = {
    "sgd": {"lr": [0.01, 0.03, 0.1], "weight_decay": [5e-4, 5e-3]},
    "adamw": {"lr": [5e-4, 2e-3], "weight_decay": [0.5, 5.0]},
    "ivon": {"lr": [0.2, 0.4], "hess_init": [1.0, 4.0], "weight_decay": [2e-4]},
    "noisy_kfac": {"kl_clip": [1e-2], "prior_precision": [30.0, 300.0, 1000.0, 3000.0]},
}
#: With factors that are refreshed five times as often, and without the warm-up.
_FRESH: dict[str, Any] = {"inverse_every": 20, "warmup": False}
NARROW_BOTH: dict[str, dict[str, list[Any]]] = {
    "noisy_kfac": {
        "kl_clip": [1e-3, 1e-2],
        "prior_precision": [300.0, 3000.0],
        "inverse_every": [20],
        "warmup": [False],
    },
}


def every(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """All combinations of a grid."""
    return [dict(zip(grid, chosen, strict=True)) for chosen in product(*grid.values())]


_ADAMW = {"adamw": every({"weight_decay": [0.5, 5.0]})}
_DECAYS = {"sgd": every({"weight_decay": [5e-4, 5e-3]}), **_ADAMW}
#: What is tried for as long as a problem has, with no grid before it. What came first had the larger step.
LONG: dict[str, dict[str, list[dict[str, Any]]]] = {
    "cifar10-vgg16-narrow": {
        "noisy_kfac": [{"lr": 0.03, "kl_clip": 1e-2, "prior_precision": 300.0, "inverse_every": 20}],
    },
    "cifar10-vgg16-narrow-augmented": {
        **_DECAYS,
        "noisy_kfac": [
            {"kl_clip": 1e-2, "prior_precision": 300.0, **_FRESH},
            {"lr": 0.03, "kl_clip": 1e-2, "prior_precision": 300.0, "inverse_every": 20},
            {"lr": 0.1, "kl_clip": 1e-3, "prior_precision": 300.0, "inverse_every": 20},
        ],
    },
    "cifar10-vgg16-narrow-bn": {
        **_ADAMW,
        "noisy_kfac": [{"lr": 0.03, "kl_clip": 1e-2, "prior_precision": 1000.0, **_FRESH}],
    },
    "cifar10-vgg16-narrow-bn-augmented": {
        **_DECAYS,
        "noisy_kfac": [
            {"kl_clip": 1e-2, "prior_precision": 300.0, **_FRESH},
            *({"lr": lr, "kl_clip": 1e-2, "prior_precision": 300.0, **_FRESH} for lr in (0.03, 0.01)),
            *({"lr": 0.03, "kl_clip": 1e-2, "prior_precision": prior, **_FRESH} for prior in (1000.0, 100.0)),
        ],
    },
}


def grids(problem: str) -> dict[str, dict[str, list[Any]]]:
    """The grids of a problem."""
    own = PROBLEMS[problem]
    if own.augment and own.network == "vgg16_bn_narrow":
        return NARROW_BOTH
    return {"vgg16_narrow": NARROW, "vgg16_bn_narrow": NARROW_NORMALIZED}.get(own.network, GRIDS)


def work(problem: str, method: str, settings: dict[str, Any], epochs: int, device: str) -> dict[str, Any]:
    """One training run without the last images; its losses on them, or that it diverged."""
    own = PROBLEMS[problem]
    data = parts(own, holdout=HOLDOUT)
    data = type(data)(data.train.to(device), data.held_out.to(device))
    found = {"settings": {**settings_of(own.network, method, augment=own.augment), **settings}}
    try:
        trained = train(own, method, 0, data, epochs=epochs, device=device, settings=settings)
    except bk.errors.NonFiniteError:
        return {**found, "diverged": True}
    return {**found, "curve": trained.curve}


def loss(found: dict[str, Any]) -> float:
    """The loss at the end; of a run that diverged there is none."""
    return math.inf if "diverged" in found else found["curve"][-1]["nll"]


def label(settings: dict[str, Any]) -> str:
    """A name for settings."""
    return "_".join(f"{name}={value:g}" for name, value in settings.items())


def jobs(options: argparse.Namespace, method: str, todo: list[dict[str, Any]], epochs: int) -> list[Job]:
    """A job for each of some settings; those of the problem's own epochs are kept apart."""
    folder = options.results / "images" / "tuning" / options.problem / method
    if epochs == PROBLEMS[options.problem].epochs:
        folder /= "full"
    fixed = {"problem": options.problem, "method": method, "epochs": epochs, "device": options.device}
    return [Job(folder / f"{label(settings)}.json", work, {**fixed, "settings": settings}) for settings in todo]


def main() -> None:
    """Run what is asked for and not yet there; print the finalists, the best at the top."""
    own = parser(__doc__)
    own.add_argument("--problem", choices=tuple(PROBLEMS), default="fashion-mlp")
    own.add_argument("--methods", nargs="+", choices=tuple(TRAINERS), default=list(TRAINERS))
    own.add_argument("--epochs", type=int, default=3)
    own.add_argument("--grid-only", action="store_true", help="no longer runs of the best: these are printed")
    own.add_argument("--long", action="store_true", help="what is tried at the problem's own length, and no grid")
    own.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = own.parse_args()
    own_epochs = PROBLEMS[options.problem].epochs
    known: dict[str, Any] = LONG.get(options.problem, {}) if options.long else grids(options.problem)

    def tried(method: str, todo: list[dict[str, Any]], epochs: int) -> list[dict[str, Any]]:
        """Results, the best first."""
        return sorted(run(jobs(options, method, todo, epochs), options.processes), key=loss)

    for method in options.methods:
        if method not in known:
            raise SystemExit(f"Nothing is tried of {method} on {options.problem}. Known: {', '.join(known) or 'none'}.")
        if options.long:
            found = tried(method, known[method], own_epochs)
        else:
            grid = known[method]
            found = tried(method, every(grid), options.epochs)
            if not options.grid_only:
                ranked, last_name = [one["arguments"]["settings"] for one in found], list(grid)[-1]
                best = [next(one for one in ranked if one[last_name] == value) for value in grid[last_name]]
                found = tried(method, best, own_epochs)
        for one in found:
            last = one["curve"][-1] if "curve" in one else {}
            print(method, one["settings"], {key: round(value, 4) for key, value in last.items()} or "diverged")


if __name__ == "__main__":
    main()
