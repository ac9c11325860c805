"""What learns in the active-learning protocol: stacks of small networks that are trained from scratch in each round.

All have one hidden layer of 50 ReLU units and the same model: a Gaussian prior over the weights, a Gamma(6, 6) prior
over the noise's precision, and a likelihood to the power ``1 / temperature``. Inputs are ``[n, replicas, features]``,
targets ``[n, replicas, 1]``; each replica is a network with data of its own.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from replicas import ReplicatedMLP
from stacked_hmc import hmc, split_rhat
from torch import Tensor, nn

import bayes_kfac as bk

HIDDEN = 50
NOISE = (6.0, 6.0)  # concentration and rate of the prior of the noise's precision
DRAWS = 100


@dataclass(frozen=True)
class Setting:
    """How to train.

    Attributes:
        temperature: The weight of the KL term; the likelihood is taken to the power of its inverse.
        steps: Steps of training; iterations of HMC, of which the first half is its warm-up.
    """

    temperature: float = 1.0
    steps: int = 300


def prior_precision(features: int) -> dict[str, float]:
    """The prior's precision of each layer: as many as its inputs and 1, as in probabilistic backpropagation."""
    return {"hidden": features + 1.0, "output": HIDDEN + 1.0}


class Stack:
    """Trained networks: draws of their weights, ``{name: [draws, replicas, ...]}``."""

    def __init__(self, draws: Mapping[str, Tensor]) -> None:
        self.draws = dict(draws)

    def outputs(self, inputs: Tensor, replicas: Tensor | slice = slice(None)) -> Tensor:
        """The functions of each draw, ``[draws, n, replicas]``, of some replicas: ``inputs`` are theirs."""
        values = {name: value[:, replicas] for name, value in self.draws.items()}
        count = len(values["hidden.bias"])
        return torch.stack([forward({name: v[i] for name, v in values.items()}, inputs) for i in range(count)])

    def mean(self, inputs: Tensor) -> Tensor:
        """The mean prediction, ``[n, replicas]``."""
        return self.outputs(inputs).mean(0)

    def posterior(self, replica: int) -> bk.Posterior:
        """The Gaussian posterior of one network."""
        raise NotImplementedError


