"""The pull-back: whose example a row belongs to, and what would otherwise be wrong without a word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bayes_kfac.curvature import Rows, kronecker_factors, register
from bayes_kfac.curvature.modules import LinearAdapter, base
from bayes_kfac.errors import UnsupportedModelError, UsageError
from tests.helpers import (
    TIGHT,
    assert_rows_are_jacobians,
    assert_same_statistics,
    pull_back,
    randn,
    record,
    rng,
    seeded,
)

# Rows that lie in the places of their examples


class Tokens(nn.Module):
    """Layers on ``[batch, time, features]``; the output is of tokens, ``[batch · time, features]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).tanh()).flatten(0, 1)


def test_an_output_that_is_flattened_at_the_end_makes_its_rows_the_examples():
    rows, inputs = record(seeded(Tokens()), randn(4, 5, 3, seed=1)), randn(4, 5, 3, seed=1)
    expected = record(seeded(Tokens()), inputs.flatten(0, 1)[:, None])
    for name in ("embed", "head"):
        assert rows[name].num_examples == 20
        assert_close(rows[name].inputs, expected[name].inputs, **TIGHT)
        assert_close(rows[name].gradients, expected[name].gradients, **TIGHT)


# Rows that do not


class Positions(nn.Module):
    """Positions are looked up once for all examples, as in GPT-2."""

    def __init__(self, *, unsqueezed: bool = True) -> None:
        super().__init__()
        self.words, self.positions, self.head = nn.Embedding(6, 3), nn.Embedding(4, 3), nn.Linear(3, 2)
        self.unsqueezed = unsqueezed

    def forward(self, words: Tensor) -> Tensor:
        positions = torch.arange(words.shape[1])
        hidden = self.words(words) + self.positions(positions[None] if self.unsqueezed else positions)
        return self.head(hidden.tanh())


@pytest.mark.parametrize("unsqueezed", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8])
def test_positions_are_not_mistaken_for_examples(batch, unsqueezed):
    """Also where there happen to be as many examples as positions."""
    words = torch.randint(6, (batch, 4), generator=rng(0))
    assert_rows_are_jacobians(seeded(Positions(unsqueezed=unsqueezed)), words)


class Queries(nn.Module):
    """Queries that are learned, projected once for all examples; their projection is no product with an input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.project, self.keys = nn.Parameter(torch.zeros(4, 3)), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.keys(x) @ self.project(self.queries).mT


class Graph(nn.Module):
    """Nodes that see their neighbours: every node is an example, and depends on the others."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("adjacency", randn(nodes, nodes, seed=9).softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency @ self.second((self.adjacency @ self.first(x)).tanh())


class Pairs(nn.Module):
    """Six rows for four examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:4] * self.layer(x)[-4:].tanh()


class Views(nn.Module):
    """Two views of each example, one in each half of the batch, that are compared with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x).tanh()
        return hidden * hidden.roll(len(x) // 2, 0)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Queries(), (4, 3)),
        (Queries(), (6, 3)),
        (Graph(5), (5, 3)),
        (Pairs(), (6, 3)),
        (Views(), (6, 3)),
        (Views(), (8, 3)),
        (Views(), (2, 3)),
    ],
)
def test_rows_of_several_examples_are_in_each_of_them(model, shape):
    assert_rows_are_jacobians(seeded(model), randn(*shape, seed=1))


def test_batch_normalisation_in_training_couples_all_examples():
    """Rows are exact for what an example's output has of every other input; or, coupled, they stay where they are."""
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    model, inputs = seeded(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))), randn(5, 3, seed=1)
    assert_rows_are_jacobians(model, inputs)
    gradient = randn(1, 5, 2, seed=2)
    apart, coupled = record(model, inputs, gradient)["0"], record(model, inputs, gradient, coupled=True)["0"]
    assert apart.inputs.shape == (5, 5, 4)
    assert coupled.inputs.shape == (5, 1, 4)
    assert_close(apart.total(0), coupled.total(0), **TIGHT)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_of_independent_gradients_groups_of_examples_are_apart_where_examples_meet(sharing):
    """Nodes of a graph are in each other's outputs: the groups' factors have the expectation of the examples'."""
    model, inputs = seeded(Graph(20)), randn(20, 3, seed=1)
    root = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 20, 2)
    exact = kronecker_factors(record(model, inputs, root)["first"], sharing)
    signs = torch.randint(2, (4000, 20, 1), generator=rng(0)) * 2.0 - 1
    columns = (signs.double().unsqueeze(1) * root).flatten(0, 1)
    rows = record(model, inputs, columns, independent=True)["first"]
    assert rows.gradients.shape[1:3] == (8, 20)
    estimate = kronecker_factors(rows, sharing)
    assert_close(estimate.mean("input"), exact.mean("input"), **TIGHT)
    assert_close(estimate.mean("gradient") / 4000, exact.mean("gradient"), rtol=0.1, atol=0.02)


