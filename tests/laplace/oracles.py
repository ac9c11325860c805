"""Small nets with data, and the dense formulas that a Laplace fit stands for, by explicit matrices. All float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bayes_kfac as bk
from bayes_kfac.curvature import Layer, Statistics
from bayes_kfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from bayes_kfac.structures import BlockGaussian
from tests.helpers import dense_kron, randn, rng, seeded

NOISE_SCALE = 0.7


def gaussian() -> Likelihood:
    return Gaussian(torch.tensor(NOISE_SCALE, dtype=torch.float64))


def classes(*shape: int, count: int, seed: int) -> Tensor:
    return torch.randint(count, shape, generator=rng(seed))


def fitted(model: nn.Module, likelihood: Likelihood, loader: Iterable[Any], **options: Any) -> bk.Laplace:
    return bk.Laplace(model, likelihood, **options).fit(loader, progress=False)


def batches(x: Any, y: Tensor, size: int = 5) -> list[tuple[Any, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


# Likelihoods: the Fisher of an output and the log-likelihood, written out


@dataclass(frozen=True)
class Case:
    """A likelihood with targets for two or three outputs, and its formulas.

    ``fisher`` takes outputs ``[batch, outputs]`` to ``[batch, outputs, outputs]``; ``log_likelihood`` sums over all.
    """

    make: Callable[[], Likelihood]
    targets: Callable[[int], Tensor]
    outputs: int
    fisher: Callable[[Tensor], Tensor]
    log_likelihood: Callable[[Tensor, Tensor], Tensor]


def _softmax_fisher(output: Tensor) -> Tensor:
    probs = output.exp() / output.exp().sum(-1, keepdim=True)
    return torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]


LIKELIHOODS = {
    "gaussian": Case(
        gaussian,
        lambda count: randn(count, 2, seed=91),
        2,
        lambda output: torch.eye(2, dtype=torch.float64).expand(len(output), 2, 2) / NOISE_SCALE**2,
        lambda output, y: torch.distributions.Normal(output, NOISE_SCALE).log_prob(y).sum(),
    ),
    "categorical": Case(
        Categorical,
        lambda count: classes(count, count=3, seed=92),
        3,
        _softmax_fisher,
        lambda output, y: (output[range(len(y)), y] - output.exp().sum(-1).log()).sum(),
    ),
    "bernoulli": Case(
        Bernoulli,
        lambda count: classes(count, 2, count=2, seed=93).double(),
        2,
        lambda output: torch.diag_embed(output.exp() / (1 + output.exp()) ** 2),
        lambda output, y: (y * output - (1 + output.exp()).log()).sum(),
    ),
}


# Nets


class Words(nn.Module):
    """Words, their mean, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 3), nn.Linear(3, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embed(words).tanh().mean(1))


class Language(nn.Module):
    """Logits of words at each position, by the weights of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(words)).tanh())


class Twice(nn.Module):
    """One layer used twice, and a parameter that no module holds but the root."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.layer, self.head = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x + self.shift).tanh()).tanh())


def mlp(outputs: int = 2) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))


@dataclass(frozen=True)
class Net:
    """A net with data: ``make()`` gives the model, ``x`` and ``y`` eleven examples."""

    make: Callable[[], nn.Module]
    likelihood: Callable[[], Likelihood]
    x: Tensor
    y: Tensor


X, Y = randn(11, 3, seed=1), randn(11, 2, seed=2)
NETS = {
    "mlp": Net(mlp, gaussian, X, Y),
    "classifier": Net(lambda: mlp(3), Categorical, X, classes(11, count=3, seed=3)),
    "cnn": Net(
        lambda: seeded(
            nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten())
            .append(nn.Linear(16, 2, bias=False))
            .double()
        ),
        gaussian,
        randn(11, 1, 4, 4, seed=4),
        Y,
    ),
    "positions": Net(
        lambda: seeded(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))),
        Categorical,
        randn(11, 3, 2, seed=5),
        classes(11, 3, count=2, seed=6),
    ),
    "norm": Net(
        lambda: seeded(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))), gaussian, X, Y
    ),
    "words": Net(lambda: seeded(Words()), Categorical, classes(11, 4, count=6, seed=7), classes(11, count=3, seed=8)),
    "twice": Net(lambda: seeded(Twice()), gaussian, X, Y),
    "tied to words": Net(
        lambda: seeded(Language()), Categorical, classes(11, 3, count=5, seed=9), classes(11, 3, count=5, seed=10)
    ),
}


def fit_net(name: str, **options: Any) -> bk.Laplace:
    net = NETS[name]
    return fitted(net.make(), net.likelihood(), batches(net.x, net.y), **options)


# Dense formulas


