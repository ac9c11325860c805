"""What a step gives does not depend on how the loop comes by its gradients: a matrix of structures, nets and changes.

Every change below keeps the data, the loss and the weight samples, so that statistics, posterior and weights must stay
what they are to the order of the sums. Weight samples come from a generator that is set before each context; the exact
and the empirical Fisher leave nothing else to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayes_kfac as bk
from tests.helpers import matrices, randn, rng, seeded
from tests.posteriors import FAMILY_NAMES

STEPS, EXAMPLES = 2, 6
SAME = {"rtol": 1e-9, "atol": 1e-9}


class Varied(nn.Module):
    """A net whose forward pass can be made in other ways: a half of the positions at a time, or checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.in_halves = self.is_checkpointed = False

    def forward(self, inputs: Tensor) -> Tensor:
        if self.is_checkpointed:
            return checkpoint(self.run, inputs, use_reentrant=False)
        return self.run(inputs)

    def run(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def by_halves(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """A function of each of four positions, called on two of them at a time."""
        return torch.cat([function(half) for half in inputs.split(2 if self.in_halves else 4, dim=1)], dim=1)


class Perceptron(Varied):
    """A layer that is shared by positions, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(2, 3), nn.Linear(12, 2)

    def run(self, inputs: Tensor) -> Tensor:
        return self.head(self.by_halves(self.shared, inputs).tanh().flatten(1))


class Convolutional(Varied):
    """A convolution, normalised channels, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Linear(16, 2)

    def run(self, inputs: Tensor) -> Tensor:
        if self.in_halves:  # each row of outputs needs two rows of inputs
            maps = torch.cat([self.conv(inputs[:, :, :2]), self.conv(inputs[:, :, 1:])], dim=2)
        else:
            maps = self.conv(inputs)
        return self.head(self.norm(maps).relu().flatten(1))


class Sequential(Varied):
    """Recurrence, then attention."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.LSTM(2, 2, batch_first=True)
        self.attention, self.head = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, 2)

    def run(self, inputs: Tensor) -> Tensor:
        parts, state = [], None
        for half in inputs.split(2 if self.in_halves else 4, dim=1):
            hidden, state = self.recurrence(half, state)
            parts.append(hidden)
        hidden = torch.cat(parts, dim=1)
        return self.head(hidden + self.attention(hidden, hidden, hidden)[0])


class Tied(Varied):
    """An embedding that is the output layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.between, self.output = nn.Embedding(5, 2), nn.Linear(2, 2), nn.Linear(2, 5, bias=False)
        self.output.weight = self.embedding.weight

    def run(self, inputs: Tensor) -> Tensor:
        words = self.by_halves(self.embedding, inputs)
        return self.by_halves(self.output, self.between(words).tanh() + words)


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: randn(EXAMPLES, *shape, seed=seed)


def words(seed: int) -> Tensor:
    return torch.randint(5, (EXAMPLES, 4), generator=rng(seed))


@dataclass(frozen=True)
class Case:
    """A net with its data."""

    net: type[Varied]
    likelihood: Callable[[], bk.likelihoods.Likelihood]
    inputs: Callable[[int], Tensor]
    targets: Callable[[int], Tensor]


gaussian = lambda: bk.likelihoods.Gaussian(0.5).double()  # noqa: E731
CASES = {
    "perceptron": Case(Perceptron, gaussian, numbers(4, 2), numbers(2)),
    "convolutional": Case(Convolutional, gaussian, numbers(2, 3, 3), numbers(2)),
    "sequential": Case(Sequential, gaussian, numbers(4, 2), numbers(4, 2)),
    "tied embedding": Case(Tied, bk.likelihoods.Categorical, words, words),
}

Loop = Callable[[bk.NoisyNaturalGradient, Tensor, Tensor, int], None]


def plain(optimizer: bk.NoisyNaturalGradient, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.generator.manual_seed(step)
    with optimizer.sampled_params():
        optimizer.likelihood(optimizer.model(x), y).backward()


def in_two_contexts(optimizer: bk.NoisyNaturalGradient, x: Tensor, y: Tensor, step: int) -> None:
    for part, target in zip(x.split([2, 4]), y.split([2, 4]), strict=True):
        optimizer.generator.manual_seed(step)
        with optimizer.sampled_params():
            (optimizer.likelihood(optimizer.model(part), target) * len(part) / EXAMPLES).backward()


def in_micro_batches(optimizer: bk.NoisyNaturalGradient, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.generator.manual_seed(step)
    with optimizer.sampled_params():
        for part, target in zip(x.split([1, 3, 2]), y.split([1, 3, 2]), strict=True):
            (optimizer.likelihood(optimizer.model(part), target) * len(part) / EXAMPLES).backward()


def with_the_sum_of_losses(optimizer: bk.NoisyNaturalGradient, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.generator.manual_seed(step)
    with optimizer.sampled_params():
        output = optimizer.model(x)
        optimizer.likelihood(output, y)  # it shows the targets to the empirical Fisher
        (optimizer.likelihood.negative_log_likelihood(output, y).sum() / EXAMPLES).backward()


def with_a_scale(optimizer: bk.NoisyNaturalGradient, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.generator.manual_seed(step)
    with optimizer.sampled_params():
        (optimizer.likelihood(optimizer.model(x), y) * 1000.0).backward()
    for parameter in optimizer.model.parameters():
        parameter.grad /= 1000.0


def run(
    case: Case, structure: str, fisher: str, loop: Loop = plain, prepare: Callable[[Varied], Any] = lambda net: None
) -> Mapping[str, Any]:
    """Weights, statistics and posterior after some steps of a loop, by name."""
    net = case.net()
    seeded(net)
    prepare(net)
    optimizer = bk.NoisyNaturalGradient(
        net,
        case.likelihood(),
        num_data=40,
        lr=0.05,
        structure=structure,
        fisher=fisher,
        statistics_every=1,
        inverse_every=1,
        generator=rng(0),
    )
    for step in range(STEPS):
        x, y = case.inputs(step), case.targets(10 + step)
        if prepare is to_channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        loop(optimizer, x, y, step)
        optimizer.step()
        optimizer.zero_grad()
    results: dict[str, Any] = {f"mean/{name}": value.detach() for name, value in net.named_parameters()}
    for name, state in optimizer.blocks.items():
        for key, value in matrices(state.statistics).items():
            results[f"sum/{name}/{key}"] = value
            results[f"count/{name}/{key}"] = torch.tensor(state.statistics.counts[key], dtype=torch.float64)
    for name, block in optimizer.posterior().blocks.items():
        results[f"posterior/{name}"] = block.to_dense()
    return results


@cache
def reference(case: str, structure: str, fisher: str) -> Mapping[str, Any]:
    return run(CASES[case], structure, fisher)


def to_channels_last(net: Varied) -> None:
    net.to(memory_format=torch.channels_last)


CHANGES: dict[str, Callable[..., Mapping[str, Any]]] = {
    "two contexts": partial(run, loop=in_two_contexts),
    "micro-batches in one context": partial(run, loop=in_micro_batches),
    "sum of losses": partial(run, loop=with_the_sum_of_losses),
    "scaled loss": partial(run, loop=with_a_scale),
    "module called on halves": partial(run, prepare=lambda net: setattr(net, "in_halves", True)),
    "checkpointing": partial(run, prepare=lambda net: setattr(net, "is_checkpointed", True)),
    "channels_last": partial(run, prepare=to_channels_last),
}


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize(
    ("case", "change"),
    [(case, change) for case in CASES for change in CHANGES if change != "channels_last" or case == "convolutional"],
)
@pytest.mark.parametrize("structure", FAMILY_NAMES)
def test_a_step_is_the_same_however_the_loop_is_written(structure, case, change, fisher):
    expected = reference(case, structure, fisher)
    actual = CHANGES[change](CASES[case], structure, fisher)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, **SAME, msg=lambda text, name=name: f"{name}: {text}")


class InParts(Convolutional):
    """The convolution sees a third of the batch at a time."""

    def run(self, inputs: Tensor) -> Tensor:
        maps = torch.cat([self.conv(part) for part in inputs.split(EXAMPLES // 3)])
        return self.head(self.norm(maps).relu().flatten(1))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("structure", FAMILY_NAMES)
def test_a_module_that_is_called_on_parts_of_the_batch_has_the_same_averages(structure, fisher):
    """Whose rows they are is found by pulling each example back; of ``A`` every example then has all rows."""
    expected = reference("convolutional", structure, fisher)
    actual = run(replace(CASES["convolutional"], net=InParts), structure, fisher)
    for name, value in expected.items():
        kind, _, of = name.partition("/")
        if kind == "sum":
            count = f"count/{of}"
            assert_close(actual[name] / actual[count], value / expected[count], **SAME)
        elif kind != "count":
            assert_close(actual[name], value, **SAME)


@pytest.mark.parametrize("case", CASES)
def test_the_steps_that_are_compared_are_no_trivial_ones(case):
    """Weights move, the Fisher kinds differ, and noise has a part: else the comparisons above would show nothing."""
    exact, empirical = reference(case, "kron", "exact"), reference(case, "kron", "empirical")
    net = seeded(CASES[case].net())
    for name, value in net.named_parameters():
        assert not torch.equal(exact[f"mean/{name}"], value)
    assert any(not torch.allclose(exact[name], empirical[name]) for name in exact if name.startswith("sum/"))
    other_noise = run(CASES[case], "kron", "exact", lambda o, x, y, step: plain(o, x, y, step + 100))
    assert any(not torch.allclose(exact[name], other_noise[name]) for name in exact if name.startswith("sum/"))
