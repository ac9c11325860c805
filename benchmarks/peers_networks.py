"""Stacks of small networks, trained by the methods that ``peers.py`` compares.

A stack's networks may differ in their data and settings; what each becomes does not depend on the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from replicas import ReplicatedLinear
from torch import Tensor, nn
from uci import Splits

BATCH_SIZE = 32
CHUNK = 1024


@dataclass(frozen=True)
class Setting:
    """What a network is trained with.

    Attributes:
        steps: How many.
        decay: The weight decay of the mean loss.
        lr: The step size at the beginning.
        rate: How many inputs and hidden units are dropped.
        hess_init: The curvature that IVON starts from.
    """

    steps: int
    decay: float = 0.0
    lr: float = 1e-2
    rate: float = 0.0
    hess_init: float = 1.0


@dataclass(frozen=True)
class Replica:
    """One network of a stack: the split and the rows of its training part that it learns from."""

    split: int
    rows: Tensor
    setting: Setting


class Network(nn.Module):
    """Independent networks with one hidden ReLU layer: ``[batch, replicas, in]`` to ``[batch, replicas, outputs]``."""

    def __init__(self, replicas: int, in_features: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden = ReplicatedLinear(replicas, in_features, hidden, torch.default_generator)
        self.output = ReplicatedLinear(replicas, hidden, outputs, torch.default_generator)

    def forward(self, inputs: Tensor, rate: Tensor | None = None) -> Tensor:
        """The outputs; with a rate for each replica, of which inputs and hidden units are dropped."""
        hidden = self.hidden(dropped(inputs.transpose(0, 1), rate)).relu()
        return self.output(dropped(hidden, rate)).transpose(0, 1)


def dropped(values: Tensor, rate: Tensor | None) -> Tensor:
    """Values of which each is zero with the probability ``rate``, and larger otherwise, so that the mean is kept."""
    if rate is None:
        return values
    rate = rate.view(-1, 1, 1)
    return values * (torch.rand_like(values) >= rate) / (1 - rate)


# -- training ---------------------------------------------------------------------------------------------------------

#: The loss of each replica from outputs and targets ``[batch, replicas, 1]``.
Loss = Callable[[Tensor, Tensor], Tensor]
#: From inputs ``[examples, replicas, in]`` and a number of samples to outputs ``[samples, examples, replicas, out]``.
Predict = Callable[[Tensor, int], Tensor]


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the mean squared error."""
    return 0.5 * (outputs - targets).square().mean(0).squeeze(-1)


def variance(outputs: Tensor) -> Tensor:
    """The variance that the second output of a mean-variance network says."""
    return nn.functional.softplus(outputs[..., 1:]) + 1e-6


