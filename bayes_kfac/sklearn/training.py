"""The two ways to a posterior: noisy natural gradient, and Laplace around weights that Adam found with the same prior.

Both go through the examples in proportion to their weights, decay the step size along a half cosine, tune the precision
of each layer's prior on the way by the marginal likelihood where none is given, and stop early by the log-likelihood of
a validation part at the mean weights, if there is one; the posterior is then that of the best epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import bayes_kfac as bk
from bayes_kfac.sklearn.examples import Batches
from bayes_kfac.structures import Structure
from bayes_kfac.training.fit import FitState
from bayes_kfac.training.tuning import EXTRINSIC_DAMPING, tune_prior_precision

#: How often the priors are tuned on the way, after the first tenth of the epochs.
TUNINGS = 20
#: Between what the prior's precision is kept: weights that are all zero would have an infinite one.
PRIOR_BOUNDS = (1e-4, 1e4)
#: The least noise, for standardised targets.
LEAST_NOISE = 1e-4
#: At how many examples the noise is looked at.
LOOKED_AT = 4096


@dataclass(frozen=True)
class Plan:
    """What is to be trained, and how.

    Attributes:
        epochs: Passes over the data.
        lr: The first step size.
        prior_precision: The prior's precision; ``None`` to tune one for each layer by the marginal likelihood.
        temperature: The weight of the prior against the data; 1 is Bayes.
        structure: The family of the posterior's blocks.
        options: ``damping`` and ``fisher``, where they are not the method's own.
        patience: Epochs without a better validation score before training stops.
        generator: The source of randomness of weights and sampled targets.
        progress: Whether to show a progress bar.
    """

    epochs: int
    lr: float
    prior_precision: float | None
    temperature: float
    structure: str | Structure
    options: dict[str, Any]
    patience: int
    generator: torch.Generator
    progress: bool

    def is_tuning(self, epoch: int) -> bool:
        """Whether prior and noise are tuned after an epoch, counted from 1."""
        every = max(1, self.epochs // TUNINGS)
        return epoch % every == 0 and self.epochs < 10 * epoch < 10 * self.epochs

    def laplace(self, batches: Batches) -> dict[str, Any]:
        """Arguments of a Laplace fit."""
        return {"structure": self.structure, **self.scale(batches), **self.options}

    def scale(self, batches: Batches) -> dict[str, Any]:
        """``num_data`` and ``temperature``, whose ratio is the sum of weights over the temperature."""
        # a number of data is whole, and no less than a batch holds; the temperature takes up the rest
        total = batches.examples.total
        num_data = max(round(total), min(batches.size, len(batches.examples)))
        return {"num_data": num_data, "temperature": self.temperature * num_data / total}


@dataclass
class Record:
    """How a training went.

    Attributes:
        losses: The mean negative log-likelihood of each epoch's batches, in nats.
        scores: The mean log-likelihood of the validation part after each epoch; empty where there is none.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def is_best(self) -> bool:
        """Whether the last epoch's score is above all before it."""
        return self.scores[-1] > max(self.scores[:-1], default=-math.inf)

    @property
    def stale(self) -> int:
        """Epochs since the best one."""
        return len(self.scores) - 1 - self.scores.index(max(self.scores))


