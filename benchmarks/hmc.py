"""Posteriors beside Hamiltonian Monte Carlo: Pyro's NUTS of a network with one hidden layer, and every structure.

``python benchmarks/hmc.py`` does what is missing of four steps, each resumable, a file for each job:

- noise: the noise's standard deviation of each data set, learned by noisy K-FAC with the paper's Gamma(6, 6) prior on
  the training part alone; the cubic's is known, and Snelson's is Rice's (1984), of differences between neighbours. From
  there on it is fixed, and the same for every method.
- chains: four of NUTS for each set, in ``.cache/hmc``, or in the folder that ``BAYES_KFAC_CACHE`` names, with the
  network's outputs at the test inputs for each draw.
- nuts: of the chains of each set, mean, standard deviation and quantiles of the output at each test input, and how well
  the chains have mixed, in ``benchmarks/results/hmc/nuts``. Chains are run only where this is missing.
- posteriors: ``hmc_posteriors.py``, in ``benchmarks/results/hmc/posteriors``.

The network has 50 ReLU units and a prior N(0, 1) on every weight and bias, as in the noisy K-FAC paper. Data are the
first of Gal's splits, standardised; of power a random 1000 of the training examples, and 200 of the test inputs.
``python benchmarks/hmc_report.py`` draws the pictures.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pyro
import torch
from hmc_problems import load
from jobs import Job
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor, nn

import bayes_kfac as bk

HIDDEN = 50
PRIOR_PRECISION = 1.0
CHAINS = 4
#: Of Adam, to a mode.
START_STEPS = 1500
#: Where the quantiles of marginals are taken.
LEVELS = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
#: Warm-up, draws and the greatest depth of a trajectory's tree, for each chain; small sets first.
BUDGETS = {
    "cubic": (300, 500, 8),
    "boston": (200, 400, 8),
    "snelson": (150, 250, 8),
    "yacht": (150, 200, 8),
    "energy": (150, 200, 8),
    "concrete": (300, 800, 8),
    "power": (150, 200, 8),
    "wine_red": (150, 200, 8),
}


def network(features: int, hidden: int = HIDDEN) -> nn.Sequential:
    """The network of all methods."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))


# -- noise -------------------------------------------------------------------------------------------------------------


def learned_noise(name: str, epochs: int) -> dict[str, Any]:
    """The noise that noisy K-FAC with the paper's prior finds on the training part."""
    problem = load(name)
    if problem.noise is not None:
        return {"noise": problem.noise, "source": "data"}
    torch.manual_seed(0)
    likelihood = bk.likelihoods.Gaussian(bk.likelihoods.GammaNoise(6.0, 6.0))
    data = torch.utils.data.TensorDataset(problem.x, problem.y)
    bk.fit(
        network(problem.x.shape[1]),
        likelihood,
        torch.utils.data.DataLoader(data, batch_size=32, shuffle=True),
        epochs=epochs,
        statistics_every=2,
        inverse_every=10,
        prior_precision=PRIOR_PRECISION,
        progress=False,
        generator=torch.Generator().manual_seed(0),
    )
    return {"noise": round(float(likelihood.noise_scale), 4), "source": "learned"}


# -- NUTS --------------------------------------------------------------------------------------------------------------


class Potential:
    """The negative log-density of all weights given the data, up to a constant, with its gradient written out.

    The weights are one vector: those of the hidden layer, ``[hidden, features + 1]`` with the biases as the last
    column, and then those of the output with its bias. A leapfrog step is two products of matrices and little else.

    Args:
        x: Inputs, ``[examples, features]``.
        y: Targets, ``[examples, 1]``.
        noise: The noise's standard deviation.
        hidden: Hidden units.
    """

    def __init__(self, x: Tensor, y: Tensor, noise: float, hidden: int = HIDDEN) -> None:
        self.inputs, self.targets = with_one(x), y[:, 0]
        self.precision = noise**-2
        self.shape = (hidden, self.inputs.shape[1])
        self.size = math.prod(self.shape) + hidden + 1
        self.calls = 0

    def __call__(self, sites: dict[str, Tensor]) -> Tensor:
        """What Pyro asks for: the potential of a dictionary of one site."""
        self.calls += 1
        return _WithGradient.apply(sites["weights"], self)

    def value_and_gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The potential and its gradient."""
        hidden, output = weights[: math.prod(self.shape)].view(self.shape), weights[math.prod(self.shape) :]
        units = (self.inputs @ hidden.T).relu_()
        residuals = units @ output[:-1] + output[-1] - self.targets
        scaled = self.precision * residuals
        into_units = torch.outer(scaled, output[:-1]).mul_(units > 0)
        data = torch.cat([(into_units.T @ self.inputs).flatten(), units.T @ scaled, scaled.sum()[None]])
        value = 0.5 * (residuals @ scaled + PRIOR_PRECISION * weights @ weights)
        return value, data.add_(weights, alpha=PRIOR_PRECISION)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, potential: Potential) -> Tensor:
        value, gradient = potential.value_and_gradient(weights)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return outer * ctx.saved_tensors[0], None


def with_one(x: Tensor) -> Tensor:
    """Inputs with a one appended, for the bias."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def functions(weights: Tensor, x: Tensor, hidden: int = HIDDEN) -> Tensor:
    """The outputs of networks, ``[draws, examples]``, of vectors as :class:`Potential` has them."""
    x = with_one(x)
    first, output = weights[:, : hidden * x.shape[1]], weights[:, hidden * x.shape[1] :]
    units = (x @ first.reshape(-1, hidden, x.shape[1]).mT).relu()
    return (units @ output[:, :-1, None]).squeeze(-1) + output[:, -1:]