def mean_variance_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean negative log-likelihood, up to a constant."""
    spread = variance(outputs)
    return 0.5 * (spread.log() + (outputs[..., :1] - targets).square() / spread).mean(0).squeeze(-1)


def batches(data: Splits, replicas: list[Replica]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of each step, for each replica in an order of its own."""
    columns = torch.tensor([own.split for own in replicas])
    rows = torch.stack([own.rows for own in replicas], dim=1)
    size = min(BATCH_SIZE, len(rows))
    left = replicas[0].setting.steps
    while left:
        order = rows.gather(0, torch.rand(len(columns), len(rows)).argsort(1).T)
        for own in order[: len(rows) // size * size].split(size)[:left]:
            left -= 1
            yield data.train_x[own, columns], data.train_y[own, columns]


def adam(data: Splits, replicas: list[Replica], hidden: int, loss: Loss) -> Predict:
    """Train a stack whose replicas share the number of steps."""
    setting = replicas[0].setting
    model = Network(len(replicas), data.train_x.shape[-1], hidden, 2 if loss is mean_variance_loss else 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    decays = torch.tensor([own.setting.decay for own in replicas])
    rate = torch.tensor([own.setting.rate for own in replicas]) if setting.rate else None
    for x, y in batches(data, replicas):
        optimizer.zero_grad()
        loss(model(x, rate), y).sum().backward()
        for parameter in model.parameters():
            parameter.grad.addcmul_(decays.view(-1, *[1] * (parameter.dim() - 1)), parameter.detach())
        optimizer.step()
        schedule.step()
    return lambda inputs, samples: torch.stack([model(inputs, rate) for _ in range(samples)])


def ivon(data: Splits, replicas: list[Replica], hidden: int) -> tuple[Predict, Tensor]:
    """Train the posteriors of a stack whose replicas share the setting; the noise of each is learned beside it.

    Everything in the update is elementwise, so that one optimizer of a stack is one optimizer for each replica.
    """
    from ivon import IVON

    setting, count = replicas[0].setting, len(replicas[0].rows)
    model = Network(len(replicas), data.train_x.shape[-1], hidden, 1)
    log_noise = torch.full((len(replicas),), math.log(0.5), requires_grad=True)
    # the curvature's moving average spans the training, so that the posterior narrows slowly: with a shorter memory
    # most weights come to be those of the prior, and held-out errors were larger
    optimizer = IVON(
        model.parameters(),
        lr=setting.lr,
        ess=count,
        weight_decay=setting.decay,
        hess_init=setting.hess_init,
        beta2=1 - 1 / setting.steps,
        clip_radius=1e-2 / (setting.lr * setting.hess_init),  # a weight moves by 0.01 at most in a step, as Adam's do
    )
    noise_optimizer = torch.optim.Adam([log_noise], lr=1e-2)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(own, setting.steps) for own in (optimizer, noise_optimizer)]
    for x, y in batches(data, replicas):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            noise_optimizer.zero_grad()
            (squared_error(model(x), y) / (2 * log_noise).exp() + log_noise).sum().backward()
        for own in (optimizer, noise_optimizer, *schedules):
            own.step()

    def predict(inputs: Tensor, samples: int) -> Tensor:
        outputs = []
        for _ in range(samples):
            with optimizer.sampled_params():
                outputs.append(model(inputs))
        return torch.stack(outputs)

    return predict, log_noise.detach().exp()


# -- many units at once ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How a method is trained and what is tried.

    Attributes:
        loss: Its loss.
        grid: The values of settings that are tried, beside the number of steps.
        members: Networks of an ensemble.
        samples: Samples of each at test time.
        stacks: Whether a stack can hold different settings; they must share the number of steps only.
        is_length_chosen: Whether several numbers of steps are tried, or only the greatest.
        package: What must be installed.
    """

    grid: dict[str, tuple[float, ...]]
    loss: Loss = squared_error
    members: int = 1
    samples: int = 1
    stacks: bool = True
    is_length_chosen: bool = True
    package: str | None = None

    def settings(self, steps: list[int], decay_factor: float = 1.0) -> list[Setting]:
        """All combinations; the prior weighs less in a mean over more examples, so decays are multiplied."""
        own = self.grid | {"decay": tuple(decay_factor * value for value in self.grid.get("decay", (0.0,)))}
        return [
            Setting(count, **dict(zip(own, values, strict=True)))
            for count, *values in product(steps if self.is_length_chosen else steps[-1:], *own.values())
        ]


@dataclass
class Fitted:
    """Trained networks, ``members`` for each unit.

    Attributes:
        units: What each is.
        groups: Positions in the stack of units and members, and how these predict.
        noise: The learned noise of each network of the stack, where a method has one.
        seconds: Processor seconds of training.
    """

    units: list[Replica]
    groups: list[tuple[list[int], Predict]]
    noise: Tensor
    seconds: float

    def predict(self, x: Tensor, samples: int) -> Tensor:
        """Outputs ``[samples · members, examples, units, outputs]`` of inputs ``[examples, splits, features]``."""
        columns = [own.split for own in self.units]
        return torch.cat([self._predict(part[:, columns], samples) for part in x.split(CHUNK)], dim=1)

    def rows(self, data: Splits, rows: list[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """Outputs and targets ``[examples, units]`` of rows of the training part, of each unit its own."""
        index, columns = torch.stack(rows, dim=1), torch.tensor([own.split for own in self.units])
        parts = [self._predict(data.train_x[part, columns], samples) for part in index.split(CHUNK)]
        return torch.cat(parts, dim=1), data.train_y[index, columns, 0]

    @torch.no_grad()
    def _predict(self, x: Tensor, samples: int) -> Tensor:
        units = len(self.units)
        found: dict[int, Tensor] = {}
        for positions, predict in self.groups:
            outputs = predict(x[:, [position % units for position in positions]], samples)
            found |= {position: outputs[:, :, index] for index, position in enumerate(positions)}
        outputs = torch.stack([found[position] for position in range(len(found))], dim=2)
        return outputs.unflatten(2, (-1, units)).movedim(2, 0).flatten(0, 1)


def fit(method: Method, data: Splits, units: list[Replica], members: int, hidden: int) -> Fitted:
    """Train ``members`` networks for each unit, in as few stacks as settings allow."""
    start = time.process_time()
    stack = units * members
    keys = [own.setting if not method.stacks else own.setting.steps for own in stack]
    groups, noise = [], torch.full((len(stack),), math.nan)
    for key in dict.fromkeys(keys):
        positions = [position for position, own in enumerate(keys) if own == key]
        replicas = [stack[position] for position in positions]
        if method.package == "ivon-opt":
            predict, noise[positions] = ivon(data, replicas, hidden)
        else:
            predict = adam(data, replicas, hidden, method.loss)
        groups.append((positions, predict))
    return Fitted(units, groups, noise, time.process_time() - start)
