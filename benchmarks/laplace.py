"""Laplace fits and linearised prediction beside laplace-torch 0.3, both libraries in the same run.

``python benchmarks/laplace.py agreement speed/predict`` runs the parts, or items of a part, that are named and writes
``benchmarks/results/laplace/<part>/<item>.json`` with versions, machine and seed. A result that exists is shown, not
computed again: delete its file to take it anew. ``pip install -e '.[peers]'`` brings laplace-torch; ``libraries.py``
says what it computes and how it differs.

- ``agreement``: mean and covariance of the linearised output, ours against laplace-torch's and against dense Jacobians.
- ``speed``: seconds and added memory on a CPU with two threads, each in a process of its own, libraries in turns.
- ``scaling``: what our predictions cost against inputs, classes and width, beside the count of operations.
- ``gpu``: fits and predictions of an MLP and of VGG16 on a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import time
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
Rows = dict[str, dict[str, float]]

# Agreement: the largest over examples of ``‖ours − reference‖ / ‖reference‖``

#: A network, with biases or without, and the shape of one input.
NETWORKS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda bias: mlp(12, 16, CLASSES, bias=bias), (12,)),
    "cnn": (networks.cnn, (2, 8, 8)),
    "attention": (lambda bias: networks.Attention(4, 8, bias), (6, 4)),
}


def agreement(name: str) -> dict[str, Any]:
    """Against laplace-torch without biases, which it treats in another way, and against dense Jacobians with them."""
    make, shape = NETWORKS[name]
    torch.manual_seed(SEED)
    plain, biased = make(False), make(True).double()
    rows = {"laplace-torch, float32": beside_theirs(plain, shape)}
    rows["laplace-torch, float64"] = beside_theirs(plain.double(), shape)
    rows["dense Jacobians, biases, float64"] = beside_dense(biased, shape)
    if isinstance(biased, nn.Sequential) and name == "mlp":
        same = networks.biases_as_weights(biased)
        rows["laplace-torch, biases as weights of a 1, float64"] = beside_theirs(biased, shape, same)
    return {"rows": rows}


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
        calls: How often it is timed in one process by library, besides the call whose memory is taken.
    """

    make: Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]
    inputs: int
    subset: str = "all"
    calls: tuple[int, int] = (0, 20)