class TimeFirst(nn.Module):
    """A layer that sees time in the place of the batch, as recurrent modules and transformers do by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(0, 1)).tanh().sum(0))


@pytest.mark.parametrize("times", [5, 6, 12, 3])
def test_sampled_targets_have_the_fisher_of_layers_that_see_time_first(times):
    """Whether or not numbers of examples and times divide each other: all positions of an example stay together."""
    model, inputs = seeded(TimeFirst()), randn(6, times, 3, seed=1)
    root = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 6, 2)
    exact = record(model, inputs, root)["layer"]
    signs = torch.randint(2, (4000, 6, 1), generator=rng(0)) * 2.0 - 1
    sampled = record(model, inputs, (signs.double().unsqueeze(1) * root).flatten(0, 1), independent=True)["layer"]

    def diagonal(rows: Rows) -> Tensor:
        return torch.einsum("cnto,nti->cnoi", rows.gradients, rows.inputs).square().sum((0, 1))

    assert_close(diagonal(sampled) / 4000, diagonal(exact), rtol=0.15, atol=0)


# Masks


def test_a_mask_is_aligned_with_positions_or_with_examples():
    """Where a layer has the positions of the mask they are the same ones; elsewhere whole examples weigh."""
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Conv1d(4, 2, 3))
    inputs, mask = randn(2, 3, 8, seed=1), torch.tensor([[True, False, True, True, False], [False] * 5])
    output = seeded(model)(inputs).mT
    gradients = (randn(*output.shape, seed=2) * mask.unsqueeze(-1)).mT[None]
    rows = record(model, inputs, gradients, mask=mask)
    assert torch.equal(rows["1"].mask, mask)
    assert torch.equal(rows["0"].mask, torch.tensor([[True], [False]]).expand(2, 7))
    assert rows["0"].num_examples == rows["1"].num_examples == 1
    assert (rows["0"].num_rows, rows["1"].num_rows) == (7, 3)


# Formulas that do not batch


class Cubed(torch.autograd.Function):
    """A function of the user's own that nothing can be mapped over."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * gradient.numpy())


class Custom(nn.Module):
    """A layer under such a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Cubed.apply(self.layer(x)))


def test_columns_are_pulled_back_one_by_one_where_they_do_not_batch():
    model, inputs, gradients = seeded(Custom()), randn(5, 3, seed=1), randn(3, 5, 2, seed=2)
    together = record(model, inputs, gradients)
    for column in range(3):
        for name, rows in record(model, inputs, gradients[column : column + 1]).items():
            assert_close(together[name].gradients[column], rows.gradients[0], **TIGHT)


# Parameters that no module multiplies with an input


class Shifted(nn.Module):
    """A positional embedding, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.layer = nn.Parameter(torch.zeros(3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x + self.shift).tanh() * self.shift)


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_gradients_of_groups_of_examples_serve_where_those_of_examples_are_independent(batch):
    """Signs drawn for each example: the groups' squares have the examples' expectation, and their sums are exact."""
    model, inputs = seeded(Shifted()), randn(batch, 3, seed=1)
    columns = 4000 if batch > 1 else 2
    signs = torch.randint(2, (columns, batch, 1), generator=rng(0)) * 2.0 - 1
    examples = record(model, inputs, torch.ones(1, batch, 2, dtype=torch.float64))["shift"]
    groups = record(model, inputs, signs.double().expand(-1, -1, 2), independent=True)["shift"]
    assert groups.gradients.shape[1] == min(batch, 8)
    assert groups.num_examples == examples.num_examples == batch
    exact, estimate = examples.gradients.square().sum(1), groups.gradients.square().sum(1).mean(0, keepdim=True)
    assert_close(estimate, exact, rtol=0.1 if batch > 8 else 1e-10, atol=0)


