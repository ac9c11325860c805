"""Every structure beside the exact Fisher, as a posterior, as a trainer, and its cost: one table and one picture.

``python benchmarks/structures.py`` runs what is missing of three items and keeps it, a row for each structure and
damping, in ``benchmarks/results/structures``; ``python benchmarks/report.py`` makes ``docs/structures.md`` of it.

- energy: an 8-50-1 network on UCI energy (Gal's splits). mnist: a small CNN on 2000 images of MNIST.
  Around the mode of each (float64, exact Fisher, prior precision 1) every structure's Gaussian is compared with the
  dense Fisher: the relative Frobenius error of its blocks, and the divergence of the posterior from that of the dense
  blocks and of the Fisher of the whole network. Then noisy training from the same start in the same number of steps:
  the evidence lower bound on the training data, the log-likelihood of the test data, milliseconds a step, and the
  memory that its state takes.
- cost: statistics, refresh, sample and solve of one layer against its width, and the exponents of time and memory.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import measure
import numpy as np
import torch
from networks import mlp, mnist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from uci import HERE, load_splits

import bayes_kfac as bk
from bayes_kfac import structures
from bayes_kfac.curvature import Recorder, Rows, find_layers, output_gradients
from bayes_kfac.structures import DAMPING_KINDS, BlockSpec, JointGaussian

RESULTS = HERE / "results" / "structures"
PRIOR_PRECISION = 1.0
#: Of the exact Fisher's trace over its size: so little prior that what is left of it is rounding.
NO_PRIOR = 1e-10
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Problem:
    """Data, a network and a recipe, the same for all structures.

    Attributes:
        model: Makes the network.
        likelihood: Makes the likelihood of the trainers.
        train: Inputs and targets.
        test: The same of other examples.
        epochs: Of the trainers.
        batch_size: Of the trainers.
        lr: Their step size.
    """

    model: Callable[[], nn.Module]
    likelihood: Callable[[], Any]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    batch_size: int
    lr: float
    options: dict[str, Any] = field(default_factory=dict)


def energy(seed: int) -> Problem:
    """One split for each seed."""
    splits = load_splits("energy", seed + 1)
    scale = splits.scale[seed]
    train = splits.train_x[:, seed], splits.train_y[:, seed]
    test = splits.test_x[:, seed], splits.test_y[:, seed] / scale
    return Problem(
        lambda: mlp(train[0].shape[1], 50, 1),
        lambda: bk.likelihoods.Gaussian(0.1),
        train,
        test,
        epochs=100,
        batch_size=32,
        lr=1e-2,
    )


def images(seed: int) -> Problem:
    """2000 images each for training and test, in float32."""
    x, y = mnist("train")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:4000]
    x, y = x[order].reshape(-1, 1, 28, 28), y[order]
    return Problem(
        small_cnn,
        bk.likelihoods.Categorical,
        (x[:2000], y[:2000]),
        (x[2000:], y[2000:]),
        epochs=40,
        batch_size=50,
        lr=1e-2,
    )


def small_cnn() -> nn.Sequential:
    """Blocks of 104, 296 and 330 weights, so that the dense Fisher can be held."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


PROBLEMS: dict[str, Callable[[int], Problem]] = {"energy": energy, "mnist": images}


def names() -> list[tuple[str, str]]:
    """Every structure with every damping that makes a difference to it."""
    return sorted(
        {
            (name, structures.get(name, damping=damping, sharing="expand").damping)
            for name in structures.available()
            for damping in DAMPING_KINDS
        }
    )


# -- beside the dense Fisher -------------------------------------------------------------------------------------------


@dataclass
class Mode:
    """A trained network in float64 and its dense Fisher.

    Attributes:
        problem: What it was trained on.
        model: The network.
        likelihood: What its output means.
        fisher: Of the whole network, for one example, the layers one after another.
        sizes: The weights of each layer.
    """

    problem: Problem
    model: nn.Module
    likelihood: Any
    fisher: Tensor
    sizes: dict[str, int]

    @classmethod
    def of(cls, name: str, seed: int) -> Mode:
        """The mode of a problem."""
        problem = PROBLEMS[name](seed)
        torch.manual_seed(seed)
        model, likelihood = problem.model().double(), problem.likelihood()
        x, y = (part.double() if part.is_floating_point() else part for part in problem.train)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
        for _ in tqdm(range(1500), desc=f"{name}/{seed}: the mode"):
            rows = torch.randint(len(x), (200,))
            optimizer.zero_grad()
            penalty = sum(p.square().sum() for p in model.parameters()) * (0.5 * PRIOR_PRECISION / len(x))
            (likelihood(model(x[rows]), y[rows]) + penalty).backward()
            optimizer.step()
            schedule.step()
        layers, _ = find_layers(model)
        recorder = Recorder(layers)
        recorder.attach()
        jacobians = []
        for part in x.split(250):
            recorder.clear()
            output = model(part)
            rows = recorder.rows(output, output_gradients(likelihood, output, "exact"))
            jacobians.append(torch.cat([rows[own].jacobians().flatten(-2).flatten(0, 1) for own in layers], dim=-1))
        recorder.detach()
        J = torch.cat(jacobians).detach()
        return cls(
            problem, model, likelihood, J.T @ J / len(x), {name: math.prod(own.shape) for name, own in layers.items()}
        )

    def blocks(self, matrix: Tensor) -> list[Tensor]:
        """The diagonal blocks of a matrix over all layers."""
        sizes = list(self.sizes.values())
        return [rows.split(sizes, dim=-1)[i] for i, rows in enumerate(matrix.split(sizes))]