def train_noisy(
    network: nn.Sequential, likelihood: bk.likelihoods.Likelihood, batches: Batches, held: Batches | None, plan: Plan
) -> tuple[bk.Posterior, Record]:
    """Train a posterior by noisy natural gradient.

    Below temperature 1 a regression is trained at temperature 1 first, and goes on from there with the noise that was
    learned: beside a colder posterior, which follows the targets further, it would be learned too small, and down to
    nothing where the network can follow them all the way.

    Args:
        network: The network; ends at the posterior's mean.
        likelihood: What its output means; its noise is learned, and kept from then on below temperature 1.
        batches: The training examples.
        held: The validation examples.
        plan: How to train.

    Returns:
        The posterior, and how training went.
    """
    if plan.temperature < 1 and isinstance(likelihood, bk.likelihoods.Gaussian):
        at_one = replace(plan, temperature=1.0)
        warm, _ = train_noisy(network, copy.deepcopy(likelihood), batches, held, at_one)
        set_noise(likelihood, cast(bk.likelihoods.Gaussian, warm.likelihood).noise_scale.square())
    record = Record()
    best: list[bk.Posterior] = []

    def after_epoch(state: FitState) -> bool:
        record.losses.append(state.nll)
        if plan.prior_precision is None and plan.is_tuning(state.epoch):
            tune_prior_precision(state.optimizer)
        if held is None:
            return False
        record.scores.append(mean_log_likelihood(network, likelihood, held))
        if record.is_best:
            best[:] = [state.optimizer.posterior()]
        return record.stale >= plan.patience

    posterior = bk.fit(
        network,
        likelihood,
        batches,
        epochs=plan.epochs,
        structure=plan.structure,
        lr=plan.lr,
        prior_precision=1.0 if plan.prior_precision is None else plan.prior_precision,
        extrinsic_damping=EXTRINSIC_DAMPING,
        groups=[{"params": list(layer.parameters())} for layer in linear_layers(network).values()],
        callbacks=[after_epoch],
        generator=plan.generator,
        progress=plan.progress,
        # fresher than by default: of small networks that costs little, and while the noise falls curvature changes fast
        statistics_every=5,
        inverse_every=20,
        **plan.scale(batches),
        **plan.options,
    )
    return best[0] if best else posterior, record


def train_laplace(
    network: nn.Sequential, likelihood: bk.likelihoods.Likelihood, batches: Batches, held: Batches | None, plan: Plan
) -> tuple[bk.Posterior, Record]:
    """Find the most probable weights by Adam, and the Laplace posterior there; priors and noise by the data on the way.

    Tuning on the way is that of Immer et al. 2021 (Scalable Marginal Likelihood Estimation for Model Selection in Deep
    Learning).

    Args:
        network: The network; ends at the posterior's mean.
        likelihood: What its output means; its noise is changed.
        batches: The training examples.
        held: The validation examples.
        plan: How to train.

    Returns:
        The posterior, and how training went.
    """
    layers = linear_layers(network)
    precisions = dict.fromkeys(layers, 1.0 if plan.prior_precision is None else plan.prior_precision)

    def penalty() -> Tensor:
        squares = [d * p.square().sum() for name, d in precisions.items() for p in layers[name].parameters()]
        return 0.5 * torch.stack(squares).sum()

    def fitted() -> bk.Laplace:
        laplace = bk.Laplace(
            network, likelihood, prior_precision=precisions, generator=plan.generator, **plan.laplace(batches)
        )
        return laplace.fit(batches.whole(), progress=False)

    def tune() -> None:
        laplace = fitted()
        if plan.prior_precision is None:
            found = laplace.optimize_prior_precision().prior_precision
            precisions.update({name: min(max(float(d), PRIOR_BOUNDS[0]), PRIOR_BOUNDS[1]) for name, d in found.items()})
        if isinstance(likelihood, bk.likelihoods.Gaussian):
            set_noise(likelihood, expected_squares(laplace.posterior(), batches, plan.temperature))

    record = find_mode(network, likelihood, batches, held, plan, penalty, tune)
    tune()
    return fitted().posterior(), record


def update_laplace(prior: bk.Posterior, total: float, batches: Batches, plan: Plan) -> tuple[bk.Posterior, Record]:
    """Take in more data, with the posterior of the data before as their prior.

    Args:
        prior: The posterior; its network ends at the new posterior's mean.
        total: How many examples it is from: the new noise is that of all.
        batches: The new examples.
        plan: How to train; prior and structure are those of the posterior.

    Returns:
        The posterior of all data, and how training went.
    """
    prior = prior.nearest_matrix_normal()
    network = cast(nn.Sequential, prior.model)
    network.load_state_dict(prior.mean)
    likelihood = copy.deepcopy(prior.likelihood)
    old_noise = likelihood.noise_scale**2 if isinstance(likelihood, bk.likelihoods.Gaussian) else torch.zeros(())

    def fitted() -> bk.Laplace:
        laplace = bk.Laplace(network, likelihood, prior=prior, generator=plan.generator, **plan.laplace(batches))
        return laplace.fit(batches.whole(), progress=False)

    def tune() -> None:
        if isinstance(likelihood, bk.likelihoods.Gaussian):
            new, share = expected_squares(fitted().posterior(), batches, plan.temperature), batches.examples.total
            set_noise(likelihood, (total * old_noise + share * new) / (total + share))

    record = find_mode(network, likelihood, batches, None, plan, prior.penalty, tune)
    tune()
    return fitted().posterior(), record


