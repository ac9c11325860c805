"""Adapters: for every kind of module, rows reproduce its forward pass and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac.curvature import ModuleAdapter, find_layers, modules, register
from bayes_kfac.curvature.modules import CompositeAdapter, adapter_for, base, register_like
from bayes_kfac.curvature.modules.product import product, recorded_linear
from tests.helpers import TIGHT, assert_rows_are_jacobians, randn, record, seeded

# torch itself warns of the copy that it makes
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")

CASES = {
    "linear": (lambda bias: nn.Linear(3, 4, bias=bias), (5, 3)),
    "linear on time": (lambda bias: nn.Linear(3, 4, bias=bias), (5, 2, 3)),
    "linear on images": (lambda bias: nn.Linear(3, 4, bias=bias), (5, 2, 6, 3)),
    "linear to one": (lambda bias: nn.Linear(1, 1, bias=bias), (1, 1)),
    "conv1d": (lambda bias: nn.Conv1d(2, 3, 3, bias=bias), (4, 2, 7)),
    "conv1d stride": (lambda bias: nn.Conv1d(2, 3, 3, stride=2, bias=bias), (4, 2, 8)),
    "conv1d dilation": (lambda bias: nn.Conv1d(2, 3, 3, dilation=2, padding=1, bias=bias), (4, 2, 8)),
    "conv1d one position": (lambda bias: nn.Conv1d(2, 3, 7, bias=bias), (4, 2, 7)),
    "conv1d same, even kernel": (lambda bias: nn.Conv1d(2, 3, 4, padding="same", bias=bias), (4, 2, 7)),
    "conv1d circular": (lambda bias: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular", bias=bias), (4, 2, 7)),
    "conv1d groups": (lambda bias: nn.Conv1d(4, 6, 3, groups=2, bias=bias), (3, 4, 7)),
    "conv2d": (lambda bias: nn.Conv2d(2, 3, 3, bias=bias), (4, 2, 5, 6)),
    "conv2d 1x1": (lambda bias: nn.Conv2d(2, 3, 1, bias=bias), (4, 2, 3, 2)),
    "conv2d unequal": (
        lambda bias: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), bias=bias),
        (4, 2, 5, 6),
    ),
    "conv2d valid": (lambda bias: nn.Conv2d(2, 3, 3, padding="valid", bias=bias), (4, 2, 5, 5)),
    "conv2d same": (lambda bias: nn.Conv2d(2, 3, (3, 2), padding="same", bias=bias), (4, 2, 5, 4)),
    "conv2d same, dilated": (
        lambda bias: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(3, 1), bias=bias),
        (2, 2, 5, 4),
    ),
    "conv2d circular": (
        lambda bias: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular", bias=bias),
        (2, 2, 5, 4),
    ),
    "conv2d reflect": (
        lambda bias: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect", bias=bias),
        (2, 2, 5, 4),
    ),
    "conv2d replicate": (
        lambda bias: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="replicate", bias=bias),
        (2, 2, 5, 4),
    ),
    "conv2d same, reflect": (
        lambda bias: nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="reflect", bias=bias),
        (2, 2, 5, 4),
    ),
    "conv2d groups": (lambda bias: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, bias=bias), (3, 4, 5, 5)),
    "conv2d depthwise": (lambda bias: nn.Conv2d(3, 3, 3, groups=3, bias=bias), (3, 3, 4, 5)),
    "conv2d depthwise, multiplied": (lambda bias: nn.Conv2d(3, 6, 3, groups=3, dilation=2, bias=bias), (3, 3, 6, 5)),
    "conv3d": (lambda bias: nn.Conv3d(2, 3, 2, bias=bias), (2, 2, 3, 4, 3)),
    "conv3d everything": (
        lambda bias: nn.Conv3d(
            4, 2, (2, 1, 3), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(1, 1, 2), groups=2, bias=bias
        ),
        (2, 4, 3, 4, 3),
    ),
}


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, bias: bool) -> tuple[nn.Module, ModuleAdapter, Tensor]:
    build, shape = CASES[request.param]
    module = seeded(build(bias))
    adapter = adapter_for(module)
    assert adapter is not None
    return module, adapter(module, bias=bias), randn(*shape, seed=1)


def as_rows(module: nn.Module, output: Tensor) -> Tensor:
    """A module's output as ``[(groups,) batch, shared, out]``, one position and one group at a time."""
    if isinstance(module, nn.Linear):
        return output.reshape(len(output), -1, output.shape[-1])
    positions = torch.stack(list(output.flatten(2).unbind(-1)), dim=1)
    return positions if module.groups == 1 else torch.stack(list(positions.chunk(module.groups, dim=-1)))


