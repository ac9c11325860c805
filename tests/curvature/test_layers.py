"""Layers: which parameters become which block, and a reason for every one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac.curvature import find_layers
from tests.helpers import TIGHT, randn, seeded


class Tied(nn.Module):
    """Two modules, one weight, two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(3, 1)


class Scaled(nn.Linear):
    """A linear layer with another parameter and the same forward."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.temperature = nn.Parameter(torch.ones(()))


class Squared(nn.Linear):
    """A linear layer with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def test_supported_modules_are_layers_named_as_in_the_model():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1)))
    layers, reasons = find_layers(model)
    assert {name: layer.shape for name, layer in layers.items()} == {"0": (4, 19), "3.0": (5, 5), "3.1": (1, 6)}
    assert reasons == {}
    assert list(layers["3.0"].parameters) == ["3.0.weight", "3.0.bias"]
    assert layers["3.0"].module is model[3][0]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 4), (4, 4)),
        (nn.Linear(3, 4, bias=False), (4, 3)),
        (nn.Conv1d(2, 3, 5), (3, 11)),
        (nn.Conv2d(4, 6, (3, 2), groups=2), (2, 3, 13)),
        (nn.Conv2d(3, 3, 3, groups=3, bias=False), (3, 1, 9)),
        (nn.Conv3d(2, 3, 2), (3, 17)),
    ],
)
def test_a_blocks_shape_is_out_by_in_with_the_bias_as_the_last_column(module, shape):
    layers, _ = find_layers(nn.Sequential(module))
    assert layers["0"].shape == layers["0"].values().shape == shape


def test_a_model_that_is_a_layer_itself_is_the_root():
    model = seeded(nn.Linear(3, 2))
    layers, reasons = find_layers(model)
    assert list(layers) == ["(root)"]
    assert reasons == {}
    assert list(layers["(root)"].parameters) == ["weight", "bias"]
    assert torch.equal(layers["(root)"].values(), torch.cat([model.weight, model.bias[:, None]], dim=1))


def test_modules_without_an_adapter_are_reasons():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Squared(2, 2))
    layers, reasons = find_layers(model)
    assert list(layers) == ["0"]
    assert reasons == {
        "1.weight": "BatchNorm1d has no adapter",
        "1.bias": "BatchNorm1d has no adapter",
        "2.weight": "Squared has no adapter",
        "2.bias": "Squared has no adapter",
    }


def test_a_bare_parameter_is_a_reason_and_its_siblings_are_not():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(()))
    model.linear = nn.Linear(2, 2)
    layers, reasons = find_layers(model)
    assert list(layers) == ["linear"]
    assert reasons == {"scale": "Module has no adapter"}


def test_a_frozen_parameter_is_neither_a_layer_nor_a_reason():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2).requires_grad_(False))
    assert find_layers(model) == ({}, {})


def test_a_frozen_bias_leaves_a_block_without_a_bias_column():
    model = seeded(nn.Sequential(nn.Linear(3, 2)))
    model[0].bias.requires_grad_(False)
    layers, reasons = find_layers(model)
    assert reasons == {}
    assert layers["0"].shape == (2, 3)
    assert layers["0"].bias is None
    assert layers["0"].bias_name is None
    assert list(layers["0"].parameters) == ["0.weight"]
    assert list(layers["0"].tensors(randn(2, 3, seed=0))) == ["0.weight"]


def test_a_frozen_weight_leaves_its_bias_without_a_block():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    layers, reasons = find_layers(model)
    assert layers == {}
    assert reasons == {"0.bias": "it is the trainable bias of a frozen weight"}


def test_tied_weights_have_no_block_in_either_module():
    layers, reasons = find_layers(Tied())
    assert list(layers) == ["head"]
    why = "its weights are tied between encoder, decoder"
    assert reasons == {"encoder.weight": why, "encoder.bias": why, "decoder.bias": why}


def test_one_module_under_two_names_is_one_layer():
    """It is called twice, which the recorder sums; nothing is tied."""
    shared = nn.Linear(2, 2)
    layers, reasons = find_layers(nn.Sequential(shared, nn.ReLU(), shared))
    assert list(layers) == ["0"]
    assert reasons == {}


def test_a_further_parameter_in_a_layer_is_a_reason_for_all_of_it():
    layers, reasons = find_layers(nn.Sequential(Scaled()))
    assert layers == {}
    assert set(reasons) == {"0.weight", "0.bias", "0.temperature"}
    assert set(reasons.values()) == {"Scaled has parameters ['temperature'] beside its weight and bias"}


def test_a_reparametrised_weight_is_not_called_frozen():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    layers, reasons = find_layers(model)
    assert layers == {}
    assert set(reasons) == set(dict(model.named_parameters()))
    assert reasons["0.bias"] == "its weight is not a parameter of its own (a parametrization computes it)"


def test_a_linear_layer_that_attention_uses_without_calling_it_is_no_block():
    """Its inputs are never seen, so that it would wait for statistics forever."""
    layers, reasons = find_layers(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    assert list(layers) == ["linear1", "linear2"]
    assert reasons["self_attn.out_proj.weight"] == "MultiheadAttention uses it without calling it"
    assert reasons["self_attn.out_proj.bias"] == "MultiheadAttention uses it without calling it"


def test_every_trainable_parameter_has_exactly_one_home():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.LSTM(4, 2), Tied(), Scaled())
    model[0].bias.requires_grad_(False)
    layers, reasons = find_layers(model)
    homes = [name for layer in layers.values() for name in layer.parameters] + list(reasons)
    assert sorted(homes) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


# Reading and writing


@pytest.fixture(params=[(nn.Linear, (3, 2)), (nn.Conv2d, (4, 6, 3, 1, 0, 1, 2))], ids=["linear", "grouped conv"])
def model(request) -> nn.Module:
    kind, arguments = request.param
    return seeded(nn.Sequential(kind(*arguments)))


def test_matrix_and_tensors_are_each_others_inverse(model):
    layer = find_layers(model)[0]["0"]
    tensors = layer.tensors(layer.matrix(layer.parameters))
    assert {name: parameter.shape for name, parameter in layer.parameters.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    for name, parameter in layer.parameters.items():
        assert torch.equal(tensors[name], parameter)


@pytest.mark.parametrize("bias", [True, False])
def test_values_are_a_copy_without_a_graph(bias):
    layer = find_layers(seeded(nn.Sequential(nn.Linear(3, 2, bias=bias))))[0]["0"]
    values = layer.values()
    before = values.clone()
    assert not values.requires_grad
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(values, before)
    assert not torch.equal(values, layer.values())


def test_gradient_is_none_until_there_is_one(model):
    layer = find_layers(model)[0]["0"]
    assert layer.gradient() is None


def test_gradient_joins_weight_and_bias(model):
    layer = find_layers(model)[0]["0"]
    for name, parameter in layer.parameters.items():
        parameter.grad = randn(*parameter.shape, seed=len(name))
    for name, tensor in layer.tensors(layer.gradient()).items():
        assert torch.equal(tensor, layer.parameters[name].grad)


@pytest.mark.parametrize("present", ["weight", "bias"])
def test_a_missing_gradient_beside_a_present_one_is_zero(model, present):
    layer = find_layers(model)[0]["0"]
    parameter = getattr(model[0], present)
    parameter.grad = randn(*parameter.shape, seed=0)
    tensors = layer.tensors(layer.gradient())
    other = "bias" if present == "weight" else "weight"
    assert_close(tensors[f"0.{present}"], parameter.grad, **TIGHT)
    assert not tensors[f"0.{other}"].any()
    assert getattr(model[0], other).grad is None
