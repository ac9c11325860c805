"""What every adapter must do, for every option of its modules: rows are Jacobians, and the model stays what it was.

The suite runs over ``cases.py``: a new kind of module takes part by having a case there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten

from bayes_kfac.batches import call
from bayes_kfac.curvature import Recorder, find_layers
from tests.curvature.modules.cases import CASES, PADDED, SEQUENCE, Conv1D
from tests.helpers import TIGHT, assert_rows_are_jacobians, pull_back, randn, record, seeded

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    build, inputs = CASES[request.param]
    return seeded(build()), inputs


@contextmanager
def watched(model: nn.Module) -> Iterator[Recorder]:
    recorder = Recorder(find_layers(model)[0])
    recorder.attach()
    try:
        yield recorder
    finally:
        recorder.detach()


# Rows


def test_rows_are_the_jacobians_of_each_example(case):
    """By torch.func, for each element of each example's output and every trainable parameter."""
    assert_rows_are_jacobians(*case)
    assert record(*case).keys() == find_layers(case[0])[0].keys()


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_rows_are_jacobians_with_every_weight_or_every_bias_frozen(case, kind):
    """What is left of a block is a block without its last column, or the column alone."""
    model, inputs = case
    for name, parameter in model.named_parameters():
        if kind in name:
            parameter.requires_grad_(False)
    if any(parameter.requires_grad for parameter in model.parameters()):
        assert_rows_are_jacobians(model, inputs)


def test_a_layer_covers_every_trainable_parameter(case):
    model, _ = case
    layers, reasons = find_layers(model)
    covered = [name for layer in layers.values() for name in layer.parameters]
    assert sorted(covered) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert reasons == {}


def test_the_rows_account_for_the_whole_gradient(case):
    passed = pull_back(*case)
    gradient = randn(*passed.output.shape, seed=3)
    passed.check_complete(gradient, passed.rows(gradient[None]))


def test_a_total_is_the_sum_of_its_columns_jacobians(case):
    for rows in record(*case).values():
        jacobians = rows.jacobians()
        for column in (0, len(jacobians) - 1):
            assert_close(rows.total(column), jacobians[column].sum(-3), **TIGHT)


def test_rows_have_the_documented_shapes(case):
    model, inputs = case
    layers, _ = find_layers(model)
    output = call(model, inputs)
    columns, batch = output[0].numel(), len(output)
    for name, rows in record(model, inputs).items():
        *blocks, out, in_ = layers[name].shape
        shared = rows.inputs.shape[-2]
        assert rows.inputs.shape == (*blocks, batch, shared, in_)
        assert rows.gradients.shape == (columns, *blocks, batch, shared, out)
        assert rows.num_examples == batch


# Blocks and parameters


def test_matrix_and_tensors_are_each_others_inverse(case):
    for layer in find_layers(case[0])[0].values():
        matrix = layer.matrix(layer.parameters)
        assert matrix.shape == layer.shape
        tensors = layer.tensors(matrix)
        assert tensors.keys() == layer.parameters.keys()
        for name, parameter in layer.parameters.items():
            assert torch.equal(tensors[name], parameter)
        assert torch.equal(layer.matrix(tensors), matrix)


def test_tensors_keep_leading_dimensions(case):
    for layer in find_layers(case[0])[0].values():
        samples = randn(2, 3, *layer.shape, seed=3)
        for name, tensor in layer.tensors(samples).items():
            for i, j in [(0, 0), (1, 2)]:
                assert torch.equal(tensor[i, j], layer.tensors(samples[i, j])[name])


# The model stays what it was


def assert_same_tree(actual: Any, expected: Any) -> None:
    """The same structure, the same shapes, and the same numbers to rounding."""
    leaves, structure = tree_flatten(actual)
    others, other_structure = tree_flatten(expected)
    assert structure == other_structure
    for leaf, other in zip(leaves, others, strict=True):
        assert type(leaf) is type(other)
        if isinstance(leaf, Tensor):
            assert_close(leaf, other, **TIGHT)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_output_is_as_without_a_recorder(case, mode):
    model, inputs = case
    model.train(mode)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = call(model, inputs)
    model.load_state_dict(state)
    with watched(model):
        assert_same_tree(call(model, inputs), expected)


