"""The recorder: rows whose products are each example's exact gradient, whatever the model does around its layers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from bayes_kfac import structures
from bayes_kfac.curvature import Layer, Recorder, Rows, find_layers
from bayes_kfac.curvature.statistics import kronecker_factors
from bayes_kfac.errors import UsageError
from tests.helpers import TIGHT, jacobians, parameter_jacobians, randn, record, rng, seeded, unit_gradients


class OverTime(nn.Module):
    """Layers on ``[batch, time, features]``, averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).tanh()).mean(1)


class FlattensTime(OverTime):
    """The same function through layers on ``[batch · time, features]``."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x.flatten(0, 1)).tanh()
        return self.head(hidden).unflatten(0, x.shape[:2]).mean(1)


class FlattensImages(nn.Module):
    """A convolution that sees the frames of a film one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 2, groups=2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(x.flatten(0, 1)).tanh().mean((2, 3))
        return self.head(frames.unflatten(0, x.shape[:2]).sum(1))


class CalledTwice(nn.Module):
    """One layer used for two steps, in between a layer used once."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.between, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self.between(self.step(x).tanh())).tanh())


class Keywords(nn.Module):
    """Calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


class Branches(nn.Module):
    """One layer that counts, one that runs for nothing, one that runs without a graph, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.wasted, self.detached, self.idle = (nn.Linear(3, 2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.wasted(x)
        with torch.no_grad():
            self.detached(x)
        return self.used(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Softplus(), nn.Linear(4, 2))


def in_place() -> nn.Module:
    """In-place activations overwrite the output that a hook sees, before its gradient is known."""
    return nn.Sequential(
        nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.SiLU(inplace=True), nn.Linear(4, 2)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 2, 2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


MODELS = {
    "mlp": (mlp, (6, 3)),
    "in-place": (in_place, (6, 3)),
    "root": (lambda: nn.Linear(3, 2), (6, 3)),
    "one example": (mlp, (1, 3)),
    "convolutions": (convolutions, (4, 2, 6, 6)),
    "over time": (OverTime, (4, 5, 3)),
    "outputs over time": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (4, 3, 3)),
    "flattens time": (FlattensTime, (4, 5, 3)),
    "flattens images": (FlattensImages, (3, 2, 2, 4, 3)),
    "called twice": (CalledTwice, (5, 3)),
    "keywords": (Keywords, (5, 3)),
    "no feature": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)), (5, 3)),
}


@pytest.fixture(params=MODELS)
def model_and_inputs(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, shape = MODELS[request.param]
    return seeded(build()), randn(*shape, seed=1)


def products(rows: Rows) -> Tensor:
    """``Σ_t g aᵀ`` of each example and column, ``[batch, columns, *blocks, out, in]``."""
    return torch.einsum("c...nto,...nti->nc...oi", rows.gradients, rows.inputs)


# What rows are


def test_products_of_rows_are_the_jacobians_of_each_example(model_and_inputs):
    model, inputs = model_and_inputs
    expected = jacobians(model, inputs)
    rows = record(model, inputs)
    assert set(rows) == set(expected)
    for name, jacobian in expected.items():
        assert_close(products(rows[name]), jacobian, **TIGHT)


@pytest.mark.parametrize("columns", [1, 3])
def test_products_of_rows_are_per_example_gradients_of_any_output_gradient(model_and_inputs, columns):
    model, inputs = model_and_inputs
    output_gradients = randn(columns, *model(inputs).shape, seed=2)
    rows = record(model, inputs, output_gradients)
    for name, jacobian in jacobians(model, inputs).items():
        expected = torch.einsum("cnk,nk...->nc...", output_gradients.reshape(columns, len(inputs), -1), jacobian)
        assert_close(products(rows[name]), expected, **TIGHT)


def test_a_column_does_not_depend_on_its_neighbours(model_and_inputs):
    """The batched backward pass of several columns is the single one, several times."""
    model, inputs = model_and_inputs
    output_gradients = randn(3, *model(inputs).shape, seed=2)
    together = record(model, inputs, output_gradients)
    for column in range(3):
        for name, rows in record(model, inputs, output_gradients[column : column + 1]).items():
            assert_close(together[name].gradients[column], rows.gradients[0], **TIGHT)
            assert torch.equal(together[name].inputs, rows.inputs)


def test_rows_have_the_documented_shapes():
    rows = record(seeded(convolutions()), randn(4, 2, 6, 6, seed=0))
    assert rows["0"].inputs.shape == (4, 36, 19)
    assert rows["0"].gradients.shape == (3, 4, 36, 4)
    assert rows["3"].inputs.shape == (2, 4, 4, 9)
    assert rows["3"].gradients.shape == (3, 2, 4, 4, 1)
    assert rows["6"].inputs.shape == (4, 1, 9)
    assert rows["6"].gradients.shape == (3, 4, 1, 3)
    assert [one.num_examples for one in rows.values()] == [4, 4, 4]


def test_rows_hold_no_graph(model_and_inputs):
    for rows in record(*model_and_inputs).values():
        assert not rows.inputs.requires_grad
        assert not rows.gradients.requires_grad


@pytest.mark.parametrize("keeps_graph", [True, False])
def test_captured_inputs_are_in_the_graph_only_where_it_is_to_be_kept(model_and_inputs, keeps_graph):
    """Otherwise a loop that keeps rows would keep the graph of every batch; rows have the same values."""
    model, inputs = model_and_inputs
    expected = record(model, inputs)
    recorder = Recorder(find_layers(model)[0])
    recorder.keeps_graph = keeps_graph
    recorder.attach()
    output = model(inputs.clone().requires_grad_())
    captured = [leaf for call in recorder.calls for leaf in tree_leaves(call.captured) if isinstance(leaf, Tensor)]
    rows = recorder.rows(output, unit_gradients(output))
    recorder.detach()
    assert captured
    assert {leaf.requires_grad for leaf in captured} == {keeps_graph}
    for name, one in rows.items():
        assert one.inputs.requires_grad == keeps_graph
        assert_close(one.inputs, expected[name].inputs, **TIGHT)
        assert_close(one.gradients, expected[name].gradients, **TIGHT)


class Token:
    """Something whose end can be noticed."""


class Marked(torch.autograd.Function):
    """The identity; its node in the graph holds a token."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Token) -> Tensor:
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def test_rows_and_captured_inputs_outlive_the_graph():
    """Memory: the graph ends with the calls, though what was captured of them is kept."""

    class WithMark(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x: Tensor, token: Token) -> Tensor:
            return self.last(self.norm(Marked.apply(self.first(x), token)))

    model, token = seeded(WithMark()), Token()
    alive = weakref.ref(token)
    recorder = Recorder(find_layers(model)[0])
    recorder.attach()
    output = model(randn(4, 3, seed=1), token)
    rows = recorder.rows(output, unit_gradients(output))
    kept = [call.captured for call in recorder.calls]
    del output, token
    recorder.clear()
    gc.collect()
    assert alive() is None
    assert rows
    assert kept
    recorder.detach()


