"""Draws that are run several at once: the outputs of the loop, for every model, which is left as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from bayes_kfac.errors import ArgumentError
from bayes_kfac.prediction import Draws, sampled_outputs, sampling
from bayes_kfac.prediction.forward import call
from tests.helpers import randn, rng, seeded

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
COUNT = 10


class Wrapped(nn.Module):
    """A linear layer whose forward does something with its output."""

    def __init__(self, after: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("total", torch.zeros(4, 2))
        self.after = after
        self.captured = torch.zeros(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.linear(x))


class LastState(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


class Dictionary(nn.Module):
    """Several arguments, and an output that stands out in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(left) + right, "loss": left.sum()}


class Graph(nn.Module):
    """A linear layer on a graph, whose adjacency matrix is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, self.linear(x))


def keep(model: nn.Module, y: Tensor) -> Tensor:
    model.last = y
    model.kept.append(y)
    return y


def add_to_buffer(model: nn.Module, y: Tensor) -> Tensor:
    model.total.add_(y)
    return model.total.clone()


def add_to_captured(model: nn.Module, y: Tensor) -> Tensor:
    model.captured.copy_(y)
    return model.captured.clone()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    return model


X = randn(4, 3, seed=1)
SEQUENCE = randn(4, 6, 3, seed=1)
#: Models that vmap can run.
VECTORIZED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), X),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)),
        randn(3, 2, 5, 5, seed=1),
    ),
    "batch-norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)), X),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
        torch.arange(12).reshape(4, 3) % 7,
    ),
    "tied": (tied, X),
    "parametrized": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 2))), X),
    "dictionary": (Dictionary, {"left": X, "right": torch.ones(4, 2, dtype=torch.float64)}),
    "inplace": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), X),
    "attribute": (lambda: Wrapped(lambda model, y: setattr(model, "last", y) or y), X),
    "constant": (lambda: Wrapped(lambda model, y: torch.ones_like(model.captured)), X),
}
#: Models that it refuses, whatever operations it learns.
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "control-flow": (lambda: Wrapped(lambda model, y: y if y.sum() > 0 else -y), X),
    "item": (lambda: Wrapped(lambda model, y: y * y.sum().item()), X),
    "numpy": (lambda: Wrapped(lambda model, y: torch.from_numpy(y.numpy() + 1)), X),
    "buffer-inplace": (lambda: Wrapped(add_to_buffer), X),
    "captured-inplace": (lambda: Wrapped(add_to_captured), X),
}
#: Models with operations that it does not know, or runs one draw after the other with a warning: today's PyTorch.
UNKNOWN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "lstm": (lambda: LastState(nn.LSTM), SEQUENCE),
    "gru": (lambda: LastState(nn.GRU), SEQUENCE),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), randn(2, 5, 8, seed=1)),
    "sparse-input": (Graph, (X, torch.eye(4, dtype=torch.float64).to_sparse())),
    "weight-norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))), X),
}
MODELS = VECTORIZED | REFUSED | UNKNOWN


def prepared(name: str) -> tuple[nn.Module, dict[str, Tensor], Draws, Any]:
    make, inputs = MODELS[name]
    model = seeded(make())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.fill_(0.3)
            module.running_var.fill_(2.0)
    state = {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    parameters = dict(model.named_parameters())
    return model, state, draws_of(parameters), inputs


def draws_of(parameters: dict[str, Tensor], count: int = COUNT) -> Draws:
    generator = rng(3)
    return Draws(
        {
            name: value.detach() + 0.3 * torch.randn(count, *value.shape, generator=generator, dtype=value.dtype)
            for name, value in parameters.items()
        }
    )


def loop(model: nn.Module, state: dict[str, Tensor], draws: Draws, inputs: Any) -> Tensor:
    """The definition: one call after the other, in evaluation mode."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return torch.stack([call(model, {**state, **draw}, inputs) for draw in draws])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call of a model ran under vmap."""
    seen: list[bool] = []

    def counting(model: nn.Module, state: Any, inputs: Any) -> Tensor:
        under_vmap = any(torch._C._functorch.is_batchedtensor(value) for value in state.values())
        output = call(model, state, inputs)
        seen.append(under_vmap)
        return output

    monkeypatch.setattr(sampling, "call", counting)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_loop(name: str) -> None:
    """To rounding, silently (warnings are errors here, and a warning that is always shown stays hidden)."""
    model, state, draws, inputs = prepared(name)
    expected = loop(model, state, draws, inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = sampled_outputs(model, state, draws, inputs)
    assert not caught
    assert_close(outputs, expected, **CLOSE)
    assert name == "constant" or (outputs[0] != outputs[1]).any()


@pytest.mark.parametrize("name", VECTORIZED)
def test_what_vmap_can_run_it_runs(name: str, calls: list[bool]) -> None:
    """The first draw plainly, the others in a single call."""
    sampled_outputs(*prepared(name))
    assert calls == [False, True]


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses_runs_draw_by_draw(name: str, calls: list[bool]) -> None:
    sampled_outputs(*prepared(name))
    assert calls == [False] * COUNT


@pytest.mark.parametrize("count", [1, 2, 8, 9])
def test_few_draws(count: int, calls: list[bool]) -> None:
    """They are not worth vmap, which needs eight besides the first."""
    model, state, draws, inputs = prepared("mlp")
    draws = Draws({name: value[:count] for name, value in draws.values.items()})
    assert_close(sampled_outputs(model, state, draws, inputs), loop(model, state, draws, inputs), **CLOSE)
    assert calls == ([False, True] if count == 9 else [False] * count)


def test_chunks_bound_the_memory(monkeypatch: pytest.MonkeyPatch, calls: list[bool]) -> None:
    """The byte budget says how many draws are run at once; where that is less than eight they run one by one."""
    model, state, draws, inputs = prepared("mlp")
    expected = loop(model, state, draws, inputs)
    weights = sum(value[0].nbytes for value in draws.values.values())
    one = weights + sampling.ACTIVATIONS * (inputs.nbytes + expected[0].nbytes)
    for budget, seen in ((8 * one, [False, True, True]), (8 * one - 1, [False] * COUNT), (100 * one, [False, True])):
        calls.clear()
        monkeypatch.setattr(sampling, "CPU_CHUNK_BYTES", budget)
        assert_close(sampled_outputs(model, state, draws, inputs), expected, **CLOSE)
        assert calls == seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_any_gradient_mode(mode: Callable[[], Any]) -> None:
    model, state, draws, inputs = prepared("mlp")
    with mode():
        outputs = sampled_outputs(model, state, draws, inputs)
    assert not outputs.requires_grad
    assert_close(outputs.clone(), loop(model, state, draws, inputs), **CLOSE)


def test_compiled_models() -> None:
    """By torch.compile, and in place."""
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    state = {name: value.detach() for name, value in model.named_parameters()}
    draws = draws_of(state)
    expected = loop(model, state, draws, X)
    wrapped = torch.compile(copy.deepcopy(model), backend="eager")
    own = Draws({f"_orig_mod.{name}": value for name, value in draws.values.items()})
    assert_close(sampled_outputs(wrapped, {}, own, X), expected, **CLOSE)
    model.compile(backend="eager")
    assert_close(sampled_outputs(model, state, draws, X), expected, **CLOSE)


# Randomness inside of the model


def test_a_model_that_draws_numbers_runs_draw_by_draw(calls: list[bool]) -> None:
    """And takes from the global generator what the loop would take."""
    model = seeded(Wrapped(lambda model, y: y + torch.randn_like(y)))
    state = {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    draws = draws_of(dict(model.named_parameters()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = loop(model, state, draws, X)
        torch.manual_seed(0)
        assert_close(sampled_outputs(model, state, draws, X), expected, **CLOSE)
    assert calls == [False] * COUNT


# The model is left as it was


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "values": {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()},
        "kinds": {name: type(value) for name, value in model.named_parameters()},
        "hooks": [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()],
        "names": [sorted(vars(module)) for module in model.modules()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert all(before[key] == after[key] for key in ("modes", "kinds", "hooks", "names"))
    assert before["values"].keys() == after["values"].keys()
    for name, (identity, value) in before["values"].items():
        assert after["values"][name][0] == identity
        assert torch.equal(after["values"][name][1], value)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"attribute"}))
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, state, draws, inputs = prepared(name)
    model.train()
    before, kept = snapshot(model), {key: value.clone() for key, value in state.items()}
    sampled_outputs(model, state, draws, inputs)
    assert_same(before, snapshot(model))
    assert all(torch.equal(state[key], value) for key, value in kept.items())


@pytest.mark.parametrize("under_vmap", [False, True])
def test_also_after_an_error_inside(under_vmap: bool) -> None:
    """An error of the plain call is the caller's, as it is; one under vmap only is not even noticed."""

    def fail(model: nn.Module, y: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(y) is under_vmap:
            raise KeyError("inside")
        return y

    model = seeded(Wrapped(fail)).train()
    state = {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    draws, before = draws_of(dict(model.named_parameters())), snapshot(model)
    if under_vmap:
        assert sampled_outputs(model, state, draws, X).shape == (COUNT, 4, 2)
    else:
        with pytest.raises(KeyError, match="inside"):
            sampled_outputs(model, state, draws, X)
    assert_same(before, snapshot(model))


def test_an_error_under_one_draw_only_is_the_models_own() -> None:
    """Not the first draw: vmap gives up, and the loop raises what the model raised."""

    def fail(model: nn.Module, y: Tensor) -> Tensor:
        if y.max() > 1000:
            raise ArithmeticError("exploded")
        return y

    model = seeded(Wrapped(fail))
    draws = draws_of(dict(model.named_parameters()))
    draws.values["linear.bias"][3] = 1e4
    with pytest.raises(ArithmeticError, match="exploded"):
        sampled_outputs(model, {}, draws, X)


def test_errors_of_the_model_surface_as_they_are() -> None:
    """A wrong shape says what the layer says of it, and an output without a batch what we say."""
    model, state, draws, _ = prepared("mlp")
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(4x5 and 3x4\)"):
        sampled_outputs(model, state, draws, randn(4, 5, seed=0))
    pair = seeded(Wrapped(lambda model, y: (y, y)))
    with pytest.raises(ArgumentError, match="returned tuple"):
        sampled_outputs(pair, {}, draws_of(dict(pair.named_parameters())), X)


def test_nothing_of_vmap_is_left_in_attributes() -> None:
    """A model that keeps its activations keeps those of a plain call, and can be used on."""
    model = seeded(Wrapped(keep))
    model.kept = []
    draws = draws_of(dict(model.named_parameters()))
    outputs = sampled_outputs(model, {}, draws, X)
    assert_close(outputs, loop(model, {}, draws, X), **CLOSE)
    assert [torch.equal(model.last, outputs[0]), len(model.kept)] == [True, 1]
    assert model.last.tolist() == model.kept[0].tolist()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_every_draw_as_tensors(register: str, calls: list[bool]) -> None:
    """Whoever watches a model with a hook sees one plain call for each draw."""
    model, state, draws, inputs = prepared("mlp")
    seen: list[Any] = []
    getattr(model[0], register)(lambda module, args, *output: seen.append(args[0].tolist()))
    outputs = sampled_outputs(model, state, draws, inputs)
    assert seen == [inputs.tolist()] * COUNT
    assert calls == [False] * COUNT
    assert outputs.shape == (COUNT, 4, 2)


def test_models_that_cannot_be_copied_run_draw_by_draw(calls: list[bool]) -> None:
    model, state, draws, inputs = prepared("mlp")
    model.stream = (number for number in range(3))
    expected = torch.stack([call(model.eval(), {**state, **draw}, inputs) for draw in draws]).detach()
    assert_close(sampled_outputs(model, state, draws, inputs), expected, **CLOSE)
    assert calls == [False] * COUNT