def test_rows_times_the_matrix_are_the_modules_output(case):
    module, adapter, inputs = case
    matrix = adapter.to_matrix(module.weight, module.bias)
    assert matrix.shape == adapter.shape
    outputs = torch.einsum("...nti,...oi->...nto", adapter.input_rows(inputs), matrix)
    assert_close(outputs, as_rows(module, module(inputs)), **TIGHT)


def test_gradient_rows_are_laid_out_like_the_outputs_rows(case):
    module, adapter, inputs = case
    output = module(inputs)
    assert torch.equal(adapter.gradient_rows(output), as_rows(module, output))


def test_products_of_rows_sum_to_autograds_gradients(case):
    module, adapter, inputs = case
    output = module(inputs)
    gradient = randn(*output.shape, seed=2)
    output.backward(gradient)
    product = torch.einsum("...nto,...nti->...oi", adapter.gradient_rows(gradient), adapter.input_rows(inputs))
    weight, bias = adapter.from_matrix(product)
    assert_close(weight, module.weight.grad, **TIGHT)
    assert (bias is None) == (module.bias is None)
    if bias is not None:
        assert_close(bias, module.bias.grad, **TIGHT)


def test_matrix_and_tensors_are_each_others_inverse(case):
    module, adapter, _ = case
    matrix = adapter.to_matrix(module.weight, module.bias)
    weight, bias = adapter.from_matrix(matrix)
    assert torch.equal(weight, module.weight)
    assert (bias is None) == (module.bias is None)
    assert bias is None or torch.equal(bias, module.bias)


def test_from_matrix_keeps_leading_sample_dimensions(case):
    _, adapter, _ = case
    samples = randn(2, 3, *adapter.shape, seed=3)
    weights, biases = adapter.from_matrix(samples)
    for i in range(2):
        for j in range(3):
            weight, bias = adapter.from_matrix(samples[i, j])
            assert torch.equal(weights[i, j], weight)
            assert (biases is None) == (bias is None)
            assert bias is None or torch.equal(biases[i, j], bias)


def test_the_bias_is_the_last_column_and_its_input_is_one():
    module = seeded(nn.Linear(3, 4))
    adapter = adapter_for(module)(module, bias=True)
    assert torch.equal(adapter.to_matrix(module.weight, module.bias)[:, -1], module.bias)
    assert torch.equal(adapter.input_rows(randn(5, 3, seed=0))[..., -1], torch.ones(5, 1, dtype=torch.float64))


def test_a_lone_vector_is_a_batch_of_one():
    module = seeded(nn.Linear(3, 4))
    adapter, vector = adapter_for(module)(module, bias=True), randn(3, seed=0)
    assert torch.equal(adapter.input_rows(vector), adapter.input_rows(vector[None]))
    assert torch.equal(adapter.gradient_rows(module(vector)), adapter.gradient_rows(module(vector[None])))


# Which module has which adapter


class Renamed(nn.Linear):
    """A subclass that is still the same function."""


class Doubled(nn.Linear):
    """A subclass that is another function."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


class RenamedDoubled(Doubled):
    """Inherits the other forward."""


def test_a_subclass_counts_as_its_parent_while_it_keeps_the_forward():
    assert adapter_for(Renamed(2, 2)) is adapter_for(nn.Linear(2, 2)) is modules.LinearAdapter


@pytest.mark.parametrize("kind", [Doubled, RenamedDoubled])
def test_a_subclass_with_another_forward_has_no_adapter(kind):
    assert adapter_for(kind(2, 2)) is None


class OtherRecurrence(nn.LSTM):
    """A subclass whose recurrence is another one."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
        return super().forward(input.flip(0), hx)


def test_a_recurrent_subclass_with_another_forward_has_no_adapter():
    """Its forward would be replaced by the parent's while it is watched."""
    assert adapter_for(nn.LSTM(2, 2)) is modules.RecurrentAdapter
    assert adapter_for(OtherRecurrence(2, 2)) is None
    assert set(find_layers(nn.Sequential(OtherRecurrence(2, 2)))[1].values()) == {"OtherRecurrence has no adapter"}