# Shared weights


def test_a_module_called_twice_sums_its_uses_in_its_curvature():
    """``G`` sums over both uses of each example; ``A`` averages over all of them."""
    model, inputs = seeded(CalledTwice()), randn(5, 3, seed=1)
    first_output = model.step(inputs)
    second_input = model.between(first_output.tanh())
    second_output = model.step(second_input)
    output = model.head(second_output.tanh())
    gradient = randn(1, 5, 2, seed=2)
    G, A = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    for use_input, use_output in [(inputs, first_output), (second_input, second_output)]:
        (use_gradient,) = torch.autograd.grad(output, use_output, gradient[0], retain_graph=True)
        for n in range(5):
            a = torch.cat([use_input[n], one])
            A += torch.outer(a, a) / 10
            G += torch.outer(use_gradient[n], use_gradient[n]) / 5
    statistics = kronecker_factors(record(model, inputs, gradient)["step"], "expand")
    assert_close(statistics.mean("gradient"), G.detach(), **TIGHT)
    assert_close(statistics.mean("input"), A.detach(), **TIGHT)
    assert dict(statistics.counts) == {"input": 10, "gradient": 5}


class Tied(nn.Module):
    """An embedding and an output layer with one weight, of which a call may leave out either."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor, uses: str) -> Tensor:
        hidden = self.embed(words) if "embed" in uses else nn.functional.one_hot(words, 6)[..., :3].double()
        return self.head(hidden) if "head" in uses else hidden


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("uses", ["embed and head", "embed", "head"])
def test_a_tied_weight_has_the_same_statistics_whichever_of_its_uses_a_pass_makes(uses, sharing):
    """Otherwise the averages over passes could not be taken: statistics have the identity's names and shapes."""
    model, words = seeded(Tied()), torch.randint(6, (4, 2), generator=rng(0))
    (layer,) = find_layers(model)[0].values()
    statistics = kronecker_factors(record(model, (words, uses))["head"], sharing)
    identity = structures.get("kron", damping="factored", sharing=sharing).identity(
        layer.shape, layer.like, sparse_sides=layer.sparse_sides, tied=layer.is_tied_to_transpose
    )
    assert {n: v.shape for n, v in statistics.sums.items()} == {n: v.shape for n, v in identity.sums.items()}


@pytest.mark.parametrize("uses", ["embed and head", "embed", "head"])
def test_a_tied_weight_has_the_jacobians_of_the_uses_that_a_pass_makes(uses):
    model, words = seeded(Tied()), torch.randint(6, (4, 2), generator=rng(0))
    rows = record(model, (words, uses))["head"]
    assert_close(rows.jacobians().movedim(-3, 0), parameter_jacobians(model, (words, uses))["embed.weight"], **TIGHT)