def beside_the_fisher(mode: Mode, structure: str, damping: str) -> dict[str, float]:
    """The errors of a structure around a mode."""
    x, y = (part.double() if part.is_floating_point() else part for part in mode.problem.train)
    loader = DataLoader(TensorDataset(x, y), batch_size=250)
    laplace = bk.Laplace(mode.model, mode.likelihood, structure=structure, damping=damping)
    seconds = measure.seconds(lambda: laplace.fit(loader, progress=False), 1)[0]
    covariance = dense(laplace.posterior(), mode.sizes, JointGaussian.solve)
    precision = len(x) * mode.fisher + PRIOR_PRECISION * torch.eye(len(mode.fisher), dtype=torch.float64)
    small = bk.Laplace(
        mode.model,
        mode.likelihood,
        structure=structure,
        damping=damping,
        prior_precision=float(NO_PRIOR * len(x) * mode.fisher.trace() / len(mode.fisher)),
    ).fit(loader, progress=False)
    wrong, right = 0.0, 0.0
    fisher = dense(small.posterior(), mode.sizes, JointGaussian.multiply) / len(x)
    for own, exact in zip(mode.blocks(fisher), mode.blocks(mode.fisher), strict=True):
        wrong += float((own - exact).square().sum())
        right += float(exact.square().sum())
    by_block = [
        divergence(own, exact) for own, exact in zip(mode.blocks(covariance), mode.blocks(precision), strict=True)
    ]
    return {
        "frobenius": math.sqrt(wrong / right),
        "kl_blocks": sum(by_block),
        "kl_network": divergence(covariance, precision),
        "evidence": float(laplace.log_marginal_likelihood()) / len(x),
        "fit_seconds": seconds,
    }


def dense(posterior: bk.Posterior, sizes: dict[str, int], function: Callable[..., dict[str, Tensor]]) -> Tensor:
    """A linear map over all layers together as a matrix, by what it makes of basis vectors."""
    whole = torch.eye(sum(sizes.values()), dtype=torch.float64)
    parts = {
        name: columns.reshape(len(whole), *block.shape)
        for (name, block), columns in zip(
            posterior.blocks.items(), whole.split(list(sizes.values()), dim=-1), strict=True
        )
    }
    return torch.cat([own.flatten(1) for own in function(posterior.blocks, parts).values()], dim=-1).T


def divergence(covariance: Tensor, precision: Tensor) -> float:
    """``KL(N(0, C) ‖ N(0, P⁻¹))`` in nats."""
    log_dets = torch.linalg.slogdet(covariance).logabsdet + torch.linalg.slogdet(precision).logabsdet
    return 0.5 * float((precision * covariance).sum() - len(precision) - log_dets)


# -- as trainers -------------------------------------------------------------------------------------------------------