@pytest.mark.parametrize(
    "module",
    [nn.Bilinear(2, 2, 2), nn.PReLU(), nn.SyncBatchNorm(2), nn.ReLU(), nn.Sequential()],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_have_no_adapter(module):
    assert adapter_for(module) is None


# A user's own module


class Transposed(nn.Module):
    """A linear layer as some libraries write it: ``x K + b`` with ``K`` of shape ``[in, out]``, fields of their own."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class DoubledAdapter(modules.LinearAdapter):
    """``2 (W a)``: the factor belongs to the gradient's rows."""

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        return 2 * super().gradient_rows(gradient)


class TransposedAdapter(modules.LinearAdapter):
    """The adapter that a user would write for it."""

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().to_matrix(weight.mT, bias)

    def from_matrix(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        return (matrix[..., :-1].mT, matrix[..., -1]) if self.bias else (matrix.mT, None)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.module.weight.shape[1], self.module.weight.shape[0])


@pytest.fixture
def registered(monkeypatch):
    """Register adapters for one test."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.setattr(base, "_LIKENESSES", list(base._LIKENESSES))

    def add(kind: type[nn.Module], adapter: type[ModuleAdapter]) -> None:
        assert register(kind)(adapter) is adapter

    return add


def test_a_users_module_becomes_a_layer_by_one_registration(registered):
    registered(Transposed, TransposedAdapter)
    model = seeded(nn.Sequential(Transposed(3, 4), nn.Tanh(), Transposed(4, 2)))
    layers, reasons = find_layers(model)
    assert {name: layer.shape for name, layer in layers.items()} == {"0": (4, 4), "2": (2, 5)}
    assert reasons == {}
    inputs = randn(5, 3, seed=1)
    gradient = randn(1, 5, 2, seed=2)
    rows = record(model, inputs, gradient)
    model(inputs).backward(gradient[0])
    for name, layer in layers.items():
        product = torch.einsum("nto,nti->oi", rows[name].gradients[0], rows[name].inputs)
        assert_close(product, layer.gradient(), **TIGHT)
        assert_close(layer.tensors(product)[f"{name}.weight"], model[int(name)].weight.grad, **TIGHT)


def test_a_users_registration_serves_its_subclasses_and_leaves_the_parent_alone(registered):
    registered(Doubled, DoubledAdapter)
    assert adapter_for(Doubled(2, 2)) is adapter_for(RenamedDoubled(2, 2)) is DoubledAdapter
    assert adapter_for(nn.Linear(2, 2)) is modules.LinearAdapter


def looks_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Transposed"


def test_a_module_may_be_known_by_its_looks(registered):
    """For a library that is not imported; a registration by type goes before."""
    assert register_like(looks_transposed)(TransposedAdapter) is TransposedAdapter
    assert adapter_for(Transposed(2, 2)) is TransposedAdapter
    assert adapter_for(nn.PReLU()) is None
    registered(Transposed, DoubledAdapter)
    assert adapter_for(Transposed(2, 2)) is DoubledAdapter


class Gate(nn.Module):
    """``sigmoid(W x + b) · tanh(V x)``: two products with weights of its own."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(out_features, in_features))
        self.shift = nn.Parameter(torch.empty(out_features))
        self.value = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.gate.mT + self.shift).sigmoid() * (x @ self.value.mT).tanh()


class GateAdapter(CompositeAdapter):
    """Tells of both; sequences inside of an adapter are time first."""

    def parts(self) -> dict[str, Any]:
        return {"gate": product("gate", "shift"), "value": product("value")}

    def forward(self, record, x: Tensor) -> Tensor:
        sequence, module = x.unsqueeze(0), self.module
        gate = recorded_linear(record, "gate", sequence, module.gate, module.shift)
        value = recorded_linear(record, "value", sequence, module.value, None)
        return (gate.sigmoid() * value.tanh()).squeeze(0)


def test_a_users_module_of_several_products_becomes_several_layers(registered):
    registered(Gate, GateAdapter)
    model, inputs = seeded(nn.Sequential(Gate(3, 4), nn.Linear(4, 2))), randn(5, 3, seed=1)
    layers, reasons = find_layers(model)
    assert {name: layer.shape for name, layer in layers.items()} == {"0.gate": (4, 4), "0.value": (4, 3), "1": (2, 5)}
    assert reasons == {}
    assert_rows_are_jacobians(model, inputs)