@torch.no_grad()
def expected_squares(posterior: bk.Posterior, batches: Batches, temperature: float) -> Tensor:
    """The mean over examples of ``E[(target − output)²]`` under the posterior at temperature 1, ``[outputs]``.

    As the noise's variance it is the M-step of expectation maximisation, whose fixed point is the residuals' sum of
    squares over ``num_data`` less the number of directions that the data determine, as that of the evidence is (MacKay
    1992); the residuals alone are too small where a network follows the noise. A colder network follows it further,
    and its posterior is narrower: beside that the noise would vanish. So the variance is taken over the temperature,
    ``((N/τ) F + δ I)⁻¹ / τ = (N F + τδ I)⁻¹``, which is that of temperature 1 around the same weights.

    Args:
        posterior: The posterior.
        batches: The examples; of many, some are looked at.
        temperature: That of the posterior.

    Returns:
        The means, by the examples' weights.
    """
    chosen = torch.linspace(0, len(batches.inputs) - 1, min(len(batches.inputs), LOOKED_AT)).long()
    output = posterior.output(batches.inputs[chosen])
    squares = (output.mean - batches.targets[chosen]).square() + output.variance / temperature
    weights = batches.weights[chosen] / batches.weights[chosen].sum()
    return weights @ squares


def set_noise(likelihood: bk.likelihoods.Gaussian, variance: Tensor) -> None:
    """Give the likelihood noise of this variance, ``[outputs]``."""
    likelihood.noise = bk.likelihoods.FixedNoise(variance.clamp(min=LEAST_NOISE**2).sqrt())


def find_mode(
    network: nn.Sequential,
    likelihood: bk.likelihoods.Likelihood,
    batches: Batches,
    held: Batches | None,
    plan: Plan,
    penalty: Callable[[], Tensor],
    tune: Callable[[], None],
) -> Record:
    """Minimise the negative log-likelihood of all data over the temperature plus a penalty, by Adam.

    Args:
        network: The network.
        likelihood: What its output means.
        batches: The training examples.
        held: The validation examples.
        plan: How to train.
        penalty: Minus the logarithm of the prior's density, up to a constant.
        tune: Changes the penalty and the noise to what suits the present weights; called some times on the way.

    Returns:
        How training went.
    """
    from tqdm.auto import trange

    record = Record()
    optimizer = torch.optim.Adam(network.parameters(), lr=plan.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.epochs)
    share = plan.temperature / batches.examples.total
    best: list[dict[str, Any]] = []
    with trange(plan.epochs, desc="fit", unit="epoch", disable=not plan.progress) as bar:
        for epoch in bar:
            total = 0.0
            for inputs, targets in batches:
                optimizer.zero_grad()
                loss = likelihood(network(inputs), targets)
                (loss + share * penalty()).backward()
                optimizer.step()
                total += float(loss.detach()) * len(inputs)
            schedule.step()
            record.losses.append(total / len(batches.examples))
            bar.set_postfix(nll=f"{record.losses[-1]:.4f}")
            if plan.is_tuning(epoch + 1):
                tune()
            if held is not None:
                record.scores.append(mean_log_likelihood(network, likelihood, held))
                if record.is_best:
                    best = [copy.deepcopy(module.state_dict()) for module in (network, likelihood)]
                if record.stale >= plan.patience:
                    break
    for module, state in zip((network, likelihood), best, strict=False):  # nothing without a validation part
        module.load_state_dict(state)
    return record


@torch.no_grad()
def mean_log_likelihood(network: nn.Sequential, likelihood: bk.likelihoods.Likelihood, batches: Batches) -> float:
    """The mean log-likelihood of examples at the weights as they are, by their weights, in nats."""
    losses = likelihood.negative_log_likelihood(network(batches.inputs), batches.targets)
    return -float((losses * batches.weights).sum() / batches.weights.sum())


def linear_layers(network: nn.Sequential) -> dict[str, nn.Linear]:
    """The layers that have weights, by name."""
    return {name: layer for name, layer in network.named_children() if isinstance(layer, nn.Linear)}
