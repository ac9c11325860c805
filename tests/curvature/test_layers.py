"""Layers: which parameters become which block, and a reason for every one that does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayes_kfac as bk
from bayes_kfac.curvature import Layer, find_layers
from bayes_kfac.errors import UsageError
from tests.curvature.modules.cases import Conv1D, LanguageModel, tied
from tests.helpers import TIGHT, randn, seeded


class Scaled(nn.Linear):
    """A linear layer with another parameter and the same forward."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.temperature = nn.Parameter(torch.ones(()))


class Squared(nn.Linear):
    """A linear layer with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Gated(nn.Module):
    """A container with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(2, 3))
        self.layer = nn.Linear(2, 2)


class Reader(nn.Module):
    """Holds the weight of its layer under another name too, and reads it there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.matrix = self.layer.weight


def parameters_of(layers: dict[str, Layer]) -> dict[str, list[str]]:
    return {name: list(layer.parameters) for name, layer in layers.items()}


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
        (Conv1D(4, 3), (4, 4)),
        (nn.Conv1d(2, 3, 5), (3, 11)),
        (nn.Conv2d(4, 6, (3, 2), groups=2), (2, 3, 13)),
        (nn.Conv2d(3, 3, 3, groups=3, bias=False), (3, 1, 9)),
        (nn.Conv3d(2, 3, 2), (3, 17)),
        (nn.ConvTranspose1d(2, 3, 5), (3, 11)),
        (nn.ConvTranspose2d(4, 6, (3, 2), groups=2, bias=False), (2, 3, 12)),
        (nn.Embedding(7, 3), (3, 7)),
        (nn.EmbeddingBag(7, 3), (3, 7)),
        (nn.LayerNorm((2, 3)), (6, 1, 2)),
        (nn.LayerNorm(3, bias=False), (3, 1, 1)),
        (nn.RMSNorm(3), (3, 1, 1)),
        (nn.GroupNorm(2, 4), (4, 1, 2)),
        (nn.BatchNorm2d(4), (4, 1, 2)),
        (nn.InstanceNorm1d(4, affine=True), (4, 1, 2)),
    ],
)
def test_a_blocks_shape_is_out_by_in_with_the_bias_as_the_last_column(module, shape):
    layers, _ = find_layers(nn.Sequential(module))
    assert layers["0"].shape == layers["0"].values().shape == shape


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (nn.LSTM(3, 2), {"ih_l0": (8, 4), "hh_l0": (8, 3)}),
        (nn.LSTM(3, 4, proj_size=2), {"ih_l0": (16, 4), "hh_l0": (16, 3), "hr_l0": (2, 4)}),
        (
            nn.GRU(3, 2, num_layers=2, bidirectional=True, bias=False),
            {
                "ih_l0": (6, 3),
                "hh_l0": (6, 2),
                "ih_l0_reverse": (6, 3),
                "hh_l0_reverse": (6, 2),
                "ih_l1": (6, 4),
                "hh_l1": (6, 2),
                "ih_l1_reverse": (6, 4),
                "hh_l1_reverse": (6, 2),
            },
        ),
        (nn.RNNCell(3, 2), {"ih": (2, 4), "hh": (2, 3)}),
        (nn.MultiheadAttention(4, 2), {"in_proj": (12, 5), "out_proj": (4, 5)}),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=2),
            {"q_proj": (4, 4), "k_proj": (4, 3), "v_proj": (4, 2), "in_proj.bias": (12, 1), "out_proj": (4, 5)},
        ),
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True),
            {"in_proj": (12, 5), "bias_k": (4, 1), "bias_v": (4, 1), "out_proj": (4, 5)},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_module_of_several_products_has_a_block_for_each(module, shapes):
    """Named after the part, alone and inside of a model."""
    layers, reasons = find_layers(nn.ModuleDict({"inner": module}))
    assert {name: layer.shape for name, layer in layers.items()} == {f"inner.{n}": s for n, s in shapes.items()}
    assert reasons == {}
    assert set(find_layers(module)[0]) == set(shapes)


def test_a_model_that_is_a_layer_itself_is_the_root():
    model = seeded(nn.Linear(3, 2))
    layers, reasons = find_layers(model)
    assert list(layers) == ["(root)"]
    assert reasons == {}
    assert list(layers["(root)"].parameters) == ["weight", "bias"]
    assert torch.equal(layers["(root)"].values(), torch.cat([model.weight, model.bias[:, None]], dim=1))


def test_kinds_with_a_structure_of_their_own_say_so():
    """Unit-wise blocks of normalisations are dense; bare parameters are diagonal; the rest is the user's choice."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2), nn.ParameterList([nn.Parameter(torch.zeros(2))])])
    layers, _ = find_layers(model)
    assert [layer.adapter.structure for layer in layers.values()] == [None, "dense", "diagonal"]


