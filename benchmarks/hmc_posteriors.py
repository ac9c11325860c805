"""One posterior beside NUTS: noisy natural gradient or Laplace, with any structure, linearised and sampled.

The jobs of ``hmc.py``. Every method has the network, the prior and the noise of the chains, all training examples in
one batch and the exact Fisher, so that what is left of chance is the start and, in noisy training, the weight samples.
Noisy training has temperature 1 and one recipe for all sets and structures; what the evidence lower bound still gained
in its last fifth is kept beside the figures. Laplace is around a mode that L-BFGS finds from Adam's. The best known
structures have three seeds, whose mixture is compared too, and a Laplace fit of the last layer alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hmc
import structures
import torch
from hmc import LEVELS, Marginals
from hmc_problems import LINES, Problem, load
from jobs import Job
from torch import Tensor, nn

import bayes_kfac as bk

STEPS = 2000
#: The recipe of noisy training.
RECIPE: dict[str, Any] = {
    "lr": 3e-2,
    "statistics_decay": 0.99,
    "statistics_every": 2,
    "inverse_every": 10,
    "kl_clip": None,
    "fisher": "exact",
}
#: The decay of the statistics in the second half: longer averages for the posterior that is kept.
LATE_DECAY = 0.998
DRAWS = 200
#: Structures that are done first, with all seeds, and that all pictures show.
FIRST = ("kron", "ekfac", "diagonal", "dense")
SEEDS = (0, 1, 2)


def all_jobs(options: dict[str, Any], results: Path, chosen: list[str] | None, *, quick: bool) -> list[Job]:
    """A job for each method, structure and damping that makes a difference, the best known ones first."""
    pairs = [pair for pair in structures.names() if chosen is None or pair[0] in chosen]
    pairs.sort(key=lambda pair: (pair[0] not in FIRST, pair))
    steps = 20 if quick else STEPS
    return [
        Job(
            results / "posteriors" / options["name"] / f"{method}-{structure}-{damping}.json",
            job,
            {
                **options,
                "method": method,
                "structure": structure,
                "damping": damping,
                "seeds": list(SEEDS if structure in FIRST else SEEDS[:1]),
                "steps": steps,
            },
        )
        for structure, damping in (pairs[:2] if quick else pairs)
        for method in (("noisy", "laplace", "last_layer") if structure in FIRST else ("noisy", "laplace"))
    ]


def job(
    name: str, noise: float, method: str, structure: str, damping: str, seeds: list[int], steps: int
) -> dict[str, Any]:
    """Train or fit a posterior for each seed; compare both predictions of each, and their mixtures, with the chains.

    Where a training diverges, that is what is found.
    """
    problem = load(name)
    reference = hmc.marginals(name)
    started = time.process_time()
    made: dict[str, list[Marginals]] = {"linearized": [], "sampled": []}
    training = []
    for seed in seeds:
        try:
            posterior, figures = METHODS[method](problem, noise, structure, damping, seed, steps)
        except bk.errors.NonFiniteError as error:
            return {"diverged": str(error)}
        training.append(figures)
        for kind, own in predictions(posterior, problem.test_x, seed).items():
            made[kind].append(own)
    result: dict[str, Any] = {"seconds": (time.process_time() - started) / len(seeds), "training": training}
    for kind, own in made.items():
        each = [compare(one, reference, noise) for one in own]
        result[kind] = {key: [figures[key] for figures in each] for key in each[0]}
        if structure in FIRST:
            result[f"{kind}, mixture"] = compare(mixture(own), reference, noise)
        if structure in FIRST or name in LINES:
            # of the first seed, for the pictures
            result[kind] |= {"mean": hmc.rounded(own[0].mean), "std": hmc.rounded(own[0].std)}
    return result


# -- posteriors --------------------------------------------------------------------------------------------------------


def noisy(
    problem: Problem, noise: float, structure: str, damping: str, seed: int, steps: int
) -> tuple[bk.Posterior, dict[str, Any]]:
    """A posterior trained by noisy natural gradient."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, likelihood = hmc.network(problem.x.shape[1]), bk.likelihoods.Gaussian(noise)
    optimizer = bk.NoisyNaturalGradient(
        model,
        likelihood,
        num_data=len(problem.x),
        structure=structure,
        damping=damping,
        prior_precision=hmc.PRIOR_PRECISION,
        generator=generator,
        **RECIPE,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = likelihood(model(problem.x), problem.y)
        loss.backward()
        return loss.detach()

    bounds = []
    for step in range(1, steps + 1):
        if step == steps // 2:
            for group in optimizer.param_groups:
                group["statistics_decay"] = LATE_DECAY
        optimizer.step(closure)
        schedule.step()
        if step in (steps * 4 // 5, steps):
            bounds.append(evidence_lower_bound(optimizer, problem))
    return optimizer.posterior(), {"elbo": bounds[1], "elbo_gain": bounds[1] - bounds[0]}


@torch.no_grad()
def evidence_lower_bound(optimizer: bk.NoisyNaturalGradient, problem: Problem, num_samples: int = 50) -> float:
    """Of the training part, in nats for each example."""
    posterior = optimizer.posterior()
    outputs = posterior.predict(problem.x, "sampling", num_samples=num_samples).outputs
    fit = torch.stack([-posterior.likelihood(output, problem.y) for output in outputs]).mean()
    return float(fit - posterior.kl() / len(problem.x))


def laplace(
    problem: Problem, noise: float, structure: str, damping: str, seed: int, steps: int, subset: str = "all"
) -> tuple[bk.Posterior, dict[str, Any]]:
    """A posterior fitted around a mode."""
    model = mode(problem, noise, seed, steps)
    fitted = bk.Laplace(
        model,
        bk.likelihoods.Gaussian(noise),
        structure=structure,
        subset=subset,
        damping=damping,
        prior_precision=hmc.PRIOR_PRECISION,
    ).fit([(problem.x, problem.y)], progress=False)
    return fitted.posterior(), {"evidence": float(fitted.log_marginal_likelihood()) / len(problem.x)}


METHODS: dict[str, Callable[..., tuple[bk.Posterior, dict[str, Any]]]] = {
    "noisy": noisy,
    "laplace": laplace,
    "last_layer": partial(laplace, subset="last_layer"),
}


def mode(problem: Problem, noise: float, seed: int, steps: int) -> nn.Sequential:
    """The network at a mode of the posterior."""
    potential = hmc.Potential(problem.x, problem.y, noise)
    weights = hmc.start(potential, seed).requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=steps // 4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = potential({"weights": weights})
        value.backward()
        return value

    optimizer.step(closure)
    return as_network(weights.detach(), problem.x.shape[1])


def as_network(weights: Tensor, features: int, hidden: int = hmc.HIDDEN) -> nn.Sequential:
    """The network with the weights of a vector as :class:`hmc.Potential` has them."""
    model = hmc.network(features, hidden).to(weights.dtype)
    first, output = weights[: hidden * (features + 1)].reshape(hidden, -1), weights[hidden * (features + 1) :]
    state = {"0.weight": first[:, :-1], "0.bias": first[:, -1], "2.weight": output[None, :-1], "2.bias": output[-1:]}
    model.load_state_dict(state)
    return model


# -- beside the chains -------------------------------------------------------------------------------------------------


def predictions(posterior: bk.Posterior, x: Tensor, seed: int) -> dict[str, Marginals]:
    """Linearised, and by draws of the weights."""
    linearized = posterior.predict(x, "linearized")
    mean = linearized.mean.detach().squeeze(-1).double()
    std = linearized.epistemic_variance.detach().squeeze(-1).double().sqrt()
    generator = torch.Generator().manual_seed(seed)
    drawn = posterior.predict(x, "sampling", num_samples=DRAWS, generator=generator).outputs
    return {
        "linearized": Marginals(mean, std, mean + std * torch.special.ndtri(LEVELS)[:, None]),
        "sampled": Marginals.of_draws(drawn.detach().squeeze(-1).double()),
    }


def mixture(parts: list[Marginals]) -> Marginals:
    """Of several posteriors in equal shares: one for each mode that was found."""
    mean = torch.stack([part.mean for part in parts]).mean(0)
    variance = torch.stack([part.std**2 + (part.mean - mean) ** 2 for part in parts]).mean(0)
    return Marginals(mean, variance.sqrt(), torch.cat([part.quantiles for part in parts]).quantile(LEVELS, dim=0))


def compare(own: Marginals, nuts: Marginals, noise: float) -> dict[str, float]:
    """How far marginals are from those of the chains.

    The noise is the same everywhere and adds a constant to variances, so that the correlation of total variances is
    that of the variances without it; of standard deviations it is another.
    """
    distance = (own.quantiles - nuts.quantiles).abs().mean(0)
    return {
        "r_std": correlation(own.std, nuts.std),
        "r_variance": correlation(own.std**2, nuts.std**2),
        "r_total_std": correlation((own.std**2 + noise**2).sqrt(), (nuts.std**2 + noise**2).sqrt()),
        "ratio": float((own.std / nuts.std).mean()),
        "wasserstein": float((distance / nuts.std).mean()),
        "mean_error": float(((own.mean - nuts.mean).abs() / nuts.std).mean()),
    }


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's r."""
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])
