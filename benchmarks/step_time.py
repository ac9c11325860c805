"""Milliseconds of a training step beside those of fused AdamW: all methods in one run, in turns.

``python benchmarks/step_time.py`` measures what is missing and keeps a file for each item in
``benchmarks/results/step_time``: ``1x50``, ``2x256`` and ``2x256-images`` on a CPU; on a CUDA device ``vgg16``,
``resnet18`` and ``gpt`` in float32 with TF32 and under bfloat16 autocast; ``width`` and ``batch`` on either. IVON and
SINGD take part where their packages are installed. The machine should do nothing else meanwhile.

A step is the mean over whole refresh periods with the default intervals: statistics every 10 steps, inverses every 100.
Its ratio is the median over rounds of the ratio to AdamW's period in the same round. Where a step's time goes is found
without touching the library: a pass forward and back alone, a context of ``sampled_params()`` with nothing in it, steps
that neither measure nor refresh, and how much longer steps take that measure, or refresh, every time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import images_networks
import jobs
import measure
import networks
import numpy as np
import torch
from images_methods import gradient_context
from torch import Tensor, nn
from tqdm import tqdm
from uci import HERE

import bayes_kfac as bk

SEED, THREADS, NUM_DATA = 0, 2, 50_000
PERIOD = 100
#: Longer than any run here: what is due that rarely is due on steps 0, 1, 2, 4, 8, ... alone.
NEVER = 10**9
#: Steps before the clock starts, and steps that are timed: none of these is a power of two.
WARM, TIMED = 70, 50
Step = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
        model: Makes the network.
        shape: The shape of one input.
        classes: The outputs, of a classification; 0 for a regression of one number.
        batch: Examples in a step.
        autocast: Whether under bfloat16 autocast.
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 10
    batch: int = 128
    autocast: bool = False

    def data(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random inputs and targets."""
        x, y = networks.random_data(self.batch, self.shape, max(self.classes, 1), SEED)
        return x.to(device), (y if self.classes else x.flatten(1)[:, :1]).to(device)

    def likelihood(self) -> bk.likelihoods.Likelihood:
        """What the output means."""
        return bk.likelihoods.Categorical() if self.classes else bk.likelihoods.Gaussian(0.1)


ON_CPU = {
    "1x50": Problem(lambda: networks.mlp(13, 50, 1), (13,), classes=0),
    "2x256": Problem(lambda: networks.mlp(13, 256, 256, 1), (13,), classes=0),
    "2x256-images": Problem(lambda: networks.mlp(784, 256, 256, 10), (784,)),
}
ON_GPU = {
    "vgg16": Problem(networks.vgg16, (3, 32, 32)),
    "resnet18": Problem(images_networks.resnet18, (3, 32, 32)),
    "gpt": Problem(networks.Gpt, (128, 768), batch=16),
}


# -- methods -----------------------------------------------------------------------------------------------------------


def plain(optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> Callable[..., Step]:
    """A method with torch's own loss, at a sample of the weights if the optimizer draws them."""

    def make(problem: Problem, device: torch.device) -> Step:
        model, (x, y) = built(problem, device), problem.data(device)
        own, loss = optimizer(model), nn.CrossEntropyLoss() if problem.classes else nn.MSELoss()

        def step() -> None:
            with gradient_context(own):
                own.zero_grad()
                with torch.autocast(device.type, torch.bfloat16, enabled=problem.autocast):
                    value = loss(model(x), y)
                value.backward()
            own.step()

        return step

    return make


def ours(structure: str, **options: Any) -> Callable[..., Step]:
    """Noisy natural gradient with a structure."""

    def make(problem: Problem, device: torch.device, **more: Any) -> Step:
        optimizer, closure = noisy(problem, device, structure=structure, **options, **more)
        return lambda: optimizer.step(closure)

    return make


def noisy(problem: Problem, device: torch.device, **options: Any) -> tuple[bk.NoisyNaturalGradient, Step]:
    """Our optimizer and the closure of its step."""
    model, (x, y), likelihood = built(problem, device), problem.data(device), problem.likelihood().to(device)
    optimizer = bk.NoisyNaturalGradient(model, likelihood, num_data=NUM_DATA, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=problem.autocast):
            value = likelihood(model(x), y)
        value.backward()
        return value.detach()

    return optimizer, closure


def built(problem: Problem, device: torch.device) -> nn.Module:
    """The network, from the same weights for all."""
    torch.manual_seed(SEED)
    return problem.model().to(device)


def ivon(model: nn.Module) -> torch.optim.Optimizer:
    """IVON by its authors' package."""
    import ivon as peer

    return peer.IVON(model.parameters(), lr=0.1, ess=NUM_DATA)


def singd(model: nn.Module) -> torch.optim.Optimizer:
    """SINGD by its authors' package, refreshed every ten steps."""
    from singd.optim.optimizer import SINGD

    return SINGD(model, T=10, structures=("dense", "dense"))


METHODS: dict[str, Callable[..., Step]] = {
    "sgd": plain(lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)),
    "adamw": plain(lambda model: torch.optim.AdamW(model.parameters(), fused=True)),
    "ivon": plain(ivon),
    "singd": plain(singd),
    "noisy K-FAC": ours("kron"),
    "noisy EK-FAC": ours("ekfac"),
    "noisy diagonal": ours("diagonal"),
}
PACKAGES = {"ivon": "ivon", "singd": "singd"}