# What has no block


def test_modules_without_an_adapter_are_reasons():
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU(2), Squared(2, 2))
    layers, reasons = find_layers(model)
    assert list(layers) == ["0"]
    assert reasons == {
        "1.weight": "PReLU has no adapter",
        "2.weight": "Squared has no adapter",
        "2.bias": "Squared has no adapter",
    }


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


def test_every_trainable_parameter_has_exactly_one_home():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.GroupNorm(2, 4),
        nn.LSTM(4, 2),
        tied(nn.Linear(3, 3), nn.Linear(3, 3)),
        Reader(),
        Scaled(),
        nn.PReLU(),
        Gated(),
        nn.Bilinear(2, 2, 2),
    )
    model[0].bias.requires_grad_(False)
    layers, reasons = find_layers(model)
    homes = [name for layer in layers.values() for name in layer.parameters] + list(reasons)
    assert sorted(homes) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert {"5.weight", "6.weight", "8.weight"} <= set(reasons)


def test_layers_and_reasons_are_in_the_models_order():
    model = nn.Sequential(nn.PReLU(), Gated(), nn.Linear(2, 2), Scaled())
    order = list(dict(model.named_parameters()))
    layers, reasons = find_layers(model)
    assert list(layers) == ["1.gate", "1.layer", "2"]
    assert list(reasons) == sorted(reasons, key=order.index)


# Bare parameters


def test_a_parameter_that_a_container_holds_itself_is_a_diagonal_block():
    model = nn.Sequential(Gated())
    layers, reasons = find_layers(model)
    assert parameters_of(layers) == {"0.gate": ["0.gate"], "0.layer": ["0.layer.weight", "0.layer.bias"]}
    assert layers["0.gate"].shape == (6, 1)
    assert layers["0.gate"].adapter.structure == "diagonal"
    assert reasons == {}


def test_parameters_in_containers_of_parameters_are_blocks():
    """However deep they are nested."""
    lists = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 3))])
    model = nn.ModuleDict({"a": nn.ModuleList([lists]), "b": nn.ParameterDict({"c": nn.Parameter(torch.zeros(()))})})
    layers, reasons = find_layers(model)
    assert {name: layer.shape for name, layer in layers.items()} == {"a.0.0": (2, 1), "a.0.1": (3, 1), "b.c": (1, 1)}
    assert reasons == {}


def test_a_scalar_is_read_and_written_like_any_other_parameter():
    layers, _ = find_layers(seeded(nn.ParameterList([nn.Parameter(torch.zeros(()))])))
    (layer,) = layers.values()
    (value,) = layer.tensors(layer.values()).values()
    assert value.shape == ()
    assert layer.tensors(randn(5, 1, 1, seed=0))["0"].shape == (5,)


