"""What a given test log-likelihood costs: seconds of one core, of every method, on UCI regression.

``python benchmarks/cost.py --processes 2`` trains every method with several budgets of steps, each with a step size
that falls to zero at its end, and keeps a file for each data set, split and method in ``benchmarks/results/cost``. The
time to a log-likelihood is that of the smallest budget that reaches it. Networks are trained one by one, as a user
would; only training counts, and Laplace's fit. (On images, ``images.py`` keeps a curve against seconds of each method.)

All methods learn from nine tenths of a split's training part, and choose their one noise on the last tenth: it is the
same for all, and what it costs is left out. Weight decay of plain networks and IVON's settings are in the middle of
the grids of ``peers.py``; ours are those of ``regression.py`` at temperature 1.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import regression
import torch
from networks import mlp
from torch import Tensor, nn
from uci import HERE, load_splits

import bayes_kfac as bk

DATA_SETS = ("concrete", "energy")
SPLITS, SEED = 2, 1
BUDGETS = (250, 500, 1000, 2000, 4000, 8000)
BATCH_SIZE, DRAWS, MEMBERS = 32, 100, 5
NOISES = torch.logspace(-2.4, 0.2, 53)
DECAY = 1e-4
#: Below the best log-likelihood of all methods by so much.
LEVELS = (0.3, 0.1)


@dataclass(frozen=True)
class Problem:
    """One split, standardised: what is learned from, what chooses the noise, and what is to be predicted."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    test_x: Tensor
    test_y: Tensor
    scale: float

    @classmethod
    def of(cls, data: str, split: int) -> Problem:
        """A split of a set; the last tenth of a random order of its training part is held out."""
        own = load_splits(data, split + 1)
        x, y, scale = own.train_x[:, split], own.train_y[:, split], float(own.scale[split])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
        learned, held = order[: -(len(x) // 10)], order[-(len(x) // 10) :]
        return cls(x[learned], y[learned], x[held], y[held], own.test_x[:, split], own.test_y[:, split] / scale, scale)

    def network(self) -> nn.Sequential:
        """The network of all methods."""
        return mlp(self.x.shape[1], 50, 1)

    def batches(self, steps: int, generator: torch.Generator) -> Any:
        """Batches in random order, epoch after epoch."""
        while steps > 0:
            for rows in torch.randperm(len(self.x), generator=generator).split(BATCH_SIZE)[:steps]:
                steps -= 1
                yield self.x[rows], self.y[rows]


#: Outputs at some inputs, ``[draws, examples, 1]``.
Predict = Callable[[Tensor], Tensor]


# -- methods -----------------------------------------------------------------------------------------------------------


def adam(problem: Problem, steps: int, generator: torch.Generator, model: nn.Module | None = None) -> nn.Module:
    """A network trained on squared errors."""
    model = problem.network() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in problem.batches(steps, generator):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model


def ensemble(members: int) -> Callable[..., Predict]:
    """Plain networks from different starts."""

    def train(problem: Problem, steps: int, generator: torch.Generator) -> Predict:
        models = [adam(problem, steps, generator) for _ in range(members)]
        return lambda x: torch.stack([model(x) for model in models])

    return train


def dropout(problem: Problem, steps: int, generator: torch.Generator) -> Predict:
    """Dropout in training and prediction."""
    first, relu, last = problem.network()
    model = adam(problem, steps, generator, nn.Sequential(first, relu, nn.Dropout(0.01), last))
    return lambda x: torch.stack([model(x) for _ in range(DRAWS)])


def laplace(problem: Problem, steps: int, generator: torch.Generator) -> Predict:
    """A Laplace fit to a plain network, prior and noise by the evidence."""
    model, likelihood = adam(problem, steps, generator), bk.likelihoods.Gaussian("learned")
    fitted = bk.Laplace(model, likelihood).fit([(problem.x, problem.y)], progress=False)
    posterior = fitted.optimize_prior_precision(noise=True).posterior()
    normal = torch.randn(DRAWS, 1, 1, generator=generator)

    def predict(x: Tensor) -> Tensor:
        output = posterior.output(x)
        return output.mean + normal * output.variance.sqrt()

    return predict


def ivon(problem: Problem, steps: int, generator: torch.Generator) -> Predict:
    """IVON by its authors' package, with a noise of its own that is learned beside it."""
    import ivon as peer

    model, likelihood = problem.network(), bk.likelihoods.Gaussian("learned")
    num_data = len(problem.x)
    optimizer = peer.IVON(model.parameters(), lr=0.1, ess=num_data, hess_init=1.0, weight_decay=1e-3)
    noise = torch.optim.Adam(likelihood.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in problem.batches(steps, generator):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            noise.zero_grad()
            likelihood(model(x), y).backward()
        optimizer.step()
        noise.step()
        schedule.step()

    def predict(x: Tensor) -> Tensor:
        found = []
        for _ in range(DRAWS):
            with optimizer.sampled_params():
                found.append(model(x))
        return torch.stack(found)

    return predict


def noisy(structure: str, members: int = 1) -> Callable[..., Predict]:
    """Noisy natural gradient by the recipe of ``regression.py``, at temperature 1."""

    def train(problem: Problem, steps: int, generator: torch.Generator) -> Predict:
        posteriors = [one(problem, structure, steps, generator) for _ in range(members)]

        def predict(x: Tensor) -> Tensor:
            draws = DRAWS // members
            return torch.cat(
                [own.predict(x, "sampling", num_samples=draws, generator=generator).outputs for own in posteriors]
            )

        return predict

    return train


def one(problem: Problem, structure: str, steps: int, generator: torch.Generator) -> bk.Posterior:
    """One posterior."""
    model, likelihood = problem.network(), bk.likelihoods.Gaussian("learned")
    optimizer = bk.NoisyNaturalGradient(
        model,
        likelihood,
        num_data=len(problem.x),
        **regression.recipe(structure, temperature=1.0, epochs=1).options(),  # the steps are counted here
        generator=generator,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in problem.batches(steps, generator):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = likelihood(model(x), y)
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        schedule.step()
    return optimizer.posterior()


METHODS: dict[str, Callable[..., Predict]] = {
    "Adam": ensemble(1),
    "5-ensemble": ensemble(MEMBERS),
    "MC dropout": dropout,
    "IVON": ivon,
    "Laplace": laplace,
    "noisy K-FAC": noisy("kron"),
    "5 × noisy K-FAC": noisy("kron", MEMBERS),
    "noisy EK-FAC": noisy("ekfac"),
    "noisy diagonal": noisy("diagonal"),
}


# -- measurements ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihood(problem: Problem, predict: Predict) -> float:
    """That of the test part, in the target's units, with the noise that is best on the held-out part."""

    def densities(outputs: Tensor, targets: Tensor) -> Tensor:
        each = torch.stack([torch.distributions.Normal(outputs, noise).log_prob(targets) for noise in NOISES])
        return (each.logsumexp(1) - math.log(len(outputs))).mean((1, 2))

    best = densities(predict(problem.held_x), problem.held_y).argmax()
    return float(densities(predict(problem.test_x), problem.test_y)[best]) - math.log(problem.scale)


def work(data: str, split: int, method: str, budgets: list[int], seed: int) -> dict[str, Any]:
    """Seconds of the processor and log-likelihood of every budget."""
    problem = Problem.of(data, split)
    found: dict[str, Any] = {"seconds": [], "log_likelihood": []}
    METHODS[method](problem, 2, torch.Generator())  # the first call of everything is slower
    for budget in budgets:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        start = time.process_time()
        predict = METHODS[method](problem, budget, generator)
        found["seconds"].append(time.process_time() - start)
        found["log_likelihood"].append(log_likelihood(problem, predict))
    return found


def all_jobs(folder: Path, data: list[str], methods: list[str], *, quick: bool) -> list[jobs.Job]:
    """A job for each data set, split and method."""
    size: dict[str, Any] = {"budgets": [5, 10] if quick else list(BUDGETS), "seed": SEED}
    return [
        jobs.Job(
            folder / "cost" / name / f"{method.replace(' ', '_')}-{split}.json",
            work,
            {"data": name, "split": split, "method": method, **size},
        )
        for name, split, method in product(data, range(1 if quick else SPLITS), methods)
    ]


# -- what is shown -----------------------------------------------------------------------------------------------------


def load(folder: Path = HERE / "results") -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results by data set and method, one for each split."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted((folder / "cost").glob("*/*.json")):
        own = json.loads(path.read_text())
        names = own["arguments"]
        found.setdefault(names["data"], {}).setdefault(names["method"], []).append(own)
    return found


def seconds_to(level: float, run: dict[str, Any]) -> float:
    """The seconds of the smallest budget that comes to a log-likelihood; infinite where none does."""
    reached = [own for own, value in zip(run["seconds"], run["log_likelihood"], strict=True) if value >= level]
    return min(reached, default=math.inf)


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Seconds to each level, the median over splits, and the best log-likelihood, by data set and method."""
    heads = [f"{name}: {what}" for name in results for what in (*(f"best − {gap:g}" for gap in LEVELS), "its own best")]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for method in METHODS:
        cells = []
        for runs in results.values():
            own = runs.get(method, [])
            best = [max(max(run["log_likelihood"]) for run in split) for split in zip(*runs.values(), strict=True)]
            for gap in LEVELS:
                taken = [seconds_to(level - gap, run) for level, run in zip(best, own, strict=False)]
                found = float(np.median(taken)) if taken else math.nan
                cells.append(f"{found:.2g} s" if math.isfinite(found) else "–")
            cells.append(f"{np.mean([max(run['log_likelihood']) for run in own]):.3f}" if own else "–")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


HEAD = """## Cost

Seconds of one core to a test log-likelihood: within a distance of the best that any method comes to on that split
(`benchmarks/cost.py`; budgets of {budgets} steps, each with its own cosine; median over {splits} splits). What is
chosen before, noise and other settings, is not counted. A dash: no budget came there.

"""


NOTES = """
On regressions of this size noisy K-FAC is the expensive way to a density: two to seven times the seconds of a plain
network to within 0.3 nats of the best, as its steps take about three times as long, and it needs more of them; with the
settings of this table no budget of it comes within 0.1. Laplace around a plain network, prior and noise by the
evidence, costs a ninth of it on concrete and as much on energy (both to within 0.3). IVON's settings are not
tuned to either set. Two splits tell orders of magnitude, not places: what each method is worth when it is tuned is in
the tables of [UCI regression](#uci-regression), and [images](#images) have their own table of seconds.
"""


def section(folder: Path = HERE / "results") -> str:
    """The page's part on cost, where all results are there."""
    results = load(folder)
    wanted = [job.path for job in all_jobs(folder, list(DATA_SETS), list(METHODS), quick=False)]
    if not all(path.exists() for path in wanted):
        return ""
    budgets = ", ".join(map(str, BUDGETS[:-1])) + f" and {BUDGETS[-1]}"
    return HEAD.format(budgets=budgets, splits=SPLITS) + table(results) + NOTES


def main() -> None:
    """Run what is asked for and not yet there; print the table."""
    parser = jobs.parser(__doc__)
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    arguments = parser.parse_args()
    methods = [name for name in arguments.methods if name != "IVON" or find_spec("ivon")]
    with jobs.results_folder(arguments) as folder:
        jobs.run(all_jobs(folder, arguments.data, methods, quick=arguments.quick), arguments.processes)
        print(table(load(folder)))


if __name__ == "__main__":
    main()