def test_layers_on_a_flattened_batch_and_time_are_regrouped_by_example():
    inputs = randn(4, 5, 3, seed=1)
    flattened, plain = record(seeded(FlattensTime()), inputs), record(seeded(OverTime()), inputs)
    for name in ("embed", "head"):
        assert flattened[name].num_examples == 4
        assert_close(flattened[name].inputs, plain[name].inputs, **TIGHT)
        assert_close(flattened[name].gradients, plain[name].gradients, **TIGHT)


# What is not recorded


def test_layers_that_the_output_does_not_depend_on_are_absent():
    assert list(record(seeded(Branches()), randn(4, 3, seed=0))) == ["used"]


def test_nothing_is_recorded_under_no_grad():
    model = seeded(mlp())
    recorder = Recorder(find_layers(model)[0])
    recorder.attach()
    with torch.no_grad():
        model(randn(4, 3, seed=0))
    assert not recorder.calls
    recorder.detach()


def test_a_call_on_nothing_is_none():
    """As of an expert to which no example is sent."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all, self.some = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.all(x)
            return hidden + self.some(hidden[:0]).sum()

    model, inputs = seeded(Expert()), randn(4, 3, seed=0)
    assert list(record(model, inputs)) == ["all"]


def test_rows_without_calls_are_empty():
    recorder = Recorder(find_layers(seeded(mlp()))[0])
    assert recorder.rows(randn(4, 2, seed=0), randn(1, 4, 2, seed=1)) == {}


@pytest.mark.parametrize("frozen", [["0"], ["2"], ["0", "2"], ["4"]])
def test_frozen_layers_are_absent_and_the_others_are_as_if_nothing_was_frozen(frozen):
    model, inputs = seeded(mlp()), randn(6, 3, seed=1)
    expected = record(model, inputs)
    for name in frozen:
        model[int(name)].requires_grad_(False)
    rows = record(model, inputs)
    assert set(rows) == {"0", "2", "4"} - set(frozen)
    for name, one in rows.items():
        assert_close(one.inputs, expected[name].inputs, **TIGHT)
        assert_close(one.gradients, expected[name].gradients, **TIGHT)


def test_a_frozen_bias_has_no_column():
    model, inputs = seeded(mlp()), randn(6, 3, seed=1)
    model[0].bias.requires_grad_(False)
    assert_close(record(model, inputs)["0"].inputs, inputs[:, None], **TIGHT)


def test_clear_forgets_the_calls_so_far():
    model, inputs = seeded(mlp()), randn(6, 3, seed=1)
    recorder = Recorder(find_layers(model)[0])
    recorder.attach()
    model(inputs + 1)
    recorder.clear()
    assert not recorder.calls
    output = model(inputs)
    rows = recorder.rows(output, torch.ones_like(output)[None])
    recorder.detach()
    assert_close(rows["0"].inputs[:, 0, :3], inputs, **TIGHT)


# Guest manners


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_on_the_model_between_attach_and_detach_only():
    model = seeded(mlp())
    layers: dict[str, Layer] = find_layers(model)[0]
    recorder = Recorder(layers)
    assert hooks(model) == 0
    for each in (3, 1):  # of a layer; the first pass tells that no weight is used without a call
        recorder.attach()
        assert hooks(model) == 3 * each
        model(randn(4, 3, seed=0))
        assert recorder.calls
        recorder.detach()
    assert hooks(model) == 0
    assert not recorder.calls
    model(randn(4, 3, seed=0))
    assert not recorder.calls
    copy.deepcopy(model)
    pickle.dumps(model)


def test_weights_used_without_a_call_are_seen_in_every_pass():
    """As in torchvision's Swin and timm's BEiT; a pass that is not recorded tells nothing of the next."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.layer.weight, self.layer.bias)

    model, inputs = seeded(Product()), randn(4, 3, seed=0)
    recorder = Recorder(find_layers(model)[0])
    for is_recording in (False, True, True):
        recorder.attach()
        recorder.is_recording = is_recording
        output = model(inputs)
        rows = recorder.rows(output, torch.ones_like(output)[None]) if is_recording else {}
        recorder.detach()
        assert list(rows) == ["layer"] * is_recording
        if is_recording:
            assert_close(rows["layer"].inputs[:, 0, :3], inputs, **TIGHT)


def test_attaching_twice_is_an_error_and_detaching_twice_is_not():
    model = seeded(mlp())
    recorder = Recorder(find_layers(model)[0])
    recorder.detach()
    recorder.attach()
    with pytest.raises(UsageError, match=r"detach\(\) it first"):
        recorder.attach()
    assert hooks(model) > 0
    recorder.detach()
    recorder.detach()
    assert hooks(model) == 0
    recorder.attach()
    assert hooks(model) > 0
    recorder.detach()


def test_the_output_and_the_users_backward_are_as_without_a_recorder(model_and_inputs):
    model, inputs = model_and_inputs
    expected = model(inputs)
    expected.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    recorder = Recorder(find_layers(model)[0])
    recorder.attach()
    output = model(inputs)
    recorder.rows(output, randn(2, *output.shape, seed=0))
    recorder.detach()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(output, expected)
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])