def test_a_module_of_the_users_that_is_no_container_has_no_adapter():
    """Unless it is the whole model: then its parameters are all there is."""

    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(3))

    layers, reasons = find_layers(nn.Sequential(nn.Linear(3, 3), Offset()))
    assert list(layers) == ["0"]
    assert reasons == {"1.offset": "Offset has no adapter"}
    assert parameters_of(find_layers(Offset())[0]) == {"offset": ["offset"]}


def test_the_rest_may_be_diagonal():
    """Whatever the reason was: no adapter, a further parameter, a parametrization, a use that no adapter sees."""
    model = nn.Sequential(
        nn.Linear(2, 2), nn.PReLU(2), Scaled(), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), Reader()
    )
    whole, reasons = find_layers(model)
    layers, left = find_layers(model, rest="diagonal")
    assert left == {}
    assert {name for name in reasons if name in layers} == set(reasons)
    for name, layer in layers.items():
        if name in reasons:
            parameter = model.get_parameter(name)
            assert parameters_of({name: layer}) == {name: [name]}
            assert layer.shape == (parameter.numel(), 1)
            assert layer.adapter.structure == "diagonal"
        else:
            assert layer.shape == whole[name].shape


# Frozen parameters, and a choice of parameters


def test_a_frozen_parameter_is_neither_a_layer_nor_a_reason():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.PReLU().requires_grad_(False))
    assert find_layers(model) == ({}, {})


def test_a_frozen_bias_leaves_a_block_without_a_bias_column():
    model = seeded(nn.Sequential(nn.Linear(3, 2)))
    model[0].bias.requires_grad_(False)
    layers, reasons = find_layers(model)
    assert reasons == {}
    assert layers["0"].shape == (2, 3)
    assert layers["0"].bias_name is None
    assert list(layers["0"].parameters) == ["0.weight"]
    assert list(layers["0"].tensors(randn(2, 3, seed=0))) == ["0.weight"]


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear(3, 2), (2, 1)), (nn.Conv1d(2, 4, 3, groups=2), (2, 2, 1)), (nn.LayerNorm(3), (3, 1, 1))],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_frozen_weight_leaves_a_block_of_the_bias_alone(module, shape):
    """Under the name that it has wherever the weight is in another block, or in none."""
    model = seeded(nn.Sequential(module))
    model[0].weight.requires_grad_(False)
    layers, reasons = find_layers(model)
    assert reasons == {}
    (layer,) = layers.values()
    assert (layer.name, layer.weight_name, layer.bias_name) == ("0.bias", None, "0.bias")
    assert layer.shape == shape
    assert layer.like is model[0].bias
    assert torch.equal(layer.values().flatten(), model[0].bias)


def test_the_parameters_may_be_chosen():
    """Those that are chosen are sorted, trainable or not; the others are constants."""
    model = nn.Sequential(nn.Linear(3, 2), nn.PReLU(), Gated()).requires_grad_(False)
    chosen = [model[0].bias, model[1].weight, model[2].gate]
    layers, reasons = find_layers(model, chosen)
    assert parameters_of(layers) == {"0.bias": ["0.bias"], "2.gate": ["2.gate"]}
    assert reasons == {"1.weight": "PReLU has no adapter"}
    assert find_layers(model, []) == ({}, {})
    assert find_layers(model, [nn.Parameter(torch.zeros(1))]) == ({}, {})


# Tied weights


def test_one_module_under_two_names_is_one_layer():
    """It is called twice, which the recorder sums; nothing is tied."""
    shared = nn.Linear(2, 2)
    layers, reasons = find_layers(nn.Sequential(shared, nn.ReLU(), shared))
    assert list(layers) == ["0"]
    assert len(layers["0"].uses) == 1
    assert reasons == {}


