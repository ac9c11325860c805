"""The stacked Hamiltonian Monte Carlo of ``active_protocol.py`` beside Pyro's NUTS, on the same posteriors.

``python benchmarks/active_protocol_nuts.py`` takes a split of yacht and of boston that is not reported, 20 labels each,
and draws with both samplers, twice with NUTS. Of the functions at the pool's inputs it compares the means, in units of
the standard deviations, and the standard deviations, by their correlation and ratio. NUTS against NUTS is what the
number of draws alone does. It writes ``benchmarks/results/active_protocol/nuts/<data>.json``.
"""

from __future__ import annotations

import time
from typing import Any

import pyro
import torch
from active_learners import HIDDEN, Setting, Stack, log_density, sampled, unpack
from active_protocol import SETTINGS, load
from jobs import Job, parser, run
from pyro.infer import MCMC, NUTS
from torch import Tensor

FIRST = 1000  # seeds from here on are not reported


def nuts(inputs: Tensor, targets: Tensor, setting: Setting, draws: int, seed: int) -> tuple[dict[str, Tensor], int]:
    """Draws of one network's weights, and how many trajectories diverged."""
    features = inputs.shape[-1]

    def potential(values: dict[str, Tensor]) -> Tensor:
        return -log_density(values["place"].unsqueeze(0), inputs, targets, setting)[0]

    pyro.set_rng_seed(seed)
    start = {"place": 0.3 * torch.randn(HIDDEN * (features + 2) + 1)}
    sampler = MCMC(
        NUTS(potential_fn=potential, max_tree_depth=6),
        num_samples=draws,
        warmup_steps=draws,
        initial_params=start,
        disable_progbar=True,
    )
    sampler.run()
    diverged = len(sampler.diagnostics()["divergences"]["chain 0"])
    return unpack(sampler.get_samples()["place"].unsqueeze(1), features), diverged


def compare(first: Tensor, second: Tensor) -> dict[str, float]:
    """Of functions ``[draws, n]`` by two samplers: means, in standard deviations, and standard deviations."""
    std, other = first.std(0), second.std(0)
    return {
        "mean_difference": float(((first.mean(0) - second.mean(0)) / std).square().mean().sqrt()),
        "std_correlation": float(torch.corrcoef(torch.stack([std, other]))[0, 1]),
        "std_ratio": float((other / std).mean()),
    }


def work(data: str, draws: int) -> dict[str, Any]:
    """Both samplers on the labels of one seed."""
    problem, setting = load(data, FIRST, 1), SETTINGS["HMC"]
    y = problem.y[problem.start].T
    targets = ((y - y.mean(0)) / y.std(0)).float().unsqueeze(-1)
    seeds = torch.arange(1)
    inputs, pool = problem.inputs(problem.start, seeds), problem.inputs(problem.pool, seeds)
    began = time.process_time()
    stack = sampled(inputs, targets, setting, torch.Generator().manual_seed(0))
    own = stack.outputs(pool)[..., 0]
    middle = time.process_time()
    references, diverged = [], []
    for seed in range(2):
        weights, count = nuts(inputs, targets, setting, draws, seed)
        references.append(Stack(weights).outputs(pool)[..., 0])
        diverged.append(count)
    return {
        "HMC against NUTS": compare(torch.cat(references), own),
        "NUTS against NUTS": compare(*references),
        "divergences": diverged,
        "acceptance": float(stack.acceptance),
        "processor_seconds": {"HMC": middle - began, "NUTS, each": (time.process_time() - middle) / 2},
    }


def main() -> None:
    """Compare, where that was not done, and print."""
    arguments = parser(__doc__).parse_args()
    draws = 5 if arguments.quick else 200
    folder = arguments.results / "active_protocol"
    jobs = [Job(folder / "nuts" / f"{data}.json", work, {"data": data, "draws": draws}) for data in ("yacht", "boston")]
    if arguments.quick:
        print(*(job.work(**job.arguments) for job in jobs), sep="\n")
        return
    for job, result in zip(jobs, run(jobs, arguments.processes), strict=True):
        print(job.path.stem, {name: value for name, value in result.items() if " against " in name})


if __name__ == "__main__":
    main()