def start(potential: Potential, seed: int) -> Tensor:
    """The mode that Adam finds from weights of its own: each chain starts at another."""
    generator = torch.Generator().manual_seed(seed)
    weights = (0.3 * torch.randn(potential.size, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=1e-2)
    for _ in range(START_STEPS):
        optimizer.zero_grad()
        potential({"weights": weights}).backward()
        optimizer.step()
    return weights.detach()


def chain(name: str, index: int, noise: float, budget: list[int]) -> dict[str, Any]:
    """Run one chain; the outputs at the test inputs go to a file in the cache."""
    warmup, num_samples, depth = budget
    problem = load(name)
    potential = Potential(problem.x, problem.y, noise)
    weights = start(potential, index)
    pyro.set_rng_seed(index)
    kernel = NUTS(potential_fn=potential, max_tree_depth=depth)
    calls: list[int] = [potential.calls]
    energies: list[float] = []

    def watch(kernel: NUTS, sites: dict[str, Tensor], stage: str, number: int) -> None:
        calls.append(potential.calls)
        energies.append(float(potential.value_and_gradient(sites["weights"].detach())[0]))

    mcmc = MCMC(
        kernel,
        num_samples=num_samples,
        warmup_steps=warmup,
        initial_params={"weights": weights},
        hook_fn=watch,
        disable_progbar=True,
    )
    started, wall = time.process_time(), time.perf_counter()
    mcmc.run()
    seconds = time.process_time() - started
    drawn = mcmc.get_samples()["weights"]
    path = draws_path(name, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, functions(drawn, problem.test_x).numpy())
    diagnostics = mcmc.diagnostics()
    leapfrogs = np.diff(calls)
    halves = np.array_split(np.asarray(energies[warmup:]), 2)
    return {
        "seconds": seconds,
        "wall_seconds": time.perf_counter() - wall,
        "leapfrogs": int(leapfrogs.sum()),
        "leapfrogs_per_draw": float(leapfrogs[warmup:].mean()),
        "step_size": float(kernel.step_size),
        "acceptance": diagnostics["acceptance rate"]["chain 0"],
        "divergences": len(diagnostics["divergences"]["chain 0"]),
        "potential_of_halves": [float(half.mean()) for half in halves],
        "pyro": pyro.__version__,
    }


def cache() -> Path:
    """Where chains are kept."""
    return jobs.cache() / "hmc"


def draws_path(name: str, index: int) -> Path:
    """Where the outputs of a chain's draws are."""
    return cache() / name / f"chain-{index}.npy"


def draws(name: str) -> Tensor:
    """The outputs at the test inputs, ``[chains, draws, examples]``."""
    return torch.stack([torch.as_tensor(np.load(draws_path(name, index))) for index in range(CHAINS)])


@dataclass(frozen=True)
class Marginals:
    """The distribution of the output at each test input, noise left out.

    Attributes:
        mean: Means, ``[examples]``.
        std: Standard deviations.
        quantiles: Quantiles at ``LEVELS``, ``[levels, examples]``.
    """

    mean: Tensor
    std: Tensor
    quantiles: Tensor

    @classmethod
    def of_draws(cls, values: Tensor) -> Marginals:
        """Of draws, ``[draws, examples]``."""
        return cls(values.mean(0), values.std(0), values.quantile(LEVELS, dim=0))


def marginals(name: str) -> Marginals:
    """Those of the chains, as :func:`run` has put them into the cache."""
    with np.load(cache() / name / "marginals.npz") as file:
        return Marginals(*(torch.as_tensor(file[key]) for key in ("mean", "std", "quantiles")))


def mixing(values: Tensor) -> dict[str, float]:
    """R-hat and bulk effective sample size of the output at each input, of ranks as normal quantiles over split chains.

    Args:
        values: ``[chains, draws, examples]``.
    """
    chains, length, _ = values.shape
    ranks = values.double().flatten(0, 1).argsort(0).argsort(0) + 1.0
    normal = torch.special.ndtri((ranks - 0.375) / (chains * length + 0.25)).reshape(values.shape)
    r_hat = split_gelman_rubin(normal, chain_dim=0, sample_dim=1)
    half = length // 2
    split = torch.cat([normal[:, :half], normal[:, length - half :]])
    size = effective_sample_size(split, chain_dim=0, sample_dim=1)
    return {
        "r_hat_median": float(r_hat.median()),
        "r_hat_max": float(r_hat.max()),
        "r_hat_below_1.05": float((r_hat < 1.05).double().mean()),
        "ess_median": float(size.median()),
        "ess_min": float(size.min()),
    }


def summarise(name: str, noise: float, budget: list[int]) -> dict[str, Any]:
    """What the chains of a set say, and the agreement that two halves of them have: what can be asked of others."""
    del noise, budget  # which are kept beside the figures
    values = draws(name)
    everything = Marginals.of_draws(values.flatten(0, 1).double())
    own = [values[pair].flatten(0, 1).double().std(0) for pair in ([0, 1], [2, 3])]
    kept = [json.loads(draws_path(name, index).with_suffix(".json").read_text()) for index in range(CHAINS)]
    return {
        "mixing": mixing(values),
        "r_of_halves": float(torch.corrcoef(torch.stack(own))[0, 1]),
        "chains": [{key: run[key] for key in run if key not in ("arguments", "versions", "machine")} for run in kept],
        "mean": rounded(everything.mean),
        "std": rounded(everything.std),
        "quantiles": [rounded(row) for row in everything.quantiles],
    }


def rounded(values: Tensor) -> list[float]:
    """Numbers as a file keeps them, to five digits."""
    return [float(f"{value:.5g}") for value in values.tolist()]


# -- the command -------------------------------------------------------------------------------------------------------


def noises(names: list[str], results: Path, processes: int, epochs: int) -> dict[str, float]:
    """The noise of each set."""
    wanted = [
        Job(results / "noise" / f"{name}.json", learned_noise, {"name": name, "epochs": epochs}) for name in names
    ]
    return {name: found["noise"] for name, found in zip(names, jobs.run(wanted, processes), strict=True)}


def main() -> None:
    """Run what is missing."""
    parser = jobs.parser(__doc__)
    parser.add_argument("--data", nargs="+", default=list(BUDGETS), choices=list(BUDGETS), metavar="NAME")
    parser.add_argument("--structures", nargs="+", metavar="NAME", help="only these; by default all of the registry")
    parser.add_argument("--chains-only", action="store_true", help="NUTS alone")
    arguments = parser.parse_args()
    with jobs.results_folder(arguments) as folder:
        chosen = arguments.structures if not arguments.chains_only else []
        run(arguments.data, folder / "hmc", arguments.processes, chosen, quick=arguments.quick)


def run(names: list[str], results: Path, processes: int, chosen: list[str] | None, *, quick: bool) -> None:
    """All steps for some sets, one after another, with some structures or with all."""
    found = noises(names, results, processes, 2 if quick else 300)
    for name in names:
        options = {"name": name, "noise": found[name], "budget": [10, 10, 4] if quick else list(BUDGETS[name])}
        summary = Job(results / "nuts" / f"{name}.json", summarise, options)
        if not summary.path.exists():
            paths = [draws_path(name, index).with_suffix(".json") for index in range(CHAINS)]
            jobs.run([Job(path, chain, {**options, "index": i}) for i, path in enumerate(paths)], processes)
        (row,) = jobs.run([summary])
        print(f"{name:10s} noise {found[name]:.3f}", {key: round(value, 3) for key, value in row["mixing"].items()})
        (cache() / name).mkdir(parents=True, exist_ok=True)
        np.savez(cache() / name / "marginals.npz", **{key: row[key] for key in ("mean", "std", "quantiles")})
        import hmc_posteriors  # which is built on this module

        own = {"name": name, "noise": found[name]}
        jobs.run(hmc_posteriors.all_jobs(own, results, chosen, quick=quick), processes)


if __name__ == "__main__":
    main()