def mnist_network(examples: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The MLP 784-512-10 after one epoch of Adam, and the first training examples."""
    torch.manual_seed(SEED)
    x, y = networks.mnist("train")
    model = mlp(784, 512, 10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for batch_x, batch_y in Batches(x, y, 250):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch_x), batch_y).backward()
        optimizer.step()
    return model, (x[:examples], y[:examples])


def thousand_classes() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A last layer from features as wide as those of ResNet-18 to 1000 classes."""
    torch.manual_seed(SEED)
    return mlp(32, 512, 1000), random_data(64, (32,), 1000, SEED)


WORK = {
    "fit": Work(partial(mnist_network, 5000), 0, calls=(0, 3)),
    "predict": Work(partial(mnist_network, 1000), 64),
    "last_layer": Work(thousand_classes, 1, "last_layer"),
}


def speed(name: str, repeats: int = 3) -> dict[str, Any]:
    """Medians over processes, the libraries in turns, and how many times ours laplace-torch's are."""
    runs: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for library in tqdm(LIBRARIES * repeats, desc=f"speed/{name}"):
        runs[library].append(measure.in_fresh_process(cost, name, library))
    rows = {library: {key: median(run[key] for run in own) for key in own[0]} for library, own in runs.items()}
    theirs, ours = (rows[library] for library in LIBRARIES)
    rows["times as much"] = {key: theirs[key] / ours[key] for key in ours}
    return {"rows": rows, "runs": runs}


def cost(name: str, library: str) -> dict[str, float]:
    """Seconds and added bytes of one piece of work, after a tiny one to warm up; runs in a process of its own."""
    torch.set_num_threads(THREADS)
    work = WORK[name]
    model, (x, y) = work.make()
    posterior = fit(library, model, Batches(x, y, 500), work.subset) if work.inputs else None

    def call(examples: int) -> Any:
        if posterior is None:
            return fit(library, model, Batches(x[:examples], y[:examples], 500), work.subset)
        return linearized(posterior, x[:examples])

    call(1)
    whole = partial(call, work.inputs or len(x))
    start = time.perf_counter()
    resident = measure.resident_bytes(whole)
    first = time.perf_counter() - start
    taken = measure.seconds(whole, work.calls[LIBRARIES.index(library)]) or [first]
    return {"seconds": median(taken), "resident_bytes": resident, "tensor_bytes": measure.tensor_bytes(whole)}


# GPU: to be reached on an H200 in float32 with TF32. MLP: fit 80 ms, 256 inputs 2.5 ms and 0.5 GB. VGG16: fit 1300 ms,
# 16 inputs 20 ms and 3 GB, 256 inputs 90 ms and 8 GB


@dataclass(frozen=True)
class GPUWork:
    """A network and random data, as large as those of the targets.

    Attributes:
        make: The network.
        shape: The shape of one input.
        examples: How many the fit is on.
        batch_size: How many of them at a time.
        inputs: How many are predicted at.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    examples: int
    batch_size: int
    inputs: tuple[int, ...]


GPU_WORK = {
    "mlp": GPUWork(partial(mlp, 784, 1000, 1000, 10), (784,), 60_000, 6000, (256,)),
    "vgg16": GPUWork(networks.vgg16, (3, 32, 32), 5000, 500, (16, 256)),
}


def gpu(name: str, repeats: int = 7) -> dict[str, Any] | None:
    """Milliseconds and peak gigabytes of fits and predictions, for both libraries where the memory suffices."""
    if not torch.cuda.is_available():
        print("gpu: needs a CUDA device, which this machine does not have.")
        return None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(SEED)
    work = GPU_WORK[name]
    model, (x, y) = work.make().cuda(), (part.cuda() for part in random_data(work.examples, work.shape, 10, SEED))
    rows: Rows = {}
    for library in LIBRARIES:
        fitting = partial(fit, library, model, Batches(x, y, work.batch_size))
        rows[f"fit without factors, {library}"] = gpu_cost(partial(fitting, factorise=False), repeats)
        rows[f"fit, {library}"] = gpu_cost(fitting, repeats)
        posterior = fitting()
        for count in work.inputs:
            rows[f"{count} inputs, {library}"] = gpu_cost(partial(linearized, posterior, x[:count]), repeats)
    return {"rows": rows}


def gpu_cost(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds and gigabytes; none where the memory does not suffice."""
    try:
        call()
        milliseconds = 1e3 * median(measure.seconds(call, repeats))
        return {"milliseconds": milliseconds, "gigabytes": measure.tensor_bytes(call) / 1e9}
    except torch.OutOfMemoryError:
        return {}
    finally:
        torch.cuda.empty_cache()


# The command

ITEMS: dict[str, Callable[[], dict[str, Any] | None]] = {
    **{f"agreement/{name}": partial(agreement, name) for name in NETWORKS},
    **{f"speed/{name}": partial(speed, name) for name in WORK},
    **{f"scaling/{name}": partial(scaling.sweep, name) for name in scaling.SWEEPS},
    **{f"gpu/{name}": partial(gpu, name) for name in GPU_WORK},
}
PARTS = tuple(dict.fromkeys(item.split("/")[0] for item in ITEMS))


def show(item: str, result: dict[str, Any]) -> None:
    """Print the rows of a result."""
    print(f"\n{item}")
    for name, figures in result["rows"].items():
        print(f"  {name:50s}", "  ".join(f"{key} {value:.3g}" for key, value in figures.items()) or "out of memory")


def main() -> None:
    """Run what is asked for and not yet there; print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=(*PARTS, *ITEMS), metavar="PART", help=", ".join((*PARTS, *ITEMS)))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "laplace")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    for item, run in ITEMS.items():
        if item not in arguments.parts and item.split("/")[0] not in arguments.parts:
            continue
        path = arguments.results / f"{item}.json"
        result = json.loads(path.read_text()) if path.exists() else run()
        if result is not None:
            show(item, result)
            if not path.exists():
                measure.keep(path, {"seed": SEED, **result})
    scaling.plot(arguments.results / "scaling")


if __name__ == "__main__":
    main()