def test_examples_are_pulled_back_in_chunks(monkeypatch):
    """However many they are, the rows are the same."""
    model, inputs = seeded(Shifted()), randn(5, 3, seed=1)
    expected = record(model, inputs)["shift"]
    monkeypatch.setattr("bayes_kfac.curvature.pullback.CHUNK", 3)
    assert_close(record(model, inputs)["shift"].gradients, expected.gradients, **TIGHT)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_gradients_of_single_examples_are_never_there_all_at_once(monkeypatch):
    """Written out they would have the batch squared: only a chunk of them is, and the result."""
    monkeypatch.setattr("bayes_kfac.curvature.pullback.CHUNK", 4)
    model, inputs, columns = seeded(Shifted()), randn(64, 3, seed=1), randn(3, 64, 2, seed=2)
    with Largest() as largest:
        record(model, inputs, columns)
    assert largest.elements < columns.numel() * 64 / 8


# What would be wrong without a word


def check(model: nn.Module, inputs: Tensor) -> None:
    """Record one forward pass, and check it as the first one in training is."""
    passed = pull_back(model, inputs)
    gradient = randn(*passed.output.shape, seed=2).to(passed.output.dtype)
    passed.check_complete(gradient, passed.rows(gradient[None]))


class Beside(nn.Module):
    """Uses its layer's weight, with a factor, without calling the layer; and calls it or not."""

    def __init__(self, factor: float, *, calls: bool = True) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.factor, self.calls = factor, calls

    def forward(self, x: Tensor) -> Tensor:
        beside = self.factor * x @ self.layer.weight.mT
        return self.head((beside + self.layer(x) if self.calls else beside).tanh())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("calls", [True, False])
def test_weights_that_are_used_without_a_call_are_an_error_that_names_the_layer(calls, dtype):
    model, inputs = seeded(Beside(1.0, calls=calls)).to(dtype), randn(6, 3, seed=1).to(dtype)
    with pytest.raises(UnsupportedModelError, match=r"'layer' \(Linear\).*x @ module\.weight\.T"):
        check(model, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Tokens, Positions, Shifted])
def test_calls_alone_are_complete_in_every_precision(kind, dtype):
    model = seeded(kind()).to(dtype)
    inputs = torch.randint(6, (5, 4), generator=rng(0)) if kind is Positions else randn(5, 4, 3, seed=1).to(dtype)
    check(model, inputs)


@pytest.mark.parametrize("factor", [0.1, -0.1])
def test_a_small_part_of_a_gradient_is_missed_too(factor):
    with pytest.raises(UnsupportedModelError, match="'layer'"):
        check(seeded(Beside(factor)), randn(6, 3, seed=1))


def test_a_gradient_that_vanishes_is_complete():
    """A bias before a normalisation over the batch has none; what is measured of it is rounding."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    check(seeded(model).float(), randn(6, 3, seed=1).float())


def test_a_wrong_adapter_of_the_users_is_found(monkeypatch):
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x @ self.weight.mT

    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    register(Doubled)(LinearAdapter)
    with pytest.raises(UnsupportedModelError, match=r"'0' \(Doubled\)"):
        check(seeded(nn.Sequential(Doubled(), nn.Tanh())), randn(6, 3, seed=1))


class Checkpointed(nn.Module):
    """A layer whose activations are not kept."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant))


def test_activation_checkpoints_are_seen_through():
    check(seeded(Checkpointed(reentrant=False)), randn(6, 3, seed=1))


def test_a_reentrant_checkpoint_is_an_error_that_says_what_to_do():
    """Its forward pass builds no graph."""
    with pytest.raises(UnsupportedModelError, match="Pass use_reentrant=False"):
        check(seeded(Checkpointed(reentrant=True)), randn(6, 3, seed=1))


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 2), nn.Conv1d(4, 2, 1), nn.ConvTranspose1d(4, 2, 1), nn.GRU(4, 2, batch_first=True)],
    ids=lambda layer: type(layer).__name__,
)
def test_an_input_that_was_changed_in_place_is_an_error(layer):
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            hidden = x * 1
            output = self.layer(hidden)
            hidden.mul_(2)
            return output[0] if isinstance(output, tuple) else output

    with pytest.raises(UsageError, match=r"input of layer 'layer.*' was changed in place"):
        record(seeded(InPlace()), randn(6, 4, 4, seed=1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_convolution_that_is_called_on_parts_of_the_batch_is_one_that_is_called_on_the_whole(sharing):
    class Parts(nn.Module):
        def __init__(self, parts: int) -> None:
            super().__init__()
            self.conv, self.parts = nn.Conv2d(2, 3, 2), parts

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.conv(part) for part in x.chunk(self.parts)]).tanh().mean((2, 3))

    x = randn(6, 2, 4, 4, seed=1)
    whole, halves = (kronecker_factors(record(seeded(Parts(n)), x)["conv"], sharing) for n in (1, 2))
    assert_same_statistics(halves, whole)
