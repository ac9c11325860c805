"""Laplace fits and linearised prediction beside laplace-torch 0.3, both libraries in the same run.

``python benchmarks/laplace.py agreement speed scaling`` runs the parts that are named and writes
``benchmarks/results/laplace/*.json`` with versions, machine and seed. A result that exists is shown, not computed
again: delete its file to take it anew. ``pip install -e '.[peers]'`` brings laplace-torch; ``libraries.py`` says what
it computes and how it differs.

- ``agreement``: mean and covariance of the linearised output, ours against laplace-torch's and against dense Jacobians.
- ``speed``: seconds and added memory on a CPU with two threads, each in a process of its own, libraries in turns.
- ``scaling``: what our predictions cost against inputs, classes and width, beside the count of operations.
- ``gpu``: fits and predictions of an MLP and of VGG16 on a CUDA device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import measure
import networks
import scaling
import torch
from libraries import LIBRARIES, fit, linearized
from networks import CLASSES, Batches, mlp, random_data
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from tqdm import tqdm
from uci import HERE

SEED, THREADS = 0, 2

# Agreement


def agreement() -> dict[str, Any]:
    """How far the outputs are apart: the largest over examples of ``‖ours − theirs‖ / ‖theirs‖``."""
    images, tokens, vectors = (2, 8, 8), (6, 4), (12,)
    cases = {
        "mlp": (lambda bias: mlp(12, 16, CLASSES, bias=bias), vectors),
        "cnn": (networks.cnn, images),
        "attention": (lambda bias: networks.Attention(4, 8, bias), tokens),
    }
    figures: dict[str, dict[str, float]] = {}
    for name, (make, shape) in cases.items():
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(SEED)
            figures[f"{name}, {str(dtype)[6:]}"] = beside_theirs(make(bias=False).to(dtype), shape)
        figures[f"{name} with biases, dense"] = beside_dense(make(bias=True).double(), shape)
    model = mlp(12, 16, CLASSES).double()
    figures["mlp with biases, as weights of a 1"] = beside_theirs(model, vectors, networks.biases_as_weights(model))
    return {"seed": SEED, "errors": figures}


def beside_theirs(model: nn.Module, shape: tuple[int, ...], same: nn.Module | None = None) -> dict[str, float]:
    """Ours against laplace-torch's, on the same network or on another way to write it."""
    data, x = example(model, shape)
    mean, covariance = linearized(fit("bayes_kfac", model, Batches(*data, 16)), x)
    their_mean, their_covariance = linearized(fit("laplace-torch", same or model, Batches(*data, 16)), x)
    return {"mean": error(mean, their_mean), "covariance": error(covariance, their_covariance)}