def by_layer(values: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Tensors by parameters as vectors of each layer's block, ``[*blocks, out·in]``."""
    return {name: layer.matrix(values).flatten(-2) for name, layer in layers.items()}


def dense_fisher(statistics: Statistics, structure: str | None = None) -> Tensor:
    """One example's Fisher of a block as statistics say it, ``[*blocks, out·in, out·in]``."""
    if "fisher" in statistics.columns:
        return statistics.mean_columns("fisher").to_dense()
    means = {name: statistics.mean(name) for name in statistics.sums}
    if structure == "unit_wise":
        units = means["fisher"]
        blocks = torch.stack([torch.block_diag(*each) for each in units.reshape(-1, *units.shape[-3:])])
        return blocks.reshape(*units.shape[:-3], *blocks.shape[1:])
    means |= {name: statistics.mean_columns(name).to_dense() for name in statistics.columns}
    if "fisher" in means:
        fisher = means["fisher"]
        is_diagonal = (
            len(statistics.sums["fisher"].shape) < 3 or fisher.shape[-1] != fisher.shape[-2] * fisher.shape[-3]
        )
        return torch.diag_embed(fisher.flatten(-2)) if is_diagonal else fisher.flatten(-3, -2)
    A, G = square(means["input"]), square(means["gradient"])
    if "transposed_input" in means:
        B, H = square(means["transposed_gradient"]), square(means["transposed_input"])
        whole = torch.kron(G, A) + torch.kron(H, B)
        parts = whole.reshape(len(G), len(A), len(G), len(A))
        A, G = torch.einsum("oioj->ij", parts), torch.einsum("oipi->op", parts)
        A = A / A.trace()
    return dense_kron(G, A)


def square(factor: Tensor) -> Tensor:
    return torch.diag_embed(factor.squeeze(-2)) if factor.shape[-1] != factor.shape[-2] else factor


def fishers(laplace: bk.Laplace) -> dict[str, Tensor]:
    assert laplace._fitted is not None
    return {
        name: dense_fisher(own, laplace.structures[name].name)
        for name, own in laplace._fitted.measurement.statistics.items()
    }


def dense_prior(prior: float | Tensor | BlockGaussian, shape: tuple[int, ...]) -> Tensor:
    """The prior's precision of a block, ``[*blocks, out·in, out·in]``."""
    if isinstance(prior, BlockGaussian):
        return prior.to_dense()
    return torch.diag_embed(torch.as_tensor(prior, dtype=torch.float64).expand(shape).flatten(-2))


def log_normal(x: Tensor, precision: Tensor) -> Tensor:
    """``log N(x; 0, P⁻¹)``."""
    quadratic = torch.einsum("...i,...ij,...j->...", x, precision, x)
    return 0.5 * (torch.logdet(precision) - quadratic - x.shape[-1] * torch.log(torch.tensor(2 * torch.pi)).double())


def evidence_by_hand(
    log_likelihood: Tensor,
    fishers: Mapping[str, Tensor],
    priors: Mapping[str, Tensor],
    away: Mapping[str, Tensor],
    scale: float,
    temperature: float = 1.0,
) -> Tensor:
    """``log p(D|M)/τ + log N(M; M₀, P₀⁻¹) − ½ log det P + d/2 log 2π`` with ``P = scale F + P₀``, all dense."""
    total = log_likelihood / temperature
    for name, fisher in fishers.items():
        precision = scale * fisher + priors[name]
        size = away[name].shape[-1]
        own = log_normal(away[name], priors[name]) - 0.5 * torch.logdet(precision)
        total = total + (own + 0.5 * size * torch.log(torch.tensor(2 * torch.pi)).double()).sum()
    return total


def log_likelihood(laplace: bk.Laplace, x: Any, y: Tensor) -> Tensor:
    """``log p(D | M)`` at the model's weights."""
    with torch.no_grad():
        return -laplace.likelihood.negative_log_likelihood(laplace.model(x), y).sum()


def prior_forms(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """A prior in each of the forms that a user can write, unequal where the form allows."""
    parameters = {key: p for layer in layers.values() for key, p in layer.parameters.items()}
    return {
        "model": 0.7,
        "layer": {name: 0.3 + 0.5 * index for index, name in enumerate(layers)},
        "parameter": {key: 0.2 + 0.3 * index for index, key in enumerate(parameters)},
        "weight": {key: randn(*p.shape, seed=60 + index).exp() for index, (key, p) in enumerate(parameters.items())},
    }


def dense_priors(prior_precision: Any, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The dense precision of each layer's prior, from what a user writes."""
    dense = {}
    for name, layer in layers.items():
        if isinstance(prior_precision, Mapping) and not (name in prior_precision and name not in layer.parameters):
            values = {
                key: torch.as_tensor(prior_precision[key], dtype=torch.float64).expand(p.shape)
                for key, p in layer.parameters.items()
            }
            dense[name] = torch.diag_embed(layer.matrix(values).flatten(-2))
        else:
            number = prior_precision[name] if isinstance(prior_precision, Mapping) else prior_precision
            dense[name] = dense_prior(number, layer.shape)
    return dense