#: Modules that are run in another way while they are watched, with all that they may be called with and return.
CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    **{
        f"{kind}, {name}": (lambda kind=kind, options=options: getattr(nn, kind)(4, 3, **options), (SEQUENCE,), {})
        for kind in ("RNN", "LSTM", "GRU")
        for name, options in {
            "time first": {},
            "batch first": {"batch_first": True},
            "deep": {"num_layers": 3, "bidirectional": True, "dropout": 0.0},
        }.items()
    },
    "RNN of one example": (lambda: nn.RNN(4, 3, 2, batch_first=True), (SEQUENCE[0], randn(2, 3, seed=4)), {}),
    "LSTM of one example": (
        lambda: nn.LSTM(4, 3, bidirectional=True),
        (SEQUENCE[0],),
        {"hx": (randn(2, 3, seed=4), randn(2, 3, seed=5))},
    ),
    "GRU of one example": (lambda: nn.GRU(4, 3), (SEQUENCE[0],), {"hx": None}),
    "GRU, keywords": (lambda: nn.GRU(4, 3), (), {"input": SEQUENCE, "hx": randn(1, 4, 3, seed=4)}),
    "LSTM cell": (lambda: nn.LSTMCell(4, 3), (SEQUENCE[0],), {}),
    "LSTM cell of one example": (
        lambda: nn.LSTMCell(4, 3),
        (SEQUENCE[0, 0],),
        {"hx": (randn(3, seed=4), randn(3, seed=5))},
    ),
    "GRU cell of one example": (lambda: nn.GRUCell(4, 3, bias=False), (SEQUENCE[0, 0],), {}),
    "RNN cell, keywords": (lambda: nn.RNNCell(4, 3), (), {"input": SEQUENCE[0], "hx": randn(4, 3, seed=4)}),
    **{
        f"attention, {name}": (lambda: nn.MultiheadAttention(4, 2), (SEQUENCE,) * 3, options)
        for name, options in {
            "weights": {},
            "weights of each head": {"average_attn_weights": False},
            "no weights": {"need_weights": False},
            "key_padding_mask": {"key_padding_mask": torch.tensor([[False, True, True]] * 4)},
            "attn_mask of floats": {"attn_mask": randn(3, 3, seed=4)},
            "attn_mask of each head": {"attn_mask": randn(8, 3, 3, seed=4), "need_weights": False},
        }.items()
    },
    "attention of one example": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        (SEQUENCE[0], SEQUENCE[1], SEQUENCE[1]),
        {"key_padding_mask": PADDED[2]},
    ),
    "attention, everything by keyword": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, add_zero_attn=True, batch_first=True),
        (),
        {"query": SEQUENCE, "value": SEQUENCE, "key": SEQUENCE[..., :3], "key_padding_mask": PADDED},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_watched_module_returns_what_it_did(name):
    """The structure too: weights or ``None``, a state or a pair of them, with or without a batch."""
    build, args, kwargs = CALLS[name]
    module = seeded(build())
    expected = module(*args, **kwargs)
    with watched(module):
        assert_same_tree(module(*args, **kwargs), expected)


def traces(model: nn.Module) -> list[str]:
    """What a recorder may put on modules."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return [
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute in ("forward", *hooks)
        if module.__dict__.get(attribute)
    ]


def test_nothing_is_left_on_the_modules(case):
    model, inputs = case
    with watched(model):
        call(model, inputs)
        assert traces(model) or not find_layers(model)[0]
    assert traces(model) == []


@pytest.mark.parametrize(
    "module",
    [nn.Linear(4, 3), nn.LSTM(4, 3), nn.GRUCell(4, 3), nn.MultiheadAttention(4, 2)],
    ids=lambda m: type(m).__name__,
)
def test_nothing_is_left_on_a_module_whose_forward_raised(module):
    wide = torch.zeros(2, 5) if isinstance(module, nn.GRUCell) else torch.zeros(2, 2, 5)
    with pytest.raises((RuntimeError, AssertionError)), watched(module):
        module(*[wide] * (3 if isinstance(module, nn.MultiheadAttention) else 1))
    assert traces(module) == []


def test_a_forward_of_the_users_own_is_put_back():
    """Some libraries wrap the forward of a module object; it is theirs again afterwards."""
    attention = seeded(nn.MultiheadAttention(4, 2))
    own = attention.forward

    def wrapped(*args: Any) -> Any:
        return own(*args)

    attention.forward = wrapped
    with watched(attention):
        assert attention.forward is not wrapped
    assert attention.forward is wrapped


# Which modules look the part


def test_a_hugging_face_conv1d_is_known_by_its_looks():
    """Its library is not imported; a class of that name without its looks is another module."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2))

    Other.__name__ = "Conv1D"
    layers, reasons = find_layers(nn.Sequential(Conv1D(3, 2), Other()))
    assert layers["0"].shape == (3, 3)
    assert reasons == {"1.weight": "Conv1D has no adapter"}