def as_trainer(problem: Problem, structure: str, damping: str, seed: int) -> dict[str, float]:
    """What noisy training with a structure comes to."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, likelihood, (x, y) = problem.model(), problem.likelihood(), problem.train
    optimizer = bk.NoisyNaturalGradient(
        model,
        likelihood,
        num_data=len(x),
        lr=problem.lr,
        structure=structure,
        damping=damping,
        prior_precision=PRIOR_PRECISION,
        statistics_every=5,
        inverse_every=20,
        generator=generator,
    )
    steps, started = 0, time.process_time()
    for _ in range(problem.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(problem.batch_size):
            with optimizer.sampled_params():
                optimizer.zero_grad()
                likelihood(model(x[rows]), y[rows]).backward()
            optimizer.step()
            steps += 1
    seconds = (time.process_time() - started) / steps
    with torch.no_grad():
        losses = []
        for _ in range(20):
            with optimizer.sampled_params():
                losses.append(float(likelihood(model.eval()(x), y)))
        model.train()
        bound = -sum(losses) / len(losses) - float(optimizer.kl()) / len(x)
    posterior = optimizer.posterior()
    predicted = posterior.predict(problem.test[0], "sampling", num_samples=50, generator=generator)
    held = {id(t): t for state in optimizer.blocks.values() for t in tensors_of(state)}
    return {
        "elbo": bound,
        "test": float(predicted.log_prob(problem.test[1]).mean()),
        "milliseconds": 1e3 * seconds,
        "kilobytes": sum(t.numel() * t.element_size() for t in held.values()) / 1e3,
        "steps": steps,
    }


def tensors_of(state: Any) -> list[Tensor]:
    """All tensors that the state of a block holds."""
    gaussians = (state.posterior, state.preconditioner)
    statistics = state.statistics
    own = list(chain.from_iterable(gaussian.state.values() for gaussian in gaussians if gaussian is not None))
    if statistics is not None:
        statistics.map(lambda tensor: own.append(tensor) or tensor)
    return [*own, *([] if state.momentum is None else [state.momentum])]


# -- their cost --------------------------------------------------------------------------------------------------------

WIDTHS = (64, 128, 256, 512, 1024)
#: Where the matrices are those of all weights, or of each output's.
SMALL_WIDTHS = {"dense": (4, 8, 16, 32, 48), "unit_wise": (16, 32, 64, 128, 256)}
COST_BATCH = 64
#: Bytes of a Gaussian above which larger widths are left out.
MOST_BYTES = 1 << 28


def cost(structure: str, damping: str, repeats: int = 5) -> dict[str, Any]:
    """Seconds and bytes of a square layer at several widths, and the exponents over the three largest."""
    torch.set_num_threads(1)
    own = structures.get(structure, damping=damping, sharing="expand")
    rows: dict[int, dict[str, float]] = {}
    for width in SMALL_WIDTHS.get(structure, WIDTHS):
        torch.manual_seed(0)
        seen = Rows(torch.randn(COST_BATCH, 1, width), torch.randn(1, COST_BATCH, 1, width) / width**0.5)
        statistics = own.reframed(own.measure(seen), "layer")
        spec = BlockSpec("layer", statistics, 1e3, 1.0)
        (gaussian,) = own.gaussians([spec])
        noise = torch.randn(gaussian.shape)

        def refresh(own: Any = own, spec: BlockSpec = spec, gaussian: Any = gaussian) -> Any:
            framed = own.reframed(spec.statistics, "layer")
            return own.gaussians([BlockSpec("layer", framed, 1e3, 1.0, previous=gaussian)])

        calls = {
            "statistics": lambda own=own, seen=seen, frame=statistics.frame: own.measure(seen, frame),
            "refresh": refresh,
            "sample": lambda gaussian=gaussian, noise=noise: gaussian.sample(noise),
            "solve": lambda gaussian=gaussian, noise=noise: gaussian.solve(noise),
        }
        held: list[Tensor] = [*gaussian.state.values()]
        statistics.map(lambda tensor, held=held: held.append(tensor) or tensor)
        rows[width] = {name: min(measure.seconds(call, repeats, time.process_time)) for name, call in calls.items()}
        rows[width]["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in held)
        if rows[width]["bytes"] > MOST_BYTES:
            break
    upper = list(rows.items())[-3:]
    at = np.log([width for width, _ in upper])
    exponents = {key: float(np.polyfit(at, np.log([row[key] for _, row in upper]), 1)[0]) for key in upper[0][1]}
    return {"widths": {str(width): row for width, row in rows.items()}, "exponents": exponents}


# -- the items ---------------------------------------------------------------------------------------------------------


def run(item: str, chosen: list[tuple[str, str]], seeds: tuple[int, ...]) -> None:
    """Compute what is missing of an item, and keep it row by row."""
    path = RESULTS / f"{item}.json"
    kept: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    missing = [names for names in chosen if "/".join(names) not in kept]
    if not missing:
        return
    torch.set_num_threads(1)
    modes = [Mode.of(item, seed) for seed in seeds] if item in PROBLEMS else []
    for structure, damping in tqdm(missing, desc=item):
        if item == "cost":
            row: dict[str, Any] = cost(structure, damping)
        else:
            found = [
                {
                    **beside_the_fisher(mode, structure, damping),
                    **as_trainer(mode.problem, structure, damping, seed),
                }
                for seed, mode in zip(seeds, modes, strict=True)
            ]
            row = {key: [own[key] for own in found] for key in found[0]}
        kept["/".join((structure, damping))] = row
        measure.keep(path, {"rows": dict(sorted(kept.items())), "seeds": list(seeds)})


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", default=["energy", "mnist", "cost"], help="energy, mnist, cost")
    parser.add_argument("--structures", nargs="*", help="only these; by default all of the registry")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    arguments = parser.parse_args()
    chosen = [own for own in names() if not arguments.structures or own[0] in arguments.structures]
    for item in arguments.items:
        run(item, chosen, tuple(arguments.seeds))


if __name__ == "__main__":
    main()
