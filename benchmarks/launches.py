"""Operations that a training step starts beside the model's forward and backward pass, between two measurements.

``python benchmarks/launches.py`` counts them on the CPU, for the networks that ``step_time.py`` times on a GPU (a batch
of two; the stack of attention blocks with a width of 64, which changes no count), and keeps them in
``benchmarks/results/step_time/launches.json``. On a GPU an operation takes the host some microseconds to start, so
that their number bounds a step's time from below however small the matrices are. Views are not counted.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jobs
import measure
import networks
import step_time
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from uci import HERE

#: They start no work on a device.
VIEWS = {"as_strided", "detach", "empty", "empty_strided", "expand", "promote_types", "select", "slice", "split"}
VIEWS |= {"split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"}
VIEWS |= {"_record_function_enter_new", "_record_function_exit"}

PROBLEMS = {
    "vgg16": replace(step_time.ON_GPU["vgg16"], batch=2),
    "resnet18": replace(step_time.ON_GPU["resnet18"], batch=2),
    "gpt": step_time.Problem(lambda: networks.Gpt(width=64, heads=4), (8, 64), batch=2),
}
METHODS = ("adamw", "ivon", "noisy K-FAC", "noisy diagonal")
#: The first step, from 0, at which nothing is measured or refreshed.
STEADY = 3


class Counting(TorchDispatchMode):
    """Counts the operations that start work."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(problem: step_time.Problem, method: str) -> dict[str, int]:
    """The operations of one step that are none of a forward and backward pass, by name, most of them first."""
    step = step_time.METHODS[method](problem, torch.device("cpu"))
    for _ in range(STEADY):
        step()
    with Counting() as whole:
        step()
    more = whole.counts - passes(problem)
    return dict(more.most_common())


def passes(problem: step_time.Problem) -> Counter[str]:
    """The operations of a forward and a backward pass."""
    model, (x, y) = step_time.built(problem, torch.device("cpu")), problem.data(torch.device("cpu"))
    with Counting() as counting:
        torch.nn.functional.cross_entropy(model(x), y).backward()
    return counting.counts


def section(folder: Path = HERE / "results") -> str:
    """The page's part on what a step starts."""
    path = folder / "step_time" / "launches.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())["problems"]
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for name in next(iter(found.values())):
        totals = [own[name] if isinstance(own[name], int) else sum(own[name].values()) for own in found.values()]
        lines.append(f"| {name} | " + " | ".join(map(str, totals)) + " |")
    return HEAD + "\n".join(lines) + "\n"


HEAD = """## What a step starts

Operations of a step that neither measures nor refreshes, beside those of the forward and backward pass
(`benchmarks/launches.py`; counts, no times). On a GPU each takes the host some microseconds. Noisy K-FAC has eight for
a layer: two products for its sample and two for its direction, the draw, a dot product, and two that join weight and
bias. The look for NaN is one for all layers, whose answer an accelerator does not read back.

"""


def main() -> None:
    """Count what is missing; print the page's part."""
    arguments = jobs.parser(__doc__).parse_args()
    with jobs.results_folder(arguments) as folder:
        path = folder / "step_time" / "launches.json"
        if not path.exists():
            methods = [name for name in METHODS if find_spec(step_time.PACKAGES.get(name, "torch"))]
            problems = {
                name: {
                    "layers with a posterior": len(step_time.noisy(problem, torch.device("cpu"))[0].layers),
                    "forward and back": passes(problem).total(),
                    **{method: count(problem, method) for method in tqdm(methods, desc=name)},
                }
                for name, problem in PROBLEMS.items()
            }
            measure.keep(path, {"problems": problems})
        print(section(folder))


if __name__ == "__main__":
    main()
