"""One posterior beside NUTS: noisy natural gradient or Laplace, with any structure, linearised and sampled.

The jobs of ``hmc.py``. Every method has the network, the prior and the noise of the chains, all training examples in
one batch and the exact Fisher, so that what is left of chance is the start and, in noisy training, the weight samples.
Noisy training has temperature 1 and one recipe for all sets and structures; what the evidence lower bound still gained
in its last fifth is kept beside the figures. Laplace is around a mode that L-BFGS finds from Adam's.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import hmc
import structures
import torch
from jobs import Job
from torch import Tensor, nn

import bayes_kfac as bk

STEPS = 3000
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
#: Structures that are done first.
FIRST = ("kron", "ekfac", "diagonal", "dense")
CURVES = ("mean", "std")
LEVELS = (torch.arange(200, dtype=torch.float64) + 0.5) / 200


def all_jobs(options: dict[str, Any], results: Path, quick: bool) -> list[Job]:
    """A job for each method, structure and damping that makes a difference, the cheap and best known ones first."""
    pairs = sorted(structures.names(), key=lambda pair: (pair[0] not in FIRST, pair))
    steps = 20 if quick else STEPS
    return [
        Job(
            results / "posteriors" / options["name"] / f"{method}-{structure}-{damping}.json",
            job,
            {**options, "method": method, "structure": structure, "damping": damping, "seed": 0, "steps": steps},
        )
        for structure, damping in (pairs[:2] if quick else pairs)
        for method in ("noisy", "laplace")
    ]


def job(
    name: str, noise: float, method: str, structure: str, damping: str, seed: int, steps: int, cache: str
) -> dict[str, Any]:
    """Train or fit one posterior, and compare both of its predictions with the chains."""
    problem = hmc.load(name)
    started = time.process_time()
    trained = noisy if method == "noisy" else laplace
    posterior, figures = trained(problem, noise, structure, damping, seed, steps)
    seconds = time.process_time() - started
    reference = hmc.draws(name, Path(cache)).flatten(0, 1).double()
    found = {
        kind: compare(values, reference, noise) for kind, values in predictions(posterior, problem.test_x, seed).items()
    }
    if structure not in FIRST:  # the curves of those that pictures show are enough
        found = {kind: {key: value for key, value in own.items() if key not in CURVES} for kind, own in found.items()}
    return {"seconds": seconds, **figures, **found}


# -- posteriors --------------------------------------------------------------------------------------------------------


def noisy(
    problem: hmc.Problem, noise: float, structure: str, damping: str, seed: int, steps: int
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
def evidence_lower_bound(optimizer: bk.NoisyNaturalGradient, problem: hmc.Problem, num_samples: int = 50) -> float:
    """Of the training part, in nats for each example."""
    posterior = optimizer.posterior()
    outputs = posterior.predict(problem.x, "sampling", num_samples=num_samples).outputs
    fit = torch.stack([-posterior.likelihood(output, problem.y) for output in outputs]).mean()
    return float(fit - posterior.kl() / len(problem.x))


def laplace(
    problem: hmc.Problem, noise: float, structure: str, damping: str, seed: int, steps: int
) -> tuple[bk.Posterior, dict[str, Any]]:
    """A posterior fitted around a mode."""
    model = mode(problem, noise, seed, steps)
    fitted = bk.Laplace(
        model,
        bk.likelihoods.Gaussian(noise),
        structure=structure,
        damping=damping,
        prior_precision=hmc.PRIOR_PRECISION,
    ).fit([(problem.x, problem.y)], progress=False)
    return fitted.posterior(), {"evidence": float(fitted.log_marginal_likelihood()) / len(problem.x)}


def mode(problem: hmc.Problem, noise: float, seed: int, steps: int) -> nn.Sequential:
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


def predictions(posterior: bk.Posterior, x: Tensor, seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Means, standard deviations and quantiles ``[levels, examples]`` of the outputs, noise left out."""
    linearized = posterior.predict(x, "linearized")
    mean = linearized.mean.detach().squeeze(-1).double()
    std = linearized.epistemic_variance.detach().squeeze(-1).double().sqrt()
    generator = torch.Generator().manual_seed(seed)
    sampled = posterior.predict(x, "sampling", num_samples=DRAWS, generator=generator).outputs
    sampled = sampled.detach().squeeze(-1).double()
    return {
        "linearized": (mean, std, mean + std * torch.special.ndtri(LEVELS)[:, None]),
        "sampled": (sampled.mean(0), sampled.std(0), sampled.quantile(LEVELS, dim=0)),
    }


def compare(predicted: tuple[Tensor, Tensor, Tensor], reference: Tensor, noise: float) -> dict[str, Any]:
    """How far the marginals of outputs are from those of draws ``[draws, examples]``.

    The noise is the same everywhere and adds a constant to variances, so that the correlation of total variances is
    that of the variances without it; of standard deviations it is another.
    """
    mean, std, quantiles = predicted
    own_std = reference.std(0)
    distance = (quantiles - reference.quantile(LEVELS, dim=0)).abs().mean(0)
    return {
        "r_std": correlation(std, own_std),
        "r_variance": correlation(std**2, own_std**2),
        "r_total_std": correlation((std**2 + noise**2).sqrt(), (own_std**2 + noise**2).sqrt()),
        "ratio": float((std / own_std).mean()),
        "wasserstein": float((distance / own_std).mean()),
        "mean_error": float(((mean - reference.mean(0)).abs() / own_std).mean()),
        "mean": hmc.rounded(mean),
        "std": hmc.rounded(std),
    }


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's r."""
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])