# -- measurements ------------------------------------------------------------------------------------------------------


def mean_of(step: Step, count: int) -> float:
    """Milliseconds of a step, the mean of several."""
    return 1e3 / count * measure.seconds(lambda: [step() for _ in range(count)], 1)[0]


def periods(problem: Problem, device: torch.device, rounds: int, methods: list[str]) -> dict[str, Any]:
    """Milliseconds of a step by method, and their ratios to AdamW's."""
    steps = {name: METHODS[name](problem, device) for name in methods}

    for step in steps.values():  # the first period refreshes more often
        mean_of(step, PERIOD)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(mean_of(step, PERIOD))
    return {
        name: {
            "milliseconds": median(own),
            "ratio": median(one / base for one, base in zip(own, taken["adamw"], strict=True)),
            "ratios": [one / base for one, base in zip(own, taken["adamw"], strict=True)],
        }
        for name, own in taken.items()
    }


def phases(problem: Problem, device: torch.device, structure: str = "kron", rounds: int = 5) -> dict[str, float]:
    """Milliseconds of the parts of a step, each per step of the default intervals."""
    never = {"structure": structure, "statistics_every": NEVER, "inverse_every": NEVER}
    steady, closure = noisy(problem, device, **never)
    every = {
        "statistics": noisy(problem, device, **{**never, "statistics_every": 1}),
        "refresh": noisy(problem, device, **{**never, "inverse_every": 1}),
    }

    def empty() -> None:
        with steady.sampled_params():
            pass
        steady.zero_grad()

    calls: dict[str, Step] = {"steady": lambda: steady.step(closure)}
    calls |= {name: lambda own=own: own[0].step(own[1]) for name, own in every.items()}  # type: ignore[misc]
    for call in calls.values():
        for _ in range(WARM):
            call()
    calls |= {"forward and back": closure, "sampling": empty}
    taken = {name: [mean_of(call, TIMED // rounds) for _ in range(rounds)] for name, call in calls.items()}
    own = {name: median(values) for name, values in taken.items()}
    parts = {name: own[name] for name in ("forward and back", "sampling")}
    parts["direction and update"] = own["steady"] - sum(parts.values())
    parts["statistics"] = (own["statistics"] - own["steady"]) / 10
    parts["refresh"] = (own["refresh"] - own["steady"]) / PERIOD
    return parts


def peak_bytes(problem: Problem, device: torch.device, method: str) -> int:
    """The most memory of the GPU that a period takes, network, data and state included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = METHODS[method](problem, device)
    for _ in range(PERIOD + 1):
        step()
    return torch.cuda.max_memory_allocated() - before


def on_one(problem: Problem, device: torch.device, rounds: int) -> dict[str, Any]:
    """All methods on one problem."""
    methods = [name for name in METHODS if name not in PACKAGES or find_spec(PACKAGES[name])]
    rows = periods(problem, device, rounds, methods)
    if device.type == "cuda":
        for name in methods:
            rows[name]["peak_bytes"] = peak_bytes(problem, device, name)
    return {"rows": rows, "phases": phases(problem, device)}


def sweep(kind: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """A step of noisy K-FAC and of AdamW against width or batch; exponents over the upper half."""
    sizes = [2**k for k in (range(5, 11) if kind == "width" else range(5, 12))]
    rows = {}
    for size in tqdm(sizes, desc=kind):
        width = size if kind == "width" else 256
        problem = Problem(lambda width=width: networks.mlp(width, width, width, 10), (width,))  # type: ignore[misc]
        problem = problem if kind == "width" else replace(problem, batch=size)
        found = periods(problem, device, rounds, ["adamw", "noisy K-FAC"])
        rows[str(size)] = {name: own["milliseconds"] for name, own in found.items()}
    upper = list(rows.items())[len(rows) // 2 :]
    at = np.log([int(size) for size, _ in upper])
    exponents = {name: float(np.polyfit(at, np.log([row[name] for _, row in upper]), 1)[0]) for name in upper[0][1]}
    return {"rows": rows, "exponents": exponents}


# -- what is kept and shown --------------------------------------------------------------------------------------------


def problems(device: torch.device) -> dict[str, Problem]:
    """The networks that are measured on a device, by item."""
    if device.type == "cpu":
        return ON_CPU
    halves = {f"{name}-bf16": replace(problem, autocast=True) for name, problem in ON_GPU.items()}
    return {**ON_GPU, **halves}


def table(results: dict[str, Any]) -> str:
    """A row for each method, a column for each item: milliseconds of a step and its ratio to AdamW's."""
    names = [name for name in METHODS if any(name in own["rows"] for own in results.values())]
    lines = ["| | " + " | ".join(results) + " |", "|---" * (1 + len(results)) + "|"]
    for name in names:
        cells = [
            f"{own['milliseconds']:.2f} ({own['ratio']:.2f}×)" if own else "–"
            for own in (one["rows"].get(name) for one in results.values())
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for phase in next(iter(results.values()))["phases"]:
        cells = [f"{own['phases'][phase]:.2f}" for own in results.values()]
        lines.append(f"| noisy K-FAC: {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def load(kind: str, folder: Path = HERE / "results") -> dict[str, Any]:
    """Results on ``"cpu"`` or ``"cuda"``, by item."""
    paths = sorted((folder / "step_time" / kind).glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


HEAD = """## Time of a step

Milliseconds of a training step with the default intervals, and in brackets the median over rounds of its ratio to fused
AdamW's in the same round (`benchmarks/step_time.py`); below, where a step of noisy K-FAC goes. {where}

"""
WHERE = {
    "cpu": f"On a CPU with {THREADS} threads, batches of 128; networks of 13 inputs and one output, or of 784 and ten.",
    "cuda": "On one GPU, batches of 128 (GPT: 16 sequences of 128 tokens).",
}


def section(folder: Path = HERE / "results") -> str:
    """The page's part on time, of every device that there are results of."""
    parts = []
    for kind, where in WHERE.items():
        results = load(kind, folder)
        if own := {name: result for name, result in results.items() if "phases" in result}:
            notes = NOTES if kind == "cpu" else ""
            parts.append(HEAD.format(where=where) + table(own) + exponents(results) + notes)
    return "\n".join(parts)


NOTES = """
A layer of `in` inputs and `out` outputs multiplies `3 · batch · in · out` numbers forward and back (the first layer two
thirds of that), and for a sample and a direction `2 · in · out · (in + out)` more: `1 + 2 (in + out) / (3 batch)` times
as many. For 256 units on 256 at a batch of 128 that is 3.7, for the first layer of 784 inputs 9: a ratio of 2 asks for
larger batches. Products with triangular roots, done as such, would save a quarter of what is more. The small network
is overhead, of Python and of small operations: a step has some thirty of them for each layer, where fused AdamW has
one for all.
"""


def exponents(results: dict[str, Any]) -> str:
    """How time grows with width and batch, where that was measured."""
    lines = []
    for kind in (own for own in ("width", "batch") if own in results):
        found, rows = results[kind]["exponents"], results[kind]["rows"]
        ratios = ", ".join(f"{row['noisy K-FAC'] / row['adamw']:.1f} at {size}" for size, row in rows.items())
        lines.append(
            f"\nAgainst {kind} (two hidden layers; {'batches of 128' if kind == 'width' else '256 units'}) the time of "
            f"noisy K-FAC grows like a power of {found['noisy K-FAC']:.2f}, AdamW's of {found['adamw']:.2f}, over the "
            f"upper half; the ratio is {ratios}.\n"
        )
    return "".join(lines)


def main() -> None:
    """Measure what is missing; print the table."""
    parser = jobs.parser(__doc__)
    parser.add_argument("items", nargs="*", help="by default all of the device's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, rounds = torch.device(arguments.device), 1 if arguments.quick else 7
    torch.set_num_threads(THREADS)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    known = problems(device)
    with jobs.results_folder(arguments) as folder:
        for item in tqdm(arguments.items or [*known, "width", "batch"]):
            path = folder / "step_time" / device.type / f"{item}.json"
            if not path.exists():
                found = on_one(known[item], device, rounds) if item in known else sweep(item, device, rounds)
                measure.keep(path, found)
        print(table({name: own for name, own in load(device.type, folder).items() if "phases" in own}))


if __name__ == "__main__":
    main()
