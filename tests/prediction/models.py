"""Small models of every kind that linearised prediction meets, with inputs of five examples. All float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac import Posterior
from bayes_kfac.likelihoods import Gaussian
from tests.curvature.modules.cases import Model
from tests.helpers import randn, record, rng, seeded
from tests.posteriors import random_posterior

Case = tuple[Callable[[], nn.Module], Callable[[], Any]]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 2))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class Transformer(nn.Module):
    """Words, positions that are looked up once for all examples, an encoder layer, and a tied output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(6, 4), nn.Embedding(5, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.words(words) + self.positions(torch.arange(words.shape[1]))
        return self.head(self.encoder(hidden)[:, 0])


def recurrent() -> nn.Module:
    return Model(lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 2))


def two_arguments() -> nn.Module:
    return Model(
        lambda m, left, right, scale=1.0: scale * m.last(torch.tanh(m.left(left)) * m.right(right)),
        left=nn.Linear(3, 4),
        right=nn.Linear(2, 4, bias=False),
        last=nn.Linear(4, 2),
    )


def some_words(*shape: int) -> Tensor:
    return torch.randint(6, shape, generator=rng(0))


#: Five examples each, as many as there are positions in the transformer; no example depends on another.
MODELS: dict[str, Case] = {
    "mlp": (mlp, lambda: randn(5, 3, seed=1)),
    "sequence outputs": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), lambda: randn(5, 4, 3, seed=1)),
    "cnn": (cnn, lambda: randn(5, 2, 4, 4, seed=1)),
    "transformer": (Transformer, lambda: some_words(5, 5)),
    "bags": (
        lambda: nn.Sequential(nn.EmbeddingBag(6, 3, mode="mean"), nn.Tanh(), nn.Linear(3, 2)),
        lambda: some_words(5, 4),
    ),
    "recurrent": (recurrent, lambda: randn(5, 3, 3, seed=1)),
    "tuple": (two_arguments, lambda: (randn(5, 3, seed=1), randn(5, 2, seed=2))),
    "dict": (two_arguments, lambda: {"right": randn(5, 2, seed=2), "left": randn(5, 3, seed=1), "scale": 0.7}),
    "dict with a scalar": (
        two_arguments,
        lambda: {"right": randn(5, 2, seed=2), "left": randn(5, 3, seed=1), "scale": torch.tensor(0.7).double()},
    ),
}


class Graph(nn.Module):
    """A graph convolution; its nodes are the examples, and see their neighbours by an argument or a buffer."""

    def __init__(self, adjacency: Tensor | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        adjacency = self.adjacency if adjacency is None else adjacency
        return adjacency @ self.second((adjacency @ self.first(x)).tanh())


class AttendToOthers(nn.Module):
    """Examples are each other's keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


ADJACENCY = randn(5, 5, seed=9).softmax(-1)

#: A part of their batch is another computation, or none.
WHOLE: dict[str, Case] = {
    "graph, an argument": (Graph, lambda: (randn(5, 3, seed=1), ADJACENCY)),
    "graph, a buffer": (lambda: Graph(ADJACENCY), lambda: randn(5, 3, seed=1)),
    "examples attend to each other": (AttendToOthers, lambda: randn(5, 4, seed=1)),
    "centred by the batch": (
        lambda: Model(lambda m, x: m.layer(x - x.mean(0)), layer=nn.Linear(3, 2)),
        lambda: randn(5, 3, seed=1),
    ),
    "flat bags": (
        lambda: Model(lambda m, x, starts: m.head(m.bag(x, starts)), bag=nn.EmbeddingBag(6, 3), head=nn.Linear(3, 2)),
        lambda: (some_words(9), torch.tensor([0, 2, 2, 5, 8])),
    ),
    "a memory of another length": (
        lambda: Model(lambda m, x, memory: m.layer(x).tanh() * memory[0], layer=nn.Linear(3, 2)),
        lambda: (randn(5, 3, seed=1), randn(3, 2, seed=2)),
    ),
    "a table for all": (
        lambda: Model(lambda m, x, table: m.layer(x) @ table.mT, layer=nn.Linear(3, 2)),
        lambda: (randn(5, 3, seed=1), randn(5, 2, seed=2)),
    ),
}


def posterior_of(case: Case, **options: Any) -> tuple[Posterior, Any]:
    """A posterior that was measured on the model's own rows, and the inputs."""
    build, inputs = case
    model = seeded(build()).eval()
    return random_posterior(model, Gaussian(0.5), rows=record(model, inputs()), **options), inputs()