def test_a_tied_weight_is_one_layer_and_its_biases_are_layers_of_their_own():
    layers, reasons = find_layers(tied(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert parameters_of(layers) == {"0": ["0.weight"], "0.bias": ["0.bias"], "2.bias": ["2.bias"]}
    assert [layer.shape for layer in layers.values()] == [(3, 3), (3, 1), (3, 1)]
    assert [len(layer.uses) for layer in layers.values()] == [2, 1, 1]
    assert reasons == {}


def test_weight_and_bias_that_are_tied_together_stay_together():
    layers, reasons = find_layers(tied(nn.Linear(3, 3), nn.Linear(3, 3), "weight", "bias"))
    assert parameters_of(layers) == {"0": ["0.weight", "0.bias"]}
    assert layers["0"].shape == (3, 4)
    assert len(layers["0"].uses) == 2
    assert reasons == {}


def test_a_tied_bias_is_one_layer_beside_its_weights():
    layers, _ = find_layers(tied(nn.Linear(3, 3), nn.Linear(3, 3), "bias"))
    assert parameters_of(layers) == {"0": ["0.weight"], "0.bias": ["0.bias"], "2": ["2.weight"]}
    assert [len(layer.uses) for layer in layers.values()] == [1, 2, 1]


@pytest.mark.parametrize("names", [["weight"], ["weight", "bias"]])
def test_convolutions_may_be_tied_across_strides_and_paddings(names):
    layers, reasons = find_layers(tied(nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, stride=2), *names))
    assert len(layers["0"].uses) == 2
    assert reasons == {}


def test_a_tied_embedding_takes_the_layout_of_the_output_layer():
    """The factor of the words is then on the output's side; the embedding's use is the transposed one."""
    layers, reasons = find_layers(LanguageModel(bias=True))
    layer = layers["head"]
    assert layer.shape == (6, 3)
    assert layer.weight_name == "embed.weight"
    assert [(type(use.adapter).__name__, use.transposed) for use in layer.uses] == [
        ("EmbeddingAdapter", True),
        ("LinearAdapter", False),
    ]
    assert layer.is_tied_to_transpose
    assert layer.sparse_sides == {"gradient"}
    assert parameters_of(layers)["head.bias"] == ["head.bias"]
    assert reasons == {}


def test_tied_embeddings_alone_stay_sparse_in_their_inputs():
    layers, _ = find_layers(tied(nn.Embedding(5, 3), nn.Embedding(5, 3)))
    assert layers["0"].shape == (3, 5)
    assert layers["0"].sparse_sides == {"input"}
    assert not layers["0"].is_tied_to_transpose


@pytest.mark.parametrize("order", [1, -1], ids=["attention first", "attention last"])
def test_a_linear_layer_may_be_tied_to_a_part_of_attention(order):
    attention, linear = nn.MultiheadAttention(4, 2, bias=False), nn.Linear(4, 4, bias=False)
    linear.weight = attention.out_proj.weight
    layers, reasons = find_layers(nn.ModuleList([attention, linear][::order]))
    (layer,) = [layer for layer in layers.values() if layer.shape == (4, 4)]
    assert {type(use.adapter.module) for use in layer.uses} == {nn.MultiheadAttention, nn.Linear}
    assert reasons == {}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Conv1d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3)),
        (nn.Conv1d(1, 4, 3), nn.Conv1d(2, 4, 3, groups=2)),
        (nn.Conv1d(2, 4, 1), nn.Linear(2, 4)),
        (nn.LayerNorm(3), nn.RMSNorm(3)),
        (nn.LayerNorm(3), nn.BatchNorm1d(3)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_uses_that_do_not_fit_each_other_are_a_reason(first, second):
    """Biases of such modules have blocks all the same."""
    layers, reasons = find_layers(tied(first, second))
    assert reasons == {"0.weight": "it is tied between 0, 2, which use it in different ways"}
    biases = {name for name, _ in tied(first, second).named_parameters() if name.endswith("bias")}
    assert {key for layer in layers.values() for key in layer.parameters} == biases


def test_a_bias_that_is_a_weight_elsewhere_is_a_reason():
    model = nn.Sequential(nn.Linear(3, 3), nn.RMSNorm(3))
    model[1].weight = model[0].bias
    layers, reasons = find_layers(model)
    assert parameters_of(layers) == {"0": ["0.weight"]}
    assert reasons == {"0.bias": "it is tied between 0, 1, which use it in different ways"}


def test_a_weight_that_is_a_parameter_elsewhere_is_a_reason():
    """No adapter sees what is done with it there; the bias has a block all the same."""
    layers, reasons = find_layers(nn.Sequential(Reader()))
    assert parameters_of(layers) == {"0.layer.bias": ["0.layer.bias"]}
    assert reasons == {"0.matrix": "it is tied between 0.layer and 0, whose use of it no adapter sees"}


def test_a_weight_in_a_module_without_an_adapter_is_a_reason():
    model = nn.Sequential(nn.Linear(2, 2), Squared(2, 2))
    model[1].weight = model[0].weight
    layers, reasons = find_layers(model)
    assert parameters_of(layers) == {"0.bias": ["0.bias"]}
    assert reasons["0.weight"] == "it is tied between 0 and 1, whose use of it no adapter sees"


def test_what_is_tied_to_a_use_that_no_adapter_sees_may_be_diagonal():
    layers, reasons = find_layers(Reader(), rest="diagonal")
    assert layers["matrix"].adapter.structure == "diagonal"
    assert reasons == {}


# Reading and writing


@pytest.fixture(
    params=[(nn.Linear, (3, 2)), (nn.Conv2d, (4, 6, 3, 1, 0, 1, 2)), (nn.LayerNorm, (4,))],
    ids=["linear", "grouped conv", "norm"],
)
def model(request) -> nn.Module:
    kind, arguments = request.param
    return seeded(nn.Sequential(kind(*arguments)))


@pytest.mark.parametrize("bias", [True, False])
def test_values_are_a_copy_without_a_graph(bias):
    layer = find_layers(seeded(nn.Sequential(nn.Linear(3, 2, bias=bias))))[0]["0"]
    values = layer.values()
    before = values.clone()
    assert not values.requires_grad
    with torch.no_grad():
        layer.like.add_(1)
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


# Modules of torch that are not as others


@pytest.mark.parametrize(
    ("lazy", "named"),
    [
        (lambda: nn.LazyLinear(2), r"'1' \(LazyLinear\)"),
        (lambda: nn.LazyBatchNorm1d(affine=False), r"'1' \(LazyBatchNorm1d\)"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda model: bk.Laplace(model, bk.likelihoods.Gaussian(), subset="last_layer"),
        lambda model: bk.NoisyKFAC(model, bk.likelihoods.Gaussian(), num_data=3),
        lambda model: bk.Posterior(model, bk.likelihoods.Gaussian(), {}, prior_precision={}, provenance=None),
    ],
    ids=["laplace", "trainer", "posterior"],
)
def test_a_lazy_module_without_its_shape_is_named(lazy, named, use):
    model = nn.Sequential(nn.Linear(2, 3), lazy())
    with pytest.raises(UsageError, match=rf"Module {named} takes its shape.*Call the model once on a batch first"):
        use(model)
    model(torch.zeros(4, 2))
    assert "0" in find_layers(model)[0]


@pytest.mark.parametrize("options", [{"subset": "last_layer"}, {"others": "diagonal"}])
def test_a_part_of_the_model_may_be_scripted(options):
    """The parameters of a scripted module are in a mapping of its own kind."""
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    scripted = nn.Sequential(torch.jit.script(copy.deepcopy(model[0])), *copy.deepcopy(model[1:]))
    x, y = randn(6, 4, seed=0), randn(6, 2, seed=1)
    own, plain = (
        bk.Laplace(net, bk.likelihoods.Gaussian(0.5), structure="diagonal", **options).fit([(x, y)], progress=False)
        for net in (scripted, model)
    )
    assert_close(own.log_marginal_likelihood(), plain.log_marginal_likelihood())