def beside_dense(model: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """Ours against ``J P⁻¹ Jᵀ`` with Jacobians by torch.func and the precision of each layer written out."""
    data, x = example(model, shape)
    posterior = fit("bayes_kfac", model, Batches(*data, 16))
    mean, covariance = linearized(posterior, x)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    jacobians = jacrev(lambda values: functional_call(model, values, x))(parameters)
    dense = torch.zeros_like(covariance)
    for name, block in posterior.blocks.items():
        weight, bias = (jacobians[f"{name}.{part}"] for part in ("weight", "bias"))
        J = torch.cat([weight.flatten(3), bias.unsqueeze(-1)], dim=-1).flatten(2)
        dense += J @ torch.linalg.solve(block.to_dense(), J.mT)
    return {"mean": error(mean, model(x).detach()), "covariance": error(covariance, dense)}


def example(model: nn.Module, shape: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Training data, whose last batch is smaller than the others, and inputs to predict at."""
    x, y = random_data(67, shape, CLASSES, SEED)
    x = x.to(next(model.parameters()).dtype)
    return (x[:59], y[:59]), x[59:]


def error(value: Tensor, reference: Tensor) -> float:
    """The largest relative error of an example."""
    difference, reference = (value - reference).flatten(1), reference.flatten(1)
    return float((difference.norm(dim=1) / reference.norm(dim=1)).max())


# Speed


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        make: The network and its training data.
        inputs: How many inputs are predicted at; 0 where the fit is measured.
        subset: Which weights have a posterior.
        output_covariance: What is asked for of the outputs.
        calls: How often it is timed in one process, by library.
        batch_size: Examples in a batch of the fit.
    """

    make: Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]
    inputs: int
    subset: str = "all"
    output_covariance: str = "full"
    calls: tuple[int, int] = (1, 10)
    batch_size: int = 500


def mnist_network(examples: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The MLP 784-512-10 after one epoch of Adam, and the first training examples."""
    torch.manual_seed(SEED)
    x, y = networks.mnist("train")
    model = mlp(784, 512, 10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for batch_x, batch_y in zip(x.split(250), y.split(250), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch_x), batch_y).backward()
        optimizer.step()
    return model, (x[:examples], y[:examples])


def thousand_classes() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Features as wide as those of ResNet-18 and a linear layer to 1000 classes."""
    torch.manual_seed(SEED)
    return mlp(32, 512, 1000), random_data(64, (32,), 1000, SEED)


WORK = {
    "fit": Work(lambda: mnist_network(10_000), 0, calls=(1, 3)),
    "predict": Work(lambda: mnist_network(1000), 64),
    "predict, variances": Work(lambda: mnist_network(1000), 64, output_covariance="diagonal"),
    "last layer": Work(thousand_classes, 1, "last_layer"),
    "last layer, variances": Work(thousand_classes, 1, "last_layer", "diagonal"),
}
#: How many times as much laplace-torch is to need.
TARGETS = {"predict": {"seconds": 100, "bytes": 50}, "last layer": {"seconds": 1000}}


def speed(repeats: int = 3) -> dict[str, Any]:
    """Medians over processes, the libraries in turns."""
    found: dict[str, dict[str, list[Any]]] = {name: {library: [] for library in LIBRARIES} for name in WORK}
    turns = [(name, library) for name in WORK for _ in range(repeats) for library in LIBRARIES]
    for name, library in tqdm(turns, desc="speed"):
        found[name][library].append(measure.in_fresh_process(cost, name, library))
    return {"seed": SEED, "repeats": repeats, "work": {name: compared(runs) for name, runs in found.items()}}


def cost(name: str, library: str) -> dict[str, Any]:
    """Seconds and added bytes of one piece of work, after a tiny one to warm up; runs in a process of its own."""
    torch.set_num_threads(THREADS)
    work = WORK[name]
    model, data = work.make()

    def call(examples: int | None = None) -> Any:
        if work.inputs:
            return linearized(posterior, data[0][: examples or work.inputs], work.output_covariance)
        return fit(library, model, Batches(data[0][:examples], data[1][:examples], work.batch_size))

    if work.inputs:
        posterior = fit(library, model, Batches(*data, work.batch_size), work.subset)
    call(1)
    resident = measure.resident_bytes(call)
    taken = measure.seconds(call, work.calls[LIBRARIES.index(library)])
    return {"seconds": median(taken), "resident_bytes": resident, "allocated_bytes": measure.allocated_bytes(call)}


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The medians of each library, and how many times ours laplace-torch's are."""
    medians: dict[str, Any] = {
        library: {key: median(run[key] for run in those) for key in those[0]} for library, those in runs.items()
    }
    theirs, ours = (medians[library] for library in LIBRARIES)
    ratio = {key: theirs[key] / max(ours[key], 1e-9) for key in ours}
    return {**medians, "ratio": ratio, "seconds": {name: [run["seconds"] for run in r] for name, r in runs.items()}}


# GPU

#: What the rows are to reach on an H200 in float32 with TF32: milliseconds and gigabytes.
GPU_TARGETS = {
    "MLP, fit on 60000": (80.0, None),
    "VGG16, fit on 5000": (1300.0, None),
    "MLP, 256 inputs": (2.5, 0.5),
    "VGG16, 16 inputs": (20.0, 3.0),
    "VGG16, 256 inputs": (90.0, 8.0),
}


def gpu(repeats: int = 7) -> dict[str, Any] | None:
    """The rows of :data:`GPU_TARGETS` for both libraries; what does not fit into the memory is said to."""
    if not torch.cuda.is_available():
        print("gpu: needs a CUDA device, which this machine does not have.")
        return None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rows: dict[str, Any] = {}
    for name, make, shape, examples, batch_size, counts in (
        ("MLP", lambda: mlp(784, 1000, 1000, 10), (784,), 60_000, 6000, (256,)),
        ("VGG16", networks.vgg16, (3, 32, 32), 5000, 500, (16, 256)),
    ):
        torch.manual_seed(SEED)
        model, (x, y) = make().cuda(), random_data(examples, shape, 10, SEED)
        x, y = x.cuda(), y.cuda()
        for library in LIBRARIES:
            fitting = partial(fit, library, model, Batches(x, y, batch_size))
            found = {f"{name}, fit on {examples}": gpu_cost(partial(fitting, factorise=False), repeats)}
            found[f"{name}, fit on {examples} and factors"] = gpu_cost(fitting, repeats)
            posterior = fitting()
            for count in counts:
                found[f"{name}, {count} inputs"] = gpu_cost(partial(linearized, posterior, x[:count]), repeats)
            for row, figures in found.items():
                rows.setdefault(row, {})[library] = figures
    return {"seed": SEED, "repeats": repeats, "rows": rows}


def gpu_cost(call: Callable[[], Any], repeats: int) -> dict[str, float] | str:
    """Milliseconds and gigabytes, or that it does not fit."""
    try:
        call()
        milliseconds = 1e3 * median(measure.seconds(call, repeats))
        return {"milliseconds": milliseconds, "gigabytes": measure.allocated_bytes(call) / 1e9}
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        torch.cuda.empty_cache()


# The command

PARTS: dict[str, Callable[[], dict[str, Any] | None]] = {
    "agreement": agreement,
    "speed": speed,
    "scaling": scaling.scaling,
    "gpu": gpu,
}


def show(part: str, result: dict[str, Any]) -> None:
    """Print the figures of a part."""
    print(f"\n{part}")
    if part == "agreement":
        for name, errors in result["errors"].items():
            print(f"  {name:36s} mean {errors['mean']:.1e}   covariance {errors['covariance']:.1e}")
    elif part == "speed":
        for name, found in result["work"].items():
            theirs, ours, ratio = (found[key] for key in (*LIBRARIES, "ratio"))
            for key, unit, label in (
                ("seconds", 1e3, "ms"),
                ("resident_bytes", 1e-6, "MB resident"),
                ("allocated_bytes", 1e-6, "MB of tensors"),
            ):
                line = (
                    f"  {name:24s} {unit * theirs[key]:12.1f} → {unit * ours[key]:9.2f} {label:14s} {ratio[key]:8.1f}×"
                )
                print(line)
    elif part == "scaling":
        for name, found in result["sweeps"].items():
            print(f"  {name:8s}", "  ".join(f"{key} {value:.2f}" for key, value in found["slopes"].items()))
    else:
        for name, found in result["rows"].items():
            print(f"  {name:32s}", found, "targets (ms, GB)", GPU_TARGETS.get(name))


def main() -> None:
    """Run the parts that are asked for and not yet there; print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "laplace")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    for part in arguments.parts:
        path = arguments.results / f"{part}.json"
        result = json.loads(path.read_text()) if path.exists() else PARTS[part]()
        if result is None:
            continue
        show(part, result if path.exists() else measure.keep(path, result))


if __name__ == "__main__":
    main()