def forward(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """What networks of some weights, ``[replicas, ...]``, make of ``[n, replicas, features]``: ``[n, replicas]``."""
    hidden = torch.baddbmm(weights["hidden.bias"].unsqueeze(1), inputs.transpose(0, 1), weights["hidden.weight"].mT)
    return torch.baddbmm(weights["output.bias"].unsqueeze(1), hidden.relu(), weights["output.weight"].mT)[..., 0].mT


def network(features: int) -> nn.Sequential:
    """One network, its layers named as in a stack."""
    layers = {"hidden": nn.Linear(features, HIDDEN), "relu": nn.ReLU(), "output": nn.Linear(HIDDEN, 1)}
    return nn.Sequential(OrderedDict(layers))


# -- noisy natural gradient --------------------------------------------------------------------------------------------


class NoisyStack(Stack):
    """Networks whose posteriors were trained by noisy natural gradient."""

    def __init__(self, posterior: bk.Posterior, generator: torch.Generator) -> None:
        super().__init__(posterior.sample(DRAWS, generator=generator).values)
        self._posterior = posterior

    def posterior(self, replica: int) -> bk.Posterior:  # noqa: D102
        whole = self._posterior
        scale = whole.likelihood.noise_scale[replica, 0]
        mean = {name: value[replica] for name, value in whole.mean.items()}
        return bk.Posterior(
            network(mean["hidden.weight"].shape[1]),
            bk.likelihoods.Gaussian(scale),
            {name: block.map(lambda tensor: tensor[replica]) for name, block in whole.blocks.items()},
            prior_precision=whole.prior_precision,
            provenance=whole.provenance,
            mean=mean,
        )


def noisy(inputs: Tensor, targets: Tensor, setting: Setting, generator: torch.Generator, structure: str) -> NoisyStack:
    """Train posteriors; all labelled examples are in each step, and the step size falls by ten in the middle."""
    number, replicas, features = inputs.shape
    model = ReplicatedMLP(replicas, features, HIDDEN, generator)
    likelihood = bk.likelihoods.Gaussian(bk.likelihoods.GammaNoise(*NOISE, shape=(replicas, 1)))
    groups = [
        {"params": list(model.get_submodule(name).parameters()), "prior_precision": precision}
        for name, precision in prior_precision(features).items()
    ]
    lr = 0.1
    optimizer = bk.NoisyNaturalGradient(
        model,
        likelihood,
        num_data=number,
        structure=structure,
        fisher="exact",
        lr=lr,
        temperature=setting.temperature,
        statistics_every=5,
        inverse_every=10,
        kl_clip=None,
        groups=groups,
        generator=generator,
    )
    for step in range(setting.steps):
        if step == setting.steps // 2:
            for group in optimizer.param_groups:
                if group["kind"] == "block":
                    group["lr"] = lr / 10
        with optimizer.sampled_params():
            optimizer.zero_grad()
            likelihood(model(inputs), targets).backward()
        optimizer.step()
    return NoisyStack(optimizer.posterior(), generator)


# -- Laplace -----------------------------------------------------------------------------------------------------------


class LaplaceStack(Stack):
    """Modes, and a Laplace approximation around each when it is asked for."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, scale: Tensor) -> None:
        super().__init__({name: value.detach().unsqueeze(0) for name, value in model.named_parameters()})
        self._inputs, self._targets, self._scale = inputs, targets, scale

    def posterior(self, replica: int) -> bk.Posterior:  # noqa: D102
        own = network(self._inputs.shape[-1])
        own.load_state_dict({name: value[0, replica] for name, value in self.draws.items()})
        data = [(self._inputs[:, replica], self._targets[:, replica])]
        laplace = bk.Laplace(own, bk.likelihoods.Gaussian(self._scale[replica])).fit(data, progress=False)
        return laplace.optimize_prior_precision().posterior()


def laplace(inputs: Tensor, targets: Tensor, setting: Setting, generator: torch.Generator) -> LaplaceStack:
    """Train modes by Adam; the noise is its posterior there, the approximation's precisions are by the evidence."""
    number, replicas, features = inputs.shape
    model = ReplicatedMLP(replicas, features, HIDDEN, generator)
    noise = bk.likelihoods.GammaNoise(*NOISE, shape=(replicas, 1))
    likelihood = bk.likelihoods.Gaussian(noise)
    parameters = [*model.parameters(), *likelihood.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    precision = prior_precision(features)
    for _ in range(setting.steps):
        optimizer.zero_grad()
        penalty = sum(
            0.5 * precision[name] * p.square().sum() for name in precision for p in getattr(model, name).parameters()
        )
        nll = number * likelihood(model(inputs), targets)
        (nll + setting.temperature * (penalty + likelihood.kl())).backward()
        optimizer.step()
        schedule.step()
    return LaplaceStack(model, inputs, targets, likelihood.noise_scale[:, 0])


# -- Hamiltonian Monte Carlo -------------------------------------------------------------------------------------------


class SampledStack(Stack):
    """Draws of Hamiltonian Monte Carlo.

    Attributes:
        acceptance: The mean probability of acceptance of each network.
    """

    def __init__(self, draws: Mapping[str, Tensor], acceptance: Tensor) -> None:
        super().__init__(draws)
        self.acceptance = acceptance

    def rhat(self, inputs: Tensor) -> Tensor:
        """The split-R̂ of the functions at some inputs, ``[n, replicas]``."""
        return split_rhat(self.outputs(inputs))


def log_density(place: Tensor, inputs: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """The log-posterior of standardised weights ``[replicas, ...]``, the noise's precision integrated out."""
    prior = -0.5 * place.square().sum(1)
    residuals = forward(unpack(place, inputs.shape[-1]), inputs) - targets[..., 0]
    concentration = NOISE[0] + 0.5 * len(inputs) / setting.temperature
    rate = NOISE[1] + 0.5 * residuals.square().sum(0) / setting.temperature
    return prior - concentration * rate.log()


def unpack(place: Tensor, features: int) -> dict[str, Tensor]:
    """Weights from coordinates in which the prior is standard normal, ``[..., dimensions]``."""
    shapes = {"hidden.weight": (HIDDEN, features), "hidden.bias": (HIDDEN,)}
    shapes |= {"output.weight": (1, HIDDEN), "output.bias": (1,)}
    precision = prior_precision(features)
    parts = place.split([math.prod(shape) for shape in shapes.values()], dim=-1)
    return {
        name: part.unflatten(-1, shape) / precision[name.split(".")[0]] ** 0.5
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def sampled(inputs: Tensor, targets: Tensor, setting: Setting, generator: torch.Generator) -> SampledStack:
    """Draw weights; chains start at draws from the prior."""
    _, replicas, features = inputs.shape
    start = 0.3 * torch.randn(replicas, HIDDEN * (features + 2) + 1, generator=generator)
    half = setting.steps // 2
    chains = hmc(
        lambda place: log_density(place, inputs, targets, setting),
        start,
        warmup=half,
        iterations=half,
        keep=DRAWS,
        generator=generator,
    )
    return SampledStack(unpack(chains.draws, features), chains.acceptance)


METHODS = {
    "noisy K-FAC": lambda *arguments: noisy(*arguments, "kron"),
    "noisy Adam": lambda *arguments: noisy(*arguments, "diagonal"),
    "Laplace": laplace,
    "HMC": sampled,
}
